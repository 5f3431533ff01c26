"""Faults, one a function, that CUDA or NCCL would raise, or do wrong in silence; and what is allowed or only waits.

They run in a rank (`jobs.Jobs`). ``FAULTS`` has what the rules must say, ``WAITS`` how the wait is counted, ``ALLOWED``
what must pass without either.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel import transfers
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.trainer.step.batching import batches, token_layout
from megatron_cord.trainer.step.moving_average import MovingAverage
from megatron_cord.trainer.step.step import TrainStep
from tests.pretend_gpu.record import RECORD
from tests.pretend_gpu.work import run_training


def device(*shape: int) -> Tensor:
    return torch.ones(*shape or (4, 4), device="cuda")


def host(*shape: int) -> Tensor:
    return torch.ones(*shape or (4, 4))


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def pinned(*shape: int) -> Tensor:
    return torch.ones(*shape or (4, 4), pin_memory=True)


class HostTensorInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.ones(4, 4)


def in_backward() -> None:
    HostTensorInBackward.apply(device().requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]


def in_thread() -> None:
    failed = []

    def work() -> None:
        try:
            device() + host()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise failed[0]


def in_pool() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: device() + host()).result()


def in_forked_process() -> None:
    tensor = device()
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            tensor.add(1)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    message = os.read(reader, 1000).decode()
    if message:
        raise RuntimeError(message)


def host_tensor_over_nccl() -> None:
    initialize(ParallelConfig(), 0)
    dist.all_reduce(host())


def gather_into_host_tensor() -> None:
    initialize(ParallelConfig(), 0)
    dist.all_gather_into_tensor(host(16), device(16))


def device_tensor_over_gloo() -> None:
    initialize(ParallelConfig(), 0)
    dist.all_reduce(device(), group=dist.new_group(backend="gloo"))


def read_before_copy_is_done() -> None:
    pinned().copy_(device(), non_blocking=True).sum()


def write_while_copy_reads() -> None:
    source = pinned()
    device().copy_(source, non_blocking=True)
    source.zero_()


def other_stream_reads_too_early() -> None:
    made = device()
    with torch.cuda.stream(new_stream()):
        made.sum()


def other_stream_writes_too_early() -> None:
    made, stream = device(), new_stream()
    stream.wait_stream(torch.cuda.current_stream())
    made.sum()
    with torch.cuda.stream(stream):
        made.zero_()


#: By name: the fault, and a part of what the rules must say.
FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "sum of host and device": (lambda: device() + host(), "aten::add on tensors of cuda:0 and of the cpu"),
    "cat of host and device": (lambda: torch.cat([device(), host()]), "aten::cat on tensors of"),
    "linear with a weight on the host": (lambda: torch.nn.functional.linear(device(), host()), "aten::"),
    "where with a branch on the host": (lambda: torch.where(device() > 0, host(), 0.0), "aten::where"),
    "index_select by the host": (lambda: device().index_select(0, torch.tensor([1])), "aten::index_select"),
    "host indexed by the device": (lambda: host()[torch.tensor([1], device="cuda")], "aten::index"),
    "optimizer with moments on the host": (
        lambda: torch._foreach_add_([device(), device()], [device(), host()]),
        "aten::_foreach_add_",
    ),
    "numpy of device memory": (lambda: device().numpy(), "can't convert cuda:0"),
    "pinning device memory": (lambda: device().pin_memory(), "only dense CPU tensors"),
    "host tensor made in a backward pass": (in_backward, "aten::mul"),
    "in a thread": (in_thread, "aten::add"),
    "in a pool of threads": (in_pool, "aten::add"),
    "device in a forked process": (in_forked_process, "forked subprocess"),
    "host tensor over NCCL": (host_tensor_over_nccl, "NCCL allreduce_ of a host tensor"),
    "gather into the host over NCCL": (gather_into_host_tensor, "of a host tensor"),
    "device tensor over gloo": (device_tensor_over_gloo, "gloo allreduce_ of a device tensor"),
    "read before the copy is done": (read_before_copy_is_done, "before the host waited for its copy"),
    "written while a copy reads": (write_while_copy_reads, "before the host waited for its copy"),
    "read on another stream": (other_stream_reads_too_early, "another stream still uses"),
    "written on another stream": (other_stream_writes_too_early, "another stream still uses"),
}
#: By name: what waits, and how that is counted.
WAITS: dict[str, tuple[Callable[[], Any], str]] = {
    "item": (lambda: device().sum().item(), "item, bool, int or float"),
    "float": (lambda: float(device().sum()), "item, bool, int or float"),
    "bool": (lambda: bool(device().any()), "item, bool, int or float"),
    "tolist": (lambda: device().tolist(), "tolist"),
    "nonzero": (lambda: device().nonzero(), "nonzero"),
    "mask": (lambda: device()[device() > 0], "index"),
    "index by the host": (lambda: device()[torch.tensor([1])], "index of a device tensor by a host tensor"),
    "repeat_interleave": (
        lambda: torch.repeat_interleave(device(2).long(), device(2).long()),
        "repeat_interleave without output_size",
    ),
    "unique": (lambda: torch.unique(device()), "_unique2"),
    "tensor": (lambda: torch.tensor([1.0, 2.0], device="cuda"), "torch.tensor"),
    "to device, pageable": (lambda: host().to("cuda", non_blocking=True), "copy to the device, pageable"),
    "to device, pinned": (lambda: pinned().to("cuda"), "copy to the device, pinned"),
    "to host": (lambda: device().cpu(), "copy from the device, pageable"),
    "copy_": (lambda: device().copy_(host()), "copy to the device, pageable"),
    "synchronize": (lambda: torch.cuda.synchronize(), "torch.cuda.synchronize"),
    "event": (lambda: torch.cuda.current_stream().record_event().synchronize(), "event.synchronize"),
}


def hidden_states_to_host_and_back() -> None:
    transfers.to_host(device()).to("cuda", non_blocking=True).sum()


def other_stream_waits() -> None:
    made, stream = device(), new_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made.add_(1)
    torch.cuda.current_stream().wait_event(stream.record_event())
    made.sum()


def collective_of_device_tensors() -> None:
    initialize(ParallelConfig(), 0)
    dist.all_reduce(device())


def python_sees_the_device() -> None:
    made = device()
    assert made.device == torch.device("cuda", 0) and made.is_cuda and not made.is_cpu
    assert made.type() == "torch.cuda.FloatTensor" and made.get_device() == 0
    for other in (made.new_zeros(2), made[1:].detach(), torch.zeros_like(made), (made * 2).sum(), made.T):
        assert other.is_cuda
    assert not host().is_cuda and not torch.zeros(3).is_cuda and made.new_zeros(2, device="cpu").is_cpu
    leaf = device().requires_grad_()
    (leaf * leaf).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and leaf.grad.is_cuda


ALLOWED: dict[str, Callable[[], Any]] = {
    "what Python sees": python_sees_the_device,
    "number on the host": lambda: device() * torch.tensor(2.0),
    "put by a mask": lambda: device().__setitem__(device() > 0, 0.0),
    "to the device without waiting": lambda: transfers.to_device(host(), torch.device("cuda", 0)).sum(),
    "to the host and back": hidden_states_to_host_and_back,
    "streams in order": other_stream_waits,
    "collective": collective_of_device_tensors,
    "known size": lambda: torch.repeat_interleave(device(2).long(), device(2).long(), output_size=2),
}


def check_faults(_: Sequence[str]) -> None:
    """Check that each fault is raised with the right words."""
    for name, (fault, words) in FAULTS.items():
        said = ""
        try:
            fault()
        except RuntimeError as error:
            said = str(error)
        assert words in said, f"{name}: {said or 'no rule was broken'}"
        RECORD.faults.clear()


def check_waits(_: Sequence[str]) -> None:
    """Check that each wait is counted once and by its kind."""
    for name, (wait, kind) in WAITS.items():
        RECORD.waits.clear()
        wait()
        counted = [(what, times) for (_, what, _), times in RECORD.waits.items()]
        assert len(counted) == 1 and counted[0][0].startswith(kind) and counted[0][1] == 1, f"{name}: {counted}"


def check_allowed(_: Sequence[str]) -> None:
    """Check that what CUDA allows passes, and makes nobody wait."""
    for name, work in ALLOWED.items():
        RECORD.waits.clear()
        work()
        assert not RECORD.waits, f"{name}: {RECORD.waits}"


# Faults in the product, in a run of it.


def blocking_copies(settings: Sequence[str]) -> None:
    """Train with microbatches whose copies to the device wait, as they once did."""

    def to_device(tensor: Tensor, target: torch.device) -> Tensor:
        return tensor.to(target)

    with mock.patch.object(batches, "to_device", to_device), mock.patch.object(token_layout, "to_device", to_device):
        run_training(settings)


def flag_on_the_host(settings: Sequence[str]) -> None:
    """Train with a flag that goes through NCCL from the host."""

    def everywhere(self: TrainStep, good: bool) -> bool:
        flag = torch.tensor(float(good))
        dist.all_reduce(flag)
        return bool(flag)

    with mock.patch.object(TrainStep, "_everywhere", everywhere):
        run_training(settings)


def average_without_order(settings: Sequence[str]) -> None:
    """Train with a moving teacher whose passes do not wait for its average."""
    with mock.patch.object(MovingAverage, "wait"):
        run_training(settings)
