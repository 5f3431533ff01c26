"""The description of a run: learning rates, settings changed since its checkpoint, metadata of its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_cord.config.loading import to_dict
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.runtime.files import checkpoint_fingerprint
from megatron_cord.trainer.checkpoint.adapters import base_fingerprint
from megatron_cord.trainer.checkpoint.progress import MadeWith
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.settings_changes import Changes, find_changes, schedule_of
from megatron_cord.trainer.start import Start
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule


@dataclass(frozen=True)
class Description:
    """The description of a run.

    Attributes:
        rates: its learning rates.
        changes: what changed since the checkpoint that it goes on from.
        made_with: what later checkpoints say about their run.
    """

    rates: RateSchedule
    changes: Changes
    made_with: MadeWith


def describe(config: RunConfig, start: Start, data: dict[str, Any]) -> Description:
    """Find what changed since the checkpoint, and what later checkpoints say about their run.

    Args:
        config: of the run.
        start: where it begins.
        data: samples and fingerprint of what it trains on.
    """
    before, settings = start.progress.made_with, to_dict(config)
    planned = RateSchedule.of(config.optimizer, config.train.steps)
    own = [name for name, group in config.optimizer.groups.items() if group.learning_rate is not None]
    rates = schedule_of(start, planned, keep=config.optimizer.keep_schedule, own=own)
    model = checkpoint_fingerprint(checkpoint_directory(config.model.checkpoint))
    changes = find_changes(start, settings, rates, model)
    trained = {*before.trained, *config.model.trained_parts}
    made_with = replace(
        before,
        settings=settings,
        schedule=asdict(rates),
        data=data,
        model=model,
        base=base_fingerprint(config.model.checkpoint),
        trained=sorted(trained),
    )
    return Description(rates, changes, made_with)
