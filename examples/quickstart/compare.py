"""The quickstart on several seeds, beside two off-policy rivals with the same budget: `python -m examples.quickstart.compare [--seeds 0 1 2]`.

Each method starts from the seed's own checkpoint and takes as many steps on as many prompts as CORD; only the objective differs. Runs that are
there already are not repeated. Writes `benchmarks/results/quickstart.json` and prints the table that docs/quickstart.md shows.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_cord import cli
from megatron_cord.errors import CordError

RESULTS = Path("benchmarks/results/quickstart.json")
_OFF_POLICY = ["objective.responses=teacher", "objective.policy_gradient=false", "objective.token_weights=uniform"]
METHODS: dict[str, list[str]] = {
    "CORD": [],
    "SFT on the teacher's answers": [*_OFF_POLICY, "objective.divergence=nll"],
    "off-policy forward KL": [*_OFF_POLICY, "objective.divergence=forward_kl"],
}


def run(method: str, seed: int) -> dict[str, Any]:
    """The summary of one run, which is made if it is not there.

    Raises:
        CordError: the run failed.
    """
    root = Path("runs/quickstart" if seed == 0 else f"runs/quickstart-seed{seed}")
    directory = root if method == "CORD" else root / method.replace("'", "").replace(" ", "-")
    if not (directory / "summary.json").is_file():
        overrides = METHODS[method] + ([] if method == "CORD" else [f"output_dir={directory}"])
        command = [sys.executable, "-m", "examples.quickstart.run", "--seed", str(seed), *overrides]
        if subprocess.run(command, check=False).returncode:
            raise CordError(f"{method} on seed {seed} failed; its own message stands above")
    return json.loads((directory / "summary.json").read_text())


def table(results: dict[str, dict[int, dict[str, Any]]], seeds: list[int]) -> str:
    """Markdown: audio accuracy before and after by seed, and the mean share of the gap that was closed."""
    lines = ["| method | " + " | ".join(f"seed {s}" for s in seeds) + " | mean gap closed |", "|---|" + "---|" * (len(seeds) + 1)]
    before = [results["CORD"][seed]["audio_accuracy_before"] for seed in seeds]
    lines.append("| before | " + " | ".join(f"{b:.1%}" for b in before) + " | |")
    for method, by_seed in results.items():
        closed = [by_seed[seed]["gap_closed"] for seed in seeds]
        cells = [f"{by_seed[seed]['audio_accuracy_after']:.1%} ({c:.0%})" for seed, c in zip(seeds, closed, strict=True)]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {sum(closed) / len(closed):.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = cli.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, weights and sampling")
    seeds = parser.parse_args().seeds
    results = {method: {seed: run(method, seed) for seed in seeds} for method in METHODS}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(table(results, seeds))


if __name__ == "__main__":
    cli.run(main)
