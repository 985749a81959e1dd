"""The Triton implementation: kernels, their launchers, and the operators that torch knows them by.

tile.py     what is done to one tile of logits (device functions)
rows.py     the four kernels over rows of logits: statistics, merge, terms, gradient
launch.py   tiles, warps and grids; the only place that launches the kernels of rows.py
operator.py operators that torch knows by name, and the shorter way where only autograd looks
reduce.py   rows to their mean, their count and the sums of their parts
logits.py   operators for losses of logits that are there
linear.py   operators for losses of hidden states and a head; what they ask for is in request.py
chunks.py   the loop of a linear loss over chunks of rows; its products are in gemm.py
scale.py    a gradient times a number on the device
ema.py      update and swap of a whole model in one launch

Imported only where triton is installed.
"""
