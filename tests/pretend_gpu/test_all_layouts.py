"""Every layout, implementation, divergence and option of the step on pretended GPUs; `make test-pretend` runs them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretend_gpu.budgets import BUDGETS, CONTEXT_PARALLEL, PIPELINE, TENSOR_PARALLEL, Budget, with_experts
from tests.pretend_gpu.jobs import Jobs
from tests.pretend_gpu.runs import settings
from tests.tiny_run import write_checkpoint, write_inputs

pytestmark = pytest.mark.slow

RECOMPUTED = "model.recompute=[audio_encoder,language_model]"
LORA = ("model.lora.rank=4", "model.lora.dropout=0.3", "rollout.max_logprob_mismatch=null")
LAYOUTS = {
    "dp2": (2, BUDGETS),
    "tp2": (2, TENSOR_PARALLEL),
    "tp2 sequence_parallel": (2, TENSOR_PARALLEL),
    "pp2": (2, PIPELINE),
    "cp2": (2, CONTEXT_PARALLEL),
    "tp2 pp2": (4, PIPELINE),
    "tp2 cp2": (4, CONTEXT_PARALLEL),
    "tp2 cp2 sequence_parallel": (4, CONTEXT_PARALLEL),
    "pp2 dp2": (4, PIPELINE),
}
OPTIONS = {
    "frozen encoder": ("model.freeze=[audio_encoder]",),
    "frozen language model": ("model.freeze=[audio_encoder,language_model]",),
    "recomputation": (RECOMPUTED,),
    "live teacher": ("teacher.mode=live",),
    "moving teacher": ("teacher.mode=ema", "teacher.offload=true", "model.dtype=bfloat16"),
    "hidden states in host memory": ("teacher.offload=true",),
    "off-policy": ("objective.responses=teacher", "objective.policy_gradient.enabled=false"),
    "moments in host memory": ("optimizer.offload=true",),
    "muon": ("optimizer.kind=muon",),
    "plain optimizer": ("optimizer.distributed=false",),
    "overlap": ("optimizer.overlap_communication=true",),
    "shared rollouts": ("rollout.share=true",),
    "dynamic sampling": ("rollout.dynamic_sampling=1",),
    "ahead, restart": ("rollout.schedule.ahead=1", "rollout.schedule.on_weight_sync=restart"),
    "ahead, continue": ("rollout.schedule.ahead=1", "rollout.schedule.on_weight_sync=continue"),
    "ahead, reference answers in time": ("rollout.schedule.ahead=1", "model.freeze=[language_model]"),
    "top_p": ("rollout.top_p=0.9", "rollout.top_k=5"),
    "several updates": (
        "train.minibatches=2",
        "objective.policy_gradient.surrogate=clipped",
        "objective.policy_gradient.ratio=sequence",
        "objective.policy_gradient.normalization=response_mean",
    ),
    "cispo": ("train.passes=2", "objective.policy_gradient.surrogate=cispo"),
}


REPLAYED = ("rollout.router_replay=true", "objective.router_aux_loss=0.01")
#: Of a mixture of experts: ranks, budget, settings.
MIXTURES: dict[str, tuple[int, dict[str, Budget], tuple[str, ...]]] = {
    "one rank, replayed": (1, with_experts(BUDGETS), REPLAYED),
    "ep2, packed, replayed": (2, with_experts(BUDGETS), ("parallel.ep=2", "train.packing=packed", *REPLAYED)),
    "ep2, recomputed, lora": (2, with_experts(BUDGETS, 3), ("parallel.ep=2", RECOMPUTED, *LORA)),
    "tp2 sp ep2, lora": (
        2,
        with_experts(TENSOR_PARALLEL),
        ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", *LORA),
    ),
    "cp2 ep2, packed": (
        2,
        with_experts(CONTEXT_PARALLEL),
        ("parallel.cp=2", "parallel.ep=2", "train.packing=packed"),
    ),
    "pp2": (2, with_experts(PIPELINE), ("parallel.pp=2",)),
}


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as jobs:
        yield jobs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixture"), experts=4)


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(jobs: Jobs, inputs: Path, tmp_path: Path, name: str, packing: str) -> None:
    """Catches faults and waits of one layout alone, and of its checkpoint on one rank."""
    ranks, budget = LAYOUTS[name]
    parallel = [
        f"parallel.{part}=true" if part == "sequence_parallel" else f"parallel.{part[:2]}={part[2:]}"
        for part in name.split()
        if not part.startswith("dp")
    ]
    run = settings(inputs, tmp_path / "run", f"train.packing={packing}", "train.steps=1")
    for outcome in jobs.run("train", [*run, *parallel], ranks=ranks):
        outcome.check_waits(budget)
    if packing == "packed":
        jobs.run("train", [*run, "train.steps=2"])


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        *itertools.product(
            ["reverse_kl", "forward_kl", "jsd", "topk", "sampled", "one_sided", "nll", "none"],
            ["cached_grad", "fused", "recompute"],
        )
    ],
)
def test_losses(jobs: Jobs, inputs: Path, tmp_path: Path, kind: str, implementation: str) -> None:
    """Catches faults and waits of one divergence in one implementation, the vocabulary whole and split."""
    loss = (f"objective.divergence.kind={kind}", f"objective.implementation={implementation}", "train.steps=1")
    (outcome,) = jobs.run("train", settings(inputs, tmp_path / "one", *loss, "train.micro_batch_size=1"))
    outcome.check_waits()
    if implementation == "recompute":
        for outcome in jobs.run("train", settings(inputs, tmp_path / "two", *loss, "parallel.tp=2"), ranks=2):
            outcome.check_waits(TENSOR_PARALLEL)


@pytest.mark.parametrize("factors", ["top_fraction", "entropy", "tip", "remaining*position", "uniform"])
def test_token_weights(jobs: Jobs, inputs: Path, tmp_path: Path, factors: str) -> None:
    """Catches faults and waits of token weights, whole responses and split ones."""
    weights = (f"objective.token_weights.factors={factors}", "train.steps=1")
    (outcome,) = jobs.run("train", settings(inputs, tmp_path / "one", *weights, "train.micro_batch_size=1"))
    outcome.check_waits()
    for outcome in jobs.run("train", settings(inputs, tmp_path / "two", *weights, "parallel.cp=2"), ranks=2):
        outcome.check_waits(CONTEXT_PARALLEL)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(jobs: Jobs, inputs: Path, tmp_path: Path, name: str) -> None:
    """Catches faults of one option alone."""
    jobs.run("train", settings(inputs, tmp_path / "run", *OPTIONS[name]))


def test_streams(jobs: Jobs, inputs: Path, tmp_path: Path) -> None:
    """Catches losses of streams that are read one by one."""
    streams = "objective.streams={hear: {}, read: {student: read, teacher: read, weight: 0.5}}"
    for outcome in jobs.run("train", settings(inputs, tmp_path / "run", streams, "parallel.tp=2"), ranks=2):
        outcome.check_waits(TENSOR_PARALLEL)


def test_lora(jobs: Jobs, inputs: Path, tmp_path: Path) -> None:
    """Catches faults and waits of LoRA's matrices and dropout, whole and split, and of a resume as split ones."""
    lora = ("model.lora.rank=4", "model.lora.dropout=0.3", "rollout.max_logprob_mismatch=null", "train.packing=packed")
    run = settings(inputs, tmp_path / "run", *lora)
    (outcome,) = jobs.run("train", [*run, "train.steps=1"])
    outcome.check_waits()
    for outcome in jobs.run("train", [*run, "parallel.tp=2", "parallel.sequence_parallel=true"], ranks=2):
        outcome.check_waits(TENSOR_PARALLEL)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(jobs: Jobs, inputs: Path, mixture: Path, tmp_path: Path, name: str) -> None:
    """Catches faults of routing, dispatch, balance and replay, waits for each expert.

    Also faults of a resume on one rank.
    """
    ranks, budget, more = MIXTURES[name]
    run = settings(inputs, tmp_path / "run", f"model.checkpoint={mixture}")
    for outcome in jobs.run("train", [*run, *more, "train.steps=1"], ranks=ranks):
        outcome.check_waits(budget)
    if name.startswith("ep2"):
        jobs.run("train", [*run, *(setting for setting in more if not setting.startswith("parallel."))])


def test_weight_sync_of_shards(jobs: Jobs, tmp_path: Path) -> None:
    """Catches gathers of shards into memory of the wrong kind."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", hidden_size=128, ffn_size=1024, layers=4)
    jobs.run("weight_sync", [str(checkpoint), str(tmp_path), "2"], ranks=2)
