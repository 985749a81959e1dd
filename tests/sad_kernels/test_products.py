"""Matrix products of the torch path: which library, and bf16 products in two parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    linear_distill_loss,
    reference,
)
from sad_kernels._torch import gemm
from sad_kernels._torch.gemm import multiply_, onednn_products, product_less_, split_product_
from torch import Tensor

BF16 = torch.bfloat16


class Switch:
    fp32_precision = "none"


def use_switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """A processor on which oneDNN is faster, and a setting to look at."""
    switch = Switch()
    monkeypatch.setattr(gemm, "_switch", lambda: switch)
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", True)
    return switch


# --- The library ----------------------------------------------------------------------------------


def test_the_switch_is_turned_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = use_switch(monkeypatch)
    with pytest.raises(ZeroDivisionError), onednn_products():
        assert switch.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert switch.fp32_precision == "none"


def test_a_setting_of_the_caller_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = use_switch(monkeypatch)
    switch.fp32_precision = "tf32"
    with onednn_products():
        assert switch.fp32_precision == "tf32"
    assert switch.fp32_precision == "tf32"


def test_amx_rounds_fp32_factors_and_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the same setting computes in bf16."""
    switch = use_switch(monkeypatch)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for features, faster in ((), False), (("avx512",), True), (("avx512", "amx_tile"), False):
        monkeypatch.setattr(gemm, "has_cpu_feature", features.__contains__)
        assert gemm._is_onednn_faster() == faster
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", False)
    with onednn_products():
        assert switch.fp32_precision == "none"


def test_whether_the_setting_would_move_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = use_switch(monkeypatch)
    assert gemm.moves_setting()
    with onednn_products():
        assert not gemm.moves_setting(), "it is moved"
    switch.fp32_precision = "tf32"
    assert not gemm.moves_setting()
    monkeypatch.setattr(gemm, "_switch", lambda: None)
    assert not gemm.moves_setting()


def test_a_torch_without_the_setting_takes_its_own_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_switch(monkeypatch)
    monkeypatch.setattr(gemm, "_switch", lambda: None)
    with onednn_products():
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_onednn", [False, True])
def test_products_in_pieces_are_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by_onednn: bool
) -> None:
    monkeypatch.setattr(gemm, "_by_onednn", lambda a: by_onednn)
    for k in (0, 1, 511, 512, 513, 1200):
        a, b, c = (torch.randn(*shape).to(dtype) for shape in ((5, k), (k, 7), (5, 7)))
        torch.testing.assert_close(multiply_(torch.full_like(c, torch.nan), a, b), a @ b)
        torch.testing.assert_close(multiply_(c.clone(), a, b, add=True), c + a @ b)


@pytest.mark.parametrize("add", [False, True])
def test_rows_have_the_bits_they_have_in_company(add: bool) -> None:
    a, b, c = torch.randn(48, 70), torch.randn(70, 300), torch.randn(48, 300)
    together = multiply_(c.clone(), a, b, add=add)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31):
        for rows in (slice(0, count), slice(48 - count, 48)):
            assert torch.equal(multiply_(c[rows].clone(), a[rows], b, add=add), together[rows])


# --- Split products -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_two_bf16_products_have_16_bits(rows: int) -> None:
    a, b = torch.randn(rows, 64).to(BF16), torch.randn(64, 90).to(BF16)
    high, low = a.new_empty(rows, 90), a.new_empty(rows, 90)
    split_product_(high, low, a, b)
    exact = a.double() @ b.double()
    size = (a.double().abs() @ b.double().abs()).clamp(min=1e-30)
    assert ((high.double() - exact).abs() / size).max() > 2**-14  # one alone has 8 bits
    assert ((high.double() + low.double() - exact).abs() / size).max() < 2**-16


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_a_difference_of_products_is_rounded_as_a_difference(rows: int) -> None:
    a, b = torch.randn(rows, 64).to(BF16), torch.randn(64, 90).to(BF16)
    exact = a.double() @ b.double()
    base = (exact * (1 + 0.01 * torch.randn(exact.shape))).to(BF16)
    apart = torch.empty_like(base)
    product_less_(apart, a, b, base)
    expected = exact - base.double()
    assert (apart.double() - expected).abs().max() < 2**-8 * expected.abs().max()


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bf16: any other does the same, slowly."""
    monkeypatch.setattr(gemm, "HAS_BF16_PRODUCTS", True)


N, V, D = 24, 500, 48
OBJECTIVES = {
    "forward": Objective(),
    "joint": Objective(ce_weight=0.5, kd_weight=0.5, temperature=2.0, label_smoothing=0.1),
    "reverse": Objective(divergence="reverse_kl"),
    "jsd": Objective(divergence="jsd"),
    "skew": Objective(divergence="skew_reverse_kl", beta=0.1),
}


class Leaves:
    """A student and a teacher in bf16, far apart or near each other."""

    def __init__(self, near: bool, student_scale: float = 1.0) -> None:
        g = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(N, D, generator=g).to(BF16)
        weight = 0.2 * torch.randn(V, D, generator=g)
        self.weight = (student_scale * weight).to(BF16)
        self.states = self.hidden.clone() if near else torch.randn(N, D, generator=g).to(BF16)
        noise = torch.randn(V, D, generator=g)
        self.teacher_weight = (weight + 2e-3 * noise if near else 0.2 * noise).to(BF16)
        self.labels = torch.randint(V, (N,), generator=g)
        self.labels[2] = -100

    def outputs(
        self, ops: Any, objective: Objective, dtype: torch.dtype = BF16, **mechanics: Any
    ) -> list[Tensor]:
        """The loss, dhidden and dweight."""
        hidden, weight = (x.to(dtype).detach() for x in (self.hidden, self.weight))
        hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
        teacher = TeacherHidden(self.states.to(dtype), Head(self.teacher_weight.to(dtype)))
        head = Head(weight)
        out = ops.linear_distill_loss(hidden, head, self.labels, teacher, objective, **mechanics)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight])]

    def eager_in_bf16(self, objective: Objective) -> list[Tensor]:
        """The same with logits of one bf16 product, as a model in bf16 has them."""
        hidden, weight = (x.clone().requires_grad_() for x in (self.hidden, self.weight))
        s, t = hidden @ weight.T, self.states @ self.teacher_weight.T
        out = reference.distill_loss(s, self.labels, TeacherLogits(t), objective)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight])]


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


class _Module:
    linear_distill_loss = staticmethod(linear_distill_loss)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 19, 1 << 17], ids=["one", "some", "replay"])
def test_split_products_err_no_more_than_eager(
    name: str, near: bool, chunk_bytes: int | None
) -> None:
    """And by far less near agreement, where logits of 8 bits are noise."""
    leaves, objective = Leaves(near), OBJECTIVES[name]
    exact = leaves.outputs(reference, objective, torch.float64)
    ours = errors(leaves.outputs(_Module, objective, chunk_bytes=chunk_bytes), exact)
    eager = errors(leaves.eager_in_bf16(objective), exact)
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine <= max(theirs, 2e-4)
    if near and objective.ce_weight == 0:
        assert all(mine < theirs / 5 for mine, theirs in zip(ours[1:], eager[1:], strict=True))


@pytest.mark.usefixtures("split")
def test_a_student_whose_logits_dwarf_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference a thousand times as large does not tell what the teacher's logits are."""
    leaves, objective = Leaves(near=False, student_scale=1000.0), Objective()
    exact = leaves.outputs(reference, objective, torch.float64)
    ours = errors(leaves.outputs(_Module, objective), exact)
    eager = errors(leaves.eager_in_bf16(objective), exact)
    assert all(mine <= theirs + 2e-4 for mine, theirs in zip(ours, eager, strict=True))


@pytest.mark.usefixtures("split")
def test_split_rows_do_not_depend_on_their_company() -> None:
    leaves, objective = Leaves(near=True), OBJECTIVES["joint"]
    teacher = TeacherHidden(leaves.states, Head(leaves.teacher_weight))

    def rows(at: slice) -> Tensor:
        return linear_distill_loss(
            leaves.hidden[at],
            Head(leaves.weight),
            leaves.labels[at],
            TeacherHidden(teacher.hidden[at], teacher.head),
            objective,
            reduction="none",
        ).loss

    together = rows(slice(None))
    for start in range(3, N, 5):
        assert torch.equal(rows(slice(start, start + 1)), together[start : start + 1])


def test_the_linear_loss_is_not_eager_pytorchs() -> None:
    """A guard for this file: the yardstick is in bf16."""
    leaves = Leaves(near=True)
    exact = leaves.outputs(reference, Objective(), torch.float64)
    assert errors(leaves.eager_in_bf16(Objective()), exact)[1] > 0.05
