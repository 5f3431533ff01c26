"""The speed of espeak-ng, and the time for 80,000 questions of the paper's kind: `cord synthesize --plan`.

    python -m benchmarks.synthesis [--tried 1000] [--workers 2] [--output benchmarks/results/synthesis.json]

The 80,000 word problems are made of templates with LaTeX, money, fractions and choices in them, 25 to 50 words each;
one in a hundred cannot be spoken.
"""

from __future__ import annotations

import json
import os
import platform
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

from megatron_cord.runtime.entry import Parser, run
from megatron_cord.runtime.files import write_json
from megatron_cord.speech.estimate import estimate
from megatron_cord.speech.spoken_set import SpokenSetConfig

COUNT = 80_000
TEMPLATES = (
    (
        "A shop sells {a} notebooks at ${b}.{c}0 each and {d} pens at ${e}.50 each. If a customer pays with a note of "
        "$500, how many dollars of change does she get back, rounded to the nearest whole number?"
    ),
    (
        "Let $f(x) = \\frac{{{a}}}{{{b}}} x^2 + {c}x - {d}$. For how many integers $x$ between ${e}$ and ${a}$ is the "
        "value of $f(x)$ positive, and what is the smallest of these integers? Give the sum of both numbers as your "
        "answer."
    ),
    (
        "Two trains leave the same station at {a} past noon, one going north at {b} kilometres per hour, the other "
        "going east at {c} kilometres per hour. After {d} hours, how far apart are they, to the nearest kilometre?"
    ),
    (
        "Find the number of ways in which {a} identical balls can be put into {b} different boxes, so that no box "
        "holds more than {c} balls and exactly {d} of the boxes stay empty. What is the remainder when this number is "
        "divided by {e}?"
    ),
    (
        "A rectangle has a perimeter of {a} cm, and its length is $\\frac{{{b}}}{{{c}}}$ of its width. What is its "
        "area in square centimetres, and by how much does it grow when both sides are made {d} % longer? Give the "
        "second of the two numbers."
    ),
)
UNSPEAKABLE = "Consider ```for i in range({a})``` and say what it prints."


def write_problems(path: Path) -> float:
    """Write the problems; return the mean number of words."""
    draw = random.Random(0)
    words = 0
    with path.open("w", encoding="utf-8") as file:
        for number in range(COUNT):
            template = UNSPEAKABLE if number % 100 == 99 else draw.choice(TEMPLATES)
            text = template.format(**{name: draw.randint(2, 97) for name in "abcde"})
            words += len(text.split())
            file.write(json.dumps({"id": f"p{number}", "question": text, "answer": "1"}) + "\n")
    return words / COUNT


def main() -> None:
    """Run the benchmark."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tried", type=int, default=1000, help="problems that are spoken")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/synthesis.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problems.jsonl"
        words = write_problems(path)
        config = SpokenSetConfig(str(path), slowest=0.9, fastest=1.2)
        estimated = estimate(config, arguments.tried, workers=arguments.workers)
    print(estimated.describe())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, no GPU"
    made = {
        "machine": machine,
        "backend": "espeak",
        "words": round(words, 1),
        "description": estimated.describe(),
        **asdict(estimated),
    }
    write_json(arguments.output, made)


if __name__ == "__main__":
    run(main)
