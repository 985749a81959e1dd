"""The micro-batches of a training run, found by their position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.data.rows import PackedRows, epoch_permutation
from sad.distributed.world import ALONE, World
from sad.optim.schedule import RunLength, Window

if TYPE_CHECKING:
    from sad.training.rollouts import Rollouts


class TrainBatches:
    """Micro-batches as a pure function of seed and position: a resumed run needs no more state.

    Every epoch has an order of its own, in which each row comes once. Row numbers and counts are
    those of the ranks of ``world`` together, batches are this rank's part.
    """

    def __init__(
        self,
        config: DistillConfig,
        rows: PackedRows,
        run_length: RunLength,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.rows = rows
        self.device = device
        self._seed = config.seed
        self._world = world
        self._run_length = run_length
        self._order: tuple[int, np.ndarray] | None = None  # an epoch, and the order of its rows

    def begin(self, window: Window) -> None:
        """Called before anything of a window is asked for: there is nothing to prepare here."""

    def forget(self) -> None:
        """Called when the student's weights have been replaced: nothing here depends on them."""

    def rollouts(self, micro_step: int) -> Rollouts | None:
        """What the student has written in a micro-batch of the window begun last; None for one of
        the data."""
        return None

    def writing(self, elapsed: float) -> dict[str, float]:
        """What a train record says of the speed at which the student has written, in the last
        ``elapsed`` seconds of training."""
        return {}

    def describe(self, micro_step: int) -> str:
        """What the student will write from here on, in words; nothing for nothing."""
        return ""

    def knows(self, window: Window) -> bool:
        """Whether ``counts`` of a window follow from its position alone."""
        return True

    def row_numbers(self, micro_step: int) -> np.ndarray:
        """The numbers of the rows in a micro-batch."""
        epoch, batch = self._run_length.position(micro_step)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_permutation(self._seed, epoch, len(self.rows))
        size = self._run_length.batch_size
        return self._order[1][batch * size : (batch + 1) * size]

    def batch(self, micro_step: int) -> Batch:
        """This rank's rows of a micro-batch, on the device; a row without targets for none."""
        return self.host_batch(micro_step).to(self.device)

    def host_batch(self, micro_step: int) -> Batch:
        """The same in host memory, which nobody has to wait for."""
        rows = self.row_numbers(micro_step)
        first = micro_step * self._run_length.batch_size
        return rank_batch(self.rows, rows, self._world.share(len(rows)), first)

    def window(self, window: Window) -> Iterator[Batch]:
        """The micro-batches of a window, one by one."""
        return (self.batch(step) for step in steps_of(window))

    def counts(self, window: Window) -> LossCounts:
        """The units in all micro-batches of a window together, known before any is made."""
        rows = [self.row_numbers(step) for step in steps_of(window)]
        return self.rows.counts(np.concatenate(rows))

    def targets(self, micro_step: int) -> int:
        """The targets in a micro-batch."""
        return int(self.rows.num_targets[self.row_numbers(micro_step)].sum())


def rank_batch(
    rows: PackedRows, row_numbers: np.ndarray, share: slice, first_place: int = 0
) -> Batch:
    """The batch of those of the ``row_numbers`` that are in ``share``.

    If there are none, one of the others stands in without its targets: every rank has to take part
    in every forward pass. ``first_place`` is the place of the first of ``row_numbers`` in the order
    of the run.
    """
    places = torch.arange(first_place, first_place + len(row_numbers))
    mine = row_numbers[share]
    if len(mine):
        return rows.batch(mine)._replace(places=places[share])
    return rows.batch(row_numbers[:1]).without_targets()._replace(places=places[:1])


def steps_of(window: Window) -> range:
    """The micro-batches of a window, counted from the start of the run."""
    return range(window.first_micro_step, window.first_micro_step + window.size)
