"""``impl`` is met or refused, never replaced; and ``auto`` takes what works on the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sad_kernels
import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, TeacherTopK, _dispatch
from torch import Tensor

pytest.importorskip("triton")


def call(op: str, impl: str, dtype: torch.dtype = torch.float32) -> Tensor:
    s, hidden, weight = (torch.ones(shape, dtype=dtype) for shape in ((3, 8), (3, 4), (8, 4)))
    y, objective = torch.tensor([0, 1, 2]), Objective(ce_weight=0.5)
    match op:
        case "cross_entropy":
            return sad_kernels.cross_entropy(s, y, impl=impl)
        case "kl_div":
            return sad_kernels.kl_div(s, s, impl=impl)
        case "distill_loss":
            return sad_kernels.distill_loss(s, y, TeacherLogits(s), objective, impl=impl).loss
        case "linear_cross_entropy":
            return sad_kernels.linear_cross_entropy(hidden, weight, y, impl=impl)
        case _:
            head, teacher = Head(weight), TeacherLogits(s)
            return sad_kernels.linear_distill_loss(
                hidden, head, y, teacher, objective, impl=impl
            ).loss


OPS = ("cross_entropy", "kl_div", "distill_loss", "linear_cross_entropy", "linear_distill_loss")
every_op = pytest.mark.parametrize("op", OPS)


@every_op
def test_an_unknown_implementation_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'cuda'; "):
        call(op, "cuda")
    with pytest.raises(TypeError, match=r"impl must be a string, got None; "):
        call(op, None)  # pyright: ignore[reportArgumentType]


@every_op
def test_the_kernels_refuse_float64(op: str) -> None:
    assert call(op, "torch", torch.float64).dtype == torch.float64
    with pytest.raises(TypeError, match=r"impl='triton' must get float32, .*, got torch.float64; "):
        call(op, "triton", torch.float64)


@pytest.mark.parametrize("kind", ["logits", "hidden", "log_probs"])
def test_the_kernels_refuse_a_teacher_in_float64(kind: str) -> None:
    """Log-probabilities are welcome in float64, of which the rest of 1 is better known."""
    s, y, wide = torch.ones(3, 8), torch.tensor([0, 1, 2]), torch.float64
    teacher = {
        "logits": TeacherLogits(s.to(wide)),
        "hidden": TeacherHidden(s[:, :4].to(wide), Head(torch.ones(8, 4, dtype=wide))),
        "log_probs": TeacherTopK(y[:, None], torch.full((3, 1), -1.0, dtype=wide)),
    }[kind]
    distilled = sad_kernels.distill_loss
    assert distilled(s, y, teacher, Objective(), impl="torch").loss.isfinite()
    if kind == "log_probs":
        assert distilled(s, y, teacher, Objective(), impl="triton").loss.isfinite()
    else:
        with pytest.raises(TypeError, match="float64"):
            distilled(s, y, teacher, Objective(), impl="triton")


@every_op
def test_triton_on_a_cpu_takes_the_interpreter(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"must get tensors on a GPU, got cpu; .*TRITON_INTERPRET"):
        call(op, "triton")


@every_op
def test_a_missing_triton_is_named(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match=r"must find the package triton, .*impl='torch'"):
        call(op, "triton")


@every_op
def test_auto_takes_the_torch_path_on_a_cpu(op: str, spy: Callable[[], list[str]]) -> None:
    """Interpreted kernels are asked for by name: they are there for tests, not for speed."""
    assert torch.equal(call(op, "auto"), call(op, "torch"))
    assert spy() == []
    call(op, "triton")
    assert spy()


@pytest.fixture
def spy() -> Iterator[Callable[[], list[str]]]:
    """The names of the kernels that have been launched so far."""
    from sad_kernels._triton.tile_sizes import Tile, current_rule, tile_rule

    seen: list[str] = []
    rule = current_rule()

    def note(arch: str, kernel: str, *how: Any) -> Tile:
        seen.append(kernel)
        return rule(arch, kernel, *how)

    with tile_rule(note):
        yield lambda: seen
