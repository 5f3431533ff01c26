"""A program for tests: reads steps and writes down each sample as it is handed out, until it is done or killed.

python tests/data/read_steps.py SETS FIRST LAST WORKERS RANK WORLD LOG

SETS is the value of `data.train`, a path or a map in YAML; sets named stream… are read as a stream.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import yaml

from megatron_cord.data.audio.augmentation import AugmentationConfig, augment
from megatron_cord.data.config import DataConfig, TrainingSetConfig
from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.ordering.damage import DamageLog
from megatron_cord.data.ordering.row import Phase
from megatron_cord.data.samples import PromptLimits
from megatron_cord.data.sets import make_row, open_training


def config_of(sets: Any, cache: Path) -> DataConfig:
    if isinstance(sets, dict):
        sets = {name: TrainingSetConfig(stream=name.startswith("stream"), **given) for name, given in sets.items()}
    return DataConfig(sets, shuffle_shards=2, cache_dir=str(cache))


def main() -> None:
    log = Path(sys.argv[7])
    config = config_of(yaml.safe_load(sys.argv[1]), log.parent / "cache")
    first, last, workers, rank, world = map(int, sys.argv[2:7])
    noise = AugmentationConfig(noise=0.5, speed=0.5)
    sets = open_training(config, PromptLimits())
    phase = Phase({name: each.weight for name, each in config.training_sets.items()})
    damage = DamageLog({name: len(each) for name, each in sets.items()}, dict.fromkeys(sets, 0), 0.0)
    loader = SampleLoader(
        make_row(config, sets, 3, phase, damage), batch_size=4, rank=rank, world=world, workers=workers,
        change=lambda sample, step: augment(sample, noise, seed=3, step=step),
    )  # fmt: skip
    with log.open("a") as file:
        for step in range(first, last):
            for prepared in loader.batch(step).samples:
                sample = prepared.sample
                file.write(f"{step} {sample.id} {zlib.crc32(sample.waveform.tobytes())}\n")
            file.flush()
    loader.close()


if __name__ == "__main__":
    main()
