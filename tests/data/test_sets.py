"""Sets as a configuration names them: which reader, order and defaults each gets, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cord.data.config import DataConfig, TrainingSetConfig
from megatron_cord.data.ordering.damage import DamageLog
from megatron_cord.data.ordering.order import permutation
from megatron_cord.data.ordering.row import Phase
from megatron_cord.data.samples import PromptLimits
from megatron_cord.data.sets import default_cache, make_row, open_evaluation, open_training
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.streaming import StreamedShards
from megatron_cord.errors import CordError
from tests.tiny_run import make_samples, write_shards


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "set", make_samples(7))


def test_each_set_has_its_reader(directory: Path, tmp_path: Path) -> None:
    """Would catch an address that is read with an index, a set's own settings that are lost, or lost on the others."""
    sets = {
        "indexed": TrainingSetConfig(str(directory)),
        "streamed": TrainingSetConfig(f"{directory}/", stream=True, system="Be brief."),
        "copied": TrainingSetConfig(f"file://{directory}"),
    }
    with pytest.raises(CordError, match=r"indexed and streamed are the same set"):
        DataConfig(sets)
    sets["streamed"] = TrainingSetConfig(str(write_shards(tmp_path / "b", make_samples(7))), stream=True, system="Hm.")
    sets["copied"] = TrainingSetConfig(f"file://{directory}", instruction="Answer.")
    config = DataConfig(sets, system="Be kind.", cache_dir=str(tmp_path / "cache"))
    opened = open_training(config, PromptLimits())
    assert {name: type(each) for name, each in opened.items()} == {
        "indexed": ShardDataset, "streamed": StreamedShards, "copied": StreamedShards,
    }  # fmt: skip
    given = {name: (each[0].system, each[0].instruction) for name, each in opened.items()}
    assert given == {"indexed": ("Be kind.", None), "streamed": ("Hm.", None), "copied": ("Be kind.", "Answer.")}
    for each in opened.values():
        each.close()


def test_one_set_has_the_order_of_the_run_s_seed(directory: Path) -> None:
    """Would catch another order of the samples than runs had before there were several sets."""
    config = DataConfig(str(directory))
    row = make_row(config, open_training(config, PromptLimits()), 3, Phase({"": 1.0}), DamageLog({"": 7}, {"": 0}, 0.0))
    numbers = [row.at(position, 4).number for position in range(14)]
    assert numbers == [*permutation(7, 3, 0), *permutation(7, 3, 1)]


def test_a_cache_that_cannot_hold_what_is_read(directory: Path, tmp_path: Path) -> None:
    """Would catch copies that push each other out for ever."""
    config = DataConfig(f"file://{directory}", cache_dir=str(tmp_path / "cache"), cache_bytes=100_000)
    with pytest.raises(CordError, match=r"data\.cache_bytes=100000 is too small for \d+ bytes, up to two times"):
        open_training(config, PromptLimits())


def test_a_cache_that_holds_the_whole_set(directory: Path, tmp_path: Path) -> None:
    """Would catch a set of few shards that is refused for want of room that its copies never take."""
    size = sum(shard.stat().st_size for shard in directory.glob("*.tar"))
    place = str(tmp_path / "cache")
    opened = open_training(DataConfig(f"file://{directory}", cache_dir=place, cache_bytes=size), PromptLimits())
    opened[""].close()
    with pytest.raises(CordError, match=rf"is too small for {size} bytes"):
        open_training(DataConfig(f"file://{directory}", cache_dir=place, cache_bytes=size - 1), PromptLimits())


@pytest.mark.parametrize(
    "address", ["https://me:secret@x/y", "https://secret@x/y", "s3://me:secret@x", "a::http://secret@x"]
)
def test_a_password_in_an_address(address: str) -> None:
    """Would catch a password that reaches config.yaml and logs, also by the refusal itself."""
    for refused in (
        lambda: DataConfig(address),
        lambda: DataConfig(evaluation=address),
        lambda: TrainingSetConfig(address),
    ):
        with pytest.raises(CordError, match=r"holds a name or a password") as error:
            refused()
        assert "secret" not in str(error.value)
    for plain in ("hf://datasets/o/n@v1/x", "abfs://box@account/x", "https://x:80/y@z", "data/a:b@c/*.tar"):
        assert DataConfig(plain).train == plain


def test_what_has_no_address(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an evaluation whose address is taken for a pattern, and a cache in the wrong home."""
    with pytest.raises(CordError, match=r"data\.evaluation=https://x/y is an address; make a local copy"):
        open_evaluation(DataConfig(evaluation="https://x/y"), PromptLimits())
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/megatron_cord/shards")
