"""What is captured is what the model computed, and capturing it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.families import tiny_family
from support.tiny import tiny_gpt2, tiny_llama, tiny_qwen3
from support.tiny_moe import tiny_moe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sad.errors import SadError, UnfitError, UsageError
from sad.losses import attention_hook
from sad.losses.base import Activations, AttentionInputs, CaptureSpec
from sad.losses.capture import Capture
from sad.models.heads import Backbone, decoder_layers, relative_error, rounding_tolerance
from sad.models.load import enable_checkpointing

LENGTH = 80  # longer than the windows of ``families.py``
IDS = torch.stack([torch.arange(LENGTH) * 7 % 127, torch.arange(LENGTH) * 11 % 127])
APART = torch.arange(LENGTH).expand(2, -1)
PACKED = torch.stack([APART[0] % 70, torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])])
"""Documents of 70 and 10 tokens in one row, of 9 and 71 in the other."""

ALL = CaptureSpec(hidden=(0, 1), attention=(0, 1), projections=(0, 1), routers=(0, 1))


def activations(
    model: PreTrainedModel, spec: CaptureSpec, positions: Tensor = APART
) -> Activations:
    capture = Capture(model, spec, role="teacher", detach=True)
    with torch.no_grad(), capture.capturing() as got:
        Backbone(model)(IDS, positions)
    return got


def hooks_in(model: nn.Module) -> set[nn.Module]:
    return {m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert not attention_hook._HOOKS


# Hidden states


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_hidden_states_are_what_layers_return(build: Any) -> None:
    model = build()
    got = activations(model, CaptureSpec(hidden=(0, 1)), PACKED)
    with torch.no_grad():
        own = model(
            IDS, position_ids=PACKED, use_cache=False, output_hidden_states=True
        ).hidden_states
    assert torch.equal(got.hidden[0], own[1])
    # The last one stands before the final norm, which transformers' list has applied.
    norm = model.transformer.ln_f if build is tiny_gpt2 else model.model.norm
    assert not torch.equal(got.hidden[1], own[2])
    assert torch.equal(norm(got.hidden[1]), own[2])


def test_layers_may_return_their_states_first_in_a_list() -> None:
    model = tiny_family("openai-gpt")  # without a final norm
    got = activations(model, CaptureSpec(hidden=(1,)))
    with torch.no_grad():
        assert torch.equal(got.hidden[1], Backbone(model)(IDS, APART))


def test_decoder_layers_are_found_whatever_else_there_is_as_many_of() -> None:
    for model, path in (
        (tiny_llama(), "model.layers"),
        (tiny_gpt2(), "transformer.h"),
        (tiny_family("gpt_neox"), "gpt_neox.layers"),
        (tiny_family("opt"), "model.decoder.layers"),
    ):
        assert decoder_layers(model) is model.get_submodule(path)
    model: Any = tiny_llama()
    layers = model.model.layers
    del model.model.layers
    model.model.mixers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))  # comes first
    model.model.layers = layers
    layers[1].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert decoder_layers(model) is layers


def test_models_without_a_list_of_layers_are_refused() -> None:
    model: Any = tiny_llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(UnfitError, match="must keep its 3 decoder layers in one ModuleList"):
        decoder_layers(model)


def test_states_that_are_no_rows_of_vectors_are_refused() -> None:
    with pytest.raises(UnfitError, match=r"got no tensor \[B, L, D\]"):
        activations(tiny_family("gemma3n_text"), CaptureSpec(hidden=(0,)))  # several streams


# Attention


def rebuilt(inputs: AttentionInputs, positions: Tensor) -> Tensor:
    """Maps [B, H, L, L] by their definition, in float64."""
    query, key = inputs.query.double(), inputs.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * inputs.scaling
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    document = (positions == 0).long().cumsum(1)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    seen = (distance >= 0) & (document[:, :, None] == document[:, None, :])
    if inputs.window is not None:
        seen &= distance < inputs.window
    return torch.where(seen[:, None], scores, -torch.inf).softmax(-1)


@pytest.mark.parametrize("positions", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize(
    "family",
    # grouped heads; norms on q and k; window and softcap; window; partial rotary; neither; MLA
    ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "mistral", "deepseek_v3"],
)
def test_maps_are_those_of_eager_attention(family: str, positions: Tensor) -> None:
    model = tiny_family(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # the default, but not in transformers 5.12
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 0.5  # of scores around 1
    got = activations(model, CaptureSpec(attention=(0, 1)), positions)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(IDS, position_ids=positions, use_cache=False, output_attentions=True)
    for layer, truth in enumerate(output.attentions):
        error = relative_error(rebuilt(got.attention[layer], positions), truth)
        assert error <= rounding_tolerance(torch.float32), (layer, error)


def test_windows_and_softcaps_are_those_of_each_layer() -> None:
    model = tiny_family("gemma2")
    model.set_attn_implementation("eager")
    got = activations(model, CaptureSpec(attention=(0, 1)))
    assert [got.attention[i].window for i in (0, 1)] == [64, None]
    assert got.attention[0].softcap == got.attention[1].softcap == 50.0
    plain = activations(tiny_llama(), CaptureSpec(attention=(1,))).attention[1]
    assert (plain.window, plain.softcap, plain.scaling) == (None, None, 8**-0.5)


def test_sdpa_has_no_softcap_whatever_it_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.12 and 5.17 ignored a softcap under sdpa; 5.23 refuses it."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args: Any, **options: Any) -> Any:
        return sdpa(*args, **(options | {"softcap": None}))

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attend)
    model = tiny_family("gemma2")
    model.config._attn_implementation = "sdpa"
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    got = activations(
        model, CaptureSpec(attention=(0, 1))
    )  # whose maps would not rebuild the output
    assert got.attention[0].softcap is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, lambda: tiny_moe("qwen3_moe")])
def test_nothing_that_the_model_computes_changes(build: Any, implementation: str) -> None:
    model = build()
    model.set_attn_implementation(implementation)
    capture = Capture(model, CaptureSpec((0, 1), (0, 1)), role="teacher", detach=True)
    with torch.no_grad():
        plain = model(IDS, position_ids=PACKED, use_cache=False).logits
        with capture.capturing():
            watched = model(IDS, position_ids=PACKED, use_cache=False).logits
    assert torch.equal(plain, watched)
    assert model.config._attn_implementation == implementation


def test_16_bit_models_pass_the_check_too() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for implementation in ("sdpa", "eager"):
            model: Any = tiny_llama()
            model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
            model.set_attn_implementation(implementation)
            assert activations(model, CaptureSpec(attention=(1,))).attention[1].query.dtype == dtype


def test_implementations_are_called_by_the_name_that_they_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As flash attention does, this one reads its name; its mask is built under it as well."""
    names: list[str] = []

    def attend(module: Any, *args: Any, **options: Any) -> Any:
        names.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **options)

    def mask(*args: Any, **options: Any) -> Any:
        names.append("mask")
        return eager_mask(*args, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "another", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "another", mask)
    model: Any = tiny_llama()
    model.set_attn_implementation("another")
    capture = Capture(model, CaptureSpec(attention=(1,)), role="teacher", detach=True)
    names.clear()
    with torch.no_grad(), capture.capturing():
        model(IDS, position_ids=PACKED, use_cache=False)
    assert names == ["mask", "another", "another"]


def test_a_failed_forward_leaves_the_model_as_it_was() -> None:
    model: Any = tiny_llama()
    capture = Capture(model, CaptureSpec((0,), (1,), (1,)), role="teacher", detach=True)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError), capture.capturing():
        model(IDS)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert not hooks_in(model)
    with torch.no_grad(), capture.capturing() as got:  # and it can be used again
        model(IDS)
    assert got.attention.keys() == {1}


# Projections


def own_projection(attention: Any, x: Tensor, name: str, *, norm: bool) -> Tensor:
    """[B, L, W] from the module's own parts, head by head."""
    projected = getattr(attention, f"{name}_proj")(x)
    if not norm:
        return projected
    norm_of_heads = getattr(attention, f"{name}_norm")
    width = norm_of_heads.weight.shape[0]
    return torch.cat([norm_of_heads(head) for head in projected.split(width, dim=-1)], dim=-1)


@pytest.mark.parametrize("length", [LENGTH, 4, 2, 1], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize(
    "family, normed",
    [
        ("llama", False),
        ("qwen3", True),  # per head, [B, L, H, d]
        ("gemma3_text", True),  # per head, [B, H, L, d]; both have 4 heads of q and 2 of k
        ("olmo2", True),  # all heads at once
        ("nanochat", False),  # its norms come after rotary embedding
    ],
)
def test_projections_are_taken_after_norms_and_before_rotation(
    family: str, normed: bool, length: int
) -> None:
    model = tiny_family(family)
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    capture = Capture(model, CaptureSpec(projections=(1,)), role="teacher", detach=True)
    attention: Any = decoder_layers(model)[1].self_attn
    inputs: list[Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda _, args, options: inputs.append(args[0] if args else options["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad(), capture.capturing() as got:
        Backbone(model)(IDS[:, :length])
    handle.remove()
    with torch.no_grad():
        for name in ("query", "key", "value"):
            truth = own_projection(attention, inputs[0], name[0], norm=normed and name != "value")
            mine = getattr(got.projections[1], name)
            assert mine.shape == truth.shape
            assert relative_error(mine, truth) <= rounding_tolerance(torch.float32), name


def test_gates_that_are_projected_with_the_queries_are_left_out() -> None:
    config = tiny_family("qwen3_next").config
    config.layer_types = ["linear_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.model.layers[1].self_attn.q_proj.out_features == 64
    got = activations(model, CaptureSpec(projections=(1,)))
    assert got.projections[1].query.shape == (2, LENGTH, 32)


# Routers


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_logits_are_the_models_own(family: str) -> None:
    model = tiny_moe(family)
    got = activations(model, CaptureSpec(routers=(0, 1)))
    with torch.no_grad():
        own = model(IDS, output_router_logits=True, use_cache=False).router_logits
    for layer in (0, 1):
        assert torch.equal(got.routers[layer], own[layer])


# Gradients


def test_only_students_keep_their_graph() -> None:
    model = tiny_moe("qwen3_moe")
    for detach in (True, False):
        capture = Capture(model, ALL, role="student", detach=detach)
        with capture.capturing() as got:
            Backbone(model)(IDS, PACKED)
        tensors = [*got.hidden.values(), *got.routers.values()]
        for layer in (0, 1):
            tensors += [*got.attention[layer][:2], *got.projections[layer]]
        assert len(tensors) == 14
        assert all(tensor.requires_grad is not detach for tensor in tensors)


def gradients(model: Any, spec: CaptureSpec) -> tuple[dict[str, Tensor], int]:
    """Of a loss on the output and on all that is captured; and how often an MLP has run."""
    model.zero_grad()
    runs: list[int] = []
    layer_1: Any = decoder_layers(model)[1]
    handle = layer_1.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    capture = Capture(model, spec, role="student", detach=False)
    runs.clear()
    with capture.capturing() as got:
        hidden = Backbone(model)(IDS, PACKED)
    loss = hidden.square().mean()
    for layer in spec.hidden:
        loss = loss + got.hidden[layer].sin().mean()
        loss = loss + rebuilt(got.attention[layer], PACKED).square().mean()
        loss = loss + sum(x.square().mean() for x in got.projections[layer])
    for layer in spec.routers:
        loss = loss + got.routers[layer].softmax(-1).square().mean()
    loss.backward()
    handle.remove()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, len(runs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "build, spec",
    [
        (lambda: tiny_moe("qwen3_moe"), ALL),
        (lambda: tiny_family("gemma3_text"), CaptureSpec((0, 1), (0, 1), (0, 1))),
    ],
    ids=["qwen3_moe", "gemma3_text"],
)
def test_checkpointing_changes_no_bit_of_any_gradient(
    build: Any, spec: CaptureSpec, implementation: str
) -> None:
    model = build().train()
    model.set_attn_implementation(implementation)
    plain, once = gradients(model, spec)
    enable_checkpointing(model)
    recomputed, twice = gradients(model, spec)
    assert (once, twice) == (1, 2)  # or nothing was put to the test
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    without, _ = gradients(model, CaptureSpec())
    assert any(not torch.equal(plain[name], without[name]) for name in without)


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_llama().train()
    model.enable_input_require_grads()
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=True)
    )
    capture = Capture(model, CaptureSpec(attention=(1,)), role="student", detach=False)
    with pytest.raises(UsageError, match="must be non-reentrant"), capture.capturing():
        model(IDS, use_cache=False)


# Arming


def test_without_spec_nothing_is_looked_at_or_installed() -> None:
    capture = Capture(nn.Linear(2, 2), CaptureSpec(), role="student", detach=False)  # pyright: ignore
    model: Any = tiny_llama()
    capture = Capture(model, CaptureSpec(), role="student", detach=False)
    with capture.capturing() as got:
        assert not hooks_in(model)
        model(IDS)
    assert got == Activations()


def test_hooks_sit_on_mapped_layers_only_and_only_while_capturing() -> None:
    model = tiny_moe("qwen3_moe")
    capture = Capture(model, CaptureSpec((1,), (1,), (1,), (1,)), role="student", detach=False)
    assert not hooks_in(model)
    with capture.capturing():
        assert hooks_in(model)
        assert hooks_in(model) <= set(decoder_layers(model)[1].modules())
        model(IDS)
        assert model.config._attn_implementation == "sdpa"  # for the layers between, too
    assert not hooks_in(model)


def test_a_model_is_captured_once_at_a_time() -> None:
    model, other = tiny_llama(), tiny_llama()
    capture = Capture(model, CaptureSpec(attention=(1,)), role="student", detach=False)
    second = Capture(model, CaptureSpec(attention=(1,)), role="teacher", detach=True)
    foreign = Capture(other, CaptureSpec(attention=(1,)), role="teacher", detach=True)
    with capture.capturing() as got, foreign.capturing() as foreign_got:
        with pytest.raises(RuntimeError, match="a capture within another"), capture.capturing():
            pass
        with pytest.raises(RuntimeError, match="got a second capture"), second.capturing():
            pass
        model(IDS)
        other(IDS[:, :7])
    assert got.attention[1].query.shape[2] == LENGTH
    assert foreign_got.attention[1].query.shape[2] == 7
    assert not hooks_in(model)


def test_one_forward_is_captured_not_two_and_not_none() -> None:
    for spec in (
        CaptureSpec((1,)),
        CaptureSpec((), (1,)),
        CaptureSpec((), (), (1,)),
        CaptureSpec((), (), (), (1,)),
    ):
        model = tiny_moe("qwen3_moe")
        capture = Capture(model, spec, role="student", detach=False)
        with pytest.raises(RuntimeError, match="must run once while captured"), capture.capturing():
            model(IDS)
            model(IDS)
        with pytest.raises(UnfitError, match=r"layer 1 .* got a forward pass without"):
            with capture.capturing():
                pass
        assert not hooks_in(model)


def test_making_a_capture_disturbs_neither_modes_nor_random_numbers() -> None:
    model = tiny_gpt2(attn_pdrop=0.5).train()
    before = torch.get_rng_state()
    Capture(model, CaptureSpec((1,), (1,)), role="student", detach=False)
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())


# Refusals


@pytest.mark.parametrize(
    "build, spec, message",
    [
        ("llama", CaptureSpec(hidden=(2,)), "layers of the layerwise loss must be 0 to 1 in"),
        ("llama", CaptureSpec(attention=(-1,)), "layers of the attention loss must be 0 to 1 in"),
        ("llama", CaptureSpec(routers=(0,)), "must have a router of a supported family, got none"),
        ("gpt2", CaptureSpec(projections=(0,)), "q_proj, k_proj and v_proj, got 0 modules"),
        ("gpt_neox", CaptureSpec(projections=(0,)), "use the attention loss instead"),
        (
            "bloom",
            CaptureSpec(attention=(0,)),
            "call transformers' AttentionInterface once, got 0 calls",
        ),
        ("falcon", CaptureSpec(attention=(1,)), "use the relation loss instead"),
        ("gpt_oss", CaptureSpec(attention=(0,)), "got sinks that take a share"),
        ("diffllama", CaptureSpec(attention=(0,)), "AttentionInterface once, got [02] calls"),
        ("doge", CaptureSpec(attention=(1,)), "must be the softmax of scaled products"),
        ("phimoe", CaptureSpec(attention=(1,)), "that skips keys unsaid"),
        ("llama4_text", CaptureSpec(attention=(1,)), "that skips keys unsaid"),
        ("deepseek_v32", CaptureSpec(attention=(1,)), "that skips keys unsaid"),
    ],
)
def test_refusals_name_the_model_and_the_remedy(
    build: str, spec: CaptureSpec, message: str
) -> None:
    model = tiny_family(build)
    if build == "doge":  # learned weights on keys
        model.config.sliding_window = None
        nn.init.normal_(decoder_layers(model)[1].get_parameter("self_attn.A"))
    with pytest.raises(SadError, match=message) as caught:
        Capture(model, spec, role="teacher", detach=True)
    line = str(caught.value)
    assert f"the teacher {type(model).__name__}" in line
    assert "\n" not in line and "; " in line
    assert caught.value.exit_code == (2 if "layer map" in line else 65)


def test_models_that_compute_something_else_while_captured_are_refused() -> None:
    """As GPT-2 with ``reorder_and_upcast_attn`` does: its layers act on the name they see."""
    model: Any = tiny_llama()

    def act(*args: Any) -> Tensor | None:
        return None if model.config._attn_implementation == "sdpa" else 2 * args[2]

    model.model.layers[1].mlp.register_forward_hook(act)
    with pytest.raises(UnfitError, match="must give the same hidden states while"):
        Capture(model, CaptureSpec(attention=(1,)), role="teacher", detach=True)
    Capture(model, CaptureSpec(attention=(0,)), role="teacher", detach=True)  # another layer's name


def test_models_that_never_repeat_themselves_are_not_taken_for_changed() -> None:
    model: Any = tiny_llama()
    model.model.layers[1].mlp.register_forward_hook(
        lambda *args: args[2] + 1e-3 * torch.randn_like(args[2])
    )
    assert activations(model, CaptureSpec(attention=(1,))).attention.keys() == {1}


def test_masks_built_inside_of_a_layer_are_refused() -> None:
    model: Any = tiny_llama()
    model.model.layers[1].mlp.register_forward_hook(
        lambda *_: ALL_MASK_ATTENTION_FUNCTIONS[model.config._attn_implementation]()
    )
    with pytest.raises(UnfitError, match="must build its attention masks outside"):
        Capture(model, CaptureSpec(attention=(1,)), role="teacher", detach=True)
