"""The example's questions, as files for `cord synthesize`: rows of the tables in three parts, and pairs of things.

Rows are divided table by table: what is held out for the evaluation, or for choosing settings (development), is asked
in training in no phrasing. Beside these facts there are requests to repeat two things each, without a gold answer: the
warm-up learns words from them and from the facts. All things of all tables are in them, so that held-out *facts* are
asked in words that occurred in training. Requests of the same kind about other pairs, with a gold answer, show in an
evaluation what becomes of a skill that no training asks for. Everything is drawn from the seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from examples.speech_smollm2.tables import TABLES
from megatron_cord.data.ordering.order import permutation
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic

Split = Literal["train", "development", "heldout", "pairs", "repeats"]
SPLITS: tuple[Split, ...] = ("train", "development", "heldout", "pairs", "repeats")
#: Mostly the reading LLM says both things again, and little else.
PAIR_PHRASINGS = (
    "Repeat the following words: {} and {}.",
    "Repeat: {} and {}.",
    "Repeat after me: {}, {}.",
    "Please repeat after me: {} and {}.",
    "Write down: {} and {}.",
    "Repeat this phrase: {} and {}.",
    "Please repeat the words {} and {}.",
    "Repeat what I say: {} and {}.",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class QuestionsConfig:
    """How many questions there are, and how they are divided.

    Attributes:
        rows: of each table, from its beginning; 0 takes all.
        held_out: share of each table's rows that is asked in the evaluation alone.
        development: share that is asked for choosing settings alone.
        heldout_phrasings: in how many of a table's phrasings, drawn for each row, the evaluation asks it; 0 takes all.
        pairs: requests to repeat two things, for the warm-up.
        repeats: such requests about other pairs, with an answer, for the evaluation.
        seed: of all draws.
    """

    rows: int = 0
    held_out: float = 0.45
    development: float = 0.1
    heldout_phrasings: int = 2
    pairs: int = 2000
    repeats: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.held_out > 0 and self.development > 0 and self.held_out + self.development < 1):
            raise CordError(
                f"held_out={self.held_out:g} and development={self.development:g} are shares of the rows, and leave "
                "some for training: choose them above 0 with a sum below 1"
            )
        if min(self.rows, self.heldout_phrasings, self.repeats, self.seed) < 0 or self.pairs < 1:
            raise CordError("rows, heldout_phrasings, repeats and seed cannot be negative; pairs must be at least 1")


def questions(config: QuestionsConfig) -> dict[Split, list[Row]]:
    """Return the rows of the files by split, each in an order of its own; a split without rows is left out.

    Raises:
        CordError: a table has too few rows for three parts, or `pairs` leaves too few pairs for `repeats`.
    """
    made: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    things: list[str] = []
    for number, table in enumerate(TABLES):
        facts = list(table.answers.items())[: config.rows or None]
        order = permutation(len(facts), config.seed, number)
        held_out, development = (max(1, round(share * len(facts))) for share in (config.held_out, config.development))
        if held_out + development >= len(facts):
            raise CordError(f"table {table.name}: {len(facts)} rows are too few for three parts; take more")
        for place, index in enumerate(order):
            thing, answer = facts[index]
            things.append(table.noun.format(thing))
            split: Split = "heldout" if place < held_out else "development"
            split = split if place < held_out + development else "train"
            asked = permutation(len(table.phrasings), config.seed, 400, number, index)
            if split == "heldout" and config.heldout_phrasings:
                asked = asked[: config.heldout_phrasings]
            made[split] += [
                {
                    "id": f"{table.name}-{_slug(thing)}-{phrasing}",
                    "question": table.phrasings[phrasing].format(thing),
                    "answer": answer,
                }
                for phrasing in sorted(int(each) for each in asked)
            ]
    made["pairs"], made["repeats"] = _requests(things, config)
    return {
        split: [made[split][i] for i in permutation(len(made[split]), config.seed, 100 + number)]
        for number, split in enumerate(SPLITS)
        if made[split]
    }


def write_files(directory: Path, made: dict[Split, list[Row]], synthesizers: Sequence[str]) -> dict[str, Path]:
    """Write one file for each split and synthesizer; a split's rows go to the synthesizers in turn.

    Returns:
        the files by name, "train-piper".
    """
    files = {}
    for split, rows in made.items():
        for number, synthesizer in enumerate(synthesizers):
            path = directory / f"{split}-{synthesizer}.jsonl"
            chosen = rows[number :: len(synthesizers)]
            write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
            files[f"{split}-{synthesizer}"] = path
    return files


def texts(config: QuestionsConfig) -> list[str]:
    """Return every text that is spoken, and every answer."""
    made = questions(config)
    return [text for rows in made.values() for row in rows for text in (row["question"], row.get("answer")) if text]


def _requests(things: Sequence[str], config: QuestionsConfig) -> tuple[list[Row], list[Row]]:
    """Return the requests to repeat two things: the warm-up's, and others with the answer."""
    drawn = _pairs(things, config.seed)
    pairs = list(islice(drawn, config.pairs))
    asked = {frozenset(pair) for pair in pairs}
    others = (pair for pair in islice(drawn, 50 * config.repeats) if frozenset(pair) not in asked)
    repeats = list(islice(others, config.repeats))
    if len(repeats) < config.repeats:
        raise CordError(
            f"{config.pairs} pairs of {len(things)} things leave too few for {config.repeats} repeats; take fewer"
        )
    written = _request_rows("repeat", repeats, [each for each in PAIR_PHRASINGS if "{} and {}" in each], config.seed)
    return (
        _request_rows("pair", pairs, PAIR_PHRASINGS, config.seed),
        [row | {"answer": " and ".join(pair)} for row, pair in zip(written, repeats, strict=True)],
    )


def _request_rows(name: str, pairs: Sequence[tuple[str, str]], phrasings: Sequence[str], seed: int) -> list[Row]:
    order = permutation(len(pairs), seed, 300)
    return [
        {"id": f"{name}-{number}", "question": phrasings[phrasing % len(phrasings)].format(*pair)}
        for number, (phrasing, pair) in enumerate(zip(order, pairs, strict=True))
    ]


def _pairs(things: Sequence[str], seed: int) -> Iterator[tuple[str, str]]:
    """Yield pairs of things without end; no thing comes again before all others came once."""
    drawn = (things[i] for turn in count() for i in permutation(len(things), seed, 200, turn))
    return zip(drawn, drawn, strict=False)


def _slug(thing: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", thing.lower()).strip("_")
