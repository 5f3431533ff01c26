"""How fast weights reach a server by each transport, beside a plain transfer and beside sending tensor by tensor.

    python -m benchmarks.weight_sync [--rounds 7] [--output benchmarks/results/weight_sync.json]

A real SGLang server (.venv-sglang) runs on this machine's CPU with a random Qwen2-Audio, of two kinds one after the
other: `large` has the 7B model's tensors in 5 of its 32 layers, and a smaller vocabulary (17 MB a tensor, as the 7B
model's); `many` has the 7B model's number of tensors, narrow. One weight sync is all that training does for one: all of
its questions and answers, every tensor, the server's own loading included. A plain transfer
(benchmarks/weight_sync_plain.py) ends when the bytes are in the other process. Tensor by tensor is the same weight sync
with a bucket and a request for each tensor. The three take turns; medians of the rounds are compared; the first weight
sync of a transport, which also makes its group and its buffers, is given apart. bfloat16, one trainer process with one
thread.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import os
import statistics
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import processor, publish
from benchmarks.weight_sync_plain import plain_seconds
from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.convert import read_into
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.server.process import ENVIRONMENT, ServerConfig, SglangServer, check_version
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig, WeightSyncReport
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan, plan_buckets
from megatron_cord.rollout.sglang.weight_sync.process_group import ProcessGroupTransport
from megatron_cord.rollout.sglang.weight_sync.served import served_specs
from megatron_cord.rollout.sglang.weight_sync.shared_memory import SharedMemoryTransport
from megatron_cord.rollout.sglang.weight_sync.transport import WeightTransport
from megatron_cord.rollout.sglang.weight_sync.weight_sync import WeightSync, build_weight_sync
from megatron_cord.rollout.types import TensorSpec
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.runtime.entry import Parser, run

ROOT = Path(__file__).parents[1]
TRANSPORTS = ("process_group", "shared_memory", "disk")


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    layers: int  #: of each tower
    hidden_size: int  #: of the language model
    ffn_size: int
    heads: int
    encoder_hidden_size: int  #: a fourth of its feed-forward layer
    encoder_heads: int
    vocabulary: int


MODELS = {"large": Sizes(5, 4096, 11008, 32, 1280, 20, 20_000), "many": Sizes(32, 256, 688, 8, 256, 8, 39_000)}
DTYPE = torch.bfloat16


class TensorByTensor(WeightSync):
    """The same weight sync with a bucket, and a request, for each tensor."""

    def _plan_buckets(self, specs: list[TensorSpec], bucket_bytes: int) -> list[BucketPlan]:
        return plan_buckets(specs, 1)


def write_model(directory: Path, sizes: Sizes) -> None:
    """Write a random checkpoint."""
    config = TinyModelConfig(
        encoder_hidden_size=sizes.encoder_hidden_size,
        encoder_layers=sizes.layers,
        encoder_heads=sizes.encoder_heads,
        encoder_ffn_size=4 * sizes.encoder_hidden_size,
        hidden_size=sizes.hidden_size,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        ffn_size=sizes.ffn_size,
    )
    create_checkpoint(directory, config, [f"w{i}" for i in range(sizes.vocabulary)], seed=0)


def measure(
    transport: str, source: ShardedModelWeights, checkpoint: Path, server: Endpoint, rounds: int, bucket_bytes: int
) -> dict[str, Any]:
    """One transport: the weight sync, the plain transfer and tensor by tensor in turns."""
    config = WeightSyncConfig(transport=transport, bucket_bytes=bucket_bytes)  # type: ignore[arg-type]
    weight_sync, timeout = build_weight_sync(config, checkpoint, DTYPE), config.timeout_seconds
    again: WeightTransport = SharedMemoryTransport(timeout)
    if transport == "process_group":
        again = ProcessGroupTransport(None, timeout, stream=False)
    alone = TensorByTensor(config, again, served_specs(checkpoint, DTYPE))
    ours, single, plain = [], [], []
    try:
        first = done(weight_sync.update(source, 0, [server], full=True))
        if transport != "disk":
            done(alone.update(source, 0, [server], full=True))
        for number in range(1, rounds + 1):
            ours.append(done(weight_sync.update(source, number, [server], full=True)).seconds)
            plain += plain_seconds(transport, first.nbytes, 1)
            if transport != "disk":
                single.append(done(alone.update(source, number, [server], full=True)).seconds)
    finally:
        weight_sync.close()
        alone.close()
    seconds = statistics.median(ours)
    result = {
        "seconds": seconds,
        "gigabytes_per_second": first.nbytes / seconds / 1e9,
        "plain_seconds": statistics.median(plain),
        "share_of_plain": statistics.median(plain) / seconds,
        "seconds_of_rounds": ours,
        "plain_seconds_of_rounds": plain,
        "first_seconds": first.seconds,
        "megabytes": first.nbytes / 1e6,
        "tensors": first.tensors,
        "buckets": first.buckets,
    }
    if single:
        result |= {
            "tensor_by_tensor_seconds": statistics.median(single),
            "times_faster": statistics.median(single) / seconds,
        }
    return {name: rounded(value) for name, value in result.items()}


def measure_model(sizes: Sizes, layout: Layout, python: Path, rounds: int, bucket_bytes: int) -> dict[str, Any]:
    """All transports with one model and its own server."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "checkpoint"
        write_model(checkpoint, sizes)
        config = ServerConfig(
            checkpoint=checkpoint,
            device="cpu",
            dtype="bfloat16",
            python=python,
            max_total_tokens=1024,
            memory_fraction=0.6,
        )
        server = SglangServer(config, "", Path(name) / "server.log")
        server.start()
        try:
            model = LALM(load_architecture(checkpoint), layout, DTYPE)
            read_into(model, checkpoint)
            server.wait()
            transports = {
                transport: measure(
                    transport, ShardedModelWeights(model), checkpoint, server.endpoint, rounds, bucket_bytes
                )
                for transport in TRANSPORTS
            }
            return {**transports, "load_average": round(os.getloadavg()[0], 1)}
        finally:
            server.stop()


def done(report: WeightSyncReport) -> WeightSyncReport:
    """Return the report of a weight sync that worked."""
    if report.failed:
        raise CordError(f"the server did not take the weights: {'; '.join(report.failed.values())}")
    return report


def rounded(value: Any) -> Any:
    """Figures to three digits behind the point."""
    return (
        [round(v, 3) for v in value]
        if isinstance(value, list)
        else round(value, 3)
        if isinstance(value, float)
        else value
    )


def main() -> None:
    """Entry point."""
    parser = Parser(description="Measures the weight sync with a real server on this CPU.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7, help="of each transport (default: 7)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which (default: all)")
    parser.add_argument(
        "--bucket-megabytes", type=int, default=128, help="of a bucket, where each has a request (default: 128)"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    python = ROOT / ENVIRONMENT / "bin" / "python"
    sglang = check_version(python)
    torch.set_num_threads(1)
    layout = initialize(ParallelConfig(), seed=0)
    models = {kind: MODELS[kind] for kind in arguments.models}
    figures = {
        kind: measure_model(sizes, layout, python, arguments.rounds, arguments.bucket_megabytes << 20)
        for kind, sizes in models.items()
    }
    finalize()
    result = {
        "models": figures,
        "sizes": {kind: asdict(sizes) for kind, sizes in models.items()},
        "bucket_megabytes": arguments.bucket_megabytes,
        "dtype": str(DTYPE).removeprefix("torch."),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("torch", "megatron-core")} | {"sglang": str(sglang)},
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    run(main)
