"""Whether hidden states from files are a teacher's own: they are compared with what it gives here.

Of a few documents the teacher computes its final hidden states itself. Those of the files must give
the next tokens the same loss, and every position about the same distribution: another layer, states
that are normed already, or those of another token do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from sad_kernels import Head
from torch import Tensor

from sad.environment import stop_if_requested
from sad.errors import UnfitError
from sad.models.final_norm import FinalNorm
from sad.teachers.foreign.records import IMPORTING
from sad.teachers.foreign.vllm_hidden import ExportedStates
from sad.teachers.frozen import FrozenTeacher

PROBES = 8
"""Documents that are compared."""

TOLERANCE = 0.01
"""Nats by which the mean loss of the next tokens may be off, and that the distributions of a
document may diverge by in mean. Of the bundled quickstart teacher, states in bfloat16 beside a
teacher in fp32 diverge by 6e-5, those that are normed twice by 0.05, those of the layer before by
0.17, those of the token before by 2.4."""

CHUNK_BYTES = 256 * 2**20
"""Memory for the log-probabilities of some positions."""


class Agreement(NamedTuple):
    """How the states of some documents compare with the teacher's own."""

    nll: float
    """Mean negative log-likelihood of the next tokens in nats, by the states of the files."""
    teacher_nll: float
    """The same by the teacher's own."""
    kl: float
    """Mean divergence of the one from the other in nats, of the document in which it is largest."""

    @property
    def holds(self) -> bool:
        return abs(self.nll - self.teacher_nll) <= TOLERANCE and self.kl <= TOLERANCE


def require_own_states(
    paths: Sequence[Path], teacher: FrozenTeacher, norm: FinalNorm, name: str, path: object
) -> Agreement:
    """Compare ``PROBES`` of the documents, spread over all of them, with the teacher ``name``.

    Raises ``UnfitError`` with the losses of both unless they agree.
    """
    count = min(PROBES, len(paths))
    probes = [paths[i * len(paths) // count] for i in range(count)]
    found = _compare(probes, teacher, lambda document: norm(document.states()))
    if found.holds:
        return found
    layers = teacher.model.config.get_text_config().num_hidden_layers
    raise UnfitError(
        f"{path} must hold hidden states of {name} before its final norm, whose next-token loss "
        f"and distributions are the teacher's own within {TOLERANCE:g} nats, got a loss of "
        f"{found.nll:.3f} where the teacher has {found.teacher_nll:.3f}, and a divergence of "
        f"{found.kl:.3f}, over {count} documents; {_what_they_are(probes, teacher, norm)}: export "
        f"layer {layers} (num_hidden_layers) of this model, last of all"
    )


def _what_they_are(paths: Sequence[Path], teacher: FrozenTeacher, norm: FinalNorm) -> str:
    """What else of the teacher the states of the longest document agree with, in words."""
    longest = max(map(ExportedStates, paths), key=lambda document: document.length)
    layers = longest.layers
    guesses: dict[str, Callable[[ExportedStates], Tensor]] = {
        "they are those of the token before": lambda document: norm(document.states().roll(-1, 0)),
        "they are those of the token after": lambda document: norm(document.states().roll(1, 0)),
    }
    if norm.width == teacher.head().weight.shape[1]:
        guesses["they are normed already"] = lambda document: document.states()
    for layer in range(layers - 1):
        guesses[f"number {layer + 1} of the {layers} exported layers agrees, not the last"] = (
            lambda document, layer=layer: norm(document.states(layer))
        )
    for what, states in guesses.items():
        # At the ends of a document the token before it, or after it, is missing.
        if _compare([longest.path], teacher, states, inside=slice(1, -1)).holds:
            return what
    return "they are of another layer, model or text"


def _compare(
    paths: Sequence[Path],
    teacher: FrozenTeacher,
    states_of: Callable[[ExportedStates], Tensor],
    inside: slice = slice(None),
) -> Agreement:
    """The agreement of some documents; ``inside`` are the positions that count, of those that have
    a next token."""
    nll = teacher_nll = kl = 0.0
    positions = 0
    for path in paths:
        stop_if_requested(IMPORTING)
        document = ExportedStates(path)
        tokens = torch.tensor(document.tokens)
        target = teacher.answer(tokens[None, :-1])
        device = target.hidden.device
        head, own = target.head, target.hidden[0][inside]
        states = states_of(document)[:-1][inside].to(device)
        sums = _sums(head, states, own, tokens[1:][inside].to(device))
        nll, teacher_nll = nll + sums[0], teacher_nll + sums[1]
        kl = max(kl, sums[2] / max(len(own), 1))
        positions += len(own)
    if not positions:
        return Agreement(math.nan, math.nan, math.nan)
    return Agreement(nll / positions, teacher_nll / positions, kl)


@torch.no_grad()
def _sums(head: Head, states: Tensor, own: Tensor, following: Tensor) -> list[float]:
    """Sums over positions: the losses by ``states`` [n, D] and by the teacher's ``own``, and the
    divergence of the first from the second."""
    total = torch.zeros(3, dtype=torch.float64)
    size = max(CHUNK_BYTES // (16 * head.vocab_size), 1)
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        theirs, ours = (
            head(x[part].to(head.weight.dtype)).float().log_softmax(-1) for x in (states, own)
        )
        at = following[part, None]
        total += (
            torch.stack(
                [
                    -theirs.gather(1, at).sum(),
                    -ours.gather(1, at).sum(),
                    (ours.exp() * (ours - theirs)).sum(),
                ]
            )
            .double()
            .cpu()
        )
    return total.tolist()
