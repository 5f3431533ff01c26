"""`cord convert`: there and back on real ranks, from a training run, and every slip in one line."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoProcessor

from megatron_cord.cli.main import invoke, load
from megatron_cord.convert import read_tensors
from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import finalize
from megatron_cord.plan.parameters import part_counts
from megatron_cord.speech.synthesizers.espeak import EspeakSynthesizer
from megatron_cord.speech.synthesizers.protocol import Utterance, Voice
from tests.forked import run_command
from tests.gloo import run_ranks
from tests.model.family_reference import save_whole
from tests.model.full_size import write_full_size
from tests.selection import slow_if
from tests.tiny_run import ROOT, make_run, overrides, write_checkpoint, write_inputs

QUESTION = ["--text", "what is one plus two"]


def run_commands(_rank: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run commands in turn on the ranks of the default process group; return status and output of each."""
    outcomes = []
    for command in commands:
        output = io.StringIO()
        with redirect_stdout(output):
            status = invoke(load("convert"), command, "cord convert")
        outcomes.append((status, output.getvalue()))
    return outcomes


def alone(*command: Any) -> tuple[int, str]:
    """Run one command in this process."""
    try:
        return run_commands(0, [[str(part) for part in command]])[0]
    finally:
        finalize()


def error(*command: Any) -> str:
    with pytest.raises(CordError) as caught:
        alone(*command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def same(directory: Path, other: Path) -> bool:
    given, wanted = dict(read_tensors(directory)), dict(read_tensors(other))
    return given.keys() == wanted.keys() and all(
        t.dtype == given[n].dtype and torch.equal(given[n], t) for n, t in wanted.items()
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads on two, a vocabulary that nothing divides."""
    return write_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "checkpoint"
    alone("import", source, target)
    return target


def test_there_and_back_on_two_ranks(source: Path, tmp_path: Path) -> None:
    """Catches a tensor changed by a change of layout, logits that differ from transformers', and files left behind."""
    checkpoint, out = str(tmp_path / "checkpoint"), tmp_path / "out"
    commands = [
        ["import", str(source), checkpoint, "--tp", "2"],
        ["check", str(source), checkpoint, "--pp", "2", "--tolerance", "1e-5", *QUESTION],
        ["check", str(source), checkpoint, "--tp", "2", "--tolerance", "1e-5", *QUESTION],
        ["export", checkpoint, str(out), "--pp", "2", "--max-shard-size", "20KB"],
    ]
    outcomes = run_ranks(run_commands, 2, commands)
    assert [[status for status, _ in outcome] for outcome in outcomes] == [[0] * 4] * 2
    assert "check as audio" in outcomes[0][1][1] and "check as text" in outcomes[0][1][1]
    assert same(out, source) and len(list(out.glob("*.safetensors"))) > 2
    assert {path.name for path in source.iterdir()} - {"model.safetensors"} <= {path.name for path in out.iterdir()}
    assert "No training run of megatron_cord is known" in (out / "README.md").read_text()
    AutoProcessor.from_pretrained(out)
    assert names(tmp_path) == ["checkpoint", "out"]


def test_a_mixture_there_and_back(tmp_path: Path) -> None:
    """Catches an expert in another's place, split matrices of experts, and logits that differ from transformers'."""
    source, checkpoint, out = (
        write_checkpoint(tmp_path / "source", experts=4),
        str(tmp_path / "checkpoint"),
        tmp_path / "out",
    )
    commands = [
        ["import", str(source), checkpoint, "--tp", "2"],
        ["check", str(source), checkpoint, "--pp", "2", "--tolerance", "1e-5", *QUESTION],
        ["export", checkpoint, str(out)],
    ]
    assert run_ranks(run_commands, 2, commands)[0][1][0] == 0
    assert same(out, source)
    assert sum(".experts." in name for name, _ in read_tensors(out)) == 2 * 4 * 3


def test_an_exported_run_has_a_card_of_its_own(tmp_path: Path) -> None:
    """Catches the original model's card beside trained weights, and a card that is silent about what was trained."""
    inputs = write_inputs(tmp_path)
    original = "---\nlicense: apache-2.0\nlanguage: en\n---\n# The original\nBenchmarks of the original.\n"
    (inputs / "checkpoint" / "README.md").write_text(original)
    run = tmp_path / "run"
    try:
        make_run(overrides(inputs, run, "train.steps=2"))
    finally:
        finalize()
    alone("export", run / "checkpoints" / "step_000002", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "original" not in card and "# exported" in card and "license: apache-2.0" in card
    for row in (
        f"| from | `{inputs / 'checkpoint'}` |",
        f"| data | `{inputs / 'train'}` |",
        "| optimizer steps | 2 of 2 |",
        "| divergence | reverse_kl |",
        "| learning rate | 0.001 |",
        "| frozen | nothing |",
        f"| checkpoint | `{run / 'checkpoints' / 'step_000002'}` |",
    ):
        assert row in card, card


def test_other_weights_are_told_apart(imported: Path, tmp_path: Path) -> None:
    """Catches a comparison that compares a model with itself."""
    status, output = alone("check", write_checkpoint(tmp_path, seed=1), imported, *QUESTION)
    assert status == 1 and "ABOVE the tolerance" in output


def test_dry_run_writes_nothing(source: Path, imported: Path, tmp_path: Path) -> None:
    """Catches a dry run that leaves something behind, leaves a tensor out, or needs weights."""
    shutil.copy(source / "config.json", tmp_path)
    for command in (("import", source), ("export", imported), ("import", tmp_path)):
        status, output = alone(*command, tmp_path / "out", "--dry-run", "--tp", "2")
        assert (
            status == 0
            and all(name in output for name, _ in read_tensors(source))
            and f"{len(list(read_tensors(source)))} tensors" in output
        )
    assert "no weights to compare with" in output and names(tmp_path) == ["config.json"]


def test_precision_is_chosen(source: Path, tmp_path: Path) -> None:
    """Catches weights of another precision than asked for, or than config.json says."""
    alone("import", source, tmp_path / "checkpoint", "--dtype", "bfloat16")
    alone("export", tmp_path / "checkpoint", tmp_path / "out")
    given = dict(read_tensors(tmp_path / "out"))
    assert all(torch.equal(given[name], tensor.bfloat16()) for name, tensor in read_tensors(source))
    assert '"float32"' not in (tmp_path / "out" / "config.json").read_text()


def test_a_training_run_is_exported(tmp_path: Path) -> None:
    """Catches a checkpoint of the trainer that cannot leave, or that leaves without what training changed."""
    inputs = write_inputs(tmp_path)
    settings = overrides(inputs, tmp_path / "run", "train.steps=1")
    trained = run_command("-m", "megatron_cord.train", "--config", os.devnull, *settings)
    assert trained.returncode == 0, trained.stderr
    alone("export", tmp_path / "run" / "checkpoints" / "step_000001", tmp_path / "out")
    assert {name for name, _ in read_tensors(tmp_path / "out")} == {
        name for name, _ in read_tensors(inputs / "checkpoint")
    }
    assert not same(tmp_path / "out", inputs / "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_one_line(source: Path, imported: Path, tmp_path: Path, command: str) -> None:
    """Catches a traceback, and a target that looks whole, where the system refuses to write."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    begin = source if command == "import" else imported
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), command, str(begin), str(tmp_path / "out")]
    done = subprocess.run(arguments, env=environment, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'out'} could not be written (" in line and "free some space" in line
    assert not (tmp_path / "out").exists()


def test_slips(source: Path, imported: Path, tmp_path: Path) -> None:
    """Catches a traceback, or a message without a cure, for what a user may get wrong."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    out = tmp_path / "out"
    assert "model_type 'bert' is not supported" in error("import", tmp_path / "other", out)
    assert "does not divide the language model's attention heads (4)" in error(
        "import", source, out, "--tp", "3", "--dry-run"
    )
    assert "exists already and is not overwritten" in error("import", source, imported)
    assert "exists already and is not overwritten" in error("export", imported, source)
    assert "--hf HF_DIR" in error("export", tmp_path / "nowhere", out)
    assert "is not a whole checkpoint" in error("export", tmp_path / "nowhere", out, "--hf", source)
    assert "write it as 5GB" in error("export", imported, out, "--max-shard-size", "five")
    assert "cannot be read" in error("check", source, imported, *QUESTION, "--audio", tmp_path / "none.wav")
    wider = write_checkpoint(tmp_path / "wider", ffn_size=64)
    assert "holds another architecture (it differs in language.ffn_hidden_size)" in error(
        "check", wider, imported, *QUESTION
    )
    assert not out.exists()


FAMILIES = {"audioflamingo3": False, "llama": False, "qwen2": True, "step_audio_2": False, "voxtral": False}


@pytest.mark.slow
def test_every_family_there_and_back_on_four_ranks(tmp_path: Path) -> None:
    """Catches a family whose tensors the command loses or changes at two by two ranks, and logits that differ.

    The spoken question is longer than the encoder's window here and becomes several clips.
    """
    speech = tmp_path / "speech.wav"
    speech.write_bytes(encode_wav(EspeakSynthesizer().speak([Utterance("what is one plus two", Voice("en-us"))])[0]))
    commands = []
    for family, tied in FAMILIES.items():
        begin = str(save_whole(tmp_path / family, family, ["what", "is", "one", "plus", "two"], tied=tied))
        checkpoint, layout = str(tmp_path / f"{family}-checkpoint"), ["--tp", "2", "--pp", "2"]
        commands += [
            ["import", begin, checkpoint, *layout],
            ["export", checkpoint, str(tmp_path / f"{family}-out"), *layout, "--max-shard-size", "40KB"],
            ["check", begin, checkpoint, *layout, "--tolerance", "1e-5", *QUESTION, "--audio", str(speech)],
        ]
    outcomes = run_ranks(run_commands, 4, commands)
    assert [[status for status, _ in outcome] for outcome in outcomes] == [[0] * len(commands)] * 4
    output = "".join(text for _, text in outcomes[0])
    assert output.count("check as audio: ") == 3 and output.count("check as text: ") == 3
    for family in FAMILIES:
        assert same(tmp_path / f"{family}-out", tmp_path / family), family


def problems_on_ranks(_rank: int, command: list[str]) -> str:
    """Return the error of a command that must fail, on each rank."""
    try:
        run_commands(0, [command])
    except CordError as error:
        return str(error)
    return ""


def test_problems_of_all_stages_are_one_list(source: Path, tmp_path: Path) -> None:
    """Catches a report of one stage's misshapen tensors alone."""
    begin = tmp_path / "begin"
    shutil.copytree(source, begin)
    tensors = dict(read_tensors(source))
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    save_file(
        tensors | {name: tensors[name][:-1].contiguous() for name in (embedding, head)}, begin / "model.safetensors"
    )
    output = run_ranks(problems_on_ranks, 2, ["import", str(begin), str(tmp_path / "checkpoint"), "--pp", "2"])
    assert (
        output[0] == output[1]
        and "(2 problems)" in output[0]
        and f"tensor {embedding} has shape" in output[0]
        and f"tensor {head} has" in output[0]
    )


PUBLISHED_COUNTS = {
    "audioflamingo3": 8_267_215_360,
    "qwen2_audio": 8_397_094_912,
    "step_audio_2": 8_315_179_264,
    "llama": 8_030_261_248,
    "mistral": 7_248_023_552,
    "qwen2_moe": 14_315_784_192,
    "qwen3": 8_190_735_360,
    "qwen3_moe": 30_532_122_624,
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=slow_if(f.endswith("_moe"))) for f in PUBLISHED_COUNTS])
def test_dry_run_of_a_full_size_checkpoint(family: str, tmp_path: Path) -> None:
    """Catches a tensor of the full-size model that is not accounted for, or memory that is taken for its weights.

    The file is all holes, but its header and its length are those of a real one. Counts are the published ones; of
    Step-Audio 2 mini only "8B" is published, and Audio Flamingo 3's is that of transformers' class.
    """
    shapes = write_full_size(tmp_path, family, 5 * 10**9)
    status, output = alone("import", tmp_path, tmp_path / "out", "--dry-run")
    assert status == 0 and "the weights' headers fit" in output
    listed = {line.split("\t")[0] for line in output.splitlines() if "\t" in line} - {"name"}
    assert listed == shapes.keys()
    assert f"total: {PUBLISHED_COUNTS[family]:,} parameters" in output and f"{len(shapes)} tensors" in output
    assert sum(prod(shape) for shape in shapes.values()) == PUBLISHED_COUNTS[family]
    assert part_counts(load_architecture(tmp_path)).total == PUBLISHED_COUNTS[family]


@pytest.mark.slow
def test_a_killed_import_leaves_nothing_that_looks_whole(source: Path, tmp_path: Path) -> None:
    """Catches half a checkpoint under the final name, and a leftover that stops or spoils the next import."""
    target = tmp_path / "checkpoint"
    program = (
        "import os, signal, sys; from megatron_cord.convert.hf import reader\n"
        "from tests.cli.test_convert import run_commands\n"
        "from megatron_cord.parallel.layout import initialize, ParallelConfig\n"
        "read, count = reader.StoredTensor.read_block, iter(range(10))\n"
        "def dying(*given):\n"
        "    next(count, None) is None and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(*given)\n"
        "reader.StoredTensor.read_block = dying\n"
        "run_commands(0, [sys.argv[1:]])"
    )
    assert run_command("-c", program, "import", str(source), str(target)).returncode == -signal.SIGKILL
    (leftover,) = names(tmp_path)
    assert leftover == ".checkpoint.partial" and any((tmp_path / leftover).glob("*.distcp"))
    alone("import", source, target)
    alone("export", target, tmp_path / "out")
    assert same(tmp_path / "out", source) and names(tmp_path) == ["checkpoint", "out"]


def test_a_killed_export_is_finished_by_the_same_command(imported: Path, source: Path, tmp_path: Path) -> None:
    """Catches half an export under the final name, and files that are written again though they are whole."""
    target = tmp_path / "out"
    program = (
        "import os, signal, sys; from megatron_cord.convert.megatron import reader\n"
        "from tests.cli.test_convert import run_commands\n"
        "from megatron_cord.parallel.layout import initialize, ParallelConfig\n"
        "blocks, count = reader.SavedWeights.blocks, iter(range(40))\n"
        "def dying(*given):\n"
        "    next(count, None) is None and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return blocks(*given)\n"
        "reader.SavedWeights.blocks = dying\n"
        "run_commands(0, [sys.argv[1:]])"
    )
    command = ["export", str(imported), str(target), "--max-shard-size", "20KB"]
    assert run_command("-c", program, *command).returncode == -signal.SIGKILL
    (leftover,) = names(tmp_path)
    assert leftover == ".out.partial"
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / leftover).glob("*.safetensors")}
    assert finished
    status, output = alone(*command)
    assert status == 0 and f"{len(finished)} of them finished earlier" in output
    assert all((target / path.name).stat().st_mtime_ns == time for path, time in finished.items())
    assert same(target, source) and not [
        path for path in target.iterdir() if path.name.startswith(".") or path.suffix == ".writing"
    ]


def test_damaged_files_are_found_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    """Catches an import that ends halfway through, or names the first of two truncated files alone."""
    begin = tmp_path / "begin"
    shutil.copytree(source, begin)
    tensors = list(read_tensors(source))
    (begin / "model.safetensors").unlink()
    files = ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"]
    for i, name in enumerate(files):
        save_file(dict(tensors[i::3]), begin / name)
        if i:
            (begin / name).write_bytes((begin / name).read_bytes()[:-8])
    output = error("import", begin, tmp_path / "checkpoint")
    assert files[0] not in output and files[1] in output and files[2] in output and "download" in output
    assert names(tmp_path) == ["begin"]
