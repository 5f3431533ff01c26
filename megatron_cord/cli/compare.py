"""``cord compare``: several methods on several seeds with one budget."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import config_option, overrides_argument


@click.command
@config_option(required=False)
@overrides_argument
def command(config: Path | None, overrides: tuple[str, ...]) -> int:
    """Train several methods on several seeds, and tabulate which closed how much of the gap.

    Settings are the fields of megatron_cord.compare.plan.CompareConfig, in a file or as overrides, such as
    train=CONFIG.yaml output_dir=runs/compare methods=[cord,sft,grpo] seeds=[0,1,2].

    Finished runs are kept, and a run that was stopped continues; a run that fails is named, and the others continue
    (exit status 2).
    """
    from megatron_cord.cli.actions.compare import compare

    return compare(config, overrides)
