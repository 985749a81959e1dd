r"""Distillation losses from logits: a divergence of the softmaxes, and CE + KD in one pass.

With ``s, t`` the logits of student and teacher, T the temperature, ``p = softmax(t / T)`` and
``q = softmax(s / T)``, in nats, times ``T^2`` unless ``scale_t2=False``:

==================  =========================================  ============================
divergence          value                                      derivative by s_v, times T
==================  =========================================  ============================
forward_kl          KL(p || q)                                 q_v - p_v
reverse_kl          KL(q || p)                                 q_v (log q_v/p_v - value)
jsd                 beta KL(p || m) + (1 - beta) KL(q || m)    h_v - q_v sum_u h_u,
skew_forward_kl     KL(p || m)                                 h and m of each in
skew_reverse_kl     KL(q || m)                                 ``_divergence.py``
tvd                 0.5 sum_v |p_v - q_v|
jeffreys            beta KL(p || q) + (1 - beta) KL(q || p)    the weighted sum of the KLs'
==================  =========================================  ============================

``m = beta p + (1 - beta) q``, and in skew_reverse_kl ``m = beta q + (1 - beta) p``. Every value is
0 at q = p and no lower; ``0 log 0 = 0``. A student's -inf where the teacher has mass makes the
forward KL infinite. Of a ``TeacherTopK`` the ids are compared, and everything else as one further
outcome.

Algorithm. As in ``ce.py``, over two tensors: one reading for the KLs, whose sums are kept relative
to both running maxima, a second for the others, which need both normalisers first. Backward
reads both again and writes one gradient, of CE and KD together. Saved: the logits, 6 numbers per
row (and K for a ``TeacherTopK``). Bytes moved, of e-byte logits on both sides: 2 e N V forward (4
for the mixtures), 3 e N V backward. Memory beyond the inputs and the gradient: some numbers per row
with ``impl="triton"``, a few blocks of 2 MB with ``impl="torch"``. A ``TeacherHidden`` has its
logits computed whole with ``impl="triton"``, as the student's are.

Sources: Hinton et al. 1503.02531, MiniLLM 2306.08543, GKD 2306.13649, DistiLLM 2402.03898.
"""

from __future__ import annotations

from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import resolve_impl
from sad_kernels._rows import (
    LogitTransform,
    LossSpec,
    RowLayout,
    count_valid,
    distill_output,
    reduce_rows,
)
from sad_kernels.objective import (
    DistillOutput,
    Divergence,
    Objective,
    Teacher,
    TeacherLogits,
    dense_tensors,
    require_transform,
)
from sad_kernels.outcomes import Outcomes
from sad_kernels.vocab import VocabShard


def kl_div(
    student_logits: Tensor,  # [..., >= V]
    teacher_logits: Tensor,  # [..., >= V]
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    scale_t2: bool = True,
    labels: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    impl: str = "auto",
    vocab_shard: VocabShard | None = None,
    outcomes: Outcomes | None = None,
) -> Tensor:
    """Divergence between the softmaxes of teacher and student, in nats, times T^2.

    Per row ``D(softmax(teacher_logits / T), softmax(student_logits / T))`` with T the
    ``temperature``, and without the factor T^2 if ``scale_t2=False``. The divergences, their
    gradients and sources are in the module's docstring, ``beta`` in ``Objective``'s. With a softcap
    c and a logit scale, a side's logits are ``c tanh(scale x / c)`` of what is passed.

    Logits in fp32, bf16, fp16 or fp64, not necessarily of one dtype; a teacher's must not require a
    gradient. They need equally many columns, or a ``valid_vocab``, at or past which columns have
    probability 0 and gradient 0 on both sides. ``labels`` only say which rows count: those that are
    not ``ignore_index``, or all of them. The others may hold anything and get a gradient of exactly
    0. ``mean`` divides by the number of rows that count, or by ``num_items``, an int or 0-d tensor,
    and is 0 with zero gradients over no rows. A label outside ``[0, V)`` makes its row's loss NaN.

    With a ``vocab_shard`` both sides' logits are those of its columns, and ``valid_vocab`` is that
    of the whole vocabulary. All ranks of its group call with the same rows, and get the same loss.

    With ``outcomes`` the sums of both softmaxes over the columns of each outcome are compared, by
    the forward KL: see ``Outcomes``. The two widths may differ; ``valid_vocab`` is the student's.

    Returns a scalar, or with ``reduction="none"`` a loss of shape ``[...]``, in fp32 (fp64 for a
    student in fp64). The gradient has the dtype of the student's logits.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit, and for an ``impl`` that
    does not work on them. Backward cannot be differentiated again.

    >>> import torch
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> kl_div(student, teacher, temperature=2.0)
    tensor(0.1212)
    """
    _check.require_rows("student_logits", student_logits, may_be_empty=vocab_shard is not None)
    common = valid_vocab if outcomes is None else None
    teacher = TeacherLogits(teacher_logits, common, teacher_logit_scale, teacher_softcap)
    _check.require_teacher(teacher, student_logits, "student_logits")
    _check.require_int("ignore_index", ignore_index)
    require_transform(logit_scale, softcap)
    _check.require_reduction(reduction)
    _check.require_divisor(num_items, reduction, student_logits, "student_logits")
    width = student_logits.shape[-1]
    shard = _check.shard_of_columns("vocab_shard", vocab_shard, width, teacher, outcomes)
    columns = width if vocab_shard is None else vocab_shard.vocab_size
    objective = Objective(
        temperature=temperature, divergence=divergence, beta=beta, scale_t2=scale_t2
    )
    vocab, *sums = _check.compared_columns(
        columns, valid_vocab, teacher, shard, objective, outcomes, student_logits, "student_logits"
    )
    spec = LossSpec(objective, vocab, ignore_index, False, False, shard, *sums)
    layout = RowLayout(student_logits)
    targets = _check.row_targets(student_logits, "student_logits", layout, objective, labels=labels)
    targets = _check.with_outcomes(targets, outcomes)
    transform = LogitTransform(logit_scale, softcap)
    rows_of = spec, layout.rows(student_logits), transform, targets, teacher, layout
    if resolve_impl(impl, student_logits, teacher_logits) == "triton":
        from sad_kernels._triton.logits import mean_loss_from_logits, row_losses_from_logits
    else:
        from sad_kernels._torch.logits import mean_loss_from_logits, row_losses_from_logits
    if reduction == "mean":
        return mean_loss_from_logits(*rows_of, num_items).loss
    return reduce_rows(row_losses_from_logits(*rows_of).loss, None, reduction, layout)


def distill_loss(
    student_logits: Tensor,  # [..., >= V]
    labels: Tensor | None,  # [...]
    teacher: Teacher | None,
    objective: Objective,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,  # [...] or [N]
    kd_token_weights: Tensor | None = None,  # [...] or [N]
    other_rows: Tensor | None = None,  # [...] or [N], bool
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    vocab_shard: VocabShard | None = None,
    outcomes: Outcomes | None = None,
) -> DistillOutput:
    """CE, KD and z-loss of every row in one pass, with accuracy, agreement and entropy.

    ``loss = sum over rows of (ce_weight CE + kd_weight KD + z_loss lse^2) / num_items``. CE and the
    z-loss are taken at temperature 1, ``num_items`` is the number of rows that count, unless given:
    an int or a 0-d tensor, such as the number of tokens of a whole accumulation window. With no
    rows to count the loss is 0 with zero gradients. Labels are not shifted: row i is compared with
    ``labels[i]``. Without labels (None), for ``ce_weight=0``, every row counts.

    ``reduction="sum"`` divides by nothing; ``"none"`` gives the loss of every row in the labels'
    shape, 0 where ignored. ``token_weights`` multiply the loss of each row, ``kd_token_weights``
    its divergence in their place: 0 there switches it off and reads nothing of the teacher's row.
    They do not change ``num_items``. ``other_rows`` are compared by the objective's
    ``other_divergence``. With a softcap c and a logit scale the student's logits are
    ``c tanh(scale x / c)`` of what is passed; ``TeacherLogits`` has its own.

    Any kind of teacher; none at all (None) only with ``kd_weight=0``. A dense teacher's
    ``valid_vocab`` cuts the student's columns too. KD is computed for the record even at weight 0.
    Rows labelled ``ignore_index`` may hold anything, in any of the inputs. A label outside
    ``[0, V)``, or a teacher's id, makes its row's loss NaN and leaves the other rows alone.

    With a ``vocab_shard`` the student's logits are those of its columns, and so are a
    ``TeacherLogits``; a ``TeacherHidden`` has a head with a shard of equal bounds, a
    ``TeacherTopK`` is whole. All ranks of its group call with the same rows, and get the same
    result.

    With ``outcomes``, for a teacher with another tokenizer, KD is the forward KL between the sums
    of p and q over the columns of each outcome, see ``Outcomes``: a ``TeacherTopK`` has outcomes in
    the place of ids, each side its own ``valid_vocab``, and ``agree`` counts the rows in which both
    argmaxes have one outcome. ``kd_token_weights`` are 0 in rows that are not aligned.

    Returns a ``DistillOutput`` in fp32 (fp64 for a student in fp64). Ties of an argmax go to the
    left; for ``TeacherTopK`` the teacher's argmax is the id with the highest log-probability.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit, and for an ``impl`` that
    does not work on them. Backward cannot be differentiated again.

    >>> import torch
    >>> from sad_kernels import Objective, TeacherLogits
    >>> logits, labels = torch.zeros(2, 8), torch.tensor([3, -100])
    >>> out = distill_loss(logits, labels, TeacherLogits(logits), Objective(ce_weight=0.5))
    >>> out.loss, out.ce, out.kd, out.agree  # half of log 8
    (tensor(1.0397), tensor(2.0794), tensor(0.), tensor(1.))
    """
    _check.require_rows("student_logits", student_logits, may_be_empty=vocab_shard is not None)
    _check.require_teacher(teacher, student_logits, "student_logits")
    _check.require_objective(objective, teacher, has_labels=labels is not None)
    _check.require_int("ignore_index", ignore_index)
    require_transform(logit_scale, softcap)
    _check.require_reduction(reduction)
    _check.require_divisor(num_items, reduction, student_logits, "student_logits")
    width = student_logits.shape[-1]
    shard = _check.shard_of_columns("vocab_shard", vocab_shard, width, teacher, outcomes)
    columns = width if vocab_shard is None else vocab_shard.vocab_size
    vocab, *sums = _check.compared_columns(
        columns, None, teacher, shard, objective, outcomes, student_logits, "student_logits"
    )
    spec = LossSpec(objective, vocab, ignore_index, True, True, shard, *sums)
    layout = RowLayout(student_logits)
    targets = _check.row_targets(
        student_logits,
        "student_logits",
        layout,
        objective,
        labels=labels,
        token_weights=token_weights,
        kd_token_weights=kd_token_weights,
        other_rows=other_rows,
    )
    targets = _check.with_outcomes(targets, outcomes)
    transform = LogitTransform(logit_scale, softcap)
    rows_of = spec, layout.rows(student_logits), transform, targets, teacher, layout
    given = [x for x in (student_logits, labels) if x is not None]
    if resolve_impl(impl, *given, *dense_tensors(teacher)) == "triton":
        from sad_kernels._triton.logits import mean_loss_from_logits, row_losses_from_logits
    else:
        from sad_kernels._torch.logits import mean_loss_from_logits, row_losses_from_logits
    if reduction == "mean":
        return mean_loss_from_logits(*rows_of, num_items)
    rows = row_losses_from_logits(*rows_of)
    loss = reduce_rows(rows.loss, None, reduction, layout)
    num_tokens = count_valid(targets.labels, ignore_index, student_logits)
    return distill_output(loss, rows, num_tokens, layout)
