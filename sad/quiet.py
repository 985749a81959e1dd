"""Libraries that talk while they work, held back: what a user sees is said by this program."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

HUB = logging.getLogger("huggingface_hub")
"""It announces each of its attempts to reach the network; the last one fails with an error."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back progress bars of transformers, and all that it and the Hub's client log below
    errors."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_level = HUB.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    HUB.setLevel(logging.ERROR)
    try:
        yield
    finally:
        HUB.setLevel(hub_level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
