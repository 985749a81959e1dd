"""Splitting a causal language model into its backbone and its output head.

``split_head(model)`` returns ``(backbone, Head)``. The backbone yields final hidden states, the
``Head`` says how they become logits, so that ``Head(backbone(ids))`` equals ``model(ids).logits``
and the loss can work on both chunk by chunk. Nothing in the model is patched or replaced.

Most families only multiply by a weight. Some do more, under misleading names: Granite *divides* by
``logits_scaling``, HyperCLOVA X *multiplies* by the same key, softcaps have three names. So heads
are read from two tables keyed by ``config.model_type``, never guessed from attributes. A family in
neither is tried as a plain weight and accepted only if its own logits agree. To add a family whose
head does more: one row in ``SCALED_HEADS``. (Both tables were checked against transformers 5.23.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from sad_kernels.objective import Head
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.distributed.tensors import whole
from sad.errors import SadError, UnfitError, one_line
from sad.models.quantization import is_wrapped

HeadFields = Callable[[Any], dict[str, Any]]
"""A text model's configuration -> the fields of its ``Head`` besides weight and bias."""


def _softcapped(config: Any) -> dict[str, Any]:
    return {"softcap": config.final_logit_softcapping}


def _multiplied_by_logit_scale(config: Any) -> dict[str, Any]:
    return {"logit_scale": float(config.logit_scale)}


def _divided_by_logits_scaling(config: Any) -> dict[str, Any]:
    return {"logit_scale": 1 / config.logits_scaling}


SCALED_HEADS: dict[str, HeadFields] = {
    "beam": _softcapped,
    "gemma2": _softcapped,
    "gemma3": _softcapped,
    "gemma3_text": _softcapped,
    "gemma3n": _softcapped,
    "gemma3n_text": _softcapped,
    "gemma4": _softcapped,
    "gemma4_text": _softcapped,
    "gemma4_unified": _softcapped,
    "gemma4_unified_text": _softcapped,
    "nanochat": _softcapped,
    "vaultgemma": _softcapped,
    "recurrent_gemma": lambda config: {"softcap": config.logits_soft_cap},
    "xlstm": lambda config: {"softcap": config.output_logit_soft_cap},
    "cohere": _multiplied_by_logit_scale,
    "cohere2": _multiplied_by_logit_scale,
    "cohere2_moe": _multiplied_by_logit_scale,
    "cohere_compass_text": _multiplied_by_logit_scale,
    "granite": _divided_by_logits_scaling,
    "granite_swa": _divided_by_logits_scaling,
    "granitemoe": _divided_by_logits_scaling,
    "granitemoe_swa": _divided_by_logits_scaling,
    "granitemoehybrid": _divided_by_logits_scaling,
    "granitemoeshared": _divided_by_logits_scaling,
    "minicpm3": _divided_by_logits_scaling,
    "hyperclovax": lambda config: {"logit_scale": float(config.logits_scaling)},
    "falcon_h1": lambda config: {"logit_scale": float(config.lm_head_multiplier)},
    "inkling_text": lambda config: {
        "logit_scale": 1 / config.logits_mup_width_multiplier,
        "valid_vocab": config.unpadded_vocab_size,
    },
    "inkling2_text": lambda config: (
        _softcapped(config) | {"valid_vocab": config.unpadded_vocab_size}
    ),
}
"""Families whose head does more than weight and bias: model_type -> other fields of ``Head``."""

PLAIN_HEADS = frozenset(
    """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba biogpt bitnet bloom codegen ctrl
    cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note_text
    emu3_text_model ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_mamba flex_olmo flint
    gemma glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_neox_japanese gpt_oss gptj helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
    internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama
    llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash minimax minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mixtral mpt nemotron nemotron_h olmo olmo2
    olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text rwkv seed_oss smollm3
    solar_open stablelm starcoder2 xglm youtu zaya
    """.split()
)
"""Families whose logits are ``hidden W^T``, plus the bias that a few have (Phi, GPT-J, CTRL)."""

TABLES = "the tables SCALED_HEADS and PLAIN_HEADS of sad/models/heads.py"


# Splitting


class Backbone:
    """A model without its head: ``backbone(input_ids, position_ids=None) -> hidden``.

    ``input_ids`` and ``position_ids`` [B, L] int64, ``hidden`` [B, L, D] after the final norm.
    No cache and no attention mask are passed: only then do positions that restart isolate the
    documents packed into one row. Models without the argument ``position_ids`` are given none;
    ``sad.models.preflight`` tests whether they isolate packed documents.

    Under autocast the result may be fp32 (Llama-like models never cast their residual stream):
    cast it to the compute dtype before the loss, or the head's product runs in fp32.

    Raises ``UnfitError`` for a model that does not keep its layers in one submodule.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = model.base_model
        if layers is model:  # Llama 4 names a prefix that it does not use
            layers = getattr(model, "model", model)
        if layers is model:
            raise UnfitError(
                f"{type(model).__name__} must keep its layers in one submodule (base_model), got "
                "none; choose another model"
            )
        self.layers: nn.Module = layers
        self.takes_positions = "position_ids" in inspect.signature(type(layers).forward).parameters

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self.run(input_ids, position_ids).last_hidden_state

    def run(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        """All that the layers return; ``options`` are arguments of their forward pass."""
        options |= {"use_cache": False}
        if position_ids is not None and self.takes_positions:
            options["position_ids"] = position_ids
        return self.layers(input_ids=input_ids, **options)


def split_head(model: PreTrainedModel) -> tuple[Backbone, Head]:
    """Split a causal language model into a backbone and a head that reproduces its logits.

    The head holds the model's own parameters, tied or not, so gradients reach them. A PEFT model
    is split like the model inside it, whose layers hold the adapters.

    Raises ``UnfitError`` for a model without an output embedding, for a head that is not exactly
    ``torch.nn.Linear`` (a LoRA layer has a weight too, but multiplies by more), and for a family in
    neither table unless its logits, probed once, are those of a causal model with a plain head.
    """
    # Families in the tables are not probed: that takes several forward passes.
    model = inner_model(model)
    head, backbone = read_head(model), Backbone(model)
    if model.config.model_type not in PLAIN_HEADS | SCALED_HEADS.keys():
        _require_plain(model, backbone, head)
    return backbone, head


def read_head(model: PreTrainedModel) -> Head:
    """The head as the tables describe it for ``config.model_type``, without a probe."""
    linear = output_embedding(model)
    fields: dict[str, Any] = {}
    if model.config.model_type in SCALED_HEADS:
        fields = SCALED_HEADS[model.config.model_type](model.config.get_text_config())
    # A configuration may promise more columns than a resized head has.
    if (fields.get("valid_vocab") or 0) > linear.out_features:
        fields["valid_vocab"] = None
    return Head(linear.weight, linear.bias, **fields)


def output_embedding(model: PreTrainedModel) -> nn.Linear:
    """The output embedding; ``UnfitError`` unless it is exactly ``torch.nn.Linear``, with a weight
    that is not quantized."""
    name = type(model).__name__
    try:
        linear = model.get_output_embeddings()
    except NotImplementedError:
        linear = None
    if linear is None:
        raise UnfitError(
            f"{name} must have an output embedding, got a model without one; choose a causal "
            "language model"
        )
    if not _is_plain_linear(linear):
        raise UnfitError(
            f"the head of {name} must be exactly torch.nn.Linear, got {type(linear).__name__}, "
            "whose weight is not all that it multiplies by; take the head (lm_head) out of PEFT's "
            "target_modules and modules_to_save, and leave it out of quantization"
        )
    if is_wrapped(linear.weight):  # torchao keeps the class of a layer, and swaps its weight
        raise UnfitError(
            f"the head of {name} must have a plain tensor as weight, got "
            f"{type(linear.weight).__name__}; leave the head (lm_head) out of quantization"
        )
    return linear


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a ``torch.nn.Linear`` and no subclass, save the one that FSDP2 makes of it."""
    kind = type(module)
    return kind is nn.Linear or (kind.__name__ == "FSDPLinear" and kind.__bases__[-1] is nn.Linear)


def with_valid_vocab(head: Head, valid_vocab: int) -> Head:
    """The same head limited to the ids that the tokenizer can produce; rows beyond are padding.

    Raises ``UnfitError`` if the tokenizer has more ids than the head has rows.
    """
    if valid_vocab > head.vocab_size:
        raise UnfitError(
            f"the model's head must have a row for each of the tokenizer's {valid_vocab} ids, got "
            f"{head.vocab_size}; choose a model and a tokenizer that belong together"
        )
    return replace(head, valid_vocab=valid_vocab)


def inner_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Probing a model with tokens


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Within, eval mode and no gradients; training modes and random states are restored after."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=sorted(cuda)), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def require_head(
    model: PreTrainedModel, backbone: Backbone, head: Head, input_ids: Tensor
) -> float:
    """Return ``head_error``; raise ``UnfitError`` above ``rounding_tolerance``."""
    error = head_error(model, backbone, head, input_ids)
    tolerance = rounding_tolerance(head.weight.dtype)
    if math.isnan(error):
        raise UnfitError(
            f"the logits of {type(model).__name__} must be finite, got infinity or NaN in "
            f"{_dtype_name(head.weight.dtype)}, which they overflow; compute in a wider dtype: "
            "bf16 or fp32 (for a teacher, teacher_dtype)"
        )
    if not error <= tolerance:
        raise UnfitError(
            f"the head of {type(model).__name__} (model_type {model.config.model_type!r}) must "
            f"reproduce the model's own logits, got a relative error of {error:.1e} (tolerance "
            f"{tolerance:.0e}); choose a model that {TABLES} describe, or correct them"
        )
    return error


def head_error(model: PreTrainedModel, backbone: Backbone, head: Head, input_ids: Tensor) -> float:
    """Largest difference of ``head(hidden)`` from the model's logits, over the largest logit.

    Measured twice: as the model is, and with the input of its head scaled up until logits reach
    32. The logits of an untrained model are so small that a softcap changes them less than
    rounding does.
    """
    hidden = backbone(input_ids).to(head.weight.dtype)
    largest = _largest(replace(head, softcap=None)(hidden))
    gains = (1.0, max(1.0, 32 / largest)) if largest else (1.0,)
    return max(_head_error_at(gain, model, head, hidden, input_ids) for gain in gains)


def require_causal(model: PreTrainedModel, backbone: Backbone, input_ids: Tensor) -> float:
    """Measure how much the first half of a row [1, L] changes when the second half is cut off.

    Returns the relative difference of hidden states; raises ``UnfitError`` above
    ``isolation_tolerance``.
    """
    half = input_ids.shape[1] // 2
    # A non-finite state would make the comparison below meaningless, and has another remedy.
    alone, whole = backbone(input_ids[:, :half]), backbone(input_ids)
    require_finite_hidden(model, alone)
    require_finite_hidden(model, whole)
    error = relative_error(whole[:, :half], alone)
    tolerance = isolation_tolerance(alone.dtype)
    if not error <= tolerance:
        raise UnfitError(
            f"{type(model).__name__} must be causal: hidden states that do not depend on later "
            f"tokens, got a relative change of {error:.1e} when these are cut off (tolerance "
            f"{tolerance:.0e}); choose a causal language model"
        )
    return error


def require_finite_tables(model: PreTrainedModel) -> None:
    """Raise ``UnfitError`` for NaN or infinity in a row of the input or output embedding.

    A probe of a few tokens reads few rows of one, and any row of the other spoils every loss.
    """
    tables = {"input embedding": model.get_input_embeddings(), "head": output_embedding(model)}
    for table, module in tables.items():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or _is_finite(weight):
            continue
        bad = [i for i, row in enumerate(weight.detach()) if not _is_finite(row)]
        raise UnfitError(
            f"the {table} of {type(model).__name__} must hold finite numbers, got "
            f"{_what_is_not_finite(weight)} in {len(bad):,} of its {len(weight):,} rows, first in "
            f"that of id {bad[0]}; the weights are damaged: take another copy of the model"
        )


def require_finite_hidden(model: PreTrainedModel, hidden: Tensor) -> None:
    """Raise ``UnfitError`` for NaN or infinity in hidden states: damaged weights, or overflow."""
    if _is_finite(hidden):
        return
    start = f"{type(model).__name__} must give finite hidden states, got"
    found = f"{_what_is_not_finite(hidden)} in {_dtype_name(hidden.dtype)}"
    damaged = next((n for n, p in model.named_parameters() if not _is_finite(whole(p))), None)
    if damaged is not None:
        raise UnfitError(
            f"{start} {found}: its weight {damaged} is not finite; the weights are damaged: take "
            "another copy of the model"
        )
    raise UnfitError(
        f"{start} {found}, which its finite weights overflow; compute in a wider dtype: bf16 or "
        "fp32 (for a teacher, teacher_dtype)"
    )


def _is_finite(tensor: Tensor) -> bool:
    # The extremes: a mask of a large table would take a quarter of its memory.
    # Quantized weights have no extremes; scales that are no numbers show in hidden states.
    if not tensor.numel() or not tensor.is_floating_point() or is_wrapped(tensor):
        return True
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())  # either is NaN if an element is


def _what_is_not_finite(tensor: Tensor) -> str:
    return "NaN" if bool(tensor.detach().amax().isnan()) else "infinity"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Allowed relative difference of two ways of computing a product: 1e-5, in 16 bits eps."""
    return 1e-5 if dtype.itemsize >= 4 else torch.finfo(dtype).eps


def isolation_tolerance(dtype: torch.dtype) -> float:
    """Allowed relative change of hidden states by tokens that must not influence them.

    In fp32 rounding gave at most 5e-6, and the faintest real influence, of a freshly initialised
    hybrid, 3e-4 (93 families on CPU). In 16 bits another shape may choose another kernel, and
    rounding adds up over layers.
    """
    return 1e-4 if dtype.itemsize >= 4 else 4 * torch.finfo(dtype).eps


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``|value - truth| / |truth|`` in the 2-norm; 0 where both are 0."""
    difference = torch.linalg.vector_norm(value.double() - truth.double())
    norm = torch.linalg.vector_norm(truth.double())
    return float(difference / norm) if norm else float(difference)


def _head_error_at(
    gain: float,
    model: PreTrainedModel,
    head: Head,
    hidden: Tensor,
    input_ids: Tensor,
) -> float:
    # The pre-hook scales the head's input inside the model's own forward.
    with _scaled_input(output_embedding(model), gain):
        own = model(input_ids=input_ids, use_cache=False).logits
    if own.shape[-1] < head.vocab_size:  # the model cuts columns that the head keeps
        return math.inf
    # The model may keep columns that the head cuts, and return fp32 after a product in 16 bits.
    difference = head(hidden * gain).float() - own[..., : head.vocab_size].float()
    return _largest(difference) / max(_largest(own), torch.finfo(torch.float32).tiny)


@contextmanager
def _scaled_input(linear: nn.Linear, gain: float) -> Iterator[None]:
    handle = linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gain,))
    try:
        yield
    finally:
        handle.remove()


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


# Families in neither table

_FOUND_PLAIN: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose probe has passed: a training step splits its model each time, and probes once."""


def _require_plain(model: PreTrainedModel, backbone: Backbone, head: Head) -> None:
    """Raise ``UnfitError`` unless the model is causal and its logits are ``hidden W^T + bias``."""
    if model in _FOUND_PLAIN:
        return
    # Tokens that differ, so that a wrong position or a wrong order shows.
    ids = (torch.arange(16, device=head.weight.device) * 7 % head.vocab_size)[None]
    with eval_no_grad(model):
        try:
            require_causal(model, backbone, ids)
            require_head(model, backbone, head, ids)
            silent = _largest(model(input_ids=ids, use_cache=False).logits) == 0
        except SadError:
            raise
        except Exception as error:  # whatever a foreign forward may raise
            raise _unknown(model, f"whose forward fails ({one_line(error)})") from error
    if silent:
        raise _unknown(model, "whose logits are all 0 and decide nothing")
    _FOUND_PLAIN.add(model)


def _unknown(model: PreTrainedModel, finding: str) -> UnfitError:
    return UnfitError(
        f"model_type must be in {TABLES}, got {model.config.model_type!r}, {finding}; choose a "
        "model of a listed family, or add this one"
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The ``ModuleList`` of decoder layers in a model's backbone, found by its length.

    Raises ``UnfitError`` for a model without one, and what ``split_head`` raises.
    """
    backbone, _ = split_head(model)
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in backbone.layers.modules() if isinstance(m, nn.ModuleList)]
    lists = [blocks for blocks in lists if len(blocks) == count]
    if not lists:
        raise UnfitError(
            f"{type(model).__name__} must keep its {count} decoder layers in one ModuleList, got "
            "none of that length; choose another model or turn the losses on inner layers off"
        )
    # Lists of experts may be as long but hold fewer parameters. max takes the outermost of equals.
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
