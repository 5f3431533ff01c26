"""``cord warmup``: the adapter of a grafted checkpoint, on one rank or on several of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import config_option, launch_ranks, overrides_argument, ranks_option


class _WithKeys(click.Command):
    """A command whose help lists the keys of its configuration."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each key with its default and its meaning."""
        from megatron_cord.config.reference import sections
        from megatron_cord.warmup.config import WarmupConfig

        with formatter.section("Keys"):
            rows = [(f"{k.name} = {k.default}", k.meaning) for s in sections(WarmupConfig) for k in s.keys]
            formatter.write_dl(rows)


@click.command(cls=_WithKeys)
@config_option(required=True)
@ranks_option
@overrides_argument
def command(config: Path, nproc_per_node: int | None, overrides: tuple[str, ...]) -> int:
    """Warm up the adapter of a speech model from recordings and their transcripts.

    A recognizer learns to read the tokens of the transcripts in the encoder's states (CTC), and with
    ctc.encoder_learning_rate the encoder learns, too; then the adapter is regressed onto the embeddings that the
    recognizer expects. With distillation.steps the frozen language model, which
    reads the transcripts, then teaches the adapter to repeat them; without, it is neither loaded nor run.
    OUTPUT_DIR/model is the warmed-up checkpoint, for model.checkpoint. Ctrl-C and SIGTERM stop after the current update
    (exit status 75), and the same command continues.
    """
    if nproc_per_node is not None:
        return launch_ranks(nproc_per_node, "megatron_cord.warmup", config, overrides)
    from megatron_cord.config.loading import load_config
    from megatron_cord.warmup.__main__ import run
    from megatron_cord.warmup.config import WarmupConfig

    return run(load_config(WarmupConfig, config, overrides))
