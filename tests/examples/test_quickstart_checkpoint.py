"""The quickstart's checkpoint, loaded and used by transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioForConditionalGeneration

from examples.quickstart.checkpoint import SPECIAL_TOKENS, TinyModelConfig, create_checkpoint, sinusoids
from megatron_cord.errors import CordError

WORDS = ["one", "three", "seven", "twelve", "plus", "minus", "is", "the", "answer", "what", "apples", ".", "1", "12"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    create_checkpoint(path, TinyModelConfig(), WORDS, seed=0)
    return path


def test_loads_without_a_complaint(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches names or shapes that transformers would silently replace by random weights."""
    with caplog.at_level(logging.WARNING):
        loaded: Any = Qwen2AudioForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    model, report = loaded
    assert not any(report.values()) and not caplog.records
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.1e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.text_config.vocab_size % 8 == 0 and model.config.text_config.vocab_size >= len(tokenizer)
    assert set(SPECIAL_TOKENS) == set(tokenizer.all_special_tokens)
    assert processor.audio_token_id == model.config.audio_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_published_names_and_values_come_through(directory: Path) -> None:
    """Catches a renamed tensor, a lost scale of the sinusoids, and transformers' own 0.02 initialization."""
    saved = load_file(directory / "model.safetensors")
    assert not [name for name in saved if name.startswith(("language_model.model.model.", "model."))]
    model = Qwen2AudioForConditionalGeneration.from_pretrained(directory)
    torch.testing.assert_close(
        saved["language_model.model.embed_tokens.weight"], model.get_input_embeddings().weight, rtol=0, atol=0
    )
    torch.testing.assert_close(saved["language_model.lm_head.weight"], model.lm_head.weight, rtol=0, atol=0)
    torch.testing.assert_close(saved["audio_tower.embed_positions.weight"], 0.3 * sinusoids(75, 96))
    assert saved["audio_tower.layers.0.fc2.weight"].std().item() == pytest.approx(384**-0.5, rel=0.05)


def test_same_seed_same_file(directory: Path, tmp_path: Path) -> None:
    """Catches weights that depend on anything but the seed, and a seed without effect."""
    create_checkpoint(tmp_path / "same", TinyModelConfig(), WORDS, seed=0)
    create_checkpoint(tmp_path / "other", TinyModelConfig(), WORDS, seed=1)
    bytes_of = [
        (path / "model.safetensors").read_bytes() for path in (directory, tmp_path / "same", tmp_path / "other")
    ]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_processor_prompts_and_generates(directory: Path) -> None:
    """Catches a chat template or an extractor that Qwen2-Audio's processor cannot use, and a window that misfits."""
    processor: Any = AutoProcessor.from_pretrained(directory)
    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(directory)
    turns = [{"role": "user", "content": [{"type": "audio", "audio_url": "clip"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    clip = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    inputs = processor(text=text, audio=clip, sampling_rate=16000, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.audio_token_id).sum() == 12
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3


def test_words_survive_the_tokenizer(directory: Path) -> None:
    """Catches a pre-tokenizer that splits words or a decoder that glues them."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    line = "seven plus three is 12 . the answer is 12"
    assert tokenizer.decode(tokenizer(line)["input_ids"]) == line
    assert tokenizer("banana")["input_ids"] == [tokenizer.unk_token_id]


def test_a_word_with_a_space_is_refused(tmp_path: Path) -> None:
    """Catches a vocabulary entry that no question could ever match."""
    with pytest.raises(CordError, match="'two words' is not one word"):
        create_checkpoint(tmp_path, TinyModelConfig(), ["one", "two words"], seed=0)
