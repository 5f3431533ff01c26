"""The record of rollouts, one Parquet file a step, and its use without an engine: `replay` trains from the record alone.

With a record the data stay fixed while layouts, kernels or objectives change: the second of the two debug doors. The columns are those
of `rollout.record_file`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.rollout.rollout_file import drop_after, read_rollouts, record_file, write_rollouts
from megatron_cord.rollout.types import Rollout, VersionSpan
from megatron_cord.trainer.collection import Collected
from megatron_cord.trainer.step.step import TokenRecord

#: what a replay takes from the record; the trainer computes the rest again
_REPLAYED = (
    "id", "role", "seed", "response", "finish_reason", "versions", "token_ids", "engine_logprobs", "teacher_answer", "reward", "advantage",
    "has_reward_variance",
)  # fmt: skip


@dataclass(frozen=True)
class RecordConfig:
    """What is written down."""

    rollouts: str | None = "rollouts"  #: directory of the record, relative to output_dir; null keeps none


class RolloutRecord:
    """Writes one file a step.

    Args:
        directory: None keeps no record.
        prompts: turns tokens into text.
        first_step: steps already made; files of later ones, left by a run that was stopped, are dropped.
        enabled: False on ranks that do not write.
    """

    def __init__(self, directory: Path | None, prompts: PromptBuilder, first_step: int = 0, *, enabled: bool) -> None:
        self.directory = directory if enabled else None
        self.prompts = prompts
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            drop_after(self.directory, first_step)

    def write(self, step: int, collected: Sequence[Collected], tokens: Sequence[TokenRecord]) -> None:
        """Writes the rollouts of the step numbered from 1; the file is whole or absent."""
        if self.directory is None:
            return
        scored = {t.index: t for t in tokens}
        rows = []
        for index, item in enumerate(collected):
            token, rollout = scored.get(index), item.rollout
            rows.append(
                {
                    "step": step,
                    "id": item.sample.id,
                    "role": item.role,
                    "seed": item.seed,
                    "question": item.sample.question,
                    "voice": item.sample.voice,
                    "response": rollout.text,
                    "finish_reason": rollout.finish_reason,
                    "versions": [{"start": v.start, "end": v.end, "version": v.version} for v in rollout.versions],
                    "token_ids": rollout.token_ids,
                    "tokens": self.prompts.token_strings(rollout.token_ids),
                    "engine_logprobs": rollout.logprobs,
                    "student_logprobs": token.logprobs if token else None,
                    "teacher_logprobs": token.teacher_logprobs if token else None,
                    "token_kl": token.kl if token else None,
                    "token_weights": token.weights if token else None,
                    "teacher_answer": item.teacher_answer,
                    "reward": item.reward,
                    "reward_terms": item.score.terms if item.score else None,
                    "advantage": item.advantage,
                    "has_reward_variance": item.has_reward_variance,
                }
            )
        write_rollouts(record_file(self.directory, step), rows)


def read_record(directory: Path, step: int, samples: Sequence[Sample]) -> list[Collected]:
    """The recorded rollouts of the step numbered from 1.

    Args:
        directory: a record.
        step: numbered from 1.
        samples: the step's samples, as the run that is replayed had them.

    Raises:
        CordError: no file for the step, a damaged one, or a sample that the step does not have.
    """
    path = record_file(directory, step)
    if not path.is_file():
        raise CordError(
            f"{path} does not exist; replay needs a record of every step: lower train.steps or choose another record"
        )
    by_id = {s.id: s for s in samples}
    collected = []
    for number, row in enumerate(read_rollouts(path, _REPLAYED).to_pylist(), start=1):
        if row["id"] not in by_id:
            raise CordError(
                f"{path}: row {number}: sample {row['id']} is not among the step's; replay with the data, seed and "
                "rollout.prompts_per_step of the recorded run"
            )
        versions = tuple(VersionSpan(**span) for span in row["versions"])
        rollout = Rollout(
            row["id"],
            tuple(row["token_ids"]),
            tuple(row["engine_logprobs"]),
            row["finish_reason"],
            versions,
            row["response"],
        )
        fields = {name: row[name] for name in ("role", "seed", "teacher_answer", "reward", "advantage", "has_reward_variance")}
        collected.append(Collected(by_id[row["id"]], rollout=rollout, **fields))
    return collected
