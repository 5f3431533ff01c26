"""A run's checkpoints: Megatron's dist_checkpointing for weights and optimizer, JSON files for everything else.

A checkpoint is complete or invisible: it is written under a hidden name, with a list of checksums last, and renamed
when every rank is done. A directory `step_000100` is whole when it appears, and later damage is detected. Weights and
optimizer states load on any layout.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.objects import all_gather_json, broadcast_json
from megatron_cord.trainer.checkpoint import manifest
from megatron_cord.trainer.checkpoint.directory import CheckpointDirectory, check_whole
from megatron_cord.trainer.checkpoint.progress import Progress, read_progress, write_progress
from megatron_cord.trainer.checkpoint.restoring import restore
from megatron_cord.trainer.checkpoint.storage import storage_problem
from megatron_cord.trainer.checkpoint.writer import AsyncWrite
from megatron_cord.trainer.step.moving_average import MovingAverage


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    interval: int = 100  #: steps between checkpoints; the last step is always saved; 0 saves only that one
    keep: int = 2  #: newest checkpoints kept; 0 keeps all
    asynchronous: bool = True  #: train on while the disk writes; false: wait for it
    #: keep the checkpoint of the best evaluation, too, whatever its age; evaluation.early_stopping.set and .metric say
    #: which evaluation is the best, and checkpoints/best.json which it was
    best: bool = False
    #: steps between exports to Hugging Face directories, output_dir/exports/step_…, each with a model card; the last
    #: step is exported, too. A process of its own makes them from checkpoints, while training goes on; 0: none
    export_interval: int = 0
    export_keep: int = 2  #: newest exports kept; 0 keeps all

    def __post_init__(self) -> None:
        if min(self.interval, self.keep, self.export_interval, self.export_keep) < 0:
            raise CordError("checkpoint: interval, keep, export_interval and export_keep cannot be negative")


logger = logging.getLogger(__name__)
# The sharding of the distributed optimizer's states that any other layout can read.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
# Megatron's writers log their errors in addition to raising them.
logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written: its tensors, its hidden and final place, what completes it, since when."""

    writing: AsyncWrite
    partial: Path
    final: Path
    complete: Callable[[], None]
    begun: float


class Checkpoints(CheckpointDirectory):
    """The checkpoints of one run.

    Args:
        directory: they are its subdirectories.
        config: retention.

    Attributes:
        write_seconds: that the last complete checkpoint took, until it was found to be complete; 0 before the first.
        kept: steps whose checkpoints something else still needs; read on rank 0.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        super().__init__(directory)
        self.config = config
        self.write_seconds = 0.0
        self.kept: Collection[int] = ()
        self._pending: _Pending | None = None
        self._best: Mapping[str, Any] | None = None  # of a checkpoint that is not complete yet

    def save(
        self,
        progress: Progress,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        average: MovingAverage | None = None,
    ) -> None:
        """Write the checkpoint of progress.step; an asynchronous one appears later, in `poll` or `wait`. Collective.

        Raises:
            CordError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        begun = time.monotonic()
        self.wait()
        final = self.path_of(progress.step)
        # A unique name: the writers of a run that was killed may live a moment longer.
        partial = self.directory / f".{final.name}.partial-{broadcast_json(secrets.token_hex(4))}"
        self._on_main(final, lambda: self.make_room(partial))
        arch: Architecture = model.module.arch
        try:
            writing = AsyncWrite(_state_dict(model, optimizer, average, is_loading=False), partial)
        except Exception as error:
            # This rank alone failed. The others wait for it until they notice that it has ended.
            reason = storage_problem(error)
            if reason is None:
                raise
            raise self._failure(final, reason) from error
        self._pending = _Pending(writing, partial, final, lambda: write_progress(partial, progress, arch), begun)
        if not self.config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Publish the pending checkpoint if its files are written by now. Collective. Raises as `save`."""
        self._finish(wait=False)

    def wait(self) -> None:
        """Wait for the files of the pending checkpoint and publish it. Collective. Raises as `save`."""
        self._finish(wait=True)

    def _finish(self, *, wait: bool) -> None:
        pending = self._pending
        if pending is None:
            return
        try:
            if not pending.writing.is_done(wait=wait):
                return
        except CheckpointException as error:  # a rank's writer failed; raised on every rank, with the reason on rank 0
            self._pending = None
            reason = broadcast_json(storage_problem(error))
            if reason is None:
                raise
            raise self._failure(pending.final, reason) from error
        self._pending = None
        digests = {
            name: checksum for part in all_gather_json(pending.writing.digests) for name, checksum in part.items()
        }
        self._on_main(pending.final, lambda: self._publish(pending, digests))
        self.write_seconds = time.monotonic() - pending.begun

    def keep_best(self, record: Mapping[str, Any]) -> None:
        """Keep the checkpoint of record["step"] from now on as the best one; it may still be written. Collective.

        Raises:
            CordError: the disk is full or not writable.
        """
        self._best = record
        self._on_main(self.path_of(record["step"]), self._mark_best)

    def _mark_best(self) -> None:
        if self._best is not None and self.mark_best(self._best):
            self._best = None

    def _publish(self, pending: _Pending, digests: dict[str, str]) -> None:
        pending.complete()
        manifest.write_manifest(pending.partial, digests)
        waiting = () if self._best is None else (int(self._best["step"]),)
        self.publish(pending.partial, pending.final, self.config.keep, (*self.kept, *waiting))
        self._mark_best()

    def _on_main(self, final: Path, action: Callable[[], None]) -> None:
        """Act on rank 0, and fail on all ranks together if it could not."""
        reason = None
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                reason = storage_problem(error) or str(error)
        reason = broadcast_json(reason)
        if reason is not None:
            raise self._failure(final, reason)

    def _failure(self, final: Path, reason: str) -> CordError:
        if dist.get_rank() == 0:
            self.sweep()
        return CordError(
            f"{final}: the checkpoint could not be written ({reason}); earlier ones are whole: "
            "fix the cause and start the run again"
        )

    def load(
        self,
        path: Path,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        average: MovingAverage | None = None,
    ) -> Progress:
        """Restore everything from a checkpoint of any layout. Collective.

        Learning rates and other settings of the optimizer are those of the configuration. A part that was frozen gets
        new moments, one that is frozen now loses them; both are logged.

        Raises:
            CordError: not a whole checkpoint, a damaged one, one of another architecture, or one without the averages
                that `average` needs.
        """
        progress = read_progress(path, model.module.arch)
        if average is not None and progress.made_with.settings.get("teacher", {}).get("mode") != "ema":
            raise CordError(
                f"{path} holds no moving average; resume with the run's own teacher.mode, or choose another output_dir"
            )
        restored = restore(path, _state_dict(model, optimizer, average, is_loading=True))
        model.load_state_dict(restored.state["model"], strict=model.module.lora is None)
        if average is not None:
            average.load_state_dict(restored.state["teacher"])
        for group in _param_groups(restored.state["optimizer"]):
            group["step"] = restored.adam_steps or progress.step
        optimizer.load_state_dict(restored.state["optimizer"])
        for parts, words in (
            (restored.fresh, "is trained from now on: its optimizer states begin at zero"),
            (restored.changed, "has matrices of another kind of optimizer than before: their states begin at zero"),
            (restored.dropped, "is not trained any more: its optimizer states are dropped"),
        ):
            for part in parts:
                logger.info("%s %s", part, words)
        return progress


def _param_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Yield all groups in an optimizer's state, wherever its wrappers put them."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from value if key == "param_groups" else _param_groups(value)


def load_weights(path: Path, model: LALM) -> int:
    """Restore only the weights, of a model with LoRA the adapters; return the checkpoint's step. Collective.

    Raises:
        CordError: as `Checkpoints.load`.
    """
    step = check_weights(path, model.arch)
    model.load_state_dict(restore(path, {"model": _weights(model)}).state["model"], strict=model.lora is None)
    return step


def check_weights(path: Path, arch: Architecture) -> int:
    """Return the step of a checkpoint, after verifying that its weights can be read. Collective.

    Raises:
        CordError: its files are not as they were written, or it holds another architecture.
    """
    if (path / manifest.NAME).is_file():  # a checkpoint that was imported has none
        check_whole(path)
    return read_progress(path, arch).step


def _weights(model: LALM) -> dict[str, Any]:
    """Describe the tensors that a checkpoint holds: the model's, but with LoRA only what is trained."""
    state: dict[str, Any] = model.sharded_state_dict()
    if model.lora is None:
        return state
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: entry for name, entry in state.items() if name in trained}


def _state_dict(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, average: MovingAverage | None, *, is_loading: bool
) -> dict[str, Any]:
    weights = _weights(model.module)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_SHARDING)),
    }
    return state if average is None else state | {"teacher": average.sharded_state_dict()}
