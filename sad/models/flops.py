"""Floating-point operations of a model per token, and what devices can do per second.

A matrix product of a token with N weights takes 2 N operations, a multiplication and an addition
each. Attention of one layer with H heads of width d over a row of L tokens takes ``4 H d L`` per
token, for scores and sums: as if every token saw its whole row, the convention of PaLM (Chowdhery
et al., 2022, appendix B), although half of it is masked. Norms, activations and the lookup of
embeddings count as nothing.

Of the weights of experts only the share counts that one token passes through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sad.models.heads import output_embedding
from sad.models.quantization import number_of_weights

_SXM, _PCIE, _NVL = 989.4e12, 756e12, 835.5e12

BF16_PEAKS = {
    r"A100\b(?!X)": 312e12,  # NVIDIA A100 datasheet (2021): equal for SXM and PCIe
    r"H100 PCIe": _PCIE,  # NVIDIA H100 datasheet (2022), half of what sparse matrices have
    r"H100 NVL": _NVL,  # NVIDIA H100 NVL datasheet (2024)
    r"H100 80GB HBM3": _SXM,  # SXM5; NVIDIA H100 datasheet (2022)
    r"H200 NVL": _NVL,  # NVIDIA H200 datasheet (2024)
    r"H200": _SXM,  # SXM; NVIDIA H200 datasheet (2024)
    r"B200": 2250e12,  # NVIDIA DGX B200 datasheet (2024): 8 GPUs, half of the sparse peak
    r"L40S": 362e12,  # NVIDIA L40S datasheet (2023)
    r"RTX 4090(?! (D|Laptop))": 165.2e12,  # NVIDIA Ada architecture (2022), fp32 accumulation
}
"""Name of a GPU (a pattern) -> operations per second on dense bf16 matrices, by its maker."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Where configurations say how many experts a layer has."""


def bf16_peak(device_name: str) -> float | None:
    """Operations per second of a GPU on dense bf16 matrices; None for one that is not in the table,
    and for a part of one (MIG)."""
    if "MIG" in device_name:
        return None
    for pattern, peak in BF16_PEAKS.items():
        if re.search(rf"\b{pattern}(?![\w])", device_name):
            return peak
    return None


def forward_flops(model: PreTrainedModel, length: int) -> int:
    """Operations per token of a forward pass over rows of ``length`` tokens, head included:
    ``2 N`` for N weights in matrix products, plus attention."""
    products = sum(2 * count for count, _ in _products(model))
    return round(products + _attention_flops(model, length))


def training_flops(model: PreTrainedModel, length: int) -> int:
    """Operations per token of a forward and a backward pass: ``6 N``, plus three times attention.

    A weight that is not trained needs no gradient and counts ``4``. What gradient checkpointing
    computes again is no work of the model and does not count.
    """
    products = sum((6 if trained else 4) * count for count, trained in _products(model))
    return round(products + 3 * _attention_flops(model, length))


def _products(model: PreTrainedModel) -> Iterator[tuple[float, bool]]:
    """Of each parameter that a token is multiplied with: how many numbers, and whether trained."""
    head: Any = output_embedding(model).weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    share = _share_of_experts(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in tables:
            continue
        count = number_of_weights(parameter)
        yield (count * share if ".experts." in name else count), parameter.requires_grad


def _share_of_experts(model: PreTrainedModel) -> float:
    config = model.config.get_text_config()
    experts = next((getattr(config, key) for key in EXPERTS if getattr(config, key, None)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if chosen and experts else 1.0


def _attention_flops(model: PreTrainedModel, length: int) -> int:
    """Of all layers, per token of a forward pass; as if each layer had attention."""
    config: Any = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * config.num_hidden_layers * config.num_attention_heads * width * length
