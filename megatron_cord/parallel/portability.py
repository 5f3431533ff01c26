"""The one place where the device differs: `install` makes Megatron-Core run on machines without CUDA.

Megatron-Core names CUDA devices, streams and generators. Without CUDA, `install` maps devices to the CPU, makes streams
and events inert, and routes the CUDA random generator's calls to the CPU's generator. With CUDA it does none of this.
On both, where neither apex nor transformer-engine has its fused optimizer, it provides that optimizer's contract
on plain torch. What runs on CPUs this way tests numerics and the logic of communication on gloo, but not streams,
overlap, NCCL or transformer-engine's kernels.

Simplifications: a global patch of torch, made once per process before megatron.core is imported (importing
`megatron_cord.parallel` does it); `torch.cuda.is_available()` stays False, so that libraries which test it take their
CPU path.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.utils._device import _device_constructors

from megatron_cord.errors import CordError

DEVICES = Path("/dev")  #: where the driver shows a machine's GPUs, whatever torch can use
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
    """Return whether this process computes on CUDA devices."""
    return torch.cuda.is_available()


def refuse_idle_gpus() -> None:
    """Refuse to compute on the CPU of a machine that has GPUs, unless an empty CUDA_VISIBLE_DEVICES asks for that.

    Raises:
        CordError: /dev has a GPU that torch cannot use.
    """
    gpus = sorted(DEVICES.glob("nvidia[0-9]*"))
    if not gpus or has_cuda() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    reason = (
        f"is built for CUDA {torch.version.cuda} but cannot use it (compare the driver's version in nvidia-smi)"
        if torch.version.cuda
        else "is a build without CUDA: make setup-cuda installs the other one"
    )
    raise CordError(
        f"this machine has {gpus[0]}, but torch {torch.__version__} {reason}; to compute on CPUs, set "
        "CUDA_VISIBLE_DEVICES= (empty)"
    )


def device() -> torch.device:
    """Return the device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def device_name() -> str:
    """Return the name of the device that this process computes on."""
    return torch.cuda.get_device_name() if has_cuda() else "CPU"


def backend() -> str:
    """Return the torch.distributed backend for the device."""
    return "nccl" if has_cuda() else "gloo"


def needs_gloo_groups() -> bool:
    """Return whether Megatron-Core shall make gloo groups beside its others, for optimizer states on the host.

    None of its calls here uses them, and on CUDA they would meet over network interfaces of their own, a common failure
    on several machines. Without CUDA they stay: all groups are gloo's.
    """
    return not has_cuda()


def has_transformer_engine() -> bool:
    """Return whether transformer-engine's layers can be used: it is installed, and its kernels have a GPU."""
    from megatron.core.extensions import transformer_engine

    return has_cuda() and bool(transformer_engine.HAVE_TE)


def on_own_stream(target: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """Wrap ``work`` for another thread, in the thread that queued what the work depends on.

    On CUDA it computes on a stream of its own, after everything that the calling thread has queued so far, and returns
    when it is done.
    """
    if target.type != "cuda":
        return work
    queued = torch.cuda.current_stream(target).record_event()

    def wrapped() -> None:
        with torch.cuda.device(target), torch.cuda.stream(torch.cuda.Stream(target)):  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(target)
            stream.wait_event(queued)
            work()
            stream.synchronize()

    return wrapped


def mark_stream() -> Any:
    """Return a mark behind everything that this thread has queued on its stream, for `wait_for_mark` elsewhere."""
    return torch.cuda.current_stream().record_event() if has_cuda() else None


def wait_for_mark(mark: Any) -> None:
    """Let what this thread queues from now on begin after the mark, without blocking the host; None is no mark."""
    if mark is not None:
        torch.cuda.current_stream().wait_event(mark)


@functools.cache
def install() -> None:
    """Make Megatron-Core run without CUDA, and its distributed optimizer without apex and transformer-engine.

    Repeated calls do nothing.

    Raises:
        RuntimeError: megatron.core was imported before, so that its modules may already hold unpatched names.
    """
    _share_gloo_threads()
    if has_cuda():
        _provide_fused_adam()
        _complete_router()
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_cord.parallel; import megatron_cord.parallel first"
        )
    # Megatron's jit_fuser is torch.compile, which calls a compiler for every small function; eager starts at once.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _patch_devices()
    _patch_streams()
    _patch_generators()
    _patch_tensor_types()
    _patch_collectives()
    _patch_generators_of_megatron()
    _provide_fused_adam()
    _complete_router()


def _cpu_for_cuda(value: Any) -> Any:
    """Return the CPU for CUDA devices, else the value. Plain integers are CUDA ordinals only as `device=` arguments."""
    if isinstance(value, str) and value.startswith("cuda"):
        return _CPU
    if isinstance(value, torch.device) and value.type == "cuda":
        return _CPU
    return value


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            device = kwargs["device"]
            kwargs["device"] = _CPU if isinstance(device, int) else _cpu_for_cuda(device)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinning needs CUDA's allocator
        return function(*args, **kwargs)

    return wrapper


def _replace(owner: object, **replacements: object) -> None:
    """Replace attributes of a class or a module."""
    for name, value in replacements.items():
        setattr(owner, name, value)


def _patch_devices() -> None:
    # `with torch.device(...)` recognises factories by identity in a set that is filled on first use: the originals.
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

    _replace(torch.Tensor, to=to, cuda=lambda self, *_, **__: self, pin_memory=lambda self, *_, **__: self)
    _replace(torch.nn.Module, to=to_module, cuda=lambda self, *_, **__: self)
    _replace(
        torch.cuda,
        current_device=lambda: _CPU,
        set_device=lambda *_: None,
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
    )


class _InertStream:
    """A stream or event of a device that runs everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = record = wait = synchronize = wait_stream

    def record_event(self, *_: Any) -> _InertStream:
        return self

    def query(self) -> bool:
        return True


class _HostEvent(_InertStream):
    """An event whose work is done as soon as it is recorded: it keeps the host's clock."""

    def record(self, *_: Any) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        """Return milliseconds, as CUDA's events do."""
        return 1000 * (end._seconds - self._seconds)


def _patch_streams() -> None:
    @contextlib.contextmanager
    def stream_context(*_: Any) -> Iterator[None]:
        yield

    stream = _InertStream()
    _replace(
        torch.cuda,
        Stream=_InertStream,
        Event=_HostEvent,
        stream=stream_context,
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
    )
    _replace(torch.Tensor, record_stream=lambda self, *_: None)


def _patch_generators() -> None:
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    _replace(
        torch.cuda,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        manual_seed=manual_seed,
    )


def _patch_tensor_types() -> None:
    tensor_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        # Megatron's mixed-precision optimizer distinguishes precisions by the names of CUDA's tensor types.
        return _CUDA_TYPES.get(result, result) if isinstance(result, str) else result

    _replace(torch.Tensor, type=type_)


def _patch_collectives() -> None:
    barrier = torch.distributed.barrier

    @functools.wraps(barrier)
    def barrier_without_devices(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    all_to_all = torch.distributed.all_to_all_single

    @functools.wraps(all_to_all)
    def all_to_all_of_numbers(*args: Any, **kwargs: Any) -> Any:
        # Megatron copies the sizes of what experts get to the host, where they become numbers, only from a GPU.
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return all_to_all(*args, **kwargs)

    _replace(torch.distributed, barrier=barrier_without_devices, all_to_all_single=all_to_all_of_numbers)


def _patch_generators_of_megatron() -> None:
    """Patch what exists only in Megatron's own module, which imports the patched torch."""
    from megatron.core.tensor_parallel import random

    _replace(
        random,
        _set_cuda_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        _get_cuda_rng_state=lambda *_, **__: torch.get_rng_state(),
    )


def _complete_router() -> None:
    """Define the name that Megatron's router looks up, and lacks, where transformer-engine is not installed."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _share_gloo_threads() -> None:
    """Let all gloo groups of a process share the first one's network devices.

    A device has a thread that polls a hundred times a second, and torch gives every group one of its own. Megatron
    makes about two dozen groups a rank, whose threads then take the cores of a small machine from the computation.
    """
    devices: dict[int, list[Any]] = {}  # by process: a fork inherits the list, not the threads

    class SharedProcessGroupGloo(distributed_c10d.ProcessGroupGloo):
        """A gloo group on the process's devices."""

        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            shared = devices.get(os.getpid())
            if shared is None:
                super().__init__(store, rank, size, timeout=timeout)
                devices[os.getpid()] = self.options._devices  # type: ignore[attr-defined]
                return
            options: Any = self._Options()  # type: ignore[attr-defined]
            options._devices, options._threads, options._timeout = shared, 2 * len(shared), timeout
            super().__init__(store, rank, size, options)

    _replace(distributed_c10d, ProcessGroupGloo=SharedProcessGroupGloo)


def _provide_fused_adam() -> None:
    """Give Megatron a FusedAdam where neither transformer-engine nor apex has one.

    It would take torch's AdamW, whose states its own checkpoints cannot restore.
    """
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
    from megatron.core import optimizer

    from megatron_cord.parallel.fused_adam import FusedAdam

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed_optimizer.HAVE_APEX_OR_TE = distributed_optimizer.USING_APEX_OPTIMIZER = True
