"""A run's directory, small and always the same: 60 held-out sums in four voices, 100 steps, a gap that closes.

The numbers are drawn, not trained, but move as those of a real run do. Voices are chirps of a second.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.rollout.rollout_file import dump_file, read_rollouts, write_rollouts
from megatron_cord.runtime.files import write_atomic

STEPS = 100
SAMPLES = 60
EVALUATED = (0, 25, 50, 75, 100)
BROKEN = (5, 22)  # right before training, wrong after it
VOICES = ("en-us+f3", "en-us+m4", "en-gb-x-rp+f2", "en-us-nyc")
#: What an attacker might make a model say; it must come out as text.
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"

END = "<|im_end|>"

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def write_run(directory: Path, *, seed: int = 0) -> Path:
    """Write a finished run and its held-out shards below ``directory``; return the run's directory."""
    rng = np.random.default_rng(seed)
    run, shards = directory / "demo", directory / "heldout"
    samples = [_sample(number, rng) for number in range(SAMPLES)]
    writer = ShardWriter(shards)
    for sample in samples:
        writer.write(sample)
    writer.close()
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"seed: {seed}\ndata:\n  evaluation: {shards}\nparallel:\n  tp: 2\n"
        f"teacher:\n  mode: frozen\ntrain:\n  steps: {STEPS}\n"
    )
    write_lines(run / "metrics.jsonl", [_metrics(step, rng) for step in range(1, STEPS + 1)])
    ease = rng.random(SAMPLES)  # a question is right once the model's skill exceeds its difficulty, give or take
    evaluations = [_evaluation(step, samples, ease, rng) for step in EVALUATED]
    for evaluation in evaluations:
        write_atomic(heldout_file(run, evaluation["step"]), json.dumps(evaluation))
    for step in range(1, STEPS + 1):
        write_rollouts(dump_file(run / "rollouts", step), _rollouts(step, samples, rng))
    before, after = evaluations[0], evaluations[-1]
    summary = {
        "text_accuracy": before["text_accuracy"],
        "audio_accuracy_before": before["audio_accuracy"],
        "audio_accuracy_after": after["audio_accuracy"],
        "gap_before": before["gap"],
        "gap_after": before["text_accuracy"] - after["audio_accuracy"],
        "gap_closed": 1 - (before["text_accuracy"] - after["audio_accuracy"]) / before["gap"],
        "seconds": 138.2,
        "tp": 2,
        "steps": STEPS,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def write_others(run: Path, directory: Path) -> list[Path]:
    """Write two more runs below ``directory``: one that stopped earlier on the same questions, one with others.

    The first differs from ``run`` in two settings, and has a question set and an alert.
    """
    stopped = shutil.copytree(run, directory / "stopped")
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / f"evaluations/step_{STEPS:06d}")
    config = (stopped / "config.yaml").read_text().replace("tp: 2", "tp: 1")
    (stopped / "config.yaml").write_text(f"{config}optimizer:\n  learning_rate: 0.0005\n  groups: {{}}\n")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slower = [row | {"kl": row["kl"] * 1.5, "reward": row["reward"] * 0.7} for row in rows[:75]]
    write_lines(stopped / "metrics.jsonl", slower)
    write_lines(stopped / "alerts.jsonl", [{"step": 60, "kind": "collapse", "words": "the reward fell"}])
    sums = {
        "set": "sums", "step": 75, "samples": 40, "text_accuracy": 0.9, "groups": {}, "answers": [],
        "estimates": {"text": {"value": 0.9, "error": 0.05, "low": 0.8, "high": 0.975}},
    }  # fmt: skip
    write_atomic(stopped / "evaluations/step_000075/sums.json", json.dumps(sums))
    return [stopped, write_run(directory / "other", seed=1)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _sample(number: int, rng: np.random.Generator) -> Sample:
    a, b = (int(value) for value in rng.integers(0, 7, 2))
    time = np.arange(16000, dtype=np.float32) / 16000
    waveform = 0.4 * np.sin(2 * np.pi * (150 + 20 * number + 200 * time) * time) * np.hanning(16000)
    solution = f"{_WORDS[a]} plus {_WORDS[b]} is {_WORDS[a + b]} . the answer is {a + b}"
    question = f"what is {_WORDS[a]} plus {_WORDS[b]}" if number % 2 else f"add {_WORDS[a]} and {_WORDS[b]}"
    return Sample(
        f"plus-{a}-{b}-{number}", question, waveform.astype(np.float32), 16000, str(a + b), solution, VOICES[number % 4]
    )


def _skill(step: int) -> float:
    return 0.85 - 0.47 * math.exp(-step / 30)


def _metrics(step: int, rng: np.random.Generator) -> dict[str, Any]:
    decay, noise = math.exp(-step / 30), rng.normal(1, 0.12, 8)
    token, sequence = (0.25 + 2.2 * decay) * noise[0], 0.05 * float(rng.normal())
    return {
        "step": step,
        "loss": None if step == 40 else token + sequence,
        "loss_token": token,
        "loss_sequence": sequence,
        "kl": (0.06 + 0.6 * decay) * noise[1],
        "entropy": (0.15 + 0.4 * decay) * noise[2],
        "reward": min(_skill(step) * noise[3], 1.0),
        "groups": 6,
        "zero_variance_groups": int(rng.binomial(6, 0.7 - 0.4 * decay)),
        "grad_norm": (0.8 + 3 * decay) * noise[4],
        "learning_rate": 2e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / STEPS))),
        "response_tokens": 12 + 0.5 * float(rng.normal()),
        "engine_logprob_difference": 1e-6 * noise[5],
        "engine_logprob_difference_max": 4e-6 * noise[5],
        "engine_kl": 1e-7 * noise[5],
        "stale_logprob_difference": 2e-6,
        "truncated": 0.02,
        "repetition": 0.01 * noise[5],
        "skipped": step == 40,
        "seconds": 0.25,
        "seconds_rollout": 0.1 * noise[6],
        "seconds_teacher": 0.02,
        "seconds_train": 0.1,
        "seconds_update": 0.13,  # teacher and train, and what lies between
        "seconds_weight_sync": 0.01,
        "tokens_per_second": 900.0 * noise[6],
        "tokens_per_second_teacher": 4000.0,
        "model_flop_utilisation": 0.3 * noise[6],
        "memory_peak_gb": 42.0,
        "of_another_version": "text",
    }


def _evaluation(step: int, samples: list[Sample], ease: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    answers = []
    for number, sample in enumerate(samples):
        right = bool(ease[number] + rng.normal(0, 0.06) < _skill(step)) if number not in BROKEN else step < STEPS
        response = str(sample.solution) if right else _misheard(sample, rng)
        if number == 0:
            response, right = HOSTILE, False
        tokens = [*response.split(), END]
        answers.append({
            "id": sample.id, "question": sample.question, "answer": sample.answer, "group": sample.voice,
            "text_response": sample.solution, "text_correct": number != 7,
            "audio_response": response, "audio_correct": right,
            "tokens": tokens, "token_kl": _divergences(tokens, right, step, rng) if number < 48 else None,
        })  # fmt: skip
    accuracies = _accuracies(answers)
    voices = {voice: _accuracies([answer for answer in answers if answer["group"] == voice]) for voice in VOICES}
    gap = accuracies["text_accuracy"] - accuracies["audio_accuracy"]
    return {"step": step, **accuracies, "gap": gap, "seconds": 3.1, "groups": voices, "answers": answers}


def _accuracies(answers: list[dict[str, Any]]) -> dict[str, Any]:
    count = len(answers)
    return {"samples": count} | {
        f"{kind}_accuracy": sum(a[f"{kind}_correct"] for a in answers) / count for kind in ("text", "audio")
    }


def _misheard(sample: Sample, rng: np.random.Generator) -> str:
    a, b = (int(value) for value in rng.integers(0, 7, 2))
    b += a + b == int(str(sample.answer))
    return f"{_WORDS[a]} plus {_WORDS[b]} is {_WORDS[a + b]} . the answer is {a + b}"


def _divergences(tokens: list[str], right: bool, step: int, rng: np.random.Generator) -> list[float]:
    # Numbers diverge, the words between them hardly do.
    scale = (0.05 if right else 1.5) * (0.3 + math.exp(-step / 40))
    return [float(rng.exponential(scale if token in _WORDS or token.isdigit() else 0.01)) for token in tokens]


def _rollouts(step: int, samples: list[Sample], rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    roles = {4: "distill", 9: "distill", 14: "distill", 20: "policy", 21: "policy"}
    for number, draw in [(4, 0), (9, 0), (14, 0), *((number, draw) for number in (20, 21) for draw in range(1, 5))]:
        role = roles[number]
        sample = samples[(number + step) % SAMPLES]
        right = bool(rng.random() < _skill(step))
        tokens = [*(str(sample.solution) if right else _misheard(sample, rng)).split(), END]
        kl = _divergences(tokens, right, step, rng)
        distilled = role == "distill"
        top = sorted(kl)[-3]
        weights = [(2.0 if k >= top else 1.0) * (2 - t / max(len(kl) - 1, 1)) for t, k in enumerate(kl)]
        rows.append({
            "step": step, "id": sample.id, "role": role, "position": number, "draw": draw,
            "question": sample.question, "voice": sample.voice, "response": " ".join(tokens[:-1]),
            "tokens": tokens, "token_ids": list(range(len(tokens))),
            "engine_logprobs": [-0.1] * len(tokens), "seed": 1000 * step + number,
            "student_logprobs": None, "teacher_logprobs": None, "reward_terms": None, "zero_variance": False,
            "token_kl": kl if distilled else None,
            "token_weights": weights if distilled else None,
            "reference_answer": sample.answer, "reward": None if distilled else float(right), "advantage": 0.0,
            "finish_reason": "stop", "versions": [{"start": 0, "end": len(tokens), "version": step - 1}],
        })  # fmt: skip
    for start in (3, 7):
        rewards = [row["reward"] for row in rows[start : start + 4]]
        for row in rows[start : start + 4]:
            row["advantage"] = row["reward"] - sum(rewards) / 4
    return rows


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a step's rollouts: each row is the step's first with these values instead."""
    first = read_rollouts(path).to_pylist()[0]
    write_rollouts(path, [first | row for row in rows])
