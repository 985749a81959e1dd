"""The final norm is found in families by what it does: with the head it makes their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import tiny_family
from support.tiny import tiny_llama
from torch import nn

from sad.errors import UnfitError
from sad.models.final_norm import find_final_norm
from sad.models.heads import PLAIN_HEADS, SCALED_HEADS, decoder_layers, split_head

IDS = (torch.arange(12) * 7 % 100 + 3)[None]

QUICK = (
    "llama gemma gemma2 gemma3_text qwen3 gpt2 gpt_neox olmo2 cohere granite mixtral phi opt"
).split()
"""RMSNorms, those that add 1, LayerNorms, with and without a bias; heads that scale and softcap."""

WITHOUT = "gemma3n_text"
"""A family that adds up several streams before its norm."""


def random_norms(model: nn.Module) -> None:
    """Fresh norms multiply by 1: a missing one would hardly be seen."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and ("norm" in name or ".ln_" in name):
                weight += torch.randn(weight.shape, generator=draw).to(weight.dtype)


@pytest.mark.parametrize("family", QUICK)
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
        raw = head(before[0])
    own = logits[0, :, : made.shape[-1]]
    torch.testing.assert_close(made, own, rtol=1e-5, atol=1e-5)
    assert (raw - own).abs().max() > 0.01  # without the norm it would show


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(PLAIN_HEADS | SCALED_HEADS.keys()))
def test_every_family_has_one_or_is_refused(family: str) -> None:
    try:
        model: Any = tiny_family(family)
    except Exception as error:
        pytest.skip(f"not built here: {error}")
    try:
        norm = find_final_norm(model, IDS)
    except UnfitError as error:
        assert "\n" not in str(error)
        return
    assert family != WITHOUT
    assert norm.dtype.is_floating_point
    assert norm(torch.ones(3, norm.width)).shape == (3, split_head(model)[1].weight.shape[1])


def test_a_sum_of_several_streams_is_refused() -> None:
    with pytest.raises(UnfitError, match="must have a final norm, one module between its last"):
        find_final_norm(tiny_family(WITHOUT), IDS)


def test_hooks_are_gone_after_it() -> None:
    model = tiny_llama()
    norm = find_final_norm(model, IDS)
    assert norm.module is model.model.norm and norm.width == 32
    assert not any(module._forward_hooks for module in model.modules())
    model.model.norm = nn.Identity()  # type: ignore[assignment]
    assert isinstance(find_final_norm(model, IDS).module, nn.Identity)
