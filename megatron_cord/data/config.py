"""The configuration of what training reads: where it is, in which order, and what is made of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from os.path import normpath
from typing import Literal

from megatron_cord.data.audio.augmentation import AugmentationConfig
from megatron_cord.errors import CordError

_MOST_SETS = 255
# Also in a later part of a chain ("zip://…::https://…"). Beyond HTTP a name alone is no secret, as in "abfs://BOX@…".
_CREDENTIALS = re.compile(r"(?:^|::)(?:https?://[^/]*@|[a-z][a-z0-9+.-]*://[^/@]*:[^/@]*@)", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingSetConfig:
    """One of several sets to train on, under a name: data.train: {NAME: {path: …, weight: …}}."""

    path: str  #: as data.train, where that is one set
    #: this over the sum of all weights is its share of the samples, whatever its size; it is gone through as often as
    #: that takes
    weight: float = 1.0
    stream: bool | None = None  #: as data.stream; null takes that
    system: str | None = None  #: as data.system; null takes that
    instruction: str | None = None  #: as data.instruction; null takes that
    #: which views stand for others in this set, {NAME: OTHER}: where the objective names NAME, its samples take OTHER
    views: dict[str, str] = field(default_factory=dict)
    #: which of the teachers scores the responses to this set's samples, by its name under teachers; null: the run's own
    taught_by: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise CordError("path is empty; give a directory of shards, or leave the set out")
        _refuse_credentials("path", self.path)
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise CordError(f"weight is {self.weight:g}; give a number above 0, or leave the set out")


@dataclass(frozen=True)
class DataConfig:
    """Where the spoken questions are, and what is made of them."""

    #: shards to train on: a directory with a manifest, its address (https://…, hf://datasets/…, s3://…), a tar file, or
    #: a pattern; or several sets, {NAME: {path: …, weight: …}}. Training needs it
    train: str | dict[str, TrainingSetConfig] = ""
    evaluation: str = ""  #: shards to evaluate on: a directory with a manifest, a tar file, or a pattern
    system: str | None = None  #: the system prompt of samples without one
    #: text after the recording, in the user's turn, of samples with neither an instruction nor turns
    instruction: str | None = None
    shuffle: bool = True  #: a new order each epoch, drawn from the run's seed; otherwise the order of the shards
    #: read the shards of data.train when their samples are needed, and keep no index of all samples: for sets larger
    #: than memory, with a manifest. An address is always read so
    stream: bool = False
    #: what is read as a stream is shuffled by shards, and so many shards' samples among each other
    shuffle_shards: int = 8
    #: where copies of shards behind addresses are kept, best on a disk of the node; null is the user's cache directory
    cache_dir: str | None = None
    cache_bytes: int = 50_000_000_000  #: which copies may take together; those not used for longest are removed
    #: for so many seconds a shard that does not come is asked for again; then it counts as damaged
    fetch_seconds: float = 120.0

    #: Audio longer than the encoder's window: stop before the first step, cut it into several clips, or skip the
    #: sample, within max_skipped.
    long_audio: Literal["error", "cut", "skip"] = "error"
    #: the largest share of a set's samples that may be left out because they are damaged; 0 stops at the first
    max_skipped: float = 0.0
    verify: bool = False  #: compare the shards' checksums with their manifest at the start, which reads all of them
    #: threads of each rank that read and featurise its share of the next step's samples; 0 does it when they are needed
    workers: int = 1
    #: what computes them: torch, or NVIDIA DALI on the CPU or on each rank's GPU
    features: Literal["torch", "dali", "dali_gpu"] = "torch"
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)  #: of the audio that is trained on

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_skipped < 1.0:
            raise CordError(f"data.max_skipped is a share from 0 to below 1, not {self.max_skipped}")
        if self.long_audio == "skip" and not self.max_skipped:
            raise CordError(
                "data.long_audio=skip leaves samples out; say how many it may be with data.max_skipped, such as 0.01"
            )
        if self.shuffle_shards < 1:
            raise CordError(f"data.shuffle_shards must be at least 1, got {self.shuffle_shards}")
        if self.cache_bytes < 1 or self.fetch_seconds < 0:
            raise CordError("data.cache_bytes must be at least 1, and data.fetch_seconds cannot be negative")
        _refuse_credentials("data.evaluation", self.evaluation)
        if isinstance(self.train, str):
            _refuse_credentials("data.train", self.train)
        else:
            _check_sets(self.train)
        if self.workers < 0:
            raise CordError(f"data.workers cannot be negative, got {self.workers}")

    @property
    def training_sets(self) -> dict[str, TrainingSetConfig]:
        """The sets by name; a single one is called "".

        Raises:
            CordError: there is none.
        """
        if not self.train:
            raise CordError(
                "data.train is required: set it in the configuration or as data.train=…, to a directory of shards"
            )
        return {"": TrainingSetConfig(self.train)} if isinstance(self.train, str) else self.train


def _refuse_credentials(key: str, address: str) -> None:
    """Refuse an address that cannot be shown. Raises CordError, which does not show it either."""
    if _CREDENTIALS.search(address):
        raise CordError(
            f"{key} holds a name or a password, which would reach logs and every copy of the configuration; take it "
            "out of the address, and give it to fsspec in the environment (FSSPEC_HTTPS for https)"
        )


def _check_sets(sets: dict[str, TrainingSetConfig]) -> None:
    if not 1 <= len(sets) <= _MOST_SETS:
        raise CordError(f"data.train has {len(sets)} sets; name 1 to {_MOST_SETS}")
    for name in sets:
        if not re.fullmatch(r"[A-Za-z0-9_+-]{1,60}", name):
            raise CordError(
                f"data.train: the name {name!r} goes before samples' ids; use letters, digits, '_', '+' and '-'"
            )
    paths = {name: normpath(each.path) for name, each in sets.items()}
    path, times = Counter(paths.values()).most_common(1)[0]
    if times > 1:
        twice = " and ".join(name for name, other in paths.items() if other == path)
        raise CordError(f"data.train: {twice} are the same set, {path}; give it once, with the sum of the weights")
