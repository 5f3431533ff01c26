"""The rules of CUDA and NCCL as two torch modes.

`PythonView` is what Python code sees: ``device``, ``is_cuda``, ``to``, factories. `Operators` sees every operator,
those of the autograd engine too, and refuses what CUDA and NCCL refuse: an operator on a host and a device tensor, a
host tensor in a collective of NCCL, NumPy's view of device memory, memory that work queued on another stream, or a copy
that was not waited for, still uses, the device in a forked process. Both count what makes the host wait.

Modes are per thread, and so is their state; `machine.install` enters them in every thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend_gpu.memory import (
    earlier_uses,
    hosts_of,
    is_pinned,
    lies_on_device,
    named_device,
    note_use,
    pin,
    place,
    storage_of,
    tensors_of,
)
from tests.pretend_gpu.record import RECORD
from tests.pretend_gpu.streams import current_stream, wait_for_current_stream

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
#: Operators that take host and device tensors together on real CUDA.
_MIXED = {"copy_", "_to_copy", "lift_fresh", "set_", "_foreach_copy_", "detach", "alias", "resize_", "record_stream"}
#: Operators whose result's size, or whose Python value, is read from the device.
_WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("is_nonzero", "equal", "bincount", "histc", "_pack_padded_sequence"),
}
_WITHOUT_MEMORY = {"detach", "alias", "lift_fresh", "set_", "resize_"}  #: neither read nor written here
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
#: Names of groups that were made with the backend gloo, which take host tensors.
host_groups: set[str] = set()


class _State(threading.local):
    """Of one thread's modes."""

    factories_on_device = False  #: where an operator without tensors puts what it makes
    moving_to: bool | None = None  #: where `_to_copy` puts its result, in a call of Tensor.to
    inside_distributed = False  #: gloo's own copies are not NCCL's
    views_early = False  #: whether NumPy's view may be taken of memory that is still copied to


_state = _State()


@contextlib.contextmanager
def _with(**values: Any) -> Iterator[None]:
    before = {name: getattr(_state, name) for name in values}
    vars(_state).update(values)
    try:
        yield
    finally:
        vars(_state).update(before)


def factories_on_device() -> contextlib.AbstractContextManager[None]:
    """Let operators without tensors make device tensors, as the autograd engine's do."""
    return _with(factories_on_device=True)


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Put this thread under the rules."""
    with PythonView(), Operators():  # type: ignore[no-untyped-call]
        yield


def early_views() -> contextlib.AbstractContextManager[None]:
    """Let NumPy's view be taken of host memory that a queued copy still writes; what reads it then is not seen."""
    return _with(views_early=True)


class PythonView(TorchFunctionMode):
    """What Python sees of marked tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__":
            return self._property(func, args)
        if first is not None and first.device.type != "cpu":
            return func(*args, **kwargs)
        special = getattr(self, f"_{name.strip('_')}", None) if first is not None else None
        if special is not None and name in _METHODS:
            answer = special(func, first, args, kwargs)
            if answer is not NotImplemented:
                return answer
        if name in ("mm", "addmm") and "out_dtype" in kwargs:
            return _low_precision(name, args, kwargs)
        if name == "histc" and first is not None and lies_on_device(first) and not first.is_floating_point():
            # CUDA counts whole numbers, the CPU does not.
            return self._call(func, name, (first.float(), *args[1:]), kwargs).to(first.dtype)
        return self._call(func, name, args, kwargs)

    def _call(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function, with what it makes placed where its arguments say."""
        asked = named_device(kwargs.get("device"))
        if asked is not None:
            kwargs["device"] = CPU
        pinned = kwargs.pop("pin_memory", False)
        given = tensors_of(args, kwargs)
        if (getattr(func, "__module__", "") or "").startswith("torch.distributed"):
            with _with(inside_distributed=True):
                return func(*args, **kwargs)
        if asked and name in ("tensor", "as_tensor") and not given:
            RECORD.wait(f"torch.{name}(…, device=cuda): a copy from pageable memory")
        if name == "new_tensor" and given and lies_on_device(given[0]):
            RECORD.wait("new_tensor: a copy from pageable memory")
        with _with(factories_on_device=any(map(lies_on_device, given)) if asked is None else asked):
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not any(out is tensor for tensor in given):
            if asked is not None:
                shared = any(storage_of(out) is storage_of(tensor) for tensor in given)
                out = out.clone() if shared and name == "as_tensor" and asked != lies_on_device(given[0]) else out
                place(out, on_device=asked)
            if pinned:
                pin(out)
        return out

    @staticmethod
    def _property(func: Callable[..., Any], args: Sequence[Any]) -> Any:
        name, tensor = getattr(getattr(func, "__self__", None), "__name__", ""), args[0]
        if name not in ("device", "is_cuda", "is_cpu") or not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            return func(*args)
        on_device = lies_on_device(tensor)
        return {"device": GPU if on_device else CPU, "is_cuda": on_device, "is_cpu": not on_device}[name]

    # The methods of `_METHODS`, each (func, tensor, args, kwargs); NotImplemented leaves the call to torch.

    @staticmethod
    def _type(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1 or kwargs:
            return NotImplemented
        return _TYPES.get(func(tensor), func(tensor)) if lies_on_device(tensor) else func(tensor)

    @staticmethod
    def _get_device(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return 0 if lies_on_device(tensor) else -1

    @staticmethod
    def _numpy(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if lies_on_device(tensor):
            RECORD.fault("TypeError: can't convert cuda:0 device type tensor to numpy")
        if not _state.views_early:
            _check_host_use(tensor, writes=False)
        return NotImplemented

    _array = _numpy

    @staticmethod
    def _tolist(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if lies_on_device(tensor):
            wait_for_current_stream("tolist")
        _check_host_use(tensor, writes=False)
        return NotImplemented

    @staticmethod
    def _pin_memory(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if lies_on_device(tensor):
            RECORD.fault("RuntimeError: cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
        pinned = tensor if is_pinned(tensor) else tensor.clone()
        pin(pinned)
        return pinned

    @staticmethod
    def _is_pinned(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return is_pinned(tensor)

    @staticmethod
    def _repeat_interleave(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        counted = len(args) < 2 or isinstance(args[1], Tensor)
        if counted and lies_on_device(tensor) and kwargs.get("output_size") is None:
            RECORD.wait("repeat_interleave without output_size")
        return NotImplemented

    @staticmethod
    def _cuda(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return _moved(tensor, True, tensor.dtype, non_blocking=bool(kwargs.get("non_blocking")), copy=False)

    @staticmethod
    def _cpu(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return _moved(tensor, False, tensor.dtype, non_blocking=False, copy=False)

    @staticmethod
    def _to(func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        target, dtype = named_device(kwargs.get("device")), kwargs.get("dtype")
        flags = []
        for argument in args[1:]:
            if isinstance(argument, Tensor):
                target, dtype = lies_on_device(argument), argument.dtype
            elif isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, bool):
                flags.append(argument)
            elif argument is not None:
                target = named_device(argument)
                if target is None:
                    return NotImplemented  # meta
        if named_device(kwargs.get("device")) is None and kwargs.get("device") is not None:
            return NotImplemented
        return _moved(
            tensor,
            lies_on_device(tensor) if target is None else target,
            dtype or tensor.dtype,
            non_blocking=bool(kwargs.get("non_blocking", flags[0] if flags else False)),
            copy=bool(kwargs.get("copy", flags[1] if len(flags) > 1 else False)),
        )


_METHODS = {
    *("type", "get_device", "numpy", "__array__", "tolist", "pin_memory", "is_pinned", "repeat_interleave"),
    *("cuda", "cpu", "to"),
}


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the operators are given."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        given = tensors_of(args, kwargs)
        if any(tensor.device.type != "cpu" for tensor in given):
            return func(*args, **kwargs)
        if namespace == "c10d":
            _check_collective(name, given, (args, kwargs))
            _use_on_device([tensor for tensor in given if lies_on_device(tensor)], _received(name, args))
            return func(*args, **kwargs)
        on_device = [lies_on_device(tensor) for tensor in given]
        if any(on_device):
            _check_mixture(func, name, given, args, on_device)
            if name in _WAITING or (name in _INDEXING and _reads_mask(name, args)):
                wait_for_current_stream({"_local_scalar_dense": "item, bool, int or float"}.get(name, name))
        written = _written(func, args, kwargs)
        if name == "copy_" and on_device[0] != on_device[1]:
            non_blocking = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
            host, device = (given[1], given[0]) if on_device[0] else (given[0], given[1])
            _copy(host, device, to_device=on_device[0], non_blocking=non_blocking)
        elif (
            not func.is_view and name not in _WITHOUT_MEMORY and not (name == "_to_copy" and _changes_place(on_device))
        ):
            _use_on_device([t for t, there in zip(given, on_device, strict=True) if there], written)
            for tensor, there in zip(given, on_device, strict=True):
                if not there:
                    _check_host_use(tensor, writes=any(tensor is other for other in written))
        out = func(*args, **kwargs)
        where = any(on_device) if given else _state.factories_on_device
        if name == "_to_copy" and _state.moving_to is not None:
            where = _state.moving_to
        storages = [storage_of(tensor) for tensor in given]
        for made in tensors_of(out):
            storage = storage_of(made)
            if storage is not None and not any(storage is other for other in storages):
                storage.on_device = where
                if where:
                    note_use(made, current_stream().queue(), writes=True)
        return out


def _changes_place(on_device: list[bool]) -> bool:
    """Return whether a call of Tensor.to moves its tensor, which `_moved` then queues as a copy."""
    return _state.moving_to is not None and _state.moving_to != on_device[0]


def _check_mixture(func: Any, name: str, given: list[Tensor], args: Sequence[Any], on_device: list[bool]) -> None:
    """Refuse host and device tensors in one operator; device tensors in a process that was forked."""
    if os.getpid() != RECORD.pid:
        RECORD.fault(f"RuntimeError: {func._schema.name} on a device tensor: cannot use CUDA in a forked subprocess")
    if all(on_device) or name in _MIXED:
        return
    hosts = list(hosts_of(given))
    if hosts and name in _INDEXING and on_device[0]:
        wait_for_current_stream("index of a device tensor by a host tensor: a copy from pageable memory")
    elif hosts:
        shapes = [tuple(host.shape) for host in hosts]
        RECORD.fault(f"RuntimeError: {func._schema.name} on tensors of cuda:0 and of the cpu, {shapes}")


def _reads_mask(name: str, args: Sequence[Any]) -> bool:
    """Return whether an index is a mask, whose ones are counted; a scalar put by a mask is a masked_fill."""
    if not any(index.dtype in (torch.bool, torch.uint8) for index in tensors_of(args[1:2])):
        return False
    return name == "index" or not (isinstance(args[2], Tensor) and args[2].numel() == 1 and not lies_on_device(args[2]))


def _check_collective(name: str, given: list[Tensor], arguments: Any) -> None:
    """Refuse host tensors in NCCL's collectives and device tensors in those of groups of gloo."""
    leaves = torch.utils._pytree.tree_leaves(arguments)
    groups = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())]
    names = [dist.ProcessGroup.unbox(group).group_name for group in groups]
    takes_hosts = any(name in host_groups for name in names)
    for tensor in given:
        if tensor.numel() and name != "barrier" and lies_on_device(tensor) == takes_hosts:
            backend, kind = ("gloo", "device") if takes_hosts else ("NCCL", "host")
            RECORD.fault(f"{backend} {name} of a {kind} tensor {tuple(tensor.shape)} {tensor.dtype}")


def _use_on_device(used: list[Tensor], written: list[Tensor]) -> None:
    """Queue work on device tensors, behind earlier uses of their memory or refused."""
    if not used:
        return
    for tensor in used:
        writes = any(tensor is other for other in written)
        if not all(moment.is_before_next for moment in earlier_uses(tensor, writes=writes)):
            RECORD.fault(f"a race: another stream still uses {tuple(tensor.shape)}; this one has not waited for it")
    moment = current_stream().queue()
    for tensor in used:
        note_use(tensor, moment, writes=any(tensor is other for other in written))


def _received(name: str, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that a collective writes: all, or its first argument, where it has outputs of their own."""
    if name == "send":
        return []
    return tensors_of(args[:1]) if "gather" in name or "scatter" in name or "alltoall" in name else tensors_of(args)


def _check_host_use(tensor: Tensor, *, writes: bool) -> None:
    """Refuse host memory that a queued copy still writes or, to be written, that one still reads."""
    if not all(moment.is_done for moment in earlier_uses(tensor, writes=writes)):
        RECORD.fault(f"a race: host memory {tuple(tensor.shape)} is used before the host waited for its copy")


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes to."""
    named = [
        kwargs.get(argument.name) if argument.kwarg_only else args[place] if place < len(args) else None
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tensors_of(named)


def _copy(host: Tensor, device: Tensor, *, to_device: bool, non_blocking: bool) -> None:
    """Queue a copy; the host waits for it unless it is non-blocking and from or to pinned memory."""
    if _state.inside_distributed or (to_device and host.dim() == 0):
        return  # a number as an argument of a kernel
    waits = not (non_blocking and is_pinned(host))
    if waits:
        _check_host_use(host, writes=not to_device)
    elif not all(moment.is_before_next for moment in earlier_uses(host, writes=not to_device)):
        RECORD.fault(f"a race: two streams copy host memory {tuple(host.shape)} without a wait between them")
    _use_on_device([device], [device] if to_device else [])
    if waits:
        where = "pinned" if is_pinned(host) else "pageable"
        wait_for_current_stream(f"copy {'to' if to_device else 'from'} the device, {where} memory")
    else:
        note_use(host, current_stream().queue(), writes=not to_device)


def _moved(tensor: Tensor, target: bool, dtype: torch.dtype, *, non_blocking: bool, copy: bool) -> Tensor:
    """Return what Tensor.to returns."""
    here = lies_on_device(tensor)
    if target == here and dtype == tensor.dtype:
        return tensor.clone() if copy else tensor
    with _with(moving_to=target):
        moved: Tensor = torch.ops.aten._to_copy.default(tensor, dtype=dtype)
    if target != here:
        if here and non_blocking:
            pin(moved)  # as torch does with memory that it copies to without blocking
        host, device = (tensor, moved) if target else (moved, tensor)
        _copy(host, device, to_device=target, non_blocking=non_blocking)
    return moved


def _low_precision(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Compute products with ``out_dtype``, which torch has on CUDA alone."""
    dtype, out = kwargs.pop("out_dtype"), kwargs.pop("out", None)
    if not all(lies_on_device(tensor) for tensor in tensors_of(args)):
        RECORD.fault(f"RuntimeError: {name} with out_dtype of host tensors")
    if out is not None and out.dtype != dtype:
        RECORD.fault(f"RuntimeError: {name} into {out.dtype}, but out_dtype is {dtype}")
    result: Tensor = getattr(torch, name)(*(a.to(dtype) if isinstance(a, Tensor) else a for a in args), **kwargs)
    place(result, on_device=True)
    return result if out is None else out.copy_(result)
