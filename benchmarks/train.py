"""Training throughput on this machine, beside TRL's GKD trainer, in the same run.

    python -m benchmarks.train [--model NAME] [--dtype float32] [--trl-python PATH] [--output FILE]

The models are Qwen2-Audio's proportions at a width for a CPU, or SmolLM2-135M and Whisper tiny.en at their own shapes
(``--model smollm2``), all with random weights. TRL (the extra `bench`) may live in an environment of its own: PATH is
its interpreter. Its GKD trainer takes text alone, so both train the same language model on the same text prompts, and
the audio tower stays idle. Both do the whole of an on-policy step with the same numbers: tokenize the prompts, sample
one response each at temperature 1 from the current weights, score it with a second model as the teacher, take the
reverse KL over the whole vocabulary at every token of the response, update all weights of the language model with
AdamW, one process, one thread, no accumulation. megatron_cord then also copies the weights into its engine, which TRL
need not: it generates from the model that it trains. In bfloat16 both keep fp32 weights and optimizer states, and TRL
is also measured with 16 bits of both (``trl_gkd_16_bit``), which is less work and another precision.

On a CPU, seconds are those of the process's one thread, so that other programs on the machine do not count. The two
take turns; each round is a process of its own, its first steps are left out, and the median of the rounds counts. The
divergence of the first step, whose weights are equal, is given for both: it shows that they compute the same quantity,
up to the sampling.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import smollm2
from benchmarks.figures import processor, publish
from benchmarks.train_setting import SETTINGS, Setting
from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.errors import CordError
from megatron_cord.runtime.entry import Parser, run

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sizes:
    """The language model: Qwen2-Audio-7B's proportions, at a width for a CPU.

    Vocabulary to width is 38, feed-forward to width 2.7.
    """

    vocabulary: int = 9984
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    ffn_size: int = 688


def write_models(directory: Path, name: str, setting: Setting) -> tuple[int, dict[str, Any]]:
    """Write `student` and `teacher`: checkpoints with different random weights and one vocabulary.

    Returns:
        The number of words that are tokens, w0 and on, and the language model's sizes.
    """
    if name == "smollm2":
        for seed, role in enumerate(("student", "teacher")):
            alone = directory / f"{role}-llm"
            smollm2.write_language_model(alone, seed, getattr(torch, setting.dtype))
            smollm2.write_speech_model(directory / role, alone, directory / "whisper", seed)
        return len(smollm2.words()), smollm2.LANGUAGE
    sizes = Sizes()
    config = TinyModelConfig(
        hidden_size=sizes.hidden_size,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        ffn_size=sizes.ffn_size,
        max_positions=1024,
    )
    words = [f"w{i}" for i in range(sizes.vocabulary - 9)]  # the rest are special tokens and roles
    for seed, role in enumerate(("student", "teacher")):
        create_checkpoint(directory / role, config, words, seed=seed)
    return len(words), asdict(sizes)


def write_prompts(path: Path, setting: Setting, words: int) -> None:
    """Write the questions of all steps, of random words, one a line."""
    rng = np.random.default_rng(0)
    count = setting.prompts * (setting.skipped_steps + setting.steps)
    lengths = rng.integers(setting.shortest, setting.longest + 1, size=count)
    path.write_text("".join(" ".join(f"w{i}" for i in rng.integers(0, words, size=n)) + "\n" for n in lengths))


def measure(module: str, python: str, work: Path, setting: Any, *options: str) -> dict[str, Any]:
    """Run one round of one side, with a dataclass of settings, in a process; return the figures of its last line."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [python, "-m", module, str(work), json.dumps(asdict(setting)), *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode != 0:
        raise CordError(
            f"{module} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}; "
            "for TRL: pip install -e '.[bench]', --trl-python"
        )
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the round whose tokens a second are the middle one's."""
    return sorted(rounds, key=lambda r: r["response_tokens_per_second"])[(len(rounds) - 1) // 2]


def main() -> None:
    """Run the benchmark."""
    parser = Parser(description="Measures training throughput beside TRL's GKD trainer.", allow_abbrev=False)
    parser.add_argument(
        "--trl-python", metavar="PATH", default=sys.executable, help="interpreter with TRL (default: this one)"
    )
    parser.add_argument("--model", choices=SETTINGS, default="qwen2_audio_small", help="whose shapes (default: small)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the models (default: float32)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each trainer (default: 3)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    setting = replace(SETTINGS[arguments.model], dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        words, sizes = write_models(work, arguments.model, setting)
        write_prompts(work / "prompts.txt", setting, words)
        sides: dict[str, list[str]] = {"megatron_cord": ["benchmarks.train_ours", sys.executable]}
        sides |= {"trl_gkd": ["benchmarks.train_trl", str(arguments.trl_python)]}
        if setting.dtype == "bfloat16":
            sides |= {"trl_gkd_16_bit": [*sides["trl_gkd"], "16-bit"]}
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, (module, python, *options) in sides.items():
                rounds[side].append(measure(module, python, work, setting, *options))
    ratios = {
        side: [
            round(a["response_tokens_per_second"] / b["response_tokens_per_second"], 3)
            for a, b in zip(rounds["megatron_cord"], theirs, strict=True)
        ]
        for side, theirs in rounds.items()
        if side != "megatron_cord"
    }
    result = {
        "ratio": {side: round(statistics.median(found), 3) for side, found in ratios.items()},
        "ratio_of_rounds": ratios,
        **{side: median(measured) for side, measured in rounds.items()},
        "setting": asdict(setting),
        "model": sizes,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": 1,
            "load_average": round(os.getloadavg()[0], 1),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")}
        | {"python": platform.python_version()},
    }
    publish(result, arguments.output)
    for side, found in ratios.items():
        print(f"{statistics.median(found):.2f} × the tokens a second of {side}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
