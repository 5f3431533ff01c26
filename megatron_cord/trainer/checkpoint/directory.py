"""The directory of a run's checkpoints: which are there, which of them can be trusted, which are deleted.

`step_000100` appeared when it was whole. `.step_…` is half-written or half-deleted, and swept away at the next start. `damaged_step_…` was
whole once, was found changed, and is kept for whoever wants to know why.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.trainer.checkpoint.manifest import find_damage

logger = logging.getLogger(__name__)

_VISIBLE = re.compile(r"step_(\d+)")


class CheckpointDirectory:
    """The checkpoints of one run.

    Args:
        directory: they are its subdirectories; it need not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def place(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.directory / f"step_{step:06d}"

    def newest(self) -> Path | None:
        """The newest checkpoint, the same on every rank; it was whole when it was written. Collective."""
        names = broadcast_json(self._names())
        return self.directory / names[-1] if names else None

    def newest_undamaged(self) -> Path | None:
        """The newest checkpoint whose files are as they were written, for a run that starts; None if there never was one. Collective.

        Damaged newer ones are renamed to `damaged_step_…`, with a line on standard error. Leftovers of a run that was killed are deleted.

        Raises:
            CordError: there are checkpoints, and all of them are damaged.
        """
        if dist.get_rank() == 0:
            self.sweep()
        damaged: list[tuple[str, str]] = []
        for name in reversed(broadcast_json(self._names())):
            damage = find_damage(self.directory / name)
            if damage is None:
                if dist.get_rank() == 0:
                    self._set_aside(damaged, name)
                return self.directory / name
            damaged.append((name, damage))
        if damaged:
            name, damage = damaged[0]
            raise CordError(
                f"{self.directory / name} is damaged ({damage}), and no earlier checkpoint is whole; restore it, or start in another output_dir"
            )
        return None

    def make_room(self, partial: Path) -> None:
        """Makes the hidden directory of a new checkpoint. On rank 0 alone, like the following."""
        self.sweep()
        partial.mkdir(parents=True)

    def publish(self, partial: Path, final: Path, keep: int) -> None:
        """Gives a complete checkpoint its name; then deletes all but the newest `keep` (0: none)."""
        if final.exists():
            os.replace(final, _doomed(final))
        os.replace(partial, final)
        for old in self._names()[:-keep] if keep else ():
            # Renamed first: a stop halfway through the deletion must not leave half a checkpoint under a whole one's name.
            os.replace(self.directory / old, _doomed(self.directory / old))
        self.sweep()

    def sweep(self) -> None:
        """Deletes what is half-written or half-deleted."""
        for leftover in self.directory.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _names(self) -> list[str]:
        found = (
            (p.name for p in self.directory.glob("step_*") if _VISIBLE.fullmatch(p.name))
            if dist.get_rank() == 0
            else ()
        )
        return sorted(found, key=lambda name: int(name.removeprefix("step_")))

    def _set_aside(self, damaged: list[tuple[str, str]], used: str) -> None:
        for name, damage in damaged:
            aside = self.directory / f"damaged_{name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.directory / name, aside)
            logger.warning(
                "%s is damaged (%s); using %s, and keeping it as %s", self.directory / name, damage, used, aside.name
            )


def check_whole(checkpoint: Path) -> Path:
    """A checkpoint that somebody has named, if its files are as they were written. Collective.

    Raises:
        CordError: otherwise.
    """
    damage = find_damage(checkpoint)
    if damage is not None:
        raise CordError(f"{checkpoint} is not a whole checkpoint ({damage}); choose another with resume=PATH")
    return checkpoint


def _doomed(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.deleted")
