"""SGLang beside transformers.generate, and asynchronous beside synchronous training, by phase.

    python -m benchmarks.rollout [--device cpu|cuda] [--output benchmarks/results/rollout.json]

First part: the same sampled responses to spoken prompts, of a small random Qwen2-Audio that hardly ever ends one, from
    one SGLang server through the
engine (log-probabilities, checks and HTTP included) and from `generate` of transformers, so many at a time. They take
turns; the median of the rounds counts. Tokens are counted by the clock and by the CPU time of all processes that take
part, which other programs on the machine do not disturb. On a CPU, SGLang runs with plain torch in the place of its
kernels: this says what the engine costs, nothing about SGLang's speed on a GPU.

Second part: `megatron_cord.train` for some steps with the same settings, rollout.schedule.ahead=0 and 1, against that
    server. The median step.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration

from benchmarks.figures import processor, publish
from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.decoding import collate, collate_clips
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from megatron_cord.rollout.types import GenerationRequest, RolloutEngine
from megatron_cord.runtime.entry import Parser, run

ROOT = Path(__file__).parents[1]
WORDS = [f"w{i}" for i in range(64)]
NEW_TOKENS, PROMPTS, TOGETHER = 48, 32, (1, 8, 32)
STEPS, SKIPPED = 10, 3
PHASES = (
    "seconds",
    "seconds_rollout",
    "seconds_update",
    "seconds_weight_sync",
    "seconds_generate",
    "seconds_wait_rollouts",
    "seconds_wait_weight_sync",
)


def write_inputs(work: Path) -> None:
    """`checkpoint`, and `train` and `heldout` with clips of noise."""
    create_checkpoint(work / "checkpoint", TinyModelConfig(), WORDS, seed=0)
    prompts = PromptBuilder(work / "checkpoint")
    weights = load_file(work / "checkpoint" / "model.safetensors")
    rare = torch.full((prompts.vocab_size, 1), 3.0)
    rare[[*prompts.special_ids, *prompts.eos_ids]] = 0.0
    weights["language_model.lm_head.weight"] *= rare
    save_file(weights, work / "checkpoint" / "model.safetensors", {"format": "pt"})
    rng = np.random.default_rng(0)
    for name, count in (("train", 256), ("heldout", 8)):
        writer = ShardWriter(work / name, shard_size=256)
        for i in range(count):
            noise = (0.1 * rng.normal(size=int(rng.integers(16000, 48001)))).astype(np.float32)
            writer.write(Sample(f"{name}{i}", " ".join(rng.choice(WORDS, 8)), noise, answer="1"))
        writer.close()


def speed(generate: Callable[[], int], cpu_seconds: Callable[[], float]) -> dict[str, float]:
    """Tokens by the clock and by CPU time."""
    busy, begun = cpu_seconds(), time.perf_counter()
    tokens = generate()
    seconds, busy = time.perf_counter() - begun, cpu_seconds() - busy
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / busy}


def sglang_generate(engine: RolloutEngine, asked: list[GenerationRequest]) -> int:
    """Tokens that the servers make."""
    return sum(len(rollout.token_ids) for rollout in engine.generate(asked))


def transformers_generate(model: Any, builder: PromptBuilder, prompts: list[Prompt], together: int) -> int:
    """Tokens that transformers makes."""
    made = 0
    for start in range(0, len(prompts), together):
        asked = prompts[start : start + together]
        ids, mask, _ = collate(asked, builder.pad_id, model.device)
        features, frames = collate_clips(asked, model.device)
        assert features is not None
        assert frames is not None
        heard = (torch.arange(features.shape[-1], device=model.device)[None] < frames[:, None]).long()
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            input_features=features,
            feature_attention_mask=heard,
            do_sample=True,
            max_new_tokens=NEW_TOKENS,
            suppress_tokens=list(builder.special_ids),
        )
        length = ids.shape[1]
        made += int((out[:, length:] != builder.pad_id).sum())
    return made


def measure_generation(work: Path, server: SglangServer, device: str, rounds: int) -> dict[str, Any]:
    """Both, for each number of responses at a time."""
    layout = initialize(ParallelConfig(), seed=0)
    torch.manual_seed(0)
    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(work / "checkpoint", dtype="auto")
    model = model.to(device).eval()
    builder = PromptBuilder(work / "checkpoint")
    rng = np.random.default_rng(1)
    samples = [Sample(f"s{i}", "w0", (0.1 * rng.normal(size=32000)).astype(np.float32)) for i in range(PROMPTS)]
    prompts = [builder.audio_prompt(sample) for sample in samples]
    me = psutil.Process()

    def busy() -> float:
        processes = [me, *psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    found: dict[str, Any] = {}
    for together in TOGETHER:
        sglang = SGLangConfig(servers=(server.url,), max_in_flight=together)
        config = RolloutConfig(engine="sglang", sglang=sglang)
        engine = build_engine(config, work / "checkpoint", layout.device)
        count = min(PROMPTS, 8 * together)
        asked = [GenerationRequest(prompt, 1.0, NEW_TOKENS, i) for i, prompt in enumerate(prompts[:count])]
        ours: list[dict[str, float]] = []
        theirs: list[dict[str, float]] = []
        for turn in range(rounds + 1):
            a = speed(partial(sglang_generate, engine, asked), busy)
            b = speed(partial(transformers_generate, model, builder, prompts[:count], together), busy)
            if turn:
                ours.append(a)
                theirs.append(b)
        engine.close()
        found[str(together)] = {
            name: {key: round(statistics.median(r[key] for r in result), 1) for key in result[0]}
            for name, result in (("sglang", ours), ("transformers", theirs))
        }
        for key in ("tokens_per_second", "tokens_per_cpu_second"):
            found[str(together)][f"ratio_of_{key}"] = round(
                found[str(together)]["sglang"][key] / found[str(together)]["transformers"][key], 2
            )
    finalize()
    return found


def measure_schedule(work: Path, url: str, ahead: int) -> dict[str, float]:
    """Measure the median step, by phase, of a run of its own, in seconds."""
    output = work / f"ahead{ahead}"
    settings = [
        f"output_dir={output}",
        f"model.checkpoint={work / 'checkpoint'}",
        "model.dtype=float32",
        f"data.train={work / 'train'}",
        f"data.evaluation={work / 'heldout'}",
        "rollout.engine=sglang",
        f"rollout.sglang.servers=[{url}]",
        f"rollout.schedule.ahead={ahead}",
        "rollout.prompts_per_step=32",
        "objective.policy_gradient.enabled=false",
        f"rollout.max_new_tokens={NEW_TOKENS}",
        f"train.steps={STEPS}",
        "train.micro_batch_size=8",
        "checkpoint.interval=0",
        "evaluation.interval=0",
        "evaluation.max_new_tokens=4",
        "evaluation.scored=0",
        "optimizer.learning_rate=1e-6",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_cord.train", "--config", os.devnull, *settings]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CordError(f"training with rollout.schedule.ahead={ahead} failed: {last}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][SKIPPED:]
    return {name: round(statistics.median(line[name] for line in lines), 3) for name in PHASES if name in lines[0]}


def main() -> None:
    """Entry point."""
    parser = Parser(
        description="Measures rollouts with SGLang beside transformers, and asynchronous beside synchronous training.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of server and model")
    parser.add_argument(
        "--python", type=Path, default=ServerConfig(Path()).python, help="interpreter that SGLang is installed for"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each way of generating")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_inputs(work)
        server = SglangServer(
            ServerConfig(work / "checkpoint", device=arguments.device, python=arguments.python), "", work / "server.log"
        )
        server.start()
        try:
            server.wait()
            generation = measure_generation(work, server, arguments.device, arguments.rounds)
            schedules = {name: measure_schedule(work, server.url, ahead) for name, ahead in (("sync", 0), ("async", 1))}
        finally:
            server.stop()
    result = {
        "responses_at_a_time": generation,
        "seconds_of_a_step": schedules,
        "async_speedup": round(schedules["sync"]["seconds"] / schedules["async"]["seconds"], 2),
        "setting": {
            "prompts": PROMPTS,
            "new_tokens": NEW_TOKENS,
            "rounds": arguments.rounds,
            "steps": STEPS,
            "skipped": SKIPPED,
        },
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "device": arguments.device,
            "load_average": round(os.getloadavg()[0], 1),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")}
        | {"python": platform.python_version()},
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    run(main)
