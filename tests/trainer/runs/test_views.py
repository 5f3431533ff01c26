"""Training with views of its own for student and teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.config.loading import load_config
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.model.config import ModelConfig
from megatron_cord.parallel.layout import Layout, finalize
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher, TeacherConfig
from tests.tiny_run import SIZES, WORDS, make_run, make_samples, metrics, overrides, write_shards

CANARY = "canary"
INFORMED = 'views={informed: {user: [text, "answer is {answer}"]}}'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write samples whose answer is a word that occurs nowhere else."""
    directory = tmp_path_factory.mktemp("inputs")
    create_checkpoint(directory / "checkpoint", TinyModelConfig(**SIZES), [*WORDS, CANARY], seed=0)
    for name, count, seed in (("train", 6, 1), ("heldout", 3, 2)):
        write_shards(directory / name, [replace(s, answer=CANARY) for s in make_samples(count, seed=seed)])
    return directory


@pytest.fixture(autouse=True)
def _finalized() -> Iterator[None]:
    yield
    finalize()


def test_privileged_parts_reach_the_teacher_alone(inputs: Path, tmp_path: Path) -> None:
    """Catches an answer in the prompt of a rollout, a reference answer or an evaluation, and a teacher without it."""
    builder = PromptBuilder(inputs / "checkpoint")
    canary = builder.encode(CANARY)[-1]
    requests: list[GenerationRequest] = []
    taught: list[bool] = []
    generate, step = LocalEngine.generate, TrainStep.__call__

    def spy(engine: Any, asked: Sequence[GenerationRequest]) -> Any:
        requests.extend(asked)
        return generate(engine, asked)

    def trained(self: Any, sequences: Any, *more: Any) -> Any:
        taught.extend(canary in s.teacher.token_ids for s in sequences if s.teacher is not None)
        assert not any(canary in s.student.token_ids for s in sequences)
        return step(self, sequences, *more)

    with mock.patch.object(LocalEngine, "generate", spy), mock.patch.object(TrainStep, "__call__", trained):
        settings = [INFORMED, "objective.teacher_view=informed", "train.steps=1", "evaluation.interval=1"]
        make_run(overrides(inputs, tmp_path / "run", *settings))
    assert taught and all(taught)
    asked = {(request.prompt.sample_id[:2], bool(request.prompt.clips)) for request in requests}
    assert asked >= {("s1", True), ("s2", True), ("s2", False)}
    assert not any(canary in request.prompt.token_ids for request in requests)


def test_equal_views_have_no_divergence(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a teacher that is given another prompt than its view's: KL and gradient are 0 to rounding."""
    views = 'views={same: {user: [audio, "instruction?"]}}'
    settings = [views, "objective.teacher_view=same", "objective.student_view=hear", "train.steps=1"]
    with caplog.at_level(logging.WARNING):
        make_run(overrides(inputs, tmp_path / "run", *settings, "objective.policy_gradient.enabled=false"))
    (line,) = metrics(tmp_path / "run")
    assert abs(line["kl"]) < 1e-6 and line["grad_norm"] < 1e-4
    settings[1] = "objective.teacher_view=hear"
    config = load_config(RunConfig, None, overrides(inputs, tmp_path / "other", *settings))
    assert config.equal_views == ("hear",)


def test_a_frozen_teacher_that_hears_keeps_its_encoder(inputs: Path, tmp_path: Path, layout: Layout) -> None:
    """Catches a frozen teacher whose encoder or adapter is the student's, which is trained, and a needless copy."""
    checkpoint = str(inputs / "checkpoint")
    student = build_student(ModelConfig(checkpoint, dtype="float32", freeze=("language_model",)), layout)
    assert Teacher(TeacherConfig(), student, checkpoint).model is student
    teacher = Teacher(TeacherConfig(), student, checkpoint, with_audio=True)
    assert teacher.model is not student
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    student.requires_grad_(False)
    assert Teacher(TeacherConfig(), student, checkpoint, with_audio=True).model is student
    assert Teacher(TeacherConfig(), student, checkpoint, with_audio=True, has_trained=True).model is not student
    heard = ["objective.teacher_view=hear", "model.freeze=[language_model]"]
    assert load_config(RunConfig, None, overrides(inputs, tmp_path, *heard)).audio_teachers == {""}
    with pytest.raises(CordError, match=r"teacher\.mode=ema averages the language model alone"):
        load_config(RunConfig, None, overrides(inputs, tmp_path, *heard, "teacher.mode=ema"))


def test_unknown_and_privileged_views_are_refused(inputs: Path, tmp_path: Path) -> None:
    """Catches a run that begins with a view that is not there, or whose student is given the answer."""

    def load(*settings: str) -> RunConfig:
        return load_config(RunConfig, None, overrides(inputs, tmp_path / "run", *settings))

    with pytest.raises(CordError, match=r"objective\.teacher_view=tells is no view"):
        load("objective.teacher_view=tells")
    with pytest.raises(CordError, match=r"objective\.student_view=informed gives the student the answer"):
        load(INFORMED, "objective.student_view=informed")
    both = INFORMED[:-1] + ", noisy: {user: [audio|noise(10)]}}"
    sets = f"data.train={{a: {{path: {inputs / 'train'}, views: {{noisy: informed}}}}}}"
    with pytest.raises(CordError, match=r"data\.train\.a\.views\.noisy=informed gives the student the answer"):
        load(both, sets, "objective.student_view=noisy")
    with pytest.raises(CordError, match=r"data\.train\.a\.views\.read: read is the same in all sets"):
        load(INFORMED, sets.replace("noisy:", "read:"))
    with pytest.raises(CordError, match=r"data\.train\.a\.views\.other: the objective has the views hear, read"):
        load(INFORMED, sets.replace("noisy:", "other:"))


def test_a_contrast_reaches_the_teacher(inputs: Path, tmp_path: Path) -> None:
    """Catches a teacher on one view alone, a gate that is not applied, hidden states mixed before they are there."""
    contrasted, step = list[bool](), TrainStep.__call__
    builder = PromptBuilder(inputs / "checkpoint")
    texts = {s.id: builder.text_prompt(replace(s, answer=CANARY)).token_ids for s in make_samples(6, seed=1)}

    def trained(self: Any, sequences: Any, *more: Any) -> Any:
        contrasted.extend(s.contrast.token_ids == texts[s.student.sample_id] for s in sequences)
        return step(self, sequences, *more)

    term = "teacher: hear, contrast: {view: read, gate:"
    settings = [
        f"objective.streams={{moved: {{{term} 0}}}}, shut: {{{term} 1000}}}}}}",
        "objective.policy_gradient.enabled=false",
        "teacher.offload=true",
        "train.steps=1",
    ]
    with mock.patch.object(TrainStep, "__call__", trained):
        make_run(overrides(inputs, tmp_path / "run", *settings))
    assert contrasted == [True] * 8
    (line,) = metrics(tmp_path / "run")
    assert line["stream/moved/kl"] > 0 and line["stream/shut/kl"] > 0
    assert line["stream/moved/loss"] > 0 and line["stream/shut/loss"] == 0


def test_a_stream_trains_on_the_answers_that_samples_have(inputs: Path, tmp_path: Path) -> None:
    """Catches given answers that are sampled, unended, left out of the loss, or compared with the engine."""
    term = "objective.streams={given: {source: answer, divergence: {kind: nll}}, own: {weight: 0.5}}"
    settings = [term, "train.steps=1", "objective.policy_gradient.enabled=false", "objective.normalization=token"]
    settings.append("objective.token_weights.factors=uniform")
    make_run(overrides(inputs, tmp_path / "run", *settings))
    (line,) = metrics(tmp_path / "run")
    builder = PromptBuilder(inputs / "checkpoint")
    wanted = builder.response_ids(CANARY)
    assert wanted[-1] in builder.eos_ids and builder.decode(wanted) == CANARY
    rows = read_rollouts(dump_file(tmp_path / "run" / "rollouts", 1)).to_pylist()
    given = [row for row in rows if tuple(row["token_ids"]) == wanted and row["seed"] is None]
    assert len(given) == 4 and len(rows) == 8
    tokens = [logprob for row in given for logprob in row["student_logprobs"]]
    assert line["stream/given/loss"] == pytest.approx(-sum(tokens) / len(tokens))
    assert line["engine_logprob_difference"] < 1e-4 and line["stale_tokens"] == 0
    finalize()
    lacking = tmp_path / "lacking"
    write_shards(lacking, [replace(s, answer=None) for s in make_samples(3, seed=4)])
    with pytest.raises(CordError, match="has no answer, which a stream trains on"):
        make_run(overrides(inputs, tmp_path / "other", *settings, f"data.train={lacking}"))


def test_streams_are_trained_in_one_step(inputs: Path, tmp_path: Path) -> None:
    """Catches a stream's responses to another view, left out, or trained on with another's weight or denominator."""
    common = ["train.steps=1", "objective.policy_gradient.enabled=false", "objective.normalization=token"]
    terms = {"a": "{student: hear, teacher: read", "b": "{student: read, teacher: hear, responses: 2"}
    alone = {}
    for name, term in terms.items():
        settings = [*common, f"objective.streams={{{name}: {term}}}}}"]
        make_run(overrides(inputs, tmp_path / name, *settings))
        (line,) = metrics(tmp_path / name)
        alone[name] = line["loss"]
        assert line[f"stream/{name}/loss"] == pytest.approx(line["loss"]) and line[f"stream/{name}/kl"] > 0
        finalize()
    make_run(overrides(inputs, tmp_path / "plain", *common))
    (line,) = metrics(tmp_path / "plain")
    assert line["loss"] == alone["a"]
    finalize()
    requests: list[GenerationRequest] = []
    generate = LocalEngine.generate

    def spy(engine: Any, asked: Sequence[GenerationRequest]) -> Any:
        requests.extend(asked)
        return generate(engine, asked)

    both = f"objective.streams={{a: {terms['a']}, weight: 0.25}}, b: {terms['b']}, weight: 2}}}}"
    with mock.patch.object(LocalEngine, "generate", spy):
        make_run(overrides(inputs, tmp_path / "both", *common, both, "train.packing=packed"))
    (line,) = metrics(tmp_path / "both")
    trained = [bool(r.prompt.clips) for r in requests if r.prompt.sample_id.startswith("s1")]
    assert sorted(trained) == [False] * 8 + [True] * 4
    assert line["stream/a/loss"] == pytest.approx(0.25 * alone["a"], rel=1e-5)
    assert line["loss"] == pytest.approx(line["stream/a/loss"] + line["stream/b/loss"], rel=1e-6)
