"""The source that a path or an address is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cord.data.hub_rows import PREFIX
from megatron_cord.data.saved_datasets import is_saved_dataset
from megatron_cord.errors import CordError
from megatron_cord.speech.recordings.config import RecordingSetConfig
from megatron_cord.speech.recordings.sources.cuts import CutRows, holds_cuts
from megatron_cord.speech.recordings.sources.files import FileRows
from megatron_cord.speech.recordings.sources.hub import HubRows
from megatron_cord.speech.recordings.sources.source import Source
from megatron_cord.speech.recordings.sources.tars import TarRows, find_tars, is_tar


def open_source(config: RecordingSetConfig, begun: Mapping[str, Any] | None = None) -> Source:
    """Return the configured source.

    Args:
        config: of the set.
        begun: the plan of a set that is taken up again.

    Raises:
        CordError: there is none, or it is of no kind that can be read.
    """
    if config.source.startswith(PREFIX):
        same = begun is not None and begun.get("from") == config.source
        commit = begun.get("revision") if begun is not None and same else None
        return HubRows(config.source, config.split, config.subset, commit)
    for name, value in (("split", config.split), ("subset", config.subset)):
        if value is not None:
            raise CordError(f"--{name} {value} is for a set on the hub, hf://OWNER/NAME; {config.source} has none")
    path = Path(config.source)
    if is_tar(path):
        return TarRows(config.source)
    if not path.exists():
        raise CordError(
            f"{path}: no such file or directory; give rows (.jsonl, .parquet, a saved data set), lhotse's cuts, tars, "
            "or hf://OWNER/NAME"
        )
    if holds_cuts(path):
        return CutRows(path)
    if path.is_dir() and not is_saved_dataset(path) and not any(path.glob("*.parquet")) and find_tars(config.source):
        return TarRows(config.source)
    return FileRows(path)
