"""Where checkpoints come from: local files first, a hub only where it is named, and models by their own name."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import LocalEntryNotFoundError

from megatron_cord.cli.actions import serve
from megatron_cord.cli.config import command as config_command
from megatron_cord.cli.plan import command as plan_command
from megatron_cord.config.loading import load_config
from megatron_cord.convert.hf.auxiliary_files import read_auxiliary_files
from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.tokenizers import load_tokenizer
from megatron_cord.errors import CordError
from megatron_cord.evaluate import evaluate
from megatron_cord.model import checkpoint_directory as source
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import finalize
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.sglang.weight_sync.served import served_specs
from megatron_cord.rollout.weights import PlainWeights
from megatron_cord.train import train
from megatron_cord.trainer.config import RunConfig
from megatron_cord.verify.weight_sync import VerifyWeightSyncConfig, changed_model
from tests.tiny_run import overrides, write_checkpoint, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once where anything looks up a name, as a hub's."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(source, "snapshot_download", refuse)


def _serve(checkpoint: str) -> None:
    serve.serve(
        Path(checkpoint), (), servers_file=Path("x"), count=1, gpus="", port=0, hang_seconds=1.0, log_dir=Path("x"),
        api_key_file=None, unseeded=False, python=Path("python"),
    )  # fmt: skip


READERS: dict[str, Callable[[str], Any]] = {
    "architecture": load_architecture,
    "prompts": PromptBuilder,
    "local engine": LocalEngine,
    "engine": lambda given: build_engine(RolloutConfig(), given, torch.device("cpu")),
    "plain model": PlainModel,
    "served specs": served_specs,
    "weights": lambda given: PlainWeights({}, given).specs(full=True),
    "serve": _serve,
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize("given", ["runs/none", "Qwen/Qwen2-Audio-7B-Instruct", "/nowhere/at/all", "none"])
def test_a_missing_directory(reader: str, given: str) -> None:
    """Catches a mistyped path for which a hub is asked for minutes, and that is then blamed on the network."""
    hub = f", or hf://{given} to take it from the Hugging Face Hub" if given.count("/") == 1 else ""
    with pytest.raises(CordError) as caught:
        READERS[reader](given)
    assert str(caught.value) == f"{given} does not exist; give a Hugging Face checkpoint directory{hub}"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("reader", list(READERS))
def test_an_unsupported_model_is_named(reader: str, tmp_path: Path) -> None:
    """Catches a story about processors or feature extractors where the model is one that is not supported."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper", "d_model": 8}))
    with pytest.raises(CordError, match=r"config\.json: model_type 'whisper' is not supported; supported: "):
        READERS[reader](str(tmp_path))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("entry", [train, evaluate])
def test_entry_points_say_the_same(entry: Callable[[RunConfig], Any], inputs: Path, tmp_path: Path) -> None:
    """Catches a command that reads the checkpoint on a way of its own."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen3_omni"}')
    for checkpoint, words in (("none/there", "none/there does not exist"), (tmp_path / "other", "'qwen3_omni' is not")):
        settings = overrides(inputs, tmp_path / "out", f"model.checkpoint={checkpoint}")
        with pytest.raises(CordError, match=words):
            entry(load_config(RunConfig, None, settings))
        finalize()


@pytest.mark.usefixtures("no_network")
def test_local_files_are_enough(inputs: Path) -> None:
    """Catches a hub that is asked for what lies there, such as a file that a checkpoint need not have."""
    given = str(inputs / "checkpoint")
    for read in (load_architecture, PromptBuilder, load_tokenizer, PlainModel, LocalEngine, stored_tensors):
        read(given)


def test_a_file_is_no_directory(inputs: Path) -> None:
    """Catches the path of the weights themselves, which many tools take."""
    with pytest.raises(CordError, match=r"model\.safetensors is a file; give the Hugging Face checkpoint directory"):
        checkpoint_directory(inputs / "checkpoint" / "model.safetensors")


def test_a_hub_that_is_named(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name that a path has taken a slash from, two downloads in one process, and pickles of a hub."""
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(shutil.copytree(inputs / "checkpoint", tmp_path / f"snapshot{len(asked)}"))

    monkeypatch.setattr(source, "snapshot_download", download)
    for given in ("hf://tiny/model@v1", Path("hf://tiny/model@v1")):
        load_architecture(given)
        PromptBuilder(given)
        assert stored_tensors(given) and read_auxiliary_files(Path(given))
    assert asked == [("tiny/model", "v1")]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of many lines, and blame for the local files."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise LocalEntryNotFoundError("no connection\nand much more")

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(CordError) as caught:
        checkpoint_directory("hf://tiny/absent")
    said = "hf://tiny/absent: the hub does not give it (no connection); check the name, or give a directory"
    assert str(caught.value) == said


def test_the_weight_sync_check_reads_it_in_the_same_way() -> None:
    """Catches `verify weight_sync` on a way of its own."""
    assert VerifyWeightSyncConfig(checkpoint="none").checkpoint == "none"
    with pytest.raises(CordError, match="none does not exist; give"):
        changed_model("none", None, torch.float32)  # type: ignore[arg-type]


def test_plan_without_a_checkpoint_names_models(tmp_path: Path) -> None:
    """Catches advice to download what `plan` can do without, and a configuration without a checkpoint that stops it."""
    for given, words in ((["model.checkpoint=none"], "none does not exist"), ([], "model.checkpoint is required")):
        done = CliRunner().invoke(plan_command, ["--config", os.devnull, "output_dir=x", *given])
        said = str(done.exception)
        assert words in said and "--model llama" not in said
        assert "|qwen2_audio_7b|" in said.partition("with --model ")[2]
    done = CliRunner().invoke(plan_command, ["--config", os.devnull, "--model", "qwen2_audio_7b", "output_dir=x"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    assert "parameters: 8," in done.output


def test_config_check_knows_the_hub(tmp_path: Path) -> None:
    """Catches `cord config check` that warns of a checkpoint which the hub will give."""
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "run.yaml").write_text("output_dir: x\nmodel:\n  checkpoint: hf://tiny/model\n")
    done = CliRunner().invoke(config_command, ["check", str(tmp_path / "run.yaml")])
    assert "hf://tiny/model" in done.output and "does not exist here" not in done.output.split("data.train")[0]
