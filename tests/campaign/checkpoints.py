"""Crafted checkpoints: whole, signed, and wrong in one value or one tensor.

A real checkpoint is taken in the middle of a window. One leaf of its JSON or one of its tensors is
changed, sizes and hashes are computed again, and a trainer is to restore it: it must refuse in one
line and be what it was to the bit, or end in the state of the checkpoint that was not damaged.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from support.runs import assert_same_bits, everything, make_trainer
from support.tiny import save_tiny, tiny_llama, write_texts
from support.tiny_moe import tiny_moe
from torch import Tensor

from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import CheckpointError, UsageError
from sad.training.inputs import load_inputs
from sad.training.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "everything at once": {
        "bf16": True,
        "param_dtype": "bfloat16",
        "master_weights": True,
        "feature": {"weight": 1.0},
        "taid": {"enabled": True},
    },
    "loss scale": {"fp16": True, "use_ema": False},
    "student-aware teacher": {"routing": {"mode": "student_aware"}},
    "augmented teacher": {"routing": {"mode": "knowledge_augmentation"}},
}
"""What a run may have in its checkpoints, as keys of its configuration."""

FREE = re.compile(
    r"state\.(counters\.(best_value|best_metric|metrics|tokens|global_step|evaluated_at"
    r"|best_micro_step|window_begins)\b|sums|terms\.|window_loss|skipped|ema\.num_updates|taid\."
    r"|scaler\.(scale|_growth_tracker)|rng\.|num_items$)"
)
"""Numbers that nothing else tells: another one that the run could have had is taken as it is."""

MISSING, EXTRA = object(), object()

Content = dict[str, Any]
"""``json`` (of state.json) and ``tensors`` (group -> name -> tensor)."""


class Damage(NamedTuple):
    """One change, and where."""

    place: str
    apply: Callable[[Content], None]


@dataclass
class Result:
    """What a campaign found; ``wrong`` describes every case that broke the promise."""

    inflicted: int = 0
    refused: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)


def run(count: int | None = None, seed: int = 0, kinds: tuple[str, ...] = tuple(KINDS)) -> Result:
    """Inflict ``count`` damages on the checkpoint of a run of each kind; None: all there are."""
    result = Result()
    for kind in kinds:
        folder = Path(tempfile.mkdtemp(prefix="campaign-"))
        try:
            _Subject(kind, folder).suffer(count, seed, result)
        finally:
            shutil.rmtree(folder)
    return result


class _Subject:
    """A trainer, its checkpoint and how it was before."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        config = _config(kind, folder)
        inputs = load_inputs(config)
        first = make_trainer(config, inputs)
        self.fresh = _saved(first, folder / "fresh")
        while first.counters.micro_step < 3 or not first.accumulator.pending:
            first.micro_batch()
        first.counters.metrics = {"eval/nll": 1.5, "eval/kl": 0.25}
        path = _saved(first, folder / "whole")
        self.content: Content = {
            "json": json.loads((path / "state.json").read_text()),
            "tensors": {file.stem: load_file(file) for file in path.glob("*.safetensors")},
        }
        self.path = path
        self.trainer = make_trainer(config, inputs)
        self.goal = self._restored(path)
        self._reset()

    def suffer(self, count: int | None, seed: int, result: Result) -> None:
        damages = [*json_damages(self.content["json"]), *tensor_damages(self.content["tensors"])]
        if count is not None and count < len(damages):
            damages = random.Random(seed).sample(damages, count)
        before = everything(self.trainer)
        for damage in damages:
            result.inflicted += 1
            verdict = self._inflict(damage, before)
            if verdict in ("refused", "equal"):
                setattr(result, verdict, getattr(result, verdict) + 1)
            else:
                result.wrong.append(f"{self.kind}: {damage.place}: {verdict}")
                self._reset()

    def _inflict(self, damage: Damage, before: dict[str, Any]) -> str:
        content = {
            "json": json.loads(json.dumps(self.content["json"])),
            "tensors": {group: dict(named) for group, named in self.content["tensors"].items()},
        }
        damage.apply(content)
        target = self.folder / "damaged"
        write_signed(target, content)
        try:
            after = self._restored(target)
        except (CheckpointError, UsageError) as error:
            line = str(error)
            if "\n" in line or len(line) > 600 or " must " not in line:
                return f"refused by {line[:100]!r}"
            if isinstance(error, UsageError) and ".identity." not in damage.place:
                return f"a UsageError: {line[:100]}"
            with suppress(AssertionError):
                assert_same_bits(_comparable(everything(self.trainer)), _comparable(before))
                return "refused"
            return "refused, but parts of the run have changed"
        except Exception as error:  # what the campaign is looking for
            return f"{type(error).__name__}: {error}"[:200]
        try:
            self.trainer.micro_batch()
        except Exception as error:
            return f"accepted, and then {type(error).__name__}: {error}"[:200]
        finally:
            self._reset()
        with suppress(AssertionError):
            assert_same_bits(_comparable(after), _comparable(self.goal))
            return "equal"
        saved = {**content["json"]["state"], "identity": None}
        as_saved = json.dumps({**after["state"], "identity": None}) == json.dumps(saved)
        if as_saved and FREE.match(damage.place):
            return "equal"  # to a state that this run could have been in
        return "equal" if damage.place == "grads missing" else "accepted, with another state"

    def _restored(self, path: Path) -> dict[str, Any]:
        self.trainer.restore(load_checkpoint(path), warn=lambda _: None)
        return everything(self.trainer)

    def _reset(self) -> None:
        self._restored(self.fresh)


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """NaN equals itself here."""
    return {
        name: torch.nan_to_num(value, nan=123.0) if _floating(value) else _text(value)
        for name, value in state.items()
    }


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _text(value: Any) -> Any:
    return value if isinstance(value, Tensor) else json.dumps(value, sort_keys=True)


def _config(kind: str, folder: Path) -> DistillConfig:
    overrides = KINDS[kind]
    teacher = tiny_llama(seed=1, num_hidden_layers=1)
    if "routing" in overrides:
        teacher = tiny_moe("qwen3_moe")
    return DistillConfig(
        student=save_tiny(folder / "student", tiny_llama(seed=2, num_hidden_layers=1)),
        teacher=save_tiny(folder / "teacher", teacher),
        data={"train": write_texts(folder / "texts", count=8), "eval_fraction": 0.2},  # type: ignore[arg-type]
        output_dir=str(folder / "run"),
        max_length=32,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_eval_rows=4,
        **overrides,
    )


def _saved(trainer: Trainer, folder: Path) -> Path:
    state, tensors = trainer.capture()
    return save_checkpoint(folder, trainer.counters.micro_step, state, tensors, save_total_limit=2)


def write_signed(target: Path, content: Content) -> None:
    """Write a checkpoint whose manifest agrees with its files, whatever they say."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    files = {"state.json": json.dumps(content["json"]).encode()}
    for group, named in content["tensors"].items():
        files[f"{group}.safetensors"] = save({n: t.contiguous() for n, t in named.items()})
    entries = {}
    for name, data in files.items():
        (target / name).write_bytes(data)
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (target / "manifest.json").write_text(json.dumps({"schema": 1, "files": entries}))


# Damages to JSON


def json_damages(content: Any) -> Iterator[Damage]:
    """Every value under ``content``, leaf or not, changed in every way; of long lists a few."""
    for keys, value in _places(content, ()):
        place = ".".join(map(str, keys))
        for name, other in _others(value):
            yield Damage(f"{place} = {name}", _json_change(keys, other))


def _places(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if keys:
        yield keys, value
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
        items = items if len(items) < 8 else [items[0], items[len(items) // 2], items[-1]]
    else:
        return
    for key, inner in items:
        yield from _places(inner, (*keys, key))


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    for other in (None, True, "x", [], {}, 7.5, float("nan"), 10**30, 1e300, -1.5):
        yield json.dumps(other), other
    if isinstance(value, int):
        yield "negative", -2 - abs(value)
    if isinstance(value, float):
        yield "negative", -1.0 - abs(value)
    yield "missing", MISSING
    if isinstance(value, (dict, list)):
        yield "extra", EXTRA


def _json_change(keys: tuple[Any, ...], other: Any) -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        parent = content["json"]
        for key in keys[:-1]:
            parent = parent[key]
        if other is MISSING:
            del parent[keys[-1]]
        elif other is EXTRA and isinstance(parent[keys[-1]], dict):
            parent[keys[-1]]["extra"] = 1
        elif other is EXTRA:
            parent[keys[-1]].append(1)
        else:
            parent[keys[-1]] = other

    return apply


# Damages to tensors


def tensor_damages(groups: dict[str, dict[str, Tensor]]) -> Iterator[Damage]:
    """Every tensor in other shapes and dtypes, absent, and beside one too many."""
    for group, named in groups.items():
        yield Damage(f"{group} without its file", _without_group(group))
        yield Damage(f"{group} extra", _tensor_change(group, "extra", torch.ones(2)))
        for name, tensor in named.items():
            for what, other in _other_tensors(tensor):
                place = "grads" if group == "grads" and other is None else f"{group}/{name}"
                yield Damage(f"{place} {what}", _tensor_change(group, name, other))
    yield Damage("a group extra", _tensor_change("more", "x", torch.ones(2)))


def _other_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    yield "missing", None
    yield "of no shape", torch.zeros((), dtype=tensor.dtype).reshape(() if tensor.ndim else (1,))
    yield "empty", torch.zeros((0, *tensor.shape[1:]), dtype=tensor.dtype)
    yield "longer", torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
    if tensor.ndim > 1:
        yield "turned", tensor.transpose(0, 1)[None]
    for dtype in (torch.float64, torch.float16, torch.uint8, torch.int64, torch.uint32):
        if dtype != tensor.dtype:
            yield f"as {dtype}", tensor.to(dtype)


def _tensor_change(group: str, name: str, other: Tensor | None) -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        named = content["tensors"].setdefault(group, {})
        if other is None:
            del named[name]
        else:
            named[name] = other

    return apply


def _without_group(group: str) -> Callable[[Content], None]:
    return lambda content: content["tensors"].pop(group)
