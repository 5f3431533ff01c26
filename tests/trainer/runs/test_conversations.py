"""Training on conversations: system prompts, instructions, earlier turns and several recordings, on real ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.parallel.layout import finalize
from megatron_cord.report.page.examples import load_clips
from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from tests.tiny_run import SIZES, WORDS, losses, make_run, make_samples, overrides, write_shards
from tests.trainer.fault_ranks import run_forked


def conversations(count: int, seed: int) -> list[Sample]:
    """Return two-turn, two-clip samples, some with a system prompt, and plain ones with an instruction."""
    made = make_samples(3 * count, seed=seed)
    samples = []
    for i in range(count):
        first, second, third = made[3 * i : 3 * i + 3]
        if i % 3 == 0:
            samples.append(replace(first, instruction="answer is one"))
            continue
        parts = (AudioPart(1, second.question), AudioPart(2, third.question), TextPart("what is answer"))
        turns = (
            Turn("user", (TextPart("answer what\n"), AudioPart(0, first.question))),
            Turn("assistant", (TextPart("two"),)),
            Turn("user", parts),
        )
        chat = Sample(first.id, "", answer=third.answer, voice=first.voice, turns=turns)
        chat = replace(chat, system="answer one" if i % 3 == 1 else None)
        samples.append(chat.with_recordings([sample.waveform[: 4000 + 900 * i] for sample in (first, second, third)]))
    return samples


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    create_checkpoint(directory / "checkpoint", TinyModelConfig(**SIZES), [*WORDS, "system"], seed=0)
    write_shards(directory / "train", conversations(6, seed=1))
    write_shards(directory / "heldout", conversations(3, seed=2))
    return directory


def test_losses_are_the_same_on_two_ranks_and_packed(inputs: Path, tmp_path: Path) -> None:
    """Catches clips that reach another place of a packed sequence, or of one on a tensor-parallel rank.

    Also a system prompt of the set that one of student and teacher lacks, and questions, reference answers, recordings
    of the report or effects on recordings that know the first recording alone.
    """
    settings = ["train.steps=2", "data.system=what is plus", "data.augmentation.noise=1.0"]
    try:
        make_run(overrides(inputs, tmp_path / "one", *settings))
    finally:
        finalize()
    settings += ["parallel.tp=2", "parallel.sequence_parallel=true"]
    settings += ["train.packing=packed", "train.tokens_per_microbatch=150"]
    status, errors = run_forked(overrides(inputs, tmp_path / "two", *settings), tmp_path / "log")
    assert status == 0, errors
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-5)
    assert losses(tmp_path / "two")[1] == pytest.approx(losses(tmp_path / "one")[1], rel=1e-4)
    asked = {sample.id: sample.asked for sample in conversations(6, seed=1)}
    rows = [row for step in (1, 2) for row in read_rollouts(dump_file(tmp_path / "one" / "rollouts", step)).to_pylist()]
    assert {row["id"] for row in rows} > set() and all(row["question"] == asked[row["id"]] for row in rows)
    evaluated = json.loads((tmp_path / "one" / "evaluations" / "step_000002" / "heldout.json").read_text())
    assert [answer["question"] for answer in evaluated["answers"]] == [s.asked for s in conversations(3, seed=2)]
    ids = [sample.id for sample in conversations(3, seed=2)]
    assert list(load_clips(str(inputs / "heldout"), ids)) == ids
