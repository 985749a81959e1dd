"""Logits as codes of 16 bits, ``logits="compact"``: the code, its losses, and who takes it."""

# pyright: reportArgumentType=false
# (tl.constexpr takes plain numbers)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    linear_cross_entropy,
    linear_distill_loss,
    linear_memory_bytes,
    reference,
)
from sad_kernels._dispatch import HAS_TRITON
from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._tiles import (
    COMPACT_CHUNK_BYTES,
    TRITON_CHUNK_BYTES,
    chunk_rows,
    compact_rows,
    pitch,
    product_row_bytes,
)
from support.codes import exact_products, judge_codes, rounded
from support.oracle import bound
from support.problems import plain
from support.traffic import counted_traffic, needs_interpreter
from torch import Tensor

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from sad_kernels import _tiles
from sad_kernels._triton import chunks, launch
from sad_kernels._triton.codes import GROUP, decoded, encoded, group_maxima
from sad_kernels._triton.compact import CodedRows
from sad_kernels._triton.gemm import HiddenWithHead

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
G = _tiles.GROUP
V = 2 * G + 37  # two whole groups and a part of one


@pytest.fixture
def only_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a loss takes whole rows of fp32 logits, and make slabs of one group each."""

    def refuse(*_: Any) -> None:
        raise AssertionError("logits must be codes, got fp32")

    monkeypatch.setattr(chunks.WholeRows, "__init__", refuse)
    monkeypatch.setattr(_tiles, "SLAB_COLUMNS", G)


# --- The code ------------------------------------------------------------------------------------


@triton.jit
def _code_kernel(x_ptr, k_ptr, code_ptr, y_ptr, again_ptr, ROWS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + at)
    k = group_maxima(x)
    code, y = encoded(x, k[:, None])
    tl.store(k_ptr + tl.arange(0, ROWS), k)
    tl.store(code_ptr + at, code)
    tl.store(y_ptr + at, y)
    tl.store(again_ptr + at, decoded(code))


def coded(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maxima, codes, what they stand for, and what they are decoded as, of rows of one group."""
    k = torch.empty(len(x))
    code = torch.empty(x.shape, dtype=torch.int16)
    y, again = torch.empty_like(x), torch.empty_like(x)
    _code_kernel[(1,)](x, k, code, y, again, ROWS=len(x))
    return k, code, y, again


def value_of(code: np.ndarray) -> np.ndarray:
    """By the definition: ``1/4 - 2^(e - 2) (1 + m / 4096)``, and -inf for the last exponent."""
    exponent, mantissa = code >> 12, code & 4095
    y = 0.25 - np.exp2(exponent - 2.0) * (1 + mantissa / 4096)
    return np.where(exponent == 15, -np.inf, y)


def test_every_code_is_what_its_bits_say_and_its_own_code() -> None:
    codes = np.arange(0xF001)
    y = torch.full((256, G), -math.inf)
    y.view(-1)[: len(codes)] = torch.from_numpy(value_of(codes)).float()
    y[:, 0] = torch.where(y[:, 0] == -math.inf, y[:, 0], 0.0)  # a maximum in every group
    k, found, stands_for, again = coded(y)
    assert not k[: len(codes) // G].any()
    assert torch.equal(again, y) and torch.equal(stands_for, y)
    expected = torch.from_numpy(codes).view(-1, 1)[:0xF000].view(-1, G)[:, 1:]
    assert torch.equal(found[: len(expected), 1:].int() & 0xFFFF, expected.int())


@pytest.mark.parametrize("offset", [0.0, 4095.9, 2.0**23])
def test_a_maximum_is_exact_and_all_else_within_two_to_the_minus_13(offset: float) -> None:
    """Also beside a large offset, where the distance plus 1/4 is no difference of two sums."""
    spread = torch.logspace(-4, 3.9, 8)[:, None]
    x = (offset - spread * torch.rand(8, G)).float()
    k, code, y, again = coded(x)
    assert torch.equal(k, x.amax(1)) and torch.equal(y, again)
    assert not y[x == k[:, None]].any() and not code[x == k[:, None]].any()
    v = 0.25 + (k[:, None].double() - x.double())
    error = (y.double() - (x.double() - k[:, None].double())).abs()
    assert (error <= v * 2.0**-13 * (1 + 2.0**-10)).all()
    assert float((error / v).max()) > 2.0**-14  # a bound that is reached


def test_infinities_nan_and_what_is_too_far_below() -> None:
    x = torch.zeros(8, G)
    x[0, 3], x[1, 3], x[2, 3], x[3, 3] = -math.inf, -8192.0, -8189.0, math.nan
    x[4], x[5, 3], x[6] = -math.inf, math.inf, -2e30
    x[7, 3:6] = torch.tensor([-8191.9, -1e4, torch.finfo(torch.float32).min])
    k, code, y, again = coded(x)
    assert y[0, 3] == again[0, 3] == -math.inf and code[0, 3] == 0xF000 - 2**16
    assert y[1, 3] == -8190.75 and y[2, 3] == -8188.75
    assert (y[7, 3:6] == -8190.75).all() and (code[7, 3:6] == 0xEFFF - 2**16).all()
    assert torch.equal(y[7], again[7]) and k[7] == 0
    # What is decoded is added to the maximum, so that NaN and inf reach the row.
    assert (k[3] + again[3]).isnan().all() and not k[[0, 1, 2]].any()
    assert k[4] == k[6] == np.float32(-1e30) and (y[4] == -math.inf).all()
    assert k[5] == math.inf and not (k[5] + again[5]).isfinite().any()


# --- Losses against the oracle -------------------------------------------------------------------

COMPACT = bound("triton", logits="compact")

CE: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias, scale, valid_vocab": {"logit_scale": 0.25, "cut": V - 41},
    "smoothing, z-loss, ignored": {"label_smoothing": 0.1, "z_loss": 1e-2, "ignore": "some"},
    "confident": {"distribution": "peaked"},
    "by row": {"reduction": "none", "upstream": "random", "ignore": "first"},
}


@pytest.mark.usefixtures("only_codes")
@pytest.mark.parametrize("name", CE)
def test_cross_entropy(name: str) -> None:
    problem = plain("linear_cross_entropy", BF16, **{"N": 5, "V": V, "D": 16} | CE[name])
    judge_codes(exact_products(problem), COMPACT)


@pytest.mark.usefixtures("only_codes")
def test_cross_entropy_in_fp16() -> None:
    problem = plain("linear_cross_entropy", FP16, N=5, V=V, D=16, label_smoothing=0.1)
    judge_codes(exact_products(problem), COMPACT)


KD: dict[str, dict[str, Any]] = {
    "T 1": {"temperature": 1.0},
    "T 2, smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2, "ignore": "some"},
    "reverse": {"divergence": "reverse_kl", "bias": True, "cut": V - 41},
    "reverse alone, T 1": {"divergence": "reverse_kl", "temperature": 1.0, "ce_weight": 0.0},
    "mixed target": {"teacher_share": 0.4, "temperature": 2.7, "scale_t2": False},
    "no weight": {"kd_weight": 0.0},
}


@pytest.mark.usefixtures("only_codes")
@pytest.mark.parametrize("name", KD)
def test_distillation(name: str) -> None:
    options = {"N": 5, "V": V, "D": 16, "teacher": "hidden"} | KD[name]
    problem = plain("linear_distill_loss", BF16, **options)
    judge_codes(exact_products(problem), COMPACT, options.get("teacher_share", 1.0))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("only_codes")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("vocab", [1, 40, G - 1, G, G + 1, 3 * G])
def test_more_sizes(vocab: int, divergence: str, dtype: torch.dtype) -> None:
    for temperature in (0.5, 1.0, 2.0, 20.0):
        for chunk_bytes in (None, 8 * vocab):
            options: dict[str, Any] = {"N": 7, "V": vocab, "D": 16, "teacher": "hidden"}
            options |= {"divergence": divergence, "temperature": temperature, "ignore": "some"}
            ops = bound("triton", chunk_bytes, "compact")
            judge_codes(exact_products(plain("linear_distill_loss", dtype, **options)), ops)


def peaked(N: int, columns: int, temperature: float, least: float) -> tuple[Tensor, ...]:
    """Hidden states of a student and a near teacher, whose divergence is just above ``least``
    nats, and a weight: rows as peaked as a language model's."""
    weight = (torch.randn(columns, 64) / 8).to(BF16)
    hidden = 3 * torch.randn(N, 64)
    noise = (4 * least) ** 0.5 * temperature * torch.randn(N, 64)
    assert (hidden @ weight.T.float()).softmax(-1).amax(-1).mean() > 0.1
    return hidden.to(BF16), (hidden + noise).to(BF16), weight


def kl_and_gradient(s: Tensor, t: Tensor, T: float) -> tuple[float, Tensor]:
    log_q, log_p = (s / T).log_softmax(-1), (t / T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return float(kl), (log_q.exp() - log_p.exp()) / T


@pytest.mark.parametrize(("temperature", "least"), [(1.0, 1e-3), (2.0, 1e-2)])
def test_near_agreement_codes_add_a_tenth_to_the_errors_of_gradients_at_most(
    temperature: float, least: float
) -> None:
    """As the docstring of ``linear_distill_loss`` says: beside the rounding of g to bf16. That the
    kernels' logits are these, the tests above show."""
    hidden, t_hidden, weight = (x.double() for x in peaked(64, 8192, temperature, least))
    s, t = hidden @ weight.T, t_hidden @ weight.T
    kl, g = kl_and_gradient(s, t, temperature)
    assert least < kl < 4 * least
    _, of_codes = kl_and_gradient(rounded(s), rounded(t), temperature)
    errors = [float(((x.to(BF16).double() - g) @ weight).norm()) for x in (of_codes, g)]
    assert errors[0] <= 1.1 * errors[1]
    kl, g = kl_and_gradient(s, s + (t - s) / 30, temperature)
    _, of_codes = kl_and_gradient(rounded(s), rounded(s + (t - s) / 30), temperature)
    errors = [float(((x.to(BF16).double() - g) @ weight).norm()) for x in (of_codes, g)]
    assert errors[0] > 1.5 * errors[1]  # nearer than that they do add to it


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "least"), [(1.0, 1e-3), (2.0, 1e-2)])
def test_kernels_near_agreement(temperature: float, least: float) -> None:
    """The same of the kernels, and of products on their way."""
    hidden, t_hidden, weight = peaked(24, V, temperature, least)
    objective = Objective(temperature=temperature, scale_t2=False)

    def gradient(of: Any, dtype: torch.dtype, **how: Any) -> Tensor:
        own = hidden.to(dtype).requires_grad_()
        teacher = TeacherHidden(t_hidden.to(dtype), Head(weight.to(dtype)))
        out = of(own, Head(weight.to(dtype)), None, teacher, objective, **how)
        return torch.autograd.grad(out.loss, own)[0].double()

    oracle = gradient(reference.linear_distill_loss, torch.float64)
    compact, exact = (
        float((gradient(linear_distill_loss, BF16, impl="triton", logits=how) - oracle).norm())
        for how in ("compact", "exact")
    )
    assert compact <= 1.1 * exact


# --- To the bit ----------------------------------------------------------------------------------


def draw(*shape: int) -> Tensor:
    """Quarters from -2 to 2: their products are exact in fp32 in any order."""
    return torch.randint(-8, 9, shape).to(BF16) / 4


@pytest.mark.usefixtures("only_codes")
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_equal_models_have_no_divergence_and_no_gradient(divergence: Any) -> None:
    hidden, weight, bias = torch.randn(4, 24).to(BF16), torch.randn(V, 24).to(BF16), draw(V)
    own, head = hidden.clone().requires_grad_(), Head(weight.clone().requires_grad_(), bias)
    objective = Objective(temperature=2.0, divergence=divergence)
    teacher = TeacherHidden(hidden, Head(weight, bias))
    out = linear_distill_loss(own, head, None, teacher, objective, impl="triton", logits="compact")
    assert out.kd == 0 and out.loss == 0
    for gradient in torch.autograd.grad(out.loss, (own, head.weight)):
        assert not gradient.any()


class Rows:
    """A student, a teacher and labels, some rows of which are computed by the codes' kernels."""

    def __init__(self, N: int) -> None:
        self.objective = Objective(ce_weight=0.5, label_smoothing=0.1, z_loss=1e-3, temperature=2.0)
        self.hidden, self.weight = draw(N, 8), draw(V, 8)
        self.t_hidden, self.t_weight = draw(N, 8), draw(V, 8)
        self.y = torch.randint(V, (N,))

    def __call__(self, rows: Tensor) -> list[Tensor]:
        """Losses, parts, and the gradient of the logits, which overwrites their codes."""
        spec = LossSpec(self.objective, V, -100, True, True)
        student = HiddenWithHead(self.hidden[rows], self.weight, None, 1.0, None)
        teacher = HiddenWithHead(self.t_hidden[rows], self.t_weight, None, 1.0, None)
        targets = RowTargets(self.y[rows])
        made = CodedRows(spec, student, targets, teacher, len(rows))
        g = torch.empty(len(rows), pitch(V), dtype=BF16)
        forward, s, t = made.forward(slice(0, len(rows)), targets, g)
        launch.gradient(spec, s, targets, t, forward, torch.ones(1), g[:, :V])
        return [forward.loss, forward.parts.T, g[:, :V]]


@pytest.mark.usefixtures("only_codes")
def test_a_row_has_the_same_bits_alone_and_in_company() -> None:
    rows = Rows(6)
    together = rows(torch.arange(6))
    for some in ([2], [5, 1, 0]):
        alone = rows(torch.tensor(some))
        for x, all_rows in zip(alone, together, strict=True):
            assert torch.equal(x, all_rows[some])


@pytest.mark.usefixtures("only_codes")
def test_chunks_and_slabs_leave_the_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(6)
    teacher = TeacherHidden(rows.t_hidden, Head(rows.t_weight))

    def losses(chunk_bytes: int | None) -> Tensor:
        out = linear_distill_loss(
            rows.hidden, Head(rows.weight), rows.y, teacher, rows.objective, reduction="none",
            chunk_bytes=chunk_bytes, impl="triton", logits="compact",
        )  # fmt: skip
        return out.loss

    before = losses(None)
    assert torch.equal(losses(1), before) and torch.equal(losses(40_000), before)
    monkeypatch.setattr(_tiles, "SLAB_COLUMNS", 2 * G)
    assert torch.equal(losses(None), before)


@pytest.mark.usefixtures("only_codes")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_nan_leaves_the_others_alone(bad: float) -> None:
    rows = Rows(4)
    before = rows(torch.arange(4))
    rows.hidden[1] = bad
    after = rows(torch.arange(4))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[[0, 2, 3]], y[[0, 2, 3]])
    assert after[0][1].isnan() and after[2][1].isnan().all()


@pytest.mark.usefixtures("only_codes")
def test_a_class_that_is_ruled_out() -> None:
    """-inf in a whole group but one, in the last group, and as a label."""
    hidden, weight = torch.ones(2, 1).to(BF16).requires_grad_(), draw(V, 1)
    bias = torch.zeros(V)
    bias[1:G] = bias[2 * G :] = -math.inf
    y = torch.tensor([0, V - 1])
    how: Any = {"bias": bias, "reduction": "none"}
    loss = linear_cross_entropy(hidden, weight, y, impl="triton", logits="compact", **how)
    kept = torch.cat((weight[:1], weight[G : 2 * G])).float().flatten()
    exact = kept.double().logsumexp(0) - kept[0].double()
    assert abs(float(loss[0].detach()) - float(exact)) < 1e-5 and loss[1] == math.inf
    (gradient,) = torch.autograd.grad(loss[0], hidden)
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("only_codes")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_columns_that_a_number_masks_in_the_teacher_alone(temperature: float) -> None:
    """As many models mask: the reverse KL is finite, and off by the number that is cut to 8191."""
    rows, masked = Rows(4), 5
    bias = torch.zeros(V)
    bias[3 : 3 + masked] = -1e4
    teacher = TeacherHidden(rows.t_hidden, Head(rows.t_weight, bias))
    objective = Objective(divergence="reverse_kl", temperature=temperature, scale_t2=False)

    given = rows.hidden, Head(rows.weight), None, teacher, objective
    how: Any = {"impl": "triton", "logits": "compact", "reduction": "none"}
    compact = linear_distill_loss(*given, **how).loss.double()
    exact = reference.linear_distill_loss(*given, reduction="none").loss.double()
    own = (rows.hidden.double() @ rows.weight.double().T / temperature).softmax(-1)
    share = own[:, 3 : 3 + masked].sum(1)
    bound = share * (1e4 - 8191 + 32) / temperature  # 32: as far as their other logits lie apart
    assert compact.isfinite().all() and (exact > 1).all()
    assert ((exact - compact) <= bound).all() and (compact >= 0.8 * exact).all()


# --- Who takes codes, and their weights ----------------------------------------------------------


@pytest.mark.usefixtures("only_codes")
def test_weights_of_rows() -> None:
    """A weight of 0 takes the row out, whatever the teacher's row holds."""
    problem = plain("linear_distill_loss", BF16, N=5, V=V, D=16, teacher="hidden")
    on_ce = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    on_kd = torch.tensor([0.0, 1.5, 1.0, 0.0, 0.3])
    call = problem.call

    def weighted(ops: Any, x: dict[str, Tensor]) -> Any:
        real = ops.linear_distill_loss

        class Weighted:
            @staticmethod
            def linear_distill_loss(*given: Any, **how: Any) -> Any:
                return real(*given, token_weights=on_ce, kd_token_weights=on_kd, **how)

        return call(Weighted, x)

    judge_codes(exact_products(replace(problem, call=weighted)), COMPACT)


def refused() -> dict[str, Callable[[str], Tensor]]:
    """Losses whose logits are never codes."""
    x, w, y = draw(3, 8), draw(300, 8), torch.tensor([1, 299, 5])
    t = TeacherHidden(draw(3, 8), Head(draw(300, 8)))
    half = torch.tensor([True, False, True])

    def distill(teacher: Any = t, head: Any = None, o: Any = None, **how: Any) -> Any:
        def call(logits: str) -> Tensor:
            own = (head or Head(w)), y, teacher, o or Objective(ce_weight=0.5)
            how["logits"] = logits
            return linear_distill_loss(x.to(how.pop("dtype", BF16)), *own, impl="triton", **how)[0]

        return call

    def ce(**how: Any) -> Any:
        return lambda logits: linear_cross_entropy(x, w, y, impl="triton", logits=logits, **how)

    two = Objective(other_divergence="reverse_kl")
    return {
        "fp32": lambda logits: linear_cross_entropy(
            x.float(), w.float(), y, impl="triton", logits=logits
        ),
        "softcap": ce(softcap=5.0),
        "weights of classes": ce(class_weight=torch.rand(300)),
        "jsd": distill(o=Objective(divergence="jsd")),
        "teacher's logits": distill(TeacherLogits(torch.randn(3, 300))),
        "two divergences": distill(o=two, other_rows=half),
        "low temperature": distill(o=Objective(temperature=0.1)),
    }


@pytest.mark.few(3)
@pytest.mark.parametrize("name", refused())
def test_what_cannot_be_codes_has_the_bits_of_exact_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("logits must be fp32, got codes")

    monkeypatch.setattr(CodedRows, "__init__", refuse)
    loss = refused()[name]
    assert torch.equal(loss("compact"), loss("exact"))


def test_the_torch_path_computes_the_same_either_way() -> None:
    x, w, y = draw(3, 8), draw(300, 8), torch.tensor([1, 299, 5])
    losses = [linear_cross_entropy(x, w, y, impl="torch", logits=how) for how in NAMES]
    assert torch.equal(*losses)


NAMES: Any = ("exact", "compact")


def test_another_format_is_refused() -> None:
    x, w, y = draw(3, 8), draw(300, 8), torch.tensor([1, 299, 5])
    with pytest.raises(ValueError, match="logits must be one of exact, compact, got 'fp8'"):
        linear_cross_entropy(x, w, y, logits="fp8")


# --- Bytes ---------------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("divergence", [None, "forward_kl", "reverse_kl"])
def test_a_slab_is_read_once_and_codes_are_overwritten(divergence: Any) -> None:
    """Per logit 4 bytes read and 2 written, then 2 read and 2 written; of a teacher 4 and 2, 2
    more of the student's, then 2."""
    N, columns = 4, 2 * G + 37
    spec = LossSpec(
        Objective(ce_weight=0.5, temperature=2.0, divergence=divergence or "forward_kl"),
        columns, -100, True, True,
    )  # fmt: skip
    student = HiddenWithHead(draw(N, 8), draw(columns, 8), None, 1.0, None)
    teacher = None if divergence is None else student
    targets = RowTargets(torch.tensor([3, -100, 5, columns - 1]))
    counted, numbers = 3, 3 * columns  # rows that are not ignored
    made = CodedRows(spec, student, targets, teacher, N)
    g = torch.empty(N, pitch(columns), dtype=BF16)
    with counted_traffic() as traffic:
        forward, s, t = made.forward(slice(0, N), targets, g)
    sides = 1 if teacher is None else 2
    best = sum(min(columns, (int(b) // G + 1) * G) - int(b) // G * G for b in bests(s, counted))
    assert traffic.read_from(made.slab) == sides * 4 * numbers
    read = traffic.read_from(g)
    assert read == 2 * (numbers * (sides - 1) + best + counted)  # argmax and label
    assert traffic.written_to(g) == 2 * numbers
    if teacher is not None:
        assert traffic.written_to(made.teacher_codes) == 2 * numbers
    with counted_traffic() as traffic:
        launch.gradient(spec, s, targets, t, forward, torch.ones(1), g[:, :columns])
    assert traffic.read_from(g) == 2 * numbers
    assert traffic.written_to(g) == 2 * N * columns  # zeros in the ignored row
    if teacher is not None:
        assert traffic.read_from(made.teacher_codes) == 2 * numbers


def bests(student: launch.Logits, counted: int) -> Iterator[int]:
    """Of the rows that count, a column of the group with the largest maximum."""
    assert student.shifts is not None
    rows = [0, 2, 3]
    assert len(rows) == counted
    for row in rows:
        yield int(student.shifts[row].argmax()) * G


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1 << 28, 1 << 30, COMPACT_CHUNK_BYTES])
@pytest.mark.parametrize("vocab", [257, 32000, 128256, 262144])
def test_chunks_fit_their_budget(vocab: int, chunk_bytes: int, sides: int) -> None:
    rows = compact_rows(vocab, sides, chunk_bytes)
    width = pitch(vocab)
    used = 2 * width * (rows.gradient + (sides - 1) * rows.forward)
    used += product_row_bytes(vocab, sides) * rows.forward
    assert used <= chunk_bytes or rows.forward == 1
    assert rows.gradient >= rows.forward


def test_a_chunk_has_twice_the_rows() -> None:
    """At the vocabulary of the benchmark 4096 rows of both losses share one product for dweight."""
    one, two = (compact_rows(128256, sides, COMPACT_CHUNK_BYTES) for sides in (1, 2))
    assert min(one.gradient, two.gradient) >= 4096 and one.forward == two.forward == 1024
    assert chunk_rows(128256, 2, 2, TRITON_CHUNK_BYTES).gradient == 2048


def test_the_estimate_of_memory_knows_codes() -> None:
    """On a GPU; an interpreter copies the factors of every product to fp32."""

    def said(logits: Any, **how: Any) -> int:
        sizes = 8192, 128256, 4096
        how = {"dtype": BF16, "impl": "triton"} | how
        return linear_memory_bytes(*sizes, logits=logits, **how).logits

    teacher: Any = {"teacher": "hidden", "teacher_width": 4096}
    for how in ({}, teacher):
        assert 2 * pitch(128256) * 4096 < said("compact", **how) <= COMPACT_CHUNK_BYTES
        assert said("compact", chunk_bytes=1 << 28, **how) <= 1 << 28
        assert said("compact", gradients=(), **how) < said("compact", **how) / 2
    for other in ({"dtype": FP32}, {"teacher": "logits"}, teacher | {"divergence": "jsd"}):
        assert said("compact", **other) == said("exact", **other)
