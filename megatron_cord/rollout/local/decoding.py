"""Batched sampling from a plain model with a key–value cache: the inner loop of the local engine.

Shapes: B responses, L prompt tokens with left padding, V vocabulary, C clips, k experts chosen for a token.

`sampling` chooses the tokens. Simplification: a finished row is computed along until the last one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.audio.features import stack_features
from megatron_cord.data.samples import Prompt
from megatron_cord.rollout.chosen_experts import ChosenExperts
from megatron_cord.rollout.local.key_value_cache import key_value_cache
from megatron_cord.rollout.local.sampling import Sampler, log_sum_exp
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
    """Token ids with their log-probabilities from raw logits (temperature 1, nothing masked); experts if requested."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "abort"]
    experts: ChosenExperts | None = None


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
    if not any(request.return_experts for request in requests):
        return _sample(model, requests, rules, between_tokens)
    with model.chosen_experts() as chosen:
        responses = _sample(model, requests, rules, between_tokens)
    experts = _by_response(chosen, requests, [len(response.token_ids) for response in responses])
    return [
        replace(response, experts=of) if request.return_experts else response
        for response, request, of in zip(responses, requests, experts, strict=True)
    ]


def _sample(
    model: PlainModel, requests: Sequence[GenerationRequest], rules: TokenRules, between_tokens: Callable[[], bool]
) -> list[Response]:
    """Do as `sample_batch`, without the experts."""
    device = model.device
    ids_in, mask, positions = collate([request.prompt for request in requests], rules.pad_id, device)
    limits = torch.tensor([request.max_new_tokens for request in requests], device=device)
    eos = torch.tensor(rules.eos_ids, device=device)
    sampler = Sampler(requests, rules.forbidden_ids, device)
    features, frames = collate_clips([request.prompt for request in requests], device)
    settings = {"past_key_values": key_value_cache(mask.shape[1] + int(limits.max())), "use_cache": True}
    output = model.hidden(ids_in, features, frames, attention_mask=mask, position_ids=positions, **settings)
    positions = positions[:, -1:]
    done = torch.zeros(len(requests), dtype=torch.bool, device=device)
    lengths = torch.zeros_like(limits)
    ids: list[Tensor] = []
    logprobs: list[Tensor] = []
    stopped = torch.zeros_like(done)
    while True:
        logits = model.head(output.last_hidden_state[:, -1])
        total = log_sum_exp(logits)  # before the sampler masks some
        token = sampler.choose(logits, len(ids))
        ids.append(token)
        logprobs.append(logits.gather(1, token[:, None])[:, 0] - total)
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


def _by_response(
    chosen: list[Tensor], requests: Sequence[GenerationRequest], lengths: Sequence[int]
) -> list[ChosenExperts]:
    """Return the experts of each response from those of all passes, of which each has made a token.

    Args:
        chosen: int16 [B · tokens of a pass, k] of each layer, pass by pass.
        requests: of the batch.
        lengths: tokens of each response.
    """
    size, layers = len(requests), len(chosen) // max(lengths)
    passes = [torch.stack(chosen[i : i + layers], 1) for i in range(0, len(chosen), layers)]  # [B · tokens, layers, k]
    rows = torch.cat([each.view(size, -1, *each.shape[1:]) for each in passes], 1)
    width = len(passes[0]) // size  # of the prompts, with padding on their left
    return [
        ChosenExperts.of(rows[i, width - len(request.prompt.token_ids) : width + length - 1])
        for i, (request, length) in enumerate(zip(requests, lengths, strict=True))
    ]


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
    return stack_features([clip.features for clip in clips]).to(device), torch.tensor(
        [clip.num_frames for clip in clips], device=device
    )
