"""The data of a run: its sets, where the run is in them, and what its directory and checkpoints say of them."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_cord.data.ordering.damage import DamageLog
from megatron_cord.data.ordering.row import Phase
from megatron_cord.data.samples import PromptLimits
from megatron_cord.data.sets import TrainingSets, make_row, open_training
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.checkpoint.progress import Progress
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.data_fingerprint import check_same, describe_sets, with_past_sets

logger = logging.getLogger(__name__)
FILE_NAME = "data.json"
_LISTED = 1000  # of the damage found during the run


class TrainingData:
    """What a run trains on. Built by all ranks together.

    Args:
        config: of the run.
        limits: what the model's prompts can be made of.
        progress: how far the run is.
        main: whether this is rank 0, which alone reads shards for their fingerprint and writes the file.

    Attributes:
        row: the samples.
        record: samples and fingerprint, for checkpoints, with those of sets that are left out now.

    Raises:
        CordError: a set cannot be opened, or the run that goes on began with other data.
    """

    def __init__(self, config: RunConfig, limits: PromptLimits, progress: Progress, *, main: bool) -> None:
        self._path, self._main = Path(config.output_dir) / FILE_NAME, main
        self._sets: TrainingSets = open_training(config.data, limits)
        self._several = "" not in self._sets
        window = config.data.shuffle_shards
        described: dict[str, Any] = broadcast_json(describe_sets(self._sets, window) if main else None)
        check_same(described, progress.made_with.data, self._path)
        self.record = with_past_sets(described, progress.made_with.data)
        skipped = {name: _left_out(each) for name, each in self._sets.items()}
        sizes = {name: len(each) + skipped[name] for name, each in self._sets.items()}
        self._damage = DamageLog(sizes, skipped, config.data.max_skipped, progress.damaged)
        self._counts = bool(config.data.max_skipped)
        weights = {name: each.weight for name, each in config.data.training_sets.items()}
        before = Phase(**progress.mixture) if progress.mixture else Phase(weights)
        self.phase = before.goes_on(progress.samples, weights)
        self.row = make_row(config.data, self._sets, config.seed, self.phase, self._damage)
        self._late = self._known_before()
        self._written = 0
        self._write()

    @property
    def skipped(self) -> int:
        """How many samples were left out when the sets were opened."""
        return sum(map(_left_out, self._sets.values()))

    def state(self, progress: Progress) -> Progress:
        """Return the progress with what a run that goes on must know of the data."""
        return replace(progress, mixture=asdict(self.phase), damaged=self._damage.state())

    def metrics(self, samples: int) -> dict[str, float]:
        """Return how far the run is in each set after so many samples, and how many of them turned out damaged."""
        epochs, taken = self.row.epochs(samples), self.phase.taken(samples)
        metrics: dict[str, float] = {}
        for name in self._sets:
            if self._several:
                metrics[f"data/{name}/samples"] = float(taken[name])
            metrics[f"data/{name}/epoch" if name else "epoch"] = epochs[name]
        if self._counts:
            metrics["damaged_samples"] = float(sum(map(self._damage.count, self._sets)))
        return metrics

    def report_damage(self) -> None:
        """Say what was found since the last call, and write it down."""
        found = self._damage.found[self._written :]
        if not found or not self._main:
            return
        count = sum(damage.samples for _, damage in found)
        step, first = found[0]
        logger.warning(
            "step %d: %d samples cannot be used, and others stand in for them; the first: %s (%s lists them)",
            step + 1, count, first.message, self._path,
        )  # fmt: skip
        self._write()

    def _write(self) -> None:
        if not self._main:
            return
        self._written = len(self._damage.found)
        late = self._late + [
            {"step": step + 1, "set": d.set, "first": d.first, "samples": d.samples, "message": d.message}
            for step, d in self._damage.found
        ]
        skipped = [
            ({"set": name} if name else {}) | asdict(item)
            for name, each in self._sets.items()
            if isinstance(each, ShardDataset)
            for item in each.skipped
        ]
        damaged = {name: count for name in self._sets if (count := self._damage.count(name))}
        found = {"damaged_during_the_run": damaged, "found": late[-_LISTED:]} if late else {}
        write_json(self._path, self.record | {"skipped": skipped} | found)

    def _known_before(self) -> list[dict[str, Any]]:
        """Return the damage that an earlier process listed and the checkpoint has, too."""
        try:
            listed = json.loads(self._path.read_text(encoding="utf-8"))["found"]
            return [item for item in listed if self._damage.covers(item["set"], item["first"])]
        except (OSError, ValueError, LookupError, TypeError):
            return []  # none, or of a run with other sets


def _left_out(samples: object) -> int:
    return sum(item.samples for item in samples.skipped) if isinstance(samples, ShardDataset) else 0
