"""Checkpoints: Megatron's dist_checkpointing for weights and optimizer, one JSON file for everything else; complete or invisible.

A checkpoint is written under a hidden name and renamed when every rank is done, so a directory `step_000100` is always whole. Its weights and
optimizer states load on any layout.
Simplification: saving waits for the disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.objects import all_gather_json, broadcast_json


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    interval: int = 100  #: steps between checkpoints; the last step is always saved; 0 saves only that one
    keep: int = 2  #: newest checkpoints kept; 0 keeps all

    def __post_init__(self) -> None:
        if self.interval < 0 or self.keep < 0:
            raise CordError("checkpoint.interval and checkpoint.keep cannot be negative")


@dataclass(frozen=True)
class Progress:
    """What a run needs beside tensors. Data order and sampling are drawn from (seed, step), so the step is their whole state.

    Attributes:
        step: optimizer steps made, which is also the position in the data and the version of the weights.
        seconds: spent in training so far.
        skipped_in_a_row: steps without an update just before.
        seed: of the run; resuming with another would change what was promised.
    """

    step: int
    seconds: float
    skipped_in_a_row: int
    seed: int


_STATE = "state.json"
# The sharding of the distributed optimizer's states that any other layout can read.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


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

    def save(self, progress: Progress, model: DistributedDataParallel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> Path:
        """Writes the checkpoint of progress.step. Collective.

        Raises:
            CordError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        final = self.directory / f"step_{progress.step:06d}"
        partial = self.directory / f".{final.name}.partial"
        problem = None
        try:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's remarks on its own deprecated internals
                dist_checkpointing.save(_state_dict(model, optimizer, scheduler, is_loading=False), str(partial))
            if dist.get_rank() == 0:
                state = asdict(progress) | {"architecture": asdict(model.module.arch)}
                (partial / _STATE).write_text(json.dumps(state, indent=1))
        except Exception as error:  # noqa: BLE001 (torch wraps the ranks' errors in types of its own)
            if not _is_storage_error(error):
                raise
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error}"
        problems = [p for p in all_gather_json(problem) if p is not None]
        if problems:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CordError(f"{final}: the checkpoint could not be written ({problems[0]}); free space on the disk and resume from "
                            "the checkpoint before")  # fmt: skip
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            self._forget_old()
        dist.barrier()
        return final

    def _forget_old(self) -> None:
        if self.config.keep:
            for old in sorted(self.directory.glob("step_*"))[: -self.config.keep]:
                # Renamed first: a stop halfway through the deletion must not leave half a checkpoint under a whole one's name.
                doomed = old.with_name(f".{old.name}.deleted")
                os.replace(old, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def load(self, path: Path, model: DistributedDataParallel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> Progress:
        """Restores everything from a checkpoint of any layout. Collective.

        Raises:
            CordError: not a whole checkpoint, or one of another architecture.
        """
        state = _read_state(path, model.module)
        restored = dist_checkpointing.load(_state_dict(model, optimizer, scheduler, is_loading=True), str(path))
        model.load_state_dict(restored["model"])
        optimizer.load_state_dict(restored["optimizer"])
        scheduler.load_state_dict(restored["scheduler"])
        return Progress(**state)


def load_weights(path: Path, model: LALM) -> int:
    """Restores only the weights, for evaluation and export; returns the checkpoint's step. Collective.

    Raises:
        CordError: as `Checkpoints.load`.
    """
    state = _read_state(path, model)
    restored = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))
    model.load_state_dict(restored["model"])
    return int(state["step"])


def _state_dict(model: DistributedDataParallel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, is_loading: bool) -> dict[str, Any]:
    weights = model.module.sharded_state_dict()
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_SHARDING)),
            "scheduler": scheduler.state_dict()}  # fmt: skip


def _read_state(path: Path, model: LALM) -> dict[str, Any]:
    try:
        state = json.loads((path / _STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CordError(f"{path} is not a whole checkpoint ({error}); choose another with resume=PATH") from None
    saved, wanted = _flat(state.pop("architecture")), _flat(json.loads(json.dumps(asdict(model.arch))))
    differing = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if differing:
        raise CordError(f"{path} holds another architecture (it differs in {', '.join(differing)}); resume with the run's own model.checkpoint")
    return state


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _is_storage_error(error: BaseException) -> bool:
    """Whether the disk is to blame, looking through torch's wrappers."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
            return True
        seen = seen.__cause__ or seen.__context__
    return any(text in str(error) for text in ("No space left", "Disk quota", "File too large", "Permission denied", "Read-only"))
