"""Responses that the data gives: a text of the sample, such as its answer, in the place of what the student samples.

A stream with `source: answer` trains on them as others train on the student's own (`kind: nll` is fine-tuning).
Nothing is generated for it, and no log-probability of an engine is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import PromptLimits, Sample
from megatron_cord.errors import CordError
from megatron_cord.rollout.types import Rollout, spans_of


class GivenResponses:
    """Makes responses of texts of samples.

    Args:
        prompts: of the checkpoint; it tokenizes the texts and ends them.
        max_new_tokens: responses are cut there, as the engine's are.
    """

    def __init__(self, prompts: PromptBuilder, max_new_tokens: int) -> None:
        self._prompts, self._longest = prompts, max_new_tokens

    def rollout(self, sample: Sample, field: str) -> Rollout:
        """Return the text as a response, with NaN for the engine's log-probabilities.

        Args:
            sample: has the text.
            field: "answer" or "solution".

        Raises:
            CordError: the sample has none, or one with a control token.
        """
        if (fault := self.fault(sample, (field,))) is not None:
            raise CordError(f"sample {sample.id} {fault}")
        text = str(getattr(sample, field))
        ids = self._prompts.response_ids(text)
        kept = ids[: self._longest]
        reason: Literal["stop", "length"] = "stop" if kept == ids else "length"
        return Rollout(sample.id, kept, (math.nan,) * len(kept), reason, spans_of([0] * len(kept)), text)

    def fault(self, sample: Sample, fields: Collection[str]) -> str | None:
        """Return why a sample's texts cannot be responses, as in "has no answer, …"; None if they can."""
        for field in fields:
            text: str | None = getattr(sample, field)
            if text is None or not text.strip():
                return f"has no {field}, which a stream trains on (objective.streams.NAME.source); add it to the sample"
            if (token := self._prompts.control_token(text)) is not None:
                return f"has {token!r} in its {field}, a control token of the model; remove it from the text"
        return None

    def limits(self, limits: PromptLimits, fields: Collection[str]) -> PromptLimits:
        """Return the limits with those of samples whose texts cannot be responses."""
        if not fields:
            return limits
        return replace(limits, chat_fault=lambda sample: limits.chat_fault(sample) or self.fault(sample, fields))
