"""How a server takes a stream of buckets, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megatron_cord.rollout.sglang.plugin.weights import Buffers, Spec, Stream

SPECS = [
    Spec("a", torch.float32, (3, 5)),
    Spec("b", torch.bfloat16, (8,)),
    Spec("c", torch.float32, (2, 2)),
    Spec("d", torch.float32, ()),
    Spec("e", torch.bfloat16, (50, 4)),
    Spec("f", torch.float32, (11,)),
    Spec("g", torch.float32, (6,)),
]
COUNTS = [2, 1, 1, 1, 2]


class Arrival:
    """Bytes that are there only once they were waited for, as those of a broadcast are."""

    def __init__(self, flat: Tensor, content: Tensor) -> None:
        self.flat, self.content = flat, content

    def wait(self) -> None:
        self.flat.copy_(self.content)


def sender(seen: list[int]) -> tuple[dict[str, Tensor], Callable[[Tensor], Arrival]]:
    """Tensors, and what a stream of them is received with; the buffers' addresses are noted."""
    generator = torch.Generator().manual_seed(0)
    given = {spec.name: torch.randn(tuple(spec.shape), generator=generator).to(spec.dtype) for spec in SPECS}
    remaining = iter(given.values())
    contents = iter(
        [torch.cat([next(remaining).reshape(-1).view(torch.uint8) for _ in range(count)]) for count in COUNTS]
    )

    def receive(flat: Tensor) -> Arrival:
        seen.append(flat.data_ptr())
        return Arrival(flat, next(contents))

    return given, receive


def same(found: dict[str, Tensor], given: dict[str, Tensor]) -> bool:
    return list(found) == list(given) and all(
        torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in given.items()
    )


@pytest.mark.parametrize("keeps", [False, True])
def test_tensors_survive(keeps: bool) -> None:
    """Catches memory that is used again while a model holds a tensor in it (some collect all before they load).

    Also bytes that are read before they are there, and tensors that are lost, cut or reordered.
    """
    given, receive = sender([])
    stream: Iterator[tuple[str, Tensor]] = iter(Stream(SPECS, COUNTS, receive, Buffers("cpu")))
    assert same(dict(stream) if keeps else {name: tensor.clone() for name, tensor in stream}, given)


def test_memory_is_used_again() -> None:
    """Catches new memory for each bucket, or each weight sync, though none of the old is in use."""
    buffers = Buffers("cpu")
    seen: list[int] = []
    for _ in range(3):
        _, receive = sender(seen)
        for _name, tensor in Stream(SPECS, COUNTS, receive, buffers):
            tensor.sum()
        del tensor
    assert len(seen) == 15 and len(set(seen[5:])) <= 3, (
        seen
    )  # two are in use at once, and one that a loop variable is in yet


def test_what_cannot_be_loaded() -> None:
    """Catches a draft model that silently keeps its old weights, and buckets that are not what was announced."""
    _, receive = sender([])
    stream = Stream(SPECS, COUNTS, receive, Buffers("cpu"))
    list(stream)
    with pytest.raises(RuntimeError, match="only once"):
        list(stream)
    with pytest.raises(ValueError, match="7 tensors were announced, and buckets of 6"):
        Stream(SPECS, [3, 3], receive, Buffers("cpu"))
