"""Chains of sums, from nothing to a report: `python -m examples.chains.run [--seed S] [--prepare] [a.b=value …]`.

The same as the quickstart (examples/quickstart/run.py) on a task with longer answers, parts of which are wrong and then
corrected: see `questions`.
"""

from __future__ import annotations

from pathlib import Path

from examples.chains.questions import CHAINS, draw_questions, vocabulary
from examples.quickstart.checkpoint import TinyModelConfig
from examples.quickstart.run import Example, run
from examples.quickstart.warmup import WarmUpConfig
from megatron_cord.runtime import entry

CHAINS_EXAMPLE = Example(
    name="chains",
    config=Path(__file__).parent / "chains.yaml",
    questions=CHAINS,
    written=lambda seed: draw_questions(8000, seed + 1000, held_out=False),
    vocabulary=vocabulary,
    utterances={"train": 2400, "warmup": 600, "heldout": 400},
    max_seconds=4.0,
    model=TinyModelConfig(window_seconds=4),
    warm_up=WarmUpConfig(text_steps=500, text_batch=48, mixed_steps=300, mixed_text=12, mixed_audio=16),
)


def main() -> int:
    """Run the example."""
    return run(CHAINS_EXAMPLE, __doc__.splitlines()[0])


if __name__ == "__main__":
    entry.run(main)
