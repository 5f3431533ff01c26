"""The distributed optimizer's states for a checkpoint: every tensor whole on one rank, and almost nothing moved for it.

The optimizer cuts a buffer of all parameters into equal slices, one a data-parallel rank, so most tensors lie whole in
one slice. Megatron gathers all slices on all ranks nevertheless: a copy of the fp32 weights on every device and of all
states on every host. Here a tensor that lies in one slice is described where it lies; of one that several slices share,
the pieces go to the rank of them that has least to write so far, portion by portion, into its host memory. What is
written, and how it is read, is Megatron's `fully_reshardable` format.

Legend: P elements of a parameter on this model-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_cord.parallel import portability

PORTION = 2**25  #: elements that a rank receives at a time: all device memory that this takes, as fp32

Pieces = Mapping[int, tuple[int, int]]  #: by data-parallel rank, which of P elements lie in its slice: [start, end)


class StatesInPlace(DistributedOptimizer):  # type: ignore[misc]
    """Megatron's distributed optimizer, but it describes its states for a checkpoint without gathering them."""

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> Any:
        """Return, by the parameter's number, descriptions of its states; when saving, of those this rank writes.

        Collective over the data-parallel ranks.
        """
        if is_loading:
            return super().sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)
        weights, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        described = {id(leaf.data): leaf for leaf in nested_values(weights)}
        group = self.data_parallel_group
        to_write = [0] * group.size()
        states: dict[int, dict[str, Any]] = {}
        for number, (parameter, pieces) in enumerate(self._pieces()):
            owner = min(pieces, key=lambda rank: to_write[rank])
            to_write[owner] += parameter.numel()
            if group.rank() not in pieces:
                continue
            own = self._get_main_param_and_optimizer_states(parameter)
            leaf, states_here = described[id(parameter)], {}
            for name in sorted(own.keys() - {"step"}):
                whole = collect(own[name].detach(), pieces, owner, group)
                if whole is not None:
                    changed: dict[str, Any] = {
                        "key": f"optimizer.state.{name}.{leaf.key}",
                        "data": whole.reshape(leaf.data.shape),
                    }
                    if not isinstance(leaf, ShardedTensorFactory):
                        changed["dtype"] = whole.dtype
                    states_here[name] = replace(leaf, replica_id=(*leaf.replica_id[:-1], 0), **changed)
            if states_here:
                states[number] = states_here
        return states

    def _pieces(self) -> Iterator[tuple[torch.nn.Parameter, Pieces]]:
        """Yield all parameters in the order that Megatron numbers them in, the same on all data-parallel ranks."""
        for buffer in self.buffers:
            for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
                bucket = buffer.buckets[bucket_id]
                slice_size = bucket.grad_data.numel() // self.data_parallel_group.size()
                first, last = start - bucket.offset, end - bucket.offset
                yield (
                    parameter,
                    {
                        rank: (max(first, rank * slice_size) - first, min(last, (rank + 1) * slice_size) - first)
                        for rank in range(first // slice_size, (last - 1) // slice_size + 1)
                    },
                )


def collect(piece: Tensor, pieces: Pieces, owner: int, group: dist.ProcessGroup) -> Tensor | None:
    """Return a state's P elements in fp32 on the rank that writes it, None on others. Collective over `pieces`.

    Args:
        piece: what this rank has of it.
        pieces: the ranks' parts of the tensors.
        owner: the rank of the group that writes it.
        group: the data-parallel ranks.
    """
    if len(pieces) == 1:
        return piece.float()
    rank, device = group.rank(), portability.device()
    whole = torch.empty(max(end for _, end in pieces.values()), dtype=torch.float32) if rank == owner else None
    for source, (first, last) in pieces.items():
        if source == owner and whole is not None:
            whole[first:last].copy_(piece)
        elif source != owner and rank in (source, owner):
            for start in range(first, last, PORTION):
                end = min(start + PORTION, last)
                if whole is None:
                    portion = piece[start - first : end - first].to(device, torch.float32).contiguous()
                    _exchange(dist.isend, portion, owner, group)
                else:
                    portion = torch.empty(end - start, dtype=torch.float32, device=device)
                    _exchange(dist.irecv, portion, source, group)
                    whole[start:end].copy_(portion)
    return whole


def _exchange(operation: Any, portion: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Send to, or receive from, a rank of the group; in a batch, which takes the communicator that NCCL has already."""
    peer = dist.get_global_rank(group, rank)
    for work in dist.batch_isend_irecv([dist.P2POp(operation, portion, peer, group)]):
        work.wait()


def describe_in_place(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimizers inside Megatron's wrappers describe their states without gathering them."""
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(wrapper) is DistributedOptimizer:
            wrapper.__class__ = StatesInPlace
