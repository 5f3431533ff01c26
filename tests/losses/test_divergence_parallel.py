"""The divergence on 1, 2 and 4 real gloo ranks, values and gradients, against a float64 reference on one rank.

One start of four ranks runs all cases: TP=4 on all of them, TP=2 on two groups of two (so that ranks within a group
are not the global ones), TP=1 on each alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cord.errors import CordError
from megatron_cord.losses import TokenStats, divergence_from_logits, shard
from tests.gloo import run_ranks
from tests.losses.reference import (
    Inputs,
    make_inputs,
    reference_hidden_gradients,
    reference_logits_gradient,
    relative_error,
    weighted,
    weighted_loss,
)

WORLD_SIZE = 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    entry: str
    kind: str = "reverse_kl"
    dtype: torch.dtype = torch.float64
    temperature: float = 1.0
    vocab_size: int = 22  #: of 24 columns
    num_tokens: int = 11
    tied: bool = False  #: student and teacher share one output weight
    implementation: str = "recompute"
    only_kl: bool = False  #: the loss does not use entropy and log-probability
    sequence_parallel: bool = False
    distance: float = 1.0  #: of the teacher; the divergence grows with its square


KINDS = ("reverse_kl", "forward_kl", "jsd", "topk", "forward_topk")
TWO_PASSES = KINDS[2:]
IMPLEMENTATIONS = ("recompute", "cached_grad", "fused")
CASES = {
    **{f"{entry}-{kind}": Case(entry, kind) for entry in ("logits", "hidden") for kind in ("reverse_kl", "forward_kl")},
    "logits-fp32": Case("logits", dtype=torch.float32),
    "hidden-fp32": Case("hidden", dtype=torch.float32),
    "hidden-bf16": Case("hidden", dtype=torch.bfloat16),
    "hidden-temperature": Case("hidden", temperature=0.5),
    "logits-temperature": Case("logits", "forward_kl", temperature=4.0),
    "hidden-tied": Case("hidden", tied=True),
    **{
        f"hidden-{name}-fp32": Case("hidden", dtype=torch.float32, implementation=name)
        for name in ("cached_grad", "fused")
    },
    **{
        f"hidden-{name}-bf16": Case("hidden", dtype=torch.bfloat16, implementation=name)
        for name in ("cached_grad", "fused")
    },
    **{
        f"hidden-{name}-all-padding": Case("hidden", vocab_size=5, implementation=name)
        for name in ("cached_grad", "fused")
    },
    **{f"hidden-{name}-empty": Case("hidden", num_tokens=0, implementation=name) for name in ("cached_grad", "fused")},
    **{
        f"hidden-cached_grad-{kind}-only-kl": Case(
            "hidden", kind, implementation="cached_grad", only_kl=True, tied=True
        )
        for kind in KINDS
    },
    **{f"{entry}-{kind}": Case(entry, kind) for entry in ("logits", "hidden") for kind in TWO_PASSES},
    **{f"logits-{kind}-all-padding": Case("logits", kind, vocab_size=5) for kind in TWO_PASSES},
    **{
        f"hidden-{name}-scattered": Case("hidden", num_tokens=12, implementation=name, sequence_parallel=True)
        for name in IMPLEMENTATIONS
    },
    # 5 of 24 columns are tokens: at TP=4 three ranks are all padding, at TP=2 one is.
    **{
        f"{entry}-{kind}-all-padding": Case(entry, kind, vocab_size=5)
        for entry in ("logits", "hidden")
        for kind in ("reverse_kl", "forward_kl")
    },
    # A true KL of 4e-4, where rounded logits would spoil the gradients.
    **{
        f"hidden-{name}-bf16-small": Case("hidden", dtype=torch.bfloat16, implementation=name, distance=0.013)
        for name in IMPLEMENTATIONS
    },
    "logits-empty": Case("logits", num_tokens=0),
    "hidden-empty": Case("hidden", num_tokens=0),
}
CHUNK_TOKENS = 4  # 11 tokens make chunks of 4, 4 and 3
COLUMNS = 24


@dataclass
class Outcome:
    """What one rank got; gradients are of this rank's shard, or of the replicated hidden states."""

    stats: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    collectives: tuple[list[str], list[str]]  #: of the forward and of the backward pass


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the collectives that run under it, whatever function started them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name.split("::")[1].rstrip("_"))
        return func(*args, **(kwargs or {}))


def case_inputs(case: Case) -> Inputs:
    sizes = {"num_tokens": case.num_tokens, "hidden": 8, "columns": COLUMNS, "vocab_size": case.vocab_size}
    inputs = make_inputs(**sizes, dtype=case.dtype, distance=case.distance)
    if case.tied:
        inputs = replace(inputs, teacher_weight=inputs.student_weight)
    if case.only_kl:
        inputs = replace(inputs, weights=inputs.weights * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None])
    return inputs


def kind_options(case: Case) -> dict[str, Any]:
    return {"kind": case.kind, "beta": 0.3, "k": 3, "temperature": case.temperature, "vocab_size": case.vocab_size}


def run_case(case: Case, group: dist.ProcessGroup | None) -> Outcome:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    columns = COLUMNS // size
    mine = slice(rank * columns, (rank + 1) * columns)
    inputs = case_inputs(case)
    options: dict[str, Any] = {**kind_options(case), "tp_group": group}
    weights = inputs.weights[:1] if case.only_kl else inputs.weights
    forward, backward = Collectives(), Collectives()
    leaves: tuple[Tensor, ...]
    if case.entry == "logits":
        student, teacher = (logits[:, mine].clone() for logits in inputs.logits())
        leaves = (student.requires_grad_(),)
        with forward:
            stats = divergence_from_logits(student, teacher, inputs.target_ids, **options)
            loss = weighted(stats, weights)
    else:
        student_weight = inputs.student_weight[mine].clone().requires_grad_()
        teacher_weight = student_weight if case.tied else inputs.teacher_weight[mine]
        part = case.num_tokens // size
        here = slice(rank * part, (rank + 1) * part) if case.sequence_parallel else slice(None)
        leaves = (inputs.student_hidden[here].clone().requires_grad_(), student_weight)
        arguments = (*leaves, inputs.teacher_hidden[here], teacher_weight, inputs.target_ids)
        options |= {
            "implementation": case.implementation,
            "sequence_parallel": case.sequence_parallel,
            "chunk_tokens": CHUNK_TOKENS,
        }
        with forward:
            loss, stats = weighted_loss(weights, *arguments, **options)
    with backward:
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    return Outcome(stat_tuple(stats), gradients, (forward.names, backward.names))


def stat_tuple(stats: TokenStats) -> tuple[Tensor, ...]:
    return tuple(stat.detach() for stat in (stats.kl, stats.entropy, stats.student_logprob, stats.teacher_logprob))


def refusals(group: dist.ProcessGroup) -> list[str]:
    """Return this rank's errors: a target outside the vocabulary, and a NaN that only the last rank's shard holds."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    logits = torch.zeros(3, COLUMNS // size)
    broken = logits.clone()
    if rank == size - 1:
        broken[1, 0] = torch.nan
    messages = []
    for student, targets in ((logits, torch.tensor([0, 1, 22])), (broken, torch.tensor([0, 1, 2]))):
        try:
            divergence_from_logits(student, logits, targets, vocab_size=22, tp_group=group)
        except CordError as error:
            messages.append(str(error))
    return messages


def all_cases(rank: int) -> dict[Any, Any]:
    """On each rank: {(case's name, TP): outcome}, and the refusals."""
    shard.BLOCK_COLUMNS, shard.STORED_BLOCK_COLUMNS = (
        {"cpu": 4},
        4,
    )  # several blocks, the last one narrower, even in the smallest shard
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}
    results: dict[Any, Any] = {
        (name, size): run_case(case, group) for name, case in CASES.items() for size, group in groups.items()
    }
    results["refusals"] = refusals(pairs[rank // 2])
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[Any, Any]]:
    return run_ranks(all_cases, WORLD_SIZE)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_reference(name: str, size: int, results: list[dict[Any, Any]]) -> None:
    """Catches an all-reduce inside autograd (a gradient TP times too large), wrong offsets, leaking padding."""
    case, inputs = CASES[name], case_inputs(CASES[name])
    options: dict[str, Any] = {**kind_options(case)}
    if case.entry == "logits":
        expected, *expected_gradients = reference_logits_gradient(
            *inputs.logits(), inputs.target_ids, inputs.weights, **options
        )
    else:
        expected, *expected_gradients = reference_hidden_gradients(inputs, **options)
    for first in range(0, WORLD_SIZE, size):
        outcomes: list[Outcome] = [results[rank][name, size] for rank in range(first, first + size)]
        for outcome in outcomes:
            for stat, other, value in zip(outcome.stats, outcomes[0].stats, expected, strict=True):
                assert stat.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
                assert torch.equal(stat, other), "ranks disagree"
                tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
                torch.testing.assert_close(stat.double(), value, rtol=tolerance, atol=tolerance)
        if case.entry == "logits":
            gradients = [torch.cat([outcome.gradients[0] for outcome in outcomes], dim=1)]
            assert gradients[0][:, case.vocab_size :].count_nonzero() == 0
        else:
            hidden = [outcome.gradients[0] for outcome in outcomes]
            assert case.sequence_parallel or all(torch.equal(other, hidden[0]) for other in hidden), "ranks disagree"
            whole = torch.cat(hidden) if case.sequence_parallel else hidden[0]
            gradients = [whole, torch.cat([outcome.gradients[1] for outcome in outcomes])]
        for gradient, value in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == case.dtype and gradient.shape == value.shape
            if case.num_tokens:
                assert relative_error(gradient, value) < TOLERANCE[case.dtype]
            else:
                assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_one_collective_a_chunk(name: str, size: int, results: list[dict[Any, Any]]) -> None:
    """Catches a second collective that creeps into the forward pass, or any at all where there is nothing to exchange.

    All implementations must make the same collectives, for ranks may choose differently.
    """
    case = CASES[name]
    exchanging = size > 1 and case.num_tokens > 0
    chunks = -(-case.num_tokens // CHUNK_TOKENS) if case.entry == "hidden" else 1
    for result in results:
        forward, backward = result[name, size].collectives
        if not exchanging:
            assert forward == backward == []
            continue
        gathers = ["_allgather_base"] * chunks * (2 if case.kind in TWO_PASSES else 1)
        assert forward == ["_allgather_base"] * (2 if case.sequence_parallel else 0) + gathers
        if case.entry == "logits":
            assert backward == []
        else:
            # A chunk's gradient is summed at all ranks at once, or at each owner of its tokens.
            borders = {*range(0, case.num_tokens, CHUNK_TOKENS), *range(0, case.num_tokens, case.num_tokens // size)}
            assert backward == (["reduce"] * len(borders) if case.sequence_parallel else ["allreduce"] * chunks)


def test_all_ranks_refuse_together(results: list[dict[Any, Any]]) -> None:
    """Catches a refusal on one rank that leaves the others waiting in the collective."""
    for result in results:
        outside, broken = result["refusals"]
        assert outside == "target_ids[2] is 22, outside the vocabulary [0, 22)"
        assert broken.startswith("the student's logits of token 1 are NaN")
