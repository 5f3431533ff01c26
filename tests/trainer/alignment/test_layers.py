"""How alike responses are in the model's layers: against transformers' model in float64, on one rank and on layouts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_cord.config.loading import load_config
from megatron_cord.data.samples import Prompt
from megatron_cord.model.config import ModelConfig
from megatron_cord.parallel.layout import initialize
from megatron_cord.rollout.types import Rollout
from megatron_cord.trainer.alignment.layers import LayerCosines
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.optimizer.building import build_optimizer, release, wrap_model
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher, TeacherConfig
from megatron_cord.verify.layout import VerifyLayoutConfig
from megatron_cord.verify.layout_reference import Sizes, _log_probabilities, make_checkpoint, make_sequences
from tests.gloo import run_ranks

SIZES = Sizes(layers=4, heads=4, kv_heads=2, sequences=4, longest=9)
PAIRS = [(0, 5), (3, 4), (3, 3), (8, 0)]
LAYOUTS = {
    "one rank": [],
    "tp2 packed": ["parallel.tp=2", "parallel.sequence_parallel=true", "train.packing=packed"],
    "pp2": ["parallel.pp=2"],
    "pp2 interleaved, padding in front": [
        *("parallel.pp=2", "parallel.virtual_pp=2", "train.packing=packed", "train.tokens_per_microbatch=4096")
    ],
    "cp2 packed": ["parallel.cp=2", "train.packing=packed"],
}


def make_responses() -> list[tuple[Prompt, Rollout]]:
    """Return responses to prompts with audio, then to prompts of text, then one of a single token."""
    heard = [(made.student, made.rollout) for made in make_sequences(SIZES, seed=0)]
    text = [(Prompt("text", (3, 4, 5 + number)), heard[number][1]) for number in (3, 1, 2, 0)]
    return [*heard, *text, (heard[1][0], Rollout("one", (7,), (-1.0,), "stop", (), ""))]


def expected(directory: Path, responses: list[tuple[Prompt, Rollout]]) -> list[float]:
    """Return the mean over layers of the cosine of each pair's mean states, without the state of the last token."""
    model: Any = make_checkpoint(directory, SIZES, seed=0).double().eval()
    layers = [m for _, m in model.named_modules() if type(m).__name__ == "Qwen2DecoderLayer"]
    assert len(layers) == SIZES.layers
    states: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out))
    means = []
    for prompt, rollout in responses:
        states.clear()
        with torch.no_grad():
            _log_probabilities(model, prompt, rollout)
        count = len(rollout.token_ids)
        kept = [state.reshape(-1, state.shape[-1])[-count - 1 :] for state in states]  # of the prompt's last token, too
        means.append([k[1:-1].mean(0) if count > 1 else k[0] for k in kept])
    return [
        sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(means[i], means[j], strict=True)) / len(layers)
        for i, j in PAIRS
    ]


def cosines(_rank: int, settings: list[str]) -> tuple[list[float], list[float], list[float]]:
    """Return the cosines and the reference's, and those of no pair."""
    config = load_config(VerifyLayoutConfig, None, settings)
    layout = initialize(config.parallel, config.seed)
    responses = make_responses()
    with tempfile.TemporaryDirectory() as directory:
        wanted = expected(Path(directory), responses)
        student = build_student(ModelConfig(directory, dtype="float32"), layout)
        teacher = Teacher(TeacherConfig(), student, directory)
    wrapped = wrap_model(config.optimizer, student)
    optimizer, scheduler = build_optimizer(config.optimizer, wrapped, steps=10)
    step = TrainStep(wrapped, teacher, optimizer, scheduler, ObjectiveConfig(), config.train, 0, SIZES.longest)
    found, nothing = LayerCosines(step)(responses, PAIRS), LayerCosines(step)(responses, [])
    hooks = sum(len(layer._forward_hooks) for layer in student.language_model.decoder.layers)
    assert not hooks, "a later pass would be pooled, too"
    release(wrapped)
    parallel_state.destroy_model_parallel()
    return found, wanted, nothing


def check(settings: list[str]) -> None:
    results = run_ranks(cosines, 2 if settings else 1, settings)
    for found, wanted, nothing in results:
        assert found == pytest.approx(wanted, abs=2e-6) and found == results[0][0] and nothing == []
        assert found[2] == pytest.approx(1.0, abs=1e-6) and len({round(value, 3) for value in found}) == len(PAIRS)


@pytest.mark.slow
def test_layer_cosines() -> None:
    """Catches the prompt's states, the end's, or the final norm's in a mean, and responses in another order."""
    check(LAYOUTS["one rank"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_layer_cosines_on_layouts(layout: str) -> None:
    """Catches tokens, or layers, of one rank alone, and cosines that differ between the ranks."""
    check(LAYOUTS[layout])
