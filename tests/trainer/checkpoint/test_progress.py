"""The architecture in a checkpoint's state, also one that an older version wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.trainer.checkpoint.progress import STATE, Progress, read_progress, write_progress
from tests.model.test_architecture import ARCHITECTURE


def test_fields_that_an_older_version_did_not_know(tmp_path: Path) -> None:
    """Catches a checkpoint of before that is refused, and one that is read by a model which computes otherwise."""
    write_progress(tmp_path, Progress(step=3, seconds=0.0, skipped_in_a_row=0, seed=0), ARCHITECTURE)
    state = json.loads((tmp_path / STATE).read_text())
    del state["architecture"]["language"]["qk_norm"], state["architecture"]["language"]["rope_scaling"]
    (tmp_path / STATE).write_text(json.dumps(state))
    assert read_progress(tmp_path, ARCHITECTURE).step == 3
    other = replace(ARCHITECTURE, language=replace(ARCHITECTURE.language, qk_norm=True))
    with pytest.raises(CordError, match=r"it differs in language.qk_norm"):
        read_progress(tmp_path, other)
