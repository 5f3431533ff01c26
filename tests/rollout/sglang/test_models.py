"""Which checkpoints SGLang servers are started for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.models import served_model
from tests.model.family_reference import save


def test_a_language_model_that_the_servers_class_lacks(tmp_path: Path) -> None:
    """Catches a Qwen2-Audio around another text model, which SGLang would run as Qwen2."""
    for family in ("qwen2_audio+qwen2", "qwen2_audio+llama"):
        (tmp_path / family).mkdir()
        save(tmp_path / family, family, tied=False)
    assert served_model(tmp_path / "qwen2_audio+qwen2")[0] == "qwen2_audio"
    with pytest.raises(CordError, match="run qwen2_audio with its published kind of language model alone"):
        served_model(tmp_path / "qwen2_audio+llama")
