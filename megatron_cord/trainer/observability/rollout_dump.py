"""The rollout dump: a step's rollouts in one Parquet file, and back. `replay` trains from a dump without an engine.

With a dump the data stay fixed while layouts, kernels or objectives change. The columns are those of
`rollout.rollout_file`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.reward import Score
from megatron_cord.rollout.rollout_file import drop_after, dump_file, read_rollouts, write_rollouts
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults, VersionSpan


@dataclass(frozen=True)
class RecordConfig:
    """What is written down."""

    rollouts: str | None = "rollouts"  #: directory of the rollout dump, relative to output_dir; null keeps none


class RolloutDump:
    """Writes one file a step.

    Args:
        directory: None writes nothing.
        prompts: turns tokens into text.
        first_step: steps already made; files of later ones, left by a run that was stopped, are dropped.
        stream_of: returns the name of a rollout's stream; "" for one without a name.
        enabled: False on ranks that do not write.
    """

    def __init__(
        self,
        directory: Path | None,
        prompts: PromptBuilder,
        first_step: int = 0,
        *,
        stream_of: Callable[[ScoredRollout], str] = lambda _: "",
        enabled: bool,
    ) -> None:
        self.directory = directory if enabled else None
        self.prompts, self._stream_of = prompts, stream_of
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            drop_after(self.directory, first_step)

    def write(self, step: int, rollouts: Sequence[ScoredRollout]) -> None:
        """Write the rollouts of the step numbered from 1; the file is whole or absent."""
        if self.directory is not None:
            rows = [_row(step, rollout, self.prompts) | {"stream": self._stream_of(rollout)} for rollout in rollouts]
            write_rollouts(dump_file(self.directory, step), rows)


def _row(step: int, scored: ScoredRollout, prompts: PromptBuilder) -> dict[str, Any]:
    rollout, tokens = scored.rollout, scored.tokens
    return {
        "step": step,
        "id": rollout.prompt_id,
        "role": scored.role,
        "position": scored.position,
        "draw": scored.draw,
        "seed": scored.seed,
        "question": scored.question,
        "voice": scored.voice,
        "response": rollout.text,
        "finish_reason": rollout.finish_reason,
        "versions": [{"start": v.start, "end": v.end, "version": v.version} for v in rollout.versions],
        "token_ids": rollout.token_ids,
        "tokens": prompts.token_strings(rollout.token_ids),
        "engine_logprobs": rollout.logprobs,
        "student_logprobs": tokens.student_logprobs if tokens else None,
        "teacher_logprobs": tokens.teacher_logprobs if tokens else None,
        "token_kl": tokens.kl if tokens else None,
        "token_weights": tokens.weights if tokens else None,
        "reference_answer": scored.reference_answer,
        "reward": scored.reward,
        "reward_terms": scored.score.terms if scored.score else None,
        "advantage": scored.advantage,
        "zero_variance": scored.zero_variance,
    }


def read_dump(directory: Path, step: int, ids: Sequence[str]) -> list[ScoredRollout]:
    """Return the rollouts of the step numbered from 1, as `RolloutDump` wrote them, token results included.

    Args:
        directory: a rollout dump.
        step: numbered from 1.
        ids: of the step's samples by position, which must be those of the run that wrote the dump.

    Raises:
        CordError: no file for the step, a damaged one, or one of other samples.
    """
    path = dump_file(directory, step)
    if not path.is_file():
        raise CordError(
            f"{path} does not exist; replay needs a record of every step: lower train.steps or choose another record"
        )
    rollouts = []
    for number, row in enumerate(read_rollouts(path).to_pylist(), start=1):
        position = row["position"]
        if not 0 <= position < len(ids) or ids[position] != row["id"]:
            raise CordError(
                f"{path}: row {number}: sample {row['id']} is not number {position} of the step's; replay with the "
                "data, "
                "seed and rollout.prompts_per_step of the recorded run"
            )
        rollouts.append(_scored_rollout(row))
    return rollouts


def recorded_streams(directory: Path, step: int) -> dict[int, str | None]:
    """Return the stream of each number of a response in the step numbered from 1; None where the dump does not say.

    Raises:
        CordError: the file is damaged.
    """
    rows = read_rollouts(dump_file(directory, step), ("draw", "stream")).to_pylist()
    return {row["draw"]: row["stream"] for row in rows}


def _scored_rollout(row: dict[str, Any]) -> ScoredRollout:
    rollout = Rollout(
        row["id"],
        tuple(row["token_ids"]),
        tuple(row["engine_logprobs"]),
        row["finish_reason"],
        tuple(VersionSpan(**span) for span in row["versions"]),
        row["response"],
    )
    tokens = None
    if row["student_logprobs"] is not None:
        tokens = TokenResults(row["token_kl"], row["token_weights"], row["student_logprobs"], row["teacher_logprobs"])
    score = None if row["reward_terms"] is None else Score(row["reward"], dict(row["reward_terms"]))
    same = (
        "role", "question", "voice", "position", "draw", "seed", "reference_answer", "reward", "advantage",
        "zero_variance",
    )  # fmt: skip
    return ScoredRollout(rollout, score=score, tokens=tokens, **{name: row[name] for name in same})
