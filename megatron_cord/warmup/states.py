"""The encoder's states of all utterances: computed once, kept on disk, read from there row by row.

They are kept in blocks of a few utterances, each a file that is whole or absent: ranks divide the missing ones, and
what an earlier start has made stays. No rank has more than a block of them in memory.
Legend: F features of a clip, D the encoder's width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_cord.data.audio.features import stack_features
from megatron_cord.errors import CordError
from megatron_cord.model.encoder import AudioEncoder
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import run_on_main
from megatron_cord.parallel.transfers import to_device
from megatron_cord.runtime.files import write_atomic
from megatron_cord.runtime.progress import Bars
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.trainer.endings.agreement import any_rank
from megatron_cord.warmup.corpus import Corpus

logger = logging.getLogger(__name__)
BLOCK = 16  #: utterances a file, which go through the encoder together
_SAY_EVERY = 20.0  # seconds
_NAME = "states"


class EncoderStates:
    """The states of a corpus.

    Args:
        directory: of the blocks.
        counts: features of each utterance.
        width: D.
    """

    def __init__(self, directory: Path, counts: Sequence[int], width: int) -> None:
        self.counts = tuple(counts)
        self._directory, self._width = directory, width

    @property
    def num_blocks(self) -> int:
        """How many files there are when all is computed."""
        return -(-len(self.counts) // BLOCK)

    def numbers(self, block: int) -> range:
        """Return the numbers of a block's utterances."""
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.counts)))

    def missing(self) -> list[int]:
        """Return the blocks that are not there.

        Raises:
            CordError: one is damaged, or of other recordings.
        """
        lacking = []
        for block in range(self.num_blocks):
            if not self._path(block).is_file():
                lacking.append(block)
                continue
            wanted = [sum(self.counts[number] for number in self.numbers(block)), self._width]
            if (found := self._shape(block)) != wanted:
                raise CordError(f"{self._path(block)} has the shape {found}, wanted is {wanted}; remove it")
        return lacking

    def write(self, block: int, states: Tensor) -> None:
        """Write a block.

        Args:
            block: its number.
            states: [features of all its utterances, D].
        """
        try:
            write_atomic(self._path(block), save({_NAME: states.cpu().contiguous()}))
        except OSError as error:
            raise CordError(
                f"{self._path(block)} could not be written ({error.strerror}); free some space and start again"
            ) from None

    def read(self, number: int) -> Tensor:
        """Return an utterance's states, [F, D] in the precision of the encoder, on the host."""
        block, place = divmod(number, BLOCK)
        ends = list(accumulate((self.counts[each] for each in self.numbers(block)), initial=0))
        try:
            with safe_open(self._path(block), framework="pt") as file:
                states: Tensor = file.get_slice(_NAME)[ends[place] : ends[place + 1]]
                return states
        except (OSError, SafetensorError) as error:
            raise self._damaged(block, error) from None

    def _path(self, block: int) -> Path:
        return self._directory / f"block-{block:06d}.safetensors"

    def _shape(self, block: int) -> list[int]:
        try:
            with safe_open(self._path(block), framework="pt") as file:
                return list(file.get_slice(_NAME).get_shape())
        except (OSError, SafetensorError) as error:
            raise self._damaged(block, error) from None

    def _damaged(self, block: int, error: Exception) -> CordError:
        return CordError(f"{self._path(block)} is damaged ({error}); remove it and start again")


@torch.no_grad()
def encode(
    states: EncoderStates, corpus: Corpus, encoder: AudioEncoder, layout: Layout, stop: Callable[[], bool]
) -> None:
    """Compute the blocks that are missing, divided among all ranks. Collective.

    Raises:
        StoppedError: a rank was asked to stop; what is finished is kept.
        CordError: a recording cannot be read, or a block not be written.
    """
    missing: list[int] = run_on_main(states.missing)  # a rank may have written before another lists what is there
    if not missing:
        return
    logger.info("encoding %d recordings, %d blocks of %d", len(states.counts), len(missing), BLOCK)
    said = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, enabled=layout.is_main) as bars:
        bar = bars.add_task("encoding", total=len(missing))
        for start in range(0, len(missing), layout.world_size):
            for block in missing[start + layout.rank : start + layout.rank + 1]:
                clips = corpus.clips(states.numbers(block))
                for number, clip in zip(states.numbers(block), clips, strict=True):
                    if clip.num_frames != (wanted := corpus.utterances[number]).num_frames:
                        raise CordError(
                            f"sample {wanted.name} has {clip.num_frames} frames, and its file's header says "
                            f"{wanted.num_frames}; write the shard again"
                        )
                features = to_device(stack_features([clip.features for clip in clips]), layout.device)
                states.write(block, encoder(features, [clip.num_frames for clip in clips]))
            # Also lets no rank run away from the others by more than a collective may take.
            done = min(start + layout.world_size, len(missing))
            bars.update(bar, completed=done)
            if any_rank([stop()], layout.device)[0]:
                raise StoppedError("asked to stop: the recordings encoded so far are kept; the same command continues")
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                logger.info("encoded %d of %d blocks", done, len(missing))
