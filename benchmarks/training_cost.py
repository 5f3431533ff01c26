"""Measure what a training step of the quickstart costs, in time and memory, for checkouts of the project.

    python -m benchmarks.training_cost --checkout . [--checkout ../before] [--steps 80] [--turns 3] [--output FILE]

Each checkout trains from the same data and checkpoint (of `make quickstart`, in runs/quickstart), two
tensor-parallel ranks, with its own quickstart.yaml. The checkouts take turns, so that a slow moment of the machine
meets all of them. A step's time is the median over the steps of all turns, the first five of each left out; memory is
the largest resident set that the system has seen of a rank (VmHWM), the larger of two ranks, the median of the turns.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.figures import processor, publish
from megatron_cord.runtime.entry import Parser

_WARM_UP_STEPS = 5
_POLL_SECONDS = 0.05


def peak_resident(process: subprocess.Popen[bytes]) -> float:
    """Wait until the process has ended; return the largest resident set of its descendants, MB."""
    peaks = [0.0]
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
            except (OSError, psutil.Error):
                continue
            peaks.append(int(found[1]) / 1000 if found else 0.0)
        time.sleep(_POLL_SECONDS)
    return max(peaks)


def train(checkout: Path, inputs: Path, steps: int) -> tuple[list[float], float]:
    """Train in a checkout; return the seconds of its steps and the peak of resident memory, MB."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            *(sys.executable, "-m", "megatron_cord.launch", "--standalone", "--nproc-per-node", "2"),
            *("-m", "megatron_cord.train", "--config", "examples/quickstart/quickstart.yaml"),
            *(f"output_dir={output}", f"model.checkpoint={inputs}/checkpoint", f"train.steps={steps}"),
            *(f"data.train={inputs}/data/train", f"data.evaluation={inputs}/data/heldout"),
            *("evaluation.interval=0", "evaluation.samples=8", "checkpoint.interval=0"),
        ]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=checkout, env=environment, stderr=subprocess.DEVNULL)
        peak = peak_resident(process)
        if process.returncode:
            sys.exit(
                f"error: training in {checkout} ended with status {process.returncode}; run it by itself to see why"
            )
        rows = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [row["seconds"] for row in rows[_WARM_UP_STEPS:]], peak


def main() -> None:
    """Measure and publish."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, action="append", required=True, help="a directory of the project")
    parser.add_argument("--inputs", type=Path, default=Path("runs/quickstart"), help="data and checkpoint")
    parser.add_argument("--steps", type=int, default=80, help="of each run")
    parser.add_argument("--turns", type=int, default=3, help="runs of each checkout")
    parser.add_argument("--output", type=Path, help="file of the figures")
    given = parser.parse_args()
    seconds: dict[Path, list[float]] = {path.resolve(): [] for path in given.checkout}
    peaks: dict[Path, list[float]] = {path: [] for path in seconds}
    for _ in range(given.turns):
        for path in seconds:
            times, peak = train(path, given.inputs.resolve(), given.steps)
            seconds[path] += times
            peaks[path].append(peak)
    publish(
        {
            "processor": processor(),
            "steps": given.steps,
            "turns": given.turns,
            "checkouts": {
                revision(path): {
                    "step_seconds": statistics.median(seconds[path]),
                    "peak_resident_megabytes": statistics.median(peaks[path]),
                }
                for path in seconds
            },
        },
        given.output,
    )


def revision(checkout: Path) -> str:
    """Return the short name of the commit that is checked out."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
