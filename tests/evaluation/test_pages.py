"""Players on the page of an evaluation: whose recordings they are, and that the page stays of bounded size."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_cord.errors import CordError
from megatron_cord.evaluation import recordings
from megatron_cord.evaluation.pages import html
from megatron_cord.evaluation.questions import Question

RESULT: dict[str, Any] = {"model": "base", "step": 0, "baseline": None, "sets": {}, "overall": {}, "forgetting": []}
RATE = 16000


def row(name: str, right: bool = True) -> dict[str, Any]:
    return {
        "id": name, "question": f'what is "{name}"', "answer": "1", "text_response": "1", "text_answer": "1",
        "text_correct": True, "audio_response": "1", "audio_answer": "1", "audio_correct": right,
    }  # fmt: skip


def tone(number: int) -> np.ndarray:
    samples: np.ndarray = 0.5 * np.sin(np.arange(RATE // 2) * (0.05 + 0.01 * number))
    return samples.astype(np.float32)


def heard(number: int) -> Question:
    return Question(f"q{number}", "1", "what is one", audio=lambda: [tone(number)])


def players(page: str) -> dict[str, np.ndarray]:
    """Decode the recording below each question that has a player."""
    found = {}
    for name, address in re.findall(
        r"<summary>(\w+):(?:(?!</details>).)*?<audio [^>]*src=\"([^\"]*)\"", page, re.DOTALL
    ):
        assert address.startswith("data:audio/flac;base64,")
        found[name], rate = soundfile.read(io.BytesIO(base64.b64decode(address.partition(",")[2])), dtype="float32")
        assert rate == RATE
    return found


def test_each_player_has_its_recording() -> None:
    """Catches another question's recording, players beside questions that are only read, and more than were wanted."""

    def gone() -> list[np.ndarray]:
        raise CordError("the file is gone")

    questions = [*map(heard, range(5)), Question("read", "1", "one"), Question("gone", "1", "one", audio=gone)]
    questions.append(Question("two", "1", "one", audio=lambda: [tone(1), tone(2)]))
    rows = [row("read"), row("gone"), row("two"), *(row(f"q{number}", right=number != 3) for number in range(5))]
    page = html(RESULT, {"set": rows}, {"set": questions}, 5)
    found = players(page)
    assert list(found) == ["q3", "two", "q0", "q1"], "the most telling first, and five with one that is gone"
    for number in (0, 1, 3):
        np.testing.assert_allclose(found[f"q{number}"], tone(number), atol=1e-4)
    assert len(found["two"]) == 2 * RATE // 2 + RATE // 2, "two recordings, half a second between them"
    assert "The recordings of 4 can be played." in page and "<script" not in page
    assert "media-src data:" in page and 'aria-label="The question, spoken: what is &#34;q3&#34;"' in page
    assert players(html(RESULT, {"set": rows}, {"set": questions}, 0)) == {}


def test_the_page_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that grows with the number of sets."""
    monkeypatch.setattr(
        recordings, "BUDGET", sum(len(recordings._encode(tone(number))) for number in (0, 1, 2, 3, 0, 1))
    )
    sets = {name: [row(f"q{number}") for number in range(4)] for name in ("a", "b", "c")}
    page = html(RESULT, sets, {name: [*map(heard, range(4))] for name in sets}, 4)
    assert page.count("<audio ") == 6 and page.count("can be played") == 2
