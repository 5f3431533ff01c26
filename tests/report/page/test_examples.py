"""Which questions are shown, and their audio."""

from __future__ import annotations

import base64
import io
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.errors import CordError
from megatron_cord.report.page import examples
from megatron_cord.report.page.tokens import LEVELS, LIMITS, annotate
from megatron_cord.report.run.contents import Answer, Evaluation
from megatron_cord.report.run.reading import read_run
from tests.report.fixture import BROKEN, SAMPLES, VOICES


def evaluation(step: int, correct: list[bool]) -> Evaluation:
    answers = tuple(
        Answer(f"s{i}", "q", "1", VOICES[i % 4], "1", True, "1", c, ("1",), (0.1,) if i < 20 else None)
        for i, c in enumerate(correct)
    )
    return Evaluation(step, 1.0, float(np.mean(correct)), len(correct), None, {}, answers)


def test_every_kind_is_shown(finished_run: Path) -> None:
    """Catches kinds that are confused, a page of successes only, and a choice that differs between two drawings."""
    run = read_run(finished_run)
    before, after = run.evaluations[0], run.evaluations[-1]
    chosen = examples.choose_examples(before, after)
    earlier = {answer.id: answer.audio_correct for answer in before.answers}
    names = {
        (False, True): "fixed",
        (False, False): "still wrong",
        (True, False): "broken",
        (True, True): "always right",
    }
    for example in chosen:
        assert example.kind == names[earlier[example.after.id], example.after.audio_correct]
    counts = Counter(example.kind for example in chosen)
    assert counts["broken"] == len(BROKEN) and len(chosen) >= 12 and set(counts) == set(names.values())
    assert [example.kind for example in chosen] == sorted((e.kind for e in chosen), key=list(examples.QUOTAS).index)
    assert len({example.after.id for example in chosen}) == len(chosen)
    assert chosen == examples.choose_examples(before, after)


def test_choice_is_filled_up_scored_first_and_varied() -> None:
    """Catches four cards where one kind is rare, answers without colours before coloured ones, and one voice only."""
    chosen = examples.choose_examples(evaluation(0, [False] * 40), evaluation(9, [True] * 40))
    assert len(chosen) == 12 and all(example.after.token_kl for example in chosen)
    assert set(Counter(example.after.voice for example in chosen).values()) == {3}
    assert len(examples.choose_examples(evaluation(0, [False] * 5), evaluation(9, [True] * 5))) == 5


def test_one_evaluation() -> None:
    """Catches a run that has just begun and shows nothing."""
    chosen = examples.choose_examples(None, evaluation(0, [True] * 20 + [False] * 20))
    assert Counter(example.kind for example in chosen) == {"right": 12, "wrong": 12}
    assert all(example.before is None for example in chosen)


def test_clips_are_the_samples(finished_run: Path) -> None:
    """Catches a clip under another's id, a wrong rate, and audio changed on its way."""
    data = read_run(finished_run).setting("data.evaluation")
    dataset = ShardDataset(data)
    clips = examples.load_clips(data, [dataset[3].id, "not there", dataset[SAMPLES - 1].id])
    assert list(clips) == [dataset[3].id, dataset[SAMPLES - 1].id]
    with wave.open(io.BytesIO(base64.b64decode(clips[dataset[3].id].removeprefix("data:audio/wav;base64,")))) as wav:
        assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (16000, 1, 2)
        samples = np.frombuffer(wav.readframes(wav.getnframes()), dtype="<i2")
    assert np.abs(samples / 32767 - dataset[3].waveform).max() < 1e-4


def test_budget_of_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page too large to open: minutes of speech for each question."""
    writer = ShardWriter(tmp_path / "long")
    for number in range(4):
        writer.write(Sample(f"s{number}", "q", np.full(16000, -1.0, dtype=np.float32)))
    writer.close()
    monkeypatch.setattr(examples, "AUDIO_BUDGET", 100_000)
    assert list(examples.load_clips(str(tmp_path / "long"), ["s2", "s0", "s1", "s3"])) == ["s2", "s0", "s1"]


def test_no_shards(tmp_path: Path) -> None:
    """Catches a traceback where the held-out shards are gone or not configured."""
    for data in (None, str(tmp_path / "gone")):
        with pytest.raises(CordError):
            examples.load_clips(data, ["a"])


def test_training_groups(finished_run: Path) -> None:
    """Catches groups torn apart, and a zero-variance group shown where another exists."""
    groups = examples.training_groups(read_run(finished_run))
    assert [(group.step, group.rollouts[0].role, len(group.rollouts)) for group in groups] == [
        (1, "distill", 1), (1, "policy", 4), (100, "distill", 1), (100, "policy", 4)
    ]  # fmt: skip
    for group in groups:
        assert len({rollout.id for rollout in group.rollouts}) == 1


def test_tokens_are_annotated() -> None:
    """Catches levels off by one, weights beside the wrong token, and lists of unequal length."""
    tokens = annotate(["a", "b", "c", "d", "<|end|>"], [0.0, 0.01, 3.0, float("nan")], [4.0, 1.5])
    assert [token.special for token in tokens] == [False] * 4 + [True]
    assert [token.level for token in tokens] == [0, 1, 5, None, None]
    assert [token.note for token in tokens] == [
        "0 nats, weight 4",
        "0.01 nats, weight 1.5",
        "3 nats",
        "not measured",
        "not measured",
    ]
    assert len(LEVELS) == len(LIMITS) + 1 and LEVELS[0] == "below 0.01" and LEVELS[-1] == "3 and more"
