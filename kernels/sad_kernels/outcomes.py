"""Outcomes: what a token of either tokenizer counts as, where the two have no common vocabulary.

Each column of the student's logits, and each of the teacher's, belongs to one of ``count``
outcomes; a table on either side says to which. With ``T`` the temperature, of a row

    p(o) = sum of softmax(t / T) over the teacher's columns of o
    q(o) = sum of softmax(s / T) over the student's columns of o
    KD   = sum_o p(o) (log p(o) - log q(o)),    dKD/ds_v = q_v (1 - p(o) / q(o)) / T

with ``q_v`` the student's softmax and o the outcome of v, times ``T^2`` as for other divergences.
An outcome with p(o) = 0 adds 0 to the value and q_v to the gradient. One with p(o) > 0 that no
column of the student belongs to, or only columns at -inf, makes the value infinite, as a logit of
-inf does without outcomes.

Where each outcome is one column on both sides this is the ordinary forward KL of columns that may
be permuted. For two tokenizers the outcomes may be the strings that both have, a token counting
for its longest prefix among them. That is not consistent in general: two exact models of one
distribution over bytes can have a KL above 0, since where a token ends each tokenizer excludes
continuations that the other does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The outcome of each column of student and teacher, for tokenizers that differ.

    ``student[v]`` and ``teacher[v]`` are the outcomes, from 0 up to ``count``, of the columns v of
    either side's logits: int32 tables [V_s] and [V_t]. A loss that is given them compares the sums
    of probabilities of each outcome by the forward KL (formulas in the module's docstring), and the
    two widths may differ. An outcome may have several columns, one, or on the teacher's side none;
    with none on the student's, its value is infinite in rows where the teacher gives it mass.

    A table has an entry for each of its side's columns, or for each that counts by ``valid_vocab``.
    A ``TeacherTopK`` names outcomes in its ``ids``, not columns, and its tail is all other
    outcomes; the teacher's table is not read then.

    The entries are looked at once, here, for which the host waits for the tables' device; while
    ``torch.compile`` traces it is left out.

    Raises ``TypeError`` and ``ValueError`` for tables that are not int32 vectors on one device,
    that are empty, or that have entries outside ``[0, count)``.

    >>> import torch
    >>> from sad_kernels import kl_div
    >>> tables = torch.tensor([0, 1, 1]), torch.tensor([1, 0])  # "a", "b", "bc"; "b", "a"
    >>> outcomes = Outcomes(*(x.int() for x in tables), count=2)
    >>> student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.0, 0.0]])
    >>> kl_div(student, teacher, outcomes=outcomes)
    tensor(0.)
    """

    student: Tensor  # [V_s] int32
    teacher: Tensor  # [V_t] int32
    count: int

    def __post_init__(self) -> None:
        import torch

        if isinstance(self.count, bool) or not isinstance(self.count, int):
            raise TypeError(
                f"count must be an int, got {self.count!r}; pass the number of outcomes"
            )
        if self.count < 1:
            raise ValueError(
                f"count must be at least 1, got {self.count}; pass the number of outcomes"
            )
        for side in ("student", "teacher"):
            name, table = f"the {side}'s outcomes", getattr(self, side)
            if not isinstance(table, torch.Tensor) or table.dtype != torch.int32:
                got = table.dtype if isinstance(table, torch.Tensor) else type(table).__name__
                raise TypeError(f"{name} must be an int32 tensor, got {got}; convert them")
            if table.ndim != 1 or table.shape[0] == 0:
                raise ValueError(
                    f"{name} must have one entry per column, got shape {tuple(table.shape)}; "
                    "pass a vector of the width of its logits"
                )
            _require_range(name, table, self.count)
        if self.student.device != self.teacher.device:
            raise ValueError(
                "outcomes of student and teacher must be on one device, got "
                f"{self.student.device} and {self.teacher.device}; move them"
            )

    def to(self, device: torch.device | str) -> Outcomes:
        """The same on another device; not looked at again."""
        moved = object.__new__(Outcomes)
        for name, value in (
            ("student", self.student.to(device)),
            ("teacher", self.teacher.to(device)),
            ("count", self.count),
        ):
            object.__setattr__(moved, name, value)
        return moved


def _require_range(name: str, table: Tensor, count: int) -> None:
    """Raise for an entry outside ``[0, count)``, where there are entries to look at."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    if torch.compiler.is_compiling() or isinstance(table, FakeTensor) or table.is_meta:
        return
    lowest, highest = (int(x) for x in table.aminmax())
    if lowest < 0 or highest >= count:
        raise ValueError(
            f"{name} must lie in [0, {count}), got {lowest} to {highest}; number the outcomes from "
            "0 and pass count, one more than the last"
        )
