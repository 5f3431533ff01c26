"""Lets Megatron-Core run on machines without CUDA: the one place where the device differs.

Megatron-Core asks for CUDA devices, streams and generators by name. Without CUDA, `install` maps devices to the CPU, makes streams and
events inert, and gives the CUDA random generator's calls the CPU's generator. With CUDA it does none of this. On both, where neither apex
nor transformer-engine brings its fused optimizer, it provides that optimizer's contract on plain torch. It proves numerics and the logic of communication on gloo; it says nothing about streams, overlap, NCCL
or transformer-engine's kernels.

Simplifications: a global patch of torch, made once per process before megatron.core is imported (importing `megatron_cord.parallel` does
it); `torch.cuda.is_available()` stays False, so libraries that ask first take their CPU path.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "linspace", "eye", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)
_CUDA_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def has_cuda() -> bool:
    """Whether this process computes on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def backend() -> str:
    """The torch.distributed backend that fits the device."""
    return "nccl" if has_cuda() else "gloo"


def has_transformer_engine() -> bool:
    """Whether transformer-engine's layers can be used: it is installed, and its kernels have a GPU."""
    from megatron.core.extensions import transformer_engine

    return has_cuda() and bool(transformer_engine.HAVE_TE)


def on_own_stream(target: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """``work`` for another thread, to be wrapped where the work it builds on was started.

    On CUDA it computes on a stream of its own, after everything that the calling thread has queued so far, and returns when it is done.
    """
    if target.type != "cuda":
        return work
    queued = torch.cuda.current_stream(target).record_event()

    def wrapped() -> None:
        with torch.cuda.device(target), torch.cuda.stream(torch.cuda.Stream(target)):
            stream = torch.cuda.current_stream(target)
            stream.wait_event(queued)
            work()
            stream.synchronize()

    return wrapped


@functools.cache
def install() -> None:
    """Makes Megatron-Core importable and runnable without CUDA, and its distributed optimizer without apex and transformer-engine.

    Repeated calls are free.

    Raises:
        RuntimeError: megatron.core was imported before; its modules may already hold unpatched names.
    """
    if has_cuda():
        _provide_fused_adam()
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_cord.parallel; import megatron_cord.parallel first"
        )
    # Megatron's jit_fuser is torch.compile, which wants a compiler for every small function; eager is right and starts at once.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _patch_devices()
    _patch_streams()
    _patch_generators()
    _patch_tensor_types()
    _patch_collectives()
    _patch_generators_of_megatron()
    _provide_fused_adam()


def _cpu_for_cuda(value: Any) -> Any:
    """CUDA devices become the CPU; everything else stays. Plain integers are CUDA ordinals only as a `device=` argument."""
    if isinstance(value, str) and value.startswith("cuda"):
        return _CPU
    if isinstance(value, torch.device) and value.type == "cuda":
        return _CPU
    return value


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            asked = kwargs["device"]
            kwargs["device"] = _CPU if isinstance(asked, int) else _cpu_for_cuda(asked)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinning needs CUDA's allocator
        return function(*args, **kwargs)

    return wrapper


def _patch_devices() -> None:
    # `with torch.device(...)` recognises factories by identity in a set that is filled on first use: it must hold the originals.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    tensor_to, module_to = torch.Tensor.to, torch.nn.Module.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return tensor_to(self, *(_cpu_for_cuda(a) for a in args), **kwargs)

    def to_module(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return module_to(self, *(_cpu_for_cuda(a) for a in args), **{k: _cpu_for_cuda(v) for k, v in kwargs.items()})

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.nn.Module.to = to_module  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign, assignment, misc]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign, assignment, misc]
    torch.Tensor.pin_memory = lambda self, *a, **k: self  # type: ignore[method-assign, assignment, misc]
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda *_: None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.empty_cache = lambda: None


class _InertStream:
    """A stream or event of a device that runs everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = record = record_event = wait = synchronize = wait_stream

    def query(self) -> bool:
        return True


def _patch_streams() -> None:
    @contextlib.contextmanager
    def stream_context(*_: Any) -> Iterator[None]:
        yield

    stream = _InertStream()
    torch.cuda.Stream = _InertStream  # type: ignore[misc, assignment]
    torch.cuda.Event = _InertStream  # type: ignore[misc, assignment]
    torch.cuda.stream = stream_context  # type: ignore[assignment]
    torch.cuda.current_stream = lambda *_: stream  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda *_: stream  # type: ignore[assignment, return-value]
    torch.Tensor.record_stream = lambda self, *_: None  # type: ignore[method-assign, assignment, misc]


def _patch_generators() -> None:
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed) and None  # type: ignore[assignment, func-returns-value]


def _patch_tensor_types() -> None:
    tensor_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        # Megatron's mixed-precision optimizer tells precisions apart by the names of CUDA's tensor types.
        return _CUDA_TYPES.get(answer, answer) if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _patch_collectives() -> None:
    barrier = torch.distributed.barrier

    @functools.wraps(barrier)
    def barrier_without_devices(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    torch.distributed.barrier = barrier_without_devices


def _patch_generators_of_megatron() -> None:
    """What can only be mended in Megatron's own module, which by now sees a patched torch."""
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()


def _provide_fused_adam() -> None:
    """Megatron takes transformer-engine's FusedAdam, else apex's; with neither, torch's AdamW, whose states its own checkpoints cannot restore."""
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
    from megatron.core import optimizer

    from megatron_cord.parallel.fused_adam import FusedAdam

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed_optimizer.HAVE_APEX_OR_TE = distributed_optimizer.USING_APEX_OPTIMIZER = True
