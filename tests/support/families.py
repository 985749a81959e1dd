"""Tiny random models of transformers' causal families, shrunk by common configuration fields.

Two layers, 128 token ids, hidden size 32: each is built in milliseconds. Logit scales, softcaps and
biases are far from neutral, so that a head that misses one gives clearly wrong logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sad.models.heads import PLAIN_HEADS, SCALED_HEADS

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "sliding_window": 64,
    "attention_window_size": 64,
    "rotary_dim": 4,
    "partial_rotary_factor": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
}
_RECURRENT: dict[str, Any] = {
    "state_size": 8,
    "expand": 2,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
}
_GEMMA: dict[str, Any] = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
_HEADS: dict[str, Any] = {
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "lm_head_multiplier": 0.3,
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "unpadded_vocab_size": 120,
}
_COMMON = _SIZES | _EXPERTS | _LATENT_ATTENTION | _RECURRENT | _GEMMA | _HEADS

_FULL_ROTARY = {"partial_rotary_factor": 1.0, "num_key_value_heads": 4}
_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa "
        "longcat_flash minicpm3 youtu".split(),
        _FULL_ROTARY,
    ),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


BUILT_BY_OTHERS = {"emu3_text_model"}
"""Text models that AutoModelForCausalLM reaches through another configuration."""

NEEDS_MORE = {"cohere_compass_text", "gemma3", "gemma3n", "gemma4", "gemma4_unified"}
"""Common fields do not shrink these: their vision towers, or rope settings per layer type."""

FAMILIES = sorted(
    ((PLAIN_HEADS | SCALED_HEADS.keys()) & set(CONFIG_MAPPING.keys()))
    - BUILT_BY_OTHERS
    - NEEDS_MORE
)
"""What can be built tiny of the families whose heads are known."""


def tiny_family(model_type: str, *, initializer_range: float = 0.2) -> PreTrainedModel:
    """A tiny random model of this family, in eval mode, with a random head bias if it has one."""
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    known |= set(inspect.signature(config_class.__init__).parameters)
    fields: dict[str, Any] = dict(_COMMON)
    fields |= {"initializer_range": initializer_range, "init_std": initializer_range}
    fields |= _OVERRIDES.get(model_type, {})
    config = config_class(**{name: value for name, value in fields.items() if name in known})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        bias = model.get_output_embeddings().bias
        if bias is not None:
            torch.nn.init.normal_(bias)
    return model
