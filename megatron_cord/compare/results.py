"""The result of a comparison: one JSON object, from which tables and charts are drawn.

    {"title", "reference", "train", "settings", "budget", "notes": what makes the comparison less than fair, in words,
     "machine", "before": {text_accuracy, audio_accuracy: Mean},
     "methods": {NAME: {"title", "ablates", "settings", "responses",
                        "runs": {SEED: summary and "machine", or {"failure"}},
                        "text_accuracy", "audio_accuracy", "gap", "gap_closed", "seconds", "divergence": Mean,
                        "guards": {GUARD: {"before", "accuracy", "drop": Mean}},
                        "difference": Mean, "questions": SignTest}}}

A Mean is {mean, low, high, n} over the seeds (evaluation/statistics.py), and null where no run has the value. A
difference is the reference's audio accuracy minus the method's; a divergence is of the heard answers that evaluations
scored, in nats a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.kept import FinishedRun, read_finished, this_machine
from megatron_cord.compare.methods import Method
from megatron_cord.compare.plan import PlannedRun
from megatron_cord.compare.running import Outcome
from megatron_cord.config.flattening import flatten
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.statistics import Mean, mean_of, paired_difference, sign_test
from megatron_cord.trainer.config import RunConfig

Runs = dict[int, dict[str, Any]]  # of one method, by seed


def gather(config: CompareConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Gather the runs that are complete, see the top of this file."""
    summaries: dict[str, Runs] = {name: {} for name in config.chosen}
    answers: dict[str, dict[int, dict[str, float]]] = {name: {} for name in config.chosen}
    failures: dict[str, dict[int, str]] = {name: {} for name in config.chosen}
    taken: dict[str, tuple[PlannedRun, FinishedRun]] = {}
    runs: dict[str, PlannedRun] = {}
    for outcome in sorted(outcomes, key=lambda o: o.run.seed):
        run = outcome.run
        runs[run.method] = run
        if outcome.failure is None:
            found = read_finished(run)
            summaries[run.method][run.seed] = found.summary | {"machine": found.machine} | _divergences(found)
            answers[run.method][run.seed] = found.outcomes[HELDOUT].get("audio", {})
            taken[f"{run.method} {run.seed}"] = run, found
        else:
            failures[run.method][run.seed] = outcome.failure
    reference = config.chosen_reference
    # Before training, all methods of a seed are the same model.
    first = {seed: summary for by_seed in summaries.values() for seed, summary in by_seed.items()}
    methods = {}
    for name, method in config.chosen.items():
        methods[name] = _method(
            replace(method, settings=method.settings + config.adjust.get(name, ())),
            runs.get(name),
            summaries[name],
            failures[name],
        )
        if name != reference:
            ours, theirs = (_column(summaries[n], "audio_accuracy_after") for n in (reference, name))
            difference = paired_difference(ours, theirs)
            methods[name]["difference"] = None if difference is None else asdict(difference)
            methods[name]["questions"] = _questions(answers[reference], answers[name])
    return {
        "title": config.title,
        "reference": reference,
        "train": config.train,
        "settings": list(config.settings),
        "budget": _budget(next(iter(runs.values())).config) if runs else {},
        "notes": [*_notes(config, runs, summaries, answers), *_machine_notes(taken)],
        "machine": this_machine(),
        "before": {name: _mean(list(_column(first, column).values())) for name, column in _BEFORE.items()},
        "methods": methods,
    }


_BEFORE = {"text_accuracy": "text_accuracy", "audio_accuracy": "audio_accuracy_before"}
_AFTER = {
    "text_accuracy": "text_accuracy_after",
    "audio_accuracy": "audio_accuracy_after",
    "gap": "gap_after",
    "gap_closed": "gap_closed",
    "seconds": "seconds",
    "divergence": "divergence_after",
}
GUARDED = ("before", "accuracy", "drop")  #: of a guard's result


def _method(method: Method, run: PlannedRun | None, summaries: Runs, failures: dict[int, str]) -> dict[str, Any]:
    return {
        "title": method.title,
        "ablates": method.ablates,
        "settings": list(method.settings),
        "responses": None if run is None else responses(run.config),
        "runs": {str(seed): summary for seed, summary in summaries.items()}
        | {str(s): {"failure": why} for s, why in failures.items()},
        **{name: _mean(list(_column(summaries, column).values())) for name, column in _AFTER.items()},
        "guards": _guards(summaries),
    }


def _guards(summaries: Runs) -> dict[str, dict[str, Any]]:
    """Return what each guard of the runs measured after training, over their seeds."""
    by_seed = [summary.get("guards", {}) for summary in summaries.values()]
    return {
        name: {key: _mean([guards[name][key] for guards in by_seed if name in guards]) for key in GUARDED}
        for name in dict.fromkeys(name for guards in by_seed for name in guards)
    }


def responses(config: RunConfig) -> dict[str, int]:
    """Return how many responses a step trains on, and how many of them the student samples."""
    objective, rollout = config.objective, config.rollout
    policy = rollout.policy_prompts_per_step * sum(map(len, objective.groups(rollout.policy_rollouts).values()))
    alone = 0 if rollout.share and policy else rollout.prompts_per_step * len(objective.draws)
    texts = sum(not objective.term_of(draw).sampled for draw in objective.draws)  # of the samples, not sampled
    given = rollout.prompts_per_step * texts if alone else 0
    return {"trained": alone + policy, "sampled": policy + (0 if objective.responses == "teacher" else alone - given)}


def _notes(
    config: CompareConfig,
    runs: Mapping[str, PlannedRun],
    summaries: Mapping[str, Runs],
    answers: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> list[str]:
    """Return in words how what is compared differs beside its method: finished runs may have any settings."""
    reference, notes = config.chosen_reference, list[str]()
    if reference not in runs:
        return notes
    expected = _budget(runs[reference].config)
    for name, run in runs.items():
        given = _budget(run.config)
        if differing := [key for key in expected if given[key] != expected[key]]:
            shown = ", ".join(f"{given[key]} {key.replace('_', ' ')} (not {expected[key]})" for key in differing)
            notes.append(f"{name} had another budget than {reference}: {shown}.")
        for seed, summary in summaries[name].items():
            ours = summaries[reference].get(seed)
            if ours is not None and summary["audio_accuracy_before"] != ours["audio_accuracy_before"]:
                notes.append(
                    f"{name}, seed {seed}, began with another accuracy than {reference}: another model or set."
                )
            if seed in answers[reference] and answers[name][seed].keys() != answers[reference][seed].keys():
                notes.append(f"{name}, seed {seed}, was evaluated on other questions than {reference}.")
            if summary.get("ended_by", "steps") != "steps":
                notes.append(f"{name}, seed {seed}, ended after step {summary['steps']} ({summary['ended_by']}).")
    return notes


def _machine_notes(found: Mapping[str, tuple[PlannedRun, FinishedRun]]) -> list[str]:
    """Return which of the settings that are left to machines differ between runs, by the run's name."""
    values: dict[str, dict[str, list[str]]] = {}  # key → value → names of runs
    for name, (run, finished) in found.items():
        for key, value in flatten(finished.settings).items():
            if run.leaves_free(key):
                values.setdefault(key, {}).setdefault(str(value), []).append(name)
    return [
        f"{key} was not the same: "
        + "; ".join(f"{value} in {', '.join(names)}" for value, names in by_value.items())
        + "."
        for key, by_value in values.items()
        if len(by_value) > 1
    ]


def _budget(config: RunConfig) -> dict[str, int]:
    return {
        "steps": config.train.steps,
        "prompts": config.rollout.prompts_per_step,
        "max_new_tokens": config.rollout.max_new_tokens,
    }


def _divergences(run: FinishedRun) -> dict[str, float | None]:
    return {f"divergence_{name}": run.divergence.get(name) for name in ("before", "after")}


def _column(summaries: Runs, name: str) -> dict[int, float]:
    """Return one value by seed, where there is one: without a gap none is closed."""
    return {seed: summary[name] for seed, summary in summaries.items() if summary[name] is not None}


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    mean: Mean | None = mean_of(values) if values else None
    return None if mean is None else asdict(mean)


def _questions(first: dict[int, dict[str, float]], second: dict[int, dict[str, float]]) -> dict[str, Any] | None:
    pairs = [
        (bool(right), bool(second[seed][question]))
        for seed, by_question in first.items()
        for question, right in by_question.items()
        if question in second.get(seed, {})
    ]
    return asdict(sign_test(pairs)) if pairs else None
