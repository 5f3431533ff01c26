"""Prompts: one sample as a token sequence for each view; they differ only where audio stands for text.

Chat template, tokenizer and feature extractor are the checkpoint's own. A builder keeps nothing about samples: what
it builds travels with them (`data.samples.PreparedSample`). Simplification: one user turn with one recording, which a
text may follow, or one text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
from jinja2 import TemplateError
from transformers import GenerationConfig

from megatron_cord.data.audio.features import FeatureConfig, FeatureExtractor, TorchFeatures
from megatron_cord.data.samples import (
    HEAR,
    READ,
    AudioClip,
    PreparedSample,
    Prompt,
    PromptLimits,
    Sample,
    View,
    control_token_fault,
)
from megatron_cord.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import family_of, load_architecture

_FEWEST_AUDIO_TOKENS = 2  # transformers takes a lone placeholder for one that is still to be expanded

LongAudio = Literal["error", "cut", "skip"]
FeatureBackend = Literal["torch", "dali", "dali_gpu"]


class PromptBuilder:
    """Turns samples into prompts for one checkpoint, and token ids back into text; holds no sample.

    Args:
        checkpoint_dir: a Hugging Face checkpoint.
        long_audio: what to do with audio longer than the encoder's window: refuse it, or cut it into clips, each with
            its own placeholders. "skip" refuses it too: the data set leaves such samples out.
        features: what computes them: torch, or NVIDIA DALI (extra dali) on the CPU or on this process's GPU.

    Attributes:
        eos_ids: tokens that end a response.
        pad_id: fills batches.
        audio_token_id: the placeholder, one for each audio feature; None for a model without an audio encoder.
        special_ids: never to be sampled: all special tokens but ``eos_ids``, and ids without a token.
        vocab_size: rows of the model's embedding, which may be more than the tokenizer has tokens.

    Raises:
        CordError: a directory without a tokenizer, or a chat template without one placeholder for a clip.
    """

    def __init__(
        self, checkpoint_dir: str | Path, *, long_audio: LongAudio = "error", features: FeatureBackend = "torch"
    ) -> None:
        directory = checkpoint_directory(checkpoint_dir)
        self._directory, self._long_audio = directory, long_audio
        self._arch = load_architecture(directory)  # first: an unsupported model may have a tokenizer of any kind
        self._tokenizer = load_tokenizer(directory)
        self.audio_token_id = self._arch.audio_token_id
        self.vocab_size = self._arch.language.vocab_size
        self.eos_ids = self._find_eos(directory)
        self.pad_id = self.eos_ids[0] if self._tokenizer.pad_id is None else self._tokenizer.pad_id
        self._tokens = len(self._tokenizer)  # counting them takes milliseconds
        tokenless = range(self._tokens, self.vocab_size)
        self.special_ids = tuple(sorted({*self._tokenizer.special_ids, *tokenless} - set(self.eos_ids)))
        controls = {*self._tokenizer.control_ids, *self.eos_ids, self.audio_token_id}
        self._control_ids = {i for i in controls if i is not None and i != self._tokenizer.unknown_id}
        self._begins_control = {self._tokenizer.decode([index]).strip()[:1] for index in self._control_ids}
        self._template: str | None = None
        self._features: FeatureConfig | None = None
        if self._arch.encoder is not None:
            self._features = self._find_features(directory)
            self._extract = _make_extractor(features, self._features)
            family_template = family_of(self._arch).chat_template
            if family_template is not None and not self._writes_placeholder():
                self._template = family_template  # the published processing is code there, not a template
            self._around_audio(1)

    @property
    def longest_clip(self) -> int | None:
        """Samples of audio that the encoder takes at once; None for a model without an audio encoder."""
        return None if self._features is None else self._longest(self._features)

    @property
    def limits(self) -> PromptLimits:
        """What prompts can be made of, for a data set to be opened with."""
        shortest = 1 if self._features is None else (self._fewest_frames() - 1) * self._features.hop_length + 1
        return PromptLimits(shortest, self.longest_clip, self.control_token)

    def control_token(self, text: str) -> str | None:
        """Return a control token that the tokenizer finds in a text, which would end a turn or stand for audio.

        Servers tokenize prompts with recordings themselves, so such a text cannot be given to them as plain text.
        """
        if text.isascii() and not any(first in text for first in self._begins_control):
            return None  # most texts; others may become such a token when the tokenizer normalizes them
        found = [index for index in self._tokenizer.encode(text) if index in self._control_ids]
        return self._tokenizer.decode(found[:1]) if found else None

    def prepare(self, samples: Sequence[Sample], views: Collection[View] = (HEAR, READ)) -> list[PreparedSample]:
        """Build the prompts of these views for each sample; features are made together. Threads may call it.

        Raises:
            CordError: as `audio_prompt` and `text_prompt`.
        """
        prompts: list[dict[View, Prompt]] = [{} for _ in samples]
        if HEAR in views:
            for made, prompt in zip(prompts, self.audio_prompts(samples), strict=True):
                made[HEAR] = prompt
        if READ in views:
            for made, sample in zip(prompts, samples, strict=True):
                made[READ] = self.text_prompt(sample)
        return [PreparedSample(sample, made) for sample, made in zip(samples, prompts, strict=True)]

    def audio_prompt(self, sample: Sample) -> Prompt:
        """Build the prompt of the recording. Threads may call it.

        Each clip's features are float32 [n_mels, window frames].

        Raises:
            CordError: audio that ``log_mel`` refuses (another rate …), longer than the encoder's window unless it may
                be cut, or too short for the encoder; a model without an audio encoder.
        """
        return self.audio_prompts([sample])[0]

    def audio_prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """Build one each, in the same order; features are made together."""
        if not samples:
            return []
        if self._features is None:
            raise CordError(
                f"sample {samples[0].id}: a {self._arch.model_type} model takes no audio; choose a checkpoint with "
                "an audio encoder"
            )
        windows = [
            (i, waveform) for i, sample in enumerate(samples) for waveform in self._windows(sample, self._features)
        ]
        features = self._extract(
            [waveform for _, waveform in windows],
            [samples[i].id for i, _ in windows],
            [samples[i].sampling_rate for i, _ in windows],
        )
        clips: list[list[AudioClip]] = [[] for _ in samples]
        for (i, waveform), made in zip(windows, features, strict=True):
            tokens = self._arch.num_audio_tokens(made.num_frames)
            if tokens < _FEWEST_AUDIO_TOKENS:
                seconds = len(waveform) / samples[i].sampling_rate
                raise CordError(
                    f"sample {samples[i].id}: audio of {seconds:.2f} s is too short for the encoder; drop the sample"
                )
            clips[i].append(AudioClip(waveform, made.log_mel, made.num_frames, tokens))
        return [self._prompt_of_clips(sample, some) for sample, some in zip(samples, clips, strict=True)]

    def _prompt_of_clips(self, sample: Sample, clips: Sequence[AudioClip]) -> Prompt:
        self._refuse_control_token(sample, "instruction", sample.instruction or "")
        first, *others = self._around_audio(len(clips), sample.instruction)
        self._refuse_unknown_words(
            sample, sample.instruction or "", [*first, *(index for after in others for index in after)]
        )
        ids = [*first]
        for clip, after in zip(clips, others, strict=True):
            ids += [self._arch.audio_token_id or 0] * clip.num_tokens + after
        return Prompt(sample_id=sample.id, token_ids=tuple(ids), clips=tuple(clips))

    def _windows(self, sample: Sample, features: FeatureConfig) -> list[np.ndarray]:
        """Cut the recording into clips that the encoder can take, whole if it is short enough; nothing is left out."""
        audio, longest = sample.waveform, self._longest(features)
        # What is no mono recording at the right rate gets log_mel's error.
        if sample.sampling_rate != features.sampling_rate or audio.ndim != 1 or len(audio) <= longest:
            return [audio]
        if self._long_audio != "cut":
            seconds, window = (samples / features.sampling_rate for samples in (len(audio), longest))
            raise CordError(
                f"sample {sample.id}: {seconds:.2f} s of audio, the encoder's window is {window:.2f} s; "
                "shorten it, or set data.long_audio to cut or skip"
            )
        starts = list(range(0, len(audio), longest))
        # A rest too short for the encoder takes from its neighbour.
        starts[-1] = min(starts[-1], len(audio) - self._fewest_frames() * features.hop_length)
        return [audio[start:end] for start, end in zip(starts, [*starts[1:], len(audio)], strict=True)]

    def _fewest_frames(self) -> int:
        return next(frames for frames in count(1) if self._arch.num_audio_tokens(frames) >= _FEWEST_AUDIO_TOKENS)

    def _longest(self, features: FeatureConfig) -> int:
        assert self._arch.encoder is not None
        return self._arch.encoder.max_clip_frames * features.hop_length

    def text_prompt(self, sample: Sample) -> Prompt:
        """Build the prompt of the question's text.

        Raises:
            CordError: an empty question, a control token in it, or words that a word-level vocabulary does not have.
        """
        if not sample.question.strip():
            raise CordError(f"sample {sample.id}: the question is empty; give the text of what is said")
        self._refuse_control_token(sample, "question", sample.question)
        ids = self._tokenize([{"type": "text", "text": sample.question}])
        self._refuse_unknown_words(sample, sample.question, ids)
        return Prompt(sample_id=sample.id, token_ids=tuple(ids))

    def _refuse_control_token(self, sample: Sample, part: str, text: str) -> None:
        if (token := self.control_token(text)) is not None:
            raise CordError(f"sample {sample.id} {control_token_fault(part, token)}")

    def _refuse_unknown_words(self, sample: Sample, text: str, ids: list[int]) -> None:
        unknown = self._tokenizer.unknown_id
        if unknown is not None and unknown in ids:
            words = [word for word in text.split() if unknown in self._tokenizer.encode(word)]
            raise CordError(
                f"sample {sample.id}: words outside the model's vocabulary: {', '.join(words[:8])}; rephrase the "
                "question"
            )

    def encode(self, text: str) -> tuple[int, ...]:
        """Return token ids of plain text, without any special token added."""
        return tuple(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        known = [
            index
            for index in ids
            if index < self._tokens and index not in self.special_ids and index not in self.eos_ids
        ]
        return self._tokenizer.decode(known)

    def text_of(self, ids: Sequence[int]) -> str | None:
        """Return a text that the tokenizer turns into these ids, each run of placeholders once; None without one.

        For servers that tokenize a spoken prompt themselves and expand its placeholders.
        """
        pieces: list[list[int]] = [[]]
        once: list[int] = []
        for index in ids:
            if index != self.audio_token_id:
                pieces[-1].append(index)
            elif once and once[-1] == index:
                continue
            else:
                pieces.append([])
            once.append(index)
        # Apart, as some tokenizers put spaces between tokens, which servers do not expect beside a placeholder.
        mark = "" if self.audio_token_id is None else self._tokenizer.decode([self.audio_token_id])
        text = mark.join(self._tokenizer.decode(piece) for piece in pieces)
        return text if self._tokenizer.encode(text) == once else None

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token's own text, specials included."""
        return [self._tokenizer.decode([index]) if index < len(self._tokenizer) else f"<{index}>" for index in ids]

    def _tokenize(self, parts: list[dict[str, str]]) -> list[int]:
        return self._tokenizer.encode(self._tokenizer.render([{"role": "user", "content": parts}], self._template))

    def _tokenize_audio(self, clips: int, instruction: str | None = None) -> list[int]:
        beside = [] if instruction is None else [{"type": "text", "text": instruction}]
        return self._tokenize([{"type": "audio", "audio_url": "clip"}] * clips + beside)

    def _around_audio(self, clips: int, instruction: str | None = None) -> list[list[int]]:
        """Return the prompt of so many clips and an instruction, cut at the placeholders: clips + 1 pieces."""
        pieces: list[list[int]] = [[]]
        for index in self._tokenize_audio(clips, instruction):
            if index == self.audio_token_id:
                pieces.append([])
            else:
                pieces[-1].append(index)
        if len(pieces) != clips + 1:
            raise CordError(
                f"{self._directory}: the chat template writes {len(pieces) - 1} placeholders for "
                f"{'a clip; it must be one' if clips == 1 else f'{clips} clips; it must be one for each'}"
            )
        return pieces

    def _writes_placeholder(self) -> bool:
        """Return whether the checkpoint's own template has a place for a clip."""
        try:
            return self._tokenize_audio(1).count(self._arch.audio_token_id or 0) == 1
        except (CordError, TemplateError):
            return False

    def _find_features(self, directory: Path) -> FeatureConfig:
        """Return the checkpoint's feature extractor; Whisper's where its processing is code."""
        encoder = self._arch.encoder
        assert encoder is not None
        if isinstance(self._tokenizer, HuggingFaceTokenizer) and self._tokenizer.has_feature_extractor:
            features = FeatureConfig.from_checkpoint(directory)
        else:
            features = FeatureConfig(
                n_mels=encoder.num_mels, n_samples=encoder.window_frames * FeatureConfig.hop_length
            )
        if (features.n_mels, features.max_frames) != (encoder.num_mels, encoder.window_frames):
            raise CordError(
                f"{directory}: the feature extractor makes {features.n_mels} mel bands and {features.max_frames} "
                "frames, the encoder "
                f"takes {encoder.num_mels} and {encoder.window_frames}; copy preprocessor_config.json from the "
                "original checkpoint"
            )
        return features

    def _find_eos(self, directory: Path) -> tuple[int, ...]:
        eos: int | list[int] | None = self._tokenizer.eos_id
        if (directory / "generation_config.json").exists():
            eos = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id or eos
        if eos is None:
            raise CordError(
                f"{directory}: neither tokenizer nor generation_config.json says what ends a response; set "
                "eos_token_id there"
            )
        return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def _make_extractor(backend: FeatureBackend, config: FeatureConfig) -> FeatureExtractor:
    if backend == "torch":
        return TorchFeatures(config)
    from megatron_cord.data.audio.dali_features import DaliFeatures  # an extra, which takes seconds to import

    return DaliFeatures(config, device="gpu" if backend == "dali_gpu" else "cpu")
