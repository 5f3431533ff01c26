"""The contract between the trainer and whatever generates: requests, rollouts, and an engine that takes weights.

A response is one type on its whole way, with fields added: an engine returns a `Rollout`; rewards make it a
`ScoredRollout`; the trainer's step fills in its `TokenResults`; the rollout dump writes all of it to Parquet and
reads it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.reward import Score
from megatron_cord.rollout.chosen_experts import ChosenExperts

#: which part of the loss a rollout has: L_tok, L_seq, both; none, as its group was replaced (dynamic sampling)
Role = Literal["distill", "policy", "shared", "replaced"]


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to one prompt.

    Attributes:
        prompt: audio or text.
        temperature: 0 means greedy.
        max_new_tokens: the response is cut there, with finish_reason "length".
        seed: the response depends on the weights, the prompt, the way it is sampled and this seed alone, not on the
            batch around it.
        top_p: tokens are drawn from the likeliest ones: those before which less than this much, or just this much,
            of the probability at the temperature lies; 1 leaves none out.
        top_k: and from so many of the likeliest at most; 0 leaves none out.
        return_experts: the rollout shall say which experts the engine's routers chose.
    """

    prompt: Prompt
    temperature: float
    max_new_tokens: int
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0
    return_experts: bool = False

    @property
    def is_truncated(self) -> bool:
        """Whether tokens are drawn from a part of the distribution."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)

    @property
    def key(self) -> str:
        """Names the response on any layout: equal keys of one step have equal responses."""
        view = "audio" if self.prompt.clips else "text"
        truncation = f"\n{self.top_p}\n{self.top_k}" if self.is_truncated else ""
        return f"{self.prompt.sample_id}\n{view}\n{self.temperature}\n{self.seed}{truncation}"


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
        logprobs: of each token by the engine, from unscaled (temperature 1), unmasked logits of all tokens, also where
            top_p or top_k leave some out; natural logarithm.
        finish_reason: "stop" or "length"; "abort" where the engine's ``abort`` cut it short, and such a response is
            never trained on.
        versions: which weights made which tokens.
        text: decoded, without special tokens.
        experts: that the engine's routers chose, of a model that has them; None where they were not requested.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "abort"]
    versions: tuple[VersionSpan, ...]
    text: str
    experts: ChosenExperts | None = None

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """Return a rollout from its fields as JSON has them, with lists for tuples.

        Raises:
            KeyError, TypeError: the fields are not those of a rollout.
        """
        return cls(
            prompt_id=plain["prompt_id"],
            token_ids=tuple(plain["token_ids"]),
            logprobs=tuple(plain["logprobs"]),
            finish_reason=plain["finish_reason"],
            versions=tuple(VersionSpan(**span) for span in plain["versions"]),
            text=plain["text"],
            experts=None if (experts := plain.get("experts")) is None else ChosenExperts(**experts),
        )


@dataclass(frozen=True)
class TokenResults:
    """What the trainer computed for each token of a rollout, before the update.

    Attributes:
        kl: divergence D_t, nats; None without a teacher.
        weights: w_t of L_tok; None outside L_tok.
        student_logprobs: the trainer's own log-probabilities.
        teacher_logprobs: the teacher's; None without one.
    """

    kl: list[float] | None
    weights: list[float] | None
    student_logprobs: list[float]
    teacher_logprobs: list[float] | None = None


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout of a training step with its part in the loss.

    Attributes:
        rollout: the response.
        role: "distill" for L_tok, "policy" for L_seq, "shared" for both, "replaced" for neither.
        question: text of the sample.
        voice: of the sample's recording; None if unknown.
        position: of the sample in the step's batch.
        draw: 0 for a response of L_tok alone, and −1, −2, … for further ones of the streams in turn; 1 to N within a
            group of L_seq, and N + 1, … in those of its further streams.
        seed: that the response was sampled with; None for a greedy one.
        reference_answer: the teacher's text, with which the reward compares; None where none does.
        reward: weighted sum of the reward's terms; None outside L_seq.
        score: what the reward is made of; None without a reward, and in a replay.
        advantage: 0 outside L_seq and in zero-variance groups.
        zero_variance: whether it belongs to a group of L_seq whose rewards are all equal.
        tokens: results of the training step; None before it, and for rollouts that are not trained on.
    """

    rollout: Rollout
    role: Role
    question: str = ""
    voice: str | None = None
    position: int = 0
    draw: int = 0
    seed: int | None = None
    reference_answer: str | None = None
    reward: float | None = None
    score: Score | None = None
    advantage: float = 0.0
    zero_variance: bool = False
    tokens: TokenResults | None = None

    @property
    def distilled(self) -> bool:
        """Whether it has a part in L_tok."""
        return self.role in ("distill", "shared")

    @property
    def in_group(self) -> bool:
        """Whether it belongs to L_seq, and so counts in its denominator."""
        return self.role in ("policy", "shared")

    @property
    def trained(self) -> bool:
        """Whether a step trains on it: policy rollouts of zero-variance groups have no gradient."""
        return self.distilled or (self.in_group and not self.zero_variance)

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sort key of the step's list: responses of L_tok alone, then the groups, each by position."""
        return self.draw > 0, self.position, self.draw

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """Return what `to_json` made, after its way through JSON."""
        score, tokens = plain["score"], plain["tokens"]
        nested = {
            "rollout": Rollout.from_json(plain["rollout"]),
            "score": None if score is None else Score(**score),
            "tokens": None if tokens is None else TokenResults(**tokens),
        }
        return cls(**(plain | nested))


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
    """The trainer's weights as engines take them: whole tensors under published names, as specs and as a stream.

    ``full`` selects all tensors; otherwise those that training changes. Both methods are collective over the ranks of
    one replica of the model, which all consume the same tensors in the same order.
    """

    @property
    def in_main_replica(self) -> bool:
        """Whether this rank belongs to the replica of rank 0, the only one whose weights go to servers."""
        ...

    @property
    def lora_scale(self) -> float | None:
        """What multiplies B A where weights have LoRA; None where none has, and ``merged`` makes no difference."""
        ...

    def without_lora(self) -> WeightSource:
        """Return the same with LoRA off: its scale is 0, and merged weights are those beside which it is."""
        ...

    def specs(self, *, full: bool, merged: bool = True) -> list[TensorSpec]:
        """Return what `tensors` will yield, in its order."""
        ...

    def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor); every rank of the replica must consume the whole iterator.

        Without ``merged``, and never with ``full``, LoRA takes the place of the weights beside which it is: A [r, in]
        as MODULE.lora_A.weight, then B [out, r] as MODULE.lora_B.weight.

        With ``in_pieces`` a tensor may have a dimension more than its spec, [pieces, rows of a piece, ...], its rows
        being those of all pieces: a view where the whole tensor would be a copy.
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
