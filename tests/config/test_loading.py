"""Configuration: what a YAML file and overrides become, and the one line that a mistake gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from megatron_cord.config.loading import dump_config, load_config, to_dict
from megatron_cord.errors import CordError


@dataclass
class Schedule:
    warmup: int = 0
    kind: Literal["cosine", "constant"] = "constant"


@dataclass
class Train:
    steps: int = 10
    lr: float = 1e-3
    clip: float | None = 1.0
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup=5))

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass
class Model:
    checkpoint: Path
    heads: int = 4


@dataclass
class Example:
    model: Model = field(default_factory=Model)  # type: ignore[arg-type]
    train: Train = field(default_factory=Train)
    name: str = "run"
    bf16: bool = False
    voices: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.95)
    sizes: tuple[int, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    limit: int | float | None = None
    key: str = field(default="", metadata={"secret": True})
    extra: Any = None
    schedules: list[Schedule] | None = None


def load(text: str, tmp_path: Path, *overrides: str) -> Example:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return load_config(Example, path, ["model.checkpoint=here", *overrides])


def test_values_of_every_supported_type(tmp_path: Path) -> None:
    """Catches a value that is lost or of another kind: 1e-3 read as text, a list for a tuple, a section's defaults."""
    config = load(
        "train: {lr: 1e-3, steps: 3, schedule: {kind: cosine}}\nbf16: true\nvoices: [no, 'on']\nbetas: [0, '9e-1']\n"
        "sizes: [1, 2]\nweights: {tok: 1, seq: .5}\nlimit: 3\nextra: {a: [1]}\nschedules: [{warmup: 2}]\n",
        tmp_path,
    )
    assert config == Example(
        model=Model(Path("here")),
        train=Train(steps=3, lr=0.001, schedule=Schedule(warmup=5, kind="cosine")),
        bf16=True,
        voices=["no", "on"],
        betas=(0.0, 0.9),
        sizes=(1, 2),
        weights={"tok": 1.0, "seq": 0.5},
        limit=3,
        extra={"a": [1]},
        schedules=[Schedule(warmup=2)],
    )
    assert type(config.limit) is int and type(config.betas[0]) is float and config.train.schedule.warmup == 5


def test_overrides_win_in_order_and_join_maps(tmp_path: Path) -> None:
    """Catches overrides applied in the wrong order, or one that wipes the neighbours of the key it sets."""
    config = load(
        "train: {steps: 3, lr: 0.5}\nweights: {tok: 1}\n", tmp_path, "train.steps=4", "train.steps=5", "weights.seq=2",
        "voices=[a, b]", "train.schedule={warmup: 1}", "train.clip=null", "name=",
    )  # fmt: skip
    assert (config.train.steps, config.train.lr, config.train.clip, config.train.schedule.warmup) == (5, 0.5, None, 1)
    assert config.weights == {"tok": 1.0, "seq": 2.0} and config.voices == ["a", "b"] and config.name == ""
    assert load_config(Example, None, ["model.checkpoint=x"]).train.steps == 10


def test_base_is_inherited(tmp_path: Path) -> None:
    """Catches a base that overrides its inheritor, is sought in the working directory, or loops for ever."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text("train: {steps: 7, lr: 0.25}\nname: base\n")
    config = load("base: sub/base.yaml\ntrain: {steps: 8}\n", tmp_path)
    assert (config.train.steps, config.train.lr, config.name) == (8, 0.25, "base")
    with pytest.raises(CordError, match="leads back"):
        load("base: a.yaml\n", tmp_path)
    with pytest.raises(
        CordError, match=r"none\.yaml: there is no such configuration file \(named by 'base' in .*a\.yaml\)"
    ):
        load("base: none.yaml\n", tmp_path)
    (tmp_path / "sub" / "base.yaml").write_text("train: {steps: x}\n")
    with pytest.raises(CordError, match=r"train\.steps: expected int, got 'x' \(.*base\.yaml, line 1\)"):
        load("base: sub/base.yaml\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train:\n  stepz: 1\n", [], r"unknown key 'train\.stepz' \(.*line 2\); did you mean 'train\.steps'\?"),
        ("", ["warmup=1"], r"unknown key 'warmup' \(override warmup\); did you mean 'train\.schedule\.warmup'\?"),
        ("train: {steps: many}", [], r"train\.steps: expected int, got 'many' \(.*a\.yaml, line 1\)"),
        ("", ["train.steps=2.5"], r"train\.steps: expected int, got 2\.5 \(override train\.steps\)"),
        ("train: {steps: true}", [], r"train\.steps: expected int, got true"),
        ("bf16: 1", [], r"bf16: expected true or false, got 1 "),
        ("bf16: 'true'", [], r"bf16: expected true or false, got 'true'"),
        ("name: 3", [], r"name: expected str, got 3 "),
        ("train: {lr: .nan}", [], r"train\.lr: expected float, got nan"),
        ("train: {clip: x}", [], r"train\.clip: expected float or null, got 'x'"),
        ("train: 3", [], r"train: expected a section of 'key: value' lines, got 3"),
        ("train:", [], r"train: expected a section of 'key: value' lines, got null"),
        ("train: {schedule: {kind: x}}", [], r"train\.schedule\.kind: expected one of cosine, constant, got 'x'"),
        ("voices: [a, 1]", [], r"voices\.1: expected str, got 1 "),
        ("betas: [1]", [], r"betas: expected a list of 2 values \(float, float\), got \[1\]"),
        ("weights: {tok: x}", [], r"weights\.tok: expected float, got 'x' "),
        ("schedules: [{warmup: x}]", [], r"schedules\.0\.warmup: expected int, got 'x' "),
        ("train: {steps: 0}", [], r"^train: steps must be at least 1, got 0 \(.*line 1\)$"),
        ("train: {steps: 5, steps: 6}", [], r"line 1: train\.steps is given twice"),
        ("a: [1\nb: 2\n", [], r"a\.yaml, line 2: not valid YAML: "),
        ("- 1\n", [], r"expected 'key: value' lines at the top level, got a list"),
        ("just words", [], r"expected 'key: value' lines at the top level, got a str"),
        ("extra: &x [*x]", [], r"contains itself"),
        ("extra: !!python/object:os.system {}", [], r"line 1: the tag .* is not supported"),
        ("extra: !!int word", [], r"not valid YAML"),
        ("", ["train.steps"], r"override 'train\.steps': expected the form a\.b=value"),
        ("", ["train..steps=1"], r"override 'train\.\.steps': expected the form"),
        ("", ["name=*.tar"], r"override name: the value is not valid YAML; .*quotes"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    """Catches a mistake that passes in silence, ends in a traceback, or is reported without field, value or place."""
    with pytest.raises(CordError, match=message) as caught:
        load(text, tmp_path, *overrides)
    assert "\n" not in str(caught.value)


def test_required_and_missing(tmp_path: Path) -> None:
    """Catches a required field inside a defaulted section that ends in dataclass's TypeError, and unreadable files."""
    with pytest.raises(
        CordError, match=r"^model\.checkpoint is required: set it in the configuration or as model\.checkpoint="
    ):
        load_config(Example, None, [])
    with pytest.raises(CordError, match=r"^model\.checkpoint is required"):
        load_config(Example, None, ["model.heads=2"])
    with pytest.raises(CordError, match="no such configuration file"):
        load_config(Example, tmp_path / "none.yaml", [])
    with pytest.raises(CordError, match="cannot read the configuration"):
        load_config(Example, tmp_path, [])
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(CordError, match="not a UTF-8 text file"):
        load_config(Example, tmp_path / "b.yaml", [])


def test_secrets_stay_out_of_dumps_and_messages(tmp_path: Path) -> None:
    """Catches a secret written into the dumped configuration, or quoted in an error about its type or its syntax."""
    config = load("key: sesame\n", tmp_path)
    assert config.key == "sesame" and to_dict(config)["key"] == "***" and to_dict(load("", tmp_path))["key"] == ""
    for override in ("key=12345678", "key=*12345678"):
        with pytest.raises(CordError, match=r"^(override )?key: ") as caught:
            load("", tmp_path, override)
        assert "12345678" not in str(caught.value)


def test_a_dump_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    """Catches values that change their type on the way (the text '1e-3', 'no', '007'), and partial files."""
    config = load(
        "name: '1e-3'\nvoices: ['no', '007', '2020-01-01', 'null', 'ü', '1:30']\ntrain: {lr: 1e-20, clip: .inf}\n",
        tmp_path,
    )
    dump_config(config, tmp_path / "out" / "config.yaml")
    assert load_config(Example, tmp_path / "out" / "config.yaml", []) == config
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["voices"][0] == "no"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]
    with pytest.raises(CordError, match=r"a\.yaml/b\.yaml: cannot write the configuration"):
        dump_config(config, tmp_path / "a.yaml" / "b.yaml")
