"""The audio encoder under sequence parallelism in numbers of positions that the ranks do not divide.

test_lalm and test_families compare it with transformers'.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cord.model.config import LayerConfig
from megatron_cord.model.encoder import AudioEncoder
from megatron_cord.parallel.layout import ParallelConfig, initialize
from tests.gloo import run_ranks
from tests.model.test_architecture import ENCODER

WINDOW = 23  # positions
#: Architecture, the clips' frames, and how many positions they are, worked out by hand.
CASES = {
    "short clips": (replace(ENCODER, max_positions=WINDOW), (46, 31, 3), 23 + 16 + 2),
    "encodes padding": (
        replace(ENCODER, max_positions=WINDOW, pooling=1, encodes_padding=True),
        (46, 31, 3),
        3 * WINDOW,
    ),
    "tail": (replace(ENCODER, max_positions=WINDOW, tail_frames=2), (44, 31, 3), 23 + 17 + 3),
    "divides": (replace(ENCODER, max_positions=WINDOW), (46, 29, 3), 23 + 15 + 2),
}


def differences(_rank: int) -> dict[str, tuple[float, float, list[tuple[int, ...]]]]:
    """Compare the encoder with and without sequence parallelism at TP = 2.

    Returns:
        for each case the largest difference of features and of gradients, and the shapes of its layers' inputs.
    """
    found = {}
    for name, (arch, frames, _) in CASES.items():
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
                len(frames), arch.num_mels, arch.window_frames, generator=generator, dtype=torch.float64
            )
            features = encoder(clips, frames)
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


def test_sequence_parallelism_changes_nothing() -> None:
    """Catches positions that are lost, computed in vain or attended to where ranks do not divide them.

    It also catches unsplit layers, and a gradient that is counted twice or for a slice only.
    """
    for outcome in run_ranks(differences, 2):
        for name, (features, gradients, seen) in outcome.items():
            assert features < 1e-12 and gradients < 1e-11, (name, features, gradients)
            positions = CASES[name][2]
            assert [shape[:2] for shape in seen] == [(positions, 1), ((positions + 1) // 2, 1)]
