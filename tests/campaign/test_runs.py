"""A small share of the campaign, of every part that needs whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


def test_a_disk_that_refuses_once_costs_nothing(workshop: Workshop, tmp_path: Path) -> None:
    promise = Promise("").add(fail_once(workshop, tmp_path, share=0.01))
    assert promise.inflicted >= 3 and not promise.examples


def test_damaged_files_are_never_used(workshop: Workshop, tmp_path: Path) -> None:
    promise = Promise("").add(damage_every_file(workshop, tmp_path, share=0.01))
    assert promise.inflicted >= 3 and len(DAMAGE) == 8 and not promise.examples


def test_a_long_run_needs_no_more_than_a_short_one(workshop: Workshop, tmp_path: Path) -> None:
    promise = Promise("").add(soak(workshop, tmp_path, steps=100))
    assert promise.inflicted == 100 and not promise.examples


def test_a_loss_is_counted(workshop: Workshop, tmp_path: Path) -> None:
    """A checkpoint that is believed without being verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sad.checkpoint.store._verify_hash", lambda *_: None)
        only = ["model.safetensors"]
        damage = damage_every_file(workshop, tmp_path, names=only, ways=["a bit flipped"])
        promise = Promise("").add(damage)
    assert promise.lost and promise.examples
