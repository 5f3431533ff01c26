"""An engine that answers from a script, and keeps what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.rollout.types import GenerationRequest, Rollout, VersionSpan, WeightSource


class ScriptedEngine:
    """A RolloutEngine whose answer is a function of the request.

    Args:
        prompts: its vocabulary.
        answer: the words to say.
    """

    def __init__(self, prompts: PromptBuilder, answer: Callable[[GenerationRequest], str]) -> None:
        self.prompts, self.answer = prompts, answer
        self.requests: list[GenerationRequest] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """Says what the script says, each token at a log-probability of -0.5."""
        self.requests += requests
        return [self._rollout(request) for request in requests]

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Has no weights."""

    def close(self) -> None:
        """Do nothing."""

    def _rollout(self, request: GenerationRequest) -> Rollout:
        text = self.answer(request)
        ids = (*self.prompts.encode(text), self.prompts.eos_ids[0])
        return Rollout(request.prompt.sample_id, ids, (-0.5,) * len(ids), "stop", (VersionSpan(0, len(ids), 0),), text)
