"""A run's first evaluation, taken from another run that began with the same model: it need not be made twice."""

from __future__ import annotations

from pathlib import Path

from megatron_cord.config.flattening import flatten
from megatron_cord.config.loading import load_config, to_dict
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import heldout_files, read_result
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.runtime.files import checkpoint_fingerprint
from megatron_cord.trainer.config import RunConfig

#: What answers before the first step depend on. Ranks and layouts, which change their rounding, are left free.
_DECISIVE = (
    "data.evaluation", "data.features", "data.instruction", "data.long_audio", "data.system",
    "evaluation.max_new_tokens", "evaluation.samples", "evaluation.scored", "evaluation.sets", "init_from",
    "model.checkpoint", "model.dtype", "rollout.engine", "teacher", "views",
)  # fmt: skip


def has_first_evaluation(config: RunConfig, run: Path) -> bool:
    """Return whether a run's first evaluation is complete and what this run's would be."""
    try:
        find_first_evaluation(config, run)
    except CordError:
        return False
    return True


def find_first_evaluation(config: RunConfig, run: Path) -> Path:
    """Return the directory of a run's first evaluation.

    Raises:
        CordError: there is none, or this run's would be another.
    """
    other = load_config(RunConfig, run / "config.yaml")
    mine, theirs = (flatten(to_dict(each)) for each in (config, other))
    differing = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    if differing := [key for key in differing if f"{key}.".startswith(tuple(f"{each}." for each in _DECISIVE))]:
        raise CordError(
            f"evaluation.first_from: {run} has {differing[0]}={theirs.get(differing[0])}, and this run "
            f"{mine.get(differing[0])}, so its first evaluation would be another; leave evaluation.first_from out"
        )
    found = next(iter(heldout_files(run).values()), None)
    names = (HELDOUT, *config.evaluation.sets)
    if found is None or not all(found.with_name(f"{name}.json").is_file() for name in names):
        raise CordError(f"evaluation.first_from: {run} has no whole evaluation yet; leave it out, or wait for that")
    if read_result(found).get("checkpoint") != checkpoint_fingerprint(checkpoint_directory(config.model.checkpoint)):
        raise CordError(
            f"evaluation.first_from: {run} began with other files in {config.model.checkpoint}, or is of an earlier "
            "release; leave it out"
        )
    return found.parent
