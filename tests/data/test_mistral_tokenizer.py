"""Prompts with Mistral's tokenizer against transformers' processor of Voxtral; the tokenizer is a tiny one of bytes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import LlamaConfig, VoxtralConfig, VoxtralEncoderConfig, VoxtralProcessor, WhisperFeatureExtractor

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, Sample
from megatron_cord.errors import CordError
from tests.data.prompts.test_conversations import FIRST, SAMPLES, clips_of, messages, noise, question, user
from tests.model.family_reference import DECODER

MARKS = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", *(f"<SPECIAL_{i}>" for i in range(20, 24)), "[AUDIO]",
    "[BEGIN_AUDIO]", *(f"<SPECIAL_{i}>" for i in range(26, 34)), "[TRANSCRIBE]",
]  # fmt: skip
AUDIO, BANDS = MARKS.index("[AUDIO]"), 16
SPOKEN = [name for name, sample in SAMPLES.items() if sample.system is None]


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose tokens are bytes, with the marks of Voxtral's, each in its place."""
    size = len(MARKS) + 256
    tekken = {
        "config": {
            "pattern": r"\S+|\s+", "num_vocab_tokens": 256, "default_vocab_size": size,
            "default_num_special_tokens": len(MARKS), "version": "v7",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
        ],
        "special_tokens": [{"rank": i, "token_str": mark, "is_control": True} for i, mark in enumerate(MARKS)],
        "audio": {
            "sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0,
            "audio_encoding_config": {"num_mel_bins": BANDS, "hop_length": 160, "window_size": 400},
        },
        "version": 1, "type": "tekken",
    }  # fmt: skip
    (directory / "tekken.json").write_text(json.dumps(tekken))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("voxtral")
    write_tokenizer(directory)
    audio = VoxtralEncoderConfig(
        num_mel_bins=BANDS, hidden_size=24, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_source_positions=1500,
    )  # fmt: skip
    text = LlamaConfig(**DECODER | {"vocab_size": len(MARKS) + 256}, head_dim=10)
    VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO).save_pretrained(directory)
    WhisperFeatureExtractor(BANDS).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    pytest.importorskip("mistral_common")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    backend: Any = MistralCommonBackend.from_pretrained(str(checkpoint))
    return VoxtralProcessor(WhisperFeatureExtractor(BANDS), backend)


@pytest.fixture(scope="module")
def builder(checkpoint: Path, processor: Any) -> PromptBuilder:
    return PromptBuilder(checkpoint, long_audio="cut")


def with_audio(turns: list[dict[str, Any]], clips: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Return messages with recordings as Voxtral's processor takes them."""
    left = iter(clips)
    for part in (part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]):
        if part["type"] == "audio":
            buffer = io.BytesIO()
            soundfile.write(buffer, next(left), 16000, format="WAV", subtype="FLOAT")
            part |= {"base64": base64.b64encode(buffer.getvalue()).decode()}
            del part["audio_url"]
    return turns


@pytest.mark.parametrize("name", SPOKEN)
def test_prompts_are_voxtrals(builder: PromptBuilder, processor: Any, name: str) -> None:
    """Catches a turn that mistral-common writes otherwise, or placeholders that are not a whole window's."""
    sample = SAMPLES[name]
    (prepared,) = builder.prepare([sample])
    spoken = processor.apply_chat_template(with_audio(messages(sample, spoken=True), clips_of(sample)))
    heard = prepared.prompts[HEAR]
    assert heard.token_ids == tuple(spoken["input_ids"][0].tolist())
    for clip, features in zip(heard.clips, spoken["input_features"], strict=True):
        torch.testing.assert_close(clip.features, features, rtol=0, atol=1e-4)
    written = processor.apply_chat_template(messages(sample, spoken=False))
    assert prepared.prompts[READ].token_ids == tuple(written["input_ids"][0].tolist())


@pytest.mark.parametrize("samples", [45 * 16000, 30 * 16000 + 50])
def test_the_windows_of_a_long_recording_are_one_recording(
    builder: PromptBuilder, processor: Any, samples: int
) -> None:
    """Catches a mark between the windows of a recording, as other families have it, and a window that begins early."""
    sample = Sample("s7", "", turns=(user(FIRST),)).with_recordings([noise(samples, 1)])
    spoken = processor.apply_chat_template(with_audio(messages(sample, spoken=True), clips_of(sample)))
    prompt = builder.audio_prompt(sample)
    assert prompt.token_ids == tuple(spoken["input_ids"][0].tolist()) and prompt.token_ids.count(AUDIO) == 750
    assert [len(clip.waveform) for clip in prompt.clips] == [30 * 16000, samples - 30 * 16000]
    assert builder.text_of(prompt.token_ids) is None


def test_texts_are_texts(builder: PromptBuilder, processor: Any) -> None:
    """Catches a mark in a text that becomes a control token, or that is refused although it cannot."""
    sample = question(instruction="[INST] </s> [AUDIO] ½")
    assert builder.limits.fault([16000], sample) is None
    assert builder.decode(builder.text_prompt(sample).token_ids) == "what is one plus two\n[INST] </s> [AUDIO] ½"
    assert builder.eos_ids == (2,) and builder.special_ids == tuple(i for i in range(len(MARKS)) if i != 2)


def test_a_system_prompt_with_a_recording_is_refused(builder: PromptBuilder) -> None:
    """Catches a system prompt that Voxtral does not take, found out at its first step."""
    fault = builder.limits.fault([16000], question(system="be brief"))
    assert (
        fault is not None and "has a system prompt, which the chat template of the checkpoint refuses (Found" in fault
    )


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path, checkpoint: Path) -> None:
    """Catches a traceback where mistral-common is not installed, or reads no tokenizer."""
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CordError, match=r"tekken\.json is (read by mistral-common, which is not|no tokenizer)"):
        PromptBuilder(tmp_path)
