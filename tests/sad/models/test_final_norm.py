"""The final norm is found in families by what it does: with the head it makes their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, tiny_family
from support.tiny import tiny_llama
from torch import nn

from sad.errors import UnfitError
from sad.models.final_norm import find_final_norm
from sad.models.heads import decoder_layers, split_head

IDS = (torch.arange(12) * 7 % 100 + 3)[None]

QUICK = (
    "llama gemma gemma2 gemma3_text qwen3 gpt2 gpt_neox olmo2 cohere granite mixtral phi opt"
).split()
"""RMSNorms, those that add 1, LayerNorms, with and without a bias; heads that scale and softcap."""

WITHOUT = set(
    "deepseek_v4 gemma3n_text hrm_text hy_v4 inkling2_text longcat_flash openai-gpt".split()
)
"""Families that add up several streams before their norm, have none, or call layers otherwise."""


def random_norms(model: nn.Module) -> None:
    """Fresh norms multiply by 1: a missing one would hardly be seen."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and ("norm" in name or ".ln_" in name):
                weight += torch.randn(weight.shape, generator=draw).to(weight.dtype)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
        for family in FAMILIES
        if family not in WITHOUT
    ],
)
def test_norm_and_head_make_the_models_logits(family: str) -> None:
    model: Any = tiny_family(family)
    random_norms(model)
    norm = find_final_norm(model, IDS)
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[-1].register_forward_hook(keep)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
        handle.remove()
        _, head = split_head(model)
        (before,) = states
        made = head(norm(before[0]))
    own = logits[0, :, : made.shape[-1]]
    assert (made - own).abs().max() <= 1e-5 * own.abs().max()
    assert norm.width == before.shape[-1]
    if norm.width == head.weight.shape[1]:  # without the norm it would show
        assert (head(before[0]) - own).abs().max() > 0.01 * own.abs().max()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f == "gemma3n_text" else pytest.mark.slow)
        for f in sorted(WITHOUT)
    ],
)
def test_a_model_without_such_a_module_is_refused(family: str) -> None:
    with pytest.raises(UnfitError, match="must have a final norm, one module between its last"):
        find_final_norm(tiny_family(family), IDS)


def test_hooks_are_gone_after_it() -> None:
    model = tiny_llama()
    norm = find_final_norm(model, IDS)
    assert norm.module is model.model.norm and norm.width == 32
    assert not any(module._forward_hooks for module in model.modules())
    model.model.norm = nn.Identity()  # type: ignore[assignment]
    assert isinstance(find_final_norm(model, IDS).module, nn.Identity)
