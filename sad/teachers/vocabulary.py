r"""A teacher that answers for the ids of its student's vocabulary.

With ``map[v]`` the teacher's id of the student's id v, its head becomes ``Head(W[map], b)``, where
the bias of an id that it lacks is -inf: the softmax of its logits is then its distribution over the
ids that the student has, renormalised, and no loss needs to know. A token that it lacks it cannot
read either: from there to the end of the document its targets count for nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from sad_kernels import Head
from torch import Tensor

from sad.data.batch import Batch
from sad.data.vocab_map import VocabMap
from sad.errors import UnfitError
from sad.models.heads import with_valid_vocab


def mapped_head(head: Head, found: VocabMap) -> Head:
    """The head [V_t, D] of a teacher for the V_s ids of its student.

    Where all ids stand for themselves or for none the weight is the same tensor, else a copy of its
    rows. Raises ``UnfitError`` for a head with fewer rows than the teacher's tokenizer has ids, and
    for a softcap, which makes a finite logit of -inf, if there are ids without one of the
    teacher's.
    """
    with_valid_vocab(replace(head, valid_vocab=None), found.teacher_vocab)
    ids = torch.from_numpy(found.teacher_ids).to(head.weight.device)
    missing, size = ids < 0, len(ids)
    lacking = int(missing.sum())
    if lacking and head.softcap is not None:
        raise UnfitError(
            f"the teacher must know all of the student's ids where its head has a softcap, got "
            f"{lacking} that it lacks; choose a student without them, or another teacher"
        )
    weight, bias = head.weight.detach(), head.bias
    in_place = bool((missing | (ids == torch.arange(size, device=ids.device))).all())
    if not in_place or size > len(weight):
        weight = weight[ids.clamp(min=0)]
        bias = None if bias is None else bias[ids.clamp(min=0)]
    if lacking:
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
        # The head multiplies by its scale after the bias is added.
        bias[:size].masked_fill_(missing, -math.copysign(math.inf, head.logit_scale))
    return replace(head, weight=weight, bias=bias, valid_vocab=size)


def unknown_ids(head: Head) -> Tensor | None:
    """Which ids a mapped head gives no probability, bool [V_s]; None for no such id."""
    if head.bias is None:
        return None
    unknown = head.bias[: head.vocab_size].isinf()
    return unknown if bool(unknown.any()) else None


def read_weights(batch: Batch, unknown: Tensor) -> Tensor:
    """Weights of the divergence, fp32 [B, L]: 0 from an input that the teacher lacks, of the ids
    ``unknown`` [V_s], to the end of its document, else 1."""
    inputs, positions = batch.input_ids, batch.position_ids
    place = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    begin = place.masked_fill(positions != 0, 0).cummax(1).values
    last = place.masked_fill(~unknown.to(inputs.device)[inputs], -1).cummax(1).values
    return (last < begin).float()


def scored_labels(batch: Batch, weights: Tensor | None, head: Head) -> Tensor:
    """The labels that a teacher with this head has a likelihood for; the others are -100."""
    labels, unknown = batch.labels, unknown_ids(head)
    if weights is not None:
        labels = labels.masked_fill(weights == 0, -100)
    if unknown is not None:
        labels = labels.masked_fill(unknown.to(labels.device)[labels.clamp(min=0)], -100)
    return labels
