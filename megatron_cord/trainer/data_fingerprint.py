"""Which data a run trains on, kept in its directory and its checkpoints, so that it never goes on with other data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.runtime.files import write_json

FILE_NAME = "data.json"


def keep_data_record(directory: Path, data: ShardDataset, before: Mapping[str, Any], *, main: bool) -> dict[str, Any]:
    """Compare the data with what a checkpoint was trained on, and write down what it is and what was skipped.

    Args:
        directory: of the run.
        data: what it trains on.
        before: what this function returned to the run that wrote the checkpoint; empty for a new run.
        main: whether this is rank 0, which alone reads the shards for it and writes the file. Collective.

    Returns:
        samples and fingerprint.

    Raises:
        CordError: the run would see other samples, the same with other content, or in another order.
    """
    now: dict[str, Any] = broadcast_json({"samples": len(data), "fingerprint": data.fingerprint} if main else None)
    if before and before != now:
        what = (
            "other text, audio, answers or order"
            if before["samples"] == now["samples"]
            else f"{now['samples']} usable samples"
        )
        raise CordError(
            f"data.train has {what} ({now['fingerprint']}), but the run began with {before['samples']} usable samples "
            f"({before['fingerprint']}): its steps would be others than those of its seed. Restore the data, or begin "
            f"a run in another output_dir, with init_from for the weights ({directory / FILE_NAME} lists what was "
            "skipped)"
        )
    if main:
        write_json(directory / FILE_NAME, now | {"skipped": [asdict(item) for item in data.skipped]})
    return now
