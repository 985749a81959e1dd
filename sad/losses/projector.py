"""The map from the student's hidden width to the teacher's, on the student's side of a loss."""

from __future__ import annotations

import math

from torch import nn


def make_projector(student_width: int, teacher_width: int) -> nn.Module:
    """``y = W h`` without bias, W [D_t, D_s]; the identity, without parameters, if widths agree.

    W starts orthogonal, drawn from the global generator: projected states have the norm of the
    state (orthonormal columns), or where the teacher is narrower, have it in the root mean square
    over directions (orthonormal rows, times ``sqrt(D_s / D_t)``).
    """
    if student_width == teacher_width:
        return nn.Identity()
    projector = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(projector.weight, gain=max(1.0, math.sqrt(student_width / teacher_width)))
    return projector
