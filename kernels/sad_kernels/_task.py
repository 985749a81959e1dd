"""What is asked of rows of logits and what comes back, whichever implementation answers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sad_kernels.objective import Objective


class Task(NamedTuple):
    """What is asked of the rows, without any tensor."""

    objective: Objective
    vocab: int
    ignore_index: int
    classes: bool  # labels name classes, so there is a CE; in kl_div they only say which rows count
    diagnostics: bool  # entropy, correct, agree


class RowResults(NamedTuple):
    """One number per row. ``loss`` is the weighted sum of the three that follow."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    z: Tensor
    correct: Tensor
    agree: Tensor
    entropy: Tensor
