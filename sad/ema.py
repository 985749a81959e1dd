"""Exponential moving average (EMA) of a model's weights, and evaluation under it.

    shadow <- d * shadow + (1 - d) * parameter          d = min(decay, (1 + n) / (10 + n))

with ``n`` the number of updates so far, so that the first ``d`` is 0.1. Without this warm-up most
of a short run's average would be the initial weights: at a decay of 0.9999, 86 % after 1,557
updates.

Shadows are fp32 whatever the parameters are; in bf16 they would hardly move. The average covers the
trainable parameters, tied ones once, and the persistent floating-point buffers; nothing else is
touched.

Of parameters that are split over ranks each rank averages its part. The gathered copies that FSDP2
keeps do not see an exchange: ``sad.distributed.sharding.reshard`` drops them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from sad_kernels import ema_swap_, ema_update_
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sad.distributed.tensors import is_split, local_part, placed_like, read_like


class ModelEMA:
    """Exponential moving average of ``model``, updated once per optimizer step.

    ``warmup=False`` uses ``decay`` from the first update on. ``masters`` names fp32 tensors that
    the average follows instead of the parameters of the same name, which are their rounded copies.
    ``device`` keeps the shadows there, "cpu" in host memory: each update then copies the weights to
    it and waits for them, and while they are swapped the weights lie there.

    Raises ``ValueError`` for a decay outside [0, 1], a model with nothing to average or a master
    without a parameter, and ``TypeError`` for float16, which cannot be exchanged with an fp32
    shadow without loss.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        warmup: bool = True,
        *,
        masters: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}; 0.9999 is usual")
        self.decay = decay
        self.warmup = warmup
        averaged = _averaged_tensors(model)
        self._averaged = averaged  # of which this rank may hold a part
        self._live = {
            name: local_part(tensor.detach()) if is_split(tensor) else tensor
            for name, tensor in averaged.items()
        }
        self._sources: dict[str, Tensor] = self._live | dict(masters or {})
        if self._sources.keys() != self._live.keys():
            unknown = sorted(self._sources.keys() - self._live.keys())
            raise ValueError(
                f"masters must have the names of averaged parameters, got {unknown[0]!r}; pass "
                "those of the trainable parameters of this model"
            )
        self._shadows = {n: _shadow_of(source, device) for n, source in self._sources.items()}
        # On the device, like the flag ``ok`` that it counts, so that no update waits for it.
        shadow, source = next(iter(self._shadows.values())), next(iter(self._sources.values()))
        self._num_updates = torch.zeros((), dtype=torch.int64, device=shadow.device)
        self._elsewhere = shadow.device != source.device
        self._kept: dict[str, Tensor] = {}  # the weights while swapped, if shadows lie elsewhere
        self._swapped = False

    @property
    def num_updates(self) -> int:
        """Updates applied so far. Waits for the device."""
        return int(self._num_updates)

    @property
    def effective_decay(self) -> float:
        """The decay of the next update, warm-up included. Waits for the device."""
        return float(self._decay_now())

    @property
    def is_swapped(self) -> bool:
        """Whether the model holds the average now, inside ``swapped()``."""
        return self._swapped

    def update(self, ok: Tensor | None = None) -> None:
        """Move the average towards the model, unless the 0-d bool ``ok`` is false: a skipped step.

        ``ok`` is read on the device, without a sync. Where it is false every shadow keeps its bits
        and ``num_updates`` its value. Raises ``RuntimeError`` while swapped.
        """
        self._require_not_swapped("updated")
        decay = self._decay_now()
        ok = None if ok is None else ok.to(decay.device)
        if ok is not None:  # a decay of 1 leaves every bit of the shadows
            decay = torch.where(ok, decay, 1.0)
        shadows, sources = list(self._shadows.values()), list(self._sources.values())
        if self._elsewhere:  # one at a time: a second copy of all weights may have no room
            for shadow, source in zip(shadows, sources, strict=True):
                ema_update_([shadow], [source.detach().to(shadow.device)], decay)
        else:
            ema_update_(shadows, sources, decay)
        self._num_updates += 1 if ok is None else ok

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the weights that the model has now, not while swapped."""
        self._require_not_swapped("averaged anew")
        for name, shadow in self._shadows.items():
            shadow.copy_(self._sources[name])
        self._num_updates.zero_()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange the model's weights for the average; on leaving, restore every bit of them.

        In between, entering again, ``update``, ``state_dict``, ``load_state_dict`` and steps of an
        optimizer on these parameters raise ``RuntimeError``. Enter outside of autocast, which
        keeps copies of weights.
        """
        self._require_not_swapped("swapped again")
        self._swap_in()
        self._swapped = True
        guard = register_optimizer_step_pre_hook(self._refuse_step)
        try:
            yield
        finally:
            guard.remove()
            self._swap_out()
            self._swapped = False

    def tensors(self) -> dict[str, Tensor]:
        """The shadows by parameter name: the live tensors, not copies."""
        self._require_not_swapped("saved")
        return {n: placed_like(shadow, self._averaged[n]) for n, shadow in self._shadows.items()}

    def state_dict(self) -> dict[str, Any]:
        """``decay``, ``warmup``, ``num_updates`` and ``shadow``, the tensors of ``tensors()``."""
        shadow = self.tensors()
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "num_updates": self.num_updates,
            "shadow": shadow,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy ``state`` into the shadows in place.

        Raises ``ValueError`` before anything changes unless names and shapes are those of this
        model.
        """
        self._require_not_swapped("loaded")
        saved: Mapping[str, Tensor] = state["shadow"]
        if saved.keys() != self._shadows.keys():
            differing = sorted(saved.keys() ^ self._shadows.keys())
            raise ValueError(
                f"the average must hold the {len(self._shadows)} tensors of this model, got "
                f"{len(saved)}, first that only one side has: {differing[0]!r}; load the state of "
                "the same model"
            )
        # Everything is checked before anything is copied.
        for name, shadow in self.tensors().items():
            if saved[name].shape != shadow.shape or saved[name].dtype != shadow.dtype:
                raise ValueError(
                    f"the average of {name} must be {shadow.dtype} {tuple(shadow.shape)}, got "
                    f"{saved[name].dtype} {tuple(saved[name].shape)}; load the state of the same "
                    "model"
                )
        for name, shadow in self.tensors().items():
            shadow.copy_(read_like(saved, name, shadow))
        self.decay, self.warmup = state["decay"], state["warmup"]
        self._num_updates.fill_(state["num_updates"])

    def _decay_now(self) -> Tensor:  # [] float64: in fp32, 1 - 0.9999 is off by 1.7e-4
        n = self._num_updates.double()
        if not self.warmup:
            return torch.full_like(n, self.decay)
        return ((1.0 + n) / (10.0 + n)).clamp(max=self.decay)

    def _swap_in(self) -> None:
        ema_swap_(*self._exchanged())
        for live, _, shadow in self._with_master():  # rounds; the master keeps the weights
            live.copy_(shadow)
        if self._elsewhere:
            self._copy_in()

    def _swap_out(self) -> None:
        ema_swap_(*self._exchanged())
        for live, master, _ in self._with_master():
            live.copy_(master)
        if self._elsewhere:
            self._copy_out()

    @torch.no_grad()
    def _copy_in(self) -> None:
        """Swap in from elsewhere: the weights lie beside the shadows meanwhile."""
        for name, live in self._live.items():
            self._kept[name] = live.detach().to(self._shadows[name].device, copy=True)
            live.copy_(self._shadows[name])

    @torch.no_grad()
    def _copy_out(self) -> None:
        for name, live in self._live.items():
            live.copy_(self._kept.pop(name))

    def _exchanged(self) -> tuple[list[Tensor], list[Tensor]]:
        """Shadows and live tensors to exchange in place.

        A parameter with a master is overwritten instead, and rounded from its master again; with
        shadows elsewhere all are.
        """
        if self._elsewhere:
            return [], []
        names = [name for name in self._live if self._sources[name] is self._live[name]]
        return [self._shadows[name] for name in names], [self._live[name] for name in names]

    def _with_master(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for name, live in self._live.items():
            if self._sources[name] is not live and not self._elsewhere:
                yield live.detach(), self._sources[name].detach(), self._shadows[name]

    def _refuse_step(self, optimizer: Optimizer, *_: object) -> None:
        # A step would train the average, and be lost when the weights come back.
        ours = {id(tensor) for tensor in (*self._averaged.values(), *self._sources.values())}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            self._require_not_swapped("trained")

    def _require_not_swapped(self, verb: str) -> None:
        if self._swapped:
            raise RuntimeError(
                f"the model must hold its own weights to be {verb}, got its average; leave "
                "swapped() first"
            )


def _averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent floating-point buffers, each once, by its first name."""
    persistent = model.state_dict().keys()
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found |= {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in persistent and buffer.is_floating_point()
    }
    if not found:
        raise ValueError("the model must have trainable parameters to average, got none; thaw some")
    for name, tensor in found.items():
        if tensor.dtype == torch.float16:
            raise TypeError(
                f"parameters must be float32 or bfloat16 to be averaged, got float16 for {name}; "
                "keep float32 parameters and compute in float16 under autocast"
            )
    return found


def _shadow_of(source: Tensor, device: torch.device | str | None) -> Tensor:
    upcast = torch.promote_types(source.dtype, torch.float32)
    return source.detach().to(device or source.device, upcast, copy=True)
