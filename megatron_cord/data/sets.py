"""Opens the sets of shards that a configuration names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import nlargest
from pathlib import Path

from megatron_cord.data.config import DataConfig, TrainingSetConfig
from megatron_cord.data.ordering.damage import DamageLog
from megatron_cord.data.ordering.order import EpochOrder, Order, WindowOrder
from megatron_cord.data.ordering.row import Phase, Row
from megatron_cord.data.samples import PromptDefaults, PromptLimits
from megatron_cord.data.shards.cache import ShardCache
from megatron_cord.data.shards.manifest import is_remote
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.streaming import StreamedShards, StreamLimits
from megatron_cord.errors import CordError

TrainingSets = Mapping[str, ShardDataset | StreamedShards]


def open_evaluation(config: DataConfig, limits: PromptLimits) -> ShardDataset:
    """Open the set of `data.evaluation`.

    Args:
        config: where it is, and what may be in it.
        limits: what the model's prompts can be made of.

    Raises:
        CordError: it is not named, a recording is too long and may neither be cut nor skipped, or what `ShardDataset`
            raises.
    """
    if not config.evaluation:
        raise CordError(
            "data.evaluation is required: set it in the configuration or as data.evaluation=…, to a directory of shards"
        )
    if is_remote(config.evaluation):
        raise CordError(f"data.evaluation={config.evaluation} is an address; make a local copy, and give its directory")
    return _indexed(config, config.evaluation, limits, _defaults(config))


def open_training(config: DataConfig, limits: PromptLimits) -> TrainingSets:
    """Open the sets of `data.train`, by name; a single one is called "".

    Raises:
        CordError: as `open_evaluation`; or the copies of shards that are read together are more than the cache holds.
    """
    sets = config.training_sets
    directory = Path(config.cache_dir) if config.cache_dir else default_cache()
    cache = ShardCache(directory, config.cache_bytes, config.fetch_seconds)
    opened = {name: _open(config, each, limits, cache) for name, each in sets.items()}
    streams = [each for each in opened.values() if isinstance(each, StreamedShards) and is_remote(each.path)]
    together = 2 * config.shuffle_shards
    needed = sum(sum(nlargest(together, (shard.bytes for shard in each.manifest.shards))) for each in streams)
    if needed > config.cache_bytes:
        raise CordError(
            f"data.cache_bytes={config.cache_bytes} is too small for {needed} bytes, up to two times "
            f"data.shuffle_shards={config.shuffle_shards} shards of each set behind an address; raise it, or lower "
            "data.shuffle_shards"
        )
    return opened


def make_row(config: DataConfig, sets: TrainingSets, seed: int, phase: Phase, damage: DamageLog) -> Row:
    """Return the row of samples of opened sets."""
    return Row(sets, {name: _order(config, name, each, seed) for name, each in sets.items()}, phase, damage)


def default_cache() -> Path:
    """Return the directory of copies in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_cord" / "shards"


def _open(
    config: DataConfig, each: TrainingSetConfig, limits: PromptLimits, cache: ShardCache
) -> ShardDataset | StreamedShards:
    stream = config.stream if each.stream is None else each.stream
    if not (stream or is_remote(each.path)):
        return _indexed(config, each.path, limits, _defaults(config, each))
    allowed = StreamLimits(
        prompts=limits if config.long_audio == "skip" else replace(limits, longest=None),
        longest=limits.longest if config.long_audio == "error" else None,
        defaults=_defaults(config, each),
        verify=config.verify,
        salvage=bool(config.max_skipped),
    )
    return StreamedShards(each.path, window=config.shuffle_shards, limits=allowed, cache=cache)


def _defaults(config: DataConfig, each: TrainingSetConfig | None = None) -> PromptDefaults:
    """Return what a set gives its prompts: its own, else what all sets give theirs."""
    system, instruction = (each.system, each.instruction) if each is not None else (None, None)
    return PromptDefaults(
        config.system if system is None else system,
        config.instruction if instruction is None else instruction,
        {} if each is None else each.views,
    )


def _indexed(config: DataConfig, path: str, limits: PromptLimits, defaults: PromptDefaults) -> ShardDataset:
    shards = ShardDataset(
        path,
        max_skipped=config.max_skipped,
        limits=limits if config.long_audio == "skip" else replace(limits, longest=None),
        defaults=defaults,
        verify=config.verify,
    )
    if config.long_audio == "error" and limits.longest is not None:
        shards.refuse_longer(limits.longest)
    return shards


def _order(config: DataConfig, name: str, samples: ShardDataset | StreamedShards, seed: int) -> Order:
    seeds: Sequence[int] = (seed,) if not name else (seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]))
    if isinstance(samples, StreamedShards):
        return WindowOrder(samples.counts, config.shuffle_shards, seeds, shuffle=config.shuffle)
    return EpochOrder(len(samples), seeds, shuffle=config.shuffle)
