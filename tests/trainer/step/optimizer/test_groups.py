"""Parameter groups by name: what a pattern matches, and what it says when it matches nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_cord.cli.main import cord, invoke
from megatron_cord.errors import CordError
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig, ParameterGroup
from megatron_cord.trainer.step.optimizer.groups import check_groups, group_of
from tests.tiny_run import write_checkpoint

QKV = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def config(**patterns: str | None) -> OptimizerConfig:
    """Return groups of these names and patterns."""
    return OptimizerConfig(groups={name: ParameterGroup(match, 1e-3) for name, match in patterns.items()})


def test_patterns_parts_and_prefixes_match() -> None:
    """Catches a part that matches a longer word, and a later group that takes what an earlier one has."""
    groups = config(adapter=None, late="*.layers.1.*", all_qkv="*.linear_qkv.weight", table="language_model.embedding")
    for name, wanted in {
        "adapter.linear.weight": "adapter",
        "adapters.linear.weight": None,
        QKV: "late",
        QKV.replace(".1.", ".0."): "all_qkv",
        "language_model.embedding.word_embeddings.weight": "table",
        "language_model.decoder.final_layernorm.weight": None,
    }.items():
        assert group_of(groups, name) == wanted


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"a": "adaptor.*"}, r"groups\.a: 'adaptor\.\*' matches no parameter; nearest: adapter\."),
        ({"encoder": None}, "'encoder' matches no parameter; nearest: audio_encoder"),
        ({"a": "*.linear_qkw.*"}, r"nearest: .*linear_qkv\."),
        ({"a": "*.layers.7.*"}, r"'\*\.layers\.7\.\*' matches no parameter"),
        ({"a": "*.q_proj.weight"}, "is a Hugging Face name; that tensor is, or is part of, .*linear_qkv.weight here"),
        ({"a": "audio_encoder"}, r"matches only parameters that model\.freeze leaves untrained"),
        (
            {"a": "language_model", "b": "*.linear_fc1.weight"},
            "matches only parameters that the group a before it takes",
        ),
    ],
)
def test_a_group_without_parameters_is_refused(checkpoint: Path, patterns: dict[str, str | None], message: str) -> None:
    """Catches a typo with which the default rate trains, and a message that does not help."""
    with pytest.raises(CordError, match=message):
        check_groups(config(**patterns), load_architecture(checkpoint), ModelConfig("", freeze=("audio_encoder",)))


def test_the_command_lists_groups_and_names(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches counts that leave parameters out or count frozen ones, and names that a pattern does not match."""
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: out\nmodel: {{checkpoint: {checkpoint}, freeze: [audio_encoder]}}\n")
    groups = [
        "optimizer.groups.adapter.learning_rate=1e-3",
        "optimizer.groups.norms={match: '*norm*', weight_decay: 1}",
    ]
    assert invoke(cord, ["config", "parameters", str(file), "optimizer.weight_decay=0.1", *groups], "cord") == 0
    lines = capsys.readouterr().out.splitlines()
    table = {cells[0]: cells[1:] for line in lines if len(cells := [c.strip() for c in line.split("│")[1:-1]]) == 5}
    assert table["adapter"][:2] == ["0.001", "0.1"] and table["(none)"][:2] == ["3e-05", "0.1"]
    names = [found for line in lines if (found := re.fullmatch(r"(\S+)  (\S+)  ([\d × ]+)", line))]
    listed = {name: (group, sizes) for group, name, sizes in map(re.Match.groups, names)}
    assert listed[QKV][0] == "-" and "language_model.decoder.final_layernorm.weight" in listed
    assert not any(name.startswith("audio_encoder") for name in listed)
    assert sum(int(cells[2].replace(",", "")) for cells in table.values()) == len(listed)
    with pytest.raises(CordError, match="nearest: adapter"):
        invoke(cord, ["config", "check", str(file), "optimizer.groups.adaptor.learning_rate=1"], "cord")


def test_lora_is_listed_and_grouped(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches LoRA that no pattern reaches, frozen weights beside it in the list, and targets that no check sees."""
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "run.yaml"
    lora = "{rank: 2, targets: [q_proj], whole: [adapter]}"
    file.write_text(f"output_dir: out\nmodel: {{checkpoint: {checkpoint}, lora: {lora}}}\n")
    groups = "optimizer.groups.b={match: '*.lora_B', learning_rate: 1.0e-2}"
    assert invoke(cord, ["config", "parameters", str(file), groups], "cord") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [found.groups() for line in lines if (found := re.fullmatch(r"(\S+)  (\S+)  ([\d × ]+)", line))]
    listed = {name: group for group, name, _ in names}
    q = "language_model.decoder.layers.1.self_attention.linear_qkv.q_proj"
    assert listed[f"{q}.lora_A"] == "-" and listed[f"{q}.lora_B"] == "b" and listed["adapter.linear.weight"] == "-"
    assert all(".q_proj.lora_" in name or name.startswith("adapter.") for name in listed)
    with pytest.raises(CordError, match=r"nearest: .*q_proj"):
        invoke(cord, ["config", "check", str(file), "model.lora.targets=[q_porj]"], "cord")
