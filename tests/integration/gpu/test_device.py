"""What a CUDA device does by itself: its queue, its clock and its memory."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.parallel.memory_use import peak_memory, reset_peak
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.parallel.portability import on_own_stream
from megatron_cord.parallel.transfers import to_host
from megatron_cord.trainer.endings.agreement import any_rank
from megatron_cord.trainer.step.results.phases import Phases

pytestmark = pytest.mark.gpu
CYCLES = 200_000_000  # about a tenth of a second


def test_a_world_of_one_over_nccl() -> None:
    """Catches a group, or a collective on the device, that NCCL refuses."""
    layout: Layout = initialize(ParallelConfig(), seed=0)
    try:
        assert torch.distributed.get_backend() == "nccl" and layout.device.type == "cuda"
        assert any_rank([True, False], layout.device) == [True, False]
        assert all_gather_json({"a": 1}) == [{"a": 1}]
    finally:
        finalize()


def test_a_phase_is_as_long_as_its_kernels() -> None:
    """Catches a phase that counts the time to queue kernels, and gives theirs to the phase that waits for them."""
    torch.cuda._sleep(1)  # type: ignore[no-untyped-call]  # the context and the kernel's code are loaded by their first use
    torch.cuda.synchronize()
    phases = Phases()
    begun = time.perf_counter()
    with phases.phase("kernels"):
        torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
    queued = time.perf_counter() - begun
    with phases.phase("waiting"):
        torch.cuda.synchronize()
    seconds = phases.seconds()
    assert queued < 0.02 < seconds["seconds_kernels"]
    assert seconds["seconds_waiting"] < 0.02


def test_copies_to_pinned_memory_are_ordered() -> None:
    """Catches hidden states on the host that are read back before they are there, and memory that is not pinned."""
    torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
    values = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    host = to_host(values)
    assert host.is_pinned()
    assert torch.equal(host.to("cuda", non_blocking=True), values)


def test_work_of_another_thread_waits_for_what_it_needs() -> None:
    """Catches a stream of its own that starts before the tensors it reads are computed."""
    torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
    values = torch.ones(1 << 20, device="cuda")
    read: list[float] = []
    on_own_stream(values.device, lambda: read.append(float(values.sum())))()
    assert read == [float(1 << 20)]


def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    """Catches a peak of all steps, or of what is held now."""
    held = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    del held
    reset_peak()
    before = peak_memory()["memory_peak_gb"]
    for nbytes in (1 << 26, 1 << 24):
        torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    grown = peak_memory()["memory_peak_gb"] - before
    assert grown == pytest.approx((1 << 26) / 1e9, rel=0.1)
