"""Capture activations of a forward pass: hidden states, attention, projections, router logits.

``Capture(model, spec, role=..., detach=...)`` checks once, with one short row, that the model can
supply what ``spec`` names; ``with capture.capturing() as activations:`` collects it from one
forward pass. Hooks sit on the mapped layers alone and only within that context, so gradient
checkpointing, which runs layers again in backward, finds none. What the model computes is the same
to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.distributed.tensors import is_split
from sad.errors import UnfitError, UsageError
from sad.losses.attention_hook import (
    AttentionCall,
    after,
    capture_projections,
    hooked,
    rebuilding_error,
    states_its_window,
)
from sad.losses.base import Activations, CaptureSpec
from sad.models.heads import Backbone, decoder_layers, eval_no_grad, split_head

PROBE_LENGTH = 16

T = TypeVar("T")


class _Kind(NamedTuple):
    """How error messages describe a kind of activation: a field of ``CaptureSpec``."""

    loss: str
    expectation: str
    remedy: str


KINDS = {
    "hidden": _Kind("layerwise", "return hidden states once", "choose another model"),
    "attention": _Kind(
        "attention", "call transformers' AttentionInterface once", "use the relation loss instead"
    ),
    "projections": _Kind(
        "relation", "run its own q_proj, k_proj and v_proj", "use the attention loss instead"
    ),
    "routers": _Kind("router", "have a router of a supported family", "choose another model"),
}


class Capture:
    """Collects the activations that ``spec`` names from forward passes of ``model``.

    ``role`` ("teacher", "student") is for messages. With ``detach`` nothing collected carries a
    gradient. With an empty ``spec`` there is neither a check nor, ever, a hook.

    Raises ``UsageError`` for a layer that the model does not have. Raises ``UnfitError`` for layers
    without a router, without separate query, key and value projections, or with attention whose
    maps are not ``softmax(scaling q k^T + mask)`` with a causal, possibly windowed mask: functions
    that are none of transformers' ``AttentionInterface``, sinks, position biases, sparse keys.
    """

    def __init__(
        self, model: PreTrainedModel, spec: CaptureSpec, *, role: str, detach: bool
    ) -> None:
        self._who = f"the {role} {type(model).__name__}"
        self._spec = spec
        self._detach = detach
        self._active = False
        self._tracks_gradients = False
        if spec == CaptureSpec():
            return
        self._layers = decoder_layers(model)
        self._require_in_range()
        self._projecting = {i: self._find_projections(i) for i in spec.projections}
        self._routers = {i: self._find_router(i) for i in spec.routers}
        self._check_model(model)

    @contextmanager
    def capturing(self) -> Iterator[Activations]:
        """Collect from the one forward pass that runs within this; backward passes come after.

        Raises ``UnfitError`` if a mapped layer left nothing, ``UsageError`` under reentrant
        checkpointing, which would cut gradients off, and ``RuntimeError`` if contexts are nested.
        """
        activations = Activations()

        def on_attention(layer: int, call: AttentionCall) -> None:
            self._store(activations.attention, layer, call.inputs)

        with self._hooks_installed(activations, on_attention):
            yield activations
            self._require_all(activations)

    # Checks

    def _refusal(self, kind: str, layer: int, found: str) -> UnfitError:
        loss, expectation, remedy = KINDS[kind]
        return UnfitError(
            f"for the {loss} loss layer {layer} of {self._who} must {expectation}, got {found}; "
            f"{remedy} or turn that loss off"
        )

    def _require_in_range(self) -> None:
        last = len(self._layers) - 1
        for kind in fields(CaptureSpec):
            for layer in getattr(self._spec, kind.name):
                if not 0 <= layer <= last:
                    raise UsageError(
                        f"layers of the {KINDS[kind.name].loss} loss must be 0 to {last} in "
                        f"{self._who}, got {layer}; correct the layer map"
                    )

    def _find_projections(self, layer: int) -> nn.Module:
        names = ("q_proj", "k_proj", "v_proj")
        found = [
            module
            for module in self._layers[layer].modules()
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names)
        ]
        if len(found) != 1:
            raise self._refusal("projections", layer, f"{len(found)} modules with all three")
        return found[0]

    def _find_router(self, layer: int) -> nn.Module:
        from sad.models import experts

        router = experts.router_of(self._layers[layer])
        if router is None:
            raise self._refusal("routers", layer, "none")
        return router

    def _require_all(self, activations: Activations) -> None:
        for kind in fields(CaptureSpec):
            for layer in getattr(self._spec, kind.name):
                if layer not in getattr(activations, kind.name):
                    raise self._refusal(kind.name, layer, "a forward pass without")

    def _check_model(self, model: PreTrainedModel) -> None:
        """Run one short row through the model, and recompute its attention from the capture.

        A model that is split over ranks runs from its root alone; it was checked before.
        """
        if any(is_split(parameter) for parameter in model.parameters()):
            return
        backbone, head = split_head(model)
        ids = (torch.arange(PROBE_LENGTH, device=head.weight.device) * 7 % head.vocab_size)[None]
        activations = Activations()
        calls: dict[int, list[AttentionCall]] = {layer: [] for layer in self._spec.attention}
        with eval_no_grad(model):
            with self._hooks_installed(activations, lambda layer, call: calls[layer].append(call)):
                hidden = backbone(ids)
            for layer, layer_calls in calls.items():
                if len(layer_calls) != 1:
                    raise self._refusal("attention", layer, f"{len(layer_calls)} calls")
                activations.attention[layer] = layer_calls[0].inputs
            self._require_all(activations)
            if calls:
                self._require_unchanged(backbone, ids, hidden)
            for layer, layer_calls in calls.items():
                self._require_softmax(model.config.get_text_config(), layer, layer_calls[0])

    def _require_unchanged(self, backbone: Backbone, ids: Tensor, hidden: Tensor) -> None:
        plain = backbone(ids)
        if torch.equal(plain, hidden) or not torch.equal(plain, backbone(ids)):
            return  # equal with hooks and without, or a model that never repeats itself
        raise UnfitError(
            f"{self._who} must give the same hidden states while its attention is captured, got "
            "others; choose another attn_implementation or turn the attention loss off"
        )

    def _require_softmax(self, config: Any, layer: int, call: AttentionCall) -> None:
        where = f"attention of layer {layer} of {self._who}"
        if not states_its_window(config, layer, call.inputs.window):
            raise UnfitError(
                f"{where} must be over all earlier keys or over a window that it states, got one "
                "that skips keys unsaid; map other layers or turn the attention loss off"
            )
        error = rebuilding_error(call)
        # Eager attention in 16 bits rounds scores, and of what is left the exponential is taken.
        tolerance = 1e-3 if call.output.dtype.itemsize >= 4 else 0.1
        if not error <= tolerance:
            raise UnfitError(
                f"{where} must be the softmax of scaled products of queries and keys, got outputs "
                f"that differ by {error:.1e} (tolerance {tolerance:.0e}); use the relation loss "
                "instead or turn the attention loss off"
            )

    # Hooks

    @contextmanager
    def _hooks_installed(
        self, activations: Activations, on_attention: Callable[[int, AttentionCall], None]
    ) -> Iterator[None]:
        if self._active:
            raise RuntimeError(
                f"{self._who} must be captured once at a time, got a capture within another"
            )
        self._active = True
        self._tracks_gradients = torch.is_grad_enabled() and not self._detach
        try:
            with ExitStack() as hooks:
                if self._spec != CaptureSpec():
                    self._install(hooks, activations, on_attention)
                yield
        finally:
            self._active = False

    def _install(
        self,
        hooks: ExitStack,
        activations: Activations,
        on_attention: Callable[[int, AttentionCall], None],
    ) -> None:
        for i in dict.fromkeys(self._spec.hidden):
            after(hooks, self._layers[i], partial(self._on_hidden, activations, i))
        for i in dict.fromkeys(self._spec.attention):
            what = f"layer {i} of {self._who}"
            hooks.enter_context(hooked(self._layers[i], what, partial(on_attention, i)))
        for i, module in self._projecting.items():
            put = partial(self._store, activations.projections, i)
            capture_projections(hooks, self._layers[i], module, put)
        for i, router in self._routers.items():
            after(hooks, router, partial(self._on_router, activations, i))

    def _on_hidden(
        self, activations: Activations, layer: int, _module: nn.Module, _: Any, output: Any
    ) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise self._refusal("hidden", layer, "no tensor [B, L, D]")
        self._store(activations.hidden, layer, hidden)

    def _on_router(
        self, activations: Activations, layer: int, router: nn.Module, _: Any, output: Any
    ) -> None:
        from sad.models import experts

        self._store(activations.routers, layer, experts.router_logits(router, output))

    def _store(self, store: dict[int, T], layer: int, value: T) -> None:
        if layer in store:
            raise RuntimeError(
                f"layer {layer} of {self._who} must run once while captured, got a second time"
            )
        if self._tracks_gradients and not torch.is_grad_enabled():
            raise UsageError(
                f"gradient checkpointing of {self._who} must be non-reentrant, got a layer that "
                "runs without gradients; pass use_reentrant=False"
            )
        store[layer] = _detached(value) if self._detach else value


def _detached(value: Any) -> Any:
    """Detach a tensor, or every tensor in a named tuple."""
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(*(v.detach() if isinstance(v, Tensor) else v for v in value))
