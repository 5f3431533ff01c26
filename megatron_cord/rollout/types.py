"""The contract between the trainer and whatever generates: requests, rollouts, and an engine that takes weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from megatron_cord.data.samples import Prompt


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to one prompt.

    Attributes:
        prompt: audio or text.
        temperature: 0 means greedy.
        max_new_tokens: the response is cut there, with finish_reason "length".
        seed: the response depends on the weights, the prompt, the temperature and this seed alone, not on the batch around it.
    """

    prompt: Prompt
    temperature: float
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a rollout were generated with this version of the weights."""

    start: int
    end: int
    version: int


def spans_of(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Each token's version as spans of equal ones; none for a response that was aborted before its first token."""
    starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
    ends = [*starts[1:], len(versions)] if versions else []
    return tuple(VersionSpan(start, end, versions[start]) for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class Rollout:
    """One response.

    Attributes:
        prompt_id: the sample's id.
        token_ids: the response, with its end-of-sequence token if it stopped by itself.
        logprobs: of each token by the engine, from unscaled (temperature 1), unmasked logits, natural logarithm.
        finish_reason: "stop" or "length"; "abort" where the engine's ``abort`` cut it short, and such a response is never trained on.
        versions: which weights made which tokens.
        text: decoded, without special tokens.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "abort"]
    versions: tuple[VersionSpan, ...]
    text: str


def rollout_from_json(plain: dict[str, Any]) -> Rollout:
    """A rollout from its fields as JSON has them, with lists for tuples. Raises KeyError or TypeError for other fields."""
    return Rollout(
        prompt_id=plain["prompt_id"],
        token_ids=tuple(plain["token_ids"]),
        logprobs=tuple(plain["logprobs"]),
        finish_reason=plain["finish_reason"],
        versions=tuple(VersionSpan(**span) for span in plain["versions"]),
        text=plain["text"],
    )


class RolloutEngine(Protocol):
    """Generates from the weights it was last given."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """One rollout a request, in the requests' order."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes tensors under their Hugging Face names; names that are left out keep their values.

        The weights count as ``version`` only once the whole iterable was consumed.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds; safe to call twice."""
        ...
