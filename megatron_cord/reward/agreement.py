"""The paper's reward: does the rollout end in the answer that the teacher gave to the written question?

r(y) = J(y, ŷ) in {0, 1}, with ŷ the text-conditioned answer (CORD, arXiv 2601.16547). The judge here matches answers; it knows
nothing of gold answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_cord.reward.answers import answers_agree, extract_answer


@dataclass(frozen=True)
class RewardConfig:
    """How a rollout is judged."""

    kind: Literal["agreement"] = "agreement"  # the final answer matches the teacher's


class AgreementReward:
    """1 where the final answers agree, else 0; a text without a final answer agrees with nothing."""

    def __init__(self, config: RewardConfig | None = None) -> None:
        self.config = config or RewardConfig()

    def score(self, rollout_texts: Sequence[str], reference_texts: Sequence[str]) -> list[float]:
        """One reward a rollout.

        Args:
            rollout_texts: what the student said, decoded.
            reference_texts: what the teacher said to the same question, in the same order.

        Raises:
            ValueError: the two differ in length.
        """
        pairs = zip(map(extract_answer, rollout_texts), map(extract_answer, reference_texts), strict=True)
        return [float(said is not None and wanted is not None and answers_agree(said, wanted)) for said, wanted in pairs]
