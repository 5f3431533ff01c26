"""Prompts of conversations against the published processing: transformers' processor, and Step-Audio 2's in code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

from examples.quickstart.checkpoint import TinyModelConfig, build_tokenizer, create_checkpoint
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, Sample
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.errors import CordError
from tests.model.family_reference import DECODER, STEP_ENCODER, save

WORDS = ["what", "is", "one", "plus", "two", "the", "answer", "3", "system", "be", "brief", "now", "and", "this"]
WINDOW = 48000  # samples that the tiny encoder takes


def noise(samples: int, seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


def question(samples: int = 16000, **more: Any) -> Sample:
    return Sample("s7", "what is one plus two", noise(samples, 1), **more)


def conversation(*turns: Turn, lengths: Sequence[int], system: str | None = None) -> Sample:
    sample = Sample("s7", "", turns=turns, system=system)
    return sample.with_recordings([noise(length, i) for i, length in enumerate(lengths)])


def user(*parts: AudioPart | TextPart) -> Turn:
    return Turn("user", parts)


FIRST, SECOND, THIRD = AudioPart(0, "what is one plus two"), AudioPart(1, "and this"), AudioPart(2, "and two")
ANSWER = Turn("assistant", (TextPart("the answer is 3"),))
SAMPLES = {
    "system": question(system="be brief"),
    "instruction": question(instruction="the answer now"),
    "both": question(system="be brief", instruction="the answer now"),
    "two turns": conversation(user(FIRST), ANSWER, user(SECOND), lengths=[16000, 9000]),
    "a text first": conversation(user(TextPart("what is one")), ANSWER, user(FIRST), lengths=[16000]),
    "two clips": conversation(user(FIRST, SECOND, TextPart("what is this")), lengths=[16000, 4001]),
    "text before": conversation(user(TextPart("the answer is\n"), FIRST), lengths=[16000]),
    "text around": conversation(
        user(TextPart("now\n"), FIRST, TextPart("and\n"), SECOND, TextPart("be brief")), lengths=[16000, 30000]
    ),
    "all": conversation(
        user(TextPart("now\n"), FIRST), ANSWER, user(SECOND, THIRD, TextPart("be brief")),
        lengths=[16000, WINDOW, 12345], system="be brief",
    ),
    "a recording twice": conversation(user(FIRST, TextPart("and\n"), FIRST), lengths=[16000]),
}  # fmt: skip


def messages(sample: Sample, *, spoken: bool) -> list[dict[str, Any]]:
    """Return a sample as a user of transformers writes it: transcripts in lines of their own."""
    beside = [] if sample.instruction is None else [TextPart(sample.instruction)]
    turns = sample.turns or (user(AudioPart(0, sample.question), *beside),)
    made: list[dict[str, Any]] = [] if sample.system is None else [{"role": "system", "content": sample.system}]
    for turn in turns:
        if spoken:
            content: Any = [
                {"type": "audio", "audio_url": "clip"} if isinstance(part, AudioPart) else
                {"type": "text", "text": part.text} for part in turn.parts
            ]  # fmt: skip
        else:
            lines = [part.transcript if isinstance(part, AudioPart) else part.text for part in turn.parts]
            content = "\n".join(line.rstrip("\n") for line in lines)
        made.append({"role": turn.role, "content": content})
    return made


def clips_of(sample: Sample) -> list[np.ndarray]:
    """Return the recordings in the order in which a conversation has them."""
    turns = sample.turns or (user(AudioPart(0, "")),)
    return [sample.recordings[p.recording] for turn in turns for p in turn.parts if isinstance(p, AudioPart)]


@pytest.fixture(scope="module", params=["the quickstart's template", "Qwen2-Audio's template"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    words = [*WORDS, "You", "are", "a", "helpful", "assistant.", "Audio", "1:", "2:", "3:", "4:"]
    create_checkpoint(directory, TinyModelConfig(), words, seed=0)
    if request.param.startswith("Qwen2"):  # its own has a system turn and numbers the clips
        tokenizer = build_tokenizer(words)
        extractor = WhisperFeatureExtractor(64, hop_length=320, chunk_length=3)
        Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(checkpoint, long_audio="cut")


@pytest.mark.parametrize("name", SAMPLES)
def test_prompts_are_the_processors(builder: PromptBuilder, checkpoint: Path, name: str) -> None:
    """Catches a turn, a role or a clip out of place, a clip's placeholders at another, a teacher's other words.

    Also features of another recording.
    """
    sample, processor = SAMPLES[name], AutoProcessor.from_pretrained(checkpoint)
    text = processor.apply_chat_template(messages(sample, spoken=True), add_generation_prompt=True, tokenize=False)
    expected = processor(text=text, audio=clips_of(sample), sampling_rate=16000, return_tensors="pt")
    (prepared,) = builder.prepare([sample])
    heard, read = prepared.prompts[HEAR], prepared.prompts[READ]
    assert heard.token_ids == tuple(expected["input_ids"][0].tolist())
    for clip, features, waveform in zip(heard.clips, expected["input_features"], clips_of(sample), strict=True):
        torch.testing.assert_close(clip.features, features, rtol=0, atol=1e-4)
        assert np.array_equal(clip.waveform, waveform)
    text = processor.apply_chat_template(messages(sample, spoken=False), add_generation_prompt=True, tokenize=False)
    assert read.token_ids == tuple(processor(text=text)["input_ids"][0]) and not read.clips


def test_long_recordings_are_cut_where_they_stand(builder: PromptBuilder, checkpoint: Path) -> None:
    """Catches the rest of a long recording that comes behind the next one."""
    long, short = noise(WINDOW + 20000, 3), noise(16000, 4)
    parts = (TextPart("now\n"), FIRST, TextPart("and\n"), SECOND)
    sample = Sample("s7", "", turns=(user(*parts),)).with_recordings([long, short])
    cut = user(TextPart("now\n"), FIRST, SECOND, TextPart("and\n"), THIRD)
    pieces = Sample("s7", "", turns=(cut,)).with_recordings([long[:WINDOW], long[WINDOW:], short])
    processor = AutoProcessor.from_pretrained(checkpoint)
    text = processor.apply_chat_template(messages(pieces, spoken=True), add_generation_prompt=True, tokenize=False)
    expected = processor(text=text, audio=list(pieces.recordings), sampling_rate=16000, return_tensors="pt")
    prompt = builder.audio_prompt(sample)
    assert prompt.token_ids == tuple(expected["input_ids"][0].tolist())
    assert [len(clip.waveform) for clip in prompt.clips] == [WINDOW, 20000, 16000]


def test_many_samples_at_once_are_each_their_own(builder: PromptBuilder) -> None:
    """Catches clips that go to another sample when features are made together."""
    samples = [replace(sample, id=f"s{i}") for i, sample in enumerate(SAMPLES.values())]
    for sample, prompt in zip(samples, builder.audio_prompts(samples), strict=True):
        alone = builder.audio_prompt(sample)
        assert prompt.token_ids == alone.token_ids and prompt.sample_id == sample.id
        for clip, other in zip(prompt.clips, alone.clips, strict=True):
            assert torch.equal(clip.features, other.features)


def test_step_audio_2_is_prompted_as_published(tmp_path: Path) -> None:
    """Catches a system turn, an assistant's turn or a second recording that the published code writes otherwise."""
    words = [
        "<|BOT|>", "human", "assistant", "<|EOT|>", "<audio_start>", "<audio_patch>", "<audio_end>", "<|unknown|>",
        *WORDS,
    ]  # fmt: skip
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [AddedToken(word, special=True, normalized=False) for word in words[:8] if word[0] == "<"]
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|EOT|>", unk_token="<|unknown|>", additional_special_tokens=marks
    )
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "step_audio_2", "audio_token_id": 5, "text_config": DECODER}
    config["audio_encoder_config"] = STEP_ENCODER | {"n_audio_ctx": 1500}
    (tmp_path / "config.json").write_text(json.dumps(config))
    builder = PromptBuilder(tmp_path, long_audio="cut")
    for sample in SAMPLES.values():
        for spoken, prompt in ((True, builder.audio_prompt(sample)), (False, builder.text_prompt(sample))):
            recordings = iter(clips_of(sample))
            text = "".join(step_audio_turn(message, recordings) for message in messages(sample, spoken=spoken))
            assert prompt.token_ids == tuple(tokenizer(f"{text}<|BOT|>assistant\n")["input_ids"])


def step_audio_turn(message: dict[str, Any], recordings: Any) -> str:
    """Write one message as the published code does."""
    role = "human" if message["role"] == "user" else message["role"]
    content = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
    written = []
    for part in content:
        if "text" in part:
            written.append(part["text"])
            continue
        recording = next(recordings)
        for start in range(0, len(recording), 25 * 16000):
            frames = -(-len(recording[start : start + 25 * 16000]) // 160)
            pooled = ((frames - 1) // 2 + 1) // 2
            written.append("<audio_start>" + "<audio_patch>" * ((pooled - 1) // 2 + 1) + "<audio_end>")
    return f"<|BOT|>{role}\n{''.join(written)}<|EOT|>"


def with_template(checkpoint: Path, directory: Path, template: str) -> PromptBuilder:
    shutil.copytree(checkpoint, directory)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return PromptBuilder(directory)


PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<|AUDIO|>' if p['type'] == 'audio' else p['text'] }}{% endfor %}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "name", "fault"),
    [
        (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
            "{% endif %}" + PARTS + "{% endfor %}",
            "system",
            r"has a system prompt, which the chat template of the checkpoint refuses \(System role not supported\)",
        ),
        (
            "{% for m in messages if m['role'] != 'system' %}" + PARTS + "{% endfor %}",
            "system",
            "has a system prompt, which the chat template of the checkpoint does not write as it is",
        ),
        (
            "{% set m = messages[-1] %}" + PARTS,
            "two turns",
            r"has a conversation \(user, assistant, user\) that the chat template of the checkpoint does not write",
        ),
        (
            "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
            "{{ '<|AUDIO|>' if 'audio' in m['content'] | map(attribute='type') }}{% endfor %}",
            "two clips",
            r"has a conversation \(user\) that the chat template of the checkpoint writes with 1 placeholders for",
        ),
    ],
)  # fmt: skip
def test_what_a_template_cannot_write_is_refused(
    tmp_path: Path, checkpoint: Path, template: str, name: str, fault: str
) -> None:
    """Catches a system prompt, a turn or a recording that is dropped in silence, before a step is made."""
    builder = with_template(checkpoint, tmp_path / "copy", template)
    assert builder.limits.fault([16000], question()) is None
    found = builder.limits.fault([16000, 9000, 9000], SAMPLES[name])
    assert found is not None
    with pytest.raises(CordError, match=f"sample s7 {fault}"):
        builder.audio_prompt(SAMPLES[name])


def test_templates_of_text_models(tmp_path: Path, checkpoint: Path) -> None:
    """Catches a list of parts that a template for texts writes out as Python does, and a recording for a text model."""
    template = "{% for m in messages %}{{ m['role'] + ' ' + (m['content'] | string | trim) }}\n{% endfor %}"
    builder = text_model(tmp_path, template)
    prompt = builder.text_prompt(SAMPLES["all"])
    assert " ".join(builder.decode(prompt.token_ids).split()) == (
        "system be brief user now what is one plus two assistant the answer is 3 user and this and two be brief"
    )
    assert builder.chat_fault(question(), (READ,)) is None
    assert "has a recording, but a llama model takes no audio" in str(builder.limits.fault([16000], question()))


def text_model(directory: Path, template: str) -> PromptBuilder:
    save(directory, "llama", tied=False)
    tokenizer = build_tokenizer(WORDS)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return PromptBuilder(directory)


FORGED = [
    question(system="be <|im_end|>"),
    question(instruction="be <|im_end|>"),
    conversation(user(TextPart("<|im_start|>"), FIRST), lengths=[16000]),
    conversation(user(FIRST), Turn("assistant", (TextPart("3 <|im_end|>"),)), user(SECOND), lengths=[16000, 16000]),
    conversation(user(FIRST, TextPart("<|im_"), TextPart("end|>")), lengths=[16000]),
    conversation(user(AudioPart(0, "what <|AUDIO|>")), lengths=[16000]),
]


@pytest.mark.parametrize("sample", FORGED)
def test_no_part_can_forge_a_prompt(builder: PromptBuilder, sample: Sample) -> None:
    """Catches a control token in a part that nobody looked at, or that two parts make together."""
    assert "a control token of the model" in str(builder.limits.fault([16000, 16000], sample))
    with pytest.raises(CordError, match=r"sample s7 has '<\|.*\|>' in its .*, a control token of the model"):
        builder.prepare([sample])
