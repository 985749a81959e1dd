"""Libraries are silent inside and as talkative as before outside."""

from __future__ import annotations

import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from sad.environment import HUB, processes, quiet_libraries


def test_the_hubs_attempts_are_not_announced(caplog: pytest.LogCaptureFixture) -> None:
    attempt = logging.getLogger("huggingface_hub.utils._http")
    with quiet_libraries():
        attempt.warning("Retrying in 1s [Retry 1/5].")
        attempt.error("gone wrong")
    attempt.warning("after")
    assert [r.message for r in caplog.records] == ["gone wrong", "after"]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_what_was_set_before_comes_back(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    monkeypatch.setattr(HUB, "level", level)
    with pytest.raises(KeyError), quiet_libraries():
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    assert HUB.level == level
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before


def test_blocks_that_overlap_leave_what_was_set_before() -> None:
    """A checkpoint is written in a thread while the other loads a tokenizer."""
    before = HUB.level, transformers_logging.get_verbosity(), list(warnings.filters)
    first, second = quiet_libraries(), quiet_libraries()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert HUB.level == logging.ERROR
    second.__exit__(None, None, None)
    assert (HUB.level, transformers_logging.get_verbosity(), list(warnings.filters)) == before


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_loading_are_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers_logging.enable_progress_bar()
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with quiet_libraries(show_bars=True):
        assert transformers_logging.is_progress_bar_enabled() == terminal
    with quiet_libraries():
        assert not transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("rank", "size", "found"),
    [
        ("1", "2", (1, 2)),
        ("0", "0", (0, 1)),
        ("", "", (0, 1)),
        ("x", "-2", (0, 1)),
        ("1", "", (0, 1)),  # alone, whatever is left in the environment
        ("5", "2", (0, 2)),
    ],
)
def test_processes(
    rank: str, size: str, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert processes() == found
