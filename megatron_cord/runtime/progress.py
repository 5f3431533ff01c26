"""Progress bars on the console that log lines share: a line scrolls above the bars of its process."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from megatron_cord.runtime import log


class Bars(Progress):
    """Rich's Progress on standard error, drawn on a terminal alone, which log records make way for.

    Args:
        columns: rich's columns.
        enabled: False draws nothing, for ranks other than the first.
        console: another console; tests use it.
    """

    def __init__(
        self, *columns: str | ProgressColumn, enabled: bool = True, console: Console | None = None, **options: Any
    ) -> None:
        console = console or Console(stderr=True)
        super().__init__(*columns, console=console, disable=not (enabled and console.is_terminal), **options)

    def start(self) -> None:
        """Draw the bars from now on."""
        super().start()
        if not self.disable:
            log.live_consoles.append(self.console)

    def stop(self) -> None:
        """Leave the bars as they are."""
        with contextlib.suppress(ValueError):
            log.live_consoles.remove(self.console)
        super().stop()
