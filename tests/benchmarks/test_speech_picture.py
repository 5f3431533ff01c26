"""The picture of `make speech` is of the results that are kept."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.speech.picture import IMAGES, draw, kept_results


def words(path: Path) -> list[str]:
    """Return what stands written in a drawing."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))


def test_the_published_picture_is_of_the_kept_results(tmp_path: Path) -> None:
    """Catches a picture that was not drawn again after a run was added or replaced."""
    results = kept_results()
    draw(results, [tmp_path / "speech.svg"])
    published = words(IMAGES / "speech.svg")
    assert words(tmp_path / "speech.svg") == published
    for name, result in results.items():
        assert {name.replace("-", " "), f"{result['change']['gap_closed']['value']:.0%} of the gap"} <= set(published)
