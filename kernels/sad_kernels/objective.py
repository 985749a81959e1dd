"""Arguments and results of the losses: objective, head, kinds of teacher, output.

They are frozen values that say *what* is computed, never *how*: no kernel, chunk size or device.
torch is imported where tensors are checked: an ``Objective`` alone, as a configuration builds one,
does without.

Notation, shared by the whole package. ``N`` tokens, ``V`` vocabulary, ``D_s`` and ``D_t`` hidden
sizes of student and teacher, ``s`` and ``t`` their logits after bias, scale and softcap, ``T`` the
temperature, ``p = softmax(t / T)``, ``q = softmax(s / T)``, ``q1 = softmax(s)`` and
``lse = logsumexp(s)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from sad_kernels._divergence_table import DIVERGENCES, Divergence
from sad_kernels.vocab import VocabShard, require_shard

if TYPE_CHECKING:
    from torch import Tensor

Tail = Literal["bucket", "zero"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""The loss of one token: ``ce_weight * CE + kd_weight * KD + z_loss * lse^2``, in nats.

    ``CE = lse - (1 - eps) * s_y - (eps / V) * sum_v s_v`` with ``eps = label_smoothing`` spread
    over all valid classes, the target included (torch's convention). ``KD`` is a divergence between
    ``p`` and ``q`` in nats, times ``T^2`` unless ``scale_t2=False`` (Hinton et al., arXiv
    1503.02531):

    ==================  =========================================  ==========================
    ``divergence``      value                                      mixture
    ==================  =========================================  ==========================
    forward_kl          KL(p || q)
    reverse_kl          KL(q || p)
    jsd                 beta KL(p || m) + (1 - beta) KL(q || m)     m = beta p + (1 - beta) q
    skew_forward_kl     KL(p || m)                                 m = beta p + (1 - beta) q
    skew_reverse_kl     KL(q || m)                                 m = beta q + (1 - beta) p
    jeffreys            beta KL(p || q) + (1 - beta) KL(q || p)
    tvd                 0.5 sum_v |p_v - q_v|
    ==================  =========================================  ==========================

    ``beta`` is read by jsd, the skews and jeffreys only and must lie strictly between 0 and 1
    there: the two KLs are chosen by name, not as limits. For JSD it is the teacher's share of the
    mixture (GKD, arXiv 2306.13649), for the skews DistiLLM's alpha (arXiv 2402.03898), for Jeffreys
    the weight of the forward KL. The total variation (tvd) has subgradient 0 where p_v = q_v.

    With ``other_divergence`` the losses take ``other_rows``, a mask of rows for which it, with its
    own ``other_beta``, takes the place of ``divergence``: DistiLLM-2 (arXiv 2503.07067) takes the
    skew forward KL on the teacher's text and the skew reverse KL on the student's.

    With ``teacher_share = u`` below 1 the teacher's logits are replaced by ``(1 - u) sg(s) + u t``,
    ``sg`` the stop-gradient: a target between student and teacher (TAID, arXiv 2501.16937). It must
    lie in (0, 1]; a ``TeacherTopK``, whose logits are not known, takes 1 only.

    CE and the z-loss are taken at temperature 1. The z-loss (PaLM, arXiv 2204.02311) is not
    multiplied by ``ce_weight``.

    Raises ``TypeError`` and ``ValueError`` for a value of the wrong kind or out of range.
    """

    ce_weight: float = 0.0
    kd_weight: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0
    scale_t2: bool = True
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    teacher_share: float = 1.0
    other_divergence: Divergence | None = None
    other_beta: float = 0.5

    def __post_init__(self) -> None:
        for name in ("ce_weight", "kd_weight", "z_loss"):
            _require_number(name, getattr(self, name), "be a finite number >= 0", low=0.0)
        _require_number("label_smoothing", self.label_smoothing, "lie in [0, 1]", low=0.0, high=1.0)
        _require_number("temperature", self.temperature, "be a finite number > 0", above=0.0)
        if not isinstance(self.scale_t2, bool):
            raise TypeError(f"scale_t2 must be True or False, got {self.scale_t2!r}; pass a bool")
        _require_divergence("divergence", self.divergence, "beta", self.beta)
        if self.other_divergence is not None:
            _require_divergence(
                "other_divergence", self.other_divergence, "other_beta", self.other_beta
            )
        else:
            _require_number("other_beta", self.other_beta, "be a finite number")

        _require_number(
            "teacher_share",
            self.teacher_share,
            "lie in (0, 1]",
            above=0.0,
            high=1.0,
            remedy="1 is the teacher itself; for no divergence set kd_weight=0",
        )

    @property
    def divergences(self) -> tuple[str, ...]:
        """The names of the divergences that some row may be compared with."""
        other = self.other_divergence
        return (self.divergence,) if other is None else (self.divergence, other)

    @property
    def kd_scale(self) -> float:
        """The factor on the bare divergence: ``T^2``, or 1 with ``scale_t2=False``."""
        return self.temperature**2 if self.scale_t2 else 1.0


@dataclass(frozen=True)
class Head:
    """Output projection of a language model: ``z = softcap(logit_scale * (h W^T + b))``.

    ``softcap(x) = softcap * tanh(x / softcap)``, or x for None. Columns at or past ``valid_vocab``
    are padding: their probability and gradient are 0. Calling the head gives the full logits, for
    checks and tests; training never holds them.

    With a ``shard`` weight and bias are those of its columns, on this process alone, while
    ``valid_vocab`` is that of the whole vocabulary; calling the head gives the logits that are
    here.

    Shapes: ``weight`` [V, D], ``bias`` [V]; ``head(hidden [..., D])`` is [..., valid_vocab or V].

    Raises ``TypeError`` and ``ValueError`` for a value of the wrong kind, shape or range.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        _require_tensor("head weight", self.weight, ndim=2)
        V = self.weight.shape[0]
        if self.bias is not None:
            _require_tensor("head bias", self.bias, ndim=1)
            if self.bias.shape[0] != V:
                raise ValueError(
                    f"head bias must have one entry per row of the weight ({V}), got "
                    f"{self.bias.shape[0]}; pass the bias that belongs to this weight"
                )
        require_transform(self.logit_scale, self.softcap)
        require_shard("shard", self.shard)
        if self.shard is not None and self.shard.width != V:
            raise ValueError(
                f"head weight must have the {self.shard.width} columns of its shard, got {V} rows; "
                "pass those of this process"
            )
        require_valid_vocab(self.valid_vocab, self.num_columns)

    @property
    def num_columns(self) -> int:
        """The number of columns, padding and other processes' shards included."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab_size

    @property
    def vocab_size(self) -> int:
        """The number of columns that count, of all shards: ``valid_vocab``, or all."""
        return self.num_columns if self.valid_vocab is None else self.valid_vocab

    def __call__(self, hidden: Tensor) -> Tensor:
        V = self.vocab_size
        if self.shard is not None:
            V = max(0, min(V, self.shard.stop) - self.shard.start)
        logits = hidden @ self.weight[:V].T
        if self.bias is not None:
            logits = logits + self.bias[:V]
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


@dataclass(frozen=True)
class TeacherHidden:
    """A teacher given by its last hidden states [..., D_t] and its head.

    In the ``linear_*`` losses its logits are computed in pieces and never held whole. A teacher
    never gets a gradient. Weight and bias may be leaves that require one, such as the parameters of
    a model that is not frozen, and are left alone; raises ``ValueError`` for hidden states, or a
    weight or bias computed from something, that do.
    """

    hidden: Tensor  # [..., D_t]
    head: Head

    def __post_init__(self) -> None:
        _require_tensor("teacher hidden", self.hidden)
        require_no_grad("teacher hidden states", self.hidden)
        require_leaf("teacher head weight", self.head.weight)
        if self.head.bias is not None:
            require_leaf("teacher head bias", self.head.bias)


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher given by its logits [..., V_t], of which the first ``valid_vocab`` columns count.

    What counts is ``softcap(logit_scale * logits)``, as for a ``Head``. Beside a student with a
    ``VocabShard`` they are the logits of the same columns, and ``valid_vocab``, which may exceed
    their number there, is that of the whole vocabulary. Raises ``ValueError`` for logits that
    require a gradient: a teacher never gets one.
    """

    logits: Tensor  # [..., V_t]
    valid_vocab: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _require_tensor("teacher logits", self.logits)
        require_no_grad("teacher logits", self.logits)
        require_valid_vocab(self.valid_vocab, None)  # how many columns there are, the loss knows
        require_transform(self.logit_scale, self.softcap)


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher given by its K most likely tokens per row: distinct ids and log-probabilities.

    ``log_probs`` are full-vocabulary log-probabilities at the objective's temperature; -inf marks
    padding, whose id may be anything. A row with another id outside the vocabulary, or with one
    that occurs twice, gets a loss of NaN and leaves the other rows alone. With ``tail="bucket"``
    the rest of the mass is one further outcome on both sides; with ``tail="zero"`` the teacher is
    renormalised over its K ids and the rest has probability 0 (biased, and infinite for
    ``reverse_kl``).
    """

    ids: Tensor  # [..., K]
    log_probs: Tensor  # [..., K]
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        _require_tensor("teacher ids", self.ids, integral=True)
        _require_tensor("teacher log_probs", self.log_probs)
        require_no_grad("teacher log_probs", self.log_probs)
        if self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f"teacher ids and log_probs must have one shape, got {tuple(self.ids.shape)} and "
                f"{tuple(self.log_probs.shape)}; pass one log-probability per id"
            )
        if self.tail not in get_args(Tail):
            raise ValueError(
                f"tail must be 'bucket' or 'zero', got {self.tail!r}; choose one of these"
            )


Teacher = TeacherHidden | TeacherLogits | TeacherTopK


def dense_tensors(teacher: Teacher | None) -> tuple[Tensor, ...]:
    """The tensors that a dense teacher's logits are computed from, whose dtypes decide ``impl``.

    None for a top-k teacher: its log-probabilities are final.
    """
    match teacher:
        case TeacherHidden(hidden=hidden, head=head):
            return hidden, head.weight
        case TeacherLogits(logits=logits):
            return (logits,)
        case _:
            return ()


class DistillOutput(NamedTuple):
    """The loss and its metrics, from the same pass over the data.

    Only ``loss`` carries a gradient. The others are detached, fp32, and but for ``lse`` sums over
    the valid rows, *before* the objective's weights but with those of tokens: so ``loss *
    num_items = ce_weight * ce + kd_weight * kd + z_loss * z``.
    """

    loss: Tensor  # [] weighted sum over valid rows / num_items; [...] with reduction="none"
    ce: Tensor  # [] nats, label smoothing included
    kd: Tensor  # [] nats, after T^2
    z: Tensor  # [] sum of lse^2
    num_tokens: Tensor  # [] valid rows
    correct: Tensor  # [] rows whose student argmax is the label
    agree: Tensor  # [] rows whose student argmax is the teacher's, or that of their mixture
    entropy: Tensor  # [] nats, of the student at temperature 1
    lse: Tensor  # [N] logsumexp of each row's logits at temperature 1; 0 where ignored


def require_valid_vocab(valid_vocab: int | None, width: int | None) -> None:
    """Raise unless ``valid_vocab`` is None or an int in [1, width]; a width of None is any."""
    if valid_vocab is None:
        return
    if not isinstance(valid_vocab, int) or isinstance(valid_vocab, bool):
        raise TypeError(
            f"valid_vocab must be an int or None, got {valid_vocab!r}; pass the tokenizer's size"
        )
    if valid_vocab < 1 or (width is not None and valid_vocab > width):
        limit = "be at least 1" if width is None else f"lie in [1, {width}], the columns there are"
        raise ValueError(
            f"valid_vocab must {limit}, got {valid_vocab}; pass the number of ids that the "
            "tokenizer can produce"
        )


def require_transform(logit_scale: object, softcap: object) -> None:
    """Raise unless these are a scale other than 0, and a softcap above 0 or None."""
    _require_number("logit_scale", logit_scale, "be a finite number other than 0")
    if logit_scale == 0:
        raise ValueError(
            "logit_scale must be a finite number other than 0, got 0; leave it at 1.0 for none"
        )
    if softcap is not None:
        _require_number("softcap", softcap, "be a finite number > 0, or None", above=0.0)


def require_leaf(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for a tensor that was computed from others which want a gradient."""
    if not tensor.is_leaf:
        require_no_grad(name, tensor)


def require_no_grad(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for a tensor that requires a gradient which it would never get."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient, got requires_grad=True; compute them under "
            "torch.no_grad() or detach them"
        )


def _require_divergence(name: str, divergence: object, beta_name: str, beta: float) -> None:
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(
            f"{name} must be one of {', '.join(DIVERGENCES)}, got {divergence!r}; choose one of "
            "these"
        )
    if DIVERGENCES[divergence].reads_beta:
        remedy = f"{beta_name}=0 and 1 are no mixtures: ask for forward_kl or reverse_kl by name"
        _require_number(
            beta_name, beta, "lie strictly between 0 and 1", above=0.0, below=1.0, remedy=remedy
        )
    else:
        _require_number(beta_name, beta, "be a finite number")


def _require_tensor(
    name: str, value: object, ndim: int | None = None, integral: bool = False
) -> None:
    import torch

    kind = "integer" if integral else "floating-point"
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} must be a {kind} tensor, got {type(value).__name__}; pass a torch.Tensor"
        )
    fits = (
        not value.dtype.is_floating_point
        and not value.dtype.is_complex
        and value.dtype != torch.bool
    )
    if (fits if integral else value.dtype.is_floating_point) is False:
        raise TypeError(f"{name} must be a {kind} tensor, got {value.dtype}; convert it")
    if ndim is None and value.ndim == 0:
        raise ValueError(
            f"{name} must have at least one dimension, got a scalar; pass a batch of rows"
        )
    if ndim is not None and value.ndim != ndim:
        raise ValueError(
            f"{name} must have {ndim} dimension(s), got shape {tuple(value.shape)}; reshape it"
        )


def _require_number(
    name: str,
    value: object,
    expectation: str,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    high: float | None = None,
    remedy: str = "pass a value in that range",
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must {expectation}, got {value!r}; pass a Python number")
    out = (low is not None and value < low) or (above is not None and value <= above)
    out = out or (high is not None and value > high)
    finite = -math.inf < value < math.inf  # not math.isfinite, which torch.compile cannot trace
    if not finite or out or (below is not None and value >= below):
        raise ValueError(f"{name} must {expectation}, got {value!r}; {remedy}")
