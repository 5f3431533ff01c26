"""Small plain values between ranks, as JSON: nothing that is received can execute code."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from megatron_cord.parallel import portability
from megatron_cord.parallel.transfers import to_device


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value, in rank order, on every rank. Collective over the group (None: all ranks).

    The values pass through JSON, on one rank too: tuples become lists, keys become strings.

    Raises:
        TypeError: a value that JSON cannot represent.
    """
    text = json.dumps(value)
    world = dist.get_world_size(group)
    if world == 1:
        return [json.loads(text)]
    device = portability.device()
    payload = to_device(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), device)
    sizes = torch.empty(world, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, sizes.new_full((1,), len(payload)), group=group)
    counts = sizes.tolist()  # the host waits here and below, not for each rank
    padded = torch.nn.functional.pad(payload, (0, max(counts) - len(payload)))
    gathered = torch.empty(world * max(counts), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    rows = gathered.cpu().view(world, -1).numpy()
    return [json.loads(bytes(row[:count])) for row, count in zip(rows, counts, strict=True)]


def broadcast_json(value: Any, source: int = 0) -> Any:
    """Return the value of the global rank `source` on every rank; other ranks' values are ignored. Collective."""
    return all_gather_json(value if dist.get_rank() == source else None)[source]
