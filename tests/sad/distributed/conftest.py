"""Models and text for runs on several ranks, made once; nothing that only decorates a run."""

from __future__ import annotations

import pytest
from support.rank_runs import Material, make_material

from sad.report import page
from sad.training import run as run_module


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and predictions of memory are most of a tiny run's time, and not what is tested."""
    monkeypatch.setattr(page, "_draw_plots", lambda run_dir: None)
    monkeypatch.setattr(run_module, "predicted_peak", lambda *_: None)
