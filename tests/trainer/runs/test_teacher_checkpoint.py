"""A teacher with a checkpoint of its own: its losses, its answers, and what does not fit the student."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_cord.config.loading import load_config
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.types import GenerationRequest, ScoredRollout
from megatron_cord.trainer.building.teacher_checkpoint import answering_engine, check_teacher
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.observability.rollout_dump import read_dump
from megatron_cord.trainer.step.teacher import TeacherConfig
from tests.rollout.sglang.fake_sglang import FakeServer, answer_to
from tests.tiny_run import losses, make_samples, overrides, write_checkpoint, write_shards
from tests.trainer.fault_ranks import run_forked
from tests.trainer.runs.test_train import alone

BY_A = "objective.streams.s.taught_by=a"
ONE_STEP = ("train.steps=1", "rollout.temperature=1.0", "data.shuffle=false")


@pytest.fixture(scope="module")
def teacher(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a text model of another family and size with the student's tokenizer."""
    directory, student = tmp_path_factory.mktemp("teacher") / "checkpoint", inputs / "checkpoint"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=PromptBuilder(student).vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    llama: Any = LlamaForCausalLM
    llama(config).save_pretrained(directory)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(student / name, directory / name)
    settings = json.loads((student / "tokenizer_config.json").read_text())
    settings.pop("processor_class", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def log_probabilities(model: PlainModel, prompt: Prompt, response: tuple[int, ...]) -> Tensor:
    """Return float64 [response, V] of one unpadded sequence."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    clips = prompt.clips
    features = torch.stack([clip.features for clip in clips]) if clips else None
    frames = torch.tensor([clip.num_frames for clip in clips]) if clips else None
    with torch.no_grad():
        hidden = model.hidden(ids, features, frames).last_hidden_state
        return model.head(hidden)[0, len(prompt.token_ids) - 1 : -1].double().log_softmax(-1)


def dump_of(run: Path, inputs: Path) -> tuple[list[ScoredRollout], ShardDataset]:
    data = ShardDataset(inputs / "train")
    ids = [data.id_of(i) for i in range(4)]
    return read_dump(run / "rollouts", 1, ids), data


def test_losses_and_answers_are_the_teachers(inputs: Path, teacher: Path, tmp_path: Path) -> None:
    """Catches a teacher of the student's weights or sizes, another prompt, and answers by the student's engine.

    Also another loss on two tensor-parallel ranks or two stages.
    """
    settings = (*ONE_STEP, f"teacher.checkpoint={teacher}")
    run = alone(inputs, tmp_path / "run", *settings)
    rollouts, data = dump_of(run, inputs)
    prompts = PromptBuilder(inputs / "checkpoint")
    models = PlainModel(inputs / "checkpoint", torch.float32), PlainModel(teacher, torch.float32)
    by_id = {data.id_of(i): data[i] for i in range(4)}
    engine = LocalEngine(teacher)
    compared = 0
    for rollout in rollouts:
        sample, response = by_id[rollout.rollout.prompt_id], rollout.rollout.token_ids
        if rollout.reference_answer is not None:
            asked = GenerationRequest(prompts.text_prompt(sample), 0.0, 6)
            assert rollout.reference_answer == engine.generate([asked])[0].text
        if rollout.role == "distill":
            assert rollout.tokens is not None and rollout.tokens.kl is not None
            p = log_probabilities(models[0], prompts.audio_prompt(sample), response)
            q = log_probabilities(models[1], prompts.text_prompt(sample), response)
            kl = (p.exp() * (p - q)).sum(-1)
            torch.testing.assert_close(torch.tensor(rollout.tokens.kl).double(), kl, rtol=1e-3, atol=1e-4)
            compared += len(response)
    assert compared > 8 and any(rollout.reference_answer is not None for rollout in rollouts)
    for name, layout in (("tp", "parallel.tp=2"), ("pp", "parallel.pp=2")):
        status, errors = run_forked(overrides(inputs, tmp_path / name, *settings, layout), tmp_path / f"{name}.log")
        assert status == 0, errors
        assert losses(tmp_path / name) == [pytest.approx(pair, rel=1e-4) for pair in losses(run)]
        answers = (tmp_path / name / "reference_answers.jsonl", run / "reference_answers.jsonl")
        texts = [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in answers]
        assert texts[0] == texts[1]


def test_a_teacher_that_does_not_fit_is_named(inputs: Path, teacher: Path, tmp_path: Path) -> None:
    """Catches a loss between probabilities of different words, in silence or as a traceback of shapes."""
    student, prompts = inputs / "checkpoint", PromptBuilder(inputs / "checkpoint")
    check_teacher(str(teacher), prompts, student)
    other = write_checkpoint(tmp_path / "other", 0)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["one"], vocabulary["two"] = vocabulary["two"], vocabulary["one"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    first = min(vocabulary["one"], vocabulary["two"])
    with pytest.raises(CordError, match=rf"2 of \d+ token ids mean something else, the first is {first}: "):
        check_teacher(str(other), prompts, student)
    with pytest.raises(CordError, match=r"scores on a view with audio, and is a text model \(llama\)"):
        check_teacher(str(teacher), prompts, student, "teachers.a.checkpoint", with_audio=True)
    check_teacher(str(student), prompts, student, with_audio=True)
    with pytest.raises(CordError, match=r"^teacher\.checkpoint: .*nowhere does not exist"):
        check_teacher(str(tmp_path / "nowhere"), prompts, student)


def test_sets_have_teachers_of_their_own(inputs: Path, teacher: Path, tmp_path: Path) -> None:
    """Catches a set's responses that another teacher than its own scores, or that one microbatch mixes."""
    write_shards(tmp_path / "second", make_samples(6, seed=5))
    sets = f"{{a: {{path: {inputs / 'train'}}}, b: {{path: {tmp_path / 'second'}, taught_by: other}}}}"
    settings = [f"data.train={sets}", f"teachers.other.checkpoint={teacher}", "objective.policy_gradient.enabled=false"]
    run = alone(inputs, tmp_path / "run", *ONE_STEP, *settings, "train.packing=packed")
    data = {"a": ShardDataset(inputs / "train"), "b": ShardDataset(tmp_path / "second")}
    samples = {f"{name}/{each.id_of(i)}": each[i] for name, each in data.items() for i in range(len(each))}
    prompts = PromptBuilder(inputs / "checkpoint")
    models = {name: PlainModel(path, torch.float32) for name, path in (("a", inputs / "checkpoint"), ("b", teacher))}
    compared: list[str] = []
    ids = {row["position"]: row["id"] for row in read_rollouts(dump_file(run / "rollouts", 1)).to_pylist()}
    for rollout in read_dump(run / "rollouts", 1, [ids[position] for position in range(4)]):
        identity, response = ids[rollout.position], rollout.rollout.token_ids
        assert rollout.tokens is not None and rollout.tokens.kl is not None
        p = log_probabilities(models["a"], prompts.audio_prompt(samples[identity]), response)
        q = log_probabilities(models[identity[0]], prompts.text_prompt(samples[identity]), response)
        kl = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(torch.tensor(rollout.tokens.kl).double(), kl, rtol=1e-3, atol=1e-4)
        compared.append(identity[0])
    assert set(compared) == {"a", "b"}


def test_its_own_servers_answer(inputs: Path, teacher: Path, layout: Layout) -> None:
    """Catches questions that go to the student's servers, or to servers of another model."""
    prompts = PromptBuilder(inputs / "checkpoint")
    asked = GenerationRequest(prompts.text_prompt(ShardDataset(inputs / "train")[0]), 0.0, 6)
    with FakeServer() as own, FakeServer() as students:
        own.info["model_type"] = "llama"
        rollout = RolloutConfig(engine="sglang", sglang=SGLangConfig(servers=(students.url,), start_seconds=20.0))
        settings = TeacherConfig(checkpoint=str(teacher), servers=(own.url,))
        with closing(answering_engine(rollout, settings, layout.device)) as engine:
            (answer,) = engine.generate([asked])
        assert answer.token_ids == tuple(answer_to(asked.prompt.token_ids)) and not students.asked
        with pytest.raises(CordError, match="serves a qwen2_audio model"):
            answering_engine(rollout, replace(settings, servers=(students.url,)), layout.device)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher.checkpoint=x", "teacher.mode=ema"], r"teacher\.mode=ema takes the student's weights"),
        (["teacher.servers=[http://a:1]"], r"teacher\.servers run teacher\.checkpoint, which is not set"),
        (
            ["teacher.checkpoint=x", "rollout.engine=sglang", "rollout.sglang.servers=[http://a:1]"],
            r"start servers of that checkpoint and name them in teacher\.servers",
        ),
        (["teachers.a.checkpoint=x"], r"teachers\.a scores nothing: name it as taught_by"),
        (["objective.streams.s.taught_by=b"], r"objective\.streams\.s\.taught_by=b is no teacher; teachers has none"),
        ([BY_A, "teachers.a.mode=ema"], r"teachers\.a\.mode=ema: a run keeps one moving average"),
        ([BY_A, "teachers.a.checkpoint=x", "teachers.a.servers=[http://a:1]"], r"teachers\.a\.servers: reference"),
        ([BY_A, "teachers.a.mode=live", "objective.streams.s.divergence.kind=nll"], r"kind=nll does not compare with"),
    ],
)
def test_settings_that_contradict_each_other(inputs: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    """Catches a teacher's checkpoint that is set and not used, and answers by servers with the student's weights."""
    with pytest.raises(CordError, match=message):
        load_config(RunConfig, None, overrides(inputs, tmp_path, *settings))
