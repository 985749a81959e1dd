"""PyTorch's ``F.linear_cross_entropy``, which works in chunks of rows since torch 2.13.

With the teacher's probabilities as target it is a divergence: the KL and this cross-entropy differ
by the teacher's entropy, which has no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Peer, Unsupported, require_attribute, require_kind, select_valid_rows
from bench.problems.inputs import Hidden

CHUNKS = {"batch_chunk_size": 2048, "chunking_method": None}


def of_labels(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "ce", what="has no divergence")
        function, options = _function(settings)
        h, w, labels = problem.hidden, problem.weight, problem.labels
        return lambda: function(h, w, labels, options=options)

    return build


def of_probabilities(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    """Forward KL: ``F.linear_cross_entropy`` of ``softmax(teacher / T)``, less its entropy.

    The call makes the probabilities, which must have the dtype of the hidden states. A joint loss
    calls it a second time, with the labels.
    """

    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "kd", "joint", what="is not needed for labels")
        o, ignored = problem.case.objective, problem.case.ignored
        if o.divergence != "forward_kl":
            raise Unsupported("has the forward KL only")
        function, options = _function(settings)
        if not _chunks_probabilities():
            raise Unsupported("this version of torch makes whole logits for probabilities")
        w, wt, T = problem.weight, problem.cut_teacher_weight, o.temperature

        def kd(h: Tensor, ht: Tensor) -> Tensor:
            with torch.no_grad():
                log_p = ((ht @ wt.T).float() / T).log_softmax(-1)
                p = log_p.exp()
                entropy = -(p * log_p).sum() / len(p)
                p = p.to(h.dtype)
            return function(h / T, w, p, options=options) - entropy

        def loss() -> Tensor:
            labels, h, ht = select_valid_rows(
                problem.labels, ignored, problem.hidden, problem.teacher_hidden
            )
            if problem.case.kind == "kd":
                return kd(h, ht)
            ce = function(h, w, labels, options=options)
            return o.ce_weight * ce + o.kd_weight * kd(h, ht)

        return loss

    return build


def _function(settings: dict[str, Any]) -> tuple[Callable[..., Tensor], Any]:
    """The function and its options. These always name ``acc_dtype``: any other option resets it to
    the input's dtype."""
    function = require_attribute(torch.nn.functional, "linear_cross_entropy", "torch")
    options = require_attribute(torch.nn, "LinearCrossEntropyOptions", "torch")
    return function, options(acc_dtype=torch.float32, **settings)


@cache
def _chunks_probabilities() -> bool:
    """Whether probabilities are taken in chunks; torch 2.13 warns, and makes whole logits."""
    function, options = _function(CHUNKS)
    h, w, p = torch.ones(2, 4), torch.ones(8, 4), torch.full((2, 8), 0.125)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        function(h, w, p, options=options)
    return not said


def _peer(name: str, build: Callable[..., Any] = of_labels, **settings: Any) -> Peer:
    shown = {"acc_dtype": "float32"} | settings
    return Peer(name, "F.linear_cross_entropy", build(**settings), "torch", shown)


HIDDEN = (
    _peer("torch chunked"),
    _peer("torch chunked 2048", **CHUNKS),
    _peer("torch probabilities 2048", of_probabilities, **CHUNKS),
)
