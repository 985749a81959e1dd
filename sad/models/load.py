"""Loading teacher and student models from local folders or the Hugging Face Hub.

Errors about a model that a user named are one line: ``UsageError`` if there is no such model,
``UnfitError`` if it cannot serve as student or teacher.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from sad.config.schema import DistillConfig
from sad.distributed.loading import (
    LoadedWholeError,
    StoredWeights,
    stored_weights,
    without_weights,
)
from sad.distributed.world import World
from sad.environment import MAKING_MODELS, quiet_libraries, resolve_device
from sad.errors import SadError, UnfitError, UsageError, one_line
from sad.models.adapters import add_adapters
from sad.models.heads import PLAIN_HEADS, SCALED_HEADS
from sad.models.layers import chosen_layers, copy_layers, with_layers
from sad.models.quantization import (
    check_stored_teacher,
    check_student_weights,
    keep_layouts_that_cannot_be_packed,
    quantizer,
    require_quantized_layers,
    stored_quantization,
)

Role = Literal["student", "teacher"]


def load_student(config: DistillConfig) -> PreTrainedModel:
    """Load the student in ``param_dtype`` on ``device``, in training mode, without a KV cache.

    With ``student_init: random`` only its configuration is read, and the weights are drawn from
    ``seed`` on the CPU in fp32: the same ones for every device, and rounded for other dtypes. With
    ``layers`` they are those of the teacher as it is stored.
    Gradient checkpointing is non-reentrant. With a key of ``peft`` its adapters are added, and all
    else is frozen. The global random state is left as it was.

    Raises ``UsageError`` if there is no such model or device, ``UnfitError`` if the model is not
    causal or its weights are incomplete or damaged, and whatever ``add_adapters`` raises.
    """
    device, dtype = resolve_device(config.device), getattr(torch, config.param_dtype)
    match config.student_init:
        case "random":
            model: Any = _random_student(config).to(dtype)
        case "pretrained":
            model = _pretrained_model(config, "student", dtype)
        case "layers":
            model = _student_of_layers(config, dtype)
        case _:
            assert_never(config.student_init)
    return _ready_to_train(model, config).to(device)


def load_teacher(config: DistillConfig) -> PreTrainedModel:
    """Load the teacher in its own dtype on ``teacher_device``: frozen, in eval mode, no KV cache.

    With ``teacher_quantization`` its linear layers are quantized while they are read; of a teacher
    that was saved quantized all is as it was saved, dtypes included, where its method wants that.
    Raises like ``load_student``, and like ``sad.models.quantization.require_quantizer``.
    """
    device = resolve_device(config.teacher_device or config.device)
    dtype, kind = teacher_dtype(config), config.teacher_quantization
    stored = stored_quantization(read_model_config(config, "teacher"))
    if kind is None and stored is None:
        return _frozen(_pretrained_model(config, "teacher", dtype)).to(device)
    # Placed by its reader: quantized weights are not moved afterwards.
    options: dict[str, Any] = {"device_map": {"": device}}
    if kind is not None:
        options["quantization_config"] = quantizer(config, dtype)
    model = _pretrained_model(config, "teacher", dtype, **options)
    if kind is not None:
        require_quantized_layers(model, kind)
    keep_layouts_that_cannot_be_packed(model)
    return _frozen(model)


def model_to_fill(
    config: DistillConfig, role: Role, world: World, say: Callable[[str], None]
) -> tuple[PreTrainedModel, StoredWeights] | None:
    """The student or teacher as ``load_student`` or ``load_teacher`` gives it, but without its
    weights, and where these are stored: for ``sad.distributed.loading``.

    None in a process of its own and, after ``say`` has been told why, for a model that can be
    loaded only whole. Raises like ``load_student``.
    """
    if world.mesh is None:
        return None

    def attempt() -> tuple[tuple[PreTrainedModel, StoredWeights] | None, str]:
        try:
            return _model_to_fill(config, role), ""
        except LoadedWholeError as error:
            return None, str(error)

    found, reason = world.main_first(attempt)  # the first may have to fetch files
    reason = next(filter(None, world.gather(reason)), "")
    if reason:
        say(f"loading the {role} whole in each process, before it is split: {reason}")
        return None
    return found


def _model_to_fill(config: DistillConfig, role: Role) -> tuple[PreTrainedModel, StoredWeights]:
    name, _ = _name_and_trust(config, role)
    stored = stored_quantization(read_model_config(config, role))
    if stored is not None:
        raise UsageError(
            f"{role} must not be quantized on several processes, which split it, got {name}, which "
            f"was saved so ({stored}); name a copy that is not, or run one process"
        )
    if config.structural_weights:
        raise LoadedWholeError("losses on inner layers are tried on whole models")
    if role == "student" and config.student_init != "pretrained":
        raise LoadedWholeError(f"student_init is {config.student_init}")
    if read_model_config(config, role).model_type not in PLAIN_HEADS | SCALED_HEADS.keys():
        raise LoadedWholeError("its head is not known, and found out by running it")
    dtype = teacher_dtype(config) if role == "teacher" else getattr(torch, config.param_dtype)
    model = without_weights(lambda: build_model(config, role, dtype))
    weights = stored_weights(model, name)
    with suppress(OSError), quiet_libraries():
        model.generation_config = GenerationConfig.from_pretrained(name)
    return (_frozen(model) if role == "teacher" else _ready_to_train(model, config)), weights


def _ready_to_train(model: PreTrainedModel, config: DistillConfig) -> Any:
    model.config.use_cache = False
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if config.peft.enabled:
        add_adapters(config, model)
    return model.train()


def _frozen(model: PreTrainedModel) -> Any:
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def read_model_config(config: DistillConfig, role: Role) -> PreTrainedConfig:
    """Read a model's transformers configuration; its weights are not read.

    Raises ``UsageError`` if there is no such model, ``UnfitError`` if it is not a causal one.
    """
    if role == "student" and config.student_init == "layers":
        teacher = read_model_config(config, "teacher")
        check_student_weights(config.student, teacher)
        return with_layers(teacher, config)
    name, trust = _name_and_trust(config, role)
    with quiet_libraries(), _explained(role, name):
        model_config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    # A repository with code of its own says in auto_map which classes that defines.
    own_code = getattr(model_config, "auto_map", None) or {}
    known = type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_code
    if not known or getattr(model_config, "is_encoder_decoder", False):
        raise UnfitError(
            f"{role} must be a causal language model, got {name} (model_type "
            f"{model_config.model_type!r}{_beside_text(model_config)}); choose a decoder-only model"
        )
    if role == "student":
        check_student_weights(name, model_config)
    else:
        check_stored_teacher(config, name, model_config)
    return model_config


def _beside_text(model_config: PreTrainedConfig) -> str:
    """What a model that is no causal one reads, if that is not text alone."""
    seen = [part for part in ("vision", "audio") if hasattr(model_config, f"{part}_config")]
    if seen and model_config.get_text_config() is not model_config:
        return f", text and {' and '.join(seen)}: save its language model by itself"
    return ", images and no text" if seen or hasattr(model_config, "image_size") else ""


def build_model(config: DistillConfig, role: Role, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model's architecture with random weights on torch's default device.

    Raises like ``read_model_config``.
    """
    name, trust = _name_and_trust(config, role)
    model_config = read_model_config(config, role)
    attention = _attention(config, role, name, model_config)
    with MAKING_MODELS, quiet_libraries(), _explained(role, name, attention):
        return AutoModelForCausalLM.from_config(
            model_config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust,
        )


def build_student_model(config: DistillConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the student as it is trained, adapters included, with random weights on torch's default
    device; ``dtype`` is ``param_dtype`` by default. Raises like ``load_student``.
    """
    model = build_model(config, "student", dtype or getattr(torch, config.param_dtype))
    if config.peft.enabled:
        add_adapters(config, model)
    return model


def compute_dtype(config: DistillConfig) -> torch.dtype:
    """The dtype of the student's matrix products."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else getattr(torch, config.param_dtype)


def teacher_dtype(config: DistillConfig) -> torch.dtype:
    """The dtype of the teacher's weights and products."""
    return getattr(torch, config.teacher_dtype) if config.teacher_dtype else compute_dtype(config)


def export_dtype(config: DistillConfig) -> torch.dtype | None:
    """The dtype that exported students have: ``save_dtype``, else that in which the student came.

    None: that of its parameters in training. So it is for a student that begins at random, and for
    one whose files have more bits than it is trained in, which exporting them would not bring back.
    """
    if config.save_dtype is not None:
        return getattr(torch, config.save_dtype)
    if config.student_init == "random":
        return None
    model_config = read_model_config(config, "student")
    came = getattr(model_config, "dtype", None) or model_config.get_text_config().dtype
    if isinstance(came, str):
        came = getattr(torch, came, None)
    trained = getattr(torch, config.param_dtype)
    if not isinstance(came, torch.dtype) or came.itemsize >= trained.itemsize:
        return None
    return came


def _random_student(config: DistillConfig) -> PreTrainedModel:
    # No GPU's generator is forked: weights are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config, "student", torch.float32)


def _student_of_layers(config: DistillConfig, dtype: torch.dtype) -> PreTrainedModel:
    teacher = _pretrained_model(config, "teacher", dtype)
    with torch.random.fork_rng(devices=[]):  # drawn and overwritten
        student = build_model(config, "student", dtype)
    copy_layers(teacher, student, chosen_layers(teacher.config, config))
    return student


def _pretrained_model(
    config: DistillConfig, role: Role, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    name, trust = _name_and_trust(config, role)
    model_config = read_model_config(config, role)
    attention = _attention(config, role, name, model_config)
    with MAKING_MODELS, quiet_libraries(show_bars=True), _explained(role, name, attention):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=model_config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UnfitError(
            f"{role} must come with all weights of {type(model).__name__}, got {name} without "
            f"{len(missing)} of them (first {missing[0]!r}); choose a model that was saved as a "
            "causal language model"
        )
    return model


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Turn on non-reentrant activation checkpointing; ``UsageError`` if the model cannot."""
    if not model.supports_gradient_checkpointing:
        raise UsageError(
            f"gradient_checkpointing must be false for {type(model).__name__}, which does not "
            "support it, got true; turn it off"
        )
    # Newer versions of transformers know it by another name, and warn at the old one.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _name_and_trust(config: DistillConfig, role: Role) -> tuple[str, bool]:
    """The local path or Hub id of a model, and whether its own code may run."""
    match role:
        case "student" if config.student_init == "layers":
            name, trust = config.teacher, config.trust_remote_code_teacher
        case "student":
            name, trust = config.student, config.trust_remote_code_student
        case "teacher":
            name, trust = config.teacher, config.trust_remote_code_teacher
        case _:
            assert_never(role)
    if not name:
        raise UsageError(f"{role} must be a folder or a Hugging Face id, got none; set `{role}`")
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve()), trust
    if path.exists():
        raise UsageError(
            f"{role} must be a folder with a saved model, got {name}, which holds no config.json; "
            "save one there with save_pretrained, or name another"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(
            f"{role} must be a folder that exists or a Hugging Face id, got {name}; check the path "
            f"(seen from {os.getcwd()})"
        )
    return name, trust


def _attention(
    config: DistillConfig, role: Role, name: str, model_config: PreTrainedConfig
) -> str | None:
    """The attention implementation to request; None leaves the choice to transformers.

    Where scores are capped (Gemma 2) it is eager: before 5.23 transformers chose or accepted sdpa
    there, and dropped the cap.
    """
    chosen = config.attn_implementation
    if not getattr(model_config, "attn_logit_softcapping", None):
        return chosen
    if chosen == "sdpa":
        raise _no_such_attention(role, name, chosen)
    return chosen or "eager"


def _no_such_attention(role: Role, name: str, attention: str) -> UsageError:
    return UsageError(
        f"attn_implementation must be one that the {role} {name} has, got {attention}; "
        "leave the key out, or set attn_implementation: eager"
    )


@contextmanager
def _explained(role: Role, name: str, attention: str | None = None) -> Iterator[None]:
    """Within, turn errors of transformers about a model into ours, of one line."""
    try:
        yield
    except OSError as error:  # no such model, no network, no permission, nothing in the folder
        raise UsageError(
            f"{role} must be a folder with a saved model, or a Hugging Face id that can be "
            f"fetched, got {name} ({one_line(error)}); check the name and the network"
        ) from error
    except ImportError as error:
        raise UsageError(
            f"{role} must run with what is installed, got {name} ({one_line(error)}); install what "
            "is missing, or choose another attn_implementation"
        ) from error
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _refusal(role, name, attention, error) from error


def _refusal(role: Role, name: str, attention: str | None, error: Exception) -> SadError:
    message = str(error)
    if "trust_remote_code" in message:
        return UsageError(
            f"{role} must be a model that transformers knows, got {name}, which comes with code of "
            f"its own; read that code, then set trust_remote_code_{role}: true"
        )
    if attention is not None and "attn_implementation" in message:
        return _no_such_attention(role, name, attention)
    return UnfitError(
        f"{role} must be a model that transformers can build, got {name} ({one_line(error)}); "
        "check its files and its family"
    )
