"""How large the example is: the whole of it, or so small that a test runs it in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.speech_smollm2.questions import QuestionsConfig

_HERE = Path(__file__).parent

#: What `cord compare` evaluates on beside what `make speech` does: a third phrasing, and requests to repeat two things.
STUDY = {"heldout_phrasings": 3, "repeats": 100}

#: Voices by split and synthesizer; Piper's are settings behind the one voice that is given. Nobody speaks in two splits
#: but the pairs of things, which the training voices ask about.
VOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "espeak": (
            *("en-us", "en-us+f1", "en-us+f2", "en-us+f3", "en-us+f5", "en-us+m2", "en-us+m4", "en-us+m5", "en-us+m7"),
            *("en-gb-x-rp", "en-gb-x-rp+m2", "en-gb-x-rp+f3", "en-029", "en-gb-scotland"),
        ),
        "piper": (
            *("", "+noise=0.9", "+rhythm=1.3", "+pitch=0.8", "+pitch=0.88", "+pitch=0.88+noise=0.9+rhythm=1.2"),
            *("+pitch=1.12+noise=0.8", "+pitch=1.12+rhythm=1.3", "+pitch=1.25", "+pitch=1.25+noise=0.9"),
        ),
    },
    "development": {"espeak": ("en-us+m1",), "piper": ("+pitch=0.94",)},
    "heldout": {"espeak": ("en-us+m3", "en-us+f4"), "piper": ("+pitch=1.06+noise=0.5", "+pitch=1.2")},
}


@dataclass(frozen=True)
class Sizes:
    """One size of the example.

    Attributes:
        questions: how many, and how they are divided.
        shard: questions a shard.
        workers: processes that speak.
        projector: rows of the projector's first layer.
        train: the training's configuration.
        warmup: the warm-up's.
    """

    questions: QuestionsConfig
    shard: int
    workers: int
    projector: int
    train: Path
    warmup: Path


FULL = Sizes(QuestionsConfig(), 128, 2, 4096, _HERE / "speech.yaml", _HERE / "warmup.yaml")
TINY = Sizes(QuestionsConfig(rows=3, pairs=12), 16, 1, 32, _HERE / "tiny.yaml", _HERE / "tiny-warmup.yaml")
