"""Stored models that no rank ever holds whole: each reads its own shards from the files.

A model is built without weights, split, and then filled from its safetensors files:

    model = without_weights(build)            # parameters on the meta device
    weights = stored_weights(model, name)     # where each of them is stored
    shard_frozen(model, layers, mesh)
    fill(model, weights, device, world)       # this rank's part of each

What needs a whole tensor to be made, such as experts that are stored one by one and computed with
as one, is loaded whole: ``stored_weights`` says why in a ``LoadedWholeError``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from sad.distributed.tensors import local_part
from sad.distributed.world import World
from sad.errors import UnfitError, one_line

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class LoadedWholeError(Exception):
    """A model can be loaded only whole; the message says why."""


@dataclass(frozen=True)
class StoredWeights:
    """Where the weights of a model are stored: the safetensors files of ``folder``.

    ``names`` has, for every parameter and persistent buffer of the model, its name in the files.
    """

    folder: Path
    names: dict[str, str]


# Building


def without_weights(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """``build()`` with its parameters on the meta device, one after the other while it builds.

    Buffers, such as tables of rotations, lie in host memory with the values that they have in a
    model of ``from_pretrained``: those that no file stores are there. Random states are kept.

    Raises ``LoadedWholeError`` for a model whose code needs the values of parameters to be built.
    """
    try:
        with torch.random.fork_rng(devices=[]), _parameters_on_meta():
            model = build()
            # transformers fills these buffers again after it has built a model in its dtype: their
            # values are computed in fp32, and rounded then.
            for module in model.modules():
                vars(module).pop("_is_hf_initialized", None)
            model.init_weights()
    except Exception as error:  # another cause is found when it is loaded whole
        raise LoadedWholeError(f"it needs its weights to be built ({one_line(error)})") from error
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    # What it returns is registered in place of the parameter.
    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()


# Finding


def stored_weights(model: PreTrainedModel, name: str) -> StoredWeights:
    """Where the weights of ``model`` are stored: in the local folder ``name``, or in what the cache
    has of that model of the Hub; files that it has not are fetched.

    Raises ``LoadedWholeError`` unless every weight is one tensor of one safetensors file, under its
    name in the model, in its shape, and to be read as it is.
    """
    _require_read_as_stored(model)
    files = _weight_files(name, getattr(model.config, "_commit_hash", None))
    folder = files[0].parent
    if {*folder.glob("*.safetensors")} != {*files}:
        raise LoadedWholeError(f"{folder} has other .safetensors files than those of its model")
    shapes = _shapes(files)
    named: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for key, tensor in tensors.items():
        named.setdefault(id(tensor), []).append(key)  # a tied one has several
    names = {}
    for keys in named.values():
        stored = [key for key in keys if key in shapes]
        if len(stored) != 1:
            raise LoadedWholeError(f"its files have {len(stored)} tensors of {' and '.join(keys)}")
        (key,) = stored
        if shapes[key] != tensors[key].shape or not shapes[key]:
            raise LoadedWholeError(f"its files have {key} in shape {[*shapes[key]]}")
        names |= dict.fromkeys(keys, key)
    return StoredWeights(folder, names)


def _require_read_as_stored(model: PreTrainedModel) -> None:
    """Raise ``LoadedWholeError`` for a model whose weights transformers changes in reading."""
    what: Any = model
    if getattr(model.config, "quantization_config", None) is not None:
        raise LoadedWholeError("it is quantized")
    kept = (
        getattr(what, "_keep_in_fp32_modules", None),
        getattr(what, "_keep_in_fp32_modules_strict", None),
    )
    if model.dtype != torch.float32 and any(kept):
        raise LoadedWholeError(f"some of its weights stay fp32 beside {model.dtype}")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError as error:
        raise LoadedWholeError("this transformers does not say how it is stored") from error
    if get_model_conversion_mapping(model, add_legacy=False):
        raise LoadedWholeError(f"{type(model).__name__} is stored in another form than computed in")


def _weight_files(name: str, commit: str | None) -> list[Path]:
    """The safetensors files of a model, which are in one folder."""
    try:
        single = _found(name, SINGLE, commit)
        if single is not None:
            return [single]
        index = _found(name, INDEX, commit)
        if index is None:
            raise LoadedWholeError("its weights are in no safetensors file")
        listed = sorted({*json.loads(index.read_text())["weight_map"].values()})
        files = [_found(name, file, commit) for file in listed]
    except (OSError, ValueError, KeyError) as error:
        raise LoadedWholeError(f"its files could not be found ({one_line(error)})") from error
    if not files or None in files:
        raise LoadedWholeError(f"its files are not all that {INDEX} names")
    return [file for file in files if file is not None]


def _found(name: str, file: str, commit: str | None) -> Path | None:
    path = cached_file(name, file, revision=commit, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _shapes(files: list[Path]) -> dict[str, torch.Size]:
    """Tensor -> shape, from the headers of files."""
    shapes = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():
                    shapes[key] = torch.Size(opened.get_slice(key).get_shape())
    except (OSError, SafetensorError) as error:
        raise LoadedWholeError(f"its files could not be read ({one_line(error)})") from error
    return shapes


# Filling


def fill(
    model: PreTrainedModel, weights: StoredWeights, device: torch.device, world: World
) -> None:
    """Give a split model without weights its weights: this rank reads its part of each from the
    files, and nothing else, to ``device``. Dtypes are converted part by part.

    Raises ``UnfitError`` on all ranks for files that cannot be read to their end.
    """
    _allocate(model, device)
    live = model.state_dict(keep_vars=True)
    parts = {weights.names[key]: tensor.detach() for key, tensor in live.items()}
    world.agree(lambda: _read(parts, weights.folder))


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Replace parameters on the meta device by empty ones on ``device``; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if not local_part(parameter).is_meta:
            continue
        if id(parameter) not in made:
            empty = torch.empty_like(parameter, device=device)
            made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[id(parameter)])
    model._apply(lambda tensor: tensor)  # FSDP looks for its parameters again


def _read(parts: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        read_parts(parts, HuggingFaceStorageReader(str(folder)))
    except (CheckpointException, OSError, SafetensorError) as error:
        raise UnfitError(
            f"a model's files must be readable, got {folder} ({one_line(error)}); take another "
            "copy of the model"
        ) from error


def read_parts(live: dict[str, Tensor], reader: StorageReader) -> None:
    """Let torch's planner fill what this rank holds of ``live`` tensors from what ``reader`` has.

    This rank reads alone: it knows what it needs. Raises torch's ``CheckpointException``, which is
    no ``Exception``.
    """
    # These take long to import.
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(
            dict(live),
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
