"""The types that pass between rooms: a sample, and its prompts, one for each view.

A view determines a sample's prompt: `HEAR` has the recordings, `READ` their transcripts, and the rest of the
conversation is the same. Further views are configured (`data.views`). The loader builds a `PreparedSample` once, on the
ranks that generate from it and train on it; its features are kept in it until the microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cord.data.turns import AudioPart, Part, TextPart, Turn, recordings_of, written
from megatron_cord.errors import CordError

if TYPE_CHECKING:
    from torch import Tensor

ViewName = str
HEAR: ViewName = "hear"  #: recordings as they are
READ: ViewName = "read"  #: transcripts in the place of recordings


def _no_audio() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Sample:
    """One spoken question, or a conversation with recordings, and its text.

    Attributes:
        id: unique within a data set; errors and the rollout dump name the sample by it.
        question: the transcript of the recording; with ``turns`` the last turn as one text.
        waveform: the (first) recording, float32 [samples] in [-1, 1], mono, at ``sampling_rate`` Hz; empty for a sample
            that was loaded without its audio.
        sampling_rate: Hz.
        answer: the gold final answer; None if unknown.
        solution: a worked answer that ends in ``answer``; None if unknown.
        voice: name of the speaker; None if unknown.
        choices: the options A, B, … of a multiple-choice question; empty for other questions.
        instruction: text after the recording in the user's turn; None without one, and with ``turns``.
        system: the system prompt; None without one.
        turns: a conversation that ends with the user's turn; empty for one user's turn of one recording.
        others: recordings 1, 2, … of a sample with turns, in the form of ``waveform``, which is recording 0.
        metadata: further fields of the shard; only configured views use them, as texts.
        view_names: views that the sample's set replaces by configured ones (`data.train.NAME.views`).
    """

    id: str
    question: str
    waveform: np.ndarray = field(default_factory=_no_audio)
    sampling_rate: int = 16000
    answer: str | None = None
    solution: str | None = None
    voice: str | None = None
    choices: tuple[str, ...] = ()
    instruction: str | None = None
    system: str | None = None
    turns: tuple[Turn, ...] = ()
    others: tuple[np.ndarray, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    view_names: Mapping[ViewName, ViewName] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.turns:
            if self.instruction is not None:
                raise ValueError(f"sample {self.id}: with turns an instruction is a part of one of them")
            object.__setattr__(self, "question", written(self.turns[-1].parts))

    @property
    def recordings(self) -> tuple[np.ndarray, ...]:
        """All recordings by number."""
        return (self.waveform, *self.others)

    @property
    def num_recordings(self) -> int:
        """The number of recordings of the conversation, loaded or not."""
        return 1 + max(recordings_of(self.turns)) if self.turns else 1

    def with_recordings(self, recordings: Sequence[np.ndarray]) -> Sample:
        """Return the same sample with these recordings, one or more, by number."""
        first, *others = recordings
        return replace(self, waveform=first, others=tuple(others))

    @property
    def asked(self) -> str:
        """The last turn as one text, for the judge and for reports."""
        return written(self.chat(HEAR)[-1].parts)

    def played(self) -> np.ndarray:
        """Return the recordings concatenated, with a pause of 0.5 s between them; float32 [samples]."""
        pause = np.zeros(self.sampling_rate // 2, np.float32)
        parts = [part for recording in self.recordings for part in (pause, recording)]
        return np.concatenate(parts[1:]) if self.others else self.waveform

    @property
    def spoken(self) -> tuple[Turn, ...]:
        """The turns with their recordings, without system prompt and instruction."""
        return self.turns or (Turn("user", (AudioPart(0, self.question),)),)

    def chat(self, view: ViewName) -> tuple[Turn, ...]:
        """Return the conversation of the view `HEAR` or `READ`, the system prompt included.

        The two differ only in the parts that represent a recording.
        """
        beside = () if self.instruction is None else (TextPart(self.instruction),)
        turns = self.turns or (Turn("user", (*self.spoken[0].parts, *beside)),)
        system = () if self.system is None else (Turn("system", (TextPart(self.system),)),)
        return (*system, *(Turn(turn.role, _FILTERS[view](turn.parts)) for turn in turns))

    def texts(self, view: ViewName) -> list[tuple[str, str]]:
        """Return the texts of a view's prompt, each with the name of its part.

        Adjacent texts are also returned joined, as a control token may span both.
        """
        transcript = [("question", self.question)] if view == READ and not self.turns else []
        named = [*transcript, ("instruction", self.instruction), ("system prompt", self.system)]
        found = [(name, text) for name, text in named if text is not None]
        turns = self.turns and self.chat(view)[-len(self.turns) :]
        for number, turn in enumerate(turns, 1):
            runs = groupby(turn.parts, key=lambda part: isinstance(part, TextPart))
            found += [(f"turn {number}", written(tuple(run))) for is_text, run in runs if is_text]
        return found


def _as_text(parts: Sequence[Part]) -> tuple[Part, ...]:
    return (TextPart(written(parts)),)


#: The parts of a turn in each view.
_FILTERS: Mapping[ViewName, Callable[[Sequence[Part]], tuple[Part, ...]]] = {HEAR: tuple, READ: _as_text}


@dataclass(frozen=True)
class PromptDefaults:
    """Defaults of a data set for samples that lack a system prompt or an instruction.

    Attributes:
        system: the system prompt.
        instruction: text after the recording; not used for samples with turns, which contain all their texts.
        view_names: as `Sample.view_names`. Not in ``repr``, which fingerprints use for the data's texts.
    """

    system: str | None = None
    instruction: str | None = None
    view_names: Mapping[ViewName, ViewName] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, text in (("system", self.system), ("instruction", self.instruction)):
            if text is not None and not text.strip():
                raise CordError(f"{name} is empty; write a text, or null for none")

    def complete(self, sample: Sample) -> Sample:
        """Return the sample with its missing texts filled in; the same object if none is missing."""
        system = self.system if sample.system is None else sample.system
        instruction = self.instruction if sample.instruction is None and not sample.turns else sample.instruction
        if system is sample.system and instruction is sample.instruction and self.view_names == sample.view_names:
            return sample
        return replace(sample, system=system, instruction=instruction, view_names=self.view_names)


def _no_token(text: str) -> str | None:
    return None


def _no_fault(sample: Sample) -> str | None:
    return None


@dataclass(frozen=True)
class PromptLimits:
    """Limits of the samples from which a checkpoint's prompts can be built; none by default.

    Attributes:
        shortest: samples of audio, at 16 kHz, below which a clip is too short for the encoder.
        longest: samples above which a clip is too long; None: no limit.
        longest_cut: samples above which a recording is too long even if it is cut into clips; None: no limit.
        control_token: returns the first control token of the tokenizer in a text; None without one.
        chat_fault: returns what in a sample's conversation the chat template refuses; None if nothing.
    """

    shortest: int = 1
    longest: int | None = None
    longest_cut: int | None = None
    control_token: Callable[[str], str | None] = _no_token
    chat_fault: Callable[[Sample], str | None] = _no_fault

    def fault(self, lengths: Sequence[int], sample: Sample) -> str | None:
        """Return why no prompt can be built from a sample; None if one can.

        Args:
            lengths: samples of each recording.
            sample: with or without its audio.
        """
        for number, samples in enumerate(lengths):
            where = f" in its recording {number}" if len(lengths) > 1 else ""
            if samples < self.shortest:
                seconds, least = samples / 16000, self.shortest / 16000
                return (
                    f"has {seconds:.3f} s of audio{where}, too short for the encoder, which takes {least:.3f} s or more"
                )
            longest = self.longest_cut if self.longest is None else self.longest
            if longest is not None and samples > longest:
                return f"has {samples / 16000:.2f} s of audio{where}, the longest allowed are {longest / 16000:.2f} s"
        for part, text in (*sample.texts(READ), *sample.texts(HEAR)):
            if (token := self.control_token(text)) is not None:
                return control_token_fault(part, token)
        return self.chat_fault(sample)


def control_token_fault(part: str, token: str) -> str:
    """Return the message about a text with a control token, which would end a turn or be a placeholder."""
    return f"has {token!r} in its {part}, a control token of the model; remove it from the text"


@dataclass(frozen=True, eq=False)
class AudioClip:
    """One input of the audio encoder.

    Attributes:
        waveform: float32 [samples], 16 kHz, for an engine with a feature extractor of its own.
        features: float32 [n_mels, frames], log-mel, padded to the encoder's window where it has one.
        num_frames: frames of audio; the rest is padding.
        num_tokens: audio features after the adapter, which is the number of placeholders.
    """

    waveform: np.ndarray
    features: Tensor
    num_frames: int
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenised prompt.

    Attributes:
        sample_id: the sample's.
        token_ids: with one placeholder for each audio feature.
        clips: the audio behind the placeholders, in order; empty for a text prompt.
    """

    sample_id: str
    token_ids: tuple[int, ...]
    clips: tuple[AudioClip, ...] = field(default=())


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """A sample with its prompts, whose clips have its features.

    Attributes:
        sample: the sample.
        prompts: by view, of the views that are needed.
    """

    sample: Sample
    prompts: Mapping[ViewName, Prompt]
