"""``cord shards``: recordings into shards, and directories of shards checked and described."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import DIRECTORY, spread_values
from megatron_cord.errors import CordError


class ShardsGroup(click.Group):
    """Makes shards itself, and has commands for those that are there; some of its options take several values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat an option before each of its values, as click reads several."""
        return super().parse_args(ctx, spread_values(args, ("--fields", "--ignore-fields")))


@click.group(cls=ShardsGroup, invoke_without_command=True, no_args_is_help=True, subcommand_metavar="[COMMAND DIR]")
@click.option(
    "--from",
    "source",
    metavar="SOURCE",
    help="Recordings: rows (.jsonl, .parquet, a data set saved by `datasets`), hf://OWNER/NAME[@REVISION], lhotse's "
    "cuts, or tars.",
)
@click.option("--output", metavar="DIR", type=DIRECTORY, help="Directory of the shards; created when missing.")
@click.option("--split", metavar="NAME", help="Of a set on the hub that has several.")
@click.option("--subset", metavar="NAME", help="Of a set on the hub that has several.")
@click.option(
    "--fields",
    metavar="OURS=THEIRS...",
    multiple=True,
    help="Other names of fields: question=sentence voice=speaker_id.",
)
@click.option(
    "--ignore-fields",
    metavar="NAME...",
    multiple=True,
    help="Fields to leave aside; others that nothing uses are refused.",
)
@click.option("--language", metavar="CODE", help="Of transcripts whose rows state none; others are left out.")
@click.option("--shard-size", metavar="K", type=int, default=256, show_default=True, help="Rows a shard.")
@click.option("--max-seconds", type=float, default=30.0, show_default=True, help="Longer recordings are left out.")
@click.option(
    "--min-loudness",
    metavar="DB",
    type=float,
    default=-60.0,
    show_default=True,
    help="Quieter recordings are left out.",
)
@click.option(
    "--max-rejects",
    metavar="SHARE",
    type=float,
    default=0.2,
    show_default=True,
    help="Largest share of rows left out.",
)
@click.option("--asr-url", help="An endpoint that transcribes every recording for a check.")
@click.option("--asr-model", default="whisper-1", show_default=True, help="Model name for the endpoint.")
@click.option("--max-word-error-rate", type=float, default=0.2, show_default=True, help="Of that check.")
@click.option("--workers", metavar="N", type=int, default=1, show_default=True, help="Processes.")
@click.option(
    "--plan",
    "planned",
    metavar="N",
    type=int,
    help="Make nothing that stays: try N of the rows, and print what all of them would take.",
)
@click.pass_context
def command(
    ctx: click.Context,
    source: str | None,
    output: Path | None,
    split: str | None,
    subset: str | None,
    fields: tuple[str, ...],
    ignore_fields: tuple[str, ...],
    language: str | None,
    shard_size: int,
    max_seconds: float,
    min_loudness: float,
    max_rejects: float,
    asr_url: str | None,
    asr_model: str,
    max_word_error_rate: float,
    workers: int,
    planned: int | None,
) -> None:
    """Make shards of recordings with transcripts, and check and describe shards.

    Shards are webdataset tar files with {id}.wav and {id}.json. `cord shards --from SOURCE --output DIR` makes them
    from recordings, `cord synthesize` from written questions.
    """
    if ctx.invoked_subcommand is not None:
        if source is not None:
            raise CordError(f"--from makes shards; call cord shards {ctx.invoked_subcommand} DIR without it")
        return
    if source is None:
        raise CordError("--from SOURCE is needed, with the recordings; see cord shards --help")
    from megatron_cord.cli.actions.recordings import make_shards
    from megatron_cord.speech.recordings.config import RecordingSetConfig, recording_quality

    config = RecordingSetConfig(
        source,
        split=split,
        subset=subset,
        fields=_named(fields),
        ignore_fields=ignore_fields,
        language=language,
        shard_size=shard_size,
        max_rejects=max_rejects,
        quality=recording_quality(
            max_seconds=max_seconds,
            min_loudness=min_loudness,
            asr_url=asr_url,
            asr_model=asr_model,
            max_word_error_rate=max_word_error_rate,
        ),
    )
    make_shards(config, output, workers=workers, planned=planned)


def _named(pairs: tuple[str, ...]) -> dict[str, str]:
    """Return the pairs OURS=THEIRS.

    Raises:
        CordError: one of them is none, or names a field twice.
    """
    named: dict[str, str] = {}
    for pair in pairs:
        ours, sign, theirs = pair.partition("=")
        if not sign or not theirs or ours in named:
            raise CordError(f"--fields {pair}: write each field once, as OURS=THEIRS, such as question=sentence")
        named[ours] = theirs
    return named


@command.command
@click.argument("paths", metavar="DIR...", nargs=-1, required=True)
@click.option("--digests/--no-digests", default=True, show_default=True, help="Compare SHA-256 with the manifest's.")
def check(paths: tuple[str, ...], digests: bool) -> int:
    """Read every sample of sets, print what cannot be used, and exit with status 1 if there is any.

    DIR is a directory of shards, a pattern, or the address of a directory, whose shards are copied to the cache for it.
    """
    from megatron_cord.cli.actions.shards import check_shards

    return max([check_shards(path, digests=digests) for path in paths])


@command.command
@click.argument("paths", metavar="DIR...", nargs=-1, required=True)
def info(paths: tuple[str, ...]) -> int:
    """Describe sets: samples, hours, voices, lengths and how they were made; an address by its manifest alone."""
    from megatron_cord.cli.actions.shards import describe_shards

    for path in paths:
        describe_shards(path, titled=len(paths) > 1)
    return 0
