"""The quickstart's warm-up on a model small enough to learn within a second."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration
from transformers.utils import logging as transformers_logging

from examples.quickstart import tiny_models, warmup
from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint, save_checkpoint
from examples.quickstart.omni_checkpoint import TinyOmniConfig, create_omni_checkpoint
from examples.quickstart.questions import Question, questions_about, split_problems, vocabulary
from examples.quickstart.warmup import WarmUpConfig, warm_up
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.types import GenerationRequest

SMALL = TinyModelConfig(
    encoder_hidden_size=32,
    encoder_layers=1,
    encoder_heads=2,
    encoder_ffn_size=64,
    hidden_size=64,
    layers=1,
    ffn_size=128,
)
SHORT = WarmUpConfig(
    text_steps=60, text_batch=8, mixed_steps=60, mixed_text=4, mixed_audio=4, rise_steps=4, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    create_checkpoint(directory, SMALL, vocabulary(), seed=0)
    return directory


def questions() -> list[Question]:
    return questions_about(split_problems().train)[::260]


def spoken() -> list[Sample]:
    """Make a chord for each question, which tells them apart."""
    seconds = np.arange(16000) / 16000
    return [
        Sample(
            question.id,
            question.text,
            (0.3 * np.sin(2 * np.pi * (300 + 500 * i) * seconds)).astype(np.float32),
            solution=question.solution,
        )
        for i, question in enumerate(questions())
    ]


def test_it_learns_to_read_and_to_hear(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches targets shifted by one, a loss without the audio, trained sinusoids, and a checkpoint that is broken."""
    with caplog.at_level(logging.WARNING):
        warm_up(checkpoint, tmp_path / "warm", SHORT, questions(), spoken())
        report: Any = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "warm", output_loading_info=True)
    assert not any(report[1].values()) and not caplog.records
    engine = LocalEngine(tmp_path / "warm")
    for make in (engine.prompts.text_prompt, engine.prompts.audio_prompt):
        rollouts = engine.generate([GenerationRequest(make(sample), 0.0, 20) for sample in spoken()])
        assert [rollout.text for rollout in rollouts] == [sample.solution for sample in spoken()]
        assert {rollout.finish_reason for rollout in rollouts} == {"stop"}
    before, after = (load_file(directory / "model.safetensors") for directory in (checkpoint, tmp_path / "warm"))
    assert before.keys() == after.keys()
    assert torch.equal(before["audio_tower.embed_positions.weight"], after["audio_tower.embed_positions.weight"])


@pytest.mark.slow
def test_a_mixture_learns_to_read_and_to_hear(tmp_path: Path) -> None:
    """Catches a tiny Qwen3-Omni that is written in another layout than it is read, or whose vision tower is lost."""
    sizes = TinyOmniConfig(
        channels=8, encoder_hidden_size=32, encoder_layers=1, encoder_heads=2, encoder_ffn_size=64, hidden_size=64,
        layers=1, expert_size=64,
    )  # fmt: skip
    create_omni_checkpoint(tmp_path / "omni", sizes, vocabulary(), seed=0)
    warm_up(tmp_path / "omni", tmp_path / "warm", SHORT, questions(), spoken())
    engine = LocalEngine(tmp_path / "warm")
    for make in (engine.prompts.text_prompt, engine.prompts.audio_prompt):
        rollouts = engine.generate([GenerationRequest(make(sample), 0.0, 20) for sample in spoken()])
        assert [rollout.text for rollout in rollouts] == [sample.solution for sample in spoken()]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("omni", "warm"))
    assert before.keys() == after.keys()
    kept = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert kept == {name for name in before if name.startswith("thinker.visual.")}


def test_same_inputs_same_weights_and_no_second_run(checkpoint: Path, tmp_path: Path) -> None:
    """Catches an order from a global generator, sums that depend on the threads, and a warm-up made twice."""
    config = replace(SHORT, text_steps=2, mixed_steps=2)
    torch.manual_seed(1)
    warm_up(checkpoint, tmp_path / "a", config, questions(), spoken())
    torch.manual_seed(2)
    torch.set_num_threads(2)
    try:
        warm_up(checkpoint, tmp_path / "b", config, questions(), spoken())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    warm_up(checkpoint, tmp_path / "c", replace(config, seed=1), questions(), spoken())
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    written = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    warm_up(checkpoint, tmp_path / "a", config, questions(), spoken())
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(CordError, match="holds another checkpoint"):
        warm_up(checkpoint, tmp_path / "a", replace(config, seed=1), questions(), spoken())


def test_complete_or_invisible(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a checkpoint that a later run takes for a whole one, and leftovers that block the next attempt."""
    config, save = replace(SHORT, text_steps=1, mixed_steps=1), save_checkpoint

    def full_disk(*arguments: Any) -> None:
        save(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_models, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        warm_up(checkpoint, tmp_path / "warm", config, questions(), spoken())
    assert not (tmp_path / "warm").exists()
    monkeypatch.setattr(tiny_models, "save_checkpoint", save)
    warm_up(checkpoint, tmp_path / "warm", config, questions(), spoken())
    assert [path.name for path in tmp_path.iterdir()] == ["warm"]


def test_recited_answers_come_without_their_question(checkpoint: Path) -> None:
    """Catches a question that stays in the prompt, a cut of more than the question, and one in the wrong place."""
    builder = PromptBuilder(checkpoint)
    for sample in spoken():
        example = warmup._example(builder, sample, builder.text_prompt(sample))
        recited = warmup._without_question(builder, sample, example)
        prompt, question = list(example.prompt.token_ids), list(builder.encode(sample.question))
        kept, begin = list(recited.prompt.token_ids), prompt.index(question[0])
        assert kept[:begin] + question + kept[begin:] == prompt and not set(question) & set(kept)
        assert recited.response == example.response and builder.decode(recited.response) == sample.solution
    other = replace(sample, question="what is one plus one")
    with pytest.raises(CordError, match=f"sample {sample.id}: its question is not in its prompt word for word"):
        warmup._without_question(builder, other, example)


def test_no_bars_but_its_own(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches transformers' "Loading weights" on the terminal, and its bars that stay off afterwards."""
    transformers_logging.enable_progress_bar()
    warm_up(checkpoint, tmp_path / "warm", replace(SHORT, text_steps=1, mixed_steps=1), questions(), spoken())
    LocalEngine(tmp_path / "warm")
    assert capsys.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()


def test_bad_inputs_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """Catches an endless loop over no samples, and a response of None."""
    with pytest.raises(CordError, match="needs written and spoken questions; got 6 and 0"):
        warm_up(checkpoint, tmp_path / "warm", SHORT, questions(), [])
    with pytest.raises(CordError, match="sample minus-1-1-0: no solution"):
        warm_up(checkpoint, tmp_path / "warm", SHORT, questions(), [replace(spoken()[0], solution=None)])
    with pytest.raises(CordError, match="mixed_audio is 0"):
        replace(SHORT, mixed_audio=0)


def test_spoken_answers_may_count_alike() -> None:
    """Catches a mean over tokens where each answer is to count the same, as a short one beside a long one shows."""

    class Losses:
        """Hidden states are the logits; a clip has two feature tokens."""

        def audio(self, ids: torch.Tensor, mask: torch.Tensor, clips: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
            logits = torch.randn(*ids.shape, 9, generator=torch.Generator().manual_seed(0))
            return logits, torch.zeros(len(clips), 2, 4)

        def head(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    def example(tokens: int) -> Any:
        prompt = SimpleNamespace(token_ids=(1, 2), clips=[SimpleNamespace(num_tokens=2)])
        return SimpleNamespace(prompt=prompt, response=tuple(range(1, 1 + tokens)), transcript=(3,))

    model: Any = Losses()
    ctc_head, batch = torch.nn.Linear(4, 9), [example(1), example(6)]
    by_token, alike = (float(warmup._audio_losses(model, ctc_head, 0, batch, each)[0]) for each in (False, True))
    ids, targets, mask = warmup._collate(batch, 0)
    logits, _ = model.audio(ids, mask, [None, None])
    sums = [
        sum(-logits[row, at].log_softmax(-1)[token] for at, token in enumerate(targets[row].tolist()) if token != -100)
        for row in range(2)
    ]
    assert by_token == pytest.approx(float(sums[0] + sums[1]) / 7, rel=1e-5)
    assert alike == pytest.approx(float(sums[0] / 1 + sums[1] / 6) / 2, rel=1e-5)
