"""Which checkpoints SGLang servers are started for, and how they take prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.model.families import FAMILIES
from megatron_cord.rollout.sglang.models import ServedModel, served_model
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from tests.model.family_reference import save


@pytest.mark.parametrize(
    ("family", "clips", "takes_ids"),
    [
        ("audioflamingo3", float("inf"), True),
        ("qwen2_audio+llama", float("inf"), False),
        ("ultravox+mistral", float("inf"), True),
        ("voxtral", float("inf"), True),
        ("qwen3", 0, False),
    ],
)
def test_models_that_are_served(family: str, clips: float, takes_ids: bool, tmp_path: Path) -> None:
    """Catches a family that servers run and the trainer refuses, and recordings sent in another form than theirs."""
    save(tmp_path, family, tied=False)
    assert served_model(tmp_path) == ServedModel(family.partition("+")[0], clips, takes_ids)


def test_a_family_that_servers_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that is started for a model which it does not have, and ends minutes later."""
    monkeypatch.setitem(FAMILIES, "voxtral", replace(FAMILIES["voxtral"], sglang_max_clips=None))
    save(tmp_path, "voxtral", tied=False)
    with pytest.raises(CordError, match=r"SGLang servers run .*ultravox alone, not voxtral; use rollout\.engine=local"):
        served_model(tmp_path)


def test_a_checkpoint_without_its_classs_name(tmp_path: Path) -> None:
    """Catches a server that ends with a traceback of SGLang's, which does not say what is missing."""
    save(tmp_path, "voxtral", tied=False)  # as transformers writes a configuration alone
    with pytest.raises(CordError, match=r"config\.json has no architectures, by which a server finds"):
        SglangServer(ServerConfig(checkpoint=tmp_path), "", tmp_path / "log").start()


def test_a_text_model_that_servers_lack(tmp_path: Path) -> None:
    """Catches a server that dies of its first spoken question."""
    save(tmp_path, "qwen2_audio+qwen2_moe", tied=False)
    with pytest.raises(CordError, match=r"do not run qwen2_audio around a text model with a shared expert"):
        served_model(tmp_path)
