"""Batched sampling from a transformers audio model with a key–value cache: the inner loop of the local engine.

Shapes: B responses, L prompt tokens with left padding, V vocabulary.

A response is drawn by the Gumbel-max trick: argmax(z/τ + g), with g from a generator of the response's own, is an exact sample of
softmax(z/τ). So the batch around a response changes it only where rounding tips two equal candidates. Simplification: a finished
row is computed along until the last one ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_cord.data.samples import Prompt
from megatron_cord.rollout.key_value_cache import key_value_cache
from megatron_cord.rollout.types import GenerationRequest


@dataclass(frozen=True)
class TokenRules:
    """What the tokenizer says about ids.

    Attributes:
        eos_ids: they end a response.
        forbidden_ids: never sampled; a sampled audio placeholder would ask the next forward pass for audio that is not there.
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
    model: Any, requests: Sequence[GenerationRequest], rules: TokenRules, between_tokens: Callable[[], bool] = lambda: True
) -> list[Response]:
    """Answers requests in one batch; all of them with audio, or none.

    Args:
        model: transformers' Qwen2AudioForConditionalGeneration, in evaluation mode.
        requests: each with at least one new token to generate.
        rules: of the model's tokenizer.
        between_tokens: called between two passes through the model; the weights may change meanwhile. False ends the batch at once, and what
            is unfinished has finish_reason "abort".
    """
    device = model.device
    inputs = _collate([request.prompt for request in requests], rules.pad_id, device)
    limits = torch.tensor([request.max_new_tokens for request in requests], device=device)
    eos = torch.tensor(rules.eos_ids, device=device)
    noise = _Gumbel(requests, device)
    mask, positions = inputs["attention_mask"], inputs["position_ids"][:, -1:]
    cache = key_value_cache(mask.shape[1] + int(limits.max()))
    output = model.model(**inputs, past_key_values=cache, use_cache=True)
    done = torch.zeros(len(requests), dtype=torch.bool, device=device)
    lengths = torch.zeros_like(limits)
    ids, logprobs, stopped = [], [], torch.zeros_like(done)
    while True:
        logits = _head(model, output.last_hidden_state[:, -1])
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
        output = model.model(input_ids=token[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    table, scores = torch.stack(ids, 1).tolist(), torch.stack(logprobs, 1).tolist()
    return [
        Response(tuple(table[row][:length]), tuple(scores[row][:length]), "stop" if stop else "length" if ended else "abort")
        for row, (length, stop, ended) in enumerate(zip(lengths.tolist(), stopped.tolist(), done.tolist(), strict=True))
    ]


class _Gumbel:
    """Noise [B, V] of each response's own generator, seeded from its prompt's name and its seed."""

    def __init__(self, requests: Sequence[GenerationRequest], device: torch.device) -> None:
        self._temperatures = torch.tensor([request.temperature for request in requests], dtype=torch.float64, device=device)[:, None]
        self._generators = [
            torch.Generator().manual_seed(_seed(request)) if request.temperature > 0 else None for request in requests
        ]  # on the CPU, so that every device draws the same

    def choose(self, logits: Tensor, forbidden: tuple[int, ...]) -> Tensor:
        """Exact samples int64 [B] of softmax(logits/τ) without the forbidden ids; argmax where τ = 0."""
        exponential = torch.ones(logits.shape, dtype=torch.float64)
        for row, generator in zip(exponential, self._generators, strict=True):
            if generator is not None:
                row.exponential_(generator=generator)
        scores = logits.double() - self._temperatures * exponential.to(logits.device).log()
        scores[:, list(forbidden)] = -torch.inf
        return scores.argmax(-1)


def _seed(request: GenerationRequest) -> int:
    digest = hashlib.blake2b(f"{request.seed}\n{request.prompt.sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _head(model: Any, hidden: Tensor) -> Tensor:
    """Logits float32 [B, V]."""
    return nn.functional.linear(hidden, model.lm_head.weight, model.lm_head.bias).float()


def _collate(prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Left-padded int64 [B, L], positions that do not count padding, and the clips' features with their frame masks."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts])
    pads = torch.tensor([longest - len(prompt.token_ids) for prompt in prompts])[:, None]
    steps = torch.arange(longest)[None, :]
    inputs = {"input_ids": ids, "attention_mask": (steps >= pads).long(), "position_ids": (steps - pads).clamp(min=0)}
    clips = [clip for prompt in prompts for clip in prompt.clips]
    if clips:
        features = torch.stack([clip.features for clip in clips])
        frames = torch.tensor([clip.num_frames for clip in clips])[:, None]
        inputs["input_features"] = features
        inputs["feature_attention_mask"] = (torch.arange(features.shape[-1])[None, :] < frames).long()
    return {name: tensor.to(device) for name, tensor in inputs.items()}
