"""Spoken sets: nothing held out is in training, and a set is made once and the same every time."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from examples.quickstart.questions import all_problems, questions_about, split_problems
from examples.quickstart.spoken_sums import HELD_OUT_VOICES, SPLITS, TRAINING_VOICES, SynthesisConfig, synthesize
from megatron_cord.data.shards.manifest import Manifest
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizers.espeak import EspeakSynthesizer
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, Voice


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardDataset]:
    directory = tmp_path_factory.mktemp("sets")
    for split in SPLITS:
        synthesize(SynthesisConfig(split, count=60, shard_size=25), directory / split)
    return {split: ShardDataset(directory / split) for split in SPLITS}


def test_held_out_problems_and_voices_are_never_heard(sets: dict[str, ShardDataset]) -> None:
    """Would catch a leak of problems or voices from the evaluation into training or warm-up."""
    held_out = {question.text for question in questions_about(split_problems(0).held_out)}
    for split, dataset in sets.items():
        samples = [dataset[index] for index in range(len(dataset))]
        assert len(samples) == 60 and samples[7].id == f"{split}-000007"
        assert {sample.question in held_out for sample in samples} == {split == "heldout"}
        voices = HELD_OUT_VOICES if split == "heldout" else TRAINING_VOICES
        assert Counter(sample.voice for sample in samples) == dict.fromkeys(voices, 60 // len(voices))
        assert all(sample.solution and sample.answer and sample.solution.endswith(sample.answer) for sample in samples)


def test_warmup_is_not_the_beginning_of_train(sets: dict[str, ShardDataset]) -> None:
    """Would catch warm-up transcripts that give away the first prompts of training."""
    first, second = (
        [(sets[split][index].question, sets[split][index].voice) for index in range(60)]
        for split in ("train", "warmup")
    )
    assert first != second


def test_no_voice_is_in_training_and_evaluation() -> None:
    """Would catch a voice in both lists."""
    assert not set(TRAINING_VOICES) & set(HELD_OUT_VOICES)


def test_made_again_bit_for_bit(tmp_path: Path) -> None:
    """Would catch a set that depends on the day, or on what the process spoke before."""
    config = SynthesisConfig("train", count=60, seed=4)
    assert synthesize(config, tmp_path / "a") == synthesize(config, tmp_path / "b")
    other = synthesize(replace(config, seed=5), tmp_path / "c")
    assert other.shards != Manifest.read(tmp_path / "a").shards


def test_twice_does_nothing_and_other_arguments_are_refused(tmp_path: Path) -> None:
    """Would catch minutes lost on a set that is there, and a set of other arguments."""
    config = SynthesisConfig("warmup", count=3)
    manifest = synthesize(config, tmp_path)
    before = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    assert synthesize(config, tmp_path) == manifest
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == before
    with pytest.raises(CordError, match="count = 3, not 4; delete it"):
        synthesize(replace(config, count=4), tmp_path)


def test_an_interrupted_set_is_begun_anew(tmp_path: Path) -> None:
    """Would catch a half-made set that stays half-made, or that differs from one made at once."""

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    config = SynthesisConfig("train", count=60, shard_size=10)
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, tmp_path / "a", progress=interrupt)
    assert list((tmp_path / "a").glob("*.tar")) and not (tmp_path / "a" / "manifest.json").exists()
    assert synthesize(config, tmp_path / "a") == synthesize(config, tmp_path / "b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SynthesisConfig("train", count=0), "count is 0"),
        (SynthesisConfig("train", count=1, seed=-1), "seed is -1"),
        (SynthesisConfig("train", count=1, shard_size=0), "shard_size is 0"),
        (SynthesisConfig("test", count=1), "split is 'test'"),  # type: ignore[arg-type]
        (SynthesisConfig("train", count=1, max_seconds=0.5), "train-000000: .* needs .* s for .*max_seconds is 0.5"),
    ],
)
def test_impossible_sets_are_refused(tmp_path: Path, config: SynthesisConfig, message: str) -> None:
    """Would catch utterances cut by the encoder's window, and empty sets."""
    with pytest.raises(CordError, match=message):
        synthesize(config, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_the_longest_question_fits_the_window() -> None:
    """Would catch a phrasing or a voice beyond the tiny encoder's window of 2.56 s."""
    texts = sorted((question.text for question in questions_about(all_problems())), key=len)[-6:]
    recordings = EspeakSynthesizer().speak(
        [Utterance(text, Voice(name)) for text in texts for name in TRAINING_VOICES + HELD_OUT_VOICES]
    )
    assert max(map(len, recordings)) / SAMPLING_RATE <= 2.56


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a command that does not start, or that shows tracebacks for a user's mistake."""

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["spoken_sums", "--output", str(tmp_path / "set"), *arguments])
        monkeypatch.delitem(sys.modules, "examples.quickstart.spoken_sums", raising=False)
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module("examples.quickstart.spoken_sums", run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    status, output, _ = call("heldout", "--count", "8", "--seed", "1")
    assert status == 0 and "8 utterances" in output
    assert len(ShardDataset(tmp_path / "set")) == 8
    status, _, errors = call("train", "--count", "8")
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert "split = 'heldout', not 'train'" in errors
