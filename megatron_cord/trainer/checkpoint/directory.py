"""The directory of a run's checkpoints: which exist, which of them are undamaged, which are deleted.

`step_000100` appeared when it was whole; `best.json` names the one of the best evaluation, which is not deleted.
`.step_…` is half-written or half-deleted, and deleted at the next start.
`damaged_step_…` was whole once, was found changed, and is kept so that the cause can be found.
`set_aside_step_…` is later than the checkpoint to which a guard made the run go back; nothing reads it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.checkpoint.manifest import find_damage

logger = logging.getLogger(__name__)

BEST = "best.json"  #: {"step", "set", "metric", "value"}: the evaluation that makes this step's checkpoint the best
_VISIBLE = re.compile(r"step_(\d+)")


class CheckpointDirectory:
    """The checkpoints of one run.

    Args:
        directory: they are its subdirectories; it need not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path_of(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.directory / f"step_{step:06d}"

    def newest(self) -> Path | None:
        """Return the newest checkpoint, the same on every rank; it was whole when it was written. Collective."""
        names = broadcast_json(self._names())
        return self.directory / names[-1] if names else None

    def newest_undamaged(self, *, own: bool = True) -> Path | None:
        """Return the newest checkpoint whose files are as they were written; None if there never was one. Collective.

        Args:
            own: for the run that starts: damaged newer ones are renamed to `damaged_step_…`, with a warning, and
                leftovers of a run that was killed are deleted. Of another run nothing is changed.

        Raises:
            CordError: there are checkpoints, and all of them are damaged.
        """
        if own and dist.get_rank() == 0:
            self.sweep()
        damaged: list[tuple[str, str]] = []
        names: list[str] = broadcast_json(self._names())
        for name in reversed(names):
            damage = find_damage(self.directory / name)
            if damage is None:
                if own and dist.get_rank() == 0:
                    self._set_aside(damaged, name)
                elif dist.get_rank() == 0:
                    for other, found in damaged:
                        logger.warning("%s is damaged (%s); using %s", self.directory / other, found, name)
                return self.directory / name
            damaged.append((name, damage))
        if damaged:
            name, damage = damaged[0]
            raise CordError(
                f"{self.directory / name} is damaged ({damage}), and no earlier checkpoint is whole; "
                "restore it, or start in another output_dir"
            )
        return None

    def make_room(self, partial: Path) -> None:
        """Make the hidden directory of a new checkpoint. On rank 0 alone, like `publish` and `sweep`."""
        self.sweep()
        partial.mkdir(parents=True)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending; on rank 0 alone."""
        return [int(name.removeprefix("step_")) for name in self._names()]

    def best(self) -> dict[str, Any] | None:
        """Return the content of `best.json`; None if there is none, or its checkpoint is gone."""
        try:
            record = json.loads((self.directory / BEST).read_text(encoding="utf-8"))
            return record if self.path_of(int(record["step"])).is_dir() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def mark_best(self, record: Mapping[str, Any]) -> bool:
        """Write `best.json` if the step's checkpoint is there, and return whether it is. On rank 0 alone."""
        if not self.path_of(int(record["step"])).is_dir():
            return False
        write_json(self.directory / BEST, dict(record), sync=True)
        return True

    def publish(self, partial: Path, final: Path, keep: int, kept: Collection[int] = ()) -> None:
        """Give a complete checkpoint its name; then delete all but the newest `keep` (0: keep all).

        Args:
            partial: where it is.
            final: its name.
            keep: so many of the newest stay.
            kept: steps whose checkpoints stay, too, beside the best one's.
        """
        if final.exists():
            final.replace(_deleted_name(final))
        partial.replace(final)
        self.rotate(keep, kept)

    def rotate(self, keep: int, kept: Collection[int] = ()) -> None:
        """Delete all checkpoints but the newest `keep` (0: keep all), the best one, and those of the steps `kept`."""
        best = self.best()
        kept_names = {self.path_of(step).name for step in (*kept, *(() if best is None else (best["step"],)))}
        for name in self._names()[:-keep] if keep else ():
            if name in kept_names:
                continue
            # Renamed first: a stop during the deletion must not leave half a checkpoint under the name of a whole one.
            old = self.directory / name
            old.replace(_deleted_name(old))
        self.sweep()

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename all checkpoints after a step to `set_aside_step_…`, and return them. On rank 0 alone."""
        best = self.best()
        if best is not None and best["step"] > step:
            (self.directory / BEST).unlink()
        found = []
        for later in (each for each in self.steps() if each > step):
            path = self.path_of(later)
            aside = path.with_name(f"set_aside_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            found.append(aside)
        return found

    def sweep(self) -> None:
        """Delete half-written and half-deleted checkpoints."""
        for leftover in self.directory.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _names(self) -> list[str]:
        """Return the names of all checkpoints, oldest first, on rank 0; nothing on other ranks."""
        if dist.get_rank() != 0:
            return []
        found = [path.name for path in self.directory.glob("step_*") if _VISIBLE.fullmatch(path.name)]
        return sorted(found, key=lambda name: int(name.removeprefix("step_")))

    def _set_aside(self, damaged: list[tuple[str, str]], used: str) -> None:
        for name, damage in damaged:
            path, aside = self.directory / name, self.directory / f"damaged_{name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            logger.warning("%s is damaged (%s); using %s, and keeping it as %s", path, damage, used, aside.name)


def check_whole(checkpoint: Path) -> Path:
    """Return a checkpoint that the user has named, after verifying its files. Collective.

    Raises:
        CordError: a file is not as it was written.
    """
    damage = find_damage(checkpoint)
    if damage is not None:
        raise CordError(f"{checkpoint} is not a whole checkpoint ({damage}); choose another with resume=PATH")
    return checkpoint


def _deleted_name(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.deleted")
