"""The Triton implementation: kernels, their launchers, and the operators that torch knows them by.

tile.py     what is done to one tile of logits (device functions)
rows.py     the four kernels over rows of logits: statistics, merge, terms, gradient
launch.py   tiles, warps and grids; the only place that launches the kernels of rows.py
logits.py   operators for losses of logits that are there
linear.py   operators for losses of hidden states and a head
ema.py      update and swap of a whole model in one launch

Imported only where triton is installed.
"""
