"""Every number that a run records, declared once: title, unit, format, and where it is shown.

A row of ``METRICS`` is all there is to a metric. The terminal takes its columns from it, the result
table and the report page theirs, the plots their panels, ``metric_for_best_model`` its choices, and
the benchmarks their columns. The defaults of ``Metric`` show it everywhere; a row says where not.

A name that is logged without a row here is not lost: ``metric`` gives it the defaults, so it is
shown under its own name, to four decimals, in a panel of its own.

Names are those of ``log.jsonl``: plain in a ``train`` record, after the weights that were scored in
an ``eval`` record (``eval/nll``, ``eval_ema/nll``, ``eval_teacher/nll``). A ``train`` record also
has ``weights``, the weight of each loss term by its name.

Only the standard library is needed: the configuration and the benchmarks read this without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

NumberFormat = Literal["decimal", "percent", "perplexity", "scientific", "count", "integer", "GiB"]

OWN_PANEL = ""
"""As a metric's panel: one that shows this metric alone."""

KL_BOUND = "kl_bucket"
"""What stands for ``kl`` where of the teacher's ids only the first K are known."""

DEFAULT_BEST = "nll"
"""The metric that chooses the best student if ``metric_for_best_model`` does not."""


@dataclass(frozen=True)
class Metric:
    """One number of the ``train`` or ``eval`` records, and how it is shown."""

    name: str
    """Its key in the log."""
    title: str
    """At the head of a column, in the terminal and in the result table."""
    unit: str = ""
    """On the axis of its own panel."""
    better: Literal["lower", "higher"] | None = None
    """Which way is better; None for a number that is neither good nor bad."""
    format: NumberFormat = "decimal"
    """How it is written, and with it the scale of plots: shares in per cent, bytes in GiB."""
    heading: str = ""
    """Title of its own panel. Default: ``title``."""
    label: str = ""
    """In legends. Default: ``title``."""
    phrase: str = ""
    """Within a sentence. Default: ``title``."""
    about: str = ""
    """What it is, for the note under the result table."""

    needs_teacher: bool = False
    """Whether it compares with the teacher, and is absent without one."""
    in_table: bool = False
    """Whether each row of the result table has it."""
    headline: bool = False
    """Whether it is among the few that say what distillation gained."""
    eval_line: bool = True
    """Whether the terminal's line on an evaluation shows it."""
    train_line: bool = True
    """Whether the terminal's lines on training have a column of it. A loss term has one only while
    it has a weight; of metrics with one title the first that was recorded is shown."""
    bar: str = ""
    """How the progress bar says it, with ``{}`` for the number; not at all if empty."""
    width: int = 9
    """Characters of its column in the lines on training."""

    eval_panel: str | None = OWN_PANEL
    """Panel of the report that plots it over evaluations: a key of ``PANELS``, or None."""
    train_panel: str | None = OWN_PANEL
    """Panel of the report that plots it over training: a key of ``PANELS``, or None."""
    loss_term: bool = False
    """Whether it is a term of the loss: then it is shown only if it has a weight."""
    neutral: float | None = None
    """The value that says nothing: a curve that never leaves it is not drawn."""


@dataclass(frozen=True)
class Panel:
    """One plot of the report."""

    title: str
    unit: str
    """On the vertical axis."""
    from_zero: bool = False
    """Whether the axis of numbers that are never negative begins at 0."""
    log_if_wide: bool = False
    """Whether the axis turns logarithmic for positive numbers over more than a factor of 30."""


PANELS = {
    "eval_terms": Panel("Structural losses on held-out text", "per target, token or sequence"),
    "loss": Panel("Training loss and its parts", "nats per target"),
    "learning_rate": Panel("Learning rate", "learning rate", from_zero=True),
    "weights": Panel("Weights of the loss terms", "weight", from_zero=True),
    "grad_norm": Panel("Gradient norm", "norm before clipping", log_if_wide=True),
    "throughput": Panel("Throughput", "tokens per second", from_zero=True),
    "memory": Panel("Memory", "GiB", from_zero=True),
    "top1": Panel("Top-1 in training", "% of targets"),
    "teacher_share": Panel("Teacher's share of the target (TAID)", "share", from_zero=True),
    "ema_decay": Panel("Decay of the averaged weights", "decay per update", from_zero=True),
    "contrastive": Panel("Sequences told apart by the contrastive loss", "% of sequences"),
    "routing": Panel("Losses of the teacher's gates", "per target or token", log_if_wide=True),
    "precision": Panel("Loss scale of fp16", "factor", log_if_wide=True),
    "skipped": Panel("Updates skipped so far", "updates", from_zero=True),
}
"""Panels with several metrics, or with an axis of their own, in the order of the report."""

# A term of the loss: a column while it has a weight, one panel for all of them.
_term = partial(
    Metric, better="lower", loss_term=True, eval_line=False,
    eval_panel="eval_terms", train_panel="loss",
)  # fmt: skip
# For the plots; in the terminal it would make lines too long.
_plotted = partial(Metric, eval_line=False, train_line=False)
# For programs that read the log: a position, or what another metric says as well.
_recorded = partial(
    Metric, title="", eval_line=False, train_line=False, eval_panel=None, train_panel=None
)

_ROWS = (
    # Scores of an evaluation, in the order of the result table
    Metric(
        "perplexity", "perplexity", "", "lower", "perplexity",
        about="exp(NLL)", in_table=True, headline=True,
        eval_panel=None,  # it has the shape of NLL
    ),
    Metric(
        "nll", "NLL", "nats per target", "lower",
        heading="Held-out loss", about="negative log-likelihood of the text in nats per target",
        in_table=True,
    ),
    Metric(
        "kl", "KL", "nats per target", "lower",
        heading="KL to the teacher", phrase="KL to the teacher",
        about="from the teacher's distribution to the student's in nats per target",
        needs_teacher=True, in_table=True, headline=True,
    ),
    Metric(
        KL_BOUND, "KL, at least", "nats per target", "lower",
        heading="KL to the teacher, at least",
        about="KL between the teacher's K most likely ids and all others as one: a lower bound",
        needs_teacher=True, in_table=True,
    ),
    Metric(
        "agreement", "agreement", "% of targets", "higher", "percent",
        heading="Top-1 agreement with the teacher", phrase="top-1 agreement",
        about="share of targets at which student and teacher have the same first choice",
        needs_teacher=True, in_table=True, headline=True, train_line=False, train_panel="top1",
    ),
    Metric(
        "accuracy", "accuracy", "% of targets", "higher", "percent",
        heading="Top-1 accuracy", about="share of targets that are the model's first choice",
        in_table=True, train_line=False, train_panel="top1",
    ),
    Metric(
        "bits_per_byte", "bits/byte", "bits per byte", "lower",
        about="NLL in bits per byte of text", in_table=True,
        eval_panel=None,  # it has the shape of NLL
    ),
    Metric(
        "entropy", "entropy", "nats per target",
        heading="Entropy of the predictions",
        about="that of the model's own predictions in nats per target",
        in_table=True,
    ),
    # The loss and its terms. On held-out text the loss is a weighted sum of what is plotted anyway.
    Metric(
        "loss", "loss", "nats per target", "lower",
        bar="loss {}", eval_line=False, eval_panel=None, train_panel="loss",
    ),
    _term("ce", "ce", label="CE"),
    _term("kd", "kd", label="KD"),
    _term("z", "z", label="z-loss"),
    _term("on_policy_kd", "on-policy", label="KD, on-policy"),
    _term("feature", "feature"),
    _term("attention", "attention"),
    _term("head_map", "head_map", label="head map"),
    _term("relations", "relations"),
    _term("layerwise", "layerwise"),
    _term("contrastive", "contrastive"),
    _term("router", "router"),
    _term("router_balance", "router_balance", label="router, balance"),
    _term("router_z", "router_z", label="router, z-loss"),
    _term("router_aux", "router_aux", label="router, auxiliary"),
    # What training says besides
    _plotted(
        "contrastive_chance", "contrastive at chance", eval_panel="eval_terms", train_panel="loss"
    ),
    _plotted(
        "contrastive_accuracy", "contrastive accuracy", "% of sequences", "higher", "percent",
        train_panel="contrastive",
    ),
    _plotted("routing_loss", "divergence", better="lower", train_panel="routing"),
    _plotted("routing_balance", "balance", train_panel="routing"),
    Metric(
        "lr", "lr", format="scientific", label="learning rate",
        bar="lr {}", train_panel="learning_rate",
    ),
    Metric("grad_norm", "grad norm", label="global norm", train_panel="grad_norm"),
    Metric(
        "tokens_per_second", "tok/s", better="higher", format="count", label="tokens/s",
        bar="{} tok/s", width=6, train_panel="throughput",
    ),
    Metric(
        "tokens_per_second_per_rank", "tok/s/rank", better="higher", format="count",
        label="tokens/s per rank", width=10, train_panel="throughput",
    ),
    Metric(
        "mfu", "MFU", "% of the peak", "higher", "percent",
        heading="Model FLOP utilisation", bar="MFU {}", width=7,
    ),
    # Of text that the student writes
    Metric(
        "completion_length", "written", "tokens",
        heading="Length of what the student writes", eval_line=False,
    ),
    _plotted(
        "completed", "completed", "% of rollouts", format="percent",
        heading="Rollouts that come to an end of text",
    ),
    _plotted("rollouts_per_second", "rollouts/s", better="higher", heading="Rollouts per second"),
    _plotted(
        "rollout_time", "time to write", "% of training", format="percent",
        heading="Time that the student writes",
    ),
    # One column: of the device where there is one, else of the process.
    Metric(
        "cuda_used_bytes", "GiB", format="GiB", label="device, in use",
        bar="{} GiB", width=6, train_panel="memory",
    ),
    Metric(
        "rss_bytes", "GiB", format="GiB", label="process (RSS)",
        bar="{} GiB", width=6, train_panel="memory",
    ),
    _plotted("cuda_reserved_bytes", "device, reserved", format="GiB", train_panel="memory"),
    _plotted("cuda_peak_bytes", "device, peak of tensors", format="GiB", train_panel="memory"),
    _plotted("teacher_share", "teacher's share of the target", train_panel="teacher_share"),
    _plotted("ema_decay", "EMA decay", train_panel="ema_decay"),
    _plotted("loss_scale", "loss scale", train_panel="precision", neutral=1.0),
    _plotted(
        "skipped", "skipped", better="lower", format="integer",
        bar="skipped {}", train_panel="skipped", neutral=0.0,
    ),
    _recorded("micro_step"),
    _recorded("global_step"),
    _recorded("num_updates"),
    _recorded("epoch"),
    _recorded("tokens"),
    _recorded("attempt"),
    _recorded("rss_peak_bytes"),
    _recorded("cuda_total_bytes"),
)  # fmt: skip

METRICS = {row.name: row for row in _ROWS}
"""Name -> metric, in the order in which they are shown."""

assert len(METRICS) == len(_ROWS), "two metrics bear one name"


def metric(name: str) -> Metric:
    """The metric of that name; of one that is not declared, the defaults under its own name."""
    return METRICS.get(name) or Metric(name, name)


def in_order(names: Collection[str]) -> list[Metric]:
    """These metrics in the order of ``METRICS``, then those that are not declared, by name."""
    declared = [row for name, row in METRICS.items() if name in names]
    return declared + [metric(name) for name in sorted(names) if name not in METRICS]


def table_metrics() -> list[Metric]:
    """The columns of the result table."""
    return [row for row in METRICS.values() if row.in_table]


def headline_metrics() -> list[Metric]:
    """The few that say what distillation gained."""
    return [row for row in METRICS.values() if row.headline]


def best_model_metrics(*, with_teacher: bool, with_cache: bool = False) -> list[str]:
    """What ``metric_for_best_model`` may name, the default first: the smallest value wins.

    ``with_cache``: whether the teacher's targets may be sparse, which give a bound of KL alone.
    """
    rows = [row for row in table_metrics() if row.better == "lower"]
    rows = [row for row in rows if with_cache or row.name != KL_BOUND]
    names = [row.name for row in rows if with_teacher or not row.needs_teacher]
    return sorted(names, key=lambda name: name != DEFAULT_BEST)  # stable: the others keep order


def is_number(value: Any) -> bool:
    """Whether a value of a record is a metric: a number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# How numbers are written


def format_metric(name: str, value: float | None) -> str:
    """A metric as people read it; ``-`` for none, ``nan`` and ``inf`` for what is not finite."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return f"{value:f}"
    return _FORMATS[metric(name).format](value)


def plot_scale(name: str) -> float:
    """What a recorded number is multiplied by on an axis."""
    return {"percent": 100.0, "GiB": 2.0**-30}.get(metric(name).format, 1.0)


def format_count(value: float | None) -> str:
    """A count to three digits, with a unit prefix from 1000 on: ``950``, ``12.3k``, ``4.52M``."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return f"{value:f}"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:  # below that three digits do not round up to the unit
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.0f}"


def _decimal(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.2e}"


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e4 else f"{value:,.0f}" if value < 1e8 else f"{value:.2e}"


_FORMATS: dict[NumberFormat, Callable[[float], str]] = {
    "decimal": _decimal,
    "percent": lambda value: f"{100 * value:.1f} %",
    "perplexity": _perplexity,
    "scientific": lambda value: f"{value:.2e}",
    "count": format_count,
    "integer": lambda value: f"{value:,.0f}",
    "GiB": lambda value: f"{value / 2**30:.2f}",
}
