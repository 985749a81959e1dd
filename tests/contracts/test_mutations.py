"""Every fault of the bank turns the tests red that guard against it; without it they are green.

The table is in ``tests/mutations``. Each run of the suite checks that its faults can be planted and
that the tests which must see them belong to the default set; to plant them takes minutes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from mutations import BANK, MUTATIONS, ONLY_ON_A_GPU, Unseen
from mutations.planting import (
    ROOT,
    Edit,
    Mutation,
    collected,
    complaints,
    outcome_of,
    unnoticed,
)
from sad_kernels._dispatch import HAS_TRITON


def test_every_fault_can_be_planted() -> None:
    """Otherwise the code has changed, and the entry must follow."""
    found = [f"{m.row}, {m.fault}: {text}" for m in MUTATIONS for text in complaints(m)]
    assert not found, "\n".join(found)


def test_every_row_is_planted_in_every_place() -> None:
    needed = {(row, place) for row, (_, places) in BANK.items() for place in places}
    planted = {(m.row, place) for m in MUTATIONS for place in m.places}
    assert planted == needed


def test_every_fault_is_planted_once() -> None:
    names = [f"{m.row} {m.fault}" for m in MUTATIONS]
    assert len(names) == len(set(names))
    assert all(m.red for m in MUTATIONS)


@pytest.mark.parametrize("unseen", ONLY_ON_A_GPU, ids=lambda unseen: unseen.row)
def test_what_no_cpu_shows_has_a_test_on_a_gpu(unseen: Unseen) -> None:
    path, _, test = unseen.test.partition("::")
    assert unseen.row in BANK and f"def {test}(" in (ROOT / path).read_text()


def runnable(mutation: Mutation) -> bool:
    return HAS_TRITON or not mutation.needs_triton


GUARDS = sorted({node_id for m in MUTATIONS for node_id in m.red if runnable(m)})
FILES = sorted({node_id.partition("::")[0] for node_id in GUARDS})


def test_every_guard_runs_by_default() -> None:
    """A guard that is slow, renamed or gone would leave its fault to be found by nobody."""
    default_set = collected({*FILES, SLOW_TEST.partition("::")[0]})
    assert set(GUARDS) <= default_set, "\n".join(sorted(set(GUARDS) - default_set))
    assert SLOW_TEST not in default_set and SLOW_TEST.partition("::")[2] in globals()


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_without_a_fault_the_guards_are_green(file: str) -> None:
    """In a copy as well, so that what is red there is red because of what was planted."""
    guards = [node_id for node_id in GUARDS if node_id.startswith(f"{file}::")]
    status, failures, said = outcome_of(guards, None)
    assert status == 0 and len(failures) == len(guards), said
    assert not any(failures.values()), said


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, id=f"{m.row} {m.fault}") for m in MUTATIONS if runnable(m)],
)
def test_a_planted_fault_turns_its_guards_red(mutation: Mutation) -> None:
    status, failures, said = outcome_of(mutation.red, mutation)
    missed = unnoticed(mutation, failures)
    assert not missed, "\n".join([*missed, said])
    assert status == 1, said


# --- That this could fail ------------------------------------------------------------------------

HARMLESS = Mutation(
    "1",
    "a comment has another word",
    (Edit("kernels/sad_kernels/reference.py", "# the first of equal logits", "# the left one"),),
    ("tests/sad_kernels/test_ce.py::test_by_hand[reference]",),
)
SLOW_TEST = "tests/contracts/test_mutations.py::test_a_fault_that_only_crashes_is_reported"


@pytest.mark.slow
def test_a_fault_that_changes_nothing_is_reported() -> None:
    status, failures, _ = outcome_of(HARMLESS.red, HARMLESS)
    assert status == 0
    assert unnoticed(HARMLESS, failures) == [f"{HARMLESS.red[0]}: passed"]


@pytest.mark.slow
def test_a_fault_that_only_crashes_is_reported() -> None:
    """A name that does not exist turns tests red too, and proves nothing."""
    edit = replace(HARMLESS.edits[0], before="    ce = -(a *", after="    oops\n    ce = -(a *")
    mutation = replace(HARMLESS, edits=(edit,))
    status, failures, _ = outcome_of(mutation.red, mutation)
    assert status == 1
    assert unnoticed(mutation, failures)[0].startswith(f"{mutation.red[0]}: NameError")


def test_a_text_that_is_gone_or_not_unique_is_reported() -> None:
    for before in ("no such text", "import"):
        edit = replace(HARMLESS.edits[0], before=before)
        assert "must find once" in complaints(replace(HARMLESS, edits=(edit,)))[0]


def test_a_fault_that_is_no_python_is_reported() -> None:
    edit = replace(HARMLESS.edits[0], after="\n    ((")
    assert "leaves" in complaints(replace(HARMLESS, edits=(edit,)))[0]


def test_tests_that_did_not_run_are_reported() -> None:
    assert unnoticed(HARMLESS, {}) == [f"{HARMLESS.red[0]}: did not run"]
