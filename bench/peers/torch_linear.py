"""PyTorch's ``F.linear_cross_entropy``, which works in chunks of rows since torch 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Peer, require_attribute, require_kind
from bench.problems.inputs import Hidden


def of_hidden(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    """Always passes ``acc_dtype``: any other option resets it to the input's dtype."""

    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "ce", what="has no divergence")
        function = require_attribute(torch.nn.functional, "linear_cross_entropy", "torch")
        options = require_attribute(torch.nn, "LinearCrossEntropyOptions", "torch")(
            acc_dtype=torch.float32, **settings
        )
        h, w, labels = problem.hidden, problem.weight, problem.labels
        return lambda: function(h, w, labels, options=options)

    return build


def _peer(name: str, extra: bool = False, **settings: Any) -> Peer:
    shown = {"acc_dtype": "float32"} | settings
    return Peer(name, "F.linear_cross_entropy", of_hidden(**settings), "torch", shown, extra=extra)


HIDDEN = (
    _peer("torch chunked"),
    _peer("torch chunked 2048", batch_chunk_size=2048, chunking_method=None),
)
