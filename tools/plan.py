"""Says before a run starts whether it fits and about how fast it will be.

    python tools/plan.py --config CONFIG.yaml --gpus 8 [--gpu h100] [--rollout-gpus 0] [--model NAME] [--json] [a.b=value …]

The model is that of model.checkpoint, or a published one by name. Exit status 1 if it does not fit.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families import load_architecture
from megatron_cord.plan import GPUS, PUBLISHED, fitting, make_work, memory, part_counts, published, speed
from megatron_cord.plan.page import layouts_table
from megatron_cord.plan.report import Report
from megatron_cord.runtime import entry
from megatron_cord.trainer.config import RunConfig


def parse() -> Namespace:
    """The command line."""
    parser = entry.Parser(
        description="Says before a run starts whether it fits and about how fast it will be.", allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="YAML configuration of the run")
    parser.add_argument("--gpus", type=int, default=8, help="that train (default: 8)")
    parser.add_argument(
        "--rollout-gpus", type=int, default=0, help="that run rollout servers (default: 0, the trainer's own)"
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="which (default: h100)")
    parser.add_argument(
        "--model", choices=sorted(PUBLISHED), help="a published model, if its checkpoint is not at hand"
    )
    parser.add_argument("--audio-seconds", type=float, default=10.0, help="of a question (default: 10)")
    parser.add_argument("--text-tokens", type=int, default=60, help="of a question's text (default: 60)")
    parser.add_argument("--layouts", action="store_true", help="a Markdown table of common layouts instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="sets one value of the configuration")
    return parser.parse_intermixed_args()


def main() -> int:
    """Entry point."""
    arguments = parse()
    if arguments.gpus < 1 or arguments.rollout_gpus < 0:
        raise CordError("--gpus must be at least 1 and --rollout-gpus cannot be negative")
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    arch: Architecture = published(arguments.model) if arguments.model else load_architecture(config.model.checkpoint)
    gpu, lengths = GPUS[arguments.gpu], {"audio_seconds": arguments.audio_seconds, "text_tokens": arguments.text_tokens}
    if arguments.layouts:
        print(layouts_table(config, arch, gpu, lengths))
        return 0
    work = make_work(config, arch, arguments.gpus, **lengths)
    report = Report(
        gpu=gpu,
        gpus=arguments.gpus,
        parameters=part_counts(arch),
        work=work,
        memory=memory(config, arch, work, local_engine=not arguments.rollout_gpus),
        speed=speed(config, arch, work, gpu, arguments.gpus, arguments.rollout_gpus),
    )
    suggestion = None if report.fits else fitting(config, arch, gpu, arguments.gpus, arguments.rollout_gpus, **lengths)
    if arguments.json:
        print(json.dumps(report.to_json() | {"suggestion": suggestion}, indent=1))
    else:
        _print(report, suggestion)
    return 0 if report.fits else 1


def _print(report: Report, suggestion: list[str] | None) -> None:
    console = Console()
    table = Table("what", "GB a GPU", title=f"{report.gpus} × {report.gpu.name}, fullest stage: {report.memory.stage}")
    table.columns[1].justify = "right"
    for name, value in report.memory.parts().items():
        table.add_row(name.replace("_", " "), f"{value / 1e9:.1f}")
    table.add_row("sum", f"{report.memory.total / 1e9:.1f}")
    console.print(table)
    counts = report.parameters
    console.print(
        f"parameters: {counts.total:,} (audio encoder {counts.audio_encoder:,}, adapter {counts.adapter:,}, "
        f"language model {counts.language_model:,})\n{report.speed_text()}",
        highlight=False,
    )
    verdict = f"{'fits' if report.fits else 'does not fit'}: {report.memory.total / 1e9:.1f} of {report.gpu.memory / 1e9:.0f} GB"
    if not report.fits:
        advice = "no layout of these GPUs was found that does; use more or larger ones, or rollout servers of their own"
        verdict += f"; {advice if suggestion is None else 'set ' + ' '.join(suggestion)}"
    console.print(verdict, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    entry.run(main)
