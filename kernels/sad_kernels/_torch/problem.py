"""One call of a loss in the torch path: its rows, its sources of logits, and the loops over them.

There are two loops. ``losses_and_gradients`` takes rows in chunks, each of them whole, and forms
the gradient while a chunk's logits are there: every product is made once. It needs the upstream
gradient beforehand, so it serves a mean or sum, whose upstream is a factor for all rows.
``losses`` keeps statistics only, and ``gradients`` makes the logits again: for a loss per row, a
second backward, a budget that holds too few whole rows, and for losses without gradients.

Rows that are compared alike form a group; groups follow each other, and those without a teacher
come last. A row's numbers do not depend on the rows beside it, so their order changes no bit.

Of a vocabulary that is split over processes the sources have the columns of one shard. Both loops
then put the row sums of all shards together, ``shards.py``, between statistics and gradients:
``losses`` once for all rows, ``losses_and_gradients`` once for each chunk. What they cut must be
cut alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import terms_of
from sad_kernels._rows import (
    NOT_BY_ROW,
    LogitTransform,
    LossSpec,
    RowLayout,
    RowResults,
    RowTargets,
    arithmetic_dtype,
)
from sad_kernels._tiles import TileShape, block_rows, cut
from sad_kernels._torch.gemm import onednn_products
from sad_kernels._torch.gradient import RowGradient
from sad_kernels._torch.scratch import Scratch
from sad_kernels._torch.shards import merge_sums, merge_terms
from sad_kernels._torch.sources import (
    Gradients,
    HeadSource,
    LogitSource,
    Source,
    SplitHeadSource,
    splits_products,
)
from sad_kernels._torch.statistics import (
    GRADIENT_SUMS,
    Block,
    Comparison,
    RowStatistics,
    SumTable,
    shift,
)
from sad_kernels._torch.topk import TopKRows
from sad_kernels.objective import Head, Tail, Teacher, TeacherHidden, TeacherLogits, TeacherTopK
from sad_kernels.vocab import sum_

Group = tuple[slice, Comparison | None]


class ModelInput(NamedTuple):
    """The tensors of one model: hidden states and head if it has a weight, otherwise logits."""

    x: Tensor  # [N, D] or [N, >= V]
    weight: Tensor | None = None  # [>= V, D]
    bias: Tensor | None = None  # [>= V]
    transform: LogitTransform = LogitTransform()


class TopKInput(NamedTuple):
    """The tensors of a ``TeacherTopK``, and its tail."""

    ids: Tensor  # [N, K]
    log_probs: Tensor  # [N, K]
    tail: Tail


def head_input(hidden: Tensor, head: Head) -> ModelInput:  # hidden: [N, D]
    transform = LogitTransform(float(head.logit_scale), head.softcap)
    return ModelInput(hidden, head.weight, head.bias, transform)


def teacher_input(teacher: Teacher | None, layout: RowLayout) -> ModelInput | TopKInput | None:
    """A teacher's tensors by row. Its weights may be parameters; they get no gradient."""
    match teacher:
        case TeacherHidden(hidden=hidden, head=head):
            model = head_input(layout.rows(hidden), head)
            bias = None if head.bias is None else head.bias.detach()
            return model._replace(weight=head.weight.detach(), bias=bias)
        case TeacherLogits(logits=logits, logit_scale=logit_scale, softcap=softcap):
            transform = LogitTransform(float(logit_scale), softcap)
            return ModelInput(layout.rows(logits), transform=transform)
        case TeacherTopK(ids=ids, log_probs=log_probs, tail=tail):
            return TopKInput(layout.rows(ids), layout.rows(log_probs), tail)
        case None:
            return None


class SavedRows(NamedTuple):
    """What a gradient needs besides the inputs, of all N rows."""

    sums: Tensor  # [GRADIENT_SUMS, N]
    inside: Tensor  # [N, K], see TopKGradient; K = 0 without a top-k teacher


class Problem:
    """The rows that count, the sources of their logits, and the loops over these."""

    def __init__(
        self,
        spec: LossSpec,
        student: ModelInput,
        targets: RowTargets,
        teacher: ModelInput | TopKInput | None,
        shape: TileShape,
        scratch: Scratch,
    ) -> None:
        self.spec, self.shape, self.scratch = spec, shape, scratch
        self.num_rows = len(student.x)
        self.dtype, self.device = arithmetic_dtype(student.x), student.x.device
        # Only the n rows that count exist from here on.
        self.kept, self.groups = self._groups(targets, teacher is not None)
        self.n = self.num_rows if self.kept is None else len(self.kept)
        by_row = {
            name: None if x is None else self.gather(x)
            for name, x in targets._asdict().items()
            if name not in NOT_BY_ROW
        }
        self.targets = targets._replace(**by_row)
        self.like = torch.zeros(self.n, dtype=self.dtype, device=self.device)

        self.student = self._source(student, self.kept, "s")
        self.teacher: Source | None = None
        self.topk: TopKRows | None = None
        with_teacher = sum(rows.stop - rows.start for rows, how in self.groups if how is not None)
        kept = self.kept if self.kept is None else self.kept[:with_teacher]
        if isinstance(teacher, TopKInput):
            ids, log_probs, tail = teacher
            if kept is not None:
                ids, log_probs = ids[kept], log_probs[kept]
            ids_below = spec.num_outcomes or spec.vocab
            self.topk = TopKRows(ids, log_probs, tail, ids_below, self.like)
        elif teacher is not None:
            self.teacher = self._source(teacher, kept, "t")
        if self.topk is None and spec.objective.teacher_share == 1:
            for source in (self.student, self.teacher):
                if isinstance(source, LogitSource):
                    source.lend()

    def _groups(self, targets: RowTargets, has_teacher: bool) -> tuple[Tensor | None, list[Group]]:
        """The indices of the rows that count, group by group; None for all rows in their order."""
        N, o = self.num_rows, self.spec.objective
        counts = torch.ones(N, dtype=torch.bool, device=self.device)
        if targets.labels is not None:
            counts = targets.labels != self.spec.ignore_index
        first = Comparison(o.divergence, o.beta) if has_teacher else None
        masks: list[tuple[Tensor, Comparison | None]] = [(counts, first)]
        if has_teacher and targets.other_rows is not None:
            assert o.other_divergence is not None
            other = Comparison(o.other_divergence, o.other_beta)
            masks = [(counts & ~targets.other_rows, first), (counts & targets.other_rows, other)]
        if has_teacher and targets.kd_weights is not None:
            compared = targets.kd_weights != 0
            masks = [(mask & compared, how) for mask, how in masks] + [(counts & ~compared, None)]

        for _, how in masks:
            if how is not None and _reads_twice(how):
                terms_of(how.divergence)  # refuses one that it does not know, with no rows too

        # nonzero waits for the device, as the number of rows has to be known here.
        parts = [(mask.nonzero().squeeze(1), how) for mask, how in masks]
        groups, start = [], 0
        for indices, how in parts:
            if len(indices):
                groups.append((slice(start, start + len(indices)), how))
                start += len(indices)
        if start == N and len(groups) <= 1:
            return None, groups
        return torch.cat([indices for indices, _ in parts]), groups

    def _source(self, model: ModelInput, kept: Tensor | None, name: str) -> Source:
        x, weight, bias, transform = model
        width = self._teacher_width if name == "t" else self.spec.width
        if weight is None:
            return LogitSource(x, transform, kept, self.scratch, name, width)
        parts = x, weight, bias, transform, kept, self.scratch, name, width
        is_shard = self.spec.shard is not None
        if not splits_products(x, weight):
            return HeadSource(*parts, is_shard)
        source = SplitHeadSource(*parts, is_shard)
        if name == "t" and not self.spec.num_outcomes:  # whose columns are the student's
            if not isinstance(self.student, SplitHeadSource):
                return HeadSource(*parts, is_shard)
            source.base = self.student
        return source

    @property
    def _teacher_width(self) -> int:
        """How many columns of the teacher's logits count here."""
        return self.spec.teacher_columns if self.spec.num_outcomes else self.spec.width

    # --- the loops --------------------------------------------------------------------------------

    def losses(self) -> tuple[RowResults, SavedRows]:
        """The losses of all N rows, and what a gradient needs."""
        statistics = self._statistics()
        for block in self._tiles():
            statistics.add(block)
        everything = slice(0, self.n)
        if self.spec.shard is not None and self.n > 0:
            merge_sums(statistics, everything)
        # Both normalisers are known now: the terms of other divergences can be formed.
        if self.teacher is not None and any(_reads_twice(how) for _, how in self.groups):
            for block in self._tiles(only=_reads_twice):
                self._add_terms(statistics, block)
            if self.spec.shard is not None:
                merge_terms(statistics, everything)
        if self.topk is not None and not self.spec.num_outcomes:
            for rows, how in self.groups:
                if how is not None:
                    statistics.finish_topk(rows, how)
        saved = torch.stack([self.scatter(x) for x in statistics.sums[:GRADIENT_SUMS]])
        inside = self.like.new_zeros(self.num_rows, 0)
        if statistics.inside is not None:
            inside = self.like.new_zeros(self.num_rows, statistics.inside.shape[1])
            kept = slice(None) if self.kept is None else self.kept[: len(statistics.inside)]
            inside[kept] = statistics.inside
        return self._results(statistics), SavedRows(saved, inside)

    def gradients(
        self, saved: SavedRows, upstream: Tensor, wanted: tuple[bool, bool, bool]
    ) -> Gradients:
        """The gradients of ``sum(upstream * loss)``, upstream [N], from logits made once more."""
        if self.spec.num_outcomes:  # sums of every outcome are not kept, but made again
            return self.losses_and_gradients(self.shape.rows, upstream, wanted)[1]
        kept = slice(None) if self.kept is None else self.kept
        sums = SumTable(saved.sums[:, kept])
        inside = None if self.topk is None else saved.inside[kept]
        gradient = self._gradient(upstream[kept], inside)
        self.student.want_gradients(wanted, by_columns=True)
        for block in self._tiles(with_teacher=gradient.reads_teacher, flush=True):
            self._store_gradient(gradient, block, sums)
        return self._summed_gradients()

    def losses_and_gradients(
        self, rows_at_a_time: int, upstream: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[RowResults, Gradients]:
        """The losses of all N rows, and the gradients of ``sum(upstream * loss)``, upstream [N]."""
        statistics = self._statistics()
        gradient = self._gradient(self.gather(upstream), statistics.inside)
        self.student.want_gradients(wanted, by_columns=False)
        columns = slice(0, self.spec.width)
        self._reserve(rows_at_a_time, self.spec.width)
        for group, how in self.groups:
            for inside in cut(group.stop - group.start, rows_at_a_time):
                chunk = slice(group.start + inside.start, group.start + inside.stop)
                if self.spec.shard is not None:
                    self._chunk_of_shard(statistics, gradient, chunk, how)
                    continue
                for block in self._blocks(chunk, columns, how):
                    sums, slope = statistics.at(block.rows), None
                    shifted = statistics.add(block, gradient.reads_teacher)
                    if self.spec.num_outcomes:
                        pass
                    elif _reads_twice(how) and self.teacher is not None:
                        slope = statistics.add_terms(shifted)
                    elif self.topk is not None and how is not None:
                        statistics.finish_topk(block.rows, how)
                    self.student.store(block.rows, gradient.block(shifted, sums, slope))
                with onednn_products():
                    self.student.flush()
        return self._results(statistics), self._summed_gradients()

    def _chunk_of_shard(
        self,
        statistics: RowStatistics,
        gradient: RowGradient,
        chunk: slice,
        how: Comparison | None,
    ) -> None:
        """One chunk of ``losses_and_gradients`` where other columns of it are elsewhere.

        Its products are made once. What follows reads them again after each exchange.
        """
        columns = slice(0, self.spec.width)
        if self.spec.width > 0:
            self._load(chunk, columns, how)
        for block in self._loaded(chunk, columns, how):
            statistics.add(block)
        merge_sums(statistics, chunk)
        if _reads_twice(how) and self.teacher is not None:
            for block in self._loaded(chunk, columns, how):
                self._add_terms(statistics, block)
            merge_terms(statistics, chunk)
        elif self.topk is not None and how is not None:
            statistics.finish_topk(chunk, how)
        for block in self._loaded(chunk, columns, how):
            self._store_gradient(gradient, block, statistics.table)
        if self.spec.width > 0:
            with onednn_products():
                self.student.flush()

    def _tiles(
        self,
        with_teacher: bool = True,
        only: Callable[[Comparison | None], bool] = lambda how: True,
        flush: bool = False,
    ) -> Iterator[Block]:
        """All blocks of the groups that ``only`` takes: slices of the vocabulary outside, rows
        inside.

        In this order a slice of the head is read, and its gradient written, once.
        """
        groups = [(group, how) for group, how in self.groups if only(how)]
        self._reserve(self.shape.rows, self.shape.columns)
        for columns in cut(self.spec.width, self.shape.columns):
            for group, how in groups:
                for inside in cut(group.stop - group.start, self.shape.rows):
                    rows = slice(group.start + inside.start, group.start + inside.stop)
                    yield from self._blocks(rows, columns, how, with_teacher)
                    if flush:
                        with onednn_products():
                            self.student.flush()

    def _blocks(
        self, rows: slice, columns: slice, how: Comparison | None, with_teacher: bool = True
    ) -> Iterator[Block]:
        """Make the logits of some rows and columns, and give them in blocks."""
        self._load(rows, columns, how, with_teacher)
        yield from self._loaded(rows, columns, how, with_teacher)

    def _load(
        self, rows: slice, columns: slice, how: Comparison | None, with_teacher: bool = True
    ) -> None:
        """Make the products of some rows and columns, which are counted from the shard's first."""
        with onednn_products():
            self.student.load(rows, columns)
            if self.teacher is not None and with_teacher and how is not None:
                whole = slice(0, self._teacher_width)  # beside outcomes rows are whole
                self.teacher.load(rows, whole if self.spec.num_outcomes else columns)

    def _loaded(
        self, rows: slice, columns: slice, how: Comparison | None, with_teacher: bool = True
    ) -> Iterator[Block]:
        """The logits of what is loaded, in blocks, whose columns are the vocabulary's."""
        teacher = self.teacher if with_teacher and how is not None else None
        share, first = self.spec.objective.teacher_share, self.spec.first
        if columns.stop == columns.start:
            return
        of_vocab = slice(first + columns.start, first + columns.stop)
        width = columns.stop - columns.start
        if self.spec.num_outcomes:
            width = max(width, self._teacher_width, self.spec.num_outcomes)
        height = block_rows(width, self.shape)
        for inside in cut(rows.stop - rows.start, height):
            at = slice(rows.start + inside.start, rows.start + inside.stop)
            s, t, gap = self.student.block(at), None, None
            if teacher is not None:
                t = teacher.block(at)
                if share != 1:  # the target lies between both
                    gap = torch.sub(t, s, out=self.scratch.like("gap", s.shape)).mul_(share)
                    t = t.mul_(share).add_(s, alpha=1 - share)
            is_coarse = isinstance(self.student, SplitHeadSource)
            is_lent = self.student.lends, teacher is not None and teacher.lends
            yield Block(at, of_vocab, s, t, gap, how, is_coarse, is_lent)

    def _reserve(self, rows: int, columns: int) -> None:
        """Make room at once: pieces differ in size, and a buffer that grows is there twice."""
        # As many rows as the largest piece has, not as there might be: pieces are cut evenly.
        lengths = [group.stop - group.start for group, _ in self.groups]
        pieces = [piece for length in lengths for piece in cut(length, rows)]
        most = max((piece.stop - piece.start for piece in pieces), default=0)
        for source in (self.student, self.teacher):
            if source is not None:
                width = self.spec.width if source is self.student else self._teacher_width
                source.reserve(most, width if self.spec.num_outcomes else min(columns, width))

    # --- parts of them ----------------------------------------------------------------------------

    @property
    def _T(self) -> float:
        return self.spec.objective.temperature

    def _statistics(self) -> RowStatistics:
        return RowStatistics(
            self.spec, self.targets, self.groups, self.topk, self.like, self.scratch
        )

    def _gradient(self, upstream: Tensor, inside: Tensor | None) -> RowGradient:
        return RowGradient(
            self.spec, self.targets, upstream.to(self.dtype), self.topk, inside, self.scratch
        )

    def _add_terms(self, statistics: RowStatistics, block: Block) -> None:
        """The second reading of a block."""
        sums = statistics.at(block.rows)
        statistics.add_terms(shift(block, sums, self._T, self.scratch, untempered=False))

    def _store_gradient(self, gradient: RowGradient, block: Block, sums: SumTable) -> None:
        """The gradient of a block whose rows' sums, among ``sums`` of all rows, are whole."""
        at = None
        if self.topk is not None and block.comparison is not None:
            at = self.topk.note_logits(block.rows, block.columns, block.s)
        of_block = sums.at(block.rows)
        shifted = shift(block, of_block, self._T, self.scratch, at, gradient.has_untempered)
        self.student.store(block.rows, gradient.block(shifted, of_block))

    def _summed_gradients(self) -> Gradients:
        """The student's gradients; that of hidden states is summed up over all shards."""
        shard = self.spec.shard
        if shard is not None and shard.sum_dhidden and isinstance(self.student, HeadSource):
            dx = self.student.dx
            if dx is not None and dx.numel() > 0:
                sum_(dx, shard.group)
        return self.student.gradients()

    def _results(self, statistics: RowStatistics) -> RowResults:
        return RowResults(*(self.scatter(x) for x in statistics.finish()))

    def gather(self, x: Tensor) -> Tensor:  # [N, ...] -> [n, ...]
        return x if self.kept is None else x[self.kept]

    def scatter(self, x: Tensor) -> Tensor:  # [n] -> [N], a tensor of its own
        if self.kept is None:
            return x.clone()
        return x.new_zeros(self.num_rows).index_copy_(0, self.kept, x)


def _reads_twice(how: Comparison | None) -> bool:
    return how is not None and how.kl_weights is None
