"""Privileged parts of the teacher's view: no trace of them in what a run, or an evaluation, sends over HTTP.

`test_views` has the same for the local engine. Canaries are words that occur in nothing but the part that they stand
for: the answer, the worked solution, and the scaffold's own text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.config.loading import load_config
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.evaluate import evaluate
from megatron_cord.parallel.layout import finalize
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.step.step import TrainStep
from tests.rollout.sglang.fake_sglang import FakeServer, Reply
from tests.tiny_run import SIZES, WORDS, make_run, make_samples, overrides, write_shards

ANSWER, SOLUTION, SCAFFOLD = CANARIES = ("nightingale", "oriole", "woodpecker")
VIEWS = f'views={{informed: {{user: [text, "{SCAFFOLD} {{answer}} {{solution}}"]}}}}'
_WAV = "data:audio/wav;base64,"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    create_checkpoint(directory / "checkpoint", TinyModelConfig(**SIZES), [*WORDS, *CANARIES], seed=0)
    for name, count, seed in (("train", 6, 1), ("heldout", 3, 2)):
        samples = [replace(s, answer=ANSWER, solution=SOLUTION) for s in make_samples(count, seed=seed)]
        write_shards(directory / name, samples)
    return directory


@pytest.fixture
def server(inputs: Path) -> Iterator[FakeServer]:
    """Serve over HTTP, as SGLang does; a spoken prompt is told by its recording."""
    prompts = PromptBuilder(inputs / "checkpoint")
    lengths = {}
    for name in ("train", "heldout"):
        shards = ShardDataset(inputs / name)
        for sample in (shards[i] for i in range(len(shards))):
            lengths[sample.waveform.astype("<f4").tobytes()] = len(prompts.audio_prompt(sample).token_ids)

    def reply(body: Reply) -> Reply:
        if "input_ids" in body:
            return fake.good(body)
        recording = base64.b64decode(body["audio_data"][0].removeprefix(_WAV))[44:]
        return fake.good(body | {"prompt": [0] * lengths[recording]})

    fake = FakeServer(reply)
    with ExitStack() as stack, fake:
        stack.callback(finalize)
        yield fake


def served(server: FakeServer) -> list[str]:
    return [
        "rollout.engine=sglang",
        f"rollout.sglang.servers=[{server.url}]",
        "rollout.weight_sync.transport=disk",
        "rollout.max_logprob_mismatch=1e9",  # the server has no model
    ]


def traces(sent: list[Reply], prompts: PromptBuilder) -> list[str]:
    """Return the canaries that are in requests, as words or as tokens."""
    ids = {word: prompts.encode(word)[-1] for word in CANARIES}
    found = []
    for body in sent:
        text = json.dumps({key: value for key, value in body.items() if key != "audio_data"})
        found += [word for word in CANARIES if word in text or ids[word] in body.get("input_ids", ())]
    return found


def test_no_request_of_a_run_has_privileged_parts(inputs: Path, server: FakeServer, tmp_path: Path) -> None:
    """Catches an answer, a solution or the scaffold in a rollout, a reference answer or an evaluation.

    Also a teacher that is not given them, and a test that looks for words that no prompt could have.
    """
    prompts = PromptBuilder(inputs / "checkpoint")
    taught: list[tuple[int, ...]] = []
    step: Callable[..., Any] = TrainStep.__call__

    def trained(self: Any, sequences: Any, *more: Any) -> Any:
        taught.extend(s.teacher.token_ids for s in sequences if s.teacher is not None)
        return step(self, sequences, *more)

    settings = [VIEWS, "objective.teacher_view=informed", "train.steps=1", "evaluation.interval=1", *served(server)]
    with mock.patch.object(TrainStep, "__call__", trained):
        make_run(overrides(inputs, tmp_path / "run", *settings))
    assert taught and all(prompts.encode(word)[-1] in ids for ids in taught for word in CANARIES)
    spoken = [body for body in server.asked if "audio_data" in body]
    written = [body for body in server.asked if "input_ids" in body]
    # Of a step four responses of L_tok and six of L_seq, two reference answers; two evaluations of three questions.
    assert (len(spoken), len(written)) == (4 + 6 + 2 * 3, 2 + 2 * 3)
    assert not traces(server.asked, prompts)
    assert not any(word in json.dumps(body) for _, body in server.calls for word in CANARIES)
    leaked: list[Reply] = [{"input_ids": list(taught[0])}, {"text": f"what is one {SCAFFOLD}"}]
    assert set(traces(leaked[:1], prompts)) == set(CANARIES) and traces(leaked[1:], prompts) == [SCAFFOLD]


def test_no_request_of_an_evaluation_has_privileged_parts(inputs: Path, server: FakeServer, tmp_path: Path) -> None:
    """Catches questions that are asked with their gold answers, by `cord evaluate` of a run with such views."""
    settings = [
        VIEWS, "objective.teacher_view=informed", "evaluation.checkpoint=base", *served(server),
        f"evaluation.sets.more.path={inputs / 'train'}", "evaluation.sets.more.format=shards",
    ]  # fmt: skip
    result = evaluate(load_config(RunConfig, None, overrides(inputs, tmp_path / "run", *settings)))
    assert result is not None and len(server.asked) == 2 * (3 + 6)
    assert not traces(server.asked, PromptBuilder(inputs / "checkpoint"))
    assert all(np.isfinite(result["sets"][name]["text_accuracy"]) for name in ("heldout", "more"))
