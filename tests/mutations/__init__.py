"""Faults that tests must notice, planted one at a time in a copy of the code.

A test that was never seen to fail proves nothing. So every fault that was found somewhere, here or
in other libraries, has a number in ``BANK``; the tests that guard against it carry the link to
where it was found; and it is planted here, by exact replacement of text, to see these very tests
turn red. ``tests/contracts/test_mutations.py`` does so in the slow suite.

If the text to be replaced is gone, the code has moved on and the entry must follow it, in the same
change. A fault that tests do not notice asks for a stronger test, never for another fault.

planting.py     the form of an entry, the copy, the run
torch_path.py   losses as torch computes them, and what both implementations share
triton_path.py  the kernels of the losses, their launchers and operators
ema.py          update and swap of a moving average
trainer.py      the package ``sad``
text.py         its documents, tokens and rows
runs.py         its runs as a whole
ranks.py        its runs on several processes
caches.py       its caches of a teacher's targets
other_tokenizer.py  its teachers with another tokenizer
reference.py    the specification and the rule that everything is judged by
"""

from __future__ import annotations

from typing import NamedTuple

from mutations import (
    caches,
    ema,
    other_tokenizer,
    ranks,
    reference,
    runs,
    text,
    torch_path,
    trainer,
    triton_path,
)
from mutations.planting import Mutation

MUTATIONS: list[Mutation] = [
    *torch_path.MUTATIONS,
    *triton_path.MUTATIONS,
    *ema.MUTATIONS,
    *trainer.MUTATIONS,
    *text.MUTATIONS,
    *runs.MUTATIONS,
    *ranks.MUTATIONS,
    *caches.MUTATIONS,
    *other_tokenizer.MUTATIONS,
    *reference.MUTATIONS,
]

BOTH = ("torch", "triton")

BANK: dict[str, tuple[str, tuple[str, ...]]] = {
    "1": ("p rounded before p - 1: peaked rows lose their gradient, random logits hide it", BOTH),
    "2": ("a gradient kept in 16 bits and scaled later: rounded twice", BOTH),
    "3": ("the upstream gradient of row 0, or of another place, used for every row", BOTH),
    "3b": ("an upstream gradient of stride 0 read past its end", BOTH),
    "4": ("ignored rows left unwritten", BOTH),
    "5": ("the caller's logits overwritten", BOTH),
    "6": ("the weight's gradient added up in 16 bits", BOTH),
    "7": ("a temporary as large as the weight for each chunk", BOTH),
    "8": ("offsets in 32 bits", ("triton",)),
    "9": ("more than 65535 programs on the second axis of a grid", ("triton",)),
    "10": ("a JSD of NaN where both probabilities underflow", BOTH),
    "11": ("a negative JSD beside a 16-bit teacher", BOTH),
    "12": ("a hidden factor on the CE, and a temperature applied to it", BOTH),
    "13": ("beta reversed", BOTH),
    "14": ("micro-batches divided by their own tokens, not by their window's", (*BOTH, "trainer")),
    "15": ("ignore_index unused, or ignored rows counted in the mean", BOTH),
    "16": ("a gradient of NaN from what an ignored row holds", BOTH),
    "17": ("a label outside the vocabulary that reads what is not there", BOTH),
    "18": ("a label that matches a padded column", BOTH),
    "19": ("labels that are not aligned or not dense; rows that do not touch", BOTH),
    "20": ("frozen parts and autocast: crashes, or 16-bit arithmetic", BOTH),
    "21": ("the head's gradient doubled where the head is tied or has a gradient", BOTH),
    "22": ("a reference that shares what is wrong, or is wrong itself", ("oracle",)),
    "23": ("vocabularies smaller than a tile", BOTH),
    "24": ("scalars in fp64 under compilers", ("triton",)),
    "25": ("evaluation and training that differ on the same batch", (*BOTH, "trainer")),
    "26": ("a self-test that passes broken kernels", ("trainer",)),
    "27": ("losses of rows in the dtype of the inputs", BOTH),
    "28": ("a log-probability above 0", BOTH),
    "29": ("the bias's gradient wrong", BOTH),
    "30": ("padded columns that count", BOTH),
    "31": ("whole tiles of -inf", BOTH),
    "32": ("a softcap or a scale accepted and dropped", BOTH),
    "33": ("a chunk heuristic that divides by 0", BOTH),
    "34": ("the sign of a moving average", BOTH),
    "35": ("a moving average in bf16, which never moves", (*BOTH, "trainer")),
    "36": ("tied weights averaged twice", ("trainer",)),
    "37": ("an average damaged by evaluation, or lost on resumption", (*BOTH, "trainer")),
    "38": ("a short last window mis-scaled or left out", ("trainer",)),
    "39": ("a learning rate stepped in the wrong unit", ("trainer",)),
    "40": ("random numbers that do not go on where they stopped", ("trainer",)),
    "41": ("another order of rows after a resumption", ("trainer",)),
    "42": ("a checkpoint that is half there, or a rename onto a full directory", ("trainer",)),
    "43": ("an update with a gradient of NaN beside a finite loss", ("trainer",)),
    "44": ("a top-k teacher's rest that underflows where the student is sure of an id", BOTH),
    "45": ("a mixture of student and teacher with the shares exchanged", BOTH),
    "46": ("attention maps soft-maxed twice", ("trainer",)),
    "47": ("structural losses averaged over micro-batches", ("trainer",)),
    "48": ("what structural losses and gates have learned, lost at a stop", ("trainer",)),
    "49": ("losses of weight 0 that are computed", ("trainer",)),
    "50": ("a call that goes past whoever listens to torch's operators", ("torch",)),
    "51": ("a new divergence that is left out of the sums without an error", ("torch",)),
    "52": ("a help text that waits for torch to be imported", ("trainer",)),
    "53": ("digits lost near agreement: differences of rounded numbers near 1", BOTH),
    "54": ("a top-k row of nothing but padding that has a divergence, or NaN", BOTH),
    "55": ("bf16 that is truncated", ("triton",)),
    "56": (
        "what is said of rows or classes that is left out, or read where it must not be",
        ("triton",),
    ),
    "57": ("a shard of the vocabulary that counts the columns of others, or keeps its own", BOTH),
    "58": ("outcomes of two tokenizers that are lost, or counted twice or by the wrong side", BOTH),
    "59": ("logits of 16 bits that are not those that the sums beside them are of", ("triton",)),
    "60": ("rows lost or repeated where a run goes on with other sizes", ("trainer",)),
    "61": ("an average that starts at weights the run has left long ago", ("trainer",)),
    "62": ("numbers that are not finite, under another name or under none", ("trainer",)),
    "63": ("a student whose ids mean other tokens than its text's", ("trainer",)),
    "64": ("experts that are trained without their family's balance", ("trainer",)),
    "70": ("special tokens around a text that no model was trained with", ("trainer",)),
    "71": ("targets in what is only context, or none where there should be", ("trainer",)),
    "72": ("conversations that are cut, or lost without a word", ("trainer",)),
    "73": ("a student that never stops", ("trainer",)),
    "74": ("packed rows that are taken for others", ("trainer",)),
    "80": ("a run ended by what decorates it", ("trainer",)),
    "81": ("what cannot work, found out after hours", ("trainer",)),
    "82": ("an export that is not the student that came", ("trainer",)),
    "83": ("a run that does not say where it goes on", ("trainer",)),
    "90": ("averaged weights that are scored with what was gathered of others", ("trainer",)),
    "91": ("a setting of one split module that is taken for one of all", ("trainer",)),
    "92": ("a reduction that a back end does not have", ("trainer",)),
    "93": ("ranks that do not take part in what all of them do", ("trainer",)),
    "94": ("sums of all ranks that each of them goes on with", ("trainer",)),
    "95": ("a loss divided by what one rank has", ("trainer",)),
    "96": ("a collective that torch is about to take away", ("torch",)),
    "97": ("samples that depend on how often a process was killed", ("trainer",)),
    "98": ("a damaged file of a cache that is trained from", ("trainer",)),
    "99": ("targets of other rows", ("trainer",)),
    "100": ("a teacher and a student that wait for one another", ("trainer",)),
    "101": ("mass beyond the ids taken at another temperature", ("trainer",)),
    "110": ("text of two tokenizers compared where it is not the same", ("trainer",)),
    "111": ("a teacher with another tokenizer that moves the optimum", ("trainer",)),
}
"""Number -> what broke, and the places where it must be seen to turn tests red."""


class Unseen(NamedTuple):
    """A fault that no CPU shows, and the test that shows it on a GPU."""

    row: str
    fault: str
    reason: str
    test: str  # file::name


ONLY_ON_A_GPU = (
    Unseen(
        "8",
        "an offset of 32 bits within the slab of one chunk",
        "2^31 numbers would have to be computed; few rows far apart, as planted here, are not one",
        "tests/sad_kernels/test_gpu.py::test_a_slab_past_2_31_elements",
    ),
    Unseen(
        "9",
        "a launch with rows on the second axis of its grid",
        "the interpreter knows no limit; what is planted here turns red because grids are noted",
        "tests/sad_kernels/test_gpu.py::test_seventy_thousand_rows",
    ),
    Unseen(
        "28",
        "a logit's scale that is fused with the subtraction of the maximum, e^remainder for 1",
        "the interpreter fuses nothing",
        "tests/sad_kernels/test_regressions.py::test_no_probability_exceeds_one",
    ),
)
