"""How fast weights reach a rollout server, each way, beside a plain transfer of the same bytes and beside sending tensor by tensor.

    python -m benchmarks.exchange [--rounds 7] [--output benchmarks/results/exchange.json]

A real SGLang server (.venv-sglang) runs on this machine's CPU with a random Qwen2-Audio, of two kinds one after the other: `large` has the 7B
model's tensors in 5 of its 32 layers, and a smaller vocabulary (17 MB a tensor, as the 7B model's); `many` has the 7B model's number of tensors,
narrow. One exchange is all that training does for one: all of its questions and answers, every tensor, the server's own loading included. A
plain transfer (benchmarks/exchange_plain.py) ends when the bytes are in the other process. Tensor by tensor is the same exchange with a bucket
and a request for each tensor. The three take turns; medians of the rounds are compared; the first exchange of a way, which also makes its group
and its buffers, is given apart. bfloat16, one trainer process with one thread.
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

from benchmarks.exchange_plain import plain_seconds
from benchmarks.figures import processor, publish
from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.convert import read_into
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.rollout.sglang.server.process import ENVIRONMENT, ServerConfig, SglangServer, check_version
from megatron_cord.rollout.sglang.weight_sync import Endpoint, ExchangeConfig, ExchangeReport
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan, plan_buckets
from megatron_cord.rollout.sglang.weight_sync.process_group import ProcessGroupWay
from megatron_cord.rollout.sglang.weight_sync.served import served_specs
from megatron_cord.rollout.sglang.weight_sync.shared_memory import SharedMemoryWay
from megatron_cord.rollout.sglang.weight_sync.transport import Way
from megatron_cord.rollout.sglang.weight_sync.weight_sync import WeightExchange, build_exchange
from megatron_cord.rollout.types import TensorSpec
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.runtime.entry import Parser, run

ROOT = Path(__file__).parents[1]
WAYS = ("process_group", "shared_memory", "disk")


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


class TensorByTensor(WeightExchange):
    """The same exchange with a bucket, and a request, for each tensor."""

    def _cut(self, specs: list[TensorSpec], bucket_bytes: int) -> list[BucketPlan]:
        return plan_buckets(specs, 1)


def write_model(directory: Path, sizes: Sizes) -> None:
    """A random checkpoint."""
    config = TinyModelConfig(
        encoder_hidden_size=sizes.encoder_hidden_size, encoder_layers=sizes.layers, encoder_heads=sizes.encoder_heads,
        encoder_ffn_size=4 * sizes.encoder_hidden_size, hidden_size=sizes.hidden_size, layers=sizes.layers, heads=sizes.heads, kv_heads=sizes.heads, ffn_size=sizes.ffn_size,
    )  # fmt: skip
    create_checkpoint(directory, config, [f"w{i}" for i in range(sizes.vocabulary)], seed=0)


def measure(
    way: str, source: ShardedModelWeights, checkpoint: Path, server: Endpoint, rounds: int, bucket_bytes: int
) -> dict[str, Any]:
    """One way: the exchange, the plain transfer and tensor by tensor in turns."""
    config = ExchangeConfig(way=way, bucket_bytes=bucket_bytes)  # type: ignore[arg-type]
    exchange, patience = build_exchange(config, checkpoint, DTYPE), config.timeout_seconds
    again: Way = ProcessGroupWay(None, patience, stream=False) if way == "process_group" else SharedMemoryWay(patience)
    alone = TensorByTensor(config, again, served_specs(checkpoint, DTYPE))
    ours, single, plain = [], [], []
    try:
        first = done(exchange.update(source, 0, [server], full=True))
        if way != "disk":
            done(alone.update(source, 0, [server], full=True))
        for number in range(1, rounds + 1):
            ours.append(done(exchange.update(source, number, [server], full=True)).seconds)
            plain += plain_seconds(way, first.nbytes, 1)
            if way != "disk":
                single.append(done(alone.update(source, number, [server], full=True)).seconds)
    finally:
        exchange.close()
        alone.close()
    seconds = statistics.median(ours)
    result = {
        "seconds": seconds, "gigabytes_per_second": first.nbytes / seconds / 1e9, "plain_seconds": statistics.median(plain),
        "share_of_plain": statistics.median(plain) / seconds, "seconds_of_rounds": ours, "plain_seconds_of_rounds": plain,
        "first_seconds": first.seconds, "megabytes": first.nbytes / 1e6, "tensors": first.tensors, "buckets": first.buckets,
    }  # fmt: skip
    if single:
        result |= {
            "tensor_by_tensor_seconds": statistics.median(single),
            "times_faster": statistics.median(single) / seconds,
        }
    return {name: rounded(value) for name, value in result.items()}


def measure_model(sizes: Sizes, layout: Layout, python: Path, rounds: int, bucket_bytes: int) -> dict[str, Any]:
    """All ways with one model and its own server."""
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
            ways = {
                way: measure(way, ShardedModelWeights(model), checkpoint, server.endpoint, rounds, bucket_bytes)
                for way in WAYS
            }
            return {**ways, "load_average": round(os.getloadavg()[0], 1)}
        finally:
            server.stop()


def done(report: ExchangeReport) -> ExchangeReport:
    """The report of an exchange that worked."""
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
    parser = Parser(description="Measures the exchange of weights with a real server on this CPU.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7, help="of each way (default: 7)")
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
