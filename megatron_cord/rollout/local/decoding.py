"""Batched sampling from a plain model with a key–value cache: the inner loop of the local engine.

Shapes: B responses, L prompt tokens with left padding, V vocabulary, C clips.

A response is drawn by the Gumbel-max trick: argmax(z/τ + g), with g from a generator of the response's own, is an exact
sample of softmax(z/τ). So the batch around a response changes it only where rounding tips two equal candidates.
Simplification: a finished row is computed along until the last one ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_cord.convert.plain_model import PlainModel
from megatron_cord.data.samples import Prompt
from megatron_cord.rollout.local.key_value_cache import key_value_cache
from megatron_cord.rollout.types import GenerationRequest


@dataclass(frozen=True)
class TokenRules:
    """How the tokenizer's ids are treated.

    Attributes:
        eos_ids: they end a response.
        forbidden_ids: never sampled; a sampled audio placeholder would need audio that is not there in the next pass.
        pad_id: fills the left of short prompts.
    """

    eos_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Response:
    """Token ids with their log-probabilities from raw logits (temperature 1, nothing masked)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "abort"]


@torch.inference_mode()
def sample_batch(
    model: PlainModel,
    requests: Sequence[GenerationRequest],
    rules: TokenRules,
    between_tokens: Callable[[], bool] = lambda: True,
) -> list[Response]:
    """Answer requests in one batch; all of them with audio, or none.

    Args:
        model: of the checkpoint that the prompts are for.
        requests: each with at least one new token to generate.
        rules: of the model's tokenizer.
        between_tokens: called between two passes through the model; the weights may change meanwhile. False ends the
            batch at once, and what is unfinished has finish_reason "abort".
    """
    device = model.device
    ids_in, mask, positions = collate([request.prompt for request in requests], rules.pad_id, device)
    limits = torch.tensor([request.max_new_tokens for request in requests], device=device)
    eos = torch.tensor(rules.eos_ids, device=device)
    noise = _Gumbel(requests, device)
    features, frames = collate_clips([request.prompt for request in requests], device)
    settings = {"past_key_values": key_value_cache(mask.shape[1] + int(limits.max())), "use_cache": True}
    output = model.hidden(ids_in, features, frames, attention_mask=mask, position_ids=positions, **settings)
    positions = positions[:, -1:]
    done = torch.zeros(len(requests), dtype=torch.bool, device=device)
    lengths = torch.zeros_like(limits)
    ids, logprobs, stopped = [], [], torch.zeros_like(done)
    while True:
        logits = model.head(output.last_hidden_state[:, -1])
        token = noise.choose(logits, rules.forbidden_ids)
        ids.append(token)
        logprobs.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
        lengths += ~done
        stopped |= ~done & torch.isin(token, eos)
        done |= stopped | (lengths >= limits)
        if done.all() or not between_tokens():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions + 1
        output = model.hidden(token[:, None], None, None, attention_mask=mask, position_ids=positions, **settings)
    table, scores = torch.stack(ids, 1).tolist(), torch.stack(logprobs, 1).tolist()
    return [
        Response(
            tuple(table[row][:length]), tuple(scores[row][:length]), "stop" if stop else "length" if ended else "abort"
        )
        for row, (length, stop, ended) in enumerate(zip(lengths.tolist(), stopped.tolist(), done.tolist(), strict=True))
    ]


class _Gumbel:
    """Noise [B, V] of each response's own generator, seeded from its prompt's name and its seed; and who may win."""

    def __init__(self, requests: Sequence[GenerationRequest], device: torch.device) -> None:
        self._temperatures = torch.tensor(
            [request.temperature for request in requests], dtype=torch.float64, device=device
        )[:, None]
        truncated = [row for row, request in enumerate(requests) if request.is_truncated]
        self._truncated = torch.tensor(truncated, dtype=torch.long, device=device)  #: rows with a top_p or top_k
        self._top_p = torch.tensor([requests[row].top_p for row in truncated], dtype=torch.float64, device=device)
        self._top_k = torch.tensor([requests[row].top_k or 2**62 for row in truncated], device=device)
        self._generators = [
            torch.Generator().manual_seed(_seed(request)) if request.temperature > 0 else None for request in requests
        ]  # on the CPU, so that every device draws the same

    def choose(self, logits: Tensor, forbidden: tuple[int, ...]) -> Tensor:
        """Return exact samples int64 [B] of softmax(logits/τ) without the forbidden ids; argmax where τ = 0.

        With top_p or top_k: of what `likeliest` keeps; where that is forbidden ids alone, the likeliest of the others.
        """
        uniform = torch.full(logits.shape, 0.5, dtype=torch.float64)
        for row, generator in zip(uniform, self._generators, strict=True):
            if generator is not None:
                row.uniform_(generator=generator)
        # As torch's exponential_ would draw them, three times as fast over all rows at once; never zero.
        exponential = uniform.neg_().log1p_().neg_().clamp_min_(torch.finfo(torch.float64).eps / 2)
        scores = logits.double() - self._temperatures * exponential.to(logits.device).log_()
        scores[:, list(forbidden)] = -torch.inf
        if len(self._truncated):
            rows = logits[self._truncated].double()
            kept = likeliest(rows / self._temperatures[self._truncated], self._top_p, self._top_k)
            kept[:, list(forbidden)] = False
            rows[:, list(forbidden)] = -torch.inf
            kept |= ~kept.any(-1, keepdim=True) & (rows == rows.amax(-1, keepdim=True))
            scores[self._truncated] = scores[self._truncated].masked_fill(~kept, -torch.inf)
        return scores.argmax(-1)


def likeliest(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Return which tokens are drawn from, as SGLang chooses them: both bounds are of the same whole distribution.

    Args:
        logits: float64 [B, V], already divided by the temperature.
        top_p: float64 [B]; a token is kept while the sum of the probabilities of likelier ones is not above it.
        top_k: int64 [B]; and while fewer tokens than that are likelier.

    Returns:
        bool [B, V]; the likeliest token is always kept.
    """
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    whole = (top_p >= 1)[:, None]  # else a sum that is rounded above 1 would leave out the last tokens
    kept = (whole | (before <= top_p[:, None])) & (ranks < top_k[:, None])
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _seed(request: GenerationRequest) -> int:
    digest = hashlib.blake2b(f"{request.seed}\n{request.prompt.sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def collate(prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return left-padded ids int64 [B, L], the attention mask of that shape, and positions that skip padding."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts])
    pads = torch.tensor([longest - len(prompt.token_ids) for prompt in prompts])[:, None]
    steps = torch.arange(longest)[None, :]
    return ids.to(device), (steps >= pads).long().to(device), (steps - pads).clamp(min=0).to(device)


def collate_clips(prompts: Sequence[Prompt], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return all clips' features float32 [C, mels, frames] and their lengths int64 [C]; None without audio."""
    clips = [clip for prompt in prompts for clip in prompt.clips]
    if not clips:
        return None, None
    features = torch.stack([clip.features for clip in clips])
    return features.to(device), torch.tensor([clip.num_frames for clip in clips], device=device)
