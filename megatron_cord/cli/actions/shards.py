"""Check and describe a directory of shards through the reader that training uses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_cord.data.shards.manifest import MANIFEST_NAME, Manifest
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError

#: The share of unusable samples that opening allows here, so that all of them are listed.
_ALL = 1.0


def check_shards(path: Path, *, digests: bool) -> int:
    """Decode every sample; print a line for each that cannot be used, or shard that was changed; return 1 if any is."""
    dataset = ShardDataset(path, max_skipped=_ALL, verify=digests)
    problems = [item.message for item in dataset.skipped]
    for index in range(len(dataset)):
        try:
            dataset[index]
        except CordError as error:
            problems.append(str(error))
    for problem in problems:
        print(problem)
    print(f"{path}: {len(dataset)} samples, {len(problems)} problems")
    return 1 if problems else 0


def describe_shards(path: Path) -> int:
    """Print counts, lengths and voices; return 0."""
    dataset = ShardDataset(path, max_skipped=_ALL)
    seconds, answers, conversations, voices = [], 0, 0, Counter[str]()
    for index in range(len(dataset)):
        sample = dataset[index]
        seconds.append(sum(map(len, sample.recordings)) / sample.sampling_rate)
        answers += sample.answer is not None
        conversations += bool(sample.turns)
        voices.update([sample.voice] if sample.voice else [])
    seconds.sort()
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    table.add_row("samples", f"{len(dataset)}")
    table.add_row("left out", f"{sum(item.samples for item in dataset.skipped)}")
    table.add_row("audio", f"{sum(seconds) / 3600:.2f} h")
    lengths = f"shortest {seconds[0]:.1f}, median {seconds[len(seconds) // 2]:.1f}, longest {seconds[-1]:.1f}"
    table.add_row("seconds", lengths)
    table.add_row("with gold answer", f"{answers}")
    if conversations:
        table.add_row("conversations", f"{conversations}")
    table.add_row("voices", ", ".join(f"{name} {count}" for name, count in sorted(voices.items())) or "–")
    table.add_row("fingerprint", dataset.fingerprint)
    if (path / MANIFEST_NAME).is_file():
        manifest = Manifest.read(path)
        table.add_row("shards", f"{len(manifest.shards)}, {sum(shard.bytes for shard in manifest.shards) / 1e9:.3f} GB")
        table.add_row("made from", json.dumps(dict(manifest.source), ensure_ascii=False))
    Console(soft_wrap=True).print(table)
    return 0
