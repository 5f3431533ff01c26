"""Random numbers that depend on a key and a counter alone: Philox 4×32-10, in torch's integer operations.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. There is no state: a key and a
counter give the same numbers on every device, in whatever batch and order they are drawn.

Shapes: words are int64 tensors of values below 2³²; the last four of a counter's words become four random ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  #: added to the key after each round
_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random words, each of the common shape.

    Args:
        counter: four tensors of words that broadcast with each other and with the key.
        key: two.
    """
    # A round treats words 0 and 2 alike, and words 1 and 3: stacked, half as many operations do.
    shape = torch.broadcast_shapes(*(word.shape for word in (*counter, *key)))  # type: ignore[no-untyped-call]
    even, odd = (torch.stack([counter[i].expand(shape) for i in pair]) for pair in ((0, 2), (1, 3)))
    keys = torch.stack([word.expand(shape) for word in key])
    multipliers, steps = (
        torch.tensor(pair, device=even.device).view(2, *[1] * len(shape)) for pair in (_MULTIPLIERS, _KEY_STEPS)
    )
    for _ in range(_ROUNDS):
        product = even * multipliers  # of 64 bits: as an int64 it may be negative, with the same bits
        even = ((product >> 32) & _WORD).flip(0) ^ odd ^ keys
        odd = (product & _WORD).flip(0)
        keys = (keys + steps) & _WORD
    return even[0], odd[0], even[1], odd[1]


def gumbel(keys: Tensor, positions: range, count: int) -> Tensor:
    """Return independent standard Gumbel numbers, float64 [positions, keys, count].

    Each is -log(-log u) of a uniform u of 52 random bits in the middle of its interval, so it is finite, between -3.7
    and 36.8.

    Args:
        keys: int64 [keys, 2] of words.
        positions: the second word of the counter; the first one numbers the blocks of two numbers.
        count: of numbers for each key and position.
    """
    device = keys.device
    blocks = torch.arange(-(-count // 2), device=device)
    place = torch.arange(positions.start, positions.stop, device=device)[:, None, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((blocks, place, zero, zero), (keys[:, :1], keys[:, 1:]))
    bits = torch.stack([((high >> 6) << 26) | (low >> 6) for high, low in (words[:2], words[2:])], dim=-1)
    uniform = (bits.flatten(-2)[..., :count].double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_()
