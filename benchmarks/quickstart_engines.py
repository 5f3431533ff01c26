"""The quickstart on SGLang servers beside the local engine: accuracies during training, and the final answers.

    python -m benchmarks.quickstart_engines LOCAL_RUN SGLANG_RUN [LOCAL_RUN SGLANG_RUN …] [--output FILE]

Each pair has started from one checkpoint. It only reads what the runs have left in their directories.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import processor, publish
from megatron_cord.evaluation.files import heldout_files, read_result
from megatron_cord.evaluation.statistics import mcnemar
from megatron_cord.runtime.entry import Parser, run


def evaluations(directory: Path) -> list[dict[str, Any]]:
    """Read the evaluations of a run, in their order."""
    return [read_result(file) for file in heldout_files(directory).values()]


def right(evaluation: dict[str, Any]) -> dict[str, bool]:
    """Return for each spoken question whether it was answered rightly."""
    return {answer["id"]: answer["audio_correct"] for answer in evaluation["answers"]}


def compare(pairs: list[tuple[Path, Path]]) -> dict[str, Any]:
    """Compare all pairs; test their final answers together with McNemar's test."""
    found: list[dict[str, Any]] = []
    outcomes: list[tuple[bool, bool]] = []
    for local, sglang in pairs:
        runs = {"local": evaluations(local), "sglang": evaluations(sglang)}
        on_local, on_sglang = (right(run[-1]) for run in runs.values())
        outcomes += [(on_local[question], on_sglang[question]) for question in on_local]
        lines = [json.loads(line) for line in (sglang / "metrics.jsonl").read_text().splitlines()]
        found.append(
            {
                "audio_accuracy": {
                    name: {str(e["step"]): e["audio_accuracy"] for e in run} for name, run in runs.items()
                },
                "lowest_text_accuracy": min(e["text_accuracy"] for run in runs.values() for e in run),
                "gap_closed": {name: 1 - run[-1]["gap"] / run[0]["gap"] for name, run in runs.items()},
                "right_only_local": sum(on_local[q] and not on_sglang[q] for q in on_local),
                "right_only_sglang": sum(on_sglang[q] and not on_local[q] for q in on_local),
                "largest_engine_logprob_difference": max(
                    line.get("engine_logprob_difference_max") or 0.0 for line in lines
                ),
            }
        )
    both = np.array(outcomes)
    after_warm_up = [step for step in found[0]["audio_accuracy"]["local"] if int(step) >= 100]
    means = {
        name: float(np.mean([p["audio_accuracy"][name][s] for p in found for s in after_warm_up]))
        for name in ("local", "sglang")
    }
    return {
        "pairs": found,
        "mean_audio_accuracy_from_step_100": means,
        "p_of_final_answers": float(mcnemar(both[:, 0], both[:, 1])),
    }


def main() -> None:
    """Run the comparison."""
    parser = Parser(
        description="Compares quickstarts on SGLang servers with those on the local engine.", allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directories: local, sglang, local, sglang …")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    if len(arguments.runs) % 2:
        parser.error("runs come in pairs: local, sglang")
    result = compare(list(zip(arguments.runs[::2], arguments.runs[1::2], strict=True)))
    result |= {"machine": {"processor": processor(), "cores": os.cpu_count()}}
    publish(result, arguments.output)


if __name__ == "__main__":
    run(main)
