"""The audio encoder under sequence parallelism in windows that the ranks do not divide; test_lalm has the others."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cord.model.config import LayerConfig
from megatron_cord.model.encoder import AudioEncoder
from megatron_cord.parallel.layout import ParallelConfig, initialize
from tests.gloo import run_ranks
from tests.model.test_architecture import ENCODER

POSITIONS, FRAMES = 23, (46, 31, 3)
CASES = {
    "masked": replace(ENCODER, max_positions=POSITIONS),
    "encodes padding": replace(ENCODER, max_positions=POSITIONS, pooling=1, encodes_padding=True),
    "tail": replace(ENCODER, max_positions=POSITIONS, tail_frames=2),
    "divides": replace(ENCODER, max_positions=24),
}


def differences(_rank: int) -> dict[str, tuple[float, float, list[tuple[int, ...]]]]:
    """Compare the encoder with and without sequence parallelism at TP = 2.

    Returns:
        for each case the largest difference of features and of gradients, and the shapes of its layers' inputs.
    """
    found = {}
    for name, arch in CASES.items():
        results = []
        seen: list[tuple[int, ...]] = []
        for sequence_parallel in (False, True):
            layout = initialize(ParallelConfig(tp=2, sequence_parallel=sequence_parallel), seed=0)
            encoder = AudioEncoder(arch, layout, torch.float64, LayerConfig())
            torch.manual_seed(dist.get_rank())
            for parameter in encoder.parameters():
                parameter.data.normal_(std=0.2)
                if (
                    not getattr(parameter, "tensor_model_parallel", False) and parameter.dim() == 1
                ) or parameter.dim() == 3:
                    dist.broadcast(parameter.data, 0)  # held by both ranks
            dist.broadcast(encoder.embed_positions.data, 0)
            encoder.block.layers[0].pre_mlp_layernorm.register_forward_hook(
                lambda _, given, out, seen=seen: seen.append(tuple(out.shape))
            )
            generator = torch.Generator().manual_seed(1)
            clips = torch.randn(
                len(FRAMES), arch.num_mels, arch.window_frames, generator=generator, dtype=torch.float64
            )
            features = encoder(clips, torch.tensor(FRAMES))
            weights = torch.randn(features.shape, generator=generator, dtype=torch.float64)
            (features * weights).sum().backward()
            results.append((features.detach(), _gradients(encoder)))
            parallel_state.destroy_model_parallel()
        (plain, gradients), (split, others) = results
        found[name] = (
            float((plain - split).abs().max()),
            max(float((others[key] - gradient).abs().max()) for key, gradient in gradients.items()),
            seen,
        )
    return found


def _gradients(encoder: AudioEncoder) -> dict[str, Tensor]:
    """With what Megatron sums after the backward pass: parameters that saw a slice of the positions on each rank."""
    gradients = {}
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad
    return gradients


@pytest.mark.filterwarnings("ignore:::megatron")
def test_sequence_parallelism_changes_nothing() -> None:
    """Catches positions that are lost or attended to where ranks do not divide the window, and unsplit layers.

    It also catches a gradient that is counted twice or for a slice only.
    """
    for outcome in run_ranks(differences, 2):
        for name, (features, gradients, seen) in outcome.items():
            assert features < 1e-12 and gradients < 1e-11, (name, features, gradients)
            positions = CASES[name].max_positions
            assert [shape[0] for shape in seen] == [positions, (positions + 1) // 2]
