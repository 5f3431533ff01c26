"""Prompts against transformers' own processor of the same checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2AudioProcessor, WhisperFeatureExtractor

from examples.quickstart.checkpoint import TinyModelConfig, build_tokenizer, create_checkpoint
from megatron_cord.data.prompts import PromptBuilder, audio_token_count
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError

WORDS = ["what", "is", "one", "plus", "two", "the", "answer", ".", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    create_checkpoint(directory, TinyModelConfig(), WORDS, seed=0)
    return directory


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(checkpoint)


def sample(samples: int = 16000) -> Sample:
    clip = (0.1 * np.random.default_rng(samples).normal(size=samples)).astype(np.float32)
    return Sample(id="s7", question="what is one plus two", waveform=clip)


@pytest.mark.parametrize("samples", [2500, 16000, 16001, 31999, 47999, 48000])
def test_audio_prompt_is_the_processors(builder: PromptBuilder, checkpoint: Path, samples: int) -> None:
    """Catches a wrong count of placeholders at any rounding, other features, and a template that is not the checkpoint's."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    turns = [{"role": "user", "content": [{"type": "audio", "audio_url": "clip"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    expected = processor(text=text, audio=sample(samples).waveform, sampling_rate=16000, return_tensors="pt")
    prompt = builder.audio_prompt(sample(samples))
    (clip,) = prompt.clips
    assert prompt.token_ids == tuple(expected["input_ids"][0].tolist())
    assert clip.num_tokens == prompt.token_ids.count(builder.audio_token_id)
    assert clip.num_frames == expected["feature_attention_mask"].sum()
    torch.testing.assert_close(clip.features, expected["input_features"][0], rtol=0, atol=1e-4)


def test_prompts_differ_only_where_audio_stands_for_text(builder: PromptBuilder) -> None:
    """Catches a teacher that reads another instruction than the student hears."""
    heard, read = builder.audio_prompt(sample()), builder.text_prompt(sample())
    words = builder.token_strings(read.token_ids)
    assert words == ["<|im_start|>", "user", "what", "is", "one", "plus", "two", "<|im_end|>", "<|im_start|>", "assistant"]
    spoken = ["<|audio_bos|>", *["<|AUDIO|>"] * heard.clips[0].num_tokens, "<|audio_eos|>"]
    assert builder.token_strings(heard.token_ids) == words[:2] + spoken + words[7:]
    assert read.clips == () and heard.sample_id == read.sample_id == "s7"


def test_the_published_template_works_too(tmp_path: Path) -> None:
    """Catches a builder that fits only the quickstart's template: Qwen2-Audio's own has a system turn and numbers the clips."""
    words = [*WORDS, "system", "You", "are", "a", "helpful", "assistant.", "Audio", "1:"]
    create_checkpoint(tmp_path, TinyModelConfig(), words, seed=0)
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(64, hop_length=320, chunk_length=3), build_tokenizer(words))
    processor.save_pretrained(tmp_path)
    builder = PromptBuilder(tmp_path)
    heard, read = (builder.token_strings(make(sample()).token_ids) for make in (builder.audio_prompt, builder.text_prompt))
    assert "".join(heard).replace("<|AUDIO|>", "") == "".join(read).replace("whatisoneplustwo", "Audio1:<|audio_bos|><|audio_eos|>")
    assert read[:8] == ["<|im_start|>", "system", "You", "are", "a", "helpful", "assistant.", "<|im_end|>"]


def test_ids_by_their_roles(builder: PromptBuilder) -> None:
    """Catches a special token that sampling could produce, an end of sequence that it could not, and ids without a token."""
    assert builder.token_strings(builder.eos_ids) == ["<|im_end|>"]
    assert builder.audio_token_id in builder.special_ids and builder.pad_id in builder.special_ids
    assert not set(builder.eos_ids) & set(builder.special_ids)
    assert builder.vocab_size == 24 and set(range(18, 24)) <= set(builder.special_ids)
    assert len(builder.special_ids) == 6 + 6


def test_decoding_leaves_specials_out(builder: PromptBuilder) -> None:
    """Catches specials in the text that the judge reads, and a crash on ids that the embedding has but the tokenizer has not."""
    text = builder.text_prompt(sample()).token_ids
    assert builder.decode([*text, builder.eos_ids[0], builder.pad_id, 23]) == "user what is one plus two assistant"
    assert builder.token_strings([23]) == ["<23>"]


def test_one_feature_for_four_frames() -> None:
    """Catches a formula that is off where a length does not divide: convolution of stride 2, padding 1, then pooling by 2."""
    frames = range(3, 400)
    assert [audio_token_count(n) for n in frames] == [((n + 1) // 2) // 2 for n in frames]


def test_bad_samples_are_named(builder: PromptBuilder) -> None:
    """Catches audio cut silently, questions read as unknown words, and errors that do not say which sample."""
    good = sample()
    with pytest.raises(CordError, match=r"sample s7: 3\.0\d s of audio, the encoder's window is 3\.00 s"):
        builder.audio_prompt(sample(48321))
    with pytest.raises(CordError, match=r"sample s7: audio of 0\.06 s is too short"):
        builder.audio_prompt(sample(1000))
    with pytest.raises(CordError, match="sample s7: audio at 8000 Hz"):
        builder.audio_prompt(replace(good, sampling_rate=8000))
    with pytest.raises(CordError, match="sample s7: the question is empty"):
        builder.text_prompt(replace(good, question=" "))
    with pytest.raises(CordError, match="sample s7: words outside the model's vocabulary: banana, split;"):
        builder.text_prompt(replace(good, question="one banana plus split"))


def test_bad_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a traceback for a mistyped directory, and a template that drops the clip."""
    with pytest.raises(CordError, match="no processor or configuration to load"):
        PromptBuilder(tmp_path / "nowhere")
    shutil.copytree(checkpoint, tmp_path / "deaf")
    (tmp_path / "deaf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}", encoding="utf-8")
    with pytest.raises(CordError, match="writes 0 placeholders for a clip"):
        PromptBuilder(tmp_path / "deaf")


def test_several_ends_of_sequence(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a builder that knows one end where the generation settings list two, as Qwen2-Audio's do."""
    shutil.copytree(checkpoint, tmp_path / "two")
    path = tmp_path / "two" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": [3, 0]}), encoding="utf-8")
    builder = PromptBuilder(tmp_path / "two")
    assert builder.eos_ids == (3, 0) and not {0, 3} & set(builder.special_ids)
