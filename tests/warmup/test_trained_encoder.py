"""Warm-ups in which the encoder learns beside the recognizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.convert import read_tensors
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout, ParallelConfig, initialize
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.warmup.config import CtcConfig, RegressionConfig, WarmupConfig
from megatron_cord.warmup.corpus import Corpus
from megatron_cord.warmup.distillation import Distillation
from megatron_cord.warmup.parts import read_parts
from megatron_cord.warmup.states import EncoderStates
from megatron_cord.warmup.trained_encoder import TrainedEncoder
from megatron_cord.warmup.warmup import warm_up
from tests.gloo import run_ranks
from tests.warmup.short_warmup import after_calls, config_of, distilled_config, summary, warm_up_alone


def learning_config(inputs: Path, output: Path, steps: int = 12, rate: float = 2e-3) -> WarmupConfig:
    """Return a short warm-up whose encoder learns."""
    few: dict[str, Any] = {"batch_size": 16, "learning_rate": 5e-3}
    ctc = CtcConfig(steps=steps, hidden_size=48, encoder_learning_rate=rate, **few)
    return config_of(inputs, output, ctc=ctc, regression=RegressionConfig(steps=8, filler="user", **few))


@pytest.fixture(scope="module")
def learned(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a warm-up that was never stopped."""
    output = tmp_path_factory.mktemp("learned") / "out"
    warm_up_alone(learning_config(inputs, output))
    return output


def test_the_written_encoder_is_the_one_whose_states_the_adapter_learned(
    inputs: Path, learned: Path, layout: Layout
) -> None:
    """Catches an encoder that is not written, tensors beside it that change, and states of the original."""
    before, after = dict(read_tensors(inputs / "grafted")), dict(read_tensors(learned / "model"))
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    trained = {name for name in before if name.startswith(("audio_tower.", "multi_modal_projector."))}
    assert changed == trained - {"audio_tower.embed_positions.weight"}
    assert {after[name].dtype for name in changed} == {before[name].dtype for name in changed}
    assert summary(learned)["trained"] == ["audio_encoder", "adapter"]
    parts = read_parts(str(learned / "model"), layout, torch.float32)
    corpus = Corpus(learning_config(inputs, learned), PromptBuilder(inputs / "grafted"), parts.arch)
    counts = [parts.encoder.num_outputs(each.num_frames) for each in corpus.utterances]
    kept = EncoderStates(learned / "states", counts, parts.encoder.arch.hidden_size)
    (clip,) = corpus.clips([3])
    with torch.no_grad():
        states = parts.encoder(torch.as_tensor(clip.features)[None], [clip.num_frames])
    torch.testing.assert_close(kept.read(3), states)


def test_gradients_are_those_of_the_encoder_itself(inputs: Path, layout: Layout) -> None:
    """Catches a weight that is cut off from the loss, and a key's bias that learns from rounding noise."""
    parts = read_parts(str(inputs / "grafted"), layout, torch.float32)
    trained = TrainedEncoder(parts.encoder, parts.encoder_weights(layout.device))
    features, frames = torch.randn(2, parts.encoder.arch.num_mels, 120), [120, 97]
    loss = trained(features, frames).pow(3).sum()
    loss.backward()
    for name in parts.learnable:
        parts.encoder.get_parameter(name).requires_grad_(True)
    same = parts.encoder(features, frames).pow(3).sum()
    same.backward()
    assert float(loss.detach()) == float(same.detach())
    for name, weight in trained.named().items():
        assert weight.grad is not None and weight.grad.abs().sum() > 0
        torch.testing.assert_close(weight.grad, parts.encoder.get_parameter(name).grad)
    bias = next(weight for name, weight in trained.named().items() if name.endswith("linear_qkv.bias"))
    head_dim = parts.encoder.arch.hidden_size // parts.encoder.arch.num_heads
    assert bias.grad is not None and (bias.grad.view(-1, 3, head_dim)[:, 1] == 0).all()


def learn_on_ranks(rank: int, inputs: str, output: str) -> None:
    warm_up(learning_config(Path(inputs), Path(output)), initialize(ParallelConfig(), seed=0))


def test_two_ranks_are_one(inputs: Path, learned: Path, tmp_path: Path) -> None:
    """Catches gradients of the encoder that are not summed, and a batch that a rank encodes wholly."""
    run_ranks(learn_on_ranks, 2, str(inputs), str(tmp_path / "out"))
    one, two = (summary(each)["losses"] for each in (learned, tmp_path / "out"))
    torch.testing.assert_close(torch.tensor(one["ctc"]), torch.tensor(two["ctc"]), rtol=0.02, atol=1e-3)


def test_a_stop_changes_nothing(inputs: Path, learned: Path, layout: Layout, tmp_path: Path) -> None:
    """Catches an encoder, or its moments, that a start forgets, and states of one that had not learned all.

    It is stopped while the encoder learns, while its states are computed, and in the regression.
    """
    config = learning_config(inputs, tmp_path / "out")
    for calls in (5, 7 + 2, 1 + 3):
        with pytest.raises(StoppedError):
            warm_up(config, layout, after_calls(calls))
    warm_up(config, layout)
    once, again = summary(learned), summary(tmp_path / "out")
    assert once["losses"] == again["losses"] and once["token_errors"] == again["token_errors"]
    weights = "model/model.safetensors"
    assert (learned / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_its_rate_is_its_own(inputs: Path, layout: Layout, tmp_path: Path) -> None:
    """Catches an encoder with the recognizer's rate: AdamW's first step is the rate, whatever the gradient."""
    warm_up(learning_config(inputs, tmp_path / "out", steps=1, rate=1e-2), layout)
    name = "audio_tower.layers.0.fc1.weight"
    before, after = (dict(read_tensors(path))[name] for path in (inputs / "grafted", tmp_path / "out" / "model"))
    assert float((after - before).abs().median()) == pytest.approx(1e-2, rel=0.1)
    with pytest.raises(CordError, match=r"ctc\.encoder_learning_rate cannot be negative, got -1"):
        CtcConfig(encoder_learning_rate=-1)


def test_the_distillation_hears_with_it(
    inputs: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a third stage whose language model listens through the checkpoint's own encoder."""
    heard: list[torch.Tensor] = []

    def look(self: Distillation) -> float:
        assert self._model.audio_encoder is not None
        heard.append(self._model.audio_encoder.conv1.weight.detach().clone())
        return 0.0

    monkeypatch.setattr(Distillation, "held_out_divergence", look)
    distillation = distilled_config(inputs, tmp_path, steps=1).distillation
    warm_up(replace(learning_config(inputs, tmp_path / "out"), distillation=distillation), layout)
    name = "audio_tower.conv1.weight"
    before, after = (dict(read_tensors(path))[name] for path in (inputs / "grafted", tmp_path / "out" / "model"))
    assert torch.equal(heard[0], after.float()) and not torch.equal(after, before)
