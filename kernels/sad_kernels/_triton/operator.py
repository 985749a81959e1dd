"""Operators that torch knows by name, called past torch's machinery where nothing asks for it.

A compiler, ``vmap`` or a dispatch mode has to find a function by its name, with what is registered
beside it. That way is long: to go it costs the host more time than a GPU spends on 256 rows of
128256 logits. Nothing but autograd looks at most calls: those become a plain ``autograd.Function``
of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


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
        if autograd_is_alone(inputs):
            return self.differentiable.apply(*inputs)
        return self.registered(*inputs)


def autograd_is_alone(inputs: tuple[Any, ...]) -> bool:
    """Nothing compiles, traces or transforms this call, and all tensors are plain ones."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(x) in (Tensor, Parameter) for x in inputs if isinstance(x, Tensor))
