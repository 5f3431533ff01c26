"""What a rank on a pretended GPU runs; imported by the process that forks the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import megatron_cord.train  # noqa: F401  what `make_run` imports, before the ranks are forked
from megatron_cord.config.loading import load_config
from megatron_cord.evaluate import evaluate
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig, build_weight_sync
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.trainer.config import RunConfig
from tests.rollout.sglang.fake_sglang import FakeServer
from tests.tiny_run import make_run

torch.set_num_threads(1)


def run_training(settings: Sequence[str]) -> None:
    """Train with these settings."""
    status = make_run(settings)
    assert status == 0, f"the run ended with status {status}"


def run_evaluation(settings: Sequence[str]) -> None:
    """Evaluate with these settings."""
    assert evaluate(load_config(RunConfig, None, list(settings))) is not None
    finalize()


def run_weight_sync(arguments: Sequence[str]) -> None:
    """Send all weights of a checkpoint, in many buckets, to a server by files, which a thread of its own writes."""
    checkpoint, directory, tp = arguments
    layout = initialize(ParallelConfig(tp=int(tp)), seed=0)
    model = LALM(load_architecture(checkpoint), layout, torch.bfloat16)
    config = WeightSyncConfig(transport="disk", directory=Path(directory), bucket_bytes=1 << 20, timeout_seconds=30)
    with FakeServer() as server:
        sync = build_weight_sync(config, checkpoint)
        report = sync.update(ShardedModelWeights(model), 1, [Endpoint(server.url)], full=True)
        sync.close()
    assert report.current and report.buckets > 2, report
    finalize()
