"""Published counts by whether training named a thing."""

from __future__ import annotations

import json

from benchmarks.speech.named import KEPT, by_naming, named_in_training


def test_the_published_counts_are_those_of_the_kept_runs() -> None:
    """Catches questions that were drawn otherwise since, of which no run would have an answer."""
    published = json.loads((KEPT / "by-naming.json").read_text(encoding="utf-8"))
    assert published["runs"] == [by_naming(path) for path in sorted(KEPT.glob("*.json.gz"))]


def test_a_thing_is_named_where_another_table_asks_about_it() -> None:
    """Catches a thing that is cut out of its question wrongly, which no question would name."""
    named = named_in_training(0)
    assert {"capital", "continent", "language"} >= {
        name.partition("-")[0] for name, is_named in named.items() if is_named
    }
    assert not all(is_named for name, is_named in named.items() if name.startswith("capital-"))
