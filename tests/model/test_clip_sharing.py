"""Clips dealt over context-parallel ranks: how much each encodes, and the same tokens and gradients as on one rank."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cord.model.clip_sharing import deal_clips
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, initialize
from tests.gloo import run_ranks
from tests.model.test_architecture import ARCHITECTURE

#: Frames of the clips of a microbatch; of the last one, a rank has none.
MICROBATCHES = ((40, 21, 13, 40, 30), (33, 33), (26,))


def test_clips_are_dealt_evenly() -> None:
    """Catches a clip that two ranks encode or none, and ranks of which one does most of the work."""
    costs = [1500, 100, 700, 800, 1500, 40, 900, 300]
    dealt = deal_clips(costs, 3)
    assert sorted(clip for clips in dealt for clip in clips) == list(range(8))
    assert all(clips == sorted(clips) for clips in dealt)
    loads = [sum(costs[clip] for clip in clips) for clips in dealt]
    assert max(loads) <= 1.2 * sum(costs) / 3
    assert deal_clips([5], 2) == [[0], []]


def encode(rank: int) -> dict[str, list[Any]]:
    """Return, by layout, what comes of each microbatch on a rank: tokens, gradients summed over ranks, positions."""
    found: dict[str, list[Any]] = {}
    arch = ARCHITECTURE
    assert arch.encoder is not None
    for name, cp in (("alone", 1), ("shared", 2)):
        layout = initialize(ParallelConfig(cp=cp), seed=0)
        model = LALM(arch, layout, torch.float64)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        assert model.audio_encoder is not None
        positions: list[int] = []
        model.audio_encoder.block.register_forward_pre_hook(lambda _, given, into=positions: into.append(len(given[0])))
        found[name] = []
        for frames in MICROBATCHES:
            positions.clear()
            window = arch.encoder.window_frames
            clips = torch.randn(len(frames), arch.encoder.num_mels, window, generator=generator)
            tokens = model.encode_audio(clips, frames)
            weights = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
            # Of two ranks each has the loss of half of the tokens, as where they share a sequence.
            half = torch.arange(len(tokens)) % 2 == rank
            (tokens * weights)[half | (cp == 1)].sum().backward()  # type: ignore[no-untyped-call]
            found[name].append((tokens.detach(), _gradients(model, cp), sum(positions)))
        parallel_state.destroy_model_parallel()
    return found


def _gradients(model: LALM, cp: int) -> dict[str, Tensor]:
    """Take the gradients of encoder and adapter, and sum them over the ranks that share the sequences."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.startswith(("audio_encoder.", "adapter.")) and parameter.requires_grad:
            assert parameter.grad is not None, name  # on a rank without a clip, too
            if cp > 1:
                dist.all_reduce(parameter.grad)
            gradients[name], parameter.grad = parameter.grad, None
    return gradients


def test_ranks_share_the_encoders_work() -> None:
    """Catches clips that each rank encodes, tokens in another order, and gradients that are lost or counted twice."""
    first, second = run_ranks(encode, 2)
    for number, frames in enumerate(MICROBATCHES):
        wanted, gradients, alone = first["alone"][number]
        halves = [found["shared"][number][2] for found in (first, second)]
        assert sum(halves) == alone and max(halves) <= (alone if len(frames) == 1 else 0.6 * alone)
        for found in (first, second):
            tokens, summed, _ = found["shared"][number]
            torch.testing.assert_close(tokens, wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(summed, gradients, rtol=1e-8, atol=1e-10)
