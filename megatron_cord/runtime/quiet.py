"""Keep transformers' own progress bars off the terminal: each rank would draw one, across the run's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off for a block."""
    from transformers.utils import logging  # takes seconds to import, so only where a model is loaded anyway

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
