"""A small share of the campaign, of every part that needs whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from campaign.caches import kill_pairs, kill_readers, kill_writers
from campaign.damage import DAMAGE, damage_every_file
from campaign.disk import fail_once
from campaign.kills import kill_at_random
from campaign.report import Promise
from campaign.runs import CONFIGURATIONS, Workshop
from campaign.soak import soak

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("workshop"), patch.setattr)
    torch.set_num_threads(threads)


def test_killed_runs_resume_to_the_same_bits(workshop: Workshop, tmp_path: Path) -> None:
    names = list(CONFIGURATIONS)[:1]
    promise = Promise("").add(kill_at_random(workshop, tmp_path, kills=6, names=names))
    assert promise.inflicted == 6 and not promise.examples


@pytest.mark.slow
def test_a_disk_that_refuses_once_costs_nothing(workshop: Workshop, tmp_path: Path) -> None:
    promise = Promise("").add(fail_once(workshop, tmp_path, share=0.01))
    assert promise.inflicted >= 3 and not promise.examples


def test_damaged_files_are_never_used(workshop: Workshop, tmp_path: Path) -> None:
    promise = Promise("").add(damage_every_file(workshop, tmp_path, share=0.01))
    assert promise.inflicted >= 3 and len(DAMAGE) == 8 and not promise.examples


@pytest.mark.slow
def test_a_long_run_needs_no_more_than_a_short_one(workshop: Workshop, tmp_path: Path) -> None:
    promise = Promise("").add(soak(workshop, tmp_path, steps=100))
    assert promise.inflicted == 100 and not promise.examples


@pytest.mark.slow
def test_caches_killed_and_begun_again_have_the_same_bits(
    workshop: Workshop, tmp_path: Path
) -> None:
    promise = Promise("").add(kill_writers(workshop, tmp_path, kills=4, real=False))
    assert promise.inflicted >= 4 and not promise.examples


@pytest.mark.slow
def test_killed_runs_from_a_cache_resume_to_the_same_bits(
    workshop: Workshop, tmp_path: Path
) -> None:
    promise = Promise("").add(kill_readers(workshop, tmp_path, kills=2))
    assert promise.inflicted >= 2 and not promise.examples


@pytest.mark.slow
def test_a_killed_teacher_or_student_changes_no_bit(workshop: Workshop, tmp_path: Path) -> None:
    promise = Promise("").add(kill_pairs(workshop, tmp_path, kills=3))
    assert promise.inflicted >= 3 and not promise.examples


@pytest.mark.slow
def test_real_processes_that_are_killed_change_no_bit_of_a_cache(
    workshop: Workshop, tmp_path: Path
) -> None:
    promise = Promise("").add(kill_writers(workshop, tmp_path, kills=50, seed=1))
    assert promise.inflicted >= 50 and not promise.examples


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_readers, kill_pairs])
def test_many_killed_readers_of_caches_change_no_bit(
    workshop: Workshop, tmp_path: Path, kill: Any
) -> None:
    promise = Promise("").add(kill(workshop, tmp_path, kills=50, seed=1))
    assert promise.inflicted >= 50 and not promise.examples


@pytest.mark.slow
def test_a_loss_is_counted(workshop: Workshop, tmp_path: Path) -> None:
    """A checkpoint that is believed without being verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sad.checkpoint.store._verify_hash", lambda *_: None)
        only = ["model.safetensors"]
        damage = damage_every_file(workshop, tmp_path, names=only, ways=["a bit flipped"])
        promise = Promise("").add(damage)
    assert promise.lost and promise.examples
