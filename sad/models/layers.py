"""A student made of some of its teacher's decoder layers, with its embeddings, norm and head.

The student has the teacher's configuration, reduced to those layers: lists with an entry per layer
(which of them attend within a window, have experts, rotate positions ...) keep the entries of the
layers that were chosen. Whatever else a family derives from a layer's number is found by comparing
each copied layer with the one that it comes from, setting by setting: where one differs, the model
is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sad.config.schema import DistillConfig
from sad.errors import UnfitError, UsageError
from sad.models.heads import decoder_layers

PER_LAYER = ("layer", "block", "pattern", "types")
"""Parts of the names under which configurations keep a list with an entry per layer."""

LAYER_NUMBERS = ("mlp_only_layers",)
"""Names of lists that hold numbers of layers."""


def chosen_layers(teacher: PreTrainedConfig, config: DistillConfig) -> tuple[int, ...]:
    """The numbers of the teacher's layers that ``config.student_layers`` means, rising.

    Raises ``UsageError`` for layers that it does not have, has twice or in another order.
    """
    count = teacher.get_text_config().num_hidden_layers
    wanted = config.student_layers
    assert wanted is not None
    if isinstance(wanted, int):
        if wanted > count:
            raise UsageError(
                f"student_layers must be at most the teacher's {count}, got {wanted}; lower it"
            )
        steps = max(wanted - 1, 1)  # from the first to the last; one layer is the first
        return tuple((2 * i * (count - 1) + steps) // (2 * steps) for i in range(wanted))
    layers = tuple(layer + count if layer < 0 else layer for layer in wanted)
    if not all(0 <= layer < count for layer in layers) or list(layers) != sorted(set(layers)):
        raise UsageError(
            f"student_layers must be rising numbers from 0 to {count - 1}, the teacher's last "
            f"layer, got {list(wanted)}; correct them"
        )
    return layers


def with_layers(teacher: PreTrainedConfig, config: DistillConfig) -> PreTrainedConfig:
    """The teacher's configuration with the layers of ``config.student_layers`` alone.

    Raises like ``chosen_layers``.
    """
    layers = chosen_layers(teacher, config)
    reduced = copy.deepcopy(teacher)
    text = reduced.get_text_config()
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if not isinstance(value, list | tuple):
            continue
        if name in LAYER_NUMBERS:
            setattr(text, name, [i for i, layer in enumerate(layers) if layer in value])
        elif len(value) == count and any(part in name for part in PER_LAYER):
            setattr(text, name, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    return reduced


@torch.no_grad()
def copy_layers(teacher: PreTrainedModel, student: PreTrainedModel, layers: Sequence[int]) -> None:
    """Copy the teacher's weights into a student that has its ``layers``, and all else that it has.

    Raises ``UnfitError`` unless every layer of the student is made exactly like the one it copies.
    """
    sources = decoder_layers(teacher)
    copies = decoder_layers(student)
    for number, layer in enumerate(layers):
        difference = _difference(sources[layer], copies[number])
        if difference:
            raise UnfitError(
                f"every layer of {type(teacher).__name__} must work the same at another depth to "
                f"become a student's, got layer {layer} with {difference} as layer "
                f"{number}; choose other student_layers or another student"
            )
    prefix = next(name for name, module in student.named_modules() if module is copies) + "."
    saved = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{layers[int(number)]}.{rest}"
        tensor.copy_(saved[name])
    student.generation_config = copy.deepcopy(teacher.generation_config)


def _difference(source: nn.Module, target: nn.Module) -> str | None:
    """What differs in shapes or settings between two layers, their numbers apart."""
    ours, theirs = dict(source.named_modules()), dict(target.named_modules())
    if ours.keys() != theirs.keys():
        return "other modules"
    for name, module in ours.items():
        before, after = _settings(module), _settings(theirs[name])
        for key in before.keys() | after.keys():
            if before.get(key) != after.get(key):
                where = f"{name}.{key}" if name else key
                return f"{where} {before.get(key)!r} and not {after.get(key)!r}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Class, shapes, and plain values among a module's attributes."""
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | None)
        and key not in ("layer_idx", "layer_id", "layer_number", "training")
    }
    shapes = {key: tuple(t.shape) for key, t in module.named_parameters(recurse=False)}
    shapes |= {key: tuple(t.shape) for key, t in module.named_buffers(recurse=False)}
    return plain | shapes | {"class": type(module).__name__}
