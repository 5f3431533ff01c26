"""Check and describe sets of shards through the readers that training uses."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_cord.data.ordering.damage import DamagedError
from megatron_cord.data.shards.cache import ShardCache
from megatron_cord.data.shards.manifest import MANIFEST_NAME, Manifest, is_remote
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.streaming import StreamedShards, read_manifest
from megatron_cord.errors import CordError

#: The share of unusable samples that opening allows here, so that all of them are listed.
_ALL = 1.0
_PATIENCE = 60.0  # seconds for which a connection that fails is tried again
_ONE_COPY = 1  # bytes for copies, which each shard exceeds: the one that is read is the only one kept


def check_shards(path: str, *, digests: bool) -> int:
    """Decode every sample; print a line for each that cannot be used, or shard that was changed; return 1 if any is."""
    if is_remote(path):
        # Not the cache of runs: one that trains would have to fetch again what another bound removes there.
        with tempfile.TemporaryDirectory(prefix="megatron_cord_") as directory:
            cache = ShardCache(Path(directory), _ONE_COPY, _PATIENCE)
            return _report(path, StreamedShards(path, window=1, cache=cache), [])
    dataset = ShardDataset(path, max_skipped=_ALL, verify=digests)
    return _report(path, dataset, [item.message for item in dataset.skipped])


def _report(path: str, dataset: ShardDataset | StreamedShards, problems: list[str]) -> int:
    """Decode every sample, print the problems, those already known first, and return 1 if there are any."""
    index = 0
    while index < len(dataset):
        try:
            dataset[index]
            index += 1
        except DamagedError as error:
            problems.append(str(error))
            index = error.last
        except CordError as error:
            problems.append(str(error))
            index += 1
    dataset.close()
    for problem in problems:
        print(problem)
    print(f"{path}: {len(dataset)} samples, {len(problems)} problems")
    return 1 if problems else 0


def describe_shards(path: str, *, titled: bool) -> None:
    """Print counts, lengths and voices, under the path if it is one of several."""
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    if titled:
        print(path)
    if is_remote(path):
        _add_manifest(table, read_manifest(path, _PATIENCE), alone=True)
    else:
        _add_contents(table, path)
    Console(soft_wrap=True).print(table)


def _add_contents(table: Table, path: str) -> None:
    dataset = ShardDataset(path, max_skipped=_ALL)
    seconds, answers, conversations, voices = [], 0, 0, Counter[str]()
    for index in range(len(dataset)):
        sample = dataset[index]
        seconds.append(sum(map(len, sample.recordings)) / sample.sampling_rate)
        answers += sample.answer is not None
        conversations += bool(sample.turns)
        voices.update([sample.voice] if sample.voice else [])
    seconds.sort()
    table.add_row("samples", f"{len(dataset)}")
    table.add_row("damaged", f"{sum(item.samples for item in dataset.skipped)}")
    table.add_row("audio", f"{sum(seconds) / 3600:.2f} h")
    lengths = f"shortest {seconds[0]:.1f}, median {seconds[len(seconds) // 2]:.1f}, longest {seconds[-1]:.1f}"
    table.add_row("seconds", lengths)
    table.add_row("with gold answer", f"{answers}")
    if conversations:
        table.add_row("conversations", f"{conversations}")
    table.add_row("voices", ", ".join(f"{name} {count}" for name, count in sorted(voices.items())) or "–")
    table.add_row("fingerprint", dataset.fingerprint)
    if (Path(path) / MANIFEST_NAME).is_file():
        _add_manifest(table, Manifest.read(Path(path)), alone=False)


def _add_manifest(table: Table, manifest: Manifest, *, alone: bool) -> None:
    """Add what a manifest says; beside the samples themselves, what they do not say."""
    if alone:
        table.add_row("samples", f"{manifest.samples}")
        table.add_row("audio", f"{manifest.seconds / 3600:.2f} h")
        table.add_row("voices", ", ".join(f"{name} {count}" for name, count in manifest.voices.items()) or "–")
    table.add_row("shards", f"{len(manifest.shards)}, {sum(shard.bytes for shard in manifest.shards) / 1e9:.3f} GB")
    table.add_row("made from", json.dumps(dict(manifest.source), ensure_ascii=False))
