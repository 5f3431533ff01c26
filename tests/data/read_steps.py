"""A program for test_loader: reads steps and writes down each sample as it is handed out, until it is done or killed.

python tests/data/read_steps.py SHARDS FIRST LAST WORKERS RANK WORLD LOG
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

from megatron_cord.data.audio.augmentation import AugmentationConfig, augment
from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.shards.reader import ShardDataset


def main() -> None:
    shards, log = sys.argv[1], Path(sys.argv[7])
    first, last, workers, rank, world = map(int, sys.argv[2:7])
    noise = AugmentationConfig(noise=0.5, speed=0.5)
    loader = SampleLoader(
        ShardDataset(shards), batch_size=4, seed=3, rank=rank, world=world, workers=workers,
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
