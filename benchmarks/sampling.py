"""What choosing a token costs: the local engine's sampler beside the one that it replaced.

    python -m benchmarks.sampling [--output FILE]

`before` draws a number for each token of the vocabulary, in double precision, from a generator of each response on the
CPU, also where nothing is sampled. `every token` is the same with numbers of the present counter-based generator. Both
are measured in turns with the present one, on random logits of Qwen2-Audio's vocabulary and in whole batches of
responses by a small model with that vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.figures import processor, publish
from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.samples import Prompt
from megatron_cord.plan.published import published
from megatron_cord.rollout.local import decoding
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.local.philox import gumbel
from megatron_cord.rollout.local.sampling import Sampler
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.runtime.entry import Parser, run

BATCHES = (16, 64)
TOKENS = 12  #: of each response
ROUNDS = 5


class Before:
    """The sampler of f2e61ad and earlier revisions."""

    def __init__(self, requests: Sequence[GenerationRequest], forbidden: Sequence[int], device: torch.device) -> None:
        self._forbidden = list(forbidden)
        self._temperatures = torch.tensor([r.temperature for r in requests], dtype=torch.float64, device=device)[
            :, None
        ]
        self._generators = [torch.Generator().manual_seed(_seed(r)) if r.temperature > 0 else None for r in requests]

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """Return tokens [B]."""
        uniform = torch.full(logits.shape, 0.5, dtype=torch.float64)
        for row, generator in zip(uniform, self._generators, strict=True):
            if generator is not None:
                row.uniform_(generator=generator)
        exponential = uniform.neg_().log1p_().neg_().clamp_min_(torch.finfo(torch.float64).eps / 2)
        scores = logits.double() - self._temperatures * exponential.to(logits.device).log_()
        scores[:, self._forbidden] = -torch.inf
        return scores.argmax(-1)


class EveryToken:
    """One number of the present generator for each token of the vocabulary."""

    def __init__(self, requests: Sequence[GenerationRequest], forbidden: Sequence[int], device: torch.device) -> None:
        self._forbidden = torch.tensor(forbidden, dtype=torch.long, device=device)
        self._temperatures = torch.tensor([request.temperature for request in requests], device=device)[:, None]
        self._keys = torch.tensor([[_seed(request) & 0xFFFFFFFF, 0] for request in requests], device=device)

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """Return tokens [B]."""
        logits.index_fill_(-1, self._forbidden, -torch.inf)
        if not self._temperatures.any():
            return logits.argmax(-1)
        rows = [
            (row / temperature + gumbel(key[None], range(position, position + 1), row.numel())[0, 0]).argmax()
            for row, temperature, key in zip(logits, self._temperatures, self._keys, strict=True)
        ]  # one by one, so that a row's numbers stay in the cache
        return torch.stack(rows)


SAMPLERS: dict[str, Callable[..., Any]] = {"before": Before, "every token": EveryToken, "now": Sampler}


def requests(batch: int, temperature: float, prompt: tuple[int, ...] = (1,)) -> list[GenerationRequest]:
    """Return a batch's requests."""
    return [GenerationRequest(Prompt(f"sample-{n}", prompt), temperature, TOKENS, seed=n) for n in range(batch)]


def measure_choice(batch: int, temperature: float, vocabulary: int) -> dict[str, float]:
    """Return the mean milliseconds in which each sampler chooses a batch's tokens at one position, by sampler."""
    logits = 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0))
    asked, device = requests(batch, temperature), logits.device
    samplers = {name: make(asked, (0, 1), device) for name, make in SAMPLERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for position in range(2 * 16):  # whole stretches of positions, whose numbers are drawn together
        for name, sampler in samplers.items():
            given = logits.clone()
            start = time.perf_counter()
            sampler.choose(given, position)
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1000 * statistics.fmean(values), 2) for name, values in seconds.items()}


def measure_engine(engine: LocalEngine, batch: int, temperature: float) -> dict[str, float]:
    """Return the median milliseconds a token of whole batches of text prompts, by sampler."""
    asked = requests(batch, temperature, tuple(engine.prompts.encode("one plus two")))
    seconds: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for _ in range(ROUNDS):
        for name, make in SAMPLERS.items():
            with mock.patch.object(decoding, "Sampler", make):
                start = time.perf_counter()
                rollouts = engine.generate(asked)
            steps = max(len(rollout.token_ids) for rollout in rollouts)
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()}


def _seed(request: GenerationRequest) -> int:
    digest = hashlib.blake2b(f"{request.seed}\n{request.prompt.sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def main() -> None:
    """Entry point."""
    parser = Parser(description="Measures the local engine's sampler beside the one before.", allow_abbrev=False)
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    vocabulary = published("qwen2_audio_7b").language.vocab_size
    choices: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        words = ["one", "two", "plus", *(f"word{n}" for n in range(vocabulary - 20))]
        create_checkpoint(Path(directory), TinyModelConfig(), words, seed=0)
        engine = LocalEngine(directory)
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            choices[kind] = {str(batch): measure_choice(batch, temperature, vocabulary) for batch in BATCHES}
            whole[kind] = {str(batch): measure_engine(engine, batch, temperature) for batch in BATCHES}
        engine_vocabulary = engine.prompts.vocab_size
    publish(
        {
            "milliseconds_to_choose_tokens_by_batch": choices,
            "milliseconds_a_token_of_the_whole_engine_by_batch": whole,
            "setting": {
                "vocabulary": vocabulary,
                "engine_vocabulary": engine_vocabulary,
                "new_tokens": TOKENS,
                "rounds": ROUNDS,
            },
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "load_average": round(os.getloadavg()[0], 1),
            },
            "versions": {"torch": version("torch")},
        },
        arguments.output,
    )


if __name__ == "__main__":
    run(main)
