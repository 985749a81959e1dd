"""Operations per token against those that torch counts, and peaks by the names of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import tiny_gpt2, tiny_llama
from support.tiny_moe import tiny_moe
from torch.utils.flop_counter import FlopCounterMode

from sad.models.flops import bf16_peak, forward_flops, training_flops

LENGTH = 24


def counted(model: Any, *, backward: bool) -> float:
    """Operations per token of one row, attention over the whole row, as torch counts them."""
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model(ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / LENGTH


@pytest.mark.parametrize(
    "model",
    [
        tiny_llama(),
        tiny_llama(tie_word_embeddings=True),
        tiny_llama(num_key_value_heads=2),
        tiny_gpt2(),
    ],
    ids=["untied", "tied", "grouped", "gpt2"],
)
def test_operations_are_those_that_torch_counts(model: Any) -> None:
    model.set_attn_implementation("eager")
    # Rotary angles are a product of torch's, too: a few operations per token.
    assert forward_flops(model, LENGTH) == pytest.approx(counted(model, backward=False), rel=5e-3)
    assert training_flops(model, LENGTH) == pytest.approx(counted(model, backward=True), rel=5e-3)


def test_frozen_weights_need_no_gradient() -> None:
    model: Any = tiny_llama()
    trained = training_flops(model, LENGTH)
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert trained - training_flops(model, LENGTH) == 2 * frozen.numel()


def test_of_experts_the_share_counts_that_a_token_sees() -> None:
    model: Any = tiny_moe("mixtral")
    names = {name: p.numel() for name, p in model.named_parameters() if ".experts." in name}
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    assert names and chosen < experts
    whole = forward_flops(model, LENGTH)
    model.config.num_experts_per_tok = experts
    more = forward_flops(model, LENGTH) - whole
    assert more == 2 * sum(names.values()) * (experts - chosen) // experts


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100X", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_name(name: str, teraflops: float | None) -> None:
    assert bf16_peak(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))
