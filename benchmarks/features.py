"""Audio features: audio-seconds a second, beside transformers' WhisperFeatureExtractor in the same run.

    python -m benchmarks.features [--seconds 3] [--turns 3] [--output benchmarks/results/features.json]

Batches of 16 clips of noise, all of one length (3, 10 or 30 s), or of the lengths that spoken questions have (2 to
20 s), with Qwen2-Audio's settings (128 mels, a window of 30 s). Each implementation may use two cores in the way that
is best for it: transformers with two threads of torch, or called clip by clip from two threads of Python, whichever is
faster; this project's as the loader calls it, from two threads; DALI, where it is installed, with two threads of its
own. Turns alternate between the implementations, and medians are compared. The largest difference from transformers'
features is measured on the way.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import WhisperFeatureExtractor

from megatron_cord.data.audio.features import FeatureConfig, TorchFeatures
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.runtime.files import write_json

RATE = 16000
CONFIG = FeatureConfig(n_mels=128)
Extract = Callable[[Sequence[np.ndarray]], Sequence[object]]


def clips(kind: str) -> list[np.ndarray]:
    """Return sixteen clips, float32 [samples]."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(2.0, 20.0, size=16) if kind == "questions" else np.full(16, float(kind))
    return [(0.1 * rng.standard_normal(round(seconds * RATE))).clip(-1, 1).astype(np.float32) for seconds in lengths]


def implementations(pool: ThreadPoolExecutor) -> dict[str, tuple[int, Extract]]:
    """Return by name the number of torch's threads, and a function that makes a batch's features."""
    reference = WhisperFeatureExtractor(feature_size=CONFIG.n_mels)
    torch_features = TorchFeatures(CONFIG)

    def one(clip: np.ndarray) -> object:
        return reference(clip, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)["input_features"][0]

    def halves(batch: Sequence[np.ndarray]) -> Sequence[object]:
        parts = pool.map(
            lambda part: torch_features(part, [""] * len(part), [RATE] * len(part)),
            (batch[: len(batch) // 2], batch[len(batch) // 2 :]),
        )
        return [features.log_mel for part in parts for features in part]

    made: dict[str, tuple[int, Extract]] = {
        "transformers, two threads of torch": (2, lambda batch: [one(clip) for clip in batch]),
        "transformers, two threads of Python": (1, lambda batch: list(pool.map(one, batch))),
        "torch": (1, halves),
    }
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        from megatron_cord.data.audio.dali_features import DaliFeatures

        dali = DaliFeatures(CONFIG, device="cpu")
        made["DALI on the CPU"] = (
            1,
            lambda batch: [f.log_mel for f in dali(batch, [""] * len(batch), [RATE] * len(batch))],
        )
    return made


def measure(seconds: float, turns: int) -> dict[str, dict[str, float]]:
    """Return audio-seconds a second by kind of clips and implementation."""
    results: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(2) as pool:
        candidates = implementations(pool)
        for kind in ("3", "10", "30", "questions"):
            batch = clips(kind)
            audio = sum(len(clip) for clip in batch) / RATE
            rates: dict[str, list[float]] = {name: [] for name in candidates}
            for _ in range(turns):
                for name, (threads, extract) in candidates.items():
                    torch.set_num_threads(threads)
                    extract(batch)
                    begun, rounds = time.perf_counter(), 0
                    while time.perf_counter() - begun < seconds:
                        extract(batch)
                        rounds += 1
                    rates[name].append(rounds * audio / (time.perf_counter() - begun))
            results[kind] = {name: round(statistics.median(some), 1) for name, some in rates.items()}
            best = max(value for name, value in results[kind].items() if name.startswith("transformers"))
            results[kind] |= {
                f"{name} / transformers": round(results[kind][name] / best, 2)
                for name in candidates
                if "transf" not in name
            }
            expected = candidates["transformers, two threads of torch"][1](batch)
            for name in candidates:
                if "transf" not in name:
                    found = candidates[name][1](batch)
                    worst = max(
                        float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
                        for a, b in zip(found, expected, strict=True)
                    )
                    results[kind][f"{name}: largest difference"] = worst
            print(kind, results[kind], flush=True)
    return results


def main() -> None:
    """Run the benchmark."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/features.json"))
    arguments = parser.parse_args()
    made = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU used",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "unit": "audio-seconds a second; batches of 16 clips of 3, 10 and 30 s, and of 2 to 20 s (questions)",
        "results": measure(arguments.seconds, arguments.turns),
    }
    write_json(arguments.output, made)


if __name__ == "__main__":
    run(main)
