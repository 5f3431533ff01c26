"""Written questions become shards: resumed after kills, refused on other arguments, and complete with their rejects."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.runtime import entry
from megatron_cord.runtime.exit_status import STOPPED
from megatron_cord.speech.shard_set import worker_context
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from tests.speech.questions import write_questions


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for p in directory.iterdir()
        if p.suffix in {".tar", ".jsonl"} or p.name == "manifest.json"
    }


def make_in_own_session(config: SpokenSetConfig, output: Path, workers: int) -> None:
    os.setsid()  # its workers are killed with it
    make_spoken_set(config, output, workers=workers)


@pytest.mark.parametrize(
    ("count", "shard_size", "workers"), [(60, 6, 1), pytest.param(2000, 64, 2, marks=pytest.mark.slow)]
)
def test_killed_twice_ends_as_one_identical_set(tmp_path: Path, count: int, shard_size: int, workers: int) -> None:
    """Would catch a resumed set that lacks, doubles or changes a sample, and workers that take part in its content."""
    questions = write_questions(tmp_path / "q.jsonl", count)
    config = SpokenSetConfig(str(questions), shard_size=shard_size, slowest=0.9, fastest=1.3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make_spoken_set(config, whole)
    for finished in (2, 5):
        process = worker_context(make_spoken_set.__module__).Process(
            target=make_in_own_session, args=(config, broken, workers)
        )
        process.start()
        deadline = time.monotonic() + 240
        while (
            len(list(broken.glob("*.receipt.json"))) < finished and process.is_alive() and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        assert not (broken / "manifest.json").exists()
    make_spoken_set(config, broken, workers=2)
    assert shard_bytes(broken) == shard_bytes(whole)
    assert not list(broken.glob(".*.partial"))
    dataset = ShardDataset(broken)
    assert dataset.ids == [f"q{i}" for i in range(count)]
    assert dataset[7].question == "What is 7 plus 2?" and dataset[7].answer == "9"
    (broken / "shard-000003.tar").unlink()  # lost later: the same call makes it again
    make_spoken_set(config, broken)
    assert shard_bytes(broken) == shard_bytes(whole)


def test_instructions_and_system_prompts_are_kept(tmp_path: Path) -> None:
    """Catches what is not spoken lost on its way into the shards."""
    row = {
        "id": "a",
        "question": "What is one plus two?",
        "instruction": "Be brief.",
        "system": "You add.",
        "answer": "3",
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    make_spoken_set(SpokenSetConfig(str(tmp_path / "q.jsonl")), tmp_path / "set")
    sample = ShardDataset(tmp_path / "set")[0]
    assert (sample.question, sample.instruction, sample.system) == (row["question"], row["instruction"], row["system"])


def stopped_in_own_session(config: SpokenSetConfig, output: Path, workers: int) -> None:
    os.setsid()  # Ctrl-C reaches its workers, too

    def main() -> None:
        make_spoken_set(config, output, workers=workers)

    sys.exit(entry.status_of(main))


@pytest.mark.parametrize(("workers", "count"), [(1, 200), pytest.param(2, 2000, marks=pytest.mark.slow)])
def test_ctrl_c_finishes_the_shards_in_work(tmp_path: Path, workers: int, count: int) -> None:
    """Catches a shard that is half-made, workers that are interrupted or stay, a traceback, a status of success."""
    questions = write_questions(tmp_path / "q.jsonl", count)
    config, broken = SpokenSetConfig(str(questions), shard_size=6), tmp_path / "broken"
    process = worker_context(make_spoken_set.__module__).Process(
        target=stopped_in_own_session, args=(config, broken, workers)
    )
    process.start()
    deadline = time.monotonic() + 240
    while len(list(broken.glob("*.receipt.json"))) < 2 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == STOPPED
    made = len(list(broken.glob("*.receipt.json")))
    assert 2 <= made < count // 6 and len(list(broken.glob("*.tar"))) == made
    assert not list(broken.glob(".*.partial")) and not (broken / "manifest.json").exists()
    make_spoken_set(config, broken, workers=workers)
    make_spoken_set(config, tmp_path / "whole")
    assert shard_bytes(broken) == shard_bytes(tmp_path / "whole")


def test_other_arguments_and_too_many_rejects_are_refused(tmp_path: Path) -> None:
    """Would catch a set mixed from two configurations, and one that is mostly missing."""
    questions = write_questions(tmp_path / "q.jsonl", 4)
    make_spoken_set(SpokenSetConfig(str(questions)), tmp_path / "set")
    with pytest.raises(CordError, match=r"other arguments \(seed\)"):
        make_spoken_set(SpokenSetConfig(str(questions), seed=1), tmp_path / "set")
    with questions.open("a") as file:
        file.write('{"question": "see http://example.org"}\n' * 3)
    with pytest.raises(
        CordError, match=r"3 of 7 questions were left out, most often because it contains an address \(3 times\)"
    ):
        make_spoken_set(SpokenSetConfig(str(questions)), tmp_path / "other")
    result = make_spoken_set(SpokenSetConfig(str(questions), max_rejects=0.5), tmp_path / "other")
    assert result.rejects == {"it contains an address": 3} and result.manifest.samples == 4


def test_noise_lies_under_a_share_of_the_recordings(tmp_path: Path) -> None:
    """Catches noise under all or none, at another level than the sample says, and noise that depends on the shard."""
    questions = write_questions(tmp_path / "q.jsonl", 40)
    clean, noisy, other = (tmp_path / name for name in ("clean", "noisy", "other"))
    make_spoken_set(SpokenSetConfig(str(questions)), clean)
    config = SpokenSetConfig(str(questions), noise=0.5, noise_snr=(10.0, 20.0))
    make_spoken_set(config, noisy)
    make_spoken_set(replace(config, shard_size=50), other)
    before, after, again = ShardDataset(clean), ShardDataset(noisy), ShardDataset(other)
    levels = {}
    for index in range(40):
        speech, recording = before[index].waveform, after[index].waveform
        assert np.array_equal(recording, again[index].waveform)
        if (snr := after[index].metadata.get("noise_snr")) is None:
            assert np.array_equal(recording, speech)
            continue
        scale = float(recording @ speech) / float(speech @ speech)  # what exceeds 1 is scaled down
        noise = recording / scale - speech
        levels[index] = 10 * np.log10(np.mean(speech**2) / np.mean(noise**2))
        power = np.abs(np.fft.rfft(noise)) ** 2
        low, high = (power[int(len(power) * a) : int(len(power) * b)].mean() for a, b in ((0.02, 0.1), (0.5, 0.9)))
        assert abs(levels[index] - snr) < 1.0 and low > 4 * high  # pink: power falls as 1/f
    assert 12 <= len(levels) <= 28 and min(levels.values()) < 13 < 17 < max(levels.values())
    with pytest.raises(CordError, match=r"noise_snr from 20 to 10 dB"):
        SpokenSetConfig(str(questions), noise=0.5, noise_snr=(20.0, 10.0))
    with pytest.raises(CordError, match=r"other arguments \(noise, noise_snr\)"):
        make_spoken_set(config, clean)


def test_enormous_and_empty_texts(tmp_path: Path) -> None:
    """Would catch a text of megabytes that reaches the synthesizer, and one without words."""
    file = tmp_path / "q.jsonl"
    texts = ["word " * 400_000, "   ", "?!", "What is one plus two?"]
    file.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    result = make_spoken_set(SpokenSetConfig(str(file), max_rejects=0.9), tmp_path / "set")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    assert result.manifest.samples == 1 and len(reasons) == 3
    assert any("characters, more than 2000" in reason for reason in reasons) and any(
        "no words" in reason for reason in reasons
    )


def test_recordings_are_refused_before_anything_is_spoken(tmp_path: Path) -> None:
    """Catches recordings replaced by a robot's voice, and a directory that is left behind by the refusal."""
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "What is two plus two?", "answer": "4", "audio": "clips/1.wav"}\n')
    with pytest.raises(CordError, match=r"line 1: its field 'audio' is a recording, which nothing uses here"):
        make_spoken_set(SpokenSetConfig(str(questions)), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    made = make_spoken_set(SpokenSetConfig(str(questions), ignore_fields=("audio",)), tmp_path / "set")
    assert made.manifest.samples == 1 and made.manifest.source["ignore_fields"] == ["audio"]


def test_an_address_or_directory_that_the_backend_does_not_use_is_refused() -> None:
    """Catches a set spoken by espeak-ng though its command names a speech server."""
    for more in ({"url": "http://127.0.0.1:9/v1"}, {"directory": "kokoro"}):
        with pytest.raises(
            CordError, match=r"is for the backend (openai|kokoro), not espeak; choose that or remove it"
        ):
            SynthesizerConfig(**more)  # type: ignore[arg-type]
