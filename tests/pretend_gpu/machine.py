"""Makes this process believe in a GPU: torch.cuda's functions, the project's portability, process groups, threads.

To be called once, before megatron_cord.parallel is imported. Gloo plays NCCL. Not pretended: kernels (Triton runs in
its interpreter or not at all), transformer-engine, bfloat16 products as a GPU rounds them, memory and time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.pretend_gpu import streams
from tests.pretend_gpu.modes import GPU, PythonView, early_views, factories_on_device, host_groups, pretending
from tests.pretend_gpu.record import RECORD

_CUDA: dict[str, Any] = {
    "current_device": 0,
    "device_count": 1,
    "set_device": None,
    "empty_cache": None,
    "memory_allocated": 0,
    "memory_reserved": 0,
    "max_memory_allocated": 0,
    "reset_peak_memory_stats": None,
    "mem_get_info": (64 << 30, 80 << 30),
    "get_device_name": "a pretended GPU",
    "get_device_capability": (9, 0),
    "ipc_collect": None,
}


def install() -> None:
    """Pretend; from then on a thread is under the rules inside `modes.pretending`, and every new thread is."""
    if "megatron_cord.parallel" in sys.modules:
        raise RuntimeError("megatron_cord.parallel was imported before the machine was pretended")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's jit_fuser; compiled graphs would not be seen
    portability = _import_as_on_cuda()
    streams.install()
    portability._patch_generators()
    portability._patch_collectives()
    portability._patch_generators_of_megatron()
    replaced: dict[str, Any] = {
        "has_cuda": lambda: True,
        "backend": lambda: "gloo",
        "device": lambda: GPU,
        "has_transformer_engine": lambda: False,
        "refuse_idle_gpus": lambda: None,
    }
    for name, value in replaced.items():
        setattr(portability, name, value)
    for name, answer in _CUDA.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())  # noqa: B010
    _note_host_groups()
    _put_engine_on_device()
    _put_threads_under_rules()


def _import_as_on_cuda() -> Any:
    """Import portability so that its `install` takes CUDA's branch; the rest still finds no CUDA in torch."""
    real = torch.cuda.is_available
    setattr(torch.cuda, "is_available", lambda: True)  # noqa: B010
    try:
        from megatron_cord.parallel import portability
    finally:
        setattr(torch.cuda, "is_available", real)  # noqa: B010
    return portability


def _note_host_groups() -> None:
    new_group = dist.new_group

    def noting(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        if kwargs.get("backend") == "gloo" and isinstance(group, dist.ProcessGroup):
            host_groups.add(group.group_name)
        return group

    def object_device(group: Any = None) -> str:
        return "cpu" if group is not None and group.group_name in host_groups else "cuda:0"

    for owner, name, value in (
        (dist, "new_group", noting),
        (distributed_c10d, "new_group", noting),
        (distributed_c10d, "_get_object_coll_device", object_device),
    ):
        setattr(owner, name, value)


def _put_engine_on_device() -> None:
    """Let what the autograd engine makes lie on the device, and keep Python's view inside backward passes."""
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def on_device(*args: Any, **kwargs: Any) -> Any:
        with factories_on_device():
            return run_backward(*args, **kwargs)

    backward: Callable[..., None] = torch.autograd.backward

    def tensor_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)  # not as a method that modes take over: its backward passes would be outside

    node = torch.autograd.function.BackwardCFunction
    apply = node.apply

    def apply_in_view(self: Any, *args: Any) -> Any:
        with PythonView():
            return apply(self, *args)  # type: ignore[no-untyped-call]

    for owner, name, value in (
        (torch.autograd, "_engine_run_backward", on_device),
        (torch.Tensor, "backward", tensor_backward),
        (node, "apply", apply_in_view),
    ):
        setattr(owner, name, value)


def _put_threads_under_rules() -> None:
    start = threading.Thread.start

    def start_under_rules(self: threading.Thread) -> None:
        run = self.run

        def run_under_rules() -> None:
            with pretending():
                run()

        setattr(self, "run", run_under_rules)  # noqa: B010
        start(self)

    setattr(threading.Thread, "start", start_under_rules)  # noqa: B010


def observe_run() -> None:
    """Note the phases of a training run and its microbatches."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_cord.trainer.observability.watchdog import Watchdog
    from megatron_cord.trainer.step import step
    from megatron_cord.trainer.step.batching import batches

    begin, make, to_host = Watchdog.phase, batches.make_microbatches, token_dispatcher.maybe_move_tensor_to_cpu

    def phase(self: Watchdog, name: str, number: int) -> None:
        RECORD.begin(name, number)
        begin(self, name, number)

    def make_microbatches(*args: Any) -> Any:
        made = make(*args)
        RECORD.microbatches[RECORD.phase] += len(made)
        return made

    def count_to_host(*args: Any, **kwargs: Any) -> Any:
        with early_views():  # Megatron takes the view first, and waits for the copy before it reads
            return to_host(*args, **kwargs)

    replaced = (
        (Watchdog, "phase", phase),
        (step, "make_microbatches", make_microbatches),
        (token_dispatcher, "maybe_move_tensor_to_cpu", count_to_host),
    )
    for owner, name, value in replaced:
        setattr(owner, name, value)
