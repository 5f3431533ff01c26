"""Requests of lmms-eval answered by a checkpoint: the same as `evaluate` answers, from base and trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.turns import AudioPart, TextPart
from megatron_cord.errors import CordError
from megatron_cord.evaluate import evaluate
from megatron_cord.lmms_eval.answerer import Answerer, Asked, as_recording, sample_of
from megatron_cord.parallel.layout import finalize
from megatron_cord.train import train
from megatron_cord.trainer.config import RunConfig
from tests.tiny_run import overrides, write_inputs

TONE = np.sin(np.arange(16000) / 20).astype(np.float32) / 2


def configured(*settings: str) -> RunConfig:
    return load_config(RunConfig, None, settings)


def test_answers_are_those_of_evaluate(tmp_path: Path) -> None:
    """Catches another prompt than `evaluate` makes, base weights in the place of trained ones, and mixed-up answers."""
    inputs, run = write_inputs(tmp_path / "inputs"), tmp_path / "run"
    settings = overrides(inputs, run, "train.steps=2", "optimizer.learning_rate=0.05", "evaluation.max_new_tokens=5")
    try:
        train(configured(*settings))
        finalize()
        evaluate(configured(*settings))
        finalize()
        found = json.loads((run / "evaluations" / "step_000002" / "heldout.json").read_text())["answers"]
        expected = [row[f"{kind}_response"] for kind in ("audio", "text") for row in found]
        for checkpoint in ("latest", "base"):
            answerer = Answerer(configured(*settings, f"evaluation.checkpoint={checkpoint}"))
            shards = ShardDataset(inputs / "heldout")
            samples = [shards[i] for i in range(len(shards))]
            heard = [Asked(s.id, "", (s.waveform,), max_new_tokens=5) for s in samples]
            read = [Asked(f"{s.id}-read", s.question, max_new_tokens=5) for s in samples]
            said = answerer.answer([*heard, *read])
            answerer.close()
            assert (said == expected) is (checkpoint == "latest"), "the trained weights are taken, and only then"
    finally:
        finalize()


def test_requests_that_are_cut_or_cannot_be_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny: Answerer
) -> None:
    """Catches a stop text that is ignored, and one bad document that ends the whole task or shifts its answers."""
    whole = tiny.answer([Asked("a", "", (TONE,), max_new_tokens=6)])[0]
    end = whole.split(" ")[1]
    asked = [
        Asked("too long", "", (np.zeros(16000 * 3600, np.float32),), max_new_tokens=6),
        Asked("cut", "", (TONE,), max_new_tokens=6, until=(end, "")),
        Asked("whole", "", (TONE,), max_new_tokens=6),
    ]
    assert tiny.answer(asked) == ["", whole.split(end)[0], whole]
    assert "no prompt can be made of too long, its answer is empty: " in caplog.text


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    inputs = write_inputs(tmp_path / "inputs")
    answerer = Answerer(
        configured(f"output_dir={tmp_path}", f"model.checkpoint={inputs / 'checkpoint'}", "evaluation.checkpoint=base")
    )
    yield answerer
    answerer.close()


def test_samples() -> None:
    """Catches text before the recordings, one that is lost, and an empty text that becomes a part."""
    one = sample_of(Asked("a", " Which? ", (TONE,)))
    assert (one.instruction, one.question, one.turns) == ("Which?", "", ())
    assert sample_of(Asked("a", "", (TONE,))).instruction is None
    two = sample_of(Asked("a", "Which?", (TONE, TONE / 2)))
    assert two.turns[0].parts == (AudioPart(0, ""), AudioPart(1, ""), TextPart("Which?"))
    assert np.array_equal(two.recordings[1], TONE / 2)
    assert len(sample_of(Asked("a", " ", (TONE, TONE))).turns[0].parts) == 2


def test_recordings() -> None:
    """Catches channels taken for time, a rate that is kept, and an image that is asked about."""
    assert np.array_equal(as_recording({"array": TONE, "sampling_rate": 16000}, "x"), TONE)
    for stereo in (np.stack([TONE, TONE]), np.stack([TONE, TONE], axis=1)):
        assert np.allclose(as_recording({"array": stereo, "sampling_rate": 16000}, "x"), TONE)
    assert len(as_recording({"array": TONE, "sampling_rate": 8000}, "x")) == 32000
    for value, fault in [
        ({"bytes": b""}, r"only audio can be asked about, .* got \['bytes'\]"),
        ("x.png", "got str"),
        ({"array": [], "sampling_rate": 16000}, "empty, not finite"),
        ({"array": [float("nan")], "sampling_rate": 16000}, "empty, not finite"),
    ]:
        with pytest.raises(CordError, match=f"^task t: .*{fault}"):
            as_recording(value, "task t")
