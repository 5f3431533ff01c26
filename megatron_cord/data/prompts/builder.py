"""Builds prompts from samples: one token sequence for each view.

Chat template, tokenizer and feature extractor are the checkpoint's own. A builder stores nothing about samples: prompts
and features are returned beside their sample (`data.samples.PreparedSample`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import TemplateError
from transformers import GenerationConfig

from megatron_cord.data.audio.features import FeatureConfig
from megatron_cord.data.prompts.clips import ClipMaker, FeatureBackend, LongAudio
from megatron_cord.data.prompts.template import ChatTemplate
from megatron_cord.data.samples import (
    HEAR,
    READ,
    AudioClip,
    PreparedSample,
    Prompt,
    PromptLimits,
    Sample,
    ViewName,
    control_token_fault,
)
from megatron_cord.data.tokenizers import load_tokenizer
from megatron_cord.data.turns import AudioPart, Part, TextPart, Turn
from megatron_cord.data.views import Filter, PlainView, View, ViewConfig, Views, filtered
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import family_of, load_architecture


class PromptBuilder:
    """Builds a checkpoint's prompts from samples, and decodes token ids to text; stores no sample.

    Args:
        checkpoint_dir: a Hugging Face checkpoint.
        long_audio: what is done with audio longer than the encoder's window: it is refused, or split into clips, each
            with its own placeholders. "skip" refuses it, too: the data set leaves such samples out.
        features: backend of the features: torch, or NVIDIA DALI (extra dali) on the CPU or on this process's GPU.
        views: the configured views; `HEAR` and `READ` are added.

    Attributes:
        views: all views, the built-in ones included.
        eos_ids: tokens that end a response.
        pad_id: the padding token of batches.
        audio_token_id: the placeholder, one for each audio feature; None for a model without an audio encoder.
        special_ids: tokens that must not be sampled: all special ones but ``eos_ids``, and ids without a token.
        vocab_size: rows of the model's embedding; the tokenizer may have fewer tokens.

    Raises:
        CordError: a directory without a tokenizer, or a chat template without one placeholder for a clip.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        *,
        long_audio: LongAudio = "error",
        features: FeatureBackend = "torch",
        views: Mapping[ViewName, ViewConfig] | None = None,
    ) -> None:
        self.views = Views(views or {})
        directory = checkpoint_directory(checkpoint_dir)
        self._directory = directory
        self._arch = load_architecture(directory)  # first: an unsupported model may have a tokenizer of any kind
        self._tokenizer = load_tokenizer(directory)
        self.audio_token_id = self._arch.audio_token_id
        self.vocab_size = self._arch.language.vocab_size
        self.eos_ids = self._find_eos(directory)
        self.pad_id = self.eos_ids[0] if self._tokenizer.pad_id is None else self._tokenizer.pad_id
        tokenless = range(len(self._tokenizer), self.vocab_size)
        self.special_ids = tuple(sorted({*self._tokenizer.special_ids, *tokenless} - set(self.eos_ids)))
        controls = {*self._tokenizer.control_ids, *self.eos_ids, self.audio_token_id}
        self._control_ids = {i for i in controls if i is not None and i != self._tokenizer.unknown_id}
        self._begins_control = {self._tokenizer.decode([index]).strip()[:1] for index in self._control_ids}
        self._template = self._find_template()
        self._clips: ClipMaker | None = None
        if self._arch.encoder is not None:
            self._clips = ClipMaker(self._arch, self._find_features(directory), features, long_audio)

    @property
    def longest_clip(self) -> int | None:
        """The longest clip of the encoder, in samples of audio; None for a model without an audio encoder."""
        return None if self._clips is None else self._clips.longest

    def num_frames(self, samples: int) -> int:
        """Return the number of log-mel frames of a clip of so many samples of audio.

        Raises:
            CordError: the model has no audio encoder.
        """
        if self._clips is None:
            raise CordError(self._takes_no_audio)
        return self._clips.num_frames(samples)

    @property
    def limits(self) -> PromptLimits:
        """Limits of the samples from which prompts of `HEAR` and `READ` can be built; data sets check them."""
        shortest = 1 if self._clips is None else self._clips.shortest
        longest_cut = None if self._clips is None else self._clips.longest_cut
        return PromptLimits(shortest, self.longest_clip, longest_cut, self.control_token, self.chat_fault)

    def limits_for(self, views: Collection[ViewName]) -> PromptLimits:
        """Return the limits of samples for prompts of `HEAR`, `READ` and these views."""
        together = tuple(dict.fromkeys((HEAR, READ, *views)))
        return replace(self.limits, chat_fault=lambda sample: self.chat_fault(sample, together))

    def chat_fault(self, sample: Sample, views: Collection[ViewName] = (HEAR, READ)) -> str | None:
        """Return what in a sample's conversation the views, the model or its chat template refuse; None if nothing."""
        chosen = [self.views.of(sample, name) for name in views]
        if self._clips is None and any(view.filters is not None for view in chosen):
            return f"has a recording, but {self._takes_no_audio}"
        for view in chosen:
            # `PromptLimits.fault` checks the texts of the plain views.
            fault = view.fault(sample) or (None if isinstance(view, PlainView) else self._control_fault(sample, view))
            if fault is not None or (fault := self._template.fault(view.chat(sample))) is not None:
                return fault
        return None

    def control_token(self, text: str) -> str | None:
        """Return the first control token in a text, which would end a turn or be a placeholder; None without one.

        Servers tokenize the text of prompts with recordings themselves, so such a token could not be escaped.
        """
        if text.isascii() and not any(first in text for first in self._begins_control):
            return None  # most texts; normalization may turn other texts into such a token
        found = [index for index in self._tokenizer.encode(text) if index in self._control_ids]
        return self._tokenizer.decode(found[:1]) if found else None

    def prepare(
        self, samples: Sequence[Sample], views: Collection[ViewName] = (HEAR, READ), *, draw: str = ""
    ) -> list[PreparedSample]:
        """Build the prompts of these views for each sample; features are computed in one batch. Thread-safe.

        Args:
            samples: with their recordings if a view has any.
            views: names of the views; prompts have these names also where a sample's set replaces a view by another.
            draw: seed of the views' filters, together with the sample's id.

        Raises:
            CordError: as `audio_prompt` and `text_prompt`; a sample lacks a part of a view.
        """
        chosen = [{name: self.views.of(sample, name) for name in views} for sample in samples]
        clips = self._make_clips(samples, chosen, draw)
        prepared = []
        for number, (sample, each) in enumerate(zip(samples, chosen, strict=True)):
            made = {
                name: self._prompt(sample, view, [] if view.filters is None else clips[number, view.filters])
                for name, view in each.items()
            }
            prepared.append(PreparedSample(sample, made))
        return prepared

    def audio_prompt(self, sample: Sample) -> Prompt:
        """Build the prompt of `HEAR`. Thread-safe.

        Each clip's features are float32 [n_mels, frames of the window], or [n_mels, its frames] without a window.

        Raises:
            CordError: audio that `ClipMaker.make` refuses, a model without an audio encoder, a control token in a text
                beside the recordings, or a conversation that the chat template cannot write.
        """
        return self.audio_prompts([sample])[0]

    def audio_prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """Build the prompt of `HEAR` for each sample, in the same order; features are computed in one batch."""
        return [prepared.prompts[HEAR] for prepared in self.prepare(samples, (HEAR,))]

    def text_prompt(self, sample: Sample) -> Prompt:
        """Build the prompt of `READ`.

        Raises:
            CordError: an empty question, a control token in a text, words outside a word-level vocabulary, or a
                conversation that the chat template cannot write.
        """
        return self.prepare([sample], (READ,))[0].prompts[READ]

    def _make_clips(
        self, samples: Sequence[Sample], views: Sequence[Mapping[ViewName, View]], draw: str
    ) -> dict[tuple[int, tuple[Filter, ...]], list[list[AudioClip]]]:
        """Return the clips of each recording by (index of the sample, filters of a view)."""
        wanted = [(i, view.filters) for i, each in enumerate(views) for view in each.values()]
        keys = list(dict.fromkeys((i, filters) for i, filters in wanted if filters is not None))
        if not keys:
            return {}
        if self._clips is None:
            raise CordError(f"sample {samples[keys[0][0]].id}: {self._takes_no_audio}")
        clips = self._clips.make([filtered(samples[i], filters, draw) for i, filters in keys])
        return dict(zip(keys, clips, strict=True))

    def _control_fault(self, sample: Sample, view: View) -> str | None:
        """Return the message about a control token in a view's texts; None without one."""
        for part, text in view.texts(sample):
            if (token := self.control_token(text)) is not None:
                return control_token_fault(part, token)
        return None

    def _prompt(self, sample: Sample, view: View, clips: Sequence[Sequence[AudioClip]]) -> Prompt:
        """Build a view's prompt; ``clips`` are those of each recording."""
        if view.filters is None:
            spoken = [part for turn in sample.spoken for part in turn.parts if isinstance(part, AudioPart)]
            if not all(part.transcript.strip() for part in spoken):
                raise CordError(f"sample {sample.id}: the question is empty; give the text of what is said")
        if (fault := view.fault(sample) or self._control_fault(sample, view)) is not None:
            raise CordError(f"sample {sample.id} {fault}")
        chat, groups = _with_clips(view.chat(sample), clips, joined=family_of(self._arch).joins_windows)
        if (fault := self._template.fault(chat)) is not None:
            raise CordError(f"sample {sample.id} {fault}")
        first, *others = self._template.tokenize(chat)
        self._refuse_unknown_words(sample, view, [*first, *(index for after in others for index in after)])
        ids = [*first]
        for group, after in zip(groups, others, strict=True):
            ids += [self._arch.audio_token_id or 0] * sum(clip.num_tokens for clip in group) + after
        return Prompt(
            sample_id=sample.id, token_ids=tuple(ids), clips=tuple(clip for group in groups for clip in group)
        )

    @property
    def _takes_no_audio(self) -> str:
        return f"a {self._arch.model_type} model takes no audio; choose a checkpoint with an audio encoder"

    def _refuse_unknown_words(self, sample: Sample, view: View, ids: list[int]) -> None:
        unknown = self._tokenizer.unknown_id
        if unknown is not None and unknown in ids:
            texts = dict.fromkeys(word for _, text in view.texts(sample) for word in text.split())
            words = [word for word in texts if unknown in self._tokenizer.encode(word)]
            named = ", ".join(words[:8]) or "one that the chat template writes"
            raise CordError(f"sample {sample.id}: words outside the model's vocabulary: {named}; rephrase the question")

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of plain text, without added special tokens."""
        return tuple(self._tokenizer.encode(text))

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text as an assistant's turn, with the token that ends it in the chat template.

        Raises:
            CordError: the template ends turns with none of `eos_ids`.
        """
        asked = Turn("user", (TextPart("a"),))
        (begun,) = self._template.tokenize([asked])
        (whole,) = self._template.tokenize([asked, Turn("assistant", (TextPart("b"),)), asked])
        end = next((index for index in whole[len(begun) :] if index in self.eos_ids), None)
        if end is None:
            raise CordError(
                f"{self._directory}: the chat template ends an assistant's turn with none of the ids "
                f"{sorted(self.eos_ids)} that end a response; correct eos_token_id in generation_config.json"
            )
        return (*self.encode(text), end)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        known = [
            index
            for index in ids
            if index < len(self._tokenizer) and index not in self.special_ids and index not in self.eos_ids
        ]
        return self._tokenizer.decode(known)

    def text_of(self, ids: Sequence[int]) -> str | None:
        """Return a text whose token ids are these, each run of placeholders as one; None if there is no such text.

        Servers tokenize a prompt with audio themselves and expand its placeholders.
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
        # Decoded one by one: some tokenizers put spaces between tokens, which servers do not expect at placeholders.
        mark = "" if self.audio_token_id is None else self._tokenizer.decode([self.audio_token_id])
        text = mark.join(self._tokenizer.decode(piece) for piece in pieces)
        return text if self._tokenizer.encode(text) == once else None

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, special ones included."""
        return [self._tokenizer.decode([index]) if index < len(self._tokenizer) else f"<{index}>" for index in ids]

    def _find_template(self) -> ChatTemplate:
        """Return the checkpoint's chat template, or the family's where the published processing is code instead."""
        template = ChatTemplate(self._tokenizer, self.audio_token_id)
        if self._arch.encoder is None:
            return template
        family_template = family_of(self._arch).chat_template
        if family_template is not None:
            try:
                fits = template.placeholders(1) == 1
            except (CordError, TemplateError):
                fits = False
            if not fits:
                template = ChatTemplate(self._tokenizer, self.audio_token_id, family_template)
        if (found := template.placeholders(1)) != 1:
            raise CordError(
                f"{self._directory}: the chat template writes {found} placeholders for a clip; it must be one"
            )
        return template

    def _find_features(self, directory: Path) -> FeatureConfig:
        """Return the checkpoint's feature extractor, or Whisper's where the published processing is code instead."""
        encoder = self._arch.encoder
        assert encoder is not None
        if self._tokenizer.has_feature_extractor:
            features = FeatureConfig.from_checkpoint(directory)
        else:
            features = FeatureConfig(
                n_mels=encoder.num_mels, n_samples=encoder.window_frames * FeatureConfig.hop_length
            )
        if encoder.chunks is not None:
            if features.n_mels != encoder.num_mels:
                raise CordError(
                    f"{directory}: the feature extractor makes {features.n_mels} mel bands, the encoder takes "
                    f"{encoder.num_mels}; copy preprocessor_config.json from the original checkpoint"
                )
            return features
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
                f"{directory}: neither tokenizer nor generation_config.json has the token that ends a response; set "
                "eos_token_id there"
            )
        return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def _with_clips(
    chat: Sequence[Turn], clips: Sequence[Sequence[AudioClip]], *, joined: bool
) -> tuple[list[Turn], list[Sequence[AudioClip]]]:
    """Return the conversation with one audio part for each placeholder, and the clips of each placeholder.

    Args:
        chat: the conversation of a view.
        clips: the clips of each recording.
        joined: whether all clips of a recording share one placeholder.
    """
    turns: list[Turn] = []
    groups: list[Sequence[AudioClip]] = []
    for turn in chat:
        parts: list[Part] = []
        for part in turn.parts:
            if isinstance(part, AudioPart):
                found = [clips[part.recording]] if joined else [[clip] for clip in clips[part.recording]]
                groups += found
                parts += [part] * len(found)
            else:
                parts.append(part)
        turns.append(Turn(turn.role, tuple(parts)))
    return turns, groups
