"""Tiny random mixture-of-experts models of every family that ``sad.models.experts`` supports.

Two layers, 8 experts with top-2 routing, and the vocabulary of ``tiny.py``. Expert groups, scaling
factors, routing bias corrections and biases are not trivial in families that have them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.tiny import VOCAB_SIZE

NUM_EXPERTS = 8
TOP_K = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_QWEN = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_SIGMOID = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LOCAL = {"num_local_experts": NUM_EXPERTS}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": _QWEN | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    "qwen3_moe": _QWEN | {"head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": NUM_EXPERTS, "norm_topk_prob": False},
    "gpt_oss": _LOCAL | {"head_dim": 8, "rope_parameters": _ROPE},
    "granitemoe": _LOCAL | {"residual_multiplier": 0.7, "logits_scaling": 3.0},
    "deepseek_v3": _SIGMOID | _LATENT,
    "glm4_moe": _SIGMOID | {"head_dim": 8},
    "phimoe": _LOCAL,
    "llama4_text": _LOCAL
    | {"head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "ernie4_5_moe": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
}


def tiny_moe(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of this ``model_type``, in eval mode; ``overrides`` are configuration fields.

    In the sigmoid families and Llama 4 the first layer is dense, and only the second has experts.
    """
    config = CONFIG_MAPPING[family](**(_COMMON | FAMILIES[family] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim < 3 and name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.1)
    return model
