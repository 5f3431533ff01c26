"""Prompts of Qwen2.5-Omni against transformers' own processor of the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2_5OmniProcessor

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from tests.data.prompts.omni import assert_processed_alike, noise, template, write_omni

MARKS = {
    "audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
}  # fmt: skip
SECONDS = 4  # of the window, which is of five minutes in published files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = template(MARKS, "<|im_start|>system\nyou help.<|im_end|>\n")
    return write_omni(tmp_path_factory.mktemp("omni"), "qwen2_5_omni", MARKS, written, chunk_length=SECONDS)


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(checkpoint)


@pytest.mark.parametrize("lengths", [(1500,), (2500,), (16001,), (64000,), (63999, 16001), (2600, 33333, 1700)])
def test_prompts_are_the_processors(checkpoint: Path, builder: PromptBuilder, lengths: tuple[int, ...]) -> None:
    """Catches a wrong count of placeholders at any rounding, and features other than those in the whole window."""
    assert_processed_alike(Qwen2_5OmniProcessor, MARKS, checkpoint, builder, lengths)


def test_what_the_processor_would_cut_off_is_refused(builder: PromptBuilder) -> None:
    """Catches a recording beyond the extractor's window, whose end transformers leaves out in silence."""
    assert builder.longest_clip == SECONDS * 16000
    with pytest.raises(CordError, match=r"4\.00 s"):
        builder.audio_prompt(Sample("s", "a", waveform=noise(SECONDS * 16000 + 1)))


def test_the_shortest_clip(builder: PromptBuilder) -> None:
    """Catches a data set that keeps a recording which the prompt refuses, or leaves out one that it takes."""
    shortest = builder.limits.shortest
    builder.audio_prompt(Sample("s", "a", waveform=noise(shortest)))
    with pytest.raises(CordError, match="too short"):
        builder.audio_prompt(Sample("s", "a", waveform=noise(shortest - 1)))


def test_images_in_a_text_are_refused(builder: PromptBuilder) -> None:
    """Catches a text that would become the placeholder of an image."""
    with pytest.raises(CordError, match="IMAGE"):
        builder.text_prompt(Sample("s", "what is <|IMAGE|> here"))
