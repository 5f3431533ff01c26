"""Checkpoints: Megatron's dist_checkpointing for weights and optimizer, one JSON file for everything else; complete or invisible.

A checkpoint is written under a hidden name and renamed when every rank is done, so a directory `step_000100` is always whole. Its weights and
optimizer states load on any layout.
Simplification: saving waits for the disk.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.trainer.progress import Progress, read_progress, write_progress
from megatron_cord.trainer.storage import storage_problem


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    interval: int = 100  #: steps between checkpoints; the last step is always saved; 0 saves only that one
    keep: int = 2  #: newest checkpoints kept; 0 keeps all

    def __post_init__(self) -> None:
        if self.interval < 0 or self.keep < 0:
            raise CordError("checkpoint.interval and checkpoint.keep cannot be negative")


# The sharding of the distributed optimizer's states that any other layout can read.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
# Its writers log their errors, in lines of their own, beside raising them.
logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: they are its subdirectories.
        config: retention.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory, self.config = directory, config

    def newest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank."""
        names = sorted(p.name for p in self.directory.glob("step_*")) if dist.get_rank() == 0 else []
        newest = broadcast_json(names[-1] if names else None)
        return None if newest is None else self.directory / newest

    def save(self, progress: Progress, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> Path:
        """Writes the checkpoint of progress.step. Collective.

        Raises:
            CordError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        final = self.directory / f"step_{progress.step:06d}"
        partial = self.directory / f".{final.name}.partial"
        self._on_main(final, lambda: self._make_room(partial))
        # Megatron passes the writers' results through a server process, which imports the program anew and outlives a killed run. A
        # queue in this process does, as saving waits for the writers.
        filesystem_async._results_queue = queue.SimpleQueue()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's remarks on its own deprecated internals
                dist_checkpointing.save(
                    _state_dict(model, optimizer, is_loading=False),
                    str(partial),
                    # What is not sharded is the optimizer's groups, and pipeline stages may have different ones: nothing to compare.
                    preprocess_common_before_consistancy_check=lambda common: {},
                )
        except CheckpointException as error:  # a rank's writer failed, every rank is told so, and the first one why
            reason = broadcast_json(storage_problem(error))
            if reason is None:
                raise
            raise self._failure(final, reason) from error
        except Exception as error:
            # This rank alone failed. The others wait for it, and notice that it has left.
            reason = storage_problem(error)
            if reason is None:
                raise
            raise self._failure(final, reason) from error
        self._on_main(final, lambda: self._publish(partial, final, progress, model.module.arch))
        return final

    def _make_room(self, partial: Path) -> None:
        for leftover in self.directory.glob(".step_*"):  # of a run that was killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, progress: Progress, arch: Architecture) -> None:
        write_progress(partial, progress, arch)
        if final.exists():
            os.replace(final, _doomed(final))
        os.replace(partial, final)
        if self.config.keep:
            for old in sorted(self.directory.glob("step_*"))[: -self.config.keep]:
                # Renamed first: a stop halfway through the deletion must not leave half a checkpoint under a whole one's name.
                os.replace(old, _doomed(old))
        for doomed in self.directory.glob(".step_*"):
            shutil.rmtree(doomed, ignore_errors=True)

    def _on_main(self, final: Path, action: Callable[[], None]) -> None:
        """Rank 0 acts, and all ranks fail together if it could not."""
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
            shutil.rmtree(self.directory / f".{final.name}.partial", ignore_errors=True)
        return CordError(
            f"{final}: the checkpoint could not be written ({reason}); earlier ones are whole: mend that and start the run again"
        )

    def load(
        self, path: Path, model: DistributedDataParallel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ) -> Progress:
        """Restores everything from a checkpoint of any layout; learning rates and the like are those of the configuration. Collective.

        Raises:
            CordError: not a whole checkpoint, a damaged one, or one of another architecture.
        """
        progress = read_progress(path, model.module.arch)
        restored = _load(path, _state_dict(model, optimizer, is_loading=True))
        model.load_state_dict(restored["model"])
        configured = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in optimizer.param_groups]
        optimizer.load_state_dict(restored["optimizer"])
        for group, settings in zip(optimizer.param_groups, configured, strict=True):
            group.update(settings)
        scheduler.step(increment=progress.step)
        return progress


def load_weights(path: Path, model: LALM) -> int:
    """Restores only the weights, for evaluation and export; returns the checkpoint's step. Collective.

    Raises:
        CordError: as `Checkpoints.load`.
    """
    progress = read_progress(path, model.arch)
    restored = _load(path, {"model": model.sharded_state_dict()})
    model.load_state_dict(restored["model"])
    return progress.step


def _state_dict(model: DistributedDataParallel, optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    weights = model.module.sharded_state_dict()
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_SHARDING))}


def _load(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(wanted, str(path))
    except (CheckpointException, CheckpointingException, OSError, EOFError, pickle.UnpicklingError) as error:
        # Only the readers' own complaints. CheckpointException is no Exception, and would pass through every other handler.
        raise CordError(
            f"{path} is damaged ({type(error).__name__}); delete it to use the one before, or choose another with resume=PATH"
        ) from error


def _doomed(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.deleted")
