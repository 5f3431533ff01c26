"""The score of IFEval as VoiceBench has it: the mean of four accuracies, strict and loose, of prompts and instructions.

Source: `src/evaluator/ifeval.py` of VoiceBench (arXiv 2410.17196). The part of a question in the score is chosen such
that the mean over questions is exactly that number: accuracies of instructions are weighted by how many a question has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_cord.evaluation.rules.instructions import follows, variants
from megatron_cord.evaluation.rules.rule import Reply, Score
from megatron_cord.reward import Judge

_TAGS = ("<1>", "<2>", "<3>")  # that some speech models begin with
_TURN = "<|user|>"  # or end with


class InstructionFollowing:
    """IFEval. A question's answer is its instructions in JSON, as `read_instructions` writes them."""

    judged = False

    def score(self, replies: Sequence[Reply], judge: Judge | None = None) -> list[Score]:
        """Return the scores: right is what follows every instruction strictly; the answer found is how many.

        Raises:
            CordError: the extra "ifeval" is not installed.
        """
        asked = [json.loads(reply.answer) for reply in replies]
        share = len(asked) / max(1, sum(map(len, asked)))
        return [self._score(reply.response, found, share) for reply, found in zip(replies, asked, strict=True)]

    @staticmethod
    def _score(response: str, instructions: list[dict[str, object]], share: float) -> Score:
        response = response[3:].strip() if response.startswith(_TAGS) else response
        response = response[: -len(_TURN)].strip() if response.endswith(_TURN) else response
        texts = variants(response)
        strict = [follows(response, instruction) for instruction in instructions]
        loose = [any(follows(text, instruction) for text in texts) for instruction in instructions]
        measures = {
            "prompts, strict": float(all(strict)),
            "instructions, strict": sum(strict) * share,
            "prompts, loose": float(all(loose)),
            "instructions, loose": sum(loose) * share,
        }
        found = f"{sum(strict)} of {len(strict)}"
        return Score(found, all(strict), sum(measures.values()) / len(measures), measures)
