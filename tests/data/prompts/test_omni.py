"""Prompts of Qwen3-Omni against transformers' own processor of the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3OmniMoeProcessor, WhisperFeatureExtractor

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import AudioPart, Part, TextPart, Turn
from megatron_cord.errors import CordError
from tests.model.family_reference import save
from tests.model.ranks import AUDIO_ID, MELS

MARKS = {
    "audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a byte-level tokenizer with the published marks, and the published kind of feature extractor."""
    directory = tmp_path_factory.mktemp("omni")
    save(directory, "qwen3_omni_moe", tied=False)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS.values()]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz.?ĠĊ"))
    known = [*letters, *(mark for mark in marks if mark != MARKS["audio_token"])]
    known += [f"filler{i}" for i in range(AUDIO_ID - len(known))] + [MARKS["audio_token"]]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(known)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=core, pad_token=marks[0], eos_token=marks[2],
        additional_special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in marks[1:]],
        extra_special_tokens=MARKS,
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    WhisperFeatureExtractor(feature_size=MELS, return_attention_mask=True).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(checkpoint)


class _Listening(Qwen3OmniMoeProcessor):
    """transformers' processor without its image and video processors, which need torchvision."""

    def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer
        self.image_processor = self.video_processor = SimpleNamespace(merge_size=2)
        for name, mark in MARKS.items():
            setattr(self, name, mark)


def reference(checkpoint: Path, builder: PromptBuilder, text: str, audio: Sequence[np.ndarray]) -> Any:
    """Return what transformers' processor makes of a rendered conversation and its recordings."""
    extractor = WhisperFeatureExtractor.from_pretrained(checkpoint)
    tokenizer = builder._tokenizer._tokenizer  # type: ignore[union-attr]
    processor: Any = _Listening(extractor, tokenizer)
    return processor(text=text, audio=list(audio), return_tensors="pt")


def noise(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(samples).normal(size=samples)).astype(np.float32)


@pytest.mark.parametrize(
    "lengths", [(1500,), (2500,), (15999,), (16000,), (16001,), (40123, 16001), (2600, 33333, 800)]
)
def test_prompts_are_the_processors(checkpoint: Path, builder: PromptBuilder, lengths: tuple[int, ...]) -> None:
    """Catches a wrong count of placeholders at any rounding, and features of clips that end otherwise.

    A clip is padded to the longest one of its prompt, and behind that there is its own reflection, not silence.
    """
    spoken = [AudioPart(i, f"word {i}") for i in range(len(lengths))]
    parts: tuple[Part, ...] = (TextPart("what is this?"), *spoken, TextPart("or that."))
    chat = Sample("s", "", turns=(Turn("user", parts),)).with_recordings([noise(n) for n in lengths])
    if min(lengths) < 1440:
        with pytest.raises(CordError, match="too short"):
            builder.audio_prompt(chat)
        return
    turns = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is this?"},
                *({"type": "audio"} for _ in lengths),
                {"type": "text", "text": "or that."},
            ],
        }
    ]
    rendered = builder._tokenizer.render(turns)
    expected = reference(checkpoint, builder, rendered, [noise(n) for n in lengths])
    prompt = builder.audio_prompt(chat)
    assert prompt.token_ids == tuple(expected["input_ids"][0].tolist())
    assert [clip.num_frames for clip in prompt.clips] == expected["feature_attention_mask"].sum(1).tolist()
    for clip, features in zip(prompt.clips, expected["input_features"], strict=True):
        assert clip.features.shape == (MELS, clip.num_frames)
        torch.testing.assert_close(clip.features, features[:, : clip.num_frames], rtol=0, atol=1e-4)


def test_the_shortest_clip(builder: PromptBuilder) -> None:
    """Catches a data set that keeps a recording which the prompt refuses, or leaves out one that it takes."""
    shortest = builder.limits.shortest
    builder.audio_prompt(Sample("s", "a", waveform=noise(shortest)))
    for samples in (shortest - 1, 401, 100, 1):
        with pytest.raises(CordError, match="too short"):
            builder.audio_prompt(Sample("s", "a", waveform=noise(samples)))


def test_images_in_a_text_are_refused(builder: PromptBuilder) -> None:
    """Catches a text that would become the placeholder of an image."""
    with pytest.raises(CordError, match="image_pad"):
        builder.text_prompt(Sample("s", "what is <|image_pad|> here"))
