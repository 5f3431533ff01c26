"""What the tests of omni models' prompts share: small checkpoints with published marks, transformers' processors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import AudioPart, Part, TextPart, Turn
from tests.model.family_reference import save
from tests.model.ranks import AUDIO_ID, MELS

_FIRST, _LAST = "what is this?", "or that."


def template(marks: Mapping[str, str], default_system: str = "") -> str:
    """Return a chat template of the published kind, with the turn that it writes where there is no system turn."""
    audio = marks["audio_bos_token"] + marks["audio_token"] + marks["audio_eos_token"]
    system = (
        "{% if loop.first and message.role != 'system' %}" + default_system + "{% endif %}" if default_system else ""
    )
    return (
        "{% for message in messages %}" + system + "<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'audio' %}" + audio + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def write_omni(directory: Path, family: str, marks: Mapping[str, str], chat_template: str, **extractor: Any) -> Path:
    """Write a byte-level tokenizer with the published marks, and the published kind of feature extractor."""
    save(directory, family, tied=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks.values()]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz.?ĠĊ"))
    known = [*letters, *(mark for mark in special if mark != marks["audio_token"])]
    known += [f"filler{i}" for i in range(AUDIO_ID - len(known))] + [marks["audio_token"]]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(known)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=core, pad_token=special[0], eos_token=special[2],
        additional_special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in special[1:]],
        extra_special_tokens=dict(marks),
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}))
    WhisperFeatureExtractor(feature_size=MELS, return_attention_mask=True, **extractor).save_pretrained(directory)
    return directory


def noise(samples: int) -> np.ndarray:
    """Return a recording of so many samples, always the same."""
    return (0.1 * np.random.default_rng(samples).normal(size=samples)).astype(np.float32)


def spoken(lengths: Sequence[int]) -> Sample:
    """Return a question with recordings of these lengths between two texts."""
    recordings = [AudioPart(i, f"word {i}") for i in range(len(lengths))]
    parts: tuple[Part, ...] = (TextPart(_FIRST), *recordings, TextPart(_LAST))
    return Sample("s", "", turns=(Turn("user", parts),)).with_recordings([noise(n) for n in lengths])


def assert_processed_alike(
    kind: Any, marks: Mapping[str, str], checkpoint: Path, builder: PromptBuilder, lengths: Sequence[int]
) -> None:
    """Raise unless the prompt of `spoken` is what transformers' processor makes of it, token for token.

    Args:
        kind: the processor's class; its image and video processors, which need torchvision, are left out.
        marks: of its tokenizer.
        checkpoint: of the model.
        builder: of its prompts.
        lengths: of the recordings.
    """

    class Listening(kind):  # type: ignore[misc]
        def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
            self.feature_extractor, self.tokenizer = feature_extractor, tokenizer
            self.image_processor = self.video_processor = SimpleNamespace(merge_size=2)
            for name, mark in marks.items():
                setattr(self, name, mark)

    tokenizer: Any = builder._tokenizer
    content = [{"type": "text", "text": _FIRST}, *({"type": "audio"} for _ in lengths), {"type": "text", "text": _LAST}]
    processor = Listening(WhisperFeatureExtractor.from_pretrained(checkpoint), tokenizer._tokenizer)
    rendered = tokenizer.render([{"role": "user", "content": content}])
    expected = processor(text=rendered, audio=[noise(n) for n in lengths], return_tensors="pt")
    prompt = builder.audio_prompt(spoken(lengths))
    assert prompt.token_ids == tuple(expected["input_ids"][0].tolist())
    assert [clip.num_frames for clip in prompt.clips] == expected["feature_attention_mask"].sum(1).tolist()
    for clip, features in zip(prompt.clips, expected["input_features"], strict=True):
        assert clip.features.shape == (MELS, clip.num_frames)
        torch.testing.assert_close(clip.features, features[:, : clip.num_frames], rtol=0, atol=1e-4)
