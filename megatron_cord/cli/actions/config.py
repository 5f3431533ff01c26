"""Explain the keys of a run's configuration, and print what a file sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_cord.cli.reference_cache import run_sections
from megatron_cord.config.loading import load_config, to_dict, to_yaml
from megatron_cord.config.reference import Key
from megatron_cord.config.suggestions import explain_foreign, renamed, suggest
from megatron_cord.data.shards.manifest import is_remote
from megatron_cord.errors import CordError

if TYPE_CHECKING:
    from megatron_cord.trainer.config import RunConfig


def explain_key(name: str) -> None:
    """Print one key, all keys of a section and those within it, or what another trainer's key is here.

    Raises:
        CordError: there is neither.
    """
    known = run_sections()
    keys = {key.name: key for section in known for key in section.keys}
    if name in keys:
        _print_key(keys[name])
        return
    found = [section for section in known if section.name == name or section.name.startswith(f"{name}.")]
    foreign = explain_foreign(name)
    if not found and foreign is not None and renamed(name) is None:
        if foreign in keys:
            click.echo(f"{name} is {foreign} here\n")
            _print_key(keys[foreign])
        else:
            click.echo(f"{name}\n{click.wrap_text(foreign, 100, '  ', '  ')}")
        return
    if not found:
        sections = ", ".join(section.name for section in known if section.name and "." not in section.name)
        raise CordError(f"there is no key or section '{name}'{suggest(name, list(keys))}; sections: {sections}")
    for section in found:
        click.echo(f"{section.name}  ({section.declared})\n  {section.purpose}\n")
        for key in section.keys:
            click.echo(f"  {key.name.removeprefix(f'{section.name}.')} = {key.default}")
            for line in _wrapped(key.meaning, "      "):
                click.echo(line)
        click.echo()


def check_file(file: Path, overrides: Sequence[str], *, show_all: bool) -> int:
    """Print what a run of this file would use, without starting it; return 0.

    Raises:
        CordError: the file or an override is wrong.
    """
    from megatron_cord.trainer.config import RunConfig  # seconds, which an explanation does without

    config = load_config(RunConfig, file, overrides)
    _check_parameter_groups(config)
    if show_all:
        click.echo(to_yaml(config), nl=False)
        return 0
    default = load_config(
        RunConfig, None, [f"output_dir={config.output_dir}", f"model.checkpoint={config.model.checkpoint}"]
    )
    usual, used = dict(_flat(to_dict(default))), dict(_flat(to_dict(config)))
    for key, value in used.items():
        if key not in usual or usual[key] != value:
            default_text = f"  (default {_text(usual[key])})" if key in usual else ""
            click.echo(f"{key} = {_text(value)}{default_text}")
    for key in ("output_dir", "model.checkpoint"):
        click.echo(f"{key} = {used[key]}")
    if isinstance(config.data.train, dict):
        total = sum(each.weight for each in config.data.train.values())
        shares = (f"{name} {each.weight / total:.1%}" for name, each in config.data.train.items())
        click.echo(f"shares of the samples: {', '.join(shares)}")
    for warning in _warnings(config):
        click.echo(f"warning: {warning}", err=True)
    return 0


def _check_parameter_groups(config: RunConfig) -> None:
    """Refuse a group of parameters, or a target of LoRA, with none in it; not where the checkpoint is not at hand."""
    patterns = config.optimizer.groups or config.model.lora.enabled
    if patterns and (Path(config.model.checkpoint) / "config.json").is_file():
        from megatron_cord.model.families import load_architecture
        from megatron_cord.model.lora.targets import find_targets
        from megatron_cord.trainer.step.optimizer.groups import check_groups

        arch = load_architecture(config.model.checkpoint)
        if config.model.lora.enabled:
            find_targets(arch, config.model.lora, config.model.freeze)
        check_groups(config.optimizer, arch, config.model)


def _print_key(key: Key) -> None:
    click.echo(key.name)
    for title, text in (("type", key.type), ("default", key.default), ("declared in", key.declared)):
        click.echo(f"  {title + ':':13}{text}")
    for line in _wrapped(key.meaning, "  "):
        click.echo(line)


def _wrapped(text: str, indent: str) -> list[str]:
    return click.wrap_text(text, 100, indent, indent).splitlines() if text else []


def _warnings(config: RunConfig) -> Iterator[str]:
    """Yield what would stop the run, or waste it, once it has started."""
    paths = {"model.checkpoint": config.model.checkpoint, **_training_paths(config)}
    teachers = {"teacher": config.teacher} | {f"teachers.{name}": each for name, each in config.teachers.items()}
    paths |= {f"{key}.checkpoint": each.checkpoint for key, each in teachers.items() if each.checkpoint is not None}
    paths |= {f"evaluation.sets.{name}.path": each.path for name, each in config.evaluation.sets.items()}
    if config.data.evaluation:
        paths["data.evaluation"] = config.data.evaluation
    for key, path in paths.items():
        if not path:
            yield f"{key} is not set; training requires it"
        elif not Path(path).exists() and not any(sign in path for sign in "*?[") and not is_remote(path):
            yield f"{key}: {path} does not exist here"
    if not config.data.evaluation and config.evaluation.interval:
        yield "data.evaluation is not set: the run is not evaluated"
    if config.rollout.engine == "sglang" and not (config.rollout.sglang.servers or config.rollout.sglang.servers_file):
        yield "rollout.engine=sglang needs rollout.sglang.servers or rollout.sglang.servers_file (cord serve writes it)"
    if config.rollout.engine == "local" and (config.rollout.sglang.servers or config.rollout.sglang.servers_file):
        yield "rollout.sglang.servers and rollout.sglang.servers_file are not used by rollout.engine=local"


def _training_paths(config: RunConfig) -> dict[str, str]:
    """Return the keys of `data.train` that hold paths, with these."""
    train = config.data.train
    if isinstance(train, str):
        return {"data.train": train}
    return {f"data.train.{name}.path": each.path for name, each in train.items()}


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        here = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict) and value:
            yield from _flat(value, here)
        else:
            yield here, value


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
