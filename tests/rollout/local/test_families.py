"""The local engine on every family: its tokens are likely ones of the Megatron model of the same checkpoint."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_cord.convert import export_tensors, read_into
from megatron_cord.data.audio.features import stack_features
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.rollout.local.engine import LocalEngine, LocalEngineConfig
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.rollout.weights import PlainWeights
from tests.model.family_reference import save_whole

WORDS = ["what", "is", "one", "plus", "two", "three"]
FAMILIES = {
    "audioflamingo3": False,
    "llama": False,
    "mistral": False,
    "qwen2": True,
    "qwen2_5_omni": True,
    "qwen2_audio+llama": False,
    "qwen2_moe": False,
    "qwen3": True,
    "qwen3_moe": False,
    "qwen3_omni_moe": False,
    "step_audio_2": False,
    "ultravox": True,
    "voxtral": False,
}


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


def prompts(builder: PromptBuilder, *, hears: bool) -> list[Prompt]:
    """Written questions of several lengths, recordings of one, two and three clips, and two in a conversation."""
    rng = np.random.default_rng(0)
    made = []
    for i, (question, length) in enumerate(
        [("what is one plus two", 3000), ("what", 9000), ("one plus two is three", 20000)]
    ):
        sample = Sample(id=f"s{i}", question=question, waveform=(0.1 * rng.normal(size=length)).astype(np.float32))
        made.append(builder.text_prompt(sample))
        if hears:
            made.append(builder.audio_prompt(sample))
    turns = (
        Turn("user", (TextPart("what is\n"), AudioPart(0, "one"))),
        Turn("assistant", (TextPart("three"),)),
        Turn("user", (AudioPart(1, "plus two"),)),
    )
    chat = Sample("chat", "", turns=turns)
    made.append(builder.text_prompt(chat))
    if hears:
        recordings = [(0.1 * rng.normal(size=length)).astype(np.float32) for length in (3000, 6000)]
        made.append(builder.audio_prompt(chat.with_recordings(recordings)))
    return made


@torch.no_grad()
def megatron_logits(model: LALM, prompt: Prompt, response: tuple[int, ...]) -> Tensor:
    """[response, V] of one sequence."""
    features = stack_features([clip.features for clip in prompt.clips]) if prompt.clips else None
    frames = tuple(clip.num_frames for clip in prompt.clips) if prompt.clips else None
    hidden = model(ModelInput(torch.tensor([prompt.token_ids + response]), features, frames, (prompt.sample_id,)))
    logits = (hidden @ model.output_weight.t())[:, 0, : model.arch.language.vocab_size]
    own: Tensor = logits[len(prompt.token_ids) - 1 : -1]
    return own


@pytest.mark.parametrize("family", list(FAMILIES))
def test_megatron_agrees_with_what_is_generated(family: str, layout: Layout, tmp_path: Path) -> None:
    """Catches an engine that hears other audio, reads other positions behind padding, or keeps a stale cache.

    Also one that takes updates under other names than training sends them; and a tied head that is not tied. Greedy
    answers must be the likeliest tokens of the Megatron model.
    """
    directory = save_whole(tmp_path / family, family, WORDS, tied=FAMILIES[family])
    model = LALM(load_architecture(directory), layout, torch.float32)
    read_into(model, directory)
    engine = LocalEngine(directory, LocalEngineConfig(max_batch_size=4))
    builder = PromptBuilder(directory, long_audio="cut")
    asked = prompts(builder, hears=model.arch.encoder is not None)
    for version in (0, 1):
        requests = [GenerationRequest(prompt, temperature, 5, seed=3) for prompt in asked for temperature in (0.0, 1.5)]
        for request, rollout in zip(requests, engine.generate(requests), strict=True):
            logits = megatron_logits(model, request.prompt, rollout.token_ids)
            expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=0, atol=1e-4)
            assert rollout.versions[0].version == version
            if request.temperature == 0:
                logits[:, list(builder.special_ids)] = -torch.inf
                assert logits.argmax(-1).tolist() == list(rollout.token_ids)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        engine.update_weights(PlainWeights(dict(export_tensors(model))), version=1)


def _keep_choice(found: list[Tensor], _: torch.nn.Module, __: Any, made: tuple[Tensor, Tensor]) -> None:
    found.append(made[1])


def test_experts_that_are_returned(layout: Layout, tmp_path: Path) -> None:
    """Catches experts of another token, layer or response, also behind padding and after another response has ended.

    The Megatron model, given the same tokens, must choose them by itself.
    """
    directory = save_whole(tmp_path / "mixture", "qwen3_moe", WORDS, tied=False)
    model = LALM(load_architecture(directory), layout, torch.float32)
    read_into(model, directory)
    engine = LocalEngine(directory, LocalEngineConfig(max_batch_size=4))
    asked = prompts(PromptBuilder(directory), hears=False)
    requests = [GenerationRequest(p, 1.5, 1 + 3 * i, seed=i, return_experts=i != 1) for i, p in enumerate(asked)]
    assert model.routing is not None
    lengths = set()
    for i, (request, rollout) in enumerate(zip(requests, engine.generate(requests), strict=True)):
        assert (rollout.experts is None) == (i == 1)
        if rollout.experts is None:
            continue
        lengths.add(len(rollout.token_ids))
        ids = request.prompt.token_ids + rollout.token_ids
        experts = rollout.experts.tensor()
        assert experts.shape[0] == len(ids) - 1
        found: list[Tensor] = []  # bool [tokens, experts] of each layer
        keep = partial(_keep_choice, found)
        layers = model.language_model.decoder.layers
        handles = [layer.mlp.router.register_forward_hook(keep) for layer in layers]
        megatron_logits(model, request.prompt, rollout.token_ids)
        for handle in handles:
            handle.remove()
        assert len(found) == experts.shape[1] > 1
        for number, chosen in enumerate(found):
            own = torch.zeros_like(chosen[:-1]).scatter(1, experts[:, number].long(), True)
            assert torch.equal(own, chosen[:-1])
    assert len(lengths) > 1
