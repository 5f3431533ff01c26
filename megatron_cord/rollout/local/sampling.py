"""Which tokens a batch gets next: the likeliest ones, or exact samples of the distributions at their temperatures.

Shapes: B responses, n of them sampled, T of those from a part of the vocabulary, V vocabulary.

Tokens are drawn by the Gumbel-max trick: argmax(log p + g), with independent Gumbel numbers g, is an exact sample of p.
It is done level by level: first one of up to 64 parts of the vocabulary is drawn by the parts' probabilities, then one
of 64 parts of that, and so on down to a token, which takes 192 numbers for 150,000 tokens. (One number would do for the
inverse of the cumulative probabilities, but there a rounding error moves the borders of all later tokens; here it only
tips candidates that are nearly equal, so that a response hardly depends on the batch around it.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cord.rollout.local.philox import gumbel
from megatron_cord.rollout.types import GenerationRequest

_BRANCHES = 64  #: parts of a part; with another number of them other samples are drawn
_TOGETHER = 2**20  #: logits: 4 MiB
_POSITIONS = 16  #: numbers of so many positions are drawn together: a small draw takes about as long as a large one


class Sampler:
    """Chooses a batch's next tokens, position by position.

    Args:
        requests: how each response is sampled; its random numbers depend on its prompt's name and its seed alone.
        forbidden: ids that are never chosen.
        device: of the logits.
    """

    def __init__(self, requests: Sequence[GenerationRequest], forbidden: Sequence[int], device: torch.device) -> None:
        def indices(rows: Sequence[int]) -> Tensor:
            return torch.tensor(rows, dtype=torch.long, device=device)

        sampled = [row for row, request in enumerate(requests) if request.temperature > 0]
        truncated = [row for row in sampled if requests[row].is_truncated]
        self._forbidden = indices(forbidden)
        self._greedy = len(sampled) < len(requests)
        self._sampled: Tensor | slice = indices(sampled) if self._greedy else slice(None)
        self._temperatures = torch.tensor([requests[row].temperature for row in sampled], device=device)[:, None]
        self._keys = torch.tensor([_key(requests[row]) for row in sampled], device=device).view(-1, 2)
        #: positions, and their Gumbel numbers [positions, n, levels · branches]
        self._numbers = (range(0), torch.empty(0))
        self._truncated = indices(truncated)
        temperatures = [requests[row].temperature for row in truncated]
        self._truncated_temperatures = torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]
        self._top_p = torch.tensor([requests[row].top_p for row in truncated], dtype=torch.float64, device=device)
        self._top_k = torch.tensor([requests[row].top_k or 2**62 for row in truncated], device=device)

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """Return exact samples int64 [B] of softmax(logits/τ) without the forbidden ids; argmax where τ = 0.

        With top_p or top_k: of what `likeliest` keeps; where that is forbidden ids alone, the likeliest of the others.

        Args:
            logits: float32 [B, V]; what is not drawn from is overwritten with -inf.
            position: of the token in its response, from 0.
        """
        rows = logits[self._truncated].double() if len(self._truncated) else None
        logits.index_fill_(-1, self._forbidden, -torch.inf)
        if rows is not None:
            kept = likeliest(rows / self._truncated_temperatures, self._top_p, self._top_k)
            kept.index_fill_(-1, self._forbidden, value=False)
            allowed = logits[self._truncated]
            kept |= ~kept.any(-1, keepdim=True) & (allowed == allowed.amax(-1, keepdim=True))
            logits[self._truncated] = allowed.masked_fill(~kept, -torch.inf)
        if not len(self._keys):
            return logits.argmax(-1)
        drawn = self._draw(logits[self._sampled], position)
        if not self._greedy:
            return drawn
        tokens = logits.argmax(-1)
        tokens[self._sampled] = drawn
        return tokens

    def _draw(self, logits: Tensor, position: int) -> Tensor:
        """Return a sample int64 [n] of each of these rows [n, V]."""
        positions, numbers = self._numbers
        if position not in positions:
            positions = range(position, position + _POSITIONS)
            numbers = gumbel(self._keys, positions, _levels(logits.shape[-1]) * _BRANCHES)
            self._numbers = positions, numbers
        return gumbel_max(logits, self._temperatures, numbers[positions.index(position)])


def gumbel_max(logits: Tensor, temperatures: Tensor, numbers: Tensor) -> Tensor:
    """Return a sample int64 [n] of each row's softmax(logits/τ).

    Args:
        logits: float32 [n, V].
        temperatures: float32 [n, 1].
        numbers: independent standard Gumbel numbers, float64 [n, levels · branches].
    """
    *of_parts, of_tokens = torch.split(numbers, _BRANCHES, dim=-1)
    levels: list[Tensor] = []  # probabilities of parts, from the smallest parts
    for _ in of_parts:
        levels.append(_sums(levels[-1]) if levels else _smallest_parts(logits, temperatures))
    chosen = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    for level, own in zip(reversed(levels), of_parts, strict=True):
        chosen = _choose(level.log(), chosen, own)
    return _choose(logits, chosen, of_tokens, temperatures)[:, 0]


def log_sum_exp(logits: Tensor) -> Tensor:
    """Return the logarithms [B] of the sums of exp(logits [B, V])."""
    return torch.cat([rows.logsumexp(-1) for rows in torch.split(logits, _rows(logits))])


def _smallest_parts(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Return the probabilities [n, ⌈V / branches⌉] of parts of successive tokens."""
    rows = _rows(logits)
    chunks = zip(torch.split(logits, rows), torch.split(temperatures, rows), strict=True)
    return torch.cat([_sums((some / own).softmax(-1)) for some, own in chunks])


def _choose(scores: Tensor, chosen: Tensor, numbers: Tensor, temperatures: Tensor | float = 1.0) -> Tensor:
    """Return which column int64 [n, 1] of scores [n, S] is drawn, of those in the chosen parts [n, 1]."""
    columns = chosen * _BRANCHES + torch.arange(_BRANCHES, device=scores.device)
    size = scores.shape[-1]
    inside = scores.gather(-1, columns.clamp(max=size - 1)) / temperatures
    drawn = inside.masked_fill(columns >= size, -torch.inf) + numbers
    return columns.gather(-1, drawn.argmax(-1, keepdim=True))


def _levels(vocabulary: int) -> int:
    """Return in how many steps a token is drawn."""
    count = 1
    while vocabulary > _BRANCHES:
        vocabulary, count = -(-vocabulary // _BRANCHES), count + 1
    return count


def _sums(level: Tensor) -> Tensor:
    """Return the sums [n, ⌈S / branches⌉] of successive columns of [n, S], the last of which may be fewer."""
    whole, rest = divmod(level.shape[-1], _BRANCHES)
    sums = [level[:, : whole * _BRANCHES].view(-1, whole, _BRANCHES).sum(-1)]
    return torch.cat([*sums, level[:, -rest:].sum(-1, keepdim=True)], dim=-1) if rest else sums[0]


def _rows(logits: Tensor) -> int:
    """Return how many rows are computed together so that what they need stays in a processor's cache."""
    return max(1, _TOGETHER // logits.shape[-1])


def likeliest(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Return which tokens are drawn from, as SGLang chooses them: both bounds are of the same whole distribution.

    Args:
        logits: float64 [T, V], already divided by the temperature.
        top_p: float64 [T]; a token is kept while the sum of the probabilities of likelier ones is not above it.
        top_k: int64 [T]; and while fewer tokens than that are likelier.

    Returns:
        bool [T, V]; the likeliest token is always kept.
    """
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    whole = (top_p >= 1)[:, None]  # else a sum that is rounded above 1 would leave out the last tokens
    kept = (whole | (before <= top_p[:, None])) & (ranks < top_k[:, None])
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _key(request: GenerationRequest) -> tuple[int, int]:
    """Return the two words of the key of a response's random numbers."""
    digest = hashlib.blake2b(f"{request.seed}\n{request.prompt.sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
