"""Prompts of Qwen3-Omni against transformers' own processor of the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3OmniMoeProcessor

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from tests.data.prompts.omni import assert_processed_alike, noise, spoken, template, write_omni

MARKS = {
    "audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_omni(tmp_path_factory.mktemp("omni"), "qwen3_omni_moe", MARKS, template(MARKS))


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(checkpoint)


@pytest.mark.parametrize(
    "lengths", [(1500,), (2500,), (15999,), (16000,), (16001,), (40123, 16001), (2600, 33333, 800)]
)
def test_prompts_are_the_processors(checkpoint: Path, builder: PromptBuilder, lengths: tuple[int, ...]) -> None:
    """Catches a wrong count of placeholders at any rounding, and features of clips that end otherwise.

    A clip is padded to the longest one of its prompt, and behind that there is its own reflection, not silence.
    """
    if min(lengths) < 1440:
        with pytest.raises(CordError, match="too short"):
            builder.audio_prompt(spoken(lengths))
        return
    assert_processed_alike(Qwen3OmniMoeProcessor, MARKS, checkpoint, builder, lengths)


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
