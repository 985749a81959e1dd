"""Hidden states that vLLM exports, and the records that a cache holds of them.

vLLM's method ``extract_hidden_states`` with its ``ExampleHiddenStatesConnector`` writes a
safetensors file per request:

=================  ===================  ===========================================================
``hidden_states``  [n, layers, width]   in the model's dtype, those of layer ids that were asked for
``token_ids``      int64 [n]            the prompt
=================  ===================  ===========================================================

The id ``num_hidden_layers`` is that of the last decoder layer's output, *before* the model's final
norm; it must come last among those that are asked for. A cache holds states after the norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from sad.checkpoint.tensor_files import FileTensors
from sad.data.batch import Batch
from sad.errors import UnfitError, one_line
from sad.models.final_norm import FinalNorm
from sad.teachers.cache.facts import Kind
from sad.teachers.cache.forms import said_tensors
from sad.teachers.cache.hidden import Codec
from sad.teachers.cache.source import Record, on_host

HIDDEN, IDS = "hidden_states", "token_ids"

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int64, torch.int32)


class ExportedStates:
    """One file: n tokens, and the states of some layers at each of them.

    Raises ``UnfitError`` for a file that is damaged or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors = FileTensors(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UnfitError(
                f"{path} must be a whole safetensors file, got '{one_line(error)}'; export it again"
            ) from error
        self._require_forms()
        _, (self.length, self.layers, self.width) = self._tensors.form(HIDDEN)
        self.tokens: list[int] = self._tensors[IDS].tolist()

    def states(self, layer: int = -1) -> Tensor:
        """The states [n, width] of a layer, by its place among those exported; the last one's by
        default. Raises ``UnfitError`` unless all of them were computed, and are finite."""
        layer %= self.layers
        sizes = (self.length, 1, self.width)
        found = self._tensors.part(HIDDEN, (0, layer, 0), sizes)[:, 0]
        wrong = ~found.isfinite().all(1)
        if bool(wrong.any()):
            raise UnfitError(
                f"{self.path} must hold finite {HIDDEN}, got NaN or infinity at {int(wrong.sum())} "
                f"of {self.length:,} tokens, first at {int(wrong.nonzero()[0])}; export it again, "
                "in bfloat16, which does not overflow"
            )
        empty = ~found.any(1)
        if bool(empty.any()):
            raise UnfitError(
                f"{self.path} must hold {HIDDEN} of each token, got only zeros at "
                f"{int(empty.sum())} of {self.length:,} tokens, first at "
                f"{int(empty.nonzero()[0])}: they were not computed; export it again"
            )
        return found

    def require_width(self, width: int, teacher: str) -> None:
        """Raise ``UnfitError`` for states of another width than those of the teacher."""
        if self.width != width:
            raise UnfitError(
                f"{self.path} must hold {HIDDEN} of the teacher's width, {width}, got "
                f"{self.width}; export those of {teacher}, or name the teacher that they are of"
            )

    def _require_forms(self) -> None:
        forms = {}
        for name in (HIDDEN, IDS):
            try:
                forms[name] = self._tensors.form(name)
            except KeyError:  # not there, or of a dtype that is not read
                forms[name] = None, ()
        (float_type, shape), (integer_type, ids_shape) = forms[HIDDEN], forms[IDS]
        fits = float_type in FLOATS and integer_type in INTEGERS and len(ids_shape) == 1
        if not (fits and len(shape) == 3 and min(shape) > 0):
            raise UnfitError(
                f"{self.path} must hold {HIDDEN} [n, layers, width] of floating point and "
                f"{IDS} [n] of integers, as vLLM's ExampleHiddenStatesConnector writes them, got "
                f"{said_tensors(self._tensors)}; name a folder of such files"
            )
        if shape[0] != ids_shape[0]:
            raise UnfitError(
                f"{self.path} must hold {HIDDEN} of each token, got {shape[0]:,} and "
                f"{ids_shape[0]:,} {IDS}; export it again without prefix caching"
            )
        if shape[0] < 2:
            raise UnfitError(
                f"{self.path} must hold 2 tokens at least, got 1, which nothing follows; delete it"
            )


class ExportedSource:
    """Gives the records of a section's rows: row i is the document in file i of ``paths``."""

    def __init__(self, paths: Sequence[Path], norm: FinalNorm, codec: Codec) -> None:
        self._paths = paths
        self._norm = norm
        self._codec = codec

    def records(self, batch: Batch, kind: Kind, uniform: Tensor) -> Record:
        """As ``TeacherSource.records``; nothing is drawn."""
        assert batch.rows is not None
        paths = [self._paths[row] for row in batch.rows.tolist()]
        parts = [self._codec.encode(states) for states in input_states(paths, self._norm)]
        return on_host({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def input_states(paths: Sequence[Path], norm: FinalNorm) -> Iterator[Tensor]:
    """Final hidden states [n - 1, D] of each document: at its inputs, so not at its last token."""
    for path in paths:
        yield norm(ExportedStates(path).states()[:-1])
