"""The terms ``layers`` and ``embedding`` of a reward: how alike a response is to a right one of another stream (TARS).

Responses of a group are paired in turn with the right responses to the same question in the stream that `align_with`
names: the written question's, for one that was heard. Where none of these is right, both terms are 0, as in TARS'
repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.reward import Score
from megatron_cord.reward.rewards import TermWeights
from megatron_cord.rollout.types import Rollout
from megatron_cord.trainer.step.streams import PolicyStream


class Embedder(Protocol):
    """Embeds texts."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return float32 [texts, D], in their order."""
        ...


class Cosines(Protocol):
    """Compares responses behind their prompts."""

    def __call__(self, responses: Sequence[tuple[Prompt, Rollout]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        """Return a cosine for each pair of responses. Collective over the replica's ranks."""
        ...


@dataclass(frozen=True)
class GroupedResponse:
    """A response of a group, with its reward so far.

    Attributes:
        position: of the sample in the step's batch.
        stream: of the policy gradient.
        prompt: that it answers.
        rollout: the response.
        score: of its text.
    """

    position: int
    stream: str
    prompt: Prompt
    rollout: Rollout
    score: Score

    @property
    def is_right(self) -> bool:
        """Whether its final answer is the data's, or where that does not count the teacher's."""
        terms = self.score.terms
        return terms.get("gold", terms.get("agreement", 0.0)) >= 1.0


class Aligner:
    """Adds the terms to scores. All ranks of a replica call it alike.

    Args:
        streams: of the policy gradient.
        terms: the weights of streams that have none of their own.
        layers: compares in the model's layers; None where no reward does.
        embedder: of texts; None likewise.
        group: the replica's ranks, which share the texts; None for all ranks.
    """

    def __init__(
        self,
        streams: Sequence[PolicyStream],
        terms: TermWeights,
        layers: Cosines | None,
        embedder: Embedder | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._aligned = {s.name: (s.align_with, s.reward or terms) for s in streams if s.align_with is not None}
        self._layers, self._embedder, self._group = layers, embedder, group

    def scores(self, responses: Sequence[GroupedResponse]) -> list[Score]:
        """Return each response's score, with the terms of those that are aligned."""
        scores = [response.score for response in responses]
        for stream, (other, weights) in self._aligned.items():
            pairs = _pairs(responses, stream, other)
            values: dict[str, list[float]] = {}
            if weights.layers:
                assert self._layers is not None
                values["layers"] = self._layers([(r.prompt, r.rollout) for r in responses], pairs)
            if weights.embedding:
                values["embedding"] = self._embedding_cosines([r.rollout.text for r in responses], pairs)
            found = {pair[0]: {name: of[place] for name, of in values.items()} for place, pair in enumerate(pairs)}
            for index, response in enumerate(responses):
                if response.stream == stream:
                    added = found.get(index, dict.fromkeys(values, 0.0))
                    total = sum(getattr(weights, name) * value for name, value in added.items())
                    score = response.score
                    scores[index] = replace(score, total=score.total + total, terms=score.terms | added)
        return scores

    def _embedding_cosines(self, texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[float]:
        """Return the cosine of each pair's embeddings; 0 where a text is blank. Each rank embeds a share."""
        assert self._embedder is not None
        rank, world = dist.get_rank(self._group), dist.get_world_size(self._group)
        own = [(texts[a], texts[b]) for a, b in pairs[rank::world]]
        words = sorted({text for pair in own for text in pair if text.strip()})
        vectors = self._embedder.embed(words).double() if words else torch.zeros(0, 0)
        place = {text: number for number, text in enumerate(words)}
        mine = [
            float(torch.cosine_similarity(vectors[place[a]], vectors[place[b]], dim=0)) if {a, b} <= {*words} else 0.0
            for a, b in own
        ]
        shares = all_gather_json(mine, self._group)
        return [shares[index % world][index // world] for index in range(len(pairs))]


def _pairs(responses: Sequence[GroupedResponse], stream: str, other: str) -> list[tuple[int, int]]:
    """Return (response of the stream, right one of the other) by index: a sample's right ones are taken in turn."""
    right: dict[int, list[int]] = {}
    for index, response in enumerate(responses):
        if response.stream == other and response.is_right:
            right.setdefault(response.position, []).append(index)
    pairs, taken = [], dict.fromkeys(right, 0)
    for index, response in enumerate(responses):
        if response.stream == stream and response.position in right:
            candidates = right[response.position]
            pairs.append((index, candidates[taken[response.position] % len(candidates)]))
            taken[response.position] += 1
    return pairs
