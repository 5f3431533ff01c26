"""Training of the families beside Qwen2-Audio, from rollouts of the local engine to the weight sync."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.family_reference import save_whole
from tests.tiny_run import WORDS, make_samples, metrics, overrides, write_shards
from tests.trainer.fault_ranks import run_forked

SLOW = ("audioflamingo3", "qwen2_5_omni", "ultravox", "voxtral")


@pytest.mark.parametrize("family", ["step_audio_2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_is_trained(family: str, tmp_path: Path) -> None:
    """Catches a family that can be converted but not trained: prompts that its model does not take.

    Also an engine that another model answers for, or weights that the engine does not get. Recordings are longer than
    the encoder's window and become several clips.
    """
    save_whole(tmp_path / "checkpoint", family, WORDS)
    write_shards(tmp_path / "train", make_samples(6, seed=1))
    write_shards(tmp_path / "heldout", make_samples(3, seed=2))
    settings = [
        "train.steps=2",
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
        "data.long_audio=cut",
        "rollout.max_logprob_mismatch=1e-4",
    ]
    status, errors = run_forked(overrides(tmp_path, tmp_path / "run", *settings), tmp_path / "log")
    assert status == 0, errors
    steps = metrics(tmp_path / "run")
    assert len(steps) == 2 and not any(step["skipped"] for step in steps)
    # On tokens that the engine made with the weights of the second step, which it got after the first.
    assert steps[1]["engine_logprob_difference"] < 1e-4 and steps[1]["grad_norm"] > 0
