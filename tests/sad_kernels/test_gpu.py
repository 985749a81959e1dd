"""What only a GPU can show: past 2^31 elements, determinism, peak memory, streams, graphs, no sync.

The other tests of the kernels run on a GPU too, with small inputs (see ``on_gpu.py``). Here inputs
have the shapes of real use, tensors live on the GPU, and products are the library's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from sad_kernels import (
    DistillOutput,
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    _dispatch,
    cross_entropy,
    distill_loss,
    ema_swap_,
    ema_update_,
    kl_div,
    linear_cross_entropy,
    linear_distill_loss,
)
from support.oracle import (
    Outputs,
    Problem,
    assert_ema_within,
    bound,
    judge,
    judge_outputs,
    scales_of,
)
from torch import Tensor

pytest.importorskip("triton")

from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._triton import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(120),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

DISTILL = Objective(ce_weight=0.5, kd_weight=0.5, label_smoothing=0.1, z_loss=1e-4, temperature=2.0)
JSD = Objective(ce_weight=0.5, kd_weight=0.5, temperature=2.7, divergence="jsd")


def noise(*shape: int, dtype: torch.dtype = BF16, std: float = 3.0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(std=std)


def some_labels(N: int, V: int) -> Tensor:
    """Every seventh row does not count."""
    labels = torch.randint(V, (N,), device="cuda")
    labels[::7] = -100
    return labels


def needs_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, got {free >> 30}")


@pytest.fixture(autouse=True)
def tensors_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``on_gpu.py`` does for other tests would send ``impl="auto"`` to the torch path here."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)


def test_auto_takes_the_kernels() -> None:
    x, y = noise(4, 1000), some_labels(4, 1000)
    assert _dispatch.resolve_impl("auto", x, y) == "triton"
    assert _dispatch.resolve_impl("auto", x.double(), y) == "torch"


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


# --- One call of everything -----------------------------------------------------------------------

Step = Callable[[], Outputs]


class Inputs:
    """Static inputs of every function, so that a graph can be replayed with new contents."""

    def __init__(self, N: int = 1000, V: int = 50257, D: int = 256, dtype: torch.dtype = BF16):
        self.labels = some_labels(N, V)
        self.logits, self.teacher = noise(N, V, dtype=dtype), noise(N, V, dtype=dtype)
        self.hidden = noise(N, D, dtype=dtype, std=1.0)
        self.weight, self.bias = noise(V, D, dtype=dtype, std=0.1), noise(V, dtype=dtype, std=0.1)
        self.teacher_hidden = noise(N, D, dtype=dtype, std=1.0)
        self.teacher_weight = noise(V, D, dtype=dtype, std=0.1)
        top = self.teacher.float().log_softmax(-1).topk(64)
        self.ids, self.log_probs = top.indices, top.values
        self.shadow, self.param = noise(10_000_000, dtype=FP32), noise(10_000_000, dtype=dtype)
        self.moved_shadow, self.moved_param = self.shadow.clone(), self.param.clone()
        self.items = torch.tensor(float(N), device="cuda")
        for leaf in (self.logits, self.hidden, self.weight, self.bias):
            leaf.requires_grad_()

    def renew(self) -> None:
        """New contents in the same memory."""
        with torch.no_grad():
            for x in (self.logits, self.teacher, self.hidden, self.weight, self.shadow, self.param):
                x.copy_(x.flip(0))
            self.labels.copy_(self.labels.roll(1))

    def steps(self) -> dict[str, Step]:
        head = Head(self.weight, self.bias, softcap=30.0)
        hidden = TeacherHidden(self.teacher_hidden, Head(self.teacher_weight))
        logits, top_k = TeacherLogits(self.teacher), TeacherTopK(self.ids, self.log_probs)
        y, s, h, n = self.labels, self.logits, self.hidden, self.items

        def ce() -> Outputs:
            return with_gradients(cross_entropy(s, y, label_smoothing=0.1, z_loss=1e-4), s)

        def kl() -> Outputs:
            return with_gradients(kl_div(s, self.teacher, divergence="reverse_kl", labels=y), s)

        def distill(teacher: Any, objective: Objective) -> Step:
            return lambda: with_gradients(distill_loss(s, y, teacher, objective, num_items=n), s)

        def linear_ce() -> Outputs:
            rows = linear_cross_entropy(h, self.weight, y, reduction="none", chunk_bytes=1 << 26)
            return with_gradients(rows.sum(), h, self.weight)

        def linear(teacher: Any, objective: Objective) -> Step:
            def step() -> Outputs:
                out = linear_distill_loss(
                    h, head, y, teacher, objective, num_items=n, chunk_bytes=1 << 26
                )
                return with_gradients(out, h, self.weight, self.bias)

            return step

        def ema() -> Outputs:
            # In memory of their own: a graph cannot capture a first call with new addresses.
            self.moved_shadow.copy_(self.shadow)
            self.moved_param.copy_(self.param)
            ema_update_([self.moved_shadow], [self.moved_param], 0.999)
            ema_swap_([self.moved_shadow], [self.moved_param])
            return {"shadow": self.moved_shadow.clone(), "param": self.moved_param.clone()}

        return {
            "cross_entropy": ce,
            "kl_div": kl,
            "distill_loss": distill(logits, DISTILL),
            "distill_loss, jsd": distill(logits, JSD),
            "distill_loss, top-k": distill(top_k, DISTILL),
            "linear_cross_entropy": linear_ce,
            "linear_distill_loss": linear(hidden, DISTILL),
            "linear_distill_loss, jsd": linear(hidden, JSD),
            "linear_distill_loss, top-k": linear(top_k, DISTILL),
            "ema": ema,
        }


STEPS = (
    "cross_entropy",
    "kl_div",
    "distill_loss",
    "distill_loss, jsd",
    "distill_loss, top-k",
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_distill_loss, jsd",
    "linear_distill_loss, top-k",
    "ema",
)


def with_gradients(result: Tensor | DistillOutput, *leaves: Tensor) -> Outputs:
    out = result._asdict() if isinstance(result, DistillOutput) else {"loss": result}
    gradients = torch.autograd.grad(out["loss"], leaves)
    named = {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return {name: x.detach() for name, x in out.items()} | named


def assert_equal(got: Outputs, expected: Outputs) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert_same_bits(x, expected[name], name)


def assert_same_bits(got: Tensor, expected: Tensor, name: str) -> None:
    """Equal, NaNs included; or say where they are not, and by how much."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, name
    differ = (got != expected) & ~(got.isnan() & expected.isnan())
    if differ.any():
        at = differ.nonzero()
        a, b = got[differ][:5].tolist(), expected[differ][:5].tolist()
        rows = at[:, 0].unique().tolist() if at.shape[1] else []
        raise AssertionError(
            f"{name}: {len(at)} of {differ.numel()} elements differ, in rows {rows[:8]}, the first "
            f"at {at[:5].tolist()}: got {a}, expected {b}; NaN in {int(got.isnan().sum())} and "
            f"{int(expected.isnan().sum())}"
        )


# --- The rule, on shapes of real use --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("V", "valid"), [(1000, None), (50257, None), (151936, 151665)])
def test_cross_entropy_keeps_the_rule(
    V: int, valid: int | None, dtype: torch.dtype, record_property: Any
) -> None:
    N = 131
    logits, y, upstream = noise(N, V, dtype=dtype), some_labels(N, valid or V), noise(N, dtype=FP32)
    objective = Objective(ce_weight=1.0, kd_weight=0.0, label_smoothing=0.1, z_loss=1e-3)

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        return ops.cross_entropy(
            x["logits"], y, label_smoothing=0.1, z_loss=1e-3, valid_vocab=valid, reduction="none"
        )

    s = logits[:, :valid].double()
    scales = scales_of(objective, s, None, y != -100, upstream, None)
    problem = Problem("cross_entropy", call, {"logits": logits}, ("logits",), upstream, scales)
    record_property("share", judge(problem, bound("triton")))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("objective", [DISTILL, JSD], ids=["forward_kl", "jsd"])
def test_distill_loss_keeps_the_rule(
    objective: Objective, dtype: torch.dtype, record_property: Any
) -> None:
    N, V = 131, 128256
    student, teacher, y = noise(N, V, dtype=dtype), noise(N, V, dtype=dtype), some_labels(N, V)

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        return ops.distill_loss(x["logits"], y, TeacherLogits(x["teacher"]), objective, num_items=N)

    upstream = torch.tensor(0.37, device="cuda")
    s, t = student.double(), teacher.double()
    scales = scales_of(objective, s, t, y != -100, upstream, float(N))
    leaves = {"logits": student, "teacher": teacher}
    problem = Problem("distill_loss", call, leaves, ("logits",), upstream, scales)
    record_property("share", judge(problem, bound("triton")))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("objective", [DISTILL, JSD], ids=["forward_kl", "jsd"])
def test_linear_distill_loss_keeps_the_rule(
    objective: Objective, dtype: torch.dtype, record_property: Any
) -> None:
    """In three chunks of rows, with library products and their accumulation."""
    N, V, D = 131, 32000, 512
    leaves = {
        "hidden": noise(N, D, dtype=dtype, std=1.0),
        "weight": noise(V, D, dtype=dtype, std=0.1),
        "teacher": noise(N, 2 * D, dtype=dtype, std=1.0),
        "teacher_weight": noise(V, 2 * D, dtype=dtype, std=0.1),
    }
    y = some_labels(N, V)

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        teacher = TeacherHidden(x["teacher"], Head(x["teacher_weight"]))
        head = Head(x["weight"])
        return ops.linear_distill_loss(x["hidden"], head, y, teacher, objective, num_items=N)

    upstream = torch.tensor(0.37, device="cuda")
    s = leaves["hidden"].double() @ leaves["weight"].double().T
    t = leaves["teacher"].double() @ leaves["teacher_weight"].double().T
    size_s, size_t = (max(1.0, float(z.abs().max())) for z in (s, t))
    scales = scales_of(objective, s, t, y != -100, upstream, float(N), size_s, size_t)
    problem = Problem(
        "linear_distill_loss",
        call,
        leaves,
        ("hidden", "weight"),
        upstream,
        scales,
        magnitude=max(size_s, size_t),
    )
    share = judge(problem, bound("triton", chunk_bytes=16 * V * 50))
    record_property("share", share)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_ema_keeps_the_rule_and_its_swap_is_its_own_inverse(dtype: torch.dtype) -> None:
    sizes = (1, 7, 4096, 1_000_003)
    shadows = [noise(n, dtype=FP32) for n in sizes]
    params = [noise(n, dtype=dtype) for n in sizes]
    before = [s.clone() for s in shadows]
    ema_update_(shadows, params, 0.9)
    for new, old, param in zip(shadows, before, params, strict=True):
        oracle = 0.9 * old.double() + (1 - 0.9) * param.double()
        assert_ema_within(new, oracle, old, param)
    if dtype != FP16:  # which has no lossless swap
        both = shadows + params
        once = [x.cpu().clone() for x in both]
        ema_swap_(shadows, params)
        on_cpu = [x.clone() for x in once]
        ema_swap_(on_cpu[: len(sizes)], on_cpu[len(sizes) :], impl="torch")
        assert all(map(torch.equal, (x.cpu() for x in both), on_cpu))
        ema_swap_(shadows, params)
        assert all(map(torch.equal, (x.cpu() for x in both), once))


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("objective", [DISTILL, JSD], ids=["forward_kl", "jsd"])
def test_the_gradient_is_rounded_once(objective: Objective, dtype: torch.dtype) -> None:
    """Stored in 16 bits it is what the same kernel stores in fp32, rounded.

    https://github.com/NVIDIA/TransformerEngine/pull/3193
    """
    N, V = 64, 50257
    spec = LossSpec(objective, V, -100, compute_ce=True, compute_metrics=False)
    student, teacher = (launch.Logits(noise(N, V, dtype=dtype)) for _ in range(2))
    y, upstream = some_labels(N, V), torch.full((1,), 0.03, device="cuda")
    saved = launch.forward(spec, student, RowTargets(y), teacher)
    narrow, wide = (torch.empty(N, V, dtype=d, device="cuda") for d in (dtype, FP32))
    for out in (narrow, wide):
        launch.gradient(spec, student, RowTargets(y), teacher, saved, upstream, out)
    assert_same_bits(narrow, wide.to(dtype), "gradient")


def test_seventy_thousand_rows() -> None:
    """More than a grid has room for on its second and third axis.

    https://github.com/linkedin/Liger-Kernel/pull/1294
    """
    N = 70_000
    logits, y, upstream = noise(N, 2, dtype=FP32), some_labels(N, 2), noise(N, dtype=FP32)

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        return ops.cross_entropy(x["logits"], y, reduction="none")

    objective = Objective(ce_weight=1.0, kd_weight=0.0)
    scales = scales_of(objective, logits.double(), None, y != -100, upstream, None)
    problem = Problem("70,000 rows", call, {"logits": logits}, ("logits",), upstream, scales)
    judge(problem, bound("triton"))


# --- Past 2^31 elements ---------------------------------------------------------------------------

ROW_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda s, t, y: cross_entropy(s, y, label_smoothing=0.1, reduction="none"),
    "forward_kl": lambda s, t, y: kl_div(s, t, labels=y, temperature=2.0, reduction="none"),
    "jsd": lambda s, t, y: kl_div(s, t, labels=y, divergence="jsd", reduction="none"),
}


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_rows_past_2_31_elements(name: str) -> None:
    """Of student, teacher and gradient: rows equal the same rows computed alone, bit for bit."""
    needs_memory(20)
    N, V = 8193, 262144
    student, teacher, y = noise(N, V), noise(N, V), torch.randint(V, (N,), device="cuda")
    upstream = noise(N, dtype=FP32)
    loss = ROW_LOSSES[name](student.requires_grad_(), teacher, y)
    (gradient,) = torch.autograd.grad(loss, student, upstream)

    some = torch.tensor([0, 4095, 4096, 8191, 8192], device="cuda")
    alone = student.detach()[some].requires_grad_()
    loss_alone = ROW_LOSSES[name](alone, teacher[some], y[some])
    (gradient_alone,) = torch.autograd.grad(loss_alone, alone, upstream[some])
    assert gradient_alone.any(1).all()
    assert_same_bits(loss[some], loss_alone, "loss")
    assert_same_bits(gradient[some], gradient_alone, "gradient")


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_rows_more_than_2_30_elements_apart(name: str) -> None:
    needs_memory(12)
    N, V, pitch = 3, 1024, 2**30 + 16
    buffers = [torch.empty((N - 1) * pitch + V, dtype=BF16, device="cuda") for _ in range(2)]
    student, teacher = (buffer.as_strided((N, V), (pitch, 1)) for buffer in buffers)
    student.copy_(noise(N, V))
    teacher.copy_(noise(N, V))
    y = torch.randint(V, (N,), device="cuda")
    close = student.clone(memory_format=torch.contiguous_format).requires_grad_()
    loss = ROW_LOSSES[name](student.requires_grad_(), teacher, y)
    loss_close = ROW_LOSSES[name](close, teacher.contiguous(), y)
    assert torch.equal(loss, loss_close)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    (gradient_close,) = torch.autograd.grad(loss_close.sum(), close)
    assert torch.equal(gradient, gradient_close)


def test_a_slab_past_2_31_elements() -> None:
    """One chunk for all rows: products and gradients of the logits lie in slabs."""
    needs_memory(40)
    N, V, D = 8193, 262144, 64
    hidden, weight = noise(N, D, std=1.0).requires_grad_(), noise(V, D, std=0.2)
    y = torch.randint(V, (N,), device="cuda")
    loss = linear_cross_entropy(hidden, weight, y, reduction="sum", chunk_bytes=32 << 30)
    (dhidden,) = torch.autograd.grad(loss, hidden)

    last = slice(N - 4, N)
    leaves = {"hidden": hidden.detach()[last], "weight": weight}
    problem = Problem(
        "the last rows of a slab",
        lambda ops, x: ops.linear_cross_entropy(x["hidden"], x["weight"], y[last], reduction="sum"),
        leaves,
        ("hidden",),
        torch.tensor(1.0, device="cuda"),
        {},
        magnitude=max(1.0, float((leaves["hidden"].float() @ weight.float().T).abs().max())),
    )
    judge_outputs(problem, {"dhidden": dhidden[last]})


def test_ema_past_2_31_elements() -> None:
    needs_memory(20)
    n = 2**31 + 1000
    shadow = torch.ones(n, dtype=FP32, device="cuda")
    param = torch.ones(n, dtype=BF16, device="cuda")
    ends = [slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(n - 1000, n)]
    for end in ends:
        shadow[end], param[end] = noise(1000, dtype=FP32), noise(1000)
    alone = [(shadow[end].clone(), param[end].clone()) for end in ends]
    ema_update_([shadow], [param], 0.75)
    ema_swap_([shadow], [param])
    for end, (s, p) in zip(ends, alone, strict=True):
        ema_update_([s], [p], 0.75)
        ema_swap_([s], [p])
        assert torch.equal(shadow[end], s)
        assert torch.equal(param[end], p)


# --- Determinism, memory, streams, graphs ---------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_three_runs_are_bitwise_equal(name: str) -> None:
    step = Inputs().steps()[name]
    first = step()
    for _ in range(2):
        assert_equal(step(), first)


@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_device(name: str) -> None:
    step = Inputs().steps()[name]
    step()  # compiles, and makes the tables of addresses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_a_cuda_graph_replays_on_new_data(name: str) -> None:
    inputs = Inputs(N=300)
    step = inputs.steps()[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs.renew()
    graph.replay()
    assert_equal(captured, step())


@pytest.mark.parametrize("name", STEPS)
def test_work_goes_to_the_current_stream(name: str) -> None:
    """What went to another one would read the inputs before they are renewed."""
    inputs = Inputs(N=300)
    step = inputs.steps()[name]
    step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        inputs.renew()
        got = step()
    torch.cuda.synchronize()
    assert_equal(got, step())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", STEPS)
def test_work_goes_to_the_tensors_device(name: str) -> None:
    with torch.cuda.device(1):
        step = Inputs(N=300).steps()[name]
        expected = step()
    assert torch.cuda.current_device() == 0
    assert_equal(step(), expected)


MEGABYTE = 1 << 20
LIBRARY = 64 * MEGABYTE  # workspaces of the library's products


def peak_beyond(step: Step) -> int:
    """Bytes that a step takes at once, beyond what was there."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_losses_of_logits(record_property: Any) -> None:
    """The gradient, and some numbers per row and 16384 columns."""
    N, V = 4096, 128256
    logits, teacher, y = noise(N, V), noise(N, V), some_labels(N, V)
    logits.requires_grad_()
    objective, other = JSD, TeacherLogits(teacher)
    peak = peak_beyond(lambda: with_gradients(distill_loss(logits, y, other, objective), logits))
    record_property("peak_bytes", peak)
    assert peak <= 2 * N * V + 1024 * N + MEGABYTE


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_memory_of_linear_distill_loss(dtype: torch.dtype, record_property: Any) -> None:
    """Gradients, the weight's in fp32 besides, and 1.25 ``chunk_bytes``; never N x V."""
    N, V, D, chunk_bytes = 8192, 128256, 1024, 256 * MEGABYTE
    inputs = {
        "hidden": noise(N, D, dtype=dtype, std=1.0).requires_grad_(),
        "weight": noise(V, D, dtype=dtype, std=0.1).requires_grad_(),
    }
    teacher = TeacherHidden(inputs["hidden"].detach(), Head(noise(V, D, dtype=dtype, std=0.1)))
    y = some_labels(N, V)

    def step() -> Outputs:
        out = linear_distill_loss(
            inputs["hidden"], Head(inputs["weight"]), y, teacher, DISTILL, chunk_bytes=chunk_bytes
        )
        return with_gradients(out, *inputs.values())

    peak = peak_beyond(step)
    record_property("peak_bytes", peak)
    gradients = (N + V) * D * dtype.itemsize
    # fp16 keeps dhidden in fp32 too until backward, which scales before it rounds.
    accumulators = 4 * V * D if dtype != FP16 else 4 * (N + V) * D
    assert peak <= gradients + accumulators + 1.25 * chunk_bytes + 256 * N + LIBRARY


def test_launched_kernels_spill_nothing() -> None:
    from sad_kernels import _triton

    modules = [
        import_module(f"sad_kernels._triton.{module.name}")
        for module in iter_modules(_triton.__path__)
    ]
    for step in Inputs(N=300).steps().values():
        step()
    found = {
        f"{name} {key}": kernel.n_spills
        for module in modules
        for name, function in vars(module).items()
        for caches in getattr(function, "device_caches", {}).values()
        for key, kernel in caches[0].items()
    }
    assert len(found) >= 7, "every kernel must have been launched"
    assert {name: spills for name, spills in found.items() if spills} == {}
