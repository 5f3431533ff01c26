"""Small plain values between ranks, as JSON: nothing that is received can execute code."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from megatron_cord.parallel import portability


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
    payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([payload.numel()], device=device), group=group)
    longest = int(max(sizes))
    buffers = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(buffers, torch.nn.functional.pad(payload, (0, longest - payload.numel())), group=group)
    return [json.loads(bytes(buffer[: int(size)].cpu().numpy())) for buffer, size in zip(buffers, sizes, strict=True)]


def broadcast_json(value: Any, source: int = 0) -> Any:
    """Return the value of the global rank `source` on every rank; other ranks' values are ignored. Collective."""
    return all_gather_json(value if dist.get_rank() == source else None)[source]
