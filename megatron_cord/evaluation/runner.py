"""The runner of evaluations: sets of questions, answered from text and audio, scored, and compared.

A training run evaluates one set (data.evaluation) with it, `megatron_cord.evaluate` any number. Each set's result is
one file, see `files`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.question_files import Reject
from megatron_cord.errors import CordError
from megatron_cord.evaluation.answers import (
    Answer,
    Journal,
    Measure,
    PreparedQuestion,
    answer_of,
    generate_answers,
    prepare,
)
from megatron_cord.evaluation.config import EvaluationConfig
from megatron_cord.evaluation.files import FOLDER, read_result, set_files, write_lines
from megatron_cord.evaluation.guards import baseline_file, check_useful, compare_guarded, read_baseline
from megatron_cord.evaluation.pages import write_pages
from megatron_cord.evaluation.questions import QuestionSet
from megatron_cord.evaluation.results import Row, forgotten, outcomes_of, overall, set_result
from megatron_cord.evaluation.scoring import score_set
from megatron_cord.parallel.objects import run_on_main
from megatron_cord.reward import Judge
from megatron_cord.reward.comparison import Comparer
from megatron_cord.rollout.types import RolloutEngine
from megatron_cord.runtime.files import write_atomic

logger = logging.getLogger(__name__)

#: Called with a set's name, questions done since the last call, and the number of its questions.
Progress = Callable[[str, int, int], None]


@dataclass
class _Answered:
    """The answers of one model to one set; on a rank that does not write, those of an earlier run lack their texts."""

    answers: dict[str, Answer]
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Evaluator:
    """Answers sets of questions with an engine and writes their results. All ranks call its methods together.

    Args:
        config: lengths, limits and sizes.
        sets: the questions by name.
        prompts: makes both prompts.
        run: the directory under which each evaluated model gets `evaluations/LABEL`.
        comparer: decides about free answers on the rank that writes; None: rules.
        judge: scores the sets whose rule is judged, on the rank that writes.
        writes: whether this rank writes.

    Raises:
        CordError: the chat template cannot write more of a set's questions than evaluation.max_rejects allows.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        sets: Mapping[str, QuestionSet],
        prompts: PromptBuilder,
        run: Path,
        *,
        comparer: Comparer | None = None,
        judge: Judge | None = None,
        writes: bool,
    ) -> None:
        self._config, self._sets, self._prompts, self._comparer, self._writes = config, sets, prompts, comparer, writes
        self._judge = judge
        self._root = run / FOLDER
        self._answered: dict[str, _Answered] = {}  # by set, of the model that answered last
        self._prepared: dict[str, list[PreparedQuestion]] = {}
        for name, chosen in sets.items():
            asked = ((q, prompts.chat_fault(q.without_audio(), q.views)) for q in chosen.questions)
            if faults := [Reject(question.id, f"it {fault}") for question, fault in asked if fault is not None]:
                self._check_rejects(name, [*faults, *chosen.rejects])

    def directory(self, label: str) -> Path:
        """Return the directory of one model's evaluation."""
        return self._root / label

    def prepare(self) -> None:
        """Make all prompts now and keep them, for a run that evaluates the same questions many times.

        Raises:
            CordError: more prompts cannot be made than evaluation.max_rejects allows.
        """
        for name, chosen in self._sets.items():
            self._prepared[name] = [prepare(question, self._prompts) for question in chosen.questions]
            rejects = [Reject(p.question.id, p.reject) for p in self._prepared[name] if p.reject is not None]
            self._check_rejects(name, [*chosen.rejects, *rejects])

    def answer_anew(self, engine: RolloutEngine, measure: Measure | None = None) -> dict[str, float]:
        """Answer all questions, each set in one call of the engine; answers are kept in memory until they are scored.

        Args:
            engine: generates with the weights to evaluate, collectively.
            measure: scores the first `evaluation.scored` audio responses of each set.

        Returns:
            the scalars that were measured.
        """
        self._answered = {}
        for name, chosen in self._sets.items():
            begun = time.perf_counter()
            prepared = self._prepared.get(name) or [prepare(question, self._prompts) for question in chosen.questions]
            answers, metrics = generate_answers(
                prepared, engine, self._prompts, self._config.max_new_tokens, measure, self._config.scored
            )
            self._answered[name] = _Answered({a.id: a for a in answers}, metrics, time.perf_counter() - begun)
        return {key: value for found in self._answered.values() for key, value in found.metrics.items()}

    def take(self, directory: Path) -> None:
        """Take the answers that the same weights gave to the same questions in another evaluation. Collective.

        Args:
            directory: of that evaluation.

        Raises:
            CordError: a set is missing there, or has other questions.
        """
        self._answered = {}

        def read() -> None:
            for name, chosen in self._sets.items():
                path = directory / f"{name}.json"
                rows = {row["id"]: row for row in read_result(path)["answers"]}
                if [(q.id, q.asked) for q in chosen.questions] != [(i, row["question"]) for i, row in rows.items()]:
                    raise CordError(f"{path} has other questions than the set {name}; evaluate this model by itself")
                self._answered[name] = _Answered({i: answer_of(row) for i, row in rows.items()})

        run_on_main(read)

    def answer(
        self,
        label: str,
        model: str,
        engine: RolloutEngine,
        progress: Progress = lambda *_: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Answer what is not answered yet, `evaluation.chunk` questions at a time, each chunk kept on disk.

        Args:
            label: names the evaluation.
            model: stands for the weights; kept answers of others are refused.
            engine: generates with them, collectively.
            progress: told what is done.
            stop: asked before each chunk, by all ranks together, whether to end there; the same on all of them.

        Returns:
            whether everything is answered.

        Raises:
            CordError: kept answers are of another model, or the engine fails; what was answered is kept.
        """
        self._answered = {}
        for name, chosen in self._sets.items():
            begun = time.perf_counter()
            questions, limit = chosen.questions, self._config.max_new_tokens
            journal = Journal(self.directory(label) / f"{name}.jsonl", model, questions, limit)
            answers = self._kept(journal)
            missing = [question for question in questions if question.id not in answers]
            progress(name, len(questions) - len(missing), len(questions))
            for start in range(0, len(missing), self._config.chunk):
                if stop():
                    return False
                prepared = [prepare(q, self._prompts) for q in missing[start : start + self._config.chunk]]
                made, _ = generate_answers(prepared, engine, self._prompts, limit)
                answers |= {answer.id: answer for answer in made}
                if self._writes:
                    journal.append(made)
                progress(name, len(made), len(questions))
            self._answered[name] = _Answered(answers, seconds=time.perf_counter() - begun)
        return True

    def score(self, label: str, step: int, checkpoint: str | None = None) -> dict[str, dict[str, Any]]:
        """Score the answers and write each set's result.

        Args:
            label: names the evaluation; its model is the one that answered last.
            step: of the weights.
            checkpoint: fingerprint of the files that the run began with, for the results; None leaves it out.

        Returns:
            the sets' results without their answers, on every rank.

        Raises:
            CordError: more questions have no prompt than evaluation.max_rejects allows.
        """
        scored: dict[str, dict[str, Any]] = run_on_main(lambda: self._score(label, step, None, checkpoint)[0])
        return scored

    def check_guards(self) -> None:
        """Refuse guards that cannot decide, before anything is answered. Collective.

        Raises:
            CordError: a guard's set lacks its view, or its own baseline is missing or of no use.
        """
        for name, config in self._config.guards.items():
            if not any(config.view in question.views for question in self._sets[config.set].questions):
                raise CordError(
                    f"evaluation.guards.{name}: the set {config.set} has no question with the view {config.view}; "
                    "guard another view or set"
                )
        run_on_main(lambda: list(map(self._own_baseline, self._config.guards)))

    def compare(self, label: str, step: int, baseline: Path | None) -> dict[str, Any]:
        """Score the answers, compare them, and write each set's result and `results.json`, `.md` and `.html`.

        Args:
            label: names the evaluation; its model is the one that answered last.
            step: of the weights.
            baseline: the directory of the evaluation to compare with; None compares nothing.

        Raises:
            CordError: more questions have no prompt than may be, or the baseline lacks a set.
        """
        compared: dict[str, Any] = run_on_main(lambda: self._compare(label, step, baseline))
        return compared

    def _kept(self, journal: Journal) -> dict[str, Answer]:
        """Return the answers of an earlier run, which one rank reads; the others learn which there are."""
        kept: dict[str, Answer] = {}

        def read() -> list[str]:
            kept.update(journal.read())
            return list(kept)

        return {name: Answer(name) for name in run_on_main(read)} | kept

    def _compare(self, label: str, step: int, baseline: Path | None) -> dict[str, Any]:
        before = None if baseline is None else {name: self._score_before(baseline, name) for name in self._sets}
        results, rows = self._score(label, step, before)
        result = {
            "model": label,
            "step": step,
            "baseline": None if baseline is None else baseline.name,
            "sets": results,
            "overall": overall(results, rows, before),
            "forgetting": forgotten(results),
            "guards": self._compare_guarded(label, rows, before),
        }
        questions = {name: chosen.questions for name, chosen in self._sets.items()}
        write_pages(self.directory(label), result, rows, questions, self._config.players)
        return result

    def _compare_guarded(
        self, label: str, rows: Mapping[str, Sequence[Row]], before: Mapping[str, Sequence[Row]] | None
    ) -> dict[str, dict[str, Any]]:
        """Return each guard's result: since its own baseline, else the evaluation's, else the run's first result."""
        baselines = {}
        for name, config in self._config.guards.items():
            results = set_files(self._root.parent, config.set).values()
            first = next((path for path in results if path.parent.name != label), None)
            if (own := self._own_baseline(name)) is not None:
                baselines[name] = own
            elif before is not None:
                baselines[name] = outcomes_of(before[config.set], config.modality)
                check_useful(f"evaluation.guards.{name}", baselines[name], config)
            elif first is not None:
                baselines[name] = self._read_baseline(name, first)
            else:
                logger.warning(
                    "evaluation.guards.%s is not checked: give it a baseline, or evaluation.baseline, to compare with",
                    name,
                )
        return compare_guarded(self._config.guards, baselines, rows)

    def _own_baseline(self, name: str) -> dict[str, float] | None:
        config = self._config.guards[name]
        return None if config.baseline is None else self._read_baseline(name, baseline_file(config, Path()))

    def _read_baseline(self, name: str, path: Path) -> dict[str, float]:
        config = self._config.guards[name]
        try:
            return read_baseline(path, config, self._sets[config.set].questions, self._config.max_rejects)
        except CordError as error:
            raise CordError(f"evaluation.guards.{name}: {error}") from None

    def _score(
        self, label: str, step: int, before: Mapping[str, Sequence[Row]] | None, checkpoint: str | None = None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, list[Row]]]:
        results: dict[str, dict[str, Any]] = {}
        rows: dict[str, list[Row]] = {}
        for seed, (name, chosen) in enumerate(self._sets.items()):
            answered = self._answered[name]
            rows[name], unanswered = score_set(chosen, answered.answers, self._comparer, self._judge)
            rejects = [*chosen.rejects, *unanswered]
            path = self.directory(label) / f"{name}.rejects.jsonl"
            path.unlink(missing_ok=True)
            if rejects:
                write_lines(path, map(asdict, rejects))
            self._check_rejects(name, rejects, path)
            result = set_result(rows[name], rejects, None if before is None else before[name], seed)
            results[name] = result | answered.metrics
            whole = {"set": name, "model": label, "step": step, "seconds": answered.seconds, **results[name]}
            if checkpoint is not None:
                whole["checkpoint"] = checkpoint
            write_atomic(
                self.directory(label) / f"{name}.json", json.dumps(whole | {"answers": rows[name]}, ensure_ascii=False)
            )
        return results, rows

    def _score_before(self, baseline: Path, name: str) -> list[Row]:
        path, questions = baseline / f"{name}.jsonl", self._sets[name].questions
        if not path.is_file():
            raise CordError(f"evaluation.baseline: {path} does not exist; evaluate that model on the same sets first")
        answers = Journal(path, None, questions, self._config.max_new_tokens).read()
        if missing := sum(question.id not in answers for question in questions):
            raise CordError(f"evaluation.baseline: {path} lacks {missing} answers; finish that evaluation first")
        return score_set(self._sets[name], answers, self._comparer, self._judge)[0]

    def _check_rejects(self, name: str, rejects: Sequence[Reject], path: Path | None = None) -> None:
        chosen = self._sets[name]
        total = len(chosen.questions) + len(chosen.rejects)
        if len(rejects) > self._config.max_rejects * total:
            raise CordError(
                f"evaluation set {name}: {len(rejects)} of {total} questions cannot be used, more than "
                f"evaluation.max_rejects={self._config.max_rejects:g} allows; the first, {rejects[0].id}: "
                f"{rejects[0].reason}" + ("" if path is None else f"; see {path}")
            )
