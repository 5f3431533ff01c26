"""How fast checkpoints are converted, in GB/s, beside a plain copy of the same files in the same run.

    python -m benchmarks.convert [--megabytes 1200] [--turns 5] [--output benchmarks/results/convert.json]
    python -m benchmarks.convert --full-size [--output benchmarks/results/convert_full_size.json]

A random checkpoint of about that size is written first, so its files are in the page cache for all turns. Then, turn
by turn: the files are copied (shutil.copytree), imported (HF files to a distributed checkpoint) and exported (that
checkpoint to HF files). All three end when what they wrote is on the disk (fsync), and all begin with nothing left to
write and with free memory that was in use a moment ago: on a virtual machine, memory that has lain idle costs several
times the copy itself to get back. `write` does the least that an export could: it writes bytes that are in memory
already. Medians of the turns are compared. One process, float32.

`--full-size` converts files with all shapes of Qwen2-Audio-7B, 17 GB in bfloat16, there and back in one process, and
reports the peak of memory. The files are holes, which read as zeros without a disk, so their speed is not
compared with a copy. Needs 36 GB of disk.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.convert.hf.writer import HFDirectoryWriter, plan_shards
from megatron_cord.convert.inventory import fake_model, inventory
from megatron_cord.convert.loading import find_sources
from megatron_cord.convert.megatron.reader import SavedWeights
from megatron_cord.convert.megatron.writer import save_weights
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.plan.published import published
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.checkpoint.progress import Progress, write_progress

HIDDEN = 1024
LAYER_MEGABYTES = 4 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN) / 1e6


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def flush(directory: Path) -> None:
    """Wait until all files in it are on the disk, as export does for each of its own."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def use_free_memory(path: Path, nbytes: int) -> None:
    """Fill this much of the page cache, and free it again before anything is written to the disk."""
    zeros = bytes(1 << 24)
    with path.open("wb", buffering=0) as file:
        while file.tell() < nbytes:
            file.write(zeros)
    path.unlink()


def measure(work: Path, megabytes: int, turns: int) -> dict[str, float]:
    """Write, copy, import and export one checkpoint under `work`."""
    layers = max(1, round(megabytes / LAYER_MEGABYTES))
    sizes = TinyModelConfig(hidden_size=HIDDEN, layers=layers, heads=8, kv_heads=8, ffn_size=4 * HIDDEN)
    create_checkpoint(work / "source", sizes, ["one", "two"], seed=0)
    layout = initialize(ParallelConfig(), seed=0)
    arch, stored = load_architecture(work / "source"), stored_tensors(work / "source")
    gigabytes = sum(tensor.nbytes for tensor in stored) / 1e9

    def copy() -> None:
        shutil.copytree(work / "source", work / "copy")
        flush(work / "copy")

    def convert() -> None:
        model = fake_model(arch, layout, torch.float32)
        complete = partial(write_progress, progress=Progress(0, 0.0, 0, 0), arch=arch)
        save_weights(work / "import", model, find_sources(model, stored), complete, lambda portion: None)
        flush(work / "import")

    def export() -> None:
        saved = SavedWeights(work / "import", fake_model(arch, layout))
        writer = HFDirectoryWriter(
            work / "export", plan_shards(saved.shapes, torch.float32, 100_000_000), torch.float32
        )
        writer.begin()
        writer.write_files(saved.blocks, writer.shards, lambda portion: None)
        writer.publish({})
        flush(work / "export")

    ready = [tensor.read().reshape(-1).view(torch.uint8).numpy().data for tensor in stored]

    def write() -> None:
        with (work / "write").open("wb", buffering=0) as file:
            for raw in ready:
                file.write(raw)
            os.fsync(file.fileno())

    actions: dict[str, Callable[[], None]] = {"copy": copy, "write": write, "import": convert, "export": export}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(turns):
        for name, action in actions.items():
            os.sync()
            use_free_memory(work / "used", round(1.2e9 * gigabytes))
            seconds[name].append(timed(action))
        for name in actions:
            shutil.rmtree(work / name) if (work / name).is_dir() else (work / name).unlink()
    finalize()
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {f"{name}_gb_per_s": gigabytes / value for name, value in middle.items()}
    spread = {f"{name}_slowest_gb_per_s": gigabytes / max(values) for name, values in seconds.items()}
    shares = {f"{name}_share_of_copy": middle["copy"] / middle[name] for name in ("write", "import", "export")}
    return {"gigabytes": gigabytes, "turns": turns, **rates, **spread, **shares}


def measure_full_size(work: Path) -> dict[str, float]:
    """Import and export Qwen2-Audio-7B's shapes."""
    layout = initialize(ParallelConfig(), seed=0)
    arch = published("qwen2_audio_7b")
    model = fake_model(arch, layout, torch.bfloat16)
    shapes = {entry.name: entry.shape for entry in inventory(model)}
    shards = plan_shards(shapes, torch.bfloat16, 4_000_000_000)
    (work / "source").mkdir()
    for shard in shards:
        header = shard.header(torch.bfloat16)
        with (work / "source" / shard.file).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + shard.nbytes(torch.bfloat16))
    stored = stored_tensors(work / "source")
    gigabytes = sum(tensor.nbytes for tensor in stored) / 1e9
    before = _memory("VmRSS")

    def convert() -> None:
        complete = partial(write_progress, progress=Progress(0, 0.0, 0, 0), arch=arch)
        save_weights(work / "import", model, find_sources(model, stored), complete, lambda portion: None)

    def export() -> None:
        saved, writer = SavedWeights(work / "import", model), HFDirectoryWriter(work / "export", shards, torch.bfloat16)
        writer.begin()
        writer.write_files(saved.blocks, shards, lambda portion: None)
        writer.publish({})

    figures = {"gigabytes": gigabytes, "tensors": len(shapes), "parameters": gigabytes * 1e9 / 2}
    figures["largest_tensor_gb"] = max(tensor.nbytes for tensor in stored) / 1e9
    for name, action in (("import", convert), ("export", export)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        figures[f"{name}_gb_per_s"] = gigabytes / timed(action)
        figures[f"{name}_peak_gb"] = (_memory("VmHWM") - before) / 1e9
    finalize()
    return figures


def _memory(key: str) -> float:
    """Bytes that this process holds (VmRSS) or held at most (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024.0 * int(line.split()[1])


def main() -> None:
    """Entry point."""
    parser = Parser(description="Measures import and export of checkpoints beside a plain copy.", allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=1200, help="size of the checkpoint")
    parser.add_argument("--turns", type=int, default=5, help="how often each is measured")
    parser.add_argument("--full-size", action="store_true", help="convert the shapes of a 7B model instead")
    parser.add_argument("--output", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    name = "convert_full_size.json" if arguments.full_size else "convert.json"
    output: Path = arguments.output or Path("benchmarks/results") / name
    with tempfile.TemporaryDirectory() as work:
        figures = (
            measure_full_size(Path(work))
            if arguments.full_size
            else measure(Path(work), arguments.megabytes, arguments.turns)
        )
    figures["load_average"] = os.getloadavg()[0]
    write_json(output, {name: round(value, 3) for name, value in figures.items()})
    print(output.read_text())


if __name__ == "__main__":
    run(main)
