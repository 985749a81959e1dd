"""Every family's head reproduces the model's own logits; whatever cannot be split is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sad_kernels import Head
from support.families import FAMILIES, tiny_family
from support.tiny import tiny_gpt2, tiny_llama
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from sad.errors import UnfitError
from sad.models.heads import (
    PLAIN_HEADS,
    SCALED_HEADS,
    eval_no_grad,
    head_error,
    read_head,
    require_causal,
    require_head,
    rounding_tolerance,
    split_head,
    with_valid_vocab,
)

QUICK = """
    afmoe apertus bloom codegen cohere cohere2 ctrl deepseek_v3 exaone4 falcon falcon_h1 gemma
    gemma2 gemma3_text glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe
    helium hyperclovax llama llama4_text mamba minicpm3 mistral mixtral mpt nanochat nemotron
    olmo2 olmoe opt phi phi3 qwen2 qwen3 qwen3_moe recurrent_gemma smollm3 stablelm starcoder2
    vaultgemma xglm xlstm
""".split()
"""One of each kind of head, and the families that people use; the long tail is marked slow."""

TOKENS = torch.arange(3, 63)[None]


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES],
)
def test_the_head_reproduces_the_logits_of_each_family(family: str) -> None:
    model = tiny_family(family)
    backbone, head = split_head(model)
    with eval_no_grad(model):
        logits = model(input_ids=TOKENS, use_cache=False).logits
        ours = head(backbone(TOKENS))
        require_head(model, backbone, head, TOKENS)
        require_causal(model, backbone, TOKENS)
    assert ours.shape[-1] == head.vocab_size
    width = min(ours.shape[-1], logits.shape[-1])
    error = (ours[..., :width] - logits[..., :width].float()).abs().max() / logits.abs().max()
    assert error <= 1e-5


def test_the_quick_families_exist() -> None:
    assert set(QUICK) <= set(FAMILIES)
    assert len(QUICK) > 25


@pytest.mark.parametrize("family", sorted(SCALED_HEADS.keys() & set(FAMILIES)))
def test_a_scaled_head_read_as_a_plain_one_is_refused(family: str) -> None:
    """Else the test above could not fail for these families."""
    model = tiny_family(family)
    backbone, head = split_head(model)
    plain = Head(head.weight, head.bias)
    with (
        eval_no_grad(model),
        pytest.raises(UnfitError, match="must reproduce the model's own logits"),
    ):
        require_head(model, backbone, plain, TOKENS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi", "falcon_h1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_heads_agree_within_twice_their_rounding(family: str, dtype: torch.dtype) -> None:
    model = tiny_family(family).to(dtype)  # pyright: ignore[reportArgumentType]
    backbone, head = split_head(model)
    with eval_no_grad(model):
        assert head_error(model, backbone, head, TOKENS) <= rounding_tolerance(dtype)


def test_the_same_key_divides_in_one_family_and_multiplies_in_another() -> None:
    assert split_head(tiny_family("granite"))[1].logit_scale == pytest.approx(1 / 3)
    assert split_head(tiny_family("hyperclovax"))[1].logit_scale == 3


def test_the_bias_belongs_to_the_head() -> None:
    model: Any = tiny_family("phi")
    assert split_head(model)[1].bias is model.lm_head.bias


def test_a_softcap_is_caught_in_a_model_so_young_that_it_does_nothing_yet() -> None:
    model = tiny_family("gemma2", initializer_range=1e-4)
    model.config.final_logit_softcapping = 30.0
    backbone, head = split_head(model)
    uncapped = Head(head.weight)
    with eval_no_grad(model):
        logits = model(input_ids=TOKENS, use_cache=False).logits
        assert (uncapped(backbone(TOKENS)) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert head_error(model, backbone, head, TOKENS) <= 1e-5
        assert head_error(model, backbone, uncapped, TOKENS) > 1e-2


def test_gradients_reach_the_parameters_of_a_tied_head() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    backbone, head = split_head(model)
    assert head.weight is model.get_input_embeddings().weight
    head(backbone(TOKENS)).square().sum().backward()
    split = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(input_ids=TOKENS, use_cache=False).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(split[name], parameter.grad)


def test_positions_are_passed_on() -> None:
    model = tiny_gpt2()
    backbone, _ = split_head(model)
    shifted = torch.arange(5, 5 + TOKENS.shape[1])[None]
    assert not torch.equal(backbone(TOKENS), backbone(TOKENS, shifted))


def test_layers_that_know_no_positions_are_given_none() -> None:
    class Recurrent(LlamaModel):
        def forward(self, input_ids: Any, use_cache: Any) -> Any:  # pyright: ignore
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model = tiny_llama()
    model.model.__class__ = Recurrent
    backbone, _ = split_head(model)
    restarting = torch.zeros_like(TOKENS)
    assert torch.equal(backbone(TOKENS, restarting), backbone(TOKENS))


def test_rows_past_the_valid_vocabulary_are_cut() -> None:
    head = with_valid_vocab(split_head(tiny_llama())[1], 500)
    assert head.vocab_size == 500


def test_a_model_that_cuts_no_columns_has_a_whole_head() -> None:
    model = tiny_family("inkling2_text")
    assert read_head(model).valid_vocab == 120
    model.config.unpadded_vocab_size = 200
    assert read_head(model).vocab_size == 128


def test_a_tokenizer_larger_than_the_head_is_refused() -> None:
    with pytest.raises(UnfitError, match="for each of the tokenizer's 513 ids, got 512"):
        with_valid_vocab(split_head(tiny_llama())[1], 513)


# What cannot be split


class LoraLinear(nn.Linear):
    """A product with more to it than its weight, like PEFT's layers."""


def test_a_head_that_is_not_exactly_linear_is_refused_with_the_remedy() -> None:
    model = tiny_llama()
    model.lm_head = LoraLinear(32, 512, bias=False)
    with pytest.raises(
        UnfitError, match=r"got LoraLinear.*take the head \(lm_head\) out of PEFT's"
    ):
        split_head(model)


def test_adapters_in_the_layers_just_work() -> None:
    class Adapted(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.extra = nn.Linear(base_layer.in_features, base_layer.out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.extra(x)

    model = tiny_llama()
    attention: Any = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    backbone, head = split_head(model)
    assert torch.equal(head(backbone(TOKENS)), model(input_ids=TOKENS).logits)


def test_a_peft_model_is_split_like_the_model_inside() -> None:
    class PeftLike(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def get_base_model(self) -> Any:
            return self.model

    inner = tiny_llama()
    backbone, head = split_head(PeftLike(inner))  # pyright: ignore[reportArgumentType]
    assert head.weight is inner.lm_head.weight
    assert backbone.layers is inner.model


def test_a_model_without_an_output_embedding_is_refused() -> None:
    with pytest.raises(UnfitError, match="LlamaModel must have an output embedding"):
        split_head(LlamaModel(tiny_llama().config))


def test_an_encoder_is_refused_because_it_sees_the_future() -> None:
    config = BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(UnfitError, match="BertLMHeadModel must be causal"):
        split_head(BertLMHeadModel(config).eval())


# Families in neither table


class NewConfig(LlamaConfig):
    model_type = "a_family_of_tomorrow"


class NewModel(LlamaForCausalLM):
    config_class = NewConfig
    factor = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out: Any = super().forward(*args, **kwargs)
        out.logits = out.logits * self.factor
        return out


def new_model(factor: float) -> NewModel:
    fields = tiny_llama().config.to_dict()
    fields.pop("model_type")
    model = NewModel(NewConfig(**fields)).eval()
    model.factor = factor
    return model


def test_an_unknown_family_with_a_plain_head_is_accepted_on_its_own_word() -> None:
    model = new_model(1.0)
    backbone, head = split_head(model)
    assert torch.equal(head(backbone(TOKENS)), model(input_ids=TOKENS).logits)


def test_an_unknown_family_with_a_scaled_head_is_refused_naming_the_tables() -> None:
    match = "a_family_of_tomorrow.*SCALED_HEADS and PLAIN_HEADS"
    with pytest.raises(UnfitError, match=match):
        split_head(new_model(1.01))


def test_an_odd_head_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(1.01)
    monkeypatch.setitem(SCALED_HEADS, model.config.model_type, lambda config: {"logit_scale": 1.01})
    backbone, head = split_head(model)
    torch.testing.assert_close(head(backbone(TOKENS)), model(input_ids=TOKENS).logits)
    monkeypatch.setitem(SCALED_HEADS, model.config.model_type, lambda config: {"logit_scal": 1.01})
    with pytest.raises(TypeError, match="logit_scal"):
        split_head(model)


def test_an_unknown_family_whose_logits_are_0_is_refused() -> None:
    model = new_model(0.0)
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(UnfitError, match="logits are all 0 and decide nothing"):
        split_head(model)


def test_an_unknown_family_whose_forward_fails_is_refused_in_one_line() -> None:
    model = new_model(1.0)
    model.model.norm = nn.LayerNorm(7)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UnfitError, match="whose forward fails") as caught:
        split_head(model)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(1.0)
    split_head(model)
    monkeypatch.setattr(model, "forward", None)
    split_head(model)


def test_probing_an_unknown_family_leaves_modes_and_random_state_alone() -> None:
    model = new_model(1.0).train()
    model.model.norm.eval()
    before = torch.get_rng_state()
    split_head(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.model.norm.training


def test_the_tables_are_trusted_without_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(model, "forward", None)
    assert read_head(model) == split_head(model)[1]


def test_no_family_is_in_both_tables() -> None:
    """Its row would be read in the one place and not in the other."""
    assert not PLAIN_HEADS & SCALED_HEADS.keys()
