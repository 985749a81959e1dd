"""Registration of our functions as torch operators, with a short cut for plain eager calls.

torch.compile and dispatch modes have to find an operator by its name, with its schema and what is
registered beside it, and ``torch.func`` an ``autograd.Function`` with a rule for each transform.
The dispatcher's way to it costs the host more time than a GPU spends on 256 rows of 128256 logits.
In most calls autograd alone looks on: those run as an ``autograd.Function`` made of the same
forward and backward.

A schema holds tensors, numbers and strings, no objects: ``encode`` writes what a loss is asked to
compute (``OpArgs``) as integers, floats and words, and ``decode`` reads it back in the operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

from sad_kernels._rows import LossSpec, ShardSpec
from sad_kernels.objective import Objective


class Operator:
    """The operator ``torch.ops.sad_kernels.<name>`` of a function of that name.

    The schema follows from the function's annotations. If its first parameter is a ``NamedTuple``,
    as with operators that begin alike, the schema has the tuple's fields in its place: callers pass
    these one by one, and the function gets the tuple; so does the function of ``register_fake``.

    The function mutates nothing and returns new tensors. ``register_*`` take what the methods of
    ``torch.library.custom_op`` take under the same names.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._head = _record_of_first_parameter(function)
        self.function = self._flat(function)
        self.function.__signature__ = inspect.Signature(  # pyright: ignore
            list(_flat_parameters(function)), return_annotation=get_type_hints(function)["return"]
        )
        name = f"sad_kernels::{function.__name__}"
        self.registered = torch.library.custom_op(name, self.function, mutates_args=())
        self.vmap: Callable[..., Any] | None = None

    def _flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, called with the fields of its first parameter one by one."""
        head = self._head
        if head is None:
            return function
        count = len(head._fields)

        @wraps(function, assigned=("__name__", "__doc__"), updated=())
        def flat(*inputs: Any) -> Any:
            return function(head(*inputs[:count]), *inputs[count:])

        return flat

    def register_vmap(self, function: Callable[..., Any]) -> None:
        self.registered.register_vmap(function)
        self.vmap = function

    def register_fake(self, function: Callable[..., Any]) -> None:
        self.registered.register_fake(self._flat(function))

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

        # For torch.func: each of its transforms takes off one layer and calls the operator again.
        def nothing(ctx: Any, inputs: Any, output: Any) -> None:
            return

        def batched(info: Any, in_dims: Any, *inputs: Any) -> Any:
            if self.vmap is None:
                raise RuntimeError(
                    f"{function.__name__} must not be batched by vmap, got batched inputs; "
                    "call it once for each"
                )
            return self.vmap(info, in_dims, *inputs)

        parts = {
            "forward": staticmethod(self.__call__),
            "setup_context": staticmethod(setup_context or nothing),
            "backward": staticmethod(backward),
            "vmap": staticmethod(batched),
            "jvp": staticmethod(no_forward_mode),
        }
        self.transformed = type(function.__name__, (torch.autograd.Function,), parts)

    def __call__(self, *inputs: Any) -> Any:
        if eager_autograd_only(inputs):
            return self.differentiable.apply(*inputs)
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            return self.transformed.apply(*inputs)
        return self.registered(*inputs)


def _record_of_first_parameter(function: Callable[..., Any]) -> Any:
    """The ``NamedTuple`` that the first parameter is annotated with, if it is one."""
    first = next(iter(get_type_hints(function).values()))
    return first if isinstance(first, type) and issubclass(first, tuple) else None


def _flat_parameters(function: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(function)
    del hints["return"]
    for name, kind in hints.items():
        is_record = isinstance(kind, type) and issubclass(kind, tuple)
        fields = get_type_hints(kind) if is_record else {name: kind}
        for field, annotation in fields.items():
            yield inspect.Parameter(
                field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation
            )


# Of operators over rows under vmap: rows are independent, so a batch of B times N rows is B N rows.


def batch_first(x: Tensor, dim: int | None, B: int) -> Tensor:  # -> [B, ...]
    """A tensor with vmap's dimension in front; one without it is the same for the whole batch."""
    return x.expand(B, *x.shape) if dim is None else x.movedim(dim, 0)


def join_rows(x: Any, dim: int | None, B: int) -> Any:  # [N, ...] with B at dim -> [B N, ...]
    """The rows of a whole batch; what is no tensor stays as it is."""
    return batch_first(x, dim, B).flatten(0, 1) if isinstance(x, Tensor) else x


def part_rows(outputs: Sequence[Tensor], dims: Sequence[int], B: int) -> tuple[Tensor, ...]:
    """Outputs of ``B N`` rows, each at its dimension, as ``B`` times ``N``."""
    return tuple(
        x.unflatten(dim, (B, x.shape[dim] // B)) for x, dim in zip(outputs, dims, strict=True)
    )


def no_forward_mode(*_: Any) -> None:
    """The forward-mode derivative of an operator: an error."""
    raise NotImplementedError(
        "a loss and its gradient must not be differentiated in forward mode, got a jvp; call "
        "torch.func.grad or vjp, or the function of this name in sad_kernels.reference"
    )


def no_second_backward(*_: Any) -> None:
    """The backward of an operator that is itself a gradient: an error."""
    raise RuntimeError(
        "the gradient of a loss must not be differentiated again, got a second backward through "
        "it; call the function of this name in sad_kernels.reference, which torch differentiates"
    )


def save_call(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...] = ()) -> None:
    """Save an operator's inputs, tensors or not, and some of its outputs for backward."""
    tensors, plain = [], []
    for value in inputs:
        # Autograd does not save tensors of inference mode, such as a teacher's. It would watch for
        # changes in place, and these are not counted.
        saved = isinstance(value, Tensor) and not value.is_inference()
        tensors.append(value if saved else None)
        plain.append(None if saved else value)
    ctx.plain = plain
    ctx.set_materialize_grads(False)  # of outputs that nobody differentiates
    ctx.save_for_backward(*tensors, *outputs)


def saved_call(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The inputs and the outputs that ``save_call`` has saved."""
    tensors, count = ctx.saved_tensors, len(ctx.plain)
    inputs = [t if t is not None else p for t, p in zip(tensors, ctx.plain, strict=False)]
    return inputs, tensors[count:]


def eager_autograd_only(inputs: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd looks on: no compiler, transform, mode or tensor subclass."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(x) in (Tensor, Parameter) for x in inputs if isinstance(x, Tensor))


Encoded = tuple[list[int], list[float], str]
"""``OpArgs`` as an operator's last common arguments: integers, numbers and words."""


NO_OTHER = "-"  # stands for other_divergence=None


class OpArgs(NamedTuple):
    """What an operator computes: the loss, and how products become logits on either side."""

    spec: LossSpec
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None


def encode(args: OpArgs) -> Encoded:
    """Write the fields of ``args`` as values that a schema can hold; a softcap of 0 is none."""
    spec, o = args.spec, args.spec.objective
    caps = args.softcap or 0.0, args.teacher_softcap or 0.0
    numbers = (
        o.ce_weight, o.kd_weight, o.label_smoothing, o.z_loss, o.temperature, o.beta,
        o.teacher_share, o.other_beta, args.scale, args.teacher_scale, *caps,
    )  # fmt: skip
    flags = f"{o.scale_t2} {spec.compute_ce} {spec.compute_metrics}"
    words = f"{o.divergence} {o.other_divergence or NO_OTHER} {flags}"
    integers = [spec.vocab, spec.ignore_index, spec.num_outcomes, spec.teacher_columns]
    if spec.shard is not None:
        bounds, rank, group, sum_dhidden = spec.shard
        words = f"{words} {group}"
        integers += [rank, int(sum_dhidden), *(end for pair in bounds for end in pair)]
    return integers, [float(x) for x in numbers], words


def decode(integers: Sequence[int], numbers: Sequence[float], words: str) -> OpArgs:
    """Read back what ``encode`` wrote."""
    return _decode(tuple(integers), tuple(numbers), words)


@lru_cache(maxsize=64)
def _decode(integers: tuple[int, ...], numbers: tuple[float, ...], words: str) -> OpArgs:
    ce_weight, kd_weight, label_smoothing, z_loss, temperature, beta, teacher_share, *rest = numbers
    other_beta, scale, teacher_scale, softcap, teacher_softcap = rest
    divergence, other, *flags = words.split(" ", 5)  # of which the sixth is a group's name
    scale_t2, compute_ce, compute_metrics = (flag == "True" for flag in flags[:3])
    how: dict[str, Any] = {"divergence": divergence, "scale_t2": scale_t2}
    if other != NO_OTHER:
        how["other_divergence"] = other
    objective = Objective(
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        temperature=temperature,
        beta=beta,
        teacher_share=teacher_share,
        other_beta=other_beta,
        **how,
    )
    vocab, ignore_index, num_outcomes, teacher_columns, *columns = integers
    shard = None
    if columns:
        rank, sum_dhidden, *ends = columns
        bounds = tuple(zip(ends[::2], ends[1::2], strict=True))
        shard = ShardSpec(bounds, rank, flags[3], bool(sum_dhidden))
    return OpArgs(
        spec=LossSpec(
            objective,
            vocab,
            ignore_index,
            compute_ce,
            compute_metrics,
            shard,
            num_outcomes,
            teacher_columns,
        ),
        scale=scale,
        softcap=softcap or None,
        teacher_scale=teacher_scale,
        teacher_softcap=teacher_softcap or None,
    )
