"""Which data a run trains on, kept in its directory, so that it never goes on with other data under the same name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_json

FILE_NAME = "data.json"


def keep_data_record(directory: Path, data: ShardDataset, *, resumed: bool, writes: bool) -> None:
    """Compare the data with what the run began with, or write that down: samples, fingerprint, what was skipped.

    Args:
        directory: of the run.
        data: what it trains on.
        resumed: the run goes on from a checkpoint, whose step is a position in this data.
        writes: whether this rank writes the file.

    Raises:
        CordError: a resumed run would see other samples, or the same in another order.
    """
    path = directory / FILE_NAME
    if resumed and path.is_file():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            samples, fingerprint = begun["samples"], begun["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise CordError(f"{path} is damaged ({error}); delete it if data.train is as it was") from None
        if (samples, fingerprint) != (len(data), data.fingerprint):
            raise CordError(
                f"data.train has {len(data)} usable samples ({data.fingerprint}), but the run began with {samples} "
                f"({fingerprint}): its steps "
                "would be others than those of its seed. Restore the data, or begin a run in another output_dir "
                f"({path} lists what was skipped)"
            )
    elif writes:
        content = {
            "samples": len(data),
            "fingerprint": data.fingerprint,
            "skipped": [asdict(item) for item in data.skipped],
        }
        write_json(path, content)
