"""The teacher's own answers to the text questions: references of the reward, and the responses of off-policy methods.

A frozen teacher answers all questions that the run will ask before the engine gets any trained weights; the answers are kept in the run's
directory, so that a resumed run need not ask again. A live teacher answers each step with the weights that make the step's responses.
Answers are greedy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine, rollout_from_json


class TeacherAnswers:
    """Answers by sample.

    Args:
        mode: "frozen" or "live".
        engine: generates them.
        prompts: builds the text prompt.
        max_new_tokens: answers are cut there.
        path: the file in which a frozen teacher's answers are kept.
    """

    def __init__(
        self,
        mode: Literal["frozen", "live"],
        engine: RolloutEngine,
        prompts: PromptBuilder,
        max_new_tokens: int,
        path: Path,
    ) -> None:
        self.mode, self.engine, self.prompts, self.max_new_tokens, self.path = (
            mode,
            engine,
            prompts,
            max_new_tokens,
            path,
        )
        self._kept: dict[str, Rollout] = {}

    def prepare(self, samples: Sequence[Sample], *, resumed: bool, say: Callable[[str], None] = lambda _: None) -> None:
        """Makes sure that a frozen teacher's answers are there. Collective; the engine must still have the initial weights.

        Args:
            samples: all that the run will ask.
            resumed: take the answers that this run has kept; a run that starts anew may have another model.
            say: hears how many answers are asked for.

        Raises:
            CordError: the file of kept answers is damaged.
        """
        if self.mode == "live":
            return
        self._kept = self._read() if resumed else {}
        missing = list({s.id: s for s in samples if s.id not in self._kept}.values())
        if not missing:
            return
        say(f"the teacher answers {len(missing)} questions")
        self._kept |= {s.id: r for s, r in zip(missing, self.engine.generate(self._asked(missing)), strict=True)}
        if dist.get_rank() == 0:
            self._write()
        dist.barrier()

    def requests(self, samples: Sequence[Sample]) -> list[GenerationRequest]:
        """What the engine has to generate for these questions now: nothing where the answers are kept."""
        return self._asked(samples) if self.mode == "live" else []

    def rollouts(self, samples: Sequence[Sample], generated: Sequence[Rollout]) -> list[Rollout]:
        """The answers to these questions, with what the engine made of `requests`."""
        return list(generated) if self.mode == "live" else [self._kept[s.id] for s in samples]

    def _asked(self, samples: Sequence[Sample]) -> list[GenerationRequest]:
        return [GenerationRequest(self.prompts.text_prompt(s), 0.0, self.max_new_tokens) for s in samples]

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        with partial.open("w") as file:
            for key, rollout in self._kept.items():
                file.write(json.dumps({"sample": key} | asdict(rollout)) + "\n")
        os.replace(partial, self.path)

    def _read(self) -> dict[str, Rollout]:
        if not self.path.is_file():
            return {}
        kept = {}
        for number, line in enumerate(self.path.read_text().splitlines(), start=1):
            try:
                plain = json.loads(line)
                kept[plain["sample"]] = rollout_from_json(plain)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise CordError(
                    f"{self.path}:{number} is damaged ({error}); delete the file, and the teacher answers anew"
                ) from None
        return kept
