"""Operators that torch knows by name, called past torch's machinery where nothing asks for it.

A compiler, ``vmap`` or a dispatch mode has to find a function by its name, with what is registered
beside it. That way is long: to go it costs the host more time than a GPU spends on 256 rows of
128256 logits. Nothing but autograd looks at most calls: those become a plain ``autograd.Function``
of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sad_kernels._rows import LossSpec
from sad_kernels.objective import Objective


class Operator:
    """``torch.ops.sad_kernels.<the function's name>``, of a function with that operator's schema.

    It mutates nothing and returns new tensors. What is registered is what
    ``torch.library.custom_op`` takes under the same names.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        name = f"sad_kernels::{function.__name__}"
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake
        self.register_vmap = self.registered.register_vmap

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.differentiable = type(function.__name__, (torch.autograd.Function,), parts)

    def __call__(self, *inputs: Any) -> Any:
        if eager_autograd_only(inputs):
            return self.differentiable.apply(*inputs)
        return self.registered(*inputs)


def no_second_backward(*_: Any) -> None:
    """What an operator that is itself a gradient registers as its backward."""
    raise RuntimeError(
        "the gradient of a loss must not be differentiated again, got a second backward through "
        "it; use impl='torch' and no create_graph, or sad_kernels.reference"
    )


def save_call(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...] = ()) -> None:
    """Keep for backward what an operator got, tensors or not, and some of what it returned."""
    tensors, plain = [], []
    for value in inputs:
        tensor = isinstance(value, Tensor)
        tensors.append(value if tensor else None)
        plain.append(None if tensor else value)
    ctx.plain = plain
    ctx.set_materialize_grads(False)  # of outputs that nobody differentiates
    ctx.save_for_backward(*tensors, *outputs)


def saved_call(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """What ``save_call`` was given."""
    tensors, count = ctx.saved_tensors, len(ctx.plain)
    inputs = [t if t is not None else p for t, p in zip(tensors, ctx.plain, strict=False)]
    return inputs, tensors[count:]


def eager_autograd_only(inputs: tuple[Any, ...]) -> bool:
    """Nothing compiles, traces or transforms this call, and all tensors are plain ones."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(x) in (Tensor, Parameter) for x in inputs if isinstance(x, Tensor))


Packed = tuple[list[int], list[float], str]


class OpArgs(NamedTuple):
    """A task, and how products become logits on either side."""

    spec: LossSpec
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None


def encode(args: OpArgs) -> Packed:
    spec, o = args.spec, args.spec.objective
    caps = args.softcap or 0.0, args.teacher_softcap or 0.0
    numbers = (
        o.ce_weight, o.kd_weight, o.label_smoothing, o.z_loss, o.temperature, o.beta,
        o.teacher_share, args.scale, args.teacher_scale, *caps,
    )  # fmt: skip
    words = f"{o.divergence} {o.scale_t2} {spec.compute_ce} {spec.compute_metrics}"
    return [spec.vocab, spec.ignore_index], [float(x) for x in numbers], words


def decode(integers: Sequence[int], numbers: Sequence[float], words: str) -> OpArgs:
    return _decode(tuple(integers), tuple(numbers), words)


@lru_cache(maxsize=64)
def _decode(integers: tuple[int, ...], numbers: tuple[float, ...], words: str) -> OpArgs:
    ce_weight, kd_weight, label_smoothing, z_loss, temperature, beta, teacher_share, *rest = numbers
    scale, teacher_scale, softcap, teacher_softcap = rest
    divergence, *flags = words.split(" ")
    scale_t2, compute_ce, compute_metrics = (flag == "True" for flag in flags)
    how: dict[str, Any] = {"divergence": divergence, "scale_t2": scale_t2}
    objective = Objective(
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        temperature=temperature,
        beta=beta,
        teacher_share=teacher_share,
        **how,
    )
    vocab, ignore_index = integers
    return OpArgs(
        spec=LossSpec(objective, vocab, ignore_index, compute_ce, compute_metrics),
        scale=scale,
        softcap=softcap or None,
        teacher_scale=teacher_scale,
        teacher_softcap=teacher_softcap or None,
    )
