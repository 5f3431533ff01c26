"""Guards of a run: accuracies that training must not cost, and what happens when one has dropped too far.

A run's results on its question sets are all the state there is: a run that goes on reads them again, and comes to the
same decision as one that was never stopped. What a guard has ended stands in `summary.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import EvaluationConfig
from megatron_cord.evaluation.files import set_files
from megatron_cord.evaluation.guards import (
    Drop,
    baseline_file,
    guard_result,
    measure_drop,
    read_baseline,
    read_outcomes,
)
from megatron_cord.evaluation.questions import Question
from megatron_cord.parallel.objects import broadcast_json, run_on_main

_KEY = "evaluation.guards"


class Guards:
    """The guards of a run. All ranks call its methods together.

    Args:
        config: of evaluations, with the guards by name.
        questions: of each set.
        run: its directory.
        begun: the step after which the run began in its directory.
        last: the step of the weights that the run goes on from; None for a run that begins.
        settings: a fingerprint of the run's.
        ended: what `record` returned when a guard ended the run before; None where none did.

    Attributes:
        drops: since the baselines by step and guard, of the evaluations up to now.
        ended: of a run that a guard made go back to its present step, with the same settings, before; else None.

    Raises:
        CordError: a guard's set lacks its view, or its baseline is missing or of no use.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        questions: Mapping[str, Sequence[Question]],
        run: Path,
        begun: int,
        last: int | None,
        *,
        settings: str,
        ended: Mapping[str, Any] | None,
    ) -> None:
        self._config, self._max_rejects, self._run, self._begun = config.guards, config.max_rejects, run, begun
        self._questions, self._settings = questions, settings
        self._baselines: dict[str, dict[str, float]] = {}  # outcomes by question, on the rank that reads
        self._in_a_row = dict.fromkeys(config.guards, 0)  # evaluations beyond the limit, the last ones
        self.drops: dict[int, dict[str, Drop]] = {}
        self.held_steps: list[int] = []  #: at which every guard that acts was within its limit, ascending
        self.ended: dict[str, Any] | None = None
        if not self._config:
            return
        for name, guard in self._config.items():
            if not any(guard.view in question.views for question in questions[guard.set]):
                raise CordError(
                    f"{_KEY}.{name}: the set {guard.set} has no question with the view {guard.view}; guard another "
                    "view or set"
                )
        known = {name for name, guard in self._config.items() if last is not None or guard.baseline is not None}
        run_on_main(lambda: self._learn(known))
        for step in run_on_main(lambda: self._past(last)) if last is not None else ():
            self._follow(step)
        stays = ended is not None and (ended.get("restored"), ended.get("settings")) == (last, settings)
        self.ended = broadcast_json(dict(ended) if ended is not None and stays else None)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._config)

    def check(self, step: int) -> dict[str, Drop]:
        """Measure the drops after an evaluation whose results are written; return them by guard.

        Raises:
            CordError: the baselines, which the run's first evaluation gives, are of no use; or the run begins beyond a
                guard's limit.
        """
        if not self._config:
            return {}
        if step == self._begun:
            run_on_main(lambda: self._learn(self._config.keys() - self._baselines.keys()))
        drops = self._follow(step)
        for name, drop in drops.items() if step == self._begun else ():
            if drop.exceeds(self._config[name]) and self._config[name].action != "warn":
                raise CordError(
                    f"{_KEY}.{name}: the model that the run begins with has already dropped by {drop} since "
                    f"{self._config[name].baseline}, more than max_drop={self._config[name].max_drop:g} allows; raise "
                    "it, or take another baseline"
                )
        return drops

    def warning(self, name: str, drop: Drop) -> str | None:
        """Say in words that a drop is beyond its guard's limit; None for one that is not."""
        guard = self._config[name]
        if not drop.exceeds(guard):
            return None
        since = f"since {guard.baseline}" if guard.baseline else "since the run's first evaluation"
        in_a_row = f"; {self._in_a_row[name]} of {guard.patience} in a row" if guard.patience > 1 else ""
        return (
            f"{guard.modality} accuracy on {guard.set} has dropped by {drop} {since}: beyond "
            f"max_drop={guard.max_drop:g} (decides={guard.decides}{in_a_row})"
        )

    @property
    def triggered(self) -> str | None:
        """The guard that ends the run now; of several first one that restores. None where none does."""
        names = [n for n, g in self._config.items() if g.action != "warn" and self._in_a_row[n] >= g.patience]
        return min(names, key=lambda name: self._config[name].action == "stop", default=None)

    @property
    def ends(self) -> bool:
        """Whether a guard ends the run, or has ended it."""
        return self.triggered is not None or self.ended is not None

    @property
    def restores(self) -> bool:
        """Whether a guard may make the run go back to the last checkpoint at which all held."""
        return any(guard.action == "restore" for guard in self._config.values())

    def record(self, step: int, restored: int | None) -> dict[str, Any]:
        """Return the summary's entry about the ending after a step.

        Args:
            step: of the evaluation that ended the run.
            restored: the step that the run went back to; None where it did not.
        """
        name = self.triggered
        assert name is not None
        place = {"name": name, "step": step, "restored": restored, "settings": self._settings}
        return {**place, **guard_result(self._config[name], self.drops[step][name])}

    def results(self, step: int) -> dict[str, Any]:
        """Return for the summary what each guard measured after a step, and whether it held."""
        return {name: guard_result(self._config[name], drop) for name, drop in self.drops.get(step, {}).items()}

    def _learn(self, names: set[str]) -> None:
        """Read the baselines of some guards."""
        for name in names:
            guard = self._config[name]
            own = set_files(self._run, guard.set).get(self._begun)
            if guard.baseline is None and own is None:
                raise CordError(
                    f"{_KEY}.{name}: the run's first evaluation, after step {self._begun}, has no result on the set "
                    f"{guard.set}; name a result to compare with as {_KEY}.{name}.baseline"
                )
            path = baseline_file(guard, own or Path())
            try:
                self._baselines[name] = read_baseline(path, guard, self._questions[guard.set], self._max_rejects)
            except CordError as error:
                raise CordError(f"{_KEY}.{name}: {error}") from None

    def _past(self, last: int) -> list[int]:
        """Return the steps of evaluations up to `last` of which all results that the guards need can be read."""
        found = [set(set_files(self._run, guard.set)) for guard in self._config.values()]
        return [step for step in sorted(set.intersection(*found)) if self._begun < step <= last]

    def _follow(self, step: int) -> dict[str, Drop]:
        measured = run_on_main(lambda: {name: asdict(self._measure(name, step)) for name in self._config})
        drops = {name: Drop(**fields) for name, fields in measured.items()}
        beyond = {name for name, drop in drops.items() if drop.exceeds(self._config[name])}
        for name in drops:
            self._in_a_row[name] = self._in_a_row[name] + 1 if name in beyond else 0
        if not any(self._config[name].action != "warn" for name in beyond):
            self.held_steps.append(step)
        self.drops[step] = drops
        return drops

    def _measure(self, name: str, step: int) -> Drop:
        guard = self._config[name]
        path = set_files(self._run, guard.set)[step]
        return measure_drop(self._baselines[name], read_outcomes(path, guard))
