"""The record of rollouts, one JSON-lines file a step, and its use without an engine: `replay` trains from the record alone.

With a record the data stay fixed while layouts, kernels or objectives change: the second of the two debug doors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.rollout.types import Rollout, VersionSpan
from megatron_cord.trainer.collection import Collected
from megatron_cord.trainer.metrics import json_floats
from megatron_cord.trainer.step import TokenRecord


@dataclass(frozen=True)
class RecordConfig:
    """What is written down."""

    rollouts: str | None = "rollouts"  #: directory of the record, relative to output_dir; null keeps none


class RolloutRecord:
    """Writes one file a step.

    Args:
        directory: None keeps no record.
        prompts: turns tokens into text.
        enabled: False on ranks that do not write.
    """

    def __init__(self, directory: Path | None, prompts: PromptBuilder, *, enabled: bool) -> None:
        self.directory = directory if enabled else None
        self.prompts = prompts
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, collected: Sequence[Collected], tokens: Sequence[TokenRecord]) -> None:
        """Writes the rollouts of the step numbered from 1; the file is complete or absent."""
        if self.directory is None:
            return
        scored = {t.index: t for t in tokens}
        lines = []
        for index, item in enumerate(collected):
            token = scored.get(index)
            rollout = item.rollout
            lines.append(
                json.dumps(
                    {
                        "step": step,
                        "id": item.sample.id,
                        "role": item.role,
                        "question": item.sample.question,
                        "voice": item.sample.voice,
                        "response": rollout.text,
                        "token_ids": rollout.token_ids,
                        "tokens": self.prompts.token_strings(rollout.token_ids),
                        "engine_logprobs": json_floats(rollout.logprobs),
                        "trainer_logprobs": _measured(token.logprobs if token else None),
                        "token_kl": _measured(token.kl if token else None),
                        "token_weights": _measured(token.weights if token else None),
                        "teacher_answer": item.teacher_answer,
                        "reward": item.reward,
                        "reward_terms": item.score.terms if item.score else None,
                        "advantage": item.advantage,
                        "has_signal": item.has_signal,
                        "finish_reason": rollout.finish_reason,
                        "versions": [[v.start, v.end, v.version] for v in rollout.versions],
                    }
                )
                + "\n"
            )
        path = record_file(self.directory, step)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(lines))
        os.replace(partial, path)


def _measured(values: list[float] | None) -> list[float | None] | None:
    return None if values is None else json_floats(values)


def record_file(directory: Path, step: int) -> Path:
    """Where the rollouts of the step numbered from 1 stand."""
    return directory / f"step_{step:06d}.jsonl"


def read_record(directory: Path, step: int, samples: Sequence[Sample]) -> list[Collected]:
    """The recorded rollouts of the step numbered from 1.

    Args:
        directory: a record.
        step: numbered from 1.
        samples: the step's samples, as the run that is replayed had them.

    Raises:
        CordError: no file for the step, a damaged line, or a sample that the step does not have.
    """
    path = record_file(directory, step)
    if not path.is_file():
        raise CordError(f"{path} does not exist; replay needs a record of every step: lower train.steps or choose another record")
    by_id = {s.id: s for s in samples}
    collected = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            plain = json.loads(line)
            versions = tuple(VersionSpan(*span) for span in plain["versions"])
            logprobs = tuple(math.nan if value is None else value for value in plain["engine_logprobs"])
            rollout = Rollout(plain["id"], tuple(plain["token_ids"]), logprobs, plain["finish_reason"], versions, plain["response"])
            sample_id, reward = plain["id"], plain["reward"]
            fields = {key: plain[key] for key in ("role", "teacher_answer", "advantage", "has_signal")}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CordError(f"{path}:{number} is damaged ({error}); replay another record") from None
        if sample_id not in by_id:
            raise CordError(
                f"{path}:{number}: sample {sample_id} is not among the step's; replay with the data, seed and "
                "rollout.prompts_per_step of the recorded run"
            )
        collected.append(Collected(by_id[sample_id], rollout=rollout, reward=reward, **fields))
    return collected
