"""LoRA adapters of a student, by PEFT through transformers' own integration.

``add_adapters`` puts them into the model in place: it stays the class that it is, with its head,
and ``save_pretrained`` writes the adapters alone, in the form of PEFT's folders. The weights under
them are frozen. Adapters are fp32 whatever the dtype of those weights, as in PEFT.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.environment import import_extra
from sad.errors import UnfitError, UsageError, one_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"
"""The name that PEFT gives to a model's only adapter."""


def has_adapters(model: nn.Module) -> bool:
    """Whether ``add_adapters`` has been here."""
    return getattr(model, "_hf_peft_config_loaded", False)


def add_adapters(config: DistillConfig, model: PreTrainedModel) -> None:
    """Add the adapters of ``config.peft`` to ``model`` in place, and freeze everything else.

    They are drawn from ``seed`` on the CPU: the same ones for every device. The global random state
    is left as it was. Raises ``UsageError`` without PEFT and for layers that the model does not
    have, ``UnfitError`` for input embeddings that are also the head.
    """
    # PEFT imports bitsandbytes where it is, which logs what it lacks for other uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import_extra("peft", "peft", "for a key of peft")
    from peft.tuners.tuners_utils import cast_adapter_dtype

    embeddings = model.get_input_embeddings()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is refused below, or meant
        torch.manual_seed(config.seed)
        try:
            model.add_adapter(_lora_config(config), ADAPTER)
        # No such layers, or of a kind that cannot have adapters, or no regular expression.
        except (ValueError, re.error) as error:
            raise UsageError(
                f"peft must name layers of {type(model).__name__} that can have adapters, got "
                f"{one_line(error)}; correct peft.target_modules"
            ) from error
    cast_adapter_dtype(model, ADAPTER)
    _require_all_found(config, model)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and model.get_input_embeddings() is not embeddings:
        raise UnfitError(
            f"the input embeddings of {type(model).__name__} must stay as they are, because they "
            "are its head too, got them in peft's target_modules or modules_to_save; take them out"
        )


def _require_all_found(config: DistillConfig, model: PreTrainedModel) -> None:
    """Raise ``UsageError`` for a parameter or a pattern that fits nothing: PEFT would ignore it."""
    section, names = config.peft, list(_adapted(model))
    found: dict[str, Callable[[str, str], Any]] = {
        "target_parameters": lambda key, name: f".{name}".endswith(f".{key}"),
        # As in PEFT's get_pattern_key.
        "rank_pattern": lambda key, name: re.match(rf"(.*\.)?({key})$", name),
        "alpha_pattern": lambda key, name: re.match(rf"(.*\.)?({key})$", name),
    }
    for option, fits in found.items():
        for key in getattr(section, option) or ():
            if not any(fits(key, name) for name in names):
                raise UsageError(
                    f"peft.{option} must name what has adapters in {type(model).__name__}, got "
                    f"{key!r}, which fits none of {len(names)} such as {names[0]}; correct it"
                )


def _adapted(model: PreTrainedModel) -> Iterator[str]:
    """The names of the layers, and parameters without a layer of their own, that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            # Several parameters of a layer are wrapped one in another.
            name = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            yield name if parameter is None else f"{name}.{parameter}"


def _lora_config(config: DistillConfig) -> Any:
    from peft import LoraConfig

    section = config.peft
    assert section.peft_type in (None, "LORA"), section.peft_type
    keys = {
        "r": section.r,
        "lora_alpha": section.lora_alpha,
        "lora_dropout": section.lora_dropout,
        "target_modules": _names_or_pattern(section.target_modules),
        "target_parameters": _list(section.target_parameters),
        "exclude_modules": _names_or_pattern(section.exclude_modules),
        "layers_to_transform": _list(section.layers_to_transform),
        "rank_pattern": section.rank_pattern,
        "alpha_pattern": section.alpha_pattern,
        "bias": section.bias,
        "modules_to_save": _list(section.modules_to_save),
        "use_rslora": section.use_rslora,
        "use_dora": section.use_dora,
        "init_lora_weights": section.init_lora_weights,
    }
    given = {key: value for key, value in keys.items() if value is not None}
    return LoraConfig(task_type="CAUSAL_LM", **given)


def _names_or_pattern(names: tuple[str, ...] | None) -> str | list[str] | None:
    """A lone ``all-linear`` or regular expression is a text to PEFT, names are a list."""
    if names is not None and len(names) == 1:
        (name,) = names
        if name == "all-linear" or re.search(r"[^\w.]", name):
            return name
    return _list(names)


def _list(values: tuple[Any, ...] | None) -> list[Any] | None:
    return None if values is None else list(values)


def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Fill the adapters of ``model`` with those that a run exported to ``folder``.

    Raises ``UnfitError`` unless they are of the same shapes.
    """
    from peft import set_peft_model_state_dict

    saved = load_file(folder / ADAPTER_WEIGHTS)
    saved = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    try:
        result = set_peft_model_state_dict(model, saved, ADAPTER)
        unexpected = result.unexpected_keys
    except RuntimeError as error:
        unexpected = [one_line(error)]
    if unexpected:
        raise UnfitError(
            f"{folder} must hold adapters of {type(model).__name__} with the run's own keys of "
            f"peft, got others (first {unexpected[0]!r}); let the run export them again"
        )


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Within, ``model`` computes as it did before ``add_adapters``; nothing is copied.

    Biases that are trained besides stay as they are.
    """
    live: Any = model
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    live.disable_adapters()  # freezes them as well
    try:
        yield
    finally:
        live.enable_adapters()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@contextmanager
def merged_weights(model: PreTrainedModel) -> Iterator[dict[str, Tensor] | None]:
    """Within, adapters are merged into the weights under them, and ``save_pretrained`` saves an
    ordinary model: it must be given the tensors that this yields. Without adapters, None.

    Afterwards every bit of the model is as it was.
    """
    if not has_adapters(model):
        yield None
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    live: Any = model
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    under = {p: None for layer in layers for p in layer.get_base_layer().parameters()}
    # Subtracting the adapters again would not give the same bits. In host memory: the device has
    # no room for a second model.
    kept = [p.detach().to("cpu", copy=True) for p in under]
    try:
        for layer in layers:
            layer.merge()
        live._hf_peft_config_loaded = False  # or it would save the adapters alone
        yield _plain_names(model.state_dict())
    finally:
        live._hf_peft_config_loaded = True
        for layer in layers:
            layer.unmerge()
        for parameter, value in zip(under, kept, strict=True):
            parameter.data.copy_(value)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a merged model by the names that the model has without adapters."""
    plain = {}
    for name, value in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        name = name.replace(f".modules_to_save.{ADAPTER}.", ".")
        while ".base_layer." in name:  # around several parameters of a layer there are several
            name = name.replace(".base_layer.", ".", 1)
        plain[name] = value
    return plain
