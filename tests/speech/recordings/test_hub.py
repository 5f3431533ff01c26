"""A data set of the hub, streamed from a server that stands for it by the command that a user types."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from megatron_cord.data.shards.reader import ShardDataset
from tests.speech.recordings.fake_hub import COMMIT, FakeHub
from tests.speech.recordings.made import rejects, voice
from tests.tiny_run import ROOT

SECOND = "data/train-00001-of-00002.parquet"


#: What `datasets` writes into the schema of a file, and reads from it: which columns hold recordings.
FEATURES = {"audio": {"_type": "Audio"}, "sentence": {"dtype": "string", "_type": "Value"}}


def parquet(start: int, count: int) -> bytes:
    """Return a file of rows whose recordings are a column of the type Audio."""
    rows = []
    for number in range(start, start + count):
        sound = io.BytesIO()
        soundfile.write(sound, voice(0.3 + 0.05 * (number % 5), 8000, seed=number), 8000, format="WAV")
        rows.append({"audio": {"bytes": sound.getvalue(), "path": f"{number}.wav"}, "sentence": f"Number {number}?"})
    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {
        "data/train-00000-of-00002.parquet": parquet(0, 10),
        SECOND: parquet(10, 7),
        "data/test-00000-of-00001.parquet": parquet(90, 2),
    }


def flac(number: int) -> bytes:
    sound = io.BytesIO()
    soundfile.write(sound, voice(0.5, 22050, seed=number), 22050, format="FLAC")
    return sound.getvalue()


def shards(hub: FakeHub, home: Path, *arguments: str) -> tuple[int, str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_cord.cli", "shards", "--from", "hf://lab/speech", *arguments]
    command += ["--fields", "question=sentence", "--shard-size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_streamed_set_goes_on_where_the_hub_failed(files: dict[str, bytes], tmp_path: Path) -> None:
    """Would catch rows that are lost or doubled where reading goes on, and a split that is guessed."""
    with FakeHub("lab/speech", files) as hub:
        status, said = shards(hub, tmp_path / "home", "--output", str(tmp_path / "set"))
        assert status == 2 and "hf://lab/speech has several splits; choose with --split: test, train" in said
        hub.broken.add(SECOND)
        arguments = ("--split", "train", "--output", str(tmp_path / "set"))
        status, said = shards(hub, tmp_path / "home", *arguments)
        assert status == 2 and "what is complete is kept: call again when the hub is well" in said, said
        kept = len(list((tmp_path / "set").glob("*.tar")))
        assert kept == 2 and not (tmp_path / "set" / "manifest.json").exists()
        hub.broken.clear()
        status, said = shards(hub, tmp_path / "home", *arguments)
        assert status == 0 and "17 samples" in said, said
    dataset = ShardDataset(tmp_path / "set")
    assert dataset.ids == [f"row-{i + 1}" for i in range(17)]
    for index in range(17):
        sample = dataset[index]
        assert sample.question == f"Number {index}?"
        assert len(sample.waveform) == pytest.approx((0.3 + 0.05 * (index % 5)) * 16000, abs=1)
    source = json.loads((tmp_path / "set" / "manifest.json").read_text())["source"]
    assert (source["revision"], source["split"]) == (COMMIT, "train")


def test_rows_name_files_of_the_set_and_no_others(tmp_path: Path) -> None:
    """Would catch a file of this machine, or of another server, that a published set has put into a user's shards."""
    outside = ["/etc/hostname", "../x.flac", "file:///etc/hostname", "http://127.0.0.1:1/x.flac", "zip://a::file:///x"]
    outside += ["zip://a::rows", f"file:///etc/hostname::hf://datasets/lab/speech@{COMMIT}/rows.jsonl"]
    paths = ["clips/one 1.flac", "clips/none.flac", *outside]
    rows = [{"audio": path, "sentence": f"Where is {number}?"} for number, path in enumerate(paths)]
    card = b"---\nconfigs:\n- config_name: default\n  data_files: rows.jsonl\n---\n"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with FakeHub("lab/speech", {"README.md": card, "rows.jsonl": lines, "clips/one 1.flac": flac(1)}) as hub:
        status, said = shards(hub, tmp_path / "home", "--output", str(tmp_path / "set"), "--max-rejects", "1")
    assert status == 0 and "1 samples" in said, said
    reasons = rejects(tmp_path / "set")
    assert reasons.pop("row-2").startswith("its file is missing")
    assert len(reasons) == len(outside) and all("lies outside of the set" in reason for reason in reasons.values())
