"""Rounds on a circle, from nothing to a report: `python -m examples.rounds.run [--seed S] [--prepare] [a.b=value …]`.

The same as the quickstart (examples/quickstart/run.py) on a task with answers of more than two hundred tokens, with a
model that can also name the voice it hears: see `questions` and `voices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.quickstart.checkpoint import TinyModelConfig
from examples.quickstart.run import Example, run
from examples.quickstart.spoken_sums import SynthesisConfig, synthesize
from examples.quickstart.warmup import WarmUpConfig
from examples.rounds import questions, voices
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.runtime import entry

MAX_SECONDS = 3.0
_EVALUATED = 90  #: recordings whose voice is to be named


def name_voices(root: Path, seed: int) -> Sequence[Sample]:
    """Write the evaluation set of the voices, and return the questions of the warm-up about them.

    The set's recordings are of the voices of the warm-up, as another voice has no name, and occur nowhere else.
    """
    drawn = SynthesisConfig(split="warmup", count=_EVALUATED, seed=seed + 1000, max_seconds=MAX_SECONDS)
    synthesize(drawn, root / "data" / "voices", questions=questions.ROUNDS_TASK)
    evaluated, learned = ShardDataset(root / "data" / "voices"), ShardDataset(root / "data" / "warmup")
    voices.write_evaluation_set(root / "data" / "voices.parquet", [evaluated[i] for i in range(len(evaluated))])
    return [voices.voice_question(learned[i]) for i in range(len(learned))]


ROUNDS = Example(
    name="rounds",
    config=Path(__file__).parent / "rounds.yaml",
    questions=questions.ROUNDS_TASK,
    written=lambda seed: questions.draw_questions(3000, seed + 1000, held_out=False),
    vocabulary=lambda: [*questions.vocabulary(), *voices.vocabulary()],
    utterances={"train": 1200, "warmup": 600, "heldout": 120},
    max_seconds=MAX_SECONDS,
    model=TinyModelConfig(hidden_size=96, ffn_size=288),
    warm_up=WarmUpConfig(text_steps=150, text_batch=8, mixed_steps=350, mixed_text=4, mixed_audio=8, spoken_alike=True),
    drills=(WarmUpConfig(text_steps=300, text_batch=64, mixed_steps=0), questions.drills()),
    other_skills=name_voices,
)


def main() -> int:
    """Run the example."""
    return run(ROUNDS, __doc__.splitlines()[0])


if __name__ == "__main__":
    entry.run(main)
