"""A run whose data is damaged goes on without it, says so, and never goes on with other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import finalize
from tests.tiny_run import losses, make_run, overrides


def run(inputs: Path, output: Path, *settings: str) -> None:
    try:
        make_run(overrides(inputs, output, *settings))
    finally:
        finalize()


def test_a_damaged_shard_within_the_bound(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches skipping that is not said or kept, steps that depend on the number of workers.

    Also a resumed run on mended data.
    """
    data = shutil.copytree(inputs / "train", tmp_path / "train")
    shard = data / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    damaged = (f"data.train={data}", "data.max_skipped=0.3", "data.augmentation.noise=0.5")
    run(inputs, tmp_path / "a", *damaged, "data.workers=2", "train.steps=2")
    assert "samples of data.train cannot be used and are skipped; see" in "".join(capsys.readouterr())
    record = json.loads((tmp_path / "a" / "data.json").read_text())
    skipped = sum(item["samples"] for item in record["skipped"])
    assert record["samples"] + skipped == 10 and 1 <= skipped <= 3
    assert "shard-000001.tar is truncated" in record["skipped"][-1]["message"]
    run(inputs, tmp_path / "a", *damaged, "train.steps=3")
    run(inputs, tmp_path / "b", *damaged, "data.workers=0", "train.steps=3", "checkpoint.interval=0")
    assert losses(tmp_path / "a")[:2] == losses(tmp_path / "b")[:2]
    shard.write_bytes(whole)
    with pytest.raises(CordError, match=r"data\.train has 10 usable samples .* but the run began with"):
        run(inputs, tmp_path / "a", f"data.train={data}", "train.steps=4")
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CordError, match=r"samples cannot be used, more than max_skipped=0\.05"):
        run(inputs, tmp_path / "c", f"data.train={data}", "data.max_skipped=0.05")
