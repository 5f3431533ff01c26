"""How fast checkpoints are converted, in GB/s, beside a plain copy of the same files in the same run.

    python -m benchmarks.convert [--megabytes 400] [--output benchmarks/results/convert.json]

A random checkpoint of about that size is written first, so its files are in the page cache, as the copy's are. Everything written is
flushed to the disk before the clock stops, the copy too; it is the faster of two.
The kernel copies without the bytes passing through the process; `write_from_memory` writes them from it and does nothing else. One process, float32; building the model is counted.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.cli import Parser, run
from megatron_cord.convert import export_tensors, import_tensors
from megatron_cord.convert.checkpoint_files import stored_tensors
from megatron_cord.convert.hf_directory import HFDirectoryWriter, plan_shards
from megatron_cord.convert.inventory import inventory, tensors_for
from megatron_cord.convert.weights_checkpoint import save_weights
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize

HIDDEN = 1024
LAYER_MEGABYTES = 4 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN) / 1e6


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def flush(directory: Path) -> None:
    """Waits until all files in it are on the disk, as export does for each of its own."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def measure(work: Path, megabytes: int) -> dict[str, float]:
    """Writes, copies, imports and exports one checkpoint under `work`."""
    layers = max(1, round(megabytes / LAYER_MEGABYTES))
    sizes = TinyModelConfig(hidden_size=HIDDEN, layers=layers, heads=8, kv_heads=8, ffn_size=4 * HIDDEN)
    create_checkpoint(work / "source", sizes, ["one", "two"], seed=0)
    layout = initialize(ParallelConfig(), seed=0)
    arch, stored = load_architecture(work / "source"), stored_tensors(work / "source")
    shapes = {entry.name: entry.shape for entry in inventory(arch, layout)}
    gigabytes = sum(tensor.nbytes for tensor in stored) / 1e9
    models: list[LALM] = []

    def read() -> None:
        models.append(LALM(arch, layout, torch.float32))
        import_tensors(models[0], tensors_for(models[0], stored))

    def export() -> None:
        writer = HFDirectoryWriter(work / "out", plan_shards(shapes, torch.float32, 100_000_000), torch.float32, None)
        writer.write(export_tensors(models[0]))
        writer.publish({})

    def copy() -> None:
        shutil.rmtree(work / "copy", ignore_errors=True)
        shutil.copytree(work / "source", work / "copy")
        flush(work / "copy")

    def write() -> None:
        with (work / "written").open("wb", buffering=0) as file:
            for parameter in models[0].parameters():
                file.write(parameter.detach().reshape(-1).view(torch.uint8).numpy().data)
            os.fsync(file.fileno())

    def save() -> None:
        save_weights(work / "checkpoint", models[0], lambda partial: None)
        flush(work / "checkpoint")

    flush(work / "source")
    seconds = {
        "copy": timed(copy),
        "read_into_model": timed(read),
        "save_dist_checkpoint": timed(save),
        "export": timed(export),
        "write_from_memory": timed(write),
    }
    seconds["copy_again"] = timed(copy)
    finalize()
    rates = {f"{name}_gb_per_s": gigabytes / value for name, value in seconds.items()}
    rates["import_gb_per_s"] = gigabytes / (seconds["read_into_model"] + seconds["save_dist_checkpoint"])
    best_copy = gigabytes / min(seconds["copy"], seconds["copy_again"])
    shares = {f"{name}_share_of_copy": rates[f"{name}_gb_per_s"] / best_copy for name in ("import", "export", "read_into_model")}
    return {"gigabytes": gigabytes, **rates, **shares}


def main() -> None:
    """Entry point."""
    parser = Parser(description="Measures import and export of checkpoints beside a plain copy.", allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=400, help="size of the checkpoint")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/convert.json"), help="where the figures go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        figures = measure(Path(work), arguments.megabytes)
    figures["load_average"] = os.getloadavg()[0]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=1) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    run(main)
