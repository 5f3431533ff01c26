"""Time of a CORD step on spoken questions at real shapes, beside a plain script's step, in the same run.

    python -m benchmarks.speech.step [--dtype bfloat16] [--rounds 3] [--output FILE]

The model is SmolLM2-135M behind Whisper tiny.en (random weights), encoder and language model frozen, as in `make
speech`; a step is 16 responses of 12 tokens. ``ours`` is the trainer's step on one rank; ``plain`` is the same step in
plain torch and transformers, whose frozen encoder's states are computed before its clock starts. The first step's
divergence, whose weights are equal, is given for both: it shows that they compute the same quantity, up to the
sampling.

On a CPU, seconds are those of the process's one thread, so that other programs on the machine count little. The two
take turns; each round is a process of its own, its first steps are left out, and the median of the rounds counts.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import smollm2
from benchmarks.figures import processor, publish
from benchmarks.speech.setting import SpeechSetting
from benchmarks.train import measure
from megatron_cord.runtime.entry import Parser, run


def main() -> None:
    """Run the benchmark."""
    parser = Parser(description="Measures a CORD step at real shapes beside a plain script's.", allow_abbrev=False)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="of each side (default: 3)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    setting = SpeechSetting(dtype=arguments.dtype)
    rounds: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        smollm2.write_language_model(work / "llm", 0, getattr(torch, setting.dtype))
        smollm2.write_speech_model(work / "student", work / "llm", work / "whisper", 0)
        for _ in range(arguments.rounds):
            for side, measured in rounds.items():
                measured.append(measure(f"benchmarks.speech.{side}", sys.executable, work, setting))
    ratios = [
        p["seconds_per_step"] / o["seconds_per_step"] for p, o in zip(rounds["plain"], rounds["ours"], strict=True)
    ]
    middle = {
        side: sorted(measured, key=lambda r: r["seconds_per_step"])[(len(measured) - 1) // 2]
        for side, measured in rounds.items()
    }
    result = {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_of_rounds": [round(ratio, 3) for ratio in ratios],
        **middle,
        "setting": asdict(setting),
        "model": {"language": smollm2.LANGUAGE, "whisper": smollm2.WHISPER},
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": 1,
            "load_average": round(os.getloadavg()[0], 1),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")},
    }
    publish(result, arguments.output)
    print(f"{result['ratio']:.2f} × as fast as the plain script", file=sys.stderr)


if __name__ == "__main__":
    run(main)
