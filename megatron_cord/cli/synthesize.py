"""``cord synthesize``: written questions into spoken shards."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from megatron_cord.cli.options import DIRECTORY, spread_values


class SeveralValues(click.Command):
    """A command whose options ``--voices`` and ``--ignore-fields`` take all values that follow them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each value, as click reads several."""
        return super().parse_args(ctx, spread_values(args, ("--voices", "--ignore-fields")))


@click.command(cls=SeveralValues)
@click.option(
    "--questions",
    metavar="FILE",
    required=True,
    help="Questions: .jsonl, .parquet, a directory of .parquet files, or a data set saved by `datasets`.",
)
@click.option("--output", metavar="DIR", type=DIRECTORY, help="Directory of the shards; created when missing.")
@click.option("--seed", metavar="S", type=int, default=0, show_default=True, help="Of voices and speeds.")
@click.option("--shard-size", metavar="K", type=int, default=256, show_default=True, help="Questions a shard.")
@click.option(
    "--question-field", metavar="NAME", default="question", show_default=True, help="The field with the question."
)
@click.option(
    "--answer-field", metavar="NAME", default="answer", show_default=True, help="The field with the gold answer."
)
@click.option(
    "--ignore-fields",
    metavar="NAME...",
    multiple=True,
    help="Fields to leave aside; others that nothing uses are refused.",
)
@click.option(
    "--backend",
    type=click.Choice(("espeak", "piper", "kokoro", "openai")),
    default="espeak",
    show_default=True,
    help="The synthesizer.",
)
@click.option(
    "--voices",
    metavar="NAME...",
    multiple=True,
    help="Names as the backend has them; for Piper, .onnx files, also as FILE.onnx+pitch=1.1.",
)
@click.option("--model-dir", metavar="DIR", help="Kokoro's model (.onnx) and voices (.bin).")
@click.option("--url", help="The speech endpoint, up to /v1 (backend openai).")
@click.option("--model", default="kokoro", show_default=True, help="Model name for the endpoint.")
@click.option(
    "--speeds",
    metavar="SLOWEST FASTEST",
    type=float,
    nargs=2,
    default=(1.0, 1.0),
    show_default=True,
    help="1 is a voice's normal speed.",
)
@click.option(
    "--noise",
    metavar="SHARE",
    type=float,
    default=0.0,
    show_default=True,
    help="Share of the recordings that get pink noise.",
)
@click.option(
    "--noise-snr",
    metavar="LEAST MOST",
    type=float,
    nargs=2,
    default=(10.0, 20.0),
    show_default=True,
    help="Power of the speech over that of the noise, dB.",
)
@click.option("--max-seconds", type=float, default=30.0, show_default=True, help="Longer recordings are left out.")
@click.option(
    "--max-rejects",
    metavar="SHARE",
    type=float,
    default=0.2,
    show_default=True,
    help="Largest share of questions left out.",
)
@click.option(
    "--min-loudness",
    metavar="DB",
    type=float,
    default=-35.0,
    show_default=True,
    help="Quieter recordings are left out.",
)
@click.option("--asr-url", help="An endpoint that transcribes every recording for a check.")
@click.option("--max-word-error-rate", type=float, default=0.2, show_default=True, help="Of that check.")
@click.option("--workers", metavar="N", type=int, default=1, show_default=True, help="Processes.")
@click.option(
    "--plan",
    "planned",
    metavar="N",
    type=int,
    help="Make nothing: speak N of the questions, and print what all of them would take.",
)
def command(
    questions: str,
    output: Path | None,
    seed: int,
    shard_size: int,
    question_field: str,
    answer_field: str,
    ignore_fields: tuple[str, ...],
    backend: Literal["espeak", "piper", "kokoro", "openai"],
    voices: tuple[str, ...],
    model_dir: str | None,
    url: str | None,
    model: str,
    speeds: tuple[float, float],
    noise: float,
    noise_snr: tuple[float, float],
    max_seconds: float,
    max_rejects: float,
    min_loudness: float,
    asr_url: str | None,
    max_word_error_rate: float,
    workers: int,
    planned: int | None,
) -> None:
    """Speak written questions and write them as webdataset shards (16 kHz)."""
    from megatron_cord.cli.actions.synthesize import synthesize
    from megatron_cord.speech.quality import QualityConfig
    from megatron_cord.speech.spoken_set import SpokenSetConfig
    from megatron_cord.speech.synthesizers.config import SynthesizerConfig

    config = SpokenSetConfig(
        questions,
        question_field=question_field,
        answer_field=answer_field,
        ignore_fields=ignore_fields,
        seed=seed,
        shard_size=shard_size,
        slowest=speeds[0],
        fastest=speeds[1],
        noise=noise,
        noise_snr=noise_snr,
        max_rejects=max_rejects,
        synthesizer=SynthesizerConfig(backend, voices, model_dir, url, model),
        quality=QualityConfig(
            max_seconds=max_seconds,
            min_loudness=min_loudness,
            asr_url=asr_url,
            max_word_error_rate=max_word_error_rate,
        ),
    )
    synthesize(config, output, workers=workers, planned=planned)
