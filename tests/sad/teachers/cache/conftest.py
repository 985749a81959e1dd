"""One small teacher, its text, and caches of its targets, made once for all tests here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.caches import config_in, make_cache
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.config.schema import DistillConfig


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cached")
    return {
        "teacher": save_tiny(folder / "teacher", tiny_llama(seed=1, vocab_size=520)),
        "student": save_tiny(folder / "student", tiny_llama(seed=2)),
        "data": {
            "train": write_texts(folder / "texts", count=4),
            "eval_fraction": 0.3,
            "cache_dir": str(folder / "rows"),
        },
    }


@pytest.fixture
def make_config(sources: dict[str, Any], tmp_path: Path) -> Callable[..., DistillConfig]:
    return lambda **overrides: config_in(sources, tmp_path, **overrides)


@pytest.fixture(scope="session")
def caches(sources: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of each kind, of the same teacher, text and objective. All hold every row but that of
    top-k targets, which holds those that the run reads."""
    folder = tmp_path_factory.mktemp("caches")
    config = config_in(sources, folder)
    made = {
        "sampled": make_cache(config, folder / "sampled", all_rows=True),
        "topk": make_cache(config, folder / "topk", "topk"),
    }
    for codec in ("bf16", "int8"):
        options: dict[str, Any] = {"codec": codec, "all_rows": True}
        made[codec] = make_cache(config, folder / codec, "hidden", **options)
    return made
