"""Directories written from a stream: readable by others, complete or invisible, and finished by a second run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_cord.convert import read_tensors
from megatron_cord.convert.hf.auxiliary_files import read_auxiliary_files, with_dtype
from megatron_cord.convert.hf.writer import HFDirectoryWriter, Shard, plan_shards
from megatron_cord.errors import CordError
from tests.forked import run_command

SHAPES = {"a": (3, 5), "b": (7,), "c": (), "d": (2, 2, 2), "e": (11,)}
SHARDS = plan_shards(SHAPES, torch.float32, 70)  # a | b c d | e


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def writer(directory: Path, source: str = "run") -> HFDirectoryWriter:
    """Return a writer that has begun."""
    begun = HFDirectoryWriter(directory, SHARDS, torch.float32)
    begun.begin(source)
    return begun


def portions(name: str) -> Iterator[Tensor]:
    """Yield the tensor in two portions of rows, as one that is read from a checkpoint."""
    tensor = tensors()[name]
    yield from (tensor[:1], tensor[1:]) if tensor.dim() else (tensor,)


def write_files(to: HFDirectoryWriter) -> int:
    """Write all files; return how many were there."""
    return to.write_files(portions, to.shards, lambda nbytes: None)


def whole(directory: Path) -> bool:
    given = dict(read_tensors(directory))
    return given.keys() == SHAPES.keys() and all(torch.equal(given[name], tensor) for name, tensor in tensors().items())


def write_until_killed(directory: str) -> None:
    """Kill the own process in the middle of the second file."""

    def read(name: str) -> Iterator[Tensor]:
        if name == "d":
            os.kill(os.getpid(), signal.SIGKILL)
        return portions(name)

    begun = writer(Path(directory))
    begun.write_files(read, begun.shards, lambda nbytes: None)


@pytest.fixture(scope="module")
def leftover(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the hidden directory of a writer that was killed."""
    out = tmp_path_factory.mktemp("killed") / "out"
    command = "import sys; from tests.convert.hf.test_writer import write_until_killed; write_until_killed(sys.argv[1])"
    assert run_command("-c", command, str(out)).returncode == -signal.SIGKILL
    assert not out.exists()
    return out.with_name(".out.partial")


@pytest.fixture
def killed(leftover: Path, tmp_path: Path) -> Path:
    """Return the path of a directory whose writer was killed."""
    shutil.copytree(leftover, tmp_path / leftover.name)
    return tmp_path / "out"


def test_plan() -> None:
    """Catches a file above the limit, a tensor in no file or in two, and an index for a single file."""
    assert [list(shard.shapes) for shard in SHARDS] == [["a"], ["b", "c", "d"], ["e"]]
    assert [shard.file for shard in SHARDS] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert plan_shards(SHAPES, torch.float32, 10**6) == [Shard("model.safetensors", SHAPES)]
    assert [list(shard.shapes) for shard in plan_shards(SHAPES, torch.float32, 1)] == [[name] for name in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches what only the project's own reader accepts, and a transposed tensor written in another order."""
    given = tensors() | {"a": tensors()["a"].t().contiguous().t()}
    out = HFDirectoryWriter(tmp_path / "out", plan_shards(SHAPES, dtype, 40), dtype)
    out.begin()
    out.write(given.items())
    out.publish({"config.json": b"{}"})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() for tensor in given.values()) * dtype.itemsize
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], given[name].to(dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_is_invisible_and_finished_by_the_next(killed: Path) -> None:
    """Catches half a directory that looks whole, half a file that is kept, and a finished one that is written again."""
    assert not killed.exists()
    first = killed.with_name(".out.partial") / SHARDS[0].file
    before = first.stat().st_mtime_ns
    second, advanced = writer(killed), list[int]()
    assert second.write_files(portions, second.shards, advanced.append) == 1
    assert sum(advanced) == sum(shard.nbytes(torch.float32) for shard in SHARDS)
    assert first.stat().st_mtime_ns == before
    second.publish({})
    assert whole(killed)
    names = sorted(path.name for path in killed.iterdir())
    assert names == [*(shard.file for shard in SHARDS), "model.safetensors.index.json"]


@pytest.mark.parametrize("damage", ["bit", "end", "note", "gone"])
def test_leftovers_are_verified(killed: Path, damage: str) -> None:
    """Catches a finished file that was damaged or deleted since, or whose note was, in the published directory."""
    first = killed.with_name(".out.partial") / SHARDS[0].file
    if damage == "gone":
        first.unlink()
    else:
        victim = first.with_name(f".{first.name}.json") if damage == "note" else first
        content = bytearray(victim.read_bytes())
        if damage == "bit":
            content[-1] ^= 1
        victim.write_bytes(content if damage == "bit" else content[:-1])
    second = writer(killed)
    assert write_files(second) == 0
    second.publish({})
    assert whole(killed)


@pytest.mark.parametrize("other", ["source", "resume"])
def test_leftovers_of_other_weights_are_discarded(killed: Path, other: str) -> None:
    """Catches files of two checkpoints in one directory, and a refusal to start over."""
    begun = (
        writer(killed, source="another run") if other == "source" else HFDirectoryWriter(killed, SHARDS, torch.float32)
    )
    if other == "resume":
        begun.begin("run", resume=False)
    assert write_files(begun) == 0
    begun.publish({})
    assert whole(killed)


def test_several_writers_of_one_directory(tmp_path: Path) -> None:
    """Catches ranks that overwrite each other's files, and a directory that is published without one of them."""
    begun, other = writer(tmp_path / "out"), HFDirectoryWriter(tmp_path / "out", SHARDS, torch.float32)
    assert other.write_files(portions, SHARDS[1::2], lambda nbytes: None) == 0
    with pytest.raises(FileNotFoundError):
        begun.publish({})
    assert not (tmp_path / "out").exists()
    assert begun.write_files(portions, SHARDS[::2], lambda nbytes: None) == 0
    begun.publish({})
    assert whole(tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Catches a checkpoint that is lost to a slip of the pen."""
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CordError, match="exists already and is not overwritten"):
        writer(tmp_path)
    with pytest.raises(CordError, match="exists already"):
        writer(tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (list(tensors().items())[:-1], r"tensor e \[11\] was planned but nothing came"),
        ([("a", torch.zeros(5, 3))], r"tensor a \[3, 5\] was planned but a \[5, 3\] came"),
        ([*tensors().items(), ("f", torch.zeros(1))], "tensor f is not in the plan"),
    ],
)
def test_a_stream_that_is_not_the_plan(tmp_path: Path, given: list[tuple[str, Tensor]], words: str) -> None:
    """Catches a header that describes more than the bytes hold."""
    with pytest.raises(CordError, match=words):
        writer(tmp_path / "out").write(given)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_the_plan(tmp_path: Path) -> None:
    """Catches a tensor that was truncated while it was read, under a header for all of it."""
    begun = writer(tmp_path / "out")
    with pytest.raises(CordError, match=r"tensor a \[3, 5\] was planned but 2 rows came"):
        begun.write_files(lambda name: [tensors()[name][:2]], SHARDS, lambda nbytes: None)
    assert not (tmp_path / "out").exists()


def test_auxiliary_files(tmp_path: Path) -> None:
    """Catches weights of another format that are carried over, code or templates that are not, a wrong precision."""
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "vocab_size": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "modeling.py",
        "model.safetensors",
        "model.safetensors.index.json",
        "a.bin",
        ".x",
    ):
        (tmp_path / name).write_text(name)
    (tmp_path / "assets").mkdir()
    files = read_auxiliary_files(tmp_path)
    assert sorted(files) == ["chat_template.jinja", "config.json", "modeling.py", "tokenizer.json"]
    changed = json.loads(with_dtype(files, torch.bfloat16)["config.json"])
    assert changed == {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "vocab_size": 3}}
    assert with_dtype(files, torch.float32) is files
