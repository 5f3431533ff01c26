"""Warm up: `python -m megatron_cord.launch --nproc-per-node 2 -m megatron_cord.warmup --config FILE [a.b=value …]`.

torchrun starts it too, and one rank needs neither. All ranks are data parallel: the language model, for whose sake
others split a model, is frozen, and only the last stage loads it.
"""

from __future__ import annotations

from rich.console import Console

from megatron_cord.config.loading import load_config
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.runtime import entry
from megatron_cord.runtime.quiet import no_progress_bars
from megatron_cord.runtime.stop_request import StopRequest
from megatron_cord.warmup.config import WarmupConfig
from megatron_cord.warmup.warmup import SUMMARY, warm_up


def run(config: WarmupConfig) -> int:
    """Warm up on this rank together with the others; return the exit status."""
    layout = initialize(ParallelConfig(timeout_minutes=config.timeout_minutes), config.seed)
    with no_progress_bars(), StopRequest("the update is finished and saved") as request:
        summary = warm_up(config, layout, lambda: bool(request))
    if layout.is_main:
        rates = ", ".join(f"{name} {rate:.3f}" for name, rate in summary["token_errors"].items())
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(f"token error on what is held out: {rates}")
        if summary["divergences"]:
            nats = ", ".join(f"{name} {value:.3f}" for name, value in summary["divergences"].items())
            console.print(f"divergence from reading, nats a token: {nats}")
        console.print(f"{summary['model']} is the warmed-up checkpoint; figures: {config.output_dir}/{SUMMARY}")
    finalize()
    return 0


def main() -> int:
    """Entry point."""
    arguments = entry.parse_args(__doc__.splitlines()[0])
    return run(load_config(WarmupConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    entry.run(main)
