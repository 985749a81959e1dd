"""The Triton implementation: kernels, their launchers, and the operators that torch knows.

Imported only where triton is installed. From device code to public functions:

tile.py        mathematics of one tile of logits: exponentials, softcap, divergences
rows.py        how the four row kernels work together (read this first); what they share
statistics.py  kernel: partial sums of each row over each segment of the vocabulary
merge.py       kernel: segments to rows, and the losses of each row
top_k.py       the part of it that puts in a top-k teacher's ids
mixture.py     kernel: divergences against a mixture, which take a second reading
gradient.py    kernel: the gradient by the logits
tile_sizes.py  the table of tile sizes; the rule that sweeps and tests replace
launch.py      tensors to launches of these four kernels: ``forward`` and ``gradient``
codes.py       logits in 16 bits, relative to the largest of a group of columns
compress.py    kernels: fp32 products to codes, and their sums by group
fold.py        kernel: the groups of each row put together
compact.py     which linear losses keep their logits as codes, and their launches
outcomes.py    kernels: a teacher with another vocabulary as one of the student's columns
reduce.py      kernel: row losses to their mean, and the sums of their parts
scale.py       kernel: a gradient times a number on the device
operator.py    registration of torch operators, and the encoding of their options
logits.py      operators and entry points for losses of logits
chunks.py      linear losses in chunks of rows: products, row kernels, products again
gemm.py        matrix products with fp32 results; a model's hidden states and its head
linear.py      operators and entry points for losses of hidden states and a head
ema.py         kernels: averaging and swapping of a whole model in one launch per device
"""
