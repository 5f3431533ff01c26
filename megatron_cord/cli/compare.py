"""``cord compare``: several methods on several seeds with one budget."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import config_option


class _WithKeys(click.Command):
    """A command whose help lists the keys of its configuration."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each key with its default and its meaning."""
        from megatron_cord.compare.config import CompareConfig
        from megatron_cord.config.reference import sections

        with formatter.section("Keys"):
            rows = [(f"{k.name} = {k.default}", k.meaning) for s in sections(CompareConfig) for k in s.keys]
            formatter.write_dl(rows)


@click.command(cls=_WithKeys)
@config_option(required=False)
@click.argument("arguments", metavar="[RUN_DIR]... [a.b=value]...", nargs=-1)
def command(config: Path | None, arguments: tuple[str, ...]) -> int:
    """Train several methods on several seeds, and tabulate which closed how much of the gap; or tabulate finished runs.

    `cord compare RUN_DIR...` compares finished runs; those that differ in their seed alone are put together.
    Keys, below, are set in a file or as overrides, such as train=CONFIG.yaml output_dir=runs/compare
    methods=[cord,sft,grpo] seeds=[0,1,2].

    Runs that are complete are kept, and a run that was stopped continues; a run that fails is named, and the others
    continue (exit status 2).
    """
    from megatron_cord.cli.actions.compare import compare

    return compare(config, arguments)
