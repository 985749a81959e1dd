"""Listening where the decoder layers of transformers' models call their attention function.

Models built on ``AttentionInterface`` look that function up by the name in their configuration.
While a tapped layer runs, the name is ``sad_capture``, whose function hands the call on to the
implementation named before and deposits what went in and came out. Masks are built outside of the
layers, so for the implementation that the model really has, and nothing in the model is patched.
(Checked against transformers 5.12.1, 5.17.0 and 5.23.0.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sad.data.batch import LossCounts
from sad.errors import UnfitError
from sad.losses.attention import attention_maps
from sad.losses.base import AttentionInputs, Projections
from sad.losses.layout import Layout
from sad.models.heads import relative_error

NAME = "sad_capture"

UNWINDOWED = ("full_attention", "attention", "hybrid")
"""Entries of ``config.layer_types`` for causal attention that skips no key; the last is attention
beside a recurrence."""


class AttentionCall(NamedTuple):
    """One call of an attention function; ``value`` may have as many heads as the keys or more."""

    inputs: AttentionInputs
    value: Tensor  # [B, H_kv, L, d_v]
    output: Tensor  # [B, L, H, d_v]


class _Hook(NamedTuple):
    what: str
    names: list[tuple[Any, str]]  # configurations that name an implementation, and which
    deposit: Callable[[AttentionCall], None]


_HOOKS: dict[nn.Module, _Hook] = {}
"""The tap of each attention module in a tapped layer, since all that an attention function is told
is its module. Empty while nothing is tapped."""


@contextmanager
def hooked(layer: nn.Module, what: str, deposit: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Within this, each attention call of ``layer`` is deposited; its results stay what they were.

    ``what`` names the layer in messages. Raises ``RuntimeError`` if it is tapped already. Its
    forward raises ``UnfitError`` for attention with sinks.
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    modules: list[Any] = [module for module in layer.modules() if _names_attention(module)]
    if any(module in _HOOKS for module in modules):
        raise RuntimeError(f"{what} must be captured once at a time, got a second capture")
    configs = {id(module.config): module.config for module in modules}.values()
    tap = _Hook(what, [(config, config._attn_implementation) for config in configs], deposit)
    _HOOKS.update(dict.fromkeys(modules, tap))
    hooks = [
        layer.register_forward_pre_hook(lambda *_: _rename(tap)),
        layer.register_forward_hook(lambda *_: _restore(tap)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _restore(tap)  # the layer may have raised before its hook could
        for module in modules:
            del _HOOKS[module]


def states_its_window(config: Any, layer: int, window: int | None) -> bool:
    """Whether a text model's layer sees all earlier keys unless it called attention with a window.

    Chunks, windows known to the mask alone and keys chosen by an index show in long rows only, so
    what a short one does is no evidence: ``config`` has to exclude them.
    """
    kinds = getattr(config, "layer_types", None)
    if window is not None:
        return True
    if kinds:
        return kinds[layer] in UNWINDOWED
    return getattr(config, "sliding_window", None) is None


def rebuilding_error(call: AttentionCall) -> float:
    """How far ``maps @ value`` is from the output, relative in the 2-norm.

    The maps are what ``attention_maps`` makes of the inputs for a row that is one document.
    """
    length = call.inputs.query.shape[2]
    real = torch.ones(1, length, dtype=torch.bool, device=call.value.device)
    layout = Layout(
        torch.zeros_like(real, dtype=torch.int64), real, real, LossCounts(length, length, 1)
    )
    maps = attention_maps(call.inputs, layout, slice(0, length)).exp()
    value = call.value.to(maps.dtype)
    rebuilt = maps @ value.repeat_interleave(maps.shape[1] // value.shape[1], dim=1)
    return relative_error(rebuilt.transpose(1, 2), call.output)


def after(hooks: ExitStack, module: nn.Module, act: Callable[[nn.Module, Any, Any], None]) -> None:
    """Call ``act(module, arguments, output)`` after each forward of the module, until the end."""
    hooks.callback(module.register_forward_hook(act).remove)


def listen_to_projections(
    hooks: ExitStack, layer: nn.Module, attention: nn.Module, put: Callable[[Projections], None]
) -> None:
    """Deposit ``Projections`` after the layer's forward: what q_norm and k_norm return, where
    there are such and they come before rotary embedding, else what q_proj and k_proj return."""
    seen: dict[str, Tensor] = {}

    def on_projection(name: str, _module: nn.Module, _: Any, output: Tensor) -> None:
        seen[name] = output

    def on_norm(name: str, _module: nn.Module, arguments: Any, output: Tensor) -> None:
        projection, normed = seen[name], arguments[0]
        if _is_view(normed, projection):  # rotation would have made another tensor
            seen[name] = _tokens_first(output, normed, projection.shape[1])

    def on_layer(*_: Any) -> None:
        if seen.keys() == {"q", "k", "v"}:
            put(Projections(seen["q"], seen["k"], seen["v"]))
        seen.clear()

    for name in ("q", "k", "v"):
        after(hooks, getattr(attention, f"{name}_proj"), partial(on_projection, name))
    for name in ("q", "k"):
        norm = getattr(attention, f"{name}_norm", None)
        if isinstance(norm, nn.Module):
            after(hooks, norm, partial(on_norm, name))
    after(hooks, layer, on_layer)


def _is_view(tensor: Tensor, base: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _tokens_first(output: Tensor, normed: Tensor, length: int) -> Tensor:
    """What a norm made of ``normed``, [B, L, H, d], [B, H, L, d] or [B, L, W], as [B, L, W].

    Where H = L, strides tell: ``normed`` is a view of a projection [B, L, H d].
    """
    if normed.ndim == 3:
        return output
    tied = normed.shape[1] == normed.shape[2] == length
    heads_first = normed.stride(1) < normed.stride(2) if tied else normed.shape[2] == length
    return rearrange(output, "b h l d -> b l (h d)" if heads_first else "b l h d -> b l (h d)")


# The attention function


def _names_attention(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) is not None


def _rename(tap: _Hook) -> None:
    for config, _ in tap.names:
        # The property's setter would rename the attention of nested configurations too.
        config._attn_implementation_internal = NAME


def _restore(tap: _Hook) -> None:
    for config, name in tap.names:
        config._attn_implementation_internal = name


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    """``sad_capture``. ``options`` differ from model to model, and all of them are handed on."""
    tap = _HOOKS[module]
    if options.get("s_aux") is not None:
        raise UnfitError(
            f"{tap.what} must have attention whose weights sum to 1 over the keys, got sinks that "
            "take a share; choose another model or turn the attention loss off"
        )
    _restore(tap)  # implementations read the name as well
    try:
        name = module.config._attn_implementation
        attend = _implementation(module, name)
        output, weights = attend(module, query, key, value, attention_mask, **options)
    finally:
        _rename(tap)
    scaling, window = options.get("scaling"), options.get("sliding_window")
    inputs = AttentionInputs(
        query=query,
        key=key,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=None if window is None else int(window),
        # sdpa has no softcap: before it came to refuse one, transformers went on without.
        softcap=None if name == "sdpa" else options.get("softcap"),
    )
    tap.deposit(AttentionCall(inputs, value, output))
    return output, weights


def _implementation(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """What the module would have called: looked up where its own forward does."""
    names = inspect.unwrap(type(module).forward).__globals__
    functions = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return functions.get_interface(name, names.get("eager_attention_forward"))


def _no_mask(*_: Any, **__: Any) -> None:
    """Asked for a mask by a name that it does not know, transformers would go on without one."""
    raise UnfitError(
        "a captured model must build its attention masks outside of its decoder layers, got one "
        "built inside; choose another model or turn the attention loss off"
    )
