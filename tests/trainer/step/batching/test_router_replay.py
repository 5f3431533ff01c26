"""The engine's choice of experts on its way to the student; what follows it is in tests/verify/test_layout.py."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import ExpertsArchitecture
from megatron_cord.parallel.sequence_sharding import SequenceSharding
from megatron_cord.rollout.chosen_experts import ChosenExperts
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.config import TrainConfig
from megatron_cord.trainer.step.batching.batches import TrainingSequence, check_responses, make_microbatches
from tests.model.test_architecture import LANGUAGE
from tests.tiny_run import make_run, metrics, overrides, write_checkpoint, write_inputs

LAYERS, COUNT, CHOSEN = 3, 6, 2
ARCH = replace(LANGUAGE, num_layers=LAYERS, experts=ExpertsArchitecture(COUNT, CHOSEN, normalized=True))


def sequence(index: int, prompt: int, response: int, experts: Tensor | None) -> TrainingSequence:
    """Return a sequence of so many tokens with given experts [tokens - 1, layers, chosen]."""
    chosen = None if experts is None else ChosenExperts.of(experts)
    rollout = Rollout(f"s{index}", (1,) * response, (-1.0,) * response, "stop", (), "", chosen)
    tokens = Prompt(f"s{index}", (2,) * prompt)
    return TrainingSequence(tokens, None, ScoredRollout(rollout, "policy", advantage=1.0), index)


def draw(rows: int, seed: int) -> Tensor:
    """Return experts [rows, layers, chosen], none twice for a token."""
    scores = torch.rand(rows, LAYERS, COUNT, generator=torch.Generator().manual_seed(seed))
    return scores.topk(CHOSEN).indices


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("cp", [1, 2])
def test_experts_lie_beside_their_tokens(packing: Any, cp: int) -> None:
    """Catches experts of another token or sequence, and some that padding, or a last token, is told to choose."""
    given = [draw(6, 0), None, draw(8, 1)]
    sequences = [sequence(0, 3, 4, given[0]), sequence(1, 5, 3, None), sequence(2, 7, 2, given[2])]
    config = TrainConfig(packing=packing, micro_batch_size=3, tokens_per_microbatch=64)
    (batch,) = make_microbatches(sequences, config, 0, SequenceSharding(cp, 0, 1), torch.device("cpu"))
    experts = batch.student.experts
    assert experts is not None and experts.shape[2:] == (LAYERS, CHOSEN)
    told = torch.zeros(experts.shape[:2], dtype=torch.bool)
    for column, each in enumerate(batch.sequences):
        rows = given[each.index]
        if rows is None:
            continue
        starts = batch.student.cu_seqlens
        place = (slice(len(rows)), column) if starts is None else (slice(starts[column], starts[column] + len(rows)), 0)
        assert torch.equal(experts[place].long(), rows)
        told[place] = True
    assert (experts[~told] == -1).all()
    plain = [replace(s, response=replace(s.response, rollout=replace(s.rollout, experts=None))) for s in sequences]
    (batch,) = make_microbatches(plain, config, 0, SequenceSharding(cp, 0, 1), torch.device("cpu"))
    assert batch.student.experts is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e[:-1], r"are \[5, 3, 2\], the trainer's sequence has \[6, 3, 2\]"),
        (lambda e: e[:, :2], r"are \[6, 2, 2\]"),
        (lambda e: e + 1, r"names one twice, or one outside \[0, 6\)"),
        (lambda e: e * 0, r"names one twice"),
    ],
)
def test_experts_of_another_model(change: Callable[[Tensor], Tensor], words: str) -> None:
    """Catches a choice that the student cannot make, or that was made for other tokens."""
    experts = draw(6, 0)
    check_responses([sequence(0, 3, 4, experts)], ARCH)
    with pytest.raises(CordError, match=f"sample s0: the engine's.*{words}"):
        check_responses([sequence(0, 3, 4, change(experts))], ARCH)
    with pytest.raises(CordError, match="the trainer's sequence has"):
        check_responses([sequence(0, 3, 4, experts)], replace(LANGUAGE, num_layers=LAYERS))


def test_experts_survive_json() -> None:
    """Catches numbers that the way between ranks or through a checkpoint changes, and text that is none."""
    experts = draw(5, 2) + 300
    rollout = Rollout("s", (1,), (0.0,), "stop", (), "", ChosenExperts.of(experts))
    scored = ScoredRollout.from_json(ScoredRollout(rollout, "distill").to_json())
    assert scored.rollout.experts is not None and torch.equal(scored.rollout.experts.tensor().long(), experts)
    for wrong in ("no base64!", "AAAA"):
        with pytest.raises(CordError, match="are not 2 numbers for each token and each of 3 layers"):
            ChosenExperts(3, 2, wrong).tensor()


def test_a_run_follows_its_engine(tmp_path: Path) -> None:
    """Catches experts that do not reach the student, or are counted wrongly.

    In bfloat16 transformers' router, which computes in it, and the trainer's, in fp32, choose some experts differently.
    """
    inputs = write_inputs(tmp_path)
    write_checkpoint(tmp_path / "mixture", experts=8)
    more = (f"model.checkpoint={tmp_path / 'mixture'}", "model.dtype=bfloat16", "train.steps=1", "seed=2")
    found = {}
    for replay in ("false", "true"):
        settings = overrides(inputs, tmp_path / replay, *more, f"rollout.router_replay={replay}")
        assert make_run(settings) == 0
        (found[replay],) = metrics(tmp_path / replay)
    free, followed = found["false"], found["true"]
    assert "experts/replayed" not in free
    assert 0.8 < followed["experts/replayed"] < 1  # no pass has read a response's last token
    assert 0 < followed["experts/rerouted"] < 0.1
    assert followed["engine_kl"] < 0.5 * free["engine_kl"]


def test_refusals(tmp_path: Path) -> None:
    """Catches a setting without effect: no experts, no engine, or responses that are not the student's."""
    inputs = write_inputs(tmp_path)
    replay = "rollout.router_replay=true"
    with pytest.raises(CordError, match=r"rollout.router_replay follows an engine's choice .* has none"):
        make_run(overrides(inputs, tmp_path / "dense", replay))
    with pytest.raises(CordError, match=r"a rollout dump has none; set it to false"):
        make_run(overrides(inputs, tmp_path / "dump", replay, f"replay={tmp_path}"))
    off_policy = ("objective.responses=teacher", "objective.policy_gradient.enabled=false")
    with pytest.raises(CordError, match=r"objective.responses=teacher has none"):
        make_run(overrides(inputs, tmp_path / "off", replay, *off_policy))
