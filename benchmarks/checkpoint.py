"""How long training waits for an asynchronous checkpoint, with the optimizer's states where they lie and gathered.

    python -m megatron_cord.launch --nproc-per-node 2 -m benchmarks.checkpoint [--layers 8] [--turns 3] \
        [--output benchmarks/results/checkpoint.json]

A random Qwen2-Audio of about ten million parameters a layer, float32, on data-parallel ranks with the distributed
optimizer, one thread each. In each turn a checkpoint is begun with Megatron's own description of the states, which
gathers all of them on all ranks, and one with this project's. `describe` are the seconds of the description, `blocked`
those until training would go on, `written` those until the files are there. Medians of the turns, rank 0's clock.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_cord.model.config import ModelConfig
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.checkpoint.checkpoints import _state_dict
from megatron_cord.trainer.checkpoint.writer import AsyncWrite
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from megatron_cord.trainer.step.optimizer.states import StatesInPlace
from megatron_cord.verify.layout_reference import Sizes, make_checkpoint


def measure(layers: int, turns: int, layout: Layout, directory: Path) -> dict[str, object]:
    """Return parameters and median seconds; directory is the same on all ranks."""
    sizes = replace(Sizes(), layers=layers, hidden=1024, heads=128, kv_heads=64, vocabulary=8000)
    checkpoint = directory / "model"
    if layout.is_main:
        checkpoint.mkdir()
        make_checkpoint(checkpoint, sizes, seed=0)
    dist.barrier()
    config = OptimizerConfig()
    model = wrap_model(config, build_student(ModelConfig(checkpoint=str(checkpoint), dtype="float32"), layout))
    optimizer, _ = build_optimizer(config, model, steps=2)
    for buffer in model.buffers:
        buffer.grad_data.fill_(1e-3)
    optimizer.step()
    taken: dict[str, dict[str, list[float]]] = {}
    for turn in range(turns):
        for name, kind in (("gathered", DistributedOptimizer), ("in place", StatesInPlace)):
            for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
                inner.__class__ = kind
            target = directory / f"{name}-{turn}"
            if layout.is_main:
                target.mkdir()
            dist.barrier()
            begun = time.perf_counter()
            state = _state_dict(model, optimizer, None, is_loading=False)
            described = time.perf_counter()
            writing = AsyncWrite(state, target)
            blocked = time.perf_counter()
            writing.is_done(wait=True)
            written = time.perf_counter()
            del state
            for what, end in (("describe", described), ("blocked", blocked), ("written", written)):
                taken.setdefault(name, {}).setdefault(what, []).append(end - begun)
            dist.barrier()
            if layout.is_main:
                shutil.rmtree(target)
    medians = {
        name: {what: round(statistics.median(values), 3) for what, values in kinds.items()}
        for name, kinds in taken.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"parameters": parameters, "seconds": medians}


def main() -> None:
    """Run the benchmark on all ranks."""
    parser = Parser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layout = initialize(ParallelConfig(), seed=0)
    with tempfile.TemporaryDirectory() as own:
        shared = Path(broadcast_json(own))
        measured = measure(arguments.layers, arguments.turns, layout, shared)
        dist.barrier()
    if layout.is_main:
        machine = f"{os.cpu_count()} cores, {platform.machine()}, no GPU used"
        made = {"machine": machine, "torch": torch.__version__, "ranks": layout.world_size, **measured}
        print(made)
        if arguments.output is not None:
            write_json(arguments.output, made)
    finalize()


if __name__ == "__main__":
    run(main)
