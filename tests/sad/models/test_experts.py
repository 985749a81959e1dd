"""Gates and experts of every supported family, against what the family's own blocks compute."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.families import tiny_family
from support.tiny import tiny_gpt2, tiny_llama
from support.tiny_moe import FAMILIES, NUM_EXPERTS, TOP_K, tiny_moe
from torch import Tensor, nn

from sad.errors import UnfitError
from sad.models.experts import (
    GATES,
    READ_ONLY,
    SUPPORTED,
    MoeBlock,
    all_experts,
    choosing_experts,
    expert_output,
    expert_weights,
    moe_layers,
    reading_routers,
    require_moe,
    router_logits,
    router_of,
)

IDS = torch.arange(24).reshape(2, 12) * 7 % 512
SIGMOID = ("deepseek_v3", "glm4_moe")
WITH_DENSE_LAYER = {"deepseek_v3": (1,), "glm4_moe": (1,), "llama4_text": (1,)}
NORMALISED = tuple(f for f in SUPPORTED if f not in ("qwen2_moe", "olmoe"))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def block_io(model: nn.Module, block: MoeBlock) -> tuple[Tensor, Tensor]:
    """Input and output [N, D] of a block in one forward pass."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        seen.extend([args[0], output[0] if isinstance(output, tuple) else output])

    handle = block.block.register_forward_hook(hook)
    run(model)
    handle.remove()
    x, y = (t.detach().reshape(-1, t.shape[-1]) for t in seen)
    return x, y


def linear_logits(block: MoeBlock, x: Tensor) -> Tensor:
    """``W x + b`` from the router's parameters, in the dtype of fp64."""
    parameters = list(block.router.parameters())
    weight = next(p for p in parameters if p.ndim == 2).detach().double()
    bias = next((p.detach().double() for p in parameters if p.ndim == 1), 0.0)
    return x.double() @ weight.T + bias


def shared_output(block: MoeBlock, x: Tensor) -> Tensor | float:
    """What the experts that see every token add to a block's output."""
    whole: Any = block.block
    with torch.no_grad():
        if hasattr(whole, "shared_expert_gate"):
            return torch.sigmoid(whole.shared_expert_gate(x)) * whole.shared_expert(x)
        return whole.shared_experts(x) if hasattr(whole, "shared_experts") else 0.0


def entering(model: nn.Module, block: MoeBlock) -> tuple[Tensor, Tensor]:
    """Ids and weights [N, k] that the experts are called with, in the router's own routing."""
    if block.experts is None:  # sorted by expert on the way: the definition in its place
        top = linear_logits(block, block_io(model, block)[0]).topk(TOP_K)
        return top.indices, top.values.softmax(-1).float()
    seen: list[Tensor] = []
    handle = block.experts.register_forward_pre_hook(lambda _, args: seen.extend(args[1:3]))
    run(model)
    handle.remove()
    return seen[0], seen[1]


# Finding them


def test_the_tables_and_the_tiny_models_name_the_same_families() -> None:
    assert set(FAMILIES) == set(GATES)
    assert set(SUPPORTED) | READ_ONLY == set(GATES)


@pytest.mark.parametrize("family", GATES)
def test_blocks_are_found_with_their_layers_and_sizes(family: str) -> None:
    model = tiny_moe(family)
    blocks = moe_layers(model)
    assert tuple(blocks) == WITH_DENSE_LAYER.get(family, (0, 1))
    layers: Any = model.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        assert router_of(layer) is (blocks[i].router if i in blocks else None)
    for i, block in blocks.items():
        assert (block.layer, block.num_experts, block.top_k) == (i, NUM_EXPERTS, TOP_K)
        assert block.kind == ("sigmoid" if family in (*SIGMOID, "llama4_text") else "softmax")
        assert block.model_type == family


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_a_dense_model_has_no_blocks_and_is_refused_by_name(model: Any) -> None:
    dense = model()
    assert moe_layers(dense) == {}
    with pytest.raises(UnfitError) as caught:
        require_moe(dense, "router_weight")
    line = str(caught.value)
    assert line.startswith("router_weight must") and "\n" not in line
    assert type(dense).__name__ in line and "mixtral" in line and "turn router_weight off" in line


# Convolutions have three dimensions too, and gates of recurrences look like routers.
@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "recurrent_gemma", "bamba"])
def test_other_stacks_of_weights_are_no_experts(family: str) -> None:
    assert moe_layers(tiny_family(family)) == {}


def test_a_shared_expert_is_not_taken_for_the_router() -> None:
    """Not even where it comes first and has as many rows as there are experts."""
    layer: Any = nn.Module()
    layer.experts = moe_layers(tiny_moe("mixtral"))[0].experts
    layer.shared = nn.Sequential(nn.Linear(32, NUM_EXPERTS), nn.Linear(NUM_EXPERTS, 32))
    layer.shared_gate = nn.Linear(32, 1)
    assert router_of(layer) is None
    layer.gate = nn.Linear(32, NUM_EXPERTS)
    assert router_of(layer) is layer.gate


def test_experts_of_an_unknown_family_are_refused_by_name() -> None:
    model: Any = tiny_moe("mixtral")
    model.config.model_type = "mixtral_next"
    with pytest.raises(UnfitError, match=r"experts must be those of mixtral.*'mixtral_next'"):
        moe_layers(model)


def test_experts_in_another_layout_are_refused_by_name() -> None:
    """Inkling's router has rows for its shared experts as well: it is neither dense nor known."""
    with pytest.raises(UnfitError) as caught:
        require_moe(tiny_family("inkling_text"), "router.weight")
    line = str(caught.value)
    assert "'inkling_text'" in line and "dense" not in line and "\n" not in line
    assert line.endswith("choose another model, or turn router.weight off")


# Reading them


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("family", GATES)
def test_logits_are_the_linear_map_of_what_the_router_sees(family: str, switched: bool) -> None:
    """With all experts active the weights have E columns as well and must not be taken."""
    if switched and family in READ_ONLY:
        return
    model = tiny_moe(family)
    seen: dict[int, Tensor] = {}
    with (
        all_experts(model) if switched else nullcontext(),
        reading_routers(moe_layers(model)) as logits,
    ):
        for i, block in moe_layers(model).items():
            block.router.register_forward_hook(
                lambda _, args, __, i=i: seen.update({i: args[0].reshape(-1, args[0].shape[-1])})
            )
        run(model)
    assert logits.keys() == seen.keys() == moe_layers(model).keys()
    for i, block in moe_layers(model).items():
        torch.testing.assert_close(
            logits[i].double(), linear_logits(block, seen[i]), rtol=1e-5, atol=1e-5
        )


N, E = 5, 4
LOGITS, WEIGHTS = torch.randn(N, E), torch.rand(N, E)
FLAT, SIZES = torch.arange(N * E), [N] * E
ORDERS = {
    "logits alone": LOGITS,
    "logits, weights, ids": (LOGITS, WEIGHTS, torch.zeros(N, E, dtype=torch.long)),
    "ids, weights, logits": (torch.zeros(N, E, dtype=torch.long), WEIGHTS, LOGITS),
    "logits, narrow weights, ids": (LOGITS, WEIGHTS[:, :2], torch.zeros(N, 2, dtype=torch.int32)),
    "order, tokens, weights, sizes, logits": (FLAT, FLAT, torch.rand(N * E), SIZES, LOGITS),
    "scores, logits": (WEIGHTS, LOGITS),
}


@pytest.mark.parametrize("order", ORDERS)
def test_logits_are_told_from_weights_in_every_order(order: str) -> None:
    router = nn.Linear(7, E)
    assert torch.equal(router_logits(router, ORDERS[order]), LOGITS)


def test_a_router_without_logits_is_refused() -> None:
    with pytest.raises(UnfitError, match="must return logits for its 4 experts"):
        router_logits(nn.Linear(7, E), (WEIGHTS[:, :2], torch.zeros(N, 2, dtype=torch.long)))


def test_later_passes_are_not_read() -> None:
    model = tiny_moe("mixtral")
    with reading_routers(moe_layers(model)) as logits:
        run(model)
    first = dict(logits)
    model(input_ids=IDS * 3 % 512, use_cache=False)
    assert all(logits[i] is first[i] for i in (0, 1)) and count_hooks(model) == 0


@pytest.mark.parametrize("family", SUPPORTED)
def test_experts_recombine_to_the_output_of_their_block(family: str) -> None:
    model = tiny_moe(family)
    for block in moe_layers(model).values():
        x, y = block_io(model, block)
        ids, weights = entering(model, block)
        with torch.no_grad():
            outputs = torch.stack([expert_output(block, x, e) for e in range(NUM_EXPERTS)], 1)
        chosen = outputs.gather(1, ids[..., None].expand(-1, -1, x.shape[1]))
        again = (weights[..., None] * chosen).sum(1) + shared_output(block, x)
        torch.testing.assert_close(again, y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))


def test_an_expert_is_the_gated_map_of_its_own_weights() -> None:
    block = moe_layers(tiny_moe("qwen3_moe"))[1]
    weights: Any = {name: p.detach().double() for name, p in block.block.named_parameters()}
    x = torch.randn(6, 32)
    for e in (0, 5):
        gate, up = (x.double() @ weights["experts.gate_up_proj"][e].T).chunk(2, -1)
        expected = (gate * torch.sigmoid(gate) * up) @ weights["experts.down_proj"][e].T
        tolerance = 1e-6 * float(expected.abs().max())
        with torch.no_grad():
            ours = expert_output(block, x, e).double()
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", SUPPORTED)
def test_weights_are_those_the_experts_are_called_with(family: str) -> None:
    model = tiny_moe(family)
    for block in moe_layers(model).values():
        ids, weights = entering(model, block)
        with reading_routers({block.layer: block}) as logits:
            run(model)
        ours = expert_weights(block, logits[block.layer], ids)
        if family not in NORMALISED:  # ours add up to 1
            weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(ours, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(READ_ONLY))
def test_experts_of_read_only_families_are_refused(family: str) -> None:
    model = tiny_moe(family)
    block = moe_layers(model)[1]
    with pytest.raises(UnfitError, match=f"mixtral.*'{family}'"):
        expert_output(block, torch.zeros(1, 32), 0)
    with pytest.raises(UnfitError, match=f"mixtral.*'{family}'"), all_experts(model):
        pass
    with pytest.raises(UnfitError), choosing_experts({1: block}, lambda *_: (IDS, IDS)):
        pass
    assert count_hooks(model) == 0


# Switching them


@pytest.mark.parametrize("family", SUPPORTED)
def test_all_experts_are_those_of_a_model_configured_so(family: str) -> None:
    model = tiny_moe(family)
    groups = {"topk_group": 2} if family in SIGMOID else {}
    configured = tiny_moe(family, num_experts_per_tok=NUM_EXPERTS, **groups)
    configured.load_state_dict(model.state_dict())
    before = run(model)
    with all_experts(model) as blocks:
        inside = run(model)
        assert all(block.top_k == NUM_EXPERTS for block in blocks.values())
        with all_experts(model):  # a trainer within a trainer
            assert torch.equal(run(model), inside)
        assert torch.equal(run(model), inside)
    torch.testing.assert_close(inside, run(configured), rtol=0, atol=0)
    assert not torch.allclose(inside, before)
    assert torch.equal(run(model), before) and count_hooks(model) == 0


@pytest.mark.parametrize("family", SUPPORTED)
def test_an_exception_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_moe(family)

    def settings() -> list[Any]:
        return [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in model.modules()]

    before = settings()
    with pytest.raises(KeyboardInterrupt), all_experts(model):
        assert settings() != before
        raise KeyboardInterrupt
    assert settings() == before and count_hooks(model) == 0


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_block_that_ignores_the_switch_is_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a version calls the number of experts: what counts is who is called."""
    model = tiny_moe(family)
    block = moe_layers(model)[1]
    monkeypatch.setattr("sad.models.experts._switch", lambda *_: None)
    with all_experts(model), pytest.raises(UnfitError, match=r"all 8 experts of layer \d.*mixtral"):
        run(model)
    monkeypatch.undo()
    monkeypatch.setattr(type(block.block), "forward", lambda _, x: x)  # nobody is called at all
    with all_experts(model), pytest.raises(UnfitError, match="all 8 experts of layer"):
        run(model)
    with choosing_experts({1: block}, lambda *_: (IDS, IDS)):
        with pytest.raises(UnfitError, match="the chosen experts of layer 1"):
            run(model)
    assert count_hooks(model) == 0


def test_experts_called_in_an_unknown_form_are_refused() -> None:
    model = tiny_moe("mixtral")
    experts: Any = moe_layers(model)[0].experts
    with all_experts(model), pytest.raises(UnfitError, match="tokens, ids and weights"):
        experts(torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.long))


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_chosen_expert_alone_makes_the_output(family: str) -> None:
    model = tiny_moe(family)
    for block in moe_layers(model).values():
        handed: list[Tensor] = []

        def choose(_: MoeBlock, logits: Tensor, handed: Any = handed) -> tuple[Tensor, Tensor]:
            handed.append(logits)
            ids = torch.full((len(logits), 2), 3) + torch.tensor([0, 2])
            return ids, torch.tensor([0.25, 2.0]).expand(len(logits), 2)

        with choosing_experts({block.layer: block}, choose):
            x, y = block_io(model, block)
        assert len(handed) == 1
        torch.testing.assert_close(
            handed[0].double(), linear_logits(block, x), rtol=1e-5, atol=1e-5
        )
        with torch.no_grad():
            third, fifth = (expert_output(block, x, e) for e in (3, 5))
        expected = 0.25 * third + 2.0 * fifth + shared_output(block, x)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * float(y.abs().max()))
    assert count_hooks(model) == 0


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_own_choice_changes_nothing(family: str) -> None:
    """Also where tokens differ in their experts: each keeps its own."""
    model = tiny_moe(family)
    blocks = moe_layers(model)
    routing = {i: entering(model, block) for i, block in blocks.items()}
    expected = run(model)
    with choosing_experts(blocks, lambda block, _: routing[block.layer]):
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(model), expected)
