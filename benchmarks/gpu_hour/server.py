"""``python -m benchmarks.gpu_hour.server CHECKPOINT PYTHON FILE``: one SGLang server, its start and its speed.

Written are the seconds until the server answers, and the tokens a second of spoken prompts through the engine: all at
once, the second time, when everything is compiled.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.runtime import entry
from megatron_cord.runtime.files import write_json

PROMPTS, NEW_TOKENS = 32, 48
START_SECONDS = 170.0  #: the first start on a machine compiles; benchmarks/gpu_hour.sh ends this part after 200


def main() -> int:
    """Start the server, measure and stop it."""
    checkpoint, python, file = map(Path, sys.argv[1:])
    cuda = torch.cuda.is_available()
    layout = initialize(ParallelConfig(), seed=0)
    with tempfile.TemporaryDirectory() as work:
        settings = ServerConfig(
            checkpoint,
            device="cuda" if cuda else "cpu",
            python=python,
            max_total_tokens=32768 if cuda else 4096,
            start_timeout=START_SECONDS,
        )
        server = SglangServer(settings, "", Path(work) / "server.log")
        try:
            begun = time.perf_counter()
            server.start()
            server.wait()
            start = time.perf_counter() - begun
            config = RolloutConfig(engine="sglang", sglang=SGLangConfig(servers=(server.url,)))
            engine = build_engine(config, str(checkpoint), layout.device).engine
            noise = (0.1 * np.random.default_rng(0).normal(size=4000)).astype(np.float32)
            prompt = PromptBuilder(checkpoint).audio_prompt(Sample("noise", "", noise))
            requests = [GenerationRequest(prompt, 1.0, NEW_TOKENS, seed=i) for i in range(PROMPTS)]
            rates = []
            for _ in range(2):
                begun = time.perf_counter()
                tokens = sum(len(rollout.token_ids) for rollout in engine.generate(requests))
                rates.append(tokens / (time.perf_counter() - begun))
            engine.close()
        finally:
            server.stop()
            finalize()
    write_json(file, {"seconds_until_ready": round(start, 1), "tokens_per_second": round(rates[-1], 1)})
    print(f"ready after {start:.1f} s; {rates[-1]:.1f} tokens a second")
    return 0


if __name__ == "__main__":
    entry.run(main)
