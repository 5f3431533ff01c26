"""The local engine against transformers' own forward pass and generation, and its weight sync."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, Qwen2AudioForConditionalGeneration

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.errors import CordError
from megatron_cord.rollout.local.engine import LocalEngine, LocalEngineConfig
from megatron_cord.rollout.types import GenerationRequest, VersionSpan, spans_of
from megatron_cord.rollout.weights import PlainWeights
from tests.rollout.local.test_sampling import kept_by_hand

WORDS = [
    "what",
    "is",
    "add",
    "and",
    "one",
    "two",
    "three",
    "seven",
    "plus",
    "minus",
    "the",
    "answer",
    "apples",
    ".",
    "1",
    "2",
    "12",
]
QUESTIONS = [
    "what is one plus two",
    "add seven and three",
    "seven apples minus three apples",
    "what is two minus one",
    "one",
]
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    create_checkpoint(directory, TinyModelConfig(), WORDS, seed=0)
    return directory


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> LocalEngine:
    return LocalEngine(checkpoint)


@pytest.fixture
def fresh(checkpoint: Path) -> LocalEngine:
    return LocalEngine(checkpoint)


def samples() -> list[Sample]:
    """Clips of different lengths, one filling the window."""
    rng = np.random.default_rng(0)
    lengths = [16000, 9000, 48000, 24321, 30000]
    clips = [(0.1 * rng.normal(size=length)).astype(np.float32) for length in lengths]
    return [
        Sample(id=f"s{i}", question=text, waveform=clip)
        for i, (text, clip) in enumerate(zip(QUESTIONS, clips, strict=True))
    ]


def requests(engine: LocalEngine, temperature: float = 1.0, tokens: int = 12) -> list[GenerationRequest]:
    """Audio and text prompts mixed."""
    prompts = [
        make(sample) for sample in samples() for make in (engine.prompts.audio_prompt, engine.prompts.text_prompt)
    ]
    return [GenerationRequest(prompt, temperature, tokens, seed) for seed, prompt in enumerate(prompts)]


def reference_logits(model: Any, prompt: Prompt, response: tuple[int, ...]) -> Tensor:
    """Logits [response, V] of one unpadded sequence without a cache."""
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([prompt.token_ids + response])}
    if prompt.clips:
        clip = prompt.clips[0]
        inputs["input_features"] = clip.features[None]
        inputs["feature_attention_mask"] = (torch.arange(clip.features.shape[1]) < clip.num_frames).long()[None]
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits


def test_logprobs_are_those_of_a_plain_forward(engine: LocalEngine, checkpoint: Path) -> None:
    """Catches wrong positions under padding, a stale cache, audio scattered to another row.

    Also scores of masked or scaled logits.
    """
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint).eval()
    batch = requests(engine, temperature=1.5)
    for request, rollout in zip(batch, engine.generate(batch), strict=True):
        logits = reference_logits(model, request.prompt, rollout.token_ids)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        assert rollout.prompt_id == request.prompt.sample_id
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_greedy_is_transformers_generation(engine: LocalEngine, checkpoint: Path) -> None:
    """Catches a prompt that the checkpoint's own processor would not build.

    Also decoding that leaves the greedy path.
    """
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    for sample in samples():
        turns = [{"role": "user", "content": [{"type": "audio", "audio_url": "clip"}]}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, audio=sample.waveform, sampling_rate=16000, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=8, suppress_tokens=list(engine.prompts.special_ids))
        prompt = engine.prompts.audio_prompt(sample)
        (rollout,) = engine.generate([GenerationRequest(prompt, 0.0, 8)])
        assert prompt.token_ids + rollout.token_ids == tuple(expected[0].tolist())


def test_a_response_does_not_depend_on_its_batch(engine: LocalEngine, checkpoint: Path) -> None:
    """Catches a generator shared by the batch, and results returned in the sorted order."""
    batch = requests(engine)
    together = [rollout.token_ids for rollout in engine.generate(batch)]
    assert [engine.generate([request])[0].token_ids for request in batch] == together
    small = LocalEngine(checkpoint, LocalEngineConfig(max_batch_size=3))
    assert [rollout.token_ids for rollout in small.generate(batch[::-1])][::-1] == together


def test_seeds_and_prompts_draw_their_own_noise(engine: LocalEngine) -> None:
    """Catches an ignored seed, and one noise for all prompts that leave the seed at its default."""
    prompt = engine.prompts.text_prompt(samples()[0])
    batch = [GenerationRequest(prompt, 1.0, 12, seed=seed) for seed in range(8)] + [
        GenerationRequest(replace(prompt, sample_id="x"), 1.0, 12)
    ]
    assert len({rollout.token_ids for rollout in engine.generate(batch)}) == len(batch)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_samples_follow_the_softmax(engine: LocalEngine, checkpoint: Path, temperature: float) -> None:
    """Catches noise that is not Gumbel's, temperature on the wrong side, and mass on special tokens (chi-square)."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint).eval()
    prompt, draws = engine.prompts.text_prompt(samples()[0]), 4000
    logits = reference_logits(model, prompt, (0,))[0].double() / temperature
    logits[list(engine.prompts.special_ids)] = -torch.inf
    expected = draws * logits.softmax(-1)
    rollouts = engine.generate([GenerationRequest(prompt, temperature, 1, seed) for seed in range(draws)])
    counts = torch.bincount(
        torch.tensor([rollout.token_ids[0] for rollout in rollouts]), minlength=len(expected)
    ).double()
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum().item()
    degrees = int(allowed.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (1.0, 4), (0.7, 6), (1e-9, 0)])
def test_truncated_samples_are_of_the_likeliest_tokens(
    engine: LocalEngine, checkpoint: Path, top_p: float, top_k: int
) -> None:
    """Catches a bound on the wrong distribution, mass that is not renormalised, a neighbour's bound.

    Also log-probabilities of the part, and a prompt whose likeliest tokens are forbidden.
    """
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint).eval()
    prompt, draws, temperature = engine.prompts.text_prompt(samples()[0]), 2000, 1.5
    raw = reference_logits(model, prompt, (0,))[0].double()
    forbidden = set(engine.prompts.special_ids)
    kept = kept_by_hand((raw / temperature).tolist(), top_p, top_k) - forbidden
    kept = kept or {max(set(range(len(raw))) - forbidden, key=lambda i: float(raw[i]))}
    batch = [GenerationRequest(prompt, temperature, 1, seed, top_p, top_k) for seed in range(draws)]
    whole = [GenerationRequest(prompt, temperature, 1, seed) for seed in range(40)]
    rollouts = engine.generate([*batch, *whole])
    for one, again in ((rollouts[draws:], engine.generate(whole)), (rollouts[:5], engine.generate(batch[:5]))):
        assert [r.token_ids for r in one] == [r.token_ids for r in again]
        # A processor may sum the products of another number of rows in another order.
        assert [r.logprobs[0] for r in one] == pytest.approx([r.logprobs[0] for r in again], abs=1e-5)
    chances = (raw / temperature).exp() * torch.tensor([float(i in kept) for i in range(len(raw))])
    expected = draws * chances / chances.sum()
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts[:draws]]), minlength=len(raw)).double()
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    degrees = int(allowed.sum()) - 1
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum().item()
    assert chi_square <= degrees + 4 * (2 * degrees) ** 0.5 + 1e-6
    logprob = float(raw.log_softmax(-1)[rollouts[0].token_ids[0]])
    assert rollouts[0].logprobs[0] == pytest.approx(logprob, abs=1e-4)


def test_endings(engine: LocalEngine) -> None:
    """Catches tokens after the end of a sequence, limits taken from a neighbour.

    Also specials sampled at a high temperature.
    """
    prompts = [request.prompt for request in requests(engine)]
    batch = [GenerationRequest(prompt, 50.0, limit, limit) for limit in (1, 7, 60) for prompt in prompts]
    rollouts = engine.generate(batch)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for request, rollout in zip(batch, rollouts, strict=True):
        eos = [token in engine.prompts.eos_ids for token in rollout.token_ids]
        assert not any(eos[:-1]) and eos[-1] == (rollout.finish_reason == "stop")
        assert len(eos) == request.max_new_tokens or rollout.finish_reason == "stop"
        assert len(eos) == len(rollout.logprobs) and rollout.versions == (VersionSpan(0, len(eos), 0),)
        assert not set(rollout.token_ids) & set(engine.prompts.special_ids)
        assert "<|" not in rollout.text


def test_a_full_update_makes_the_other_model(fresh: LocalEngine, tmp_path: Path) -> None:
    """Catches tensors that are accepted by name but not copied, and a version that is not reported."""
    create_checkpoint(tmp_path, TinyModelConfig(), WORDS, seed=1)
    batch = requests(fresh, temperature=0.0)
    before = fresh.generate(batch)
    fresh.update_weights(PlainWeights(load_file(tmp_path / "model.safetensors")), version=3)
    after, other = fresh.generate(batch), LocalEngine(tmp_path).generate(batch)
    assert [rollout.token_ids for rollout in after] == [rollout.token_ids for rollout in other]
    assert [rollout.logprobs for rollout in after] == [rollout.logprobs for rollout in other]
    assert [rollout.logprobs for rollout in after] != [rollout.logprobs for rollout in before]
    assert fresh.weight_version == 3 and after[0].versions[0].version == 3


def test_left_out_tensors_stay(fresh: LocalEngine, checkpoint: Path) -> None:
    """Catches an update that resets what the stream leaves out; zero logits make every log-probability -log V."""
    batch = requests(fresh)
    before = fresh.generate(batch)
    saved = load_file(checkpoint / "model.safetensors")[HEAD]
    fresh.update_weights(PlainWeights({HEAD: torch.zeros_like(saved)}), version=1)
    assert fresh.generate(batch[:1])[0].logprobs[0] == pytest.approx(-np.log(fresh.prompts.vocab_size), abs=1e-5)
    fresh.update_weights(PlainWeights({HEAD: saved}), version=2)
    assert [rollout.logprobs for rollout in fresh.generate(batch)] == [rollout.logprobs for rollout in before]


def test_bad_updates_keep_the_version(fresh: LocalEngine) -> None:
    """Catches silent acceptance of a wrong name or shape, and a version that counts before the stream has ended."""

    class Broken(PlainWeights):
        def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
            yield "multi_modal_projector.linear.bias", torch.zeros(128)
            raise ConnectionError

    with pytest.raises(
        CordError, match=r"no tensor 'language_model.lm_head.weigth'; nearest: language_model.lm_head.weight"
    ):
        fresh.update_weights(PlainWeights({"language_model.lm_head.weigth": torch.zeros(1)}), version=1)
    with pytest.raises(CordError, match=r"linear.bias has shape \[64\], the model's has \[128\]"):
        fresh.update_weights(PlainWeights({"multi_modal_projector.linear.bias": torch.zeros(64)}), version=1)
    with pytest.raises(ConnectionError):
        fresh.update_weights(Broken({}), version=1)
    assert fresh.weight_version == 0


def test_names_are_those_of_the_checkpoints_files(checkpoint: Path, tmp_path: Path) -> None:
    """Catches an engine that takes only one of the two namings.

    They are the published one, and that of transformers' ``save_pretrained``.
    """
    fresh_model = Qwen2AudioForConditionalGeneration(
        AutoConfig.from_pretrained(checkpoint)
    )  # a loaded one would keep the file's names
    fresh_model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    published, saved = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert "language_model.model.norm.weight" in published and "language_model.model.norm.weight" not in saved
    for directory, tensors in ((checkpoint, published), (tmp_path, saved)):
        engine = LocalEngine(directory)
        engine.update_weights(PlainWeights(tensors), version=1)
        assert engine.weight_version == 1


def test_bad_requests_are_named(engine: LocalEngine) -> None:
    """Catches requests that would crash deep inside the model, or read another clip's features."""
    request = GenerationRequest(engine.prompts.audio_prompt(samples()[0]), 1.0, 4)
    cases = [
        (
            replace(request, prompt=replace(request.prompt, token_ids=(999,), clips=())),
            "s0: the prompt is empty or has ids outside",
        ),
        (replace(request, prompt=replace(request.prompt, clips=())), "s0: 12 audio placeholders for 0 audio features"),
        (replace(request, max_new_tokens=0), "s0: max_new_tokens is 0"),
        (replace(request, temperature=-1.0), "s0: the temperature is -1.0"),
    ]
    for bad, message in cases:
        with pytest.raises(CordError, match=message):
            engine.generate([bad])
    assert engine.generate([]) == []


def test_closing_twice_and_a_missing_checkpoint(fresh: LocalEngine, tmp_path: Path) -> None:
    """Catches a close that fails the second time, and a traceback for a mistyped directory."""
    fresh.close()
    fresh.close()
    with pytest.raises(CordError, match=r"config\.json does not exist; give a Hugging Face checkpoint directory"):
        LocalEngine(tmp_path)
    with pytest.raises(CordError, match="max_batch_size is 0"):
        LocalEngineConfig(max_batch_size=0)


def test_spans_of_versions() -> None:
    """Would catch a crash for a response that was aborted before its first token.

    Also a token with another's version.
    """
    assert spans_of([]) == ()
    assert spans_of([0, 0, 7]) == (VersionSpan(0, 2, 0), VersionSpan(2, 3, 7))
