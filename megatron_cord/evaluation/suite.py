"""Several question sets asked of one model, and compared with another model's answers to the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.question_files import Reject
from megatron_cord.errors import CordError
from megatron_cord.evaluation.answering import Answers, answer_set
from megatron_cord.evaluation.formats import SetConfig, load_set
from megatron_cord.evaluation.pages import write_pages
from megatron_cord.evaluation.questions import Question
from megatron_cord.evaluation.results import Row, forgotten, overall, score_set, set_result
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.reward.comparison import Comparer
from megatron_cord.rollout.types import RolloutEngine


class SuiteConfig(Protocol):
    """What a suite needs of an evaluation's configuration."""

    @property
    def sets(self) -> Mapping[str, SetConfig]: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def max_rejects(self) -> float: ...


class Suite:
    """The sets of a configuration. All ranks call its methods together.

    Args:
        config: sets and how they are asked.
        prompts: builds both prompts.
        directory: every model that is evaluated gets a directory in it.
        comparer: decides about free answers on the rank that writes; None goes by rules.
        writes: whether this rank writes.

    Raises:
        CordError: a set that cannot be read.
    """

    def __init__(
        self, config: SuiteConfig, prompts: PromptBuilder, directory: Path, *, comparer: Comparer | None, writes: bool
    ) -> None:
        self._config, self._prompts, self._root, self._comparer, self._writes = (
            config,
            prompts,
            directory,
            comparer,
            writes,
        )
        self._sets: dict[str, tuple[list[Question], list[Reject]]] = {
            name: load_set(given) for name, given in config.sets.items()
        }
        self._answers: dict[str, dict[str, Answers]] = {}

    def directory(self, label: str) -> Path:
        """Of one model's evaluation."""
        return self._root / label

    def answer(self, label: str, model: str, engine: RolloutEngine, progress: Callable[[str, int, int], None]) -> None:
        """Asks the engine's model what it was not asked yet.

        Args:
            label: names the evaluation.
            model: stands for the weights; answers of others are refused.
            engine: generates, collectively.
            progress: called with a set's name, questions done since the last call, and all its questions.

        Raises:
            CordError: kept answers are another model's, more questions cannot be asked than may, or the engine fails; what was answered is kept.
        """
        self._answers[label] = {}
        for name, (questions, _) in self._sets.items():
            answers = self._begin(label, name, model, questions)

            def report(done: int, name: str = name, total: int = len(questions)) -> None:
                progress(name, done, total)

            answer_set(answers, self._prompts, engine, chunk=self._config.chunk, writes=self._writes, progress=report)
            self._answers[label][name] = answers

    def _begin(self, label: str, name: str, model: str, questions: Sequence[Question]) -> Answers:
        """The answers that there are. One rank reads them, as it may find a torn line to mend, and tells the others."""
        path, limit = self.directory(label) / f"{name}.jsonl", self._config.max_new_tokens
        answers = Answers(path, model, questions, limit, reads=False)
        problem = None
        if self._writes:
            try:
                answers = Answers(path, model, questions, limit)
            except CordError as error:
                problem = str(error)
        done, problem = broadcast_json([list(answers.done), problem])
        if problem is not None:
            raise CordError(problem)
        answers.assume(done)
        return answers

    def finish(self, label: str, baseline: Path | None) -> dict[str, Any]:
        """Scores, compares and writes `results.json`, `.md` and `.html`.

        Args:
            label: of an evaluation whose answers are complete.
            baseline: the directory of the evaluation to compare with; None compares nothing.

        Raises:
            CordError: more questions could not be asked than may, or the baseline lacks a set.
        """
        result: dict[str, Any] = {}
        problem = None
        if self._writes:
            try:
                result = self._finish(label, baseline)
            except CordError as error:
                problem = str(error)
        result, problem = broadcast_json([result, problem])
        if problem is not None:
            raise CordError(problem)
        return result

    def _finish(self, label: str, baseline: Path | None) -> dict[str, Any]:
        directory = self.directory(label)
        rows: dict[str, list[Row]] = {}
        before: dict[str, list[Row]] | None = None if baseline is None else {}
        results: dict[str, Any] = {}
        for seed, (name, (questions, unread)) in enumerate(self._sets.items()):
            rows[name], unasked = score_set(self._answers[label][name], self._comparer)
            rejects = [*unread, *unasked]
            self._bound(name, rejects, len(questions) + len(unread), directory)
            if before is not None and baseline is not None:
                before[name] = self._score_before(baseline, name, questions)
            results[name] = set_result(rows[name], rejects, None if before is None else before[name], seed)
        result = {
            "model": label,
            "baseline": None if baseline is None else baseline.name,
            "sets": results,
            "overall": overall(results, rows, before),
            "forgetting": forgotten(results),
        }
        for name, some in rows.items():
            _write_lines(directory / f"{name}.scored.jsonl", some)
        write_pages(directory, result, rows)
        return result

    def _score_before(self, baseline: Path, name: str, questions: Sequence[Question]) -> list[Row]:
        path = baseline / f"{name}.jsonl"
        if not path.is_file():
            raise CordError(f"evaluation.baseline: {path} does not exist; evaluate that model on the same sets first")
        earlier = Answers(path, "", questions, self._config.max_new_tokens, any_model=True)
        if earlier.missing:
            raise CordError(
                f"evaluation.baseline: {path} lacks {len(earlier.missing)} answers; finish that evaluation first"
            )
        return score_set(earlier, self._comparer)[0]

    def _bound(self, name: str, rejects: Sequence[Reject], total: int, directory: Path) -> None:
        path = directory / f"{name}.rejects.jsonl"
        _write_lines(path, [asdict(reject) for reject in rejects])
        if len(rejects) > self._config.max_rejects * total:
            first = rejects[0]
            raise CordError(
                f"evaluation set {name}: {len(rejects)} of {total} questions cannot be asked, more than evaluation.max_rejects="
                f"{self._config.max_rejects:g} allows; the first, {first.id}: {first.reason}; see {path}"
            )


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
