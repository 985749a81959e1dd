"""A frozen teacher in 8 or 4 bits, by the quantizers of transformers.

``teacher_quantization: int8`` is torchao's weight-only form: of every linear layer the weights are
8-bit integers with one scale per row. ``int4`` is bitsandbytes' NF4: 4 bits each, and a scale in
fp32 per 64 of them. Products are computed in ``teacher_dtype`` from weights that are expanded for
one layer at a time. Head, embeddings, norms and whatever is no linear layer (experts that a family
keeps in one tensor) are not quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

from sad.config.schema import DistillConfig
from sad.distributed.tensors import is_split
from sad.environment import import_extra, quiet_quantizers
from sad.errors import UnfitError, UsageError

EXTRA = "quantized"

PACKAGES = {"int8": "torchao", "int4": "bitsandbytes"}
"""``teacher_quantization`` -> who quantizes; accelerate places the weights."""

BLOCK_IN_4_BITS = 64
"""Weights in 4 bits that share a scale in fp32."""

ROWS_PACKED_ON_CPUS = 32
"""Rows of 4-bit weights that bitsandbytes packs together on processors with AVX512-BF16."""


def require_quantizer(config: DistillConfig) -> None:
    """Raise ``UsageError`` unless what ``teacher_quantization`` needs is installed."""
    kind = config.teacher_quantization
    if kind is None:
        return
    quiet_quantizers()
    for package in (PACKAGES[kind], "accelerate"):
        import_extra(package, EXTRA, f"for teacher_quantization: {kind}")


def quantizer(config: DistillConfig, dtype: torch.dtype) -> Any:
    """The configuration with which transformers quantizes the teacher while it loads it; None
    without ``teacher_quantization``. Raises like ``require_quantizer``."""
    require_quantizer(config)
    match config.teacher_quantization:
        case None:
            return None
        case "int8":
            torchao: Any = import_extra("torchao.quantization", EXTRA, "for int8")
            # Its settings of the compiler would be those of the process, and so the student's.
            return TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        case "int4":
            return BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        case _:
            assert_never(config.teacher_quantization)


def stored_quantization(model_config: PreTrainedConfig) -> str | None:
    """The method in which a checkpoint was saved quantized (``bitsandbytes``, ``gptq`` ...); None
    for one that was not."""
    settings = _stored_settings(model_config)
    return None if settings is None else str(settings.get("quant_method", "an unknown method"))


def _stored_settings(model_config: PreTrainedConfig) -> dict[str, Any] | None:
    settings: Any = getattr(model_config, "quantization_config", None)
    return settings if settings is None or isinstance(settings, dict) else settings.to_dict()


def check_student_weights(name: str, model_config: PreTrainedConfig) -> None:
    """Raise ``UnfitError`` for a student that begins with quantized weights."""
    method = stored_quantization(model_config)
    if method is not None:
        raise UnfitError(
            f"student must begin with weights that can be trained, got {name}, which was saved "
            f"quantized ({method}); name a copy that is not"
        )


def check_stored_teacher(config: DistillConfig, name: str, model_config: PreTrainedConfig) -> None:
    """Raise ``UsageError`` for keys that a teacher that was saved quantized cannot take."""
    method = stored_quantization(model_config)
    if method is None:
        return
    for key, given, remedy in (
        ("teacher_quantization", config.teacher_quantization, "leave the key out"),
        (
            "routing.mode",
            config.routing.mode if config.routing.mode == "student_aware" else None,
            "its gates are trained through all layers: name a copy that is not quantized",
        ),
    ):
        if given is not None:
            raise UsageError(
                f"{key} must not be {given} for the teacher {name}, which was saved quantized "
                f"({method}); {remedy}"
            )


def require_quantized_layers(model: PreTrainedModel, kind: str) -> None:
    """Raise ``UnfitError`` for a model of which nothing was quantized."""
    if not any(is_quantized(parameter) for parameter in model.parameters()):
        raise UnfitError(
            f"teacher_quantization must find linear layers (torch.nn.Linear) in "
            f"{type(model).__name__}, got none that {PACKAGES[kind]} quantizes; leave it out"
        )


def keep_layouts_that_cannot_be_packed(model: PreTrainedModel) -> None:
    """Let linear layers in 4 bits compute from the weights as they are stored where bitsandbytes
    cannot pack them for processors with AVX512-BF16.

    It packs 32 rows at a time and gives each row whole blocks of ``blocksize`` weights; of a layer
    [out, in] of another shape it fails in its first forward pass instead of leaving it as it is.
    """
    module: Any
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        rows, columns = state.shape
        if rows % ROWS_PACKED_ON_CPUS or columns % state.blocksize:
            module.support_avx512bf16_for_cpu = False


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor stands for others that hold its numbers in another form: torchao's do, and
    so would other subclasses; parts of a tensor that is split over ranks are the numbers."""
    return is_traceable_wrapper_subclass(tensor) and not is_split(tensor)


def is_quantized(tensor: Tensor) -> bool:
    """Whether it holds quantized weights, as torchao or bitsandbytes keep them."""
    return is_wrapped(tensor) or getattr(tensor, "quant_state", None) is not None


def number_of_weights(tensor: Tensor) -> int:
    """The numbers that a parameter stands for: of bitsandbytes' 4 bits two lie in one byte."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else math.prod(state.shape)


def parameter_count(model: nn.Module) -> int:
    """The parameters of a model, quantized or not."""
    return sum(map(number_of_weights, model.parameters()))


def quantized_count(model: nn.Module) -> int:
    """Those of them that are quantized."""
    return sum(number_of_weights(p) for p in model.parameters() if is_quantized(p))


# Memory


def bits_of_teacher(config: DistillConfig, model_config: PreTrainedConfig) -> int | None:
    """Bits of a weight in the teacher's linear layers; None if they are not quantized.

    A checkpoint that was saved quantized, in a way that does not tell, is taken to have 8.
    """
    if config.teacher_quantization is not None:
        return {"int8": 8, "int4": 4}[config.teacher_quantization]
    settings = _stored_settings(model_config)
    if settings is None:
        return None
    bits = 4 if settings.get("load_in_4bit") else settings.get("bits", 8)
    return bits if isinstance(bits, int) else 8


def linear_weights(model: nn.Module, head: nn.Module) -> Iterable[Tensor]:
    """Of a model that is not quantized, the weights that a quantizer takes: those of all linear
    layers but its ``head``."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def quantized_bytes(weight: Tensor, bits: int) -> int:
    """Bytes of a linear layer's weight [out, in] in so many bits, scales included."""
    count = weight.numel()
    if bits == 4:
        return -(-count // 2) + 4 * -(-count // BLOCK_IN_4_BITS)
    return -(-count * bits // 8) + 5 * weight.shape[0]  # a scale in fp32 and a zero point per row
