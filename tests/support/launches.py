"""Every kernel launch of real use, recorded and compiled ahead of time on a machine without a GPU.

    python tests/support/launches.py [FAMILY ...] [--targets sm_90] [--all] [--jobs 2] [--list]

prints, as JSON, what each launch takes and does on each target: see ``machine_code.py``. It must
run without ``TRITON_INTERPRET``, because interpreted kernels cannot be compiled.

A launch is recorded by letting our launchers run on CPU tensors under a driver that has no device:
Triton binds and specialises the arguments as always (alignment of pointers, divisible integers,
integers equal to 1), then asks its hook whether to compile; the hook takes notes and says no. The
tensors have the shapes and strides of real use. Nobody touches their pages, so they cost nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any, get_args
from unittest import mock

import torch
import triton
from sad_kernels import _tiles
from sad_kernels._extents import Extent
from sad_kernels._rows import LossSpec, RowTargets, ShardSpec
from sad_kernels._tiles import pitch
from sad_kernels._triton import compact, ema, launch, outcomes, reduce, scale, tile
from sad_kernels._triton import shards as shard_sums
from sad_kernels._triton.gemm import HiddenWithHead
from sad_kernels._triton.rows import PARTS
from sad_kernels._triton.tile_sizes import table_rule, tile_rule
from sad_kernels.objective import Divergence, Objective
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource, CompilationError, make_backend
from triton.runtime.driver import driver

from support import planted_kernels
from support.machine_code import access_widths, double_arithmetic, resources, row_products

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# --- Recording ------------------------------------------------------------------------------------


class NoDevice:
    """As much of a driver as a launch asks for before there is something to run."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # kernels keep one cache per device

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass
class Launch:
    """One specialisation of one kernel, as Triton would compile it."""

    function: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def arguments(self) -> dict[str, str]:
        """Names and types of what is passed at run time."""
        return {name: kind for name, kind in self.signature.items() if kind != "constexpr"}

    def source(self, **kinds: str) -> ASTSource:
        """``kinds`` replaces types: ``fp32="fp64"`` declares every float fp64."""
        signature = {name: kinds.get(kind, kind) for name, kind in self.signature.items()}
        return ASTSource(self.function, signature, self.constants, self.attributes)


def record(target: GPUTarget, call: Callable[[], object]) -> list[Launch]:
    """All launches of ``call``, in order, none of which is executed."""
    launches: list[Launch] = []

    def take_note(*, fn: Any, compile: Any, **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        launches.append(
            Launch(
                function=fn.jit_function,
                signature=compile["signature"],
                constants=compile["constants"],
                attributes=compile["configs"][0],
                options={name: _as_tuples(value) for name, value in options.items()},
            )
        )
        return True  # do not compile, do not launch

    driver.set_active(NoDevice(target))  # pyright: ignore[reportArgumentType]
    knobs.runtime.jit_cache_hook = take_note
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    with tile_rule(lambda _, *how: table_rule(arch, *how)):  # not the tiles of a CPU
        call()
    knobs.runtime.jit_cache_hook = None
    return launches


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


# --- Compiling ------------------------------------------------------------------------------------


def report(target: GPUTarget, launched: Launch) -> dict[str, Any]:
    """What the launch takes and does on the target, and the faults of its IR."""
    try:
        kernel = triton.compile(launched.source(), target=target, options=launched.options)
        doubles = triton_ir(target, launched, fp32="fp64")
        narrow, wide = row_products(triton_ir(target, launched, i64="i32"))
    except CompilationError as error:  # some faults pass the interpreter
        return {"error": "\n".join(_causes(error))}
    return {
        **resources(kernel),
        **access_widths(kernel, launched.arguments),
        "fp64": double_arithmetic(doubles),
        "narrow_row_products": narrow,
        "wide_row_products": wide,
    }


def _causes(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__


def triton_ir(target: GPUTarget, launched: Launch, **kinds: str) -> str:
    """The kernel after Triton's own simplifications, before it knows of threads."""
    from triton._C.libtriton import ir

    backend: Any = make_backend(target)
    options = backend.parse_options(launched.options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, options, Language.TRITON)
    module = launched.source(**kinds).make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    return str(stages["ttir"](module, {}))


# --- What is launched -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One use of the package: calls of its launchers."""

    name: str
    call: Callable[[], object]
    common: bool = field(default=False)  # belongs to the short list


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

N = 4096
LAYOUTS = {  # pitch, valid columns, first element
    "aligned": (128256, 128256, 0),
    "odd limit": (151936, 151665, 0),
    "unaligned": (50257, 50257, 1),
}
SLAB_ROWS = 512


@functools.cache
def arena(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def logits(dtype: torch.dtype, layout: str) -> Tensor:
    """[N, V] past 2^31 bytes, where AMD's compiler may not take 32-bit offsets from the base."""
    stride, _, first = LAYOUTS[layout]
    return arena(3 << 30).view(dtype).as_strided((N, stride), (stride, 1), first)


def slab(dtype: torch.dtype, layout: str) -> Tensor:
    """[C, V]: products of some hidden states, or the gradient by them, of at most 2^31 bytes."""
    _, vocab, _ = LAYOUTS[layout]
    width = pitch(vocab)
    rows = arena(1 << 30).view(dtype).as_strided((SLAB_ROWS, width), (width, 1))
    return rows[:, :vocab]


def run_rows(
    student: launch.Logits,
    teacher: launch.Logits | launch.SortedTopK | None,
    out: Tensor,
    layout: str,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    ce: bool = True,
    compute_metrics: bool = True,
    smoothing: float = 0.1,
    label_dtype: torch.dtype | None = torch.int64,
    per_row: bool = False,
    teacher_share: float = 1.0,
    class_weights: bool = False,
    soft: torch.dtype | None = None,  # of labels that are probabilities
    row_weights: bool = False,
    other_divergence: Divergence | None = None,
    shards: int | None = None,  # of the vocabulary, of which the logits are the second
) -> None:
    """Losses and gradient of rows of logits."""
    rows, width = len(student.x), LAYOUTS[layout][1]
    vocab, shard = width, None
    if shards is not None:
        vocab = shards * width
        bounds = tuple((i * width, (i + 1) * width) for i in range(shards))
        shard = ShardSpec(bounds, rank=1, group="", sum_dhidden=True)
    objective = Objective(
        ce_weight=0.5 if ce else 0.0,
        kd_weight=0.0 if teacher is None else 0.5,
        label_smoothing=smoothing,
        z_loss=1e-4 if ce else 0.0,
        temperature=temperature,
        divergence=divergence,
        teacher_share=teacher_share,
        other_divergence=other_divergence,
    )
    spec = LossSpec(objective, vocab, -100, ce, compute_metrics, shard)
    labels = None if label_dtype is None else torch.empty(rows, dtype=label_dtype)
    targets = RowTargets(
        labels=labels if soft is None else None,
        soft=None if soft is None else logits(soft, layout),
        class_weight=torch.empty(vocab) if class_weights else None,
        token_weights=torch.empty(rows) if row_weights else None,
        kd_weights=torch.empty(rows) if row_weights else None,
        other_rows=None if other_divergence is None else torch.empty(rows, dtype=torch.bool),
    )

    def exchange(x: Tensor, group: str) -> Tensor:
        return x.new_empty(shards or 1, *x.shape)

    with (
        mock.patch.object(launch, "gathered", exchange),
        mock.patch.object(shard_sums, "gathered", exchange),
    ):
        saved = launch.forward(spec, student, targets, teacher)
    upstream = torch.empty(rows if per_row else 1)
    launch.gradient(spec, student, targets, teacher, saved, upstream, out)


def ce(
    dtype: torch.dtype, layout: str, *, softcap: float | None = None, **options: Any
) -> Callable[[], object]:
    def call() -> None:
        x = logits(dtype, layout)
        student = launch.Logits(x, softcap=softcap)
        run_rows(student, None, x, layout, compute_metrics=False, **options)

    return call


def kl(student: torch.dtype, teacher: torch.dtype, layout: str, **options: Any):
    def call() -> None:
        s, t = logits(student, layout), logits(teacher, layout)
        run_rows(
            launch.Logits(s),
            launch.Logits(t),
            s,
            layout,
            ce=False,
            compute_metrics=False,
            smoothing=0.0,
            label_dtype=None,
            **options,
        )

    return call


def distill(student: torch.dtype, teacher: torch.dtype, layout: str, **options: Any):
    def call() -> None:
        s, t = logits(student, layout), logits(teacher, layout)
        run_rows(launch.Logits(s), launch.Logits(t), s, layout, **options)

    return call


def top_k(dtype: torch.dtype, layout: str, k: int, **options: Any) -> Callable[[], object]:
    def call() -> None:
        x = logits(dtype, layout)
        teacher = launch.SortedTopK(
            ids=torch.zeros(N, k, dtype=torch.int32),
            log_p=torch.empty(N, k),
            log_rest=torch.empty(N),
            best=torch.empty(N, dtype=torch.int64),
        )
        run_rows(launch.Logits(x), teacher, x, layout, **options)

    return call


def linear(out: torch.dtype, layout: str, *, teacher: bool, finish: bool = False, **options: Any):
    """The row kernels on fp32 products, with the gradient in the dtype of the hidden states."""

    def call() -> None:
        products = slab(FP32, layout)
        bias = torch.empty(products.shape[1]) if finish else None
        how: dict[str, Any] = dict(bias=bias, scale=0.5, softcap=30.0) if finish else {}
        student = launch.Logits(products, **how)
        other = launch.Logits(products, **how) if teacher else None
        run_rows(student, other, slab(out, layout), layout, compute_metrics=teacher, **options)

    return call


DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

OTHER_DTYPES = ((FP32, FP32), (FP16, FP16), (FP32, BF16), (BF16, FP32))


def ce_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        for dtype in (BF16, FP16, FP32):
            common = dtype is BF16 or (dtype is FP32 and layout == "aligned")
            yield Case(f"{SHORT[dtype]}, {layout}", ce(dtype, layout), common)
    yield Case("bf16, softcap", ce(BF16, "aligned", softcap=30.0), True)
    yield Case("bf16, int32 labels", ce(BF16, "aligned", label_dtype=torch.int32))
    yield Case("bf16, no smoothing, by row", ce(BF16, "aligned", smoothing=0.0, per_row=True))
    for smoothing in (0.0, 0.1):
        call = ce(BF16, "odd limit", class_weights=True, smoothing=smoothing)
        yield Case(f"bf16, weights of classes, smoothing {smoothing}", call, smoothing > 0)
    call = ce(BF16, "aligned", class_weights=True, soft=BF16)
    yield Case("bf16, weighted probabilities", call, True)
    yield Case("bf16, fp32 probabilities", ce(BF16, "odd limit", soft=FP32))


def kl_cases() -> Iterator[Case]:
    """Temperatures and layouts go in step: what a divergence costs depends on each alone."""
    for divergence in DIVERGENCES:
        for temperature, layout in zip((2.0, 1.0, 2.7), LAYOUTS, strict=True):
            call = kl(BF16, BF16, layout, divergence=divergence, temperature=temperature)
            name = f"{divergence}, bf16, T {temperature}, {layout}"
            yield Case(name, call, layout == "odd limit")
    for student, teacher in OTHER_DTYPES:
        name = f"forward_kl, {SHORT[student]} and {SHORT[teacher]}"
        call = kl(student, teacher, "aligned", temperature=2.0)
        yield Case(name, call, student is teacher is FP32)


def distill_cases() -> Iterator[Case]:
    for divergence in DIVERGENCES:
        for temperature, layout in zip((2.7, 2.0, 1.0), LAYOUTS, strict=True):
            call = distill(BF16, BF16, layout, divergence=divergence, temperature=temperature)
            name = f"{divergence}, bf16, T {temperature}, {layout}"
            yield Case(name, call, divergence in ("forward_kl", "jsd") and layout == "aligned")
    for student, teacher in OTHER_DTYPES:
        name = f"jsd, {SHORT[student]} and {SHORT[teacher]}"
        call = distill(student, teacher, "aligned", divergence="jsd", temperature=2.7)
        yield Case(name, call)
    for divergence, layout in (("forward_kl", "aligned"), ("jsd", "odd limit")):
        call = distill(BF16, BF16, layout, divergence=divergence, teacher_share=0.4)
        yield Case(f"{divergence} to a mixture, bf16, {layout}", call, divergence == "forward_kl")
    call = distill(BF16, BF16, "odd limit", row_weights=True, other_divergence="jsd")
    yield Case("forward_kl or jsd, weights of rows, bf16", call, True)


def top_k_cases() -> Iterator[Case]:
    for divergence in DIVERGENCES:
        call = top_k(BF16, "odd limit", 64, divergence=divergence, temperature=2.0)
        yield Case(f"{divergence}, bf16, K 64, odd limit", call, divergence == "forward_kl")
    yield Case("jsd, bf16, K 64, aligned", top_k(BF16, "aligned", 64, divergence="jsd"), True)
    yield Case("jsd, bf16, K 64, unaligned", top_k(BF16, "unaligned", 64, divergence="jsd"))
    call = top_k(BF16, "odd limit", 64, row_weights=True, other_divergence="jsd")
    yield Case("forward_kl or jsd, weights of rows, bf16, K 64", call)
    yield Case("forward_kl, fp32, K 50, aligned", top_k(FP32, "aligned", 50))
    yield Case("forward_kl, bf16, K 1000, aligned", top_k(BF16, "aligned", 1000))


def shard_cases() -> Iterator[Case]:
    """The vocabulary split over four processes."""
    for layout in LAYOUTS:
        yield Case(f"ce, bf16, {layout}", ce(BF16, layout, shards=4), layout == "aligned")
    call = ce(BF16, "aligned", class_weights=True, soft=BF16, shards=4)
    yield Case("ce, bf16, weighted probabilities", call)
    for divergence in DIVERGENCES:
        call = linear(
            BF16, "aligned", teacher=True, divergence=divergence, temperature=2.0, shards=4
        )
        yield Case(f"{divergence}, bf16", call, divergence in ("forward_kl", "jsd"))
    call = top_k(BF16, "odd limit", 64, divergence="jsd", shards=4)
    yield Case("jsd, bf16, K 64, odd limit", call, True)


def linear_cases() -> Iterator[Case]:
    for out in (BF16, FP16, FP32):
        for finish in (False, True):
            how = f"{SHORT[out]}, bias, scale, softcap" if finish else SHORT[out]
            layout = "odd limit" if finish else "aligned"
            call = linear(out, layout, teacher=False, finish=finish)
            yield Case(f"ce, {how}", call, out is BF16)
            for divergence in DIVERGENCES if out is BF16 else DIVERGENCES[:1]:
                call = linear(
                    out,
                    layout,
                    teacher=True,
                    finish=finish,
                    divergence=divergence,
                    temperature=2.0,
                )
                common = out is BF16 and divergence == ("jsd" if finish else "forward_kl")
                yield Case(f"{divergence}, {how}", call, common)
    call = linear(BF16, "aligned", teacher=True, teacher_share=0.4)
    yield Case("forward_kl to a mixture, bf16", call)


def run_codes(
    dtype: torch.dtype,  # of the hidden states, and the gradient
    layout: str,
    *,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    smoothing: float = 0.0,
    finish: bool = False,
    teacher_share: float = 1.0,
    row_weights: bool = False,
) -> Callable[[], object]:
    """A block of rows whose logits are codes, as in ``chunks.run``."""

    def call() -> None:
        out = slab(dtype, layout)
        rows, vocab = out.shape
        bias = torch.empty(vocab) if finish else None
        hidden, weight = torch.empty(rows, 8, dtype=dtype), torch.empty(vocab, 8, dtype=dtype)
        student = HiddenWithHead(hidden, weight, bias, 0.5 if finish else 1.0, None)
        teacher = None if divergence is None else replace(student, softcap=30.0 if finish else None)
        objective = Objective(
            ce_weight=0.5,
            kd_weight=0.0 if divergence is None else 0.5,
            label_smoothing=smoothing,
            z_loss=1e-4,
            temperature=temperature,
            divergence=divergence or "forward_kl",
            teacher_share=teacher_share,
        )
        spec = LossSpec(objective, vocab, -100, True, divergence is not None)
        weights = torch.empty(rows) if row_weights else None
        targets = RowTargets(torch.empty(rows, dtype=torch.int64), None, None, weights, weights)
        assert compact.takes_codes(spec, student, targets, teacher)

        def products(_: HiddenWithHead, rows: slice, columns: slice, slab: Tensor) -> Tensor:
            return slab[: rows.stop - rows.start, : columns.stop - columns.start]

        with (
            mock.patch.object(HiddenWithHead, "products", products),
            mock.patch.object(_tiles, "SLAB_COLUMNS", 1 << 17),
        ):
            block = compact.CodedRows(spec, student, targets, teacher, rows)
            saved, s, t = block.forward(slice(0, rows), targets, out)
        launch.gradient(spec, s, targets, t, saved, torch.empty(1), out)

    return call


def compact_cases() -> Iterator[Case]:
    """Logits as codes, in slabs so wide that there is one, or one that is whole and the last."""
    yield Case("ce, bf16, aligned", run_codes(BF16, "aligned"), True)
    yield Case("ce, fp16, aligned", run_codes(FP16, "aligned"))
    call = run_codes(BF16, "odd limit", smoothing=0.1, finish=True)
    yield Case("ce, bf16, smoothing, bias, scale, odd limit", call)
    for temperature, smoothing in ((1.0, 0.0), (2.0, 0.1), (2.7, 0.0)):
        call = run_codes(
            BF16, "aligned", divergence="forward_kl", temperature=temperature, smoothing=smoothing
        )
        yield Case(f"forward_kl, bf16, T {temperature}", call, temperature == 2)
    call = run_codes(BF16, "odd limit", divergence="reverse_kl", temperature=2.0, finish=True)
    yield Case("reverse_kl, bf16, T 2.0, bias, scale, softcap, odd limit", call)
    call = run_codes(BF16, "aligned", divergence="forward_kl", teacher_share=0.4, row_weights=True)
    yield Case("forward_kl to a mixture, bf16, weights of rows", call)


def outcome_cases() -> Iterator[Case]:
    """The vocabularies of two tokenizers, compared by what a third of the tokens have in common."""
    for dtype, layout in ((FP32, "aligned"), (BF16, "odd limit"), (BF16, "unaligned")):
        call = functools.partial(compare_outcomes, dtype, layout, finish=layout == "odd limit")
        yield Case(f"{SHORT[dtype]}, {layout}", call, layout != "unaligned")


def compare_outcomes(dtype: torch.dtype, layout: str, finish: bool) -> None:
    products, V = slab(dtype, layout), LAYOUTS[layout][1]
    how: dict[str, Any] = {}
    if finish:
        how = dict(bias=torch.empty(products.shape[1]), scale=0.5, softcap=30.0)
    student = teacher = launch.Logits(products, **how)
    table = (torch.arange(V) // 3).int()
    spec = LossSpec(Objective(), V, -100, True, True, None, V // 3 + 1, V)
    rows = len(products)
    targets = RowTargets(torch.empty(rows, dtype=torch.int64), kd_weights=torch.empty(rows))
    targets = targets._replace(outcomes=table, teacher_outcomes=table)
    tables = outcomes.Tables.of(spec, targets)
    assert tables is not None
    outcomes.as_columns(spec, tables, student, targets, teacher, slab(FP32, layout))


def ema_cases() -> Iterator[Case]:
    """A hundred tensors per launch; addresses travel in a table, so their alignment is told."""
    for shadow, param in ((FP32, BF16), (FP32, FP16), (FP32, FP32)):
        for first in (0, 1):
            extents = tuple(
                Extent(torch.device("cpu"), shadow, param, 4096 * i + first, 8192 * i, 1000)
                for i in range(1, 100)
            )
            name = f"{SHORT[shadow]} and {SHORT[param]}, {'unaligned' if first else 'aligned'}"
            decay = torch.tensor(0.999, dtype=torch.float64)
            yield Case(f"update, {name}", functools.partial(ema.update, extents, decay), True)
            if param is not FP16:
                yield Case(f"swap, {name}", functools.partial(ema.swap, extents), True)
    extents = (Extent(torch.device("cpu"), BF16, BF16, 4096, 8192, 1000),)
    yield Case("swap, bf16 and bf16, aligned", functools.partial(ema.swap, extents))


def scale_cases() -> Iterator[Case]:
    """The weight's gradient, with and without a last block that is not whole."""
    for source, out in ((FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16)):
        for size in (1 << 28, (1 << 28) + 1):
            x, factor = arena(3 << 30).view(source)[:size], torch.empty(())
            call = functools.partial(scale.scaled, x, factor, out)
            name = f"{SHORT[source]} to {SHORT[out]}, {'odd' if size % 2 else 'even'} size"
            yield Case(name, call, out is BF16 and source is FP32)


def reduce_cases() -> Iterator[Case]:
    """The items of a window may be integers."""
    for labelled, dtype in ((True, None), (False, None), (True, torch.int64)):
        y = torch.empty(N, dtype=torch.int64) if labelled else None
        items = None if dtype is None else torch.empty((), dtype=dtype)
        loss, parts = torch.empty(N), torch.empty(PARTS, N)
        call = functools.partial(reduce.reduced, loss, parts, y, -100, items)
        name = f"{'labels' if labelled else 'all rows'}{'' if dtype is None else ', items given'}"
        yield Case(name, call, True)


def planted_cases() -> Iterator[Case]:
    """Faults that the checks must see."""
    x = logits(BF16, "odd limit")
    kernels: tuple[Any, ...] = (
        planted_kernels.sound,
        planted_kernels.masked_throughout,
        planted_kernels.narrow_rows,
        planted_kernels.double_scalars,
        planted_kernels.too_large,
        planted_kernels.does_not_compile,
    )
    for kernel in kernels:
        call = functools.partial(
            kernel[(N,)], x, x, x.stride(0), 151665, 0.5, BLOCK=2048, num_warps=4
        )
        yield Case(kernel.__name__, call, True)
    yield Case("unknown divergence", of_unknown_divergence, True)


def of_unknown_divergence() -> None:
    """A mixture of whose code no kernel knows anything, beside a dense and a top-k teacher."""
    with mock.patch.dict(tile.DIVERGENCE_CODES, jsd=99):
        distill(BF16, BF16, "aligned", divergence="jsd")()
        top_k(BF16, "aligned", 64, divergence="jsd")()


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "cross_entropy": ce_cases,
    "kl_div": kl_cases,
    "distill_loss": distill_cases,
    "top_k": top_k_cases,
    "linear": linear_cases,
    "shards": shard_cases,
    "compact": compact_cases,
    "outcomes": outcome_cases,
    "ema": ema_cases,
    "scale": scale_cases,
    "reduce": reduce_cases,
    "planted": planted_cases,
}

# --- The program ----------------------------------------------------------------------------------


@dataclass
class Work:
    """One launch on one target; equal ones are compiled once."""

    names: list[str]
    target: str
    launch: Launch


def collect(families: list[str], targets: list[str], everything: bool) -> list[Work]:
    found: dict[str, Work] = {}
    for family in families:
        for case in FAMILIES[family]():
            if everything or case.common:
                for target in targets:
                    _add(found, f"{family}: {case.name}", target, case.call)
    return list(found.values())


def _add(found: dict[str, Work], name: str, target: str, call: Callable[[], object]) -> None:
    counts: dict[str, int] = {}
    for launched in record(TARGETS[target], call):
        kernel = launched.function.__name__
        counts[kernel] = counts.get(kernel, 0) + 1
        again = f" {counts[kernel]}" if counts[kernel] > 1 else ""
        work = found.setdefault(f"{target} {launched}", Work([], target, launched))
        work.names.append(f"{name}: {kernel}{again}")


WORK: list[Work] = []
"""Filled before the worker processes fork: kernels do not travel between processes."""


def report_work(i: int) -> dict[str, Any]:
    return report(TARGETS[WORK[i].target], WORK[i].launch)


def main() -> None:
    assert not knobs.runtime.interpret, "interpreted kernels cannot be compiled"
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=[], choices=[*FAMILIES, []])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="not only the short list")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only name what would be compiled")
    options = parser.parse_args()

    families = options.families or [name for name in FAMILIES if name != "planted"]
    WORK.extend(collect(families, options.targets.split(","), options.all))
    if options.list:
        json.dump(sorted({name for work in WORK for name in work.names}), sys.stdout)
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        reports = list(pool.map(report_work, range(len(WORK))))
    result: dict[str, dict[str, Any]] = {}
    for work, found in zip(WORK, reports, strict=True):
        for name in work.names:
            result.setdefault(name, {})[work.target] = found
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
