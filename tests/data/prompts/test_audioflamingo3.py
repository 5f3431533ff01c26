"""Prompts of Audio Flamingo 3 against transformers' own processor of the same checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AudioFlamingo3Processor, AutoProcessor

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.errors import CordError
from tests.data.prompts.omni import noise, write_omni

SECONDS = 1  # of a window, which is of 30 s in published files
#: As published: the text of a turn follows its recording, wherever that stands, and one placeholder is written.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nyou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% if message.content | selectattr('type', 'equalto', 'audio') | list %}<sound>{% endif %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("flamingo")
    write_omni(directory, "audioflamingo3", {"audio_token": "<sound>"}, TEMPLATE, chunk_length=SECONDS)
    config = json.loads((directory / "config.json").read_text())
    config["audio_config"]["max_source_positions"] = 50 * SECONDS
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(checkpoint, long_audio="cut")


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    found = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(found, AudioFlamingo3Processor)
    return found


@pytest.mark.parametrize("samples", [1500, 15999, 16000, 16001, 16320, 16321, 16700, 33333, 48000])
def test_prompts_are_the_processors(builder: PromptBuilder, processor: Any, samples: int) -> None:
    """Catches windows that begin elsewhere, marks between them, and a rest without a token that is given one.

    A rest of two frames, 320 samples, makes none; one of three makes one.
    """
    content = [{"type": "text", "text": "what is this?"}, {"type": "audio", "audio": noise(samples)}]
    expected = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    parts = (TextPart("what is this?"), AudioPart(0, "word"))
    sample = Sample("s", "", turns=(Turn("user", parts),)).with_recordings([noise(samples)])
    prompt = builder.audio_prompt(sample)
    assert prompt.token_ids == tuple(expected["input_ids"][0].tolist())
    frames = expected["input_features_mask"].sum(1).tolist()
    heard = [count for count in frames if count > 2]
    assert [clip.num_frames for clip in prompt.clips] == heard and len(heard) >= len(frames) - 1
    assert sum(clip.num_tokens for clip in prompt.clips) == prompt.token_ids.count(builder.audio_token_id)
    for clip, features in zip(prompt.clips, expected["input_features"], strict=False):
        torch.testing.assert_close(clip.features, features, rtol=0, atol=1e-4)


def test_the_written_prompt(builder: PromptBuilder, processor: Any) -> None:
    """Catches a teacher's prompt in another form than the processor writes."""
    expected = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": "what is this?"}]}]],
        tokenize=True, add_generation_prompt=True, return_dict=True,
    )  # fmt: skip
    assert builder.text_prompt(Sample("s", "what is this?")).token_ids == tuple(expected["input_ids"][0].tolist())


def test_two_recordings_in_a_turn_are_refused(builder: PromptBuilder) -> None:
    """Catches a recording that the template leaves out in silence."""
    sample = Sample("s", "", turns=(Turn("user", (AudioPart(0, "one"), AudioPart(1, "two"))),))
    with pytest.raises(CordError, match="writes with 1 placeholders for its 2 clips"):
        builder.audio_prompt(sample.with_recordings([noise(4000), noise(5000)]))


def test_more_than_ten_minutes_are_refused(builder: PromptBuilder) -> None:
    """Catches the end of a recording that transformers' processor leaves out, and a set that opens with one."""
    limits, longest = replace(builder.limits, longest=None), 600 * 16000  # as of a set whose recordings are cut
    sample = Sample("s", "a", waveform=np.zeros(longest + 1, np.float32))
    with pytest.raises(CordError, match=r"sample s: 600\.00 s of audio, audioflamingo3 takes at most 600\.00 s"):
        builder.audio_prompt(sample)
    assert "the longest allowed are 600.00 s" in str(limits.fault([longest + 1], sample))
    assert limits.fault([longest], sample) is None


def test_a_long_recording_is_refused_unless_it_may_be_cut(checkpoint: Path) -> None:
    """Catches windows that nobody asked for."""
    with pytest.raises(CordError, match=r"1\.00 s of audio, the encoder's window is 1\.00 s"):
        PromptBuilder(checkpoint).audio_prompt(Sample("s", "a", waveform=noise(16001)))
