"""A run of the methods' study on the fewer questions that `make speech` asks, so that the two can be compared.

    python -m benchmarks.speech.fewer runs/compare-speech/weighted_kl/seed-2

The study asks each held-out fact in three of its phrasings, `make speech` in the first two of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures import publish
from examples.speech_smollm2.questions import QuestionsConfig, questions
from megatron_cord.config.loading import load_config
from megatron_cord.evaluation.files import heldout_files, read_result
from megatron_cord.evaluation.results import set_result
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.trainer.config import RunConfig


def on_fewer_questions(directory: Path) -> dict[str, Any]:
    """Return the change of a run's accuracies on the questions of `make speech`."""
    seed = load_config(RunConfig, directory / "config.yaml").seed
    asked = {row["id"] for row in questions(QuestionsConfig(seed=seed))["heldout"]}
    results = [read_result(path) for path in heldout_files(directory).values()]
    first, last = ([row for row in result["answers"] if row["id"] in asked] for result in (results[0], results[-1]))
    return {"run": directory.as_posix(), "step": results[-1]["step"], **set_result(last, (), first)["change"]}


def main() -> None:
    """Print the figures."""
    parser = Parser(description="Compares the first and the last evaluation of runs on the questions of make speech.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directories of runs of the study")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    given = parser.parse_args()
    publish({"runs": [on_fewer_questions(path) for path in given.runs]}, given.output)


if __name__ == "__main__":
    run(main)
