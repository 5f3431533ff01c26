"""Dense distillation on stale rollouts: `python -m examples.chains.staleness [--cell NAME …] [--list] [a.b=value …]`.

Each cell is a run of the chains whose responses come from weights that are S steps old (`rollout.schedule.ahead`, exact
with on_weight_sync=finish), for a divergence, with the prefix's importance weights (`importance` of
objective.token_weights) or without. L_seq is off. Without staleness all weights are 1, and there is one cell for both.

Runs that are complete are not made again and stopped ones continue, as in `cord compare`, whose keys `staleness.yaml`
and the overrides have; small files keep what a run came to, so that the study may take several sittings and machines.
When all cells are there, tables and drawing are written; with --cell the chosen ones alone are run, and what is there
so far is printed. --incomplete runs nothing and writes what is there, with the number of the runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_cord.cli.actions.compare import Terminal
from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.kept import LAST_STEPS, is_complete, read_finished
from megatron_cord.compare.plan import PlannedRun, plan_runs
from megatron_cord.compare.running import Runner
from megatron_cord.compare.tables import around, machines
from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.evaluation.statistics import Mean, mean_of, paired_difference
from megatron_cord.runtime import entry
from megatron_cord.runtime.exit_status import STOPPED, USER_ERROR
from megatron_cord.runtime.files import write_atomic

DIVERGENCES = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}
STALENESS = (0, 1, 2, 4)
_COLOURS = {False: "#33567f", True: "#b3402a"}


@dataclass(frozen=True)
class Cell:
    """One setting of the study; `staleness` is in steps, `weighted` whether importance weights are on."""

    divergence: str
    staleness: int
    weighted: bool

    @property
    def name(self) -> str:
        """Its name as a method of the comparison."""
        return f"{self.divergence}-{self.staleness}{'-weighted' if self.weighted else ''}"

    @property
    def settings(self) -> tuple[str, ...]:
        """On top of CORD's."""
        return (
            f"objective.divergence.kind={self.divergence}",
            f"objective.token_weights.factors={'importance' if self.weighted else 'uniform'}",
            "objective.policy_gradient.enabled=false",
            f"rollout.schedule.ahead={self.staleness}",
        )


def cells() -> list[Cell]:
    """Return all cells; the same seeds of all staleness come before the next divergence."""
    return [
        Cell(divergence, staleness, weighted)
        for divergence in DIVERGENCES
        for weighted in (False, True)
        for staleness in STALENESS
        if staleness or not weighted
    ]


def study(config: CompareConfig, chosen: Sequence[Cell]) -> CompareConfig:
    """Return the comparison whose methods are the cells."""
    own = {cell.name: cell.settings for cell in chosen}
    return replace(config, methods=tuple(own), own=own, reference=chosen[0].name)


def measure(run: PlannedRun) -> dict[str, Any]:
    """Return what a complete run came to.

    Returns:
        audio accuracy before and after it, and text accuracy, shares; `kl` of the last steps, nats a token;
        `staleness`, mean over steps; `drift`, the mean difference of the trainer's from the sampling weights'
        log-probabilities, nats a token; and the machine.
    """
    found = read_finished(run)
    summary, metrics = found.summary, found.metrics
    # A step's responses are of older weights, or of the present ones: it has one of the two.
    drift = [metrics[name] for name in ("stale_logprob_difference", "engine_logprob_difference") if name in metrics]
    return {
        "before": summary["audio_accuracy_before"],
        "audio": summary["audio_accuracy_after"],
        "text": summary["text_accuracy_after"],
        "kl": metrics["kl"]["last"],
        "staleness": metrics["staleness"]["mean"],
        "drift": sum(each["mean"] * each["steps"] for each in drift) / sum(each["steps"] for each in drift),
        "seconds": summary["seconds"],
        "machine": {name: found.machine[name] for name in ("processor", "cores")},
    }


def gather(config: CompareConfig, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Return the study's result: its settings, and by cell what the complete runs came to, with means over seeds."""
    found: dict[str, Any] = {}
    by_name = {cell.name: cell for cell in cells()}
    for run in runs:
        if is_complete(run):
            cell = found.setdefault(run.method, asdict(by_name[run.method]) | {"runs": {}})
            cell["runs"][str(run.seed)] = measure(run)
    for cell in found.values():
        for key in ("audio", "text", "kl", "drift"):
            cell[key] = asdict(mean_of([values[key] for values in cell["runs"].values()]))
        fresh = found.get(Cell(cell["divergence"], 0, weighted=False).name)
        if cell["staleness"] and fresh is not None:
            ours, theirs = ({int(s): v["audio"] for s, v in each["runs"].items()} for each in (cell, fresh))
            difference = paired_difference(ours, theirs)
            cell["difference"] = None if difference is None else asdict(difference)
    settings = {"train": config.train, "settings": list(config.settings), "seeds": list(config.seeds)}
    runs_made = {"complete": sum(len(cell["runs"]) for cell in found.values()), "planned": len(runs)}
    return {"title": config.title, **settings, "runs": runs_made, "cells": found}


def tables(result: Mapping[str, Any]) -> str:
    """Return the tables as Markdown: accuracy, divergence, and how far the sampling weights were away."""
    shown: list[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = [
        ("audio", "Audio accuracy after training, %", lambda m: _interval(m, 100, 1)),
        (
            "difference",
            "Audio accuracy minus that without staleness, points, paired by seed",
            lambda m: _interval(m, 100, 1),
        ),
        ("kl", f"Divergence in the last {LAST_STEPS} steps, nats a token", lambda m: _interval(m, 1, 3)),
        ("drift", "Mean difference of log-probabilities from the sampling weights', nats a token", _plain),
    ]
    parts = []
    for key, title, form in shown:
        head = ["divergence", "importance weights", *(f"staleness {s}" for s in STALENESS)]
        lines = [head, ["---"] * len(head)]
        for divergence, words in DIVERGENCES.items():
            for weighted in (False, True):
                row = [result["cells"].get(Cell(divergence, s, weighted and s > 0).name) for s in STALENESS]
                values = [form(each[key]) if each and each.get(key) else "" for each in row]
                lines.append([words, "on" if weighted else "off", *values])
        parts.append(f"{title}:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    seeds = ", ".join(sorted({seed for cell in result["cells"].values() for seed in cell["runs"]}, key=int))
    made_by = {
        f"{name} seed {seed}": run["machine"]
        for name, cell in result["cells"].items()
        for seed, run in cell["runs"].items()
    }
    settings = [s for s in result["settings"] if s.startswith(("train.steps", "rollout."))]
    made = result["runs"]
    whole = made["complete"] == made["planned"]
    part = "Seeds" if whole else f"{made['complete']} of {made['planned']} runs were made; seeds"
    note = (
        f"{part} {seeds}; {', '.join(f'`{s}`' for s in settings)}; intervals are Student's over seeds, 95 %; "
        "without staleness all importance weights are 1, and both rows have the same runs; "
        f"{machines(made_by)}."
    )
    return "\n\n".join([note, *parts])


def draw(result: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draw audio accuracy and divergence by staleness, a column a divergence; dots are seeds, lines their means."""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "staleness", "font.size": 9, "axes.grid": True}
    spines: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "grid.color": "#dddddd"}
    with matplotlib.rc_context(style | spines):
        figure = Figure(figsize=(8.4, 4.8), layout="constrained")
        panels = figure.subplots(2, len(DIVERGENCES), sharex=True, sharey="row", squeeze=False)
        for column, (divergence, words) in enumerate(DIVERGENCES.items()):
            panels[0, column].set_title(words)
            panels[1, column].set_xlabel("staleness, steps")
            for row, key in enumerate(("audio", "kl")):
                for weighted, colour in _COLOURS.items():
                    points = list(_points(result, divergence, weighted, key))
                    steps, means = [p[0] for p in points], [p[1] for p in points]
                    label = f"importance weights {'on' if weighted else 'off'}"
                    panels[row, column].plot(steps, means, color=colour, marker="s", markersize=4, label=label)
                    for step, _, seeds in points:
                        panels[row, column].plot([step] * len(seeds), seeds, ".", color=colour, alpha=0.35)
                panels[row, column].set_xticks(STALENESS)
        panels[0, 0].set_ylabel("audio accuracy")
        panels[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        panels[1, 0].set_ylabel(f"divergence, last {LAST_STEPS} steps, nats")
        panels[0, -1].legend(frameon=False, fontsize=8)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _points(
    result: Mapping[str, Any], divergence: str, weighted: bool, key: str
) -> Iterator[tuple[int, float, list[float]]]:
    for staleness in STALENESS:
        cell = result["cells"].get(Cell(divergence, staleness, weighted and staleness > 0).name)
        if cell is not None:
            yield staleness, cell[key]["mean"], [values[key] for values in cell["runs"].values()]


def _interval(mean: Mapping[str, Any], factor: float, digits: int) -> str:
    value = Mean(**mean)
    middle = f"{factor * value.mean:.{digits}f}"
    if value.low is None or value.high is None:
        return middle
    return f"{middle} ({factor * value.low:.{digits}f} to {factor * value.high:.{digits}f})"


def _plain(mean: Mapping[str, Any]) -> str:
    return f"{mean['mean']:.3g}"


def write(result: Mapping[str, Any], config: CompareConfig) -> None:
    """Write the result as JSON and Markdown, the drawing, and the tables into the page."""
    path, chart = config.results_path, config.chart_path
    assert path is not None, "output_dir is required"
    assert chart is not None, "likewise"
    texts = {
        path.with_name(f"{path.name}.json"): json.dumps(result, indent=1) + "\n",
        path.with_name(f"{path.name}.md"): f"# {result['title']}\n\n{tables(result)}\n",
    }
    if config.page:
        page = Path(config.page)
        before, after = around(page.read_text(encoding="utf-8"), path.name)
        link = Path(os.path.relpath(f"{chart}.png", page.parent)).as_posix()
        drawing = f"![{result['title']}: audio accuracy and divergence by staleness]({link})"
        texts[page] = f"{before}\n\n{tables(result)}\n\n{drawing}\n\n{after}"
    for target, text in texts.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text)
    draw(result, [chart.with_name(f"{chart.name}.png")])


def main() -> int:
    """Run what is missing of the study."""
    parser = entry.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "staleness.yaml", help="of the study")
    parser.add_argument("--cell", action="append", metavar="NAME", help="run this cell alone; may be given again")
    parser.add_argument("--list", action="store_true", help="name the cells and run nothing")
    parser.add_argument("--incomplete", action="store_true", help="run nothing, and write what is there")
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="sets one key of the study's configuration")
    arguments = parser.parse_intermixed_args()
    if arguments.list:
        print("\n".join(cell.name for cell in cells()))
        return 0
    named = {cell.name: cell for cell in cells()}
    if unknown := [name for name in arguments.cell or () if name not in named]:
        raise CordError(f"--cell {unknown[0]}: there is no such cell; --list names them")
    config = load_config(CompareConfig, arguments.config, arguments.overrides)
    everything = study(config, cells())
    chosen = study(config, [named[name] for name in arguments.cell]) if arguments.cell else everything
    if config.page and config.results_path is not None:
        around(Path(config.page).read_text(encoding="utf-8"), config.results_path.name)  # refused now, not at the end
    planned = plan_runs(everything)
    if arguments.incomplete:
        write(gather(everything, planned), everything)
        return 0
    runs = plan_runs(chosen)
    listener = Terminal(len(runs))
    with listener.bar, Runner(chosen, runs, listener) as runner:
        outcomes = runner.run()
    result = gather(everything, planned)
    print(tables(result))
    complete = result["runs"]["complete"]
    if complete == len(planned):  # a part does not replace the whole
        write(result, everything)
        print(f"written: {config.results_path}.json and .md, {config.chart_path}.png")
    else:
        print(f"{complete} of {len(planned)} runs are complete; nothing is written before all are")
    if runner.stopped:
        return STOPPED
    return USER_ERROR if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    entry.run(main)
