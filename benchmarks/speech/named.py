"""What a frozen encoder left unheard: results by whether the asked thing was named in another training fact.

    python -m benchmarks.speech.named [RUN.json.gz …]

The runs (by default those of benchmarks/results/speech-frozen-encoder) began with a warm-up that left the encoder as it
was, and are as `cord compare` kept them. A held-out fact, the capital of Egypt, was never asked; its thing was named
all the same where another table's fact about it, the continent of Egypt, was one of those trained on.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.figures import publish
from examples.speech_smollm2.questions import QuestionsConfig, questions
from examples.speech_smollm2.tables import TABLES
from megatron_cord.runtime.entry import Parser, run

KEPT = Path(__file__).parents[1] / "results" / "speech-frozen-encoder"


def named_in_training(seed: int) -> dict[str, bool]:
    """Return by id of each held-out question whether a training fact names what it asks about."""
    made = questions(QuestionsConfig(seed=seed))
    asked = "\n".join(row["question"] for row in made["train"])
    named = {}
    for row in made["heldout"]:
        table = next(each for each in TABLES if row["id"].startswith(f"{each.name}-"))
        before, _, after = table.phrasings[int(row["id"].rpartition("-")[2])].partition("{}")
        thing = row["question"].removeprefix(before).removesuffix(after)
        named[row["id"]] = re.search(rf"\b{re.escape(thing)}\b", asked) is not None
    return named


def by_naming(path: Path) -> dict[str, Any]:
    """Return how many held-out questions a run answers, read and heard, by whether their thing was named."""
    outcome = json.loads(gzip.decompress(path.read_bytes()))
    named, answers = named_in_training(outcome["settings"]["seed"]), outcome["outcomes"]["heldout"]
    counts = {True: Counter[str](), False: Counter[str]()}
    for name, is_named in named.items():
        counts[is_named] += Counter(
            {"questions": 1, "right read": int(answers["text"][name]), "right heard": int(answers["audio"][name])}
        )
    return {"run": path.name, "named": dict(counts[True]), "not named": dict(counts[False])}


def main() -> None:
    """Print the figures."""
    parser = Parser(description="Counts right answers by whether training named what they are about.")
    parser.add_argument("runs", metavar="RUN.json.gz", nargs="*", type=Path, help=f"default: those of {KEPT.name}")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    given = parser.parse_args()
    publish({"runs": [by_naming(path) for path in given.runs or sorted(KEPT.glob("*.json.gz"))]}, given.output)


if __name__ == "__main__":
    run(main)
