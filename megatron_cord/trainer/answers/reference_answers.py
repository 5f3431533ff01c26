"""Reference answers: the teacher's own answers to the text of the questions.

The reward compares with them, and off-policy methods train on them. A frozen teacher answers while the run's engine has
its weights for text (`AnswersInTime`); one with a checkpoint of its own has an engine of its own for that. The answers
are kept in the run's directory for a resumed run, under the conversation's text, the teacher's files and the longest
length: when one of these changes, the teacher answers anew. A live teacher answers each step with the weights that
generate the step's responses. Answers are greedy. Audio is never read for them. A run that is stopped or killed while
the teacher answers goes on behind the last portion that was written.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import READ, PreparedSample, Prompt, Sample
from megatron_cord.errors import CordError
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.types import GenerationRequest, Rollout, spans_of
from megatron_cord.runtime.files import fingerprint
from megatron_cord.runtime.stop_request import StoppedError

logger = logging.getLogger(__name__)
_PORTION = 4096  #: questions after which the answers are written


class ReferenceAnswers:
    """Answers by sample and what it asks.

    Args:
        mode: "frozen" or "live".
        engine: makes the engine that generates a frozen teacher's answers, shared by all ranks; called when answers are
            missing.
        prompts: builds the text prompt.
        max_new_tokens: answers are cut there.
        path: the file in which a frozen teacher's answers are kept.
        teacher: stands for the frozen teacher's weights.
    """

    def __init__(
        self,
        mode: Literal["frozen", "live"],
        engine: Callable[[], AbstractContextManager[CollectiveEngine]],
        prompts: PromptBuilder,
        max_new_tokens: int,
        path: Path,
        teacher: str = "",
    ) -> None:
        self.mode, self.engine, self.prompts = mode, engine, prompts
        self.max_new_tokens, self.path = max_new_tokens, path
        self.teacher = teacher
        self._kept: dict[str, Rollout] | None = None  # until the file is read
        self._whole = 0  # bytes of the file's whole lines

    def prepare(self, samples: Sequence[Sample], stop: Callable[[], bool] = lambda: False) -> None:
        """Generate the answers that a frozen teacher lacks. Collective; for text the engine must have its weights.

        Args:
            samples: those that need an answer, without their audio; the same on every rank.
            stop: asked between two portions, by all ranks together, whether to end there; the same on all of them.

        Raises:
            CordError: the file of kept answers is damaged.
            StoppedError: after `stop`; the answers so far are kept.
        """
        if self.mode == "live":
            return
        if self._kept is None:
            self._kept = self._read()
        asked = {self._key(sample): sample for sample in samples}
        missing = {key: sample for key, sample in asked.items() if key not in self._kept}
        if not missing:
            return
        logger.info("the teacher answers %d questions", len(missing))
        keys = list(missing)
        with self.engine() as engine:
            for start in range(0, len(keys), _PORTION):
                if start:
                    logger.info("the teacher has answered %d of %d questions", start, len(keys))
                    if stop():
                        raise StoppedError(
                            f"asked to stop: {start} of the teacher's {len(keys)} answers are kept; the same command "
                            "continues"
                        )
                portion = keys[start : start + _PORTION]
                share = [self._request(self.prompts.text_prompt(missing[key])) for key in engine.share(portion)]
                generated = map(_as_initial, engine.generate_share(share, len(portion)))
                answers = dict(zip(portion, generated, strict=True))
                self._kept |= answers
                if dist.get_rank() == 0:
                    self._append(answers)
                dist.barrier()

    def requests(self, samples: Sequence[PreparedSample]) -> list[GenerationRequest]:
        """Return what the engine has to generate for these samples now: nothing where the answers are kept."""
        return [self._request(s.prompts[READ]) for s in samples] if self.mode == "live" else []

    def rollouts(self, samples: Sequence[PreparedSample], generated: Sequence[Rollout]) -> list[Rollout]:
        """Return the answers to these samples, with what the engine made of `requests`."""
        return list(generated) if self.mode == "live" else [self._answer(s.sample) for s in samples]

    def _answer(self, sample: Sample) -> Rollout:
        try:
            return (self._kept or {})[self._key(sample)]
        except KeyError:  # it stands in for a damaged sample, in a place that no answered one could take
            raise CordError(
                f"sample {sample.id} stands in for a damaged one, and the teacher answered before that was known; run "
                "the same command again: it has the answer made first if a checkpoint was written since. If it stops "
                "here again, restore what the run's data.json lists as damaged"
            ) from None

    def _key(self, sample: Sample) -> str:
        """Stand for all that the answer depends on."""
        beside = sample.turns or sample.system is not None or sample.instruction is not None
        chat = [repr(sample.chat(READ))] if beside else []
        return fingerprint([sample.id, sample.question, self.teacher, self.max_new_tokens, *chat])

    def _request(self, prompt: Prompt) -> GenerationRequest:
        return GenerationRequest(prompt, 0.0, self.max_new_tokens)

    def _append(self, answers: Mapping[str, Rollout]) -> None:
        lines = [json.dumps({"key": key} | asdict(rollout)) + "\n" for key, rollout in answers.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self._whole)  # a kill may have left a part of a line
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._whole = self.path.stat().st_size

    def _read(self) -> dict[str, Rollout]:
        """Return the kept answers; a last line without its end was cut by a kill, and its question is asked again."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        self._whole = content.rfind(b"\n") + 1
        kept = {}
        for number, line in enumerate(content[: self._whole].splitlines(), start=1):
            try:
                plain = json.loads(line)
                kept[plain["key"]] = Rollout.from_json(plain)
            except (ValueError, KeyError, TypeError) as error:
                raise CordError(
                    f"{self.path}:{number} is damaged ({error}); delete the file, and the teacher answers anew"
                ) from None
        return kept


def _as_initial(answer: Rollout) -> Rollout:
    """Return an answer as one of version 0, whose weights for text a later version of the engine still has."""
    return replace(answer, versions=spans_of([0] * len(answer.token_ids)))
