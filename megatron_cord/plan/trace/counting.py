"""A torch mode that runs code for its shapes alone and counts what the code would have taken.

Floating-point tensors are fake: they have shapes, types and storages of a size, but no memory and no numbers. Integers,
masks of integers and numbers given as Python values stay real, so that lengths and row boundaries are exact. A
number that is read from a fake tensor is 1, ``any`` of fake masks is False and ``all`` is True: losses are finite and
nothing is refused. Collectives return at once; each is noted with its group.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_cord.errors import CordError
from megatron_cord.plan.trace.records import Collective, PhaseTrace
from megatron_cord.runtime.autograd import in_backward_pass

aten = torch.ops.aten

#: c10d's operations: the kind, the argument that holds the process group, and where the whole message is: in argument
#: 0 or 1, or in one of them times the number of ranks.
_COLLECTIVES: Mapping[str, tuple[str, int, int, bool]] = {
    "allreduce_": ("all_reduce", 1, 0, False),
    "allreduce_coalesced_": ("all_reduce", 1, 0, False),
    "allgather_": ("all_gather", 2, 1, True),
    "_allgather_base_": ("all_gather", 2, 0, False),
    "allgather_into_tensor_coalesced_": ("all_gather", 2, 0, False),
    "reduce_scatter_": ("reduce_scatter", 2, 0, True),
    "_reduce_scatter_base_": ("reduce_scatter", 2, 1, False),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 2, 1, False),
    "alltoall_base_": ("all_to_all", 2, 1, False),
    "broadcast_": ("broadcast", 1, 0, False),
    "reduce_": ("reduce", 1, 0, False),
    "send": ("send", 1, 0, False),
    "recv_": ("receive", 1, 0, False),
}
#: those that return their work alone; the others return their outputs too
_WORK_ALONE = {"send", "recv_", "reduce_", "barrier", "alltoall_base_"} | {
    name for name in _COLLECTIVES if "coalesced" in name
}


@dataclass
class _Phase:
    """What a phase has come to so far."""

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    peak: int = 0
    grown: int = 0
    calls: Counter[tuple[str, str, int, bool]] = field(default_factory=Counter)
    nbytes: Counter[tuple[str, str, int, bool]] = field(default_factory=Counter)

    def result(self) -> PhaseTrace:
        """Return it as a record."""
        collectives = tuple(Collective(*key, self.calls[key], self.nbytes[key]) for key in sorted(self.calls))
        return PhaseTrace(self.forward_flops, self.backward_flops, self.peak, self.grown, collectives)


class CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run on fake tensors and count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.bytes = 0  #: that exist now
        self.groups: dict[str, str] = {}  #: by the name of a process group, what it is called in the result
        #: names of the groups that carry gradients alone
        self.gradient_groups: set[str] = set()
        self._received: tuple[Iterator[Sequence[int]], Iterator[Sequence[int]]] = (iter(()), iter(()))
        self._phases: dict[str, _Phase] = {}
        self._phase = self._phases.setdefault("rest", _Phase())
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def expect(self, activations: Sequence[Sequence[int]], gradients: Sequence[Sequence[int]]) -> None:
        """Say what other pipeline stages send next, in order: shapes [S, B, H]."""
        self._received = (iter(activations), iter(gradients))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count to a phase, which may be entered again."""
        outer, self._phase = self._phase, self._phases.setdefault(name, _Phase())
        self._phase.peak = max(self._phase.peak, self.bytes)
        before = self.bytes
        try:
            yield
        finally:
            self._phase.grown += self.bytes - before
            self._phase = outer
            outer.peak = max(outer.peak, self.bytes)

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, counted to a phase."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return counted

    def restart(self) -> None:
        """Forget what was counted; what exists is still known."""
        self._phases.clear()
        self._phase = self._phases.setdefault("rest", _Phase(peak=self.bytes))

    def results(self) -> dict[str, PhaseTrace]:
        """Return what each phase came to."""
        return {name: phase.result() for name, phase in self._phases.items()}

    def add_flops(self, operations: float) -> None:
        """Count operations of the pass that runs now."""
        if in_backward_pass():
            self._phase.backward_flops += operations
        else:
            self._phase.forward_flops += operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._communicate(func, args)
        if func.namespace == "profiler":  # names of phases
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        faked = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        out = self._run_fake(func, args, kwargs) if faked else self._run_real(func, args, kwargs, tensors)
        for tensor in (out,) if isinstance(out, Tensor) else out if isinstance(out, list | tuple) else ():
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if faked:
            self._count(func, args, kwargs, out)
        return out

    def _run_real(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run for numbers; without a tensor to start from, floating-point numbers are not made.

        Sparse tensors without entries, which have no storage, are real.
        """
        if not tensors and kwargs.get("layout") in (None, torch.strided):
            with self.fake:
                out = func(*args, **kwargs)
            if isinstance(out, Tensor) and out.is_floating_point() and out.dim():
                return out
        return func(*args, **kwargs)

    def _run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run for shapes."""
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if packet in (aten.any, aten.all) and func._schema.returns[0].alias_info is None:
            with self.fake:
                shape = func(*args, **kwargs).shape
            return torch.full(shape, packet is aten.all)
        if packet is aten.masked_select and not isinstance(args[1], FakeTensor):
            where = args[1].expand(args[0].shape).nonzero().unbind(1)
            with self.fake:
                return args[0][where]
        if func._schema.is_mutable and func._schema.arguments[0].alias_info is not None:
            written = args[0]
            if isinstance(written, Tensor) and not isinstance(written, FakeTensor):
                return written  # its numbers would come from fake ones
        if packet in (aten.index, aten.index_put, aten.index_put_):
            rows = _as_rows(args[1])
            if rows is None:
                if packet is aten.index:
                    raise CordError(
                        "trace: code chooses rows by numbers that only a real step computes, so their count is unknown"
                    )
                return args[0]
            args = (args[0], rows, *args[2:])
        with self.fake:
            return func(*args, **kwargs)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func.overloadpacket
        if packet in _ATTENTION:
            self.add_flops(_ATTENTION[packet](args, kwargs))
        elif packet in flop_registry:
            self.add_flops(flop_registry[packet](*args, **kwargs, out_val=out))

    def _note(self, tensor: Tensor) -> None:
        """Count a storage that is new, until it is freed."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if hasattr(storage, "is_counted"):
            return
        storage.is_counted = True  # type: ignore[attr-defined]
        size = storage.nbytes()
        self.bytes += size
        self._phase.peak = max(self._phase.peak, self.bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size

    def _communicate(self, func: Any, args: Any) -> Any:
        name = func.overloadpacket.__name__
        if name != "barrier":
            if name not in _COLLECTIVES:
                raise CordError(f"trace: torch.distributed's {name} is not counted; report it with the configuration")
            kind, where, message, times = _COLLECTIVES[name]
            group = ProcessGroup.unbox(args[where])
            ranks = group.size()
            size = sum(t.numel() * t.element_size() for t in tree_leaves(args[message])) * (ranks if times else 1)
            if ranks > 1:
                key = (kind, self.groups.get(group.group_name, "other"), ranks, in_backward_pass())
                self._phase.calls[key] += 1
                self._phase.nbytes[key] += size
            self._answer(name, args)
        work = FakeWork().boxed()
        return work if name in _WORK_ALONE else (args[0], work)

    def _is_gradient(self, group: ProcessGroup, sender: int) -> bool:
        """Return whether a message is a gradient: by its group, or without interleaved stages from the next rank."""
        return group.group_name in self.gradient_groups if self.gradient_groups else sender > group.rank()

    def _answer(self, name: str, args: Any) -> None:
        """Write real outputs: every other rank counts what this one does; stages are sent shapes."""
        if name == "recv_":
            (received,) = args[0]
            if not received.is_floating_point():
                is_gradient = self._is_gradient(ProcessGroup.unbox(args[1]), args[2])
                received.copy_(torch.tensor(next(self._received[is_gradient])))
        elif name == "allgather_":
            for outputs, mine in zip(args[0], args[1], strict=True):
                if not isinstance(mine, FakeTensor):
                    for output in outputs:
                        if not isinstance(output, FakeTensor):
                            output.copy_(mine)
        elif name == "_allgather_base_" and not isinstance(args[0], FakeTensor):
            args[0].view(-1, *args[1].shape).copy_(args[1])


def _as_rows(indices: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """Return indices with real masks made numbers; None if a mask is fake."""
    rows: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            rows.append(index)
        elif isinstance(index, FakeTensor):
            return None
        else:
            rows += index.nonzero().unbind(1)
    return rows


def _attention(query: Tensor, key: Tensor, is_causal: bool) -> float:
    """Return the operations of softmax(Q Kᵀ) V, [B, heads, S, D]: under the causal mask half of them."""
    batch, heads, rows, width = query.shape
    return 4.0 * batch * heads * rows * key.shape[2] * width / (2 if is_causal else 1)


def _forward_attention(args: Any, kwargs: Any) -> float:
    causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
    return _attention(args[0], args[1], causal)


def _backward_attention(args: Any, kwargs: Any) -> float:
    """Return those of four gradients, twice the forward pass's; kernels that form the scores again take a half more."""
    causal = args[7] if len(args) > 7 else kwargs.get("is_causal", False)
    return 2 * _attention(args[1], args[2], causal)


_ATTENTION: Mapping[Any, Callable[[Any, Any], float]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_attention,
}
