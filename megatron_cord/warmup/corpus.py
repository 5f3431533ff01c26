"""What is recited: recordings with the token ids of their transcripts, which of them are held out, and their order.

A sample with several recordings gives as many utterances. The order is drawn from the seed alone, so that an update's
number is the position in the data, on any number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megatron_cord.data.ordering.order import EpochOrder, permutation
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import AudioClip, Sample
from megatron_cord.data.shards.manifest import is_remote
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.turns import AudioPart
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.warmup.config import WarmupConfig

logger = logging.getLogger(__name__)
_SPLIT, _ORDER = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Utterance:
    """One recording.

    Attributes:
        set: the number of its data set.
        sample: its number in the set.
        recording: its number in the sample.
        name: for errors.
        text: its transcript.
        token_ids: of its transcript.
        num_frames: log-mel frames.
        num_tokens: tokens that the adapter makes of it.
    """

    set: int
    sample: int
    recording: int
    name: str
    text: str
    token_ids: tuple[int, ...]
    num_frames: int
    num_tokens: int


class Corpus:
    """The utterances of a warm-up.

    Args:
        config: which recordings.
        prompts: of the checkpoint.
        arch: of the checkpoint.

    Attributes:
        sets: of recordings; the second, if there is one, is held out.
        utterances: that are trained on, then those held out; what no update draws is left out.
        num_train: how many are trained on.
        skipped: how many recordings were left out.

    Raises:
        CordError: a set cannot be opened, has a recording without a transcript, or a transcript with a token that has
            no embedding of its own, or too many recordings that cannot be used.
    """

    def __init__(self, config: WarmupConfig, prompts: PromptBuilder, arch: Architecture) -> None:
        self._prompts = prompts
        paths = [config.data, *([config.held_out] if config.held_out else [])]
        self.sets = [_open(path, config, prompts) for path in paths]
        self.skipped = sum(item.samples for opened in self.sets for item in opened.skipped)
        found = [self._usable(number, path, config, arch) for number, path in enumerate(paths)]
        train, held_out = found if config.held_out else self._split(found[0], config)
        self._order = EpochOrder(len(train), (config.seed, _ORDER))
        draws = max(stage.steps * stage.batch_size for stage in config.stages.values())
        used = sorted({self._order.at(place) for place in range(min(draws, len(train)))})
        self._places = {number: place for place, number in enumerate(used)}
        self.utterances = tuple([train[number] for number in used] + held_out)
        self.num_train = len(used)

    @property
    def train(self) -> Sequence[Utterance]:
        """The utterances that are trained on."""
        return self.utterances[: self.num_train]

    @property
    def held_out(self) -> range:
        """The numbers of the utterances that are measured on."""
        return range(self.num_train, len(self.utterances))

    def batch(self, step: int, size: int) -> list[int]:
        """Return the numbers of the utterances of a step, counted from 0."""
        return [self._places[self._order.at(place)] for place in range(step * size, (step + 1) * size)]

    def recordings(self, numbers: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """Read the audio of utterances, each with its sampling rate in Hz."""
        found = []
        for each in (self.utterances[number] for number in numbers):
            sample = self.sets[each.set][each.sample]
            found.append((sample.recordings[each.recording], sample.sampling_rate))
        return found

    def clips(self, numbers: Sequence[int]) -> list[AudioClip]:
        """Read utterances and compute their features."""
        names = (self.utterances[number].name for number in numbers)
        samples = [Sample(name, "-", *heard) for name, heard in zip(names, self.recordings(numbers), strict=True)]
        return [clip for prompt in self._prompts.audio_prompts(samples) for clip in prompt.clips]

    def _usable(self, number: int, path: str, config: WarmupConfig, arch: Architecture) -> list[Utterance]:
        """Return a set's utterances but those whose audio has fewer tokens than CTC needs for their transcript."""
        found = list(self._utterances(number, arch))
        short = [each for each in found if each.num_tokens < ctc_length(each.token_ids)]
        if len(short) > config.max_skipped * len(found):
            first = short[0]
            raise CordError(
                f"{first.name}: {first.num_tokens} tokens of audio are fewer than the {ctc_length(first.token_ids)} "
                f"that its transcript of {len(first.token_ids)} tokens needs ({len(short)} of {len(found)} are so); "
                "check that transcripts belong to their recordings, raise max_skipped, or graft with a smaller --stack"
            )
        if short:
            logger.info("%s: %d of %d recordings are too short for their transcripts", path, len(short), len(found))
        self.skipped += len(short)
        left_out = {id(each) for each in short}
        return [each for each in found if id(each) not in left_out]

    def _utterances(self, number: int, arch: Architecture) -> Iterator[Utterance]:
        special = {*self._prompts.special_ids, *self._prompts.eos_ids}
        samples = self.sets[number]
        for index in range(len(samples)):
            sample, lengths = samples.without_audio(index), samples.lengths_of(index)
            spoken = {
                part.recording: part.transcript
                for turn in sample.spoken
                for part in turn.parts
                if isinstance(part, AudioPart)
            }
            for recording, transcript in sorted(spoken.items()):
                name = sample.id if len(lengths) == 1 else f"{sample.id}, recording {recording}"
                ids = self._prompts.encode(transcript)
                for token in ids:
                    if token >= arch.language.vocab_size or token in special:
                        (text,) = self._prompts.token_strings([token])
                        raise CordError(
                            f"sample {name}: its transcript has the token {token} ({text!r}), which has no row of its "
                            f"own among the {arch.language.vocab_size} of the word embedding; rephrase the transcript"
                        )
                frames = self._prompts.num_frames(lengths[recording])
                yield Utterance(number, index, recording, name, transcript, ids, frames, arch.num_audio_tokens(frames))

    def _split(self, found: list[Utterance], config: WarmupConfig) -> tuple[list[Utterance], list[Utterance]]:
        if len(found) < 2:
            raise CordError(
                f"{config.data} has one usable recording, and one is held out; give more recordings, or held_out"
            )
        count = min(len(found) - 1, max(1, round(config.held_out_share * len(found))))
        chosen = {int(number) for number in permutation(len(found), config.seed, _SPLIT)[:count]}
        return (
            [each for number, each in enumerate(found) if number not in chosen],
            [each for number, each in enumerate(found) if number in chosen],
        )


def ctc_length(token_ids: Sequence[int]) -> int:
    """Return how many frames CTC needs at least: one a token, and one for a blank between two that are equal."""
    return len(token_ids) + sum(before == after for before, after in pairwise(token_ids))


def _open(path: str, config: WarmupConfig, prompts: PromptBuilder) -> ShardDataset:
    if is_remote(path):
        raise CordError(f"{path} is an address; make a local copy, and give its directory")
    # Whole clips alone: half of a recording has no transcript of its own.
    limits = replace(prompts.limits, chat_fault=lambda sample: None)
    return ShardDataset(path, max_skipped=config.max_skipped, limits=limits)
