"""The contract between the trainer and whatever generates: requests, rollouts, and an engine that takes weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import torch
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


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is not there yet.

    Attributes:
        name: as published on Hugging Face.
        shape: sizes of the whole tensor.
        dtype: of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """The trainer's weights as engines take them: whole tensors under their published names, first as specs, then as a stream.

    ``full`` selects all tensors; otherwise those that training changes. Both methods are collective over the ranks of one
    replica of the model, which all consume the same tensors in the same order.
    """

    @property
    def in_main_replica(self) -> bool:
        """Whether this rank belongs to the replica of rank 0, the only one that is read where rank 0 sends weights to servers."""
        ...

    def specs(self, *, full: bool) -> list[TensorSpec]:
        """Return what `tensors` will yield, in its order."""
        ...

    def tensors(self, *, full: bool, in_pieces: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor); every rank of the replica must consume the whole iterator.

        With ``in_pieces`` a tensor may have a dimension more than its spec, [pieces, rows of a piece, ...], its rows being
        those of all pieces: a view where the whole tensor would be a copy.
        """
        ...


class RolloutEngine(Protocol):
    """Generates from the weights it was last given."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """One rollout a request, in the requests' order."""
        ...

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Take the source's trained tensors; the others keep their values. All ranks together.

        The weights count as ``version`` only once all tensors were taken.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds; safe to call twice."""
        ...
