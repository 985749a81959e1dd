"""Routers and experts of mixture-of-experts models: reading gates, choosing experts, by hooks.

A *block* holds a router and E experts. The router turns a token x [D] into logits ``W x + b`` [E],
the *gate* turns these into weights of experts; the k experts with the largest see the token, and
the block adds up their weighted outputs. transformers lays this out in a dozen ways that change
between its versions, so router and experts are recognised by the shapes of their weights, and what
a router returns by dtype and width. What shapes cannot tell, how logits become a gate, stands in
the table ``GATES`` by ``config.model_type``; a family that is not in it is refused, never guessed.
Nothing of the model is replaced.

(Checked with transformers 5.12.1, 5.17.0 and 5.23.0.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import torch
from torch import Tensor, nn

from sad.errors import UnfitError

GateKind = Literal["softmax", "sigmoid"]
"""How router logits become weights: softmax over experts, or a sigmoid of each."""

GATES: dict[str, GateKind] = {
    "mixtral": "softmax",
    "qwen2_moe": "softmax",
    "qwen3_moe": "softmax",
    "olmoe": "softmax",
    "gpt_oss": "softmax",
    "granitemoe": "softmax",
    "deepseek_v3": "sigmoid",
    "glm4_moe": "sigmoid",
    "phimoe": "softmax",
    "llama4_text": "sigmoid",
    "ernie4_5_moe": "softmax",
}
"""Families whose router logits can be read: model_type -> kind of gate."""

READ_ONLY = frozenset({"phimoe", "llama4_text"})
"""Families of which only the logits can be read: PhiMoE always takes two experts, and those of
Llama 4 are not called with ids."""

SUPPORTED = tuple(name for name in GATES if name not in READ_ONLY)
"""Families whose experts can be called one by one, and chosen by ``choosing_experts``."""

Choose = Callable[["MoeBlock", Tensor], tuple[Tensor, Tensor]]
"""A block and its logits [N, E] -> ids of experts int64 [N, k] and their weights [N, k]."""


@dataclass(frozen=True)
class MoeBlock:
    """A mixture-of-experts block: its layer's index, router, experts and kind of gate."""

    layer: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module | None
    """Called with tokens, ids and weights. None: the block itself sorts tokens by expert (Granite
    MoE before transformers 5.17)."""
    num_experts: int
    kind: GateKind
    model_type: str

    @property
    def top_k(self) -> int:
        """Number of experts that see a token, at present."""
        return self.setting("top_k")

    def setting(self, name: str) -> Any:
        """A routing setting: an attribute of the router, in older versions of the block."""
        return next(vars(part)[name] for part in (self.router, self.block) if name in vars(part))


# Finding blocks


def moe_layers(model: nn.Module) -> dict[int, MoeBlock]:
    """The mixture-of-experts blocks of a model by the index of their layer; empty if it is dense.

    Raises ``UnfitError`` for a model that has such blocks but is of no family in ``GATES``.
    """
    config: Any = model.config
    family = config.get_text_config().model_type
    found = {
        _layer_index(name): (module, *parts)
        for name, module in model.named_modules()
        if (parts := _parts(module)) is not None
    }
    if found and family not in GATES:
        raise UnfitError(
            f"experts must be those of {', '.join(GATES)}, got {_name(model)}; choose a model of "
            "these families"
        )
    return {
        layer: MoeBlock(
            layer, block, router, experts, len(_gate_weight(router)), GATES[family], family
        )
        for layer, (block, router, experts) in found.items()
    }


def require_moe(model: nn.Module, what: str) -> dict[int, MoeBlock]:
    """``moe_layers(model)``; ``UnfitError`` in one line that names ``what`` if there are none."""
    blocks = moe_layers(model)
    if not blocks and _has_stacked_experts(model):
        raise UnfitError(
            f"{what} must have experts laid out as in the families {', '.join(SUPPORTED)}, got "
            f"those of {_name(model)}, whose router or shared experts differ; choose another "
            f"model, or turn {what} off"
        )
    if not blocks:
        raise UnfitError(
            f"{what} must have a model with experts, got {_name(model)}, in which there are none "
            f"(it is dense, or quantized); choose one of the families {', '.join(SUPPORTED)}, or "
            f"turn {what} off"
        )
    return blocks


def router_of(decoder_layer: nn.Module) -> nn.Module | None:
    """The router of a decoder layer; None if the layer is dense."""
    found = (_parts(module) for module in decoder_layer.modules())
    return next((parts[0] for parts in found if parts is not None), None)


def _parts(block: nn.Module) -> tuple[nn.Module, nn.Module | None] | None:
    """Router and experts of ``block``; None if this module is no mixture-of-experts block.

    Experts are stacked: at least two weights [E, ., .], in one child or, in the oldest layout, in
    several. The router is the child whose one matrix has E rows.
    """
    # Only parameters of a child itself: its own children are looked at when their turn comes.
    stacks = {child: _own(child, ndim=3) for child in block.children()}
    stacks = {child: weights for child, weights in stacks.items() if weights}
    sizes = {weight.shape[0] for weights in stacks.values() for weight in weights}
    if len(sizes) != 1 or sum(map(len, stacks.values())) < 2:
        return None
    for child in block.children():
        # One row: no matrix but the biases of a selection (Ernie 4.5).
        matrices = [p for p in child.parameters() if p.ndim == 2 and len(p) > 1]
        if child not in stacks and len(matrices) == 1 and matrices[0].shape[0] in sizes:
            return child, next(iter(stacks)) if len(stacks) == 1 else None
    return None


def _has_stacked_experts(model: nn.Module) -> bool:
    """Whether some module holds several weights [E, ., .], as experts do in every layout."""
    return any(len(_own(module, ndim=3)) > 1 for module in model.modules())


def _own(module: nn.Module, *, ndim: int) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.ndim == ndim]


def _gate_weight(router: nn.Module) -> Tensor:  # [E, D]
    return next(p for p in router.parameters() if p.ndim == 2 and len(p) > 1)


def _layer_index(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _name(model: nn.Module) -> str:
    config: Any = model.config
    return f"{type(model).__name__} (model_type {config.model_type!r})"


# Reading routers and experts


def router_logits(router: nn.Module, output: Any) -> Tensor:  # [tokens, E]
    """Find the logits in a router's output.

    They are the floating-point tensor with E columns. With all experts active the weights have E
    columns too, but stand between logits and ids in every version. Llama 4 returns no ids: its
    logits come last.

    Raises ``UnfitError`` if there is no such tensor.
    """
    parts = output if isinstance(output, tuple) else (output,)
    num_experts = _gate_weight(router).shape[0]
    tables = {i: part for i, part in enumerate(parts) if isinstance(part, Tensor) and part.ndim > 1}
    found = [
        i for i, t in tables.items() if t.dtype.is_floating_point and t.shape[-1] == num_experts
    ]
    if not found:
        raise UnfitError(
            f"a router must return logits for its {num_experts} experts, got none from "
            f"{type(router).__name__}; use a version of transformers that "
            "sad.models.experts was tested with"
        )
    # The candidate farthest from the ids: weights, which may be as wide, stand next to them.
    ids = next((i for i, t in tables.items() if not t.dtype.is_floating_point), -1)
    return tables[max(found, key=lambda i: abs(i - ids))].reshape(-1, num_experts)


@contextmanager
def reading_routers(blocks: Mapping[int, MoeBlock]) -> Iterator[dict[int, Tensor]]:
    """Within, collect the router logits [tokens, E] of one forward pass, by layer.

    Leave before backward: recomputed activations would otherwise be collected a second time.
    """
    logits: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(router: nn.Module, _: Any, output: Any) -> None:
            logits[layer] = router_logits(router, output)

        return hook

    with ExitStack() as hooks:
        for layer, block in blocks.items():
            hooks.callback(block.router.register_forward_hook(keep(layer)).remove)
        yield logits


def expert_output(block: MoeBlock, x: Tensor, expert: int) -> Tensor:  # [N, D], [N, D]
    """Output of one expert for the tokens ``x``, without shared experts and without its weight.

    Raises ``UnfitError`` for a family in ``READ_ONLY``.
    """
    require_callable(block)
    if block.experts is None:  # the block calls its experts on tokens sorted by expert
        sizes = [0] * block.num_experts
        sizes[expert] = len(x)
        whole: Any = block.block
        gate, up = whole.input_linear(x, sizes).chunk(2, dim=-1)
        return whole.output_linear(whole.activation(gate) * up, sizes)
    ids = torch.full((len(x), 1), expert, device=x.device)
    return block.experts(x, ids, x.new_ones(len(x), 1))


def expert_weights(
    block: MoeBlock,
    logits: Tensor,  # [N, E]
    ids: Tensor,  # int64 [N, k]
) -> Tensor:  # [N, k], fp32 at least
    """Weights of the chosen experts' outputs in the sum that a block returns.

    For softmax gates the softmax over the chosen experts. For sigmoid gates the scores, divided by
    the sum of the chosen ones where the family does that, times its scaling factor. This is what
    the families compute themselves, except those with ``norm_topk_prob: false`` (OLMoE, Qwen 2
    MoE), whose weights add up to less than 1 unless all experts are chosen: here they add up to 1
    for any choice.
    """
    chosen = logits.to(torch.promote_types(logits.dtype, torch.float32)).gather(-1, ids)
    match block.kind:
        case "softmax":
            return chosen.softmax(-1)
        case "sigmoid":
            scores = chosen.sigmoid()
            if block.setting("norm_topk_prob"):
                scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            return scores * block.setting("routed_scaling_factor")
        case _:
            assert_never(block.kind)


# Choosing experts


@contextmanager
def all_experts(model: nn.Module) -> Iterator[dict[int, MoeBlock]]:
    """Within, all E experts of a block see every token, with the weights of the block's own gate.

    Backward passes that recompute activations belong inside too. Each forward pass checks, by
    shapes alone, that E experts were called for each token: a version whose blocks ignore the
    setting is refused with ``UnfitError``, and so are dense models and the families in
    ``READ_ONLY``. Afterwards the model's own settings are restored.
    """
    blocks = require_moe(model, "the use of all experts")
    with ExitStack() as restore:
        for block in blocks.values():
            require_callable(block)
            for owner in (block.block, block.router):
                _switch(owner, block.num_experts, restore)
            _require_width(block, restore)
        yield blocks


@contextmanager
def choosing_experts(blocks: Mapping[int, MoeBlock], choose: Choose) -> Iterator[None]:
    """Within, ``choose`` decides from the logits which experts see a token, with which weights.

    Raises ``UnfitError`` for a family in ``READ_ONLY``, and in a forward pass if experts are called
    in a way that is not known, or not at all.
    """
    with reading_routers(blocks) as logits, ExitStack() as hooks:

        def replace(block: MoeBlock, called: list[bool]) -> Callable[..., Any]:
            """A hook before the experts' forward: other ids and weights in its arguments."""

            def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                ids, weights = _routing(block, args)
                new_ids, new_weights = choose(block, logits.pop(block.layer))
                called.append(True)
                # By identity: which argument is which differs between versions.
                new = {id(ids): new_ids, id(weights): new_weights.to(weights.dtype)}
                return tuple(new.get(id(arg), arg) for arg in args)

            return hook

        def regroup(block: MoeBlock, called: list[bool]) -> Callable[..., Any]:
            """A hook after the router's forward, where the router sorts tokens by expert."""

            def hook(_: nn.Module, args: tuple[Tensor], __: Any) -> tuple[Any, ...]:
                scores = logits.pop(block.layer)
                ids, weights = choose(block, scores)
                called.append(True)
                return *_grouped(ids, weights.type_as(args[0]), block.num_experts), scores

            return hook

        for block in blocks.values():
            require_callable(block)
            called = _require_calls(block, "the chosen experts", hooks)
            if block.experts is None:
                handle = block.router.register_forward_hook(regroup(block, called))
            else:
                handle = block.experts.register_forward_pre_hook(replace(block, called))
            hooks.callback(handle.remove)
        yield


def require_callable(block: MoeBlock) -> None:
    """``UnfitError`` for a family in ``READ_ONLY``."""
    if block.model_type in READ_ONLY:
        raise UnfitError(
            f"experts must be those of {', '.join(SUPPORTED)} to be called or activated at will, "
            f"got model_type {block.model_type!r}, of which only router logits can be read; choose "
            "another model"
        )


def _switch(owner: nn.Module, num_experts: int, restore: ExitStack) -> None:
    """Set a router or block to take every expert, of every group; ``restore`` undoes it."""
    own = vars(owner)
    # Families with groups of experts first choose groups: all of these, too.
    wanted = {"top_k": num_experts, "topk_group": own.get("num_group", own.get("n_group"))}
    for name, value in wanted.items():
        if name in own and value is not None:
            restore.callback(setattr, owner, name, own[name])
            setattr(owner, name, value)


def _require_width(block: MoeBlock, restore: ExitStack) -> None:
    """Raise ``UnfitError`` in forward passes in which fewer than E experts see a token."""
    called = _require_calls(block, f"all {block.num_experts} experts", restore)

    def check_ids(_: nn.Module, args: tuple[Any, ...]) -> None:
        called.append(_routing(block, args)[0].shape[-1] == block.num_experts)

    def check_sizes(router: nn.Module, _: Any, output: tuple[Any, ...]) -> None:
        tokens = len(router_logits(router, output))
        sizes = next(part for part in output if isinstance(part, list))
        called.append(sizes == [tokens] * block.num_experts)

    if block.experts is None:
        handle = block.router.register_forward_hook(check_sizes)
    else:
        handle = block.experts.register_forward_pre_hook(check_ids)
    restore.callback(handle.remove)


def _require_calls(block: MoeBlock, who: str, restore: ExitStack) -> list[bool]:
    """Raise ``UnfitError`` after a block's forward unless its experts were called as required.

    Hooks append to the list returned, once per call, whether that call was as required.
    """
    called: list[bool] = []

    def conclude(*_: Any) -> None:
        # No call at all is as bad as a wrong one: the hooks sat where the block does not pass.
        fits = bool(called) and all(called)
        called.clear()
        if not fits:
            raise UnfitError(
                f"{who} of layer {block.layer} must see every token, got a block of model_type "
                f"{block.model_type!r} that calls fewer; use a version of transformers that "
                f"sad.models.experts was tested with, and one of {', '.join(SUPPORTED)}"
            )

    restore.callback(block.block.register_forward_hook(conclude).remove)
    return called


def _routing(block: MoeBlock, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Expert ids and weights, both [N, k], found among the arguments of an experts' forward."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    ids = [t for t in tensors if not t.dtype.is_floating_point and t.ndim == 2]
    weights = [t for t in tensors if t.dtype.is_floating_point and ids and t.shape == ids[0].shape]
    if len(ids) != 1 or len(weights) != 1:
        raise UnfitError(
            f"experts must be called with tokens, ids and weights, got another form in layer "
            f"{block.layer} of a model of model_type {block.model_type!r}; use a version of "
            "transformers that sad.models.experts was tested with"
        )
    return ids[0], weights[0]


def _grouped(
    ids: Tensor,  # int64 [N, k]
    weights: Tensor,  # [N, k]
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Routing sorted by expert, as Granite MoE's blocks take it before transformers 5.17.

    Returns the order int64 [N k], tokens int64 [N k], weights [N k], and tokens per expert.
    """
    order = ids.flatten().argsort(stable=True)
    sizes = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
    return order, order // ids.shape[1], weights.flatten()[order], sizes
