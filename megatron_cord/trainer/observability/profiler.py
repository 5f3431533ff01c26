"""Profiles of chosen steps: a trace of operations for chrome://tracing or Perfetto, and what they allocated.

A trace has the step's phases as named spans (`cord.rollout`, `cord.teacher`, …), the operations, and on CUDA the
kernels. What is profiled is slower, by the profiler's own work for each operation.
"""

from __future__ import annotations

import gzip
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import atomic_file

logger = logging.getLogger(__name__)

_ALLOCATIONS = 1_000_000  #: of a step on CUDA that the history keeps, the newest; a step of a 7B model makes fewer


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are profiled, on which ranks, and what is recorded."""

    steps: tuple[int, ...] = ()  #: the steps, numbered from 1 as in metrics.jsonl; none: nothing is profiled
    ranks: tuple[int, ...] = (0,)  #: global ranks that write their profile
    #: also what allocates memory: on CUDA as a snapshot for https://pytorch.org/memory_viz, on the CPU in the trace,
    #: which then has the training thread alone
    memory: bool = False
    shapes: bool = False  #: also the shapes of each operation's inputs
    stacks: bool = False  #: also the source lines that call each operation; large and slow
    directory: str = "profile"  #: of the files, relative to output_dir

    def __post_init__(self) -> None:
        if self.steps and min(self.steps) < 1:
            raise CordError(f"train.profile.steps are numbered from 1, got {min(self.steps)}")
        if self.steps and not self.ranks:
            raise CordError("train.profile.ranks names no rank that could profile train.profile.steps; name one, or 0")
        if self.ranks and min(self.ranks) < 0:
            raise CordError(f"train.profile.ranks are numbered from 0, got {min(self.ranks)}")


class Profiler:
    """Records the chosen steps of this rank, a file or two each.

    Args:
        config: what is recorded.
        directory: of the run.
        rank: of this process.
        world_size: the number of ranks.

    Raises:
        CordError: a rank is named that the run does not have.
    """

    def __init__(self, config: ProfileConfig, directory: Path, rank: int, world_size: int) -> None:
        absent = [chosen for chosen in config.ranks if chosen >= world_size]
        if config.steps and absent:
            raise CordError(f"train.profile.ranks names rank {absent[0]}, and the run has {world_size} ranks, from 0")
        self._config, self._directory, self._rank = config, directory / config.directory, rank
        self._step: int | None = None
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Begin the step numbered from 1: record it if it is chosen."""
        config = self._config
        if step not in config.steps or self._rank not in config.ranks:
            return
        self._step = step
        if self._keeps_history:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS, stacks="python")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            record_shapes=config.shapes,
            profile_memory=config.memory,
            with_stack=config.stacks,
            # Rollouts that are generated ahead have a thread of their own. With all threads torch 2.13 records no
            # memory, which on CUDA the history has.
            experimental_config=_ExperimentalConfig(profile_all_threads=self._keeps_history or not config.memory),
        )
        self._profile.start()

    def end(self) -> None:
        """End the step and write what was recorded of it; do nothing if none is recorded.

        Raises:
            CordError: the files cannot be written.
        """
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        name = f"step{self._step:06d}-rank{self._rank:05d}"
        trace = self._directory / f"{name}.pt.trace.json.gz"  # the name by which tools find PyTorch's traces
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if self._keeps_history:
                torch.cuda.memory._dump_snapshot(str(self._directory / f"{name}.memory.pickle"))  # type: ignore[no-untyped-call]
                torch.cuda.memory._record_memory_history(enabled=None)
            _write(recorded, trace)
        except OSError as error:
            raise CordError(
                f"{trace}: cannot write the profile: {error.strerror}; free some space, or profile fewer "
                "train.profile.steps"
            ) from None
        logger.info("profile of step %s on rank %d: %s", self._step, self._rank, trace)

    def close(self) -> None:
        """Write what was recorded of a step that failed; a failure to do so must not hide the step's own."""
        try:
            self.end()
        except Exception as error:  # a device that failed may refuse its trace in many ways
            logger.warning("the profile of step %s is lost: %s", self._step, error)

    @property
    def _keeps_history(self) -> bool:
        return self._config.memory and torch.cuda.is_available()


def _write(recorded: profile, target: Path) -> None:
    """Write a trace, compressed; the file is whole or absent."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as work:
        plain = Path(work) / "trace.json"
        recorded.export_chrome_trace(str(plain))
        with plain.open("rb") as source, atomic_file(target) as file, gzip.open(file, "wb", compresslevel=3) as packed:
            shutil.copyfileobj(source, packed)
