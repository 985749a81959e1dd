"""Hooks on the attention calls of transformers' models: what goes into attention, and comes out.

Models built on ``AttentionInterface`` look their attention function up by the name in their
configuration. While a hooked layer runs, the name is ``sad_capture``, whose function passes the
call on to the implementation named before and reports what went in and came out. Masks are built
outside of the layers, so for the implementation that the model really has, and nothing in the model
is patched.
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
    on_call: Callable[[AttentionCall], None]


_HOOKS: dict[nn.Module, _Hook] = {}
"""Attention module -> its hook, while it has one: an attention function is given nothing else by
which to find it."""


@contextmanager
def hooked(layer: nn.Module, what: str, on_call: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Context in which ``on_call`` gets every attention call of ``layer``, unchanged in result.

    ``what`` names the layer in messages. Raises ``RuntimeError`` if it is hooked already. Its
    forward raises ``UnfitError`` for attention with sinks.
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    modules: list[Any] = [module for module in layer.modules() if _names_attention(module)]
    if any(module in _HOOKS for module in modules):
        raise RuntimeError(f"{what} must be captured once at a time, got a second capture")
    # Modules of a layer share their configuration: it is renamed once.
    configs = {id(module.config): module.config for module in modules}.values()
    hook = _Hook(what, [(config, config._attn_implementation) for config in configs], on_call)
    _HOOKS.update(dict.fromkeys(modules, hook))
    handles = [
        layer.register_forward_pre_hook(lambda *_: _rename(hook)),
        layer.register_forward_hook(lambda *_: _unrename(hook)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _unrename(hook)  # the layer may have raised before its own hook could
        for module in modules:
            del _HOOKS[module]


def states_its_window(config: Any, layer: int, window: int | None) -> bool:
    """Whether the window of a layer's attention call is all that limits which keys it sees.

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
    """Relative error, in the 2-norm, of ``maps @ value`` against the attention's own output.

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
    """Call ``act(module, arguments, output)`` after each forward, until ``hooks`` is closed."""
    hooks.callback(module.register_forward_hook(act).remove)


def capture_projections(
    hooks: ExitStack, layer: nn.Module, attention: nn.Module, store: Callable[[Projections], None]
) -> None:
    """Pass ``Projections`` to ``store`` after the layer's forward pass.

    Queries and keys are what q_norm and k_norm return, where the layer has them before rotary
    embedding, else what q_proj and k_proj return.
    """
    seen: dict[str, Tensor] = {}

    def on_projection(name: str, _module: nn.Module, _: Any, output: Tensor) -> None:
        seen[name] = output

    def on_norm(name: str, _module: nn.Module, arguments: Any, output: Tensor) -> None:
        projection, normed = seen[name], arguments[0]
        if _is_view(normed, projection):  # rotation would have made another tensor
            seen[name] = _tokens_first(output, normed, projection.shape[1])

    def on_layer(*_: Any) -> None:
        if seen.keys() == {"q", "k", "v"}:
            store(Projections(seen["q"], seen["k"], seen["v"]))
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


def _rename(hook: _Hook) -> None:
    for config, _ in hook.names:
        # The property's setter would rename the attention of nested configurations too.
        config._attn_implementation_internal = NAME


def _unrename(hook: _Hook) -> None:
    for config, name in hook.names:
        config._attn_implementation_internal = name


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The attention function ``sad_capture``: call the model's own one, and report the call.

    ``options`` differ from model to model, and all of them are passed on.
    """
    hook = _HOOKS[module]
    # Sinks are one more logit: with them rows of the map do not sum to 1 over the keys.
    if options.get("s_aux") is not None:
        raise UnfitError(
            f"{hook.what} must have attention whose weights sum to 1 over the keys, got sinks that "
            "take a share; choose another model or turn the attention loss off"
        )
    _unrename(hook)  # implementations read the name as well
    try:
        name = module.config._attn_implementation
        attend = _implementation(module, name)
        output, weights = attend(module, query, key, value, attention_mask, **options)
    finally:
        _rename(hook)
    scaling, window = options.get("scaling"), options.get("sliding_window")
    inputs = AttentionInputs(
        query=query,
        key=key,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=None if window is None else int(window),
        # sdpa has no softcap: before it came to refuse one, transformers went on without.
        softcap=None if name == "sdpa" else options.get("softcap"),
    )
    hook.on_call(AttentionCall(inputs, value, output))
    return output, weights


def _implementation(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that a module would have called, looked up as its forward does."""
    names = inspect.unwrap(type(module).forward).__globals__
    functions = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return functions.get_interface(name, names.get("eager_attention_forward"))


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask function of ``sad_capture``, which refuses: no mask must be built inside a layer.

    For a name without a mask function transformers would go on without a mask.
    """
    raise UnfitError(
        "a captured model must build its attention masks outside of its decoder layers, got one "
        "built inside; choose another model or turn the attention loss off"
    )
