"""Recordings of questions inside a page: lossless FLAC of 16 bits as `data:` addresses, which need no file beside it.

It simplifies: a question of several recordings is played as one, with a pause between them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import soundfile

from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.errors import CordError
from megatron_cord.evaluation.questions import Question

BUDGET = 8_000_000  #: bytes of FLAC on one page: about 11 MB of base64, some ten minutes of speech


def load_recordings(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], questions: Mapping[str, Sequence[Question]], count: int
) -> dict[str, dict[str, str]]:
    """Return by set and id the recordings of the first questions that have one, until `BUDGET` is spent.

    Args:
        rows: of each set, those shown first in front.
        questions: of each set.
        count: of each set, at most.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in rows}
    spent = 0
    for name, some in rows.items():
        by_id = {question.id: question for question in questions[name] if question.audio is not None}
        for row in [row for row in some if row["id"] in by_id][:count]:
            try:
                flac = _encode(by_id[row["id"]].sample().played())
            except CordError:  # gone since it was answered: the page has its answer, and no player
                continue
            spent += len(flac)
            if spent > BUDGET:
                return found
            found[name][row["id"]] = "data:audio/flac;base64," + base64.b64encode(flac).decode("ascii")
    return found


def _encode(waveform: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1.0, 1.0), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
