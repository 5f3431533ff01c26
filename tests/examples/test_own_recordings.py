"""The example of own recordings: files of five kinds through the commands of its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from examples.own_recordings.recordings import COUNTS, DEVICES, write_recordings
from examples.own_recordings.run import shard_commands
from megatron_cord.cli import main as cli
from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.shards.reader import ShardDataset
from tests.tiny_run import ROOT


def test_sixty_recordings_become_shards(tmp_path: Path) -> None:
    """Would catch a format, a rate or a name that the command cannot read, and a recording that is left out."""
    rows = [json.loads(line) for file in write_recordings(tmp_path) for line in file.read_text().splitlines()]
    headers = [soundfile.info(tmp_path / row["audio"]) for row in rows]
    assert len(rows) == sum(COUNTS.values()) == 60
    assert {(h.samplerate, h.channels, h.subtype) for h in headers} == {
        (d.rate, d.channels, d.subtype) for d in DEVICES
    }
    assert any(" " in row["audio"] and not row["audio"].isascii() for row in rows)
    for command in shard_commands(tmp_path):
        assert cli.invoke(cli.cord, command, "cord") == 0
    for split, count in COUNTS.items():
        dataset = ShardDataset(tmp_path / "data" / split)
        assert len(dataset) == count and not (tmp_path / "data" / split / "rejects.jsonl").read_text()
        row = next(row for row in rows if row["id"] == dataset[3].id)
        assert dataset[3].question == row["question"]
        assert len(dataset[3].waveform) == len(decode_audio((tmp_path / row["audio"]).read_bytes(), "file"))


@pytest.mark.slow
def test_from_files_to_an_exported_model(tmp_path: Path) -> None:
    """Would catch a step of the page whose command does not take what the one before it made."""
    command = [sys.executable, "-m", "examples.own_recordings.run", "--root", str(tmp_path / "own")]
    prepared = subprocess.run(
        [*command, "--prepare"], capture_output=True, text=True, cwd=ROOT, timeout=300, check=True
    )
    assert "$ cord" not in prepared.stdout and (tmp_path / "own" / "checkpoint" / "model.safetensors").is_file()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ cord")] == [
        "shards", "shards", "train", "evaluate", "convert",
    ]  # fmt: skip
    assert (tmp_path / "own" / "exported" / "model.safetensors").is_file()
    assert (tmp_path / "own" / "run" / "report.html").is_file()
    result = json.loads((tmp_path / "own" / "run" / "summary.json").read_text())
    assert result["seconds"] > 0
