"""Converts between Hugging Face checkpoints and Megatron's distributed ones.

    python tools/convert_hf.py import HF_DIR CHECKPOINT_DIR     weights into a checkpoint that any layout loads
    python tools/convert_hf.py export CHECKPOINT_DIR HF_DIR     and back into a complete Hugging Face directory
    python tools/convert_hf.py check HF_DIR CHECKPOINT_DIR      logits of both models on text and audio

One process, or several ranks: python -m megatron_cord.launch --nproc-per-node 2 tools/convert_hf.py import --tp 2 …
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under a launcher, too, the project need not be installed

from megatron_cord.convert import comparison
from megatron_cord.convert.auxiliary_files import read_auxiliary_files, with_dtype
from megatron_cord.convert.hf_reader import stored_tensors
from megatron_cord.convert.hf_writer import HFDirectoryWriter, check_vacant, plan_shards
from megatron_cord.convert.inventory import Entry, common_dtype, fake_model, inventory
from megatron_cord.convert.loading import find_sources
from megatron_cord.convert.megatron_reader import SavedWeights
from megatron_cord.convert.megatron_writer import save_weights
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.data.shards import ShardDataset
from megatron_cord.data.tokenizers import load_tokenizer
from megatron_cord.data.wav import decode_wav
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.runtime.quiet import no_progress_bars
from megatron_cord.trainer.checkpoint import progress as run_progress
from megatron_cord.trainer.checkpoint.checkpoints import check_weights, load_weights
from megatron_cord.trainer.checkpoint.storage import storage_problem

#: where a converted checkpoint keeps configuration, tokenizer and processor
_AUXILIARY_FILES = "huggingface"
_WEIGHTS_ONLY = run_progress.Progress(step=0, seconds=0.0, skipped_in_a_row=0, seed=0)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def import_checkpoint(arguments: Namespace, console: Console) -> int:
    """HF_DIR to CHECKPOINT_DIR."""
    hf_dir, target = arguments.source, arguments.target
    arch = load_architecture(hf_dir)
    layout = _layout(arguments, arch)
    if arguments.dry_run:
        model = fake_model(arch, layout)
        _print_inventory(inventory(model), _dtype(arguments.dtype) or torch.bfloat16, console)
        if not any(hf_dir.glob("*.safetensors")):
            console.print(f"{hf_dir} has no weights to compare with")
            return 0
        find_sources(model, stored_tensors(hf_dir))
        console.print(f"{hf_dir}: the weights' headers fit", highlight=False, soft_wrap=True)
        return 0
    check_vacant(target)
    stored = stored_tensors(hf_dir)
    dtype = _dtype(arguments.dtype) or common_dtype(stored)
    model = fake_model(arch, layout, dtype)
    sources = find_sources(model, stored)
    auxiliary_files = with_dtype(read_auxiliary_files(hf_dir), dtype)

    def complete(partial: Path) -> None:
        run_progress.write_progress(partial, _WEIGHTS_ONLY, arch)
        (partial / _AUXILIARY_FILES).mkdir()
        for name, content in auxiliary_files.items():
            (partial / _AUXILIARY_FILES / name).write_bytes(content)

    total = sum(parameter.nbytes for parameter in model.parameters())
    with _disk(target, "free some space and import again"), _progress(total, layout, console) as advance:
        save_weights(target, model, sources, complete, advance)
    _say(layout, console, f"{target}: {len(stored)} tensors in {_name(dtype)}")
    return 0


def export_checkpoint(arguments: Namespace, console: Console) -> int:
    """CHECKPOINT_DIR to HF_DIR. The ranks share the files; each reads from the checkpoint what its own are made of."""
    checkpoint, target = arguments.source, arguments.target
    auxiliary_dir = arguments.hf or _auxiliary_dir_of(checkpoint)
    arch = load_architecture(auxiliary_dir)
    arch.check_divisible(arguments.tp, arguments.pp)
    layout = initialize(ParallelConfig(), seed=0)
    if not arguments.dry_run:
        check_vacant(target)
        check_weights(checkpoint, arch)
    model = fake_model(arch, layout)
    saved = SavedWeights(checkpoint, model)
    dtype = _dtype(arguments.dtype) or saved.common_dtype()
    shards = plan_shards(saved.shapes, dtype, _bytes(arguments.max_shard_size))
    if arguments.dry_run:
        _print_inventory(inventory(model), dtype, console)
        console.print(f"{len(shards)} files of at most {arguments.max_shard_size}", highlight=False)
        return 0
    mine = shards[layout.rank :: layout.world_size]
    writer = HFDirectoryWriter(target, shards, dtype)
    total = sum(shard.nbytes(dtype) for shard in mine)
    with (
        _disk(target, "free some space and export again; what is finished is kept"),
        _progress(total, layout, console) as advance,
    ):
        if layout.is_main:
            writer.begin(_fingerprint(checkpoint), resume=arguments.resume == "auto")
        torch.distributed.barrier()
        kept = sum(all_gather_json(writer.write_files(saved.blocks, mine, advance)))
        if layout.is_main:
            writer.publish(with_dtype(read_auxiliary_files(auxiliary_dir), dtype))
    torch.distributed.barrier()
    there = f", {kept} of them finished earlier" if kept else ""
    _say(layout, console, f"{target}: {len(saved.shapes)} tensors in {_name(dtype)}, {len(shards)} files{there}")
    return 0


def check_checkpoint(arguments: Namespace, console: Console) -> int:
    """Logits of HF_DIR and of CHECKPOINT_DIR."""
    hf_dir, checkpoint = arguments.source, arguments.target
    arch = load_architecture(hf_dir)
    layout = _layout(arguments, arch)
    inputs = [
        _model_input(prompt, layout) for prompt in _prompts(arguments, hf_dir, has_audio=arch.encoder is not None)
    ]
    model = LALM(arch, layout, torch.float32)
    load_weights(checkpoint, model)
    reference = None
    if layout.rank == layout.world_size - 1:  # always on a last stage
        reference = comparison.load_reference(hf_dir)
    differences = comparison.compare(model, reference, inputs)
    largest = max(difference.largest for difference in differences)
    for each in differences:
        _say(
            layout, console,
            f"{each.name}: {each.tokens} tokens, largest difference {each.largest:.2e} of logits up to {each.scale:.2f}, "
            f"same first choice at {each.agreement:.1%}",
        )  # fmt: skip
    within = largest <= arguments.tolerance  # False for nan
    _say(
        layout,
        console,
        f"largest difference {largest:.2e}: {'within' if within else 'ABOVE'} the tolerance of {arguments.tolerance:g}",
    )
    return 0 if within else 1


COMMANDS = {"import": import_checkpoint, "export": export_checkpoint, "check": check_checkpoint}


def _layout(arguments: Namespace, arch: Any) -> Layout:
    arch.check_divisible(arguments.tp, arguments.pp)
    return initialize(
        ParallelConfig() if arguments.dry_run else ParallelConfig(tp=arguments.tp, pp=arguments.pp), seed=0
    )


def _auxiliary_dir_of(checkpoint: Path) -> Path:
    """Where a checkpoint's configuration and tokenizer are: inside it, or in the checkpoint that its run started from."""
    if (checkpoint / _AUXILIARY_FILES).is_dir():
        return checkpoint / _AUXILIARY_FILES
    config = checkpoint.parent.parent / "config.yaml"
    try:
        return Path(yaml.safe_load(config.read_text())["model"]["checkpoint"])
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        raise CordError(
            f"{checkpoint} does not say which Hugging Face checkpoint it began as ({config} is missing or damaged); give that with --hf HF_DIR"
        ) from None


def _fingerprint(checkpoint: Path) -> list[list[Any]]:
    """Tells whether a checkpoint is still the one that an interrupted export read."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _prompts(arguments: Namespace, hf_dir: Path, *, has_audio: bool) -> list[Prompt]:
    if not has_audio:
        ids = load_tokenizer(hf_dir).encode(arguments.text)
        if not ids:
            raise CordError(
                f"{hf_dir}: its tokenizer makes nothing of {arguments.text!r}; give words that it knows with --text"
            )
        return [Prompt(sample_id="text", token_ids=tuple(ids))]
    builder = PromptBuilder(hf_dir, long_audio="cut")
    if arguments.data is not None:
        source = ShardDataset(arguments.data)
        samples = [source[i] for i in range(min(2, len(source)))]
    else:
        clip = _voice() if arguments.audio is None else _read_wav(arguments.audio)
        samples = [Sample(id="check", question=arguments.text, waveform=clip)]
    prompts = []
    for sample in samples:
        for kind, prompt in (("text", builder.text_prompt(sample)), ("audio", builder.audio_prompt(sample))):
            prompts.append(Prompt(sample_id=f"{sample.id} as {kind}", token_ids=prompt.token_ids, clips=prompt.clips))
    return prompts


def _read_wav(path: Path) -> np.ndarray:
    try:
        return decode_wav(path.read_bytes(), str(path))
    except OSError as error:
        raise CordError(
            f"{path} cannot be read ({error.strerror}); give a WAV file of 16 kHz, 16 bits, one channel"
        ) from None


def _voice() -> np.ndarray:
    """Three quarters of a second like a voice: harmonics of a falling pitch, swelling four times a second."""
    time = np.arange(12000) / 16000
    phase = 2 * np.pi * (140 * time - 20 * time**2)
    tones = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * tones * (0.6 + 0.4 * np.sin(8 * np.pi * time))).astype(np.float32)


def _model_input(prompt: Prompt, layout: Layout) -> ModelInput:
    return ModelInput(
        token_ids=torch.tensor([prompt.token_ids], device=layout.device),
        features=torch.stack([clip.features for clip in prompt.clips]).to(layout.device) if prompt.clips else None,
        num_frames=torch.tensor([clip.num_frames for clip in prompt.clips], device=layout.device)
        if prompt.clips
        else None,
        sample_ids=(prompt.sample_id,),
    )


def _print_inventory(entries: list[Entry], dtype: torch.dtype, console: Console) -> None:
    """One line a tensor, tab-separated, and totals; plain text, so that it can be searched and cut."""
    # The console would make spaces of the tabs.
    print("name\tshape\tbytes\tmegatron\tlayout", file=console.file)
    parts: dict[str, int] = {}
    for entry in entries:
        shape = "x".join(map(str, entry.shape))
        line = f"{entry.name}\t{shape}\t{entry.elements * dtype.itemsize}\t{entry.megatron}\t{entry.layout}"
        print(line, file=console.file)
        part = entry.megatron.split(".")[0]
        parts[part] = parts.get(part, 0) + entry.elements
    for part, count in {**parts, "total": sum(parts.values())}.items():
        console.print(
            f"{part}: {count:,} parameters, {count * dtype.itemsize / 1e9:.3f} GB in {_name(dtype)}", highlight=False
        )
    console.print(f"{len(entries)} tensors", highlight=False)


@contextmanager
def _progress(total: int, layout: Layout, console: Console) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes; what it gives is called with each portion."""
    columns = (TextColumn("tensors"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not layout.is_main) as bar:
        task = bar.add_task("", total=total)
        yield lambda portion: bar.advance(task, portion)


@contextmanager
def _disk(path: Path, advice: str) -> Iterator[None]:
    """A full or read-only disk is one line."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        reason = None if isinstance(error, CordError) else storage_problem(error)
        if reason is None:
            raise
        raise CordError(f"{path} could not be written ({reason}); {advice}") from error


def _say(layout: Layout, console: Console, text: str) -> None:
    if layout.is_main:
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.isdecimal() or int(number) < 1:
        raise CordError(f"--max-shard-size {text} is no size; write it as 5GB, 500MB or 200KB")
    return int(number) * _UNITS[unit]


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """The command line, or what is given in its place. Raises CordError for what it does not know."""
    parser = Parser(
        description="Converts between Hugging Face checkpoints and Megatron's distributed ones.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|check")
    for name, source, target, help_text in (
        ("import", "HF_DIR", "CHECKPOINT_DIR", "weights into a checkpoint that any layout loads"),
        ("export", "CHECKPOINT_DIR", "HF_DIR", "a checkpoint into a complete Hugging Face directory"),
        ("check", "HF_DIR", "CHECKPOINT_DIR", "compare the logits of both; exit status 1 above the tolerance"),
    ):
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        command.add_argument("source", metavar=source, type=Path)
        command.add_argument("target", metavar=target, type=Path)
        command.add_argument("--tp", type=int, default=1, help="tensor parallel size")
        command.add_argument("--pp", type=int, default=1, help="pipeline parallel size")
        if name == "check":
            command.set_defaults(dry_run=False)
            command.add_argument("--text", default="What is the capital of France?", help="what is asked in writing")
            command.add_argument(
                "--audio", metavar="FILE", type=Path, help="a WAV file of 16 kHz; else a tone like a voice"
            )
            command.add_argument(
                "--data", metavar="DIR", type=Path, help="shards: their first two samples, read and heard, instead"
            )
            command.add_argument(
                "--tolerance", type=float, default=1e-3, help="largest absolute difference of two logits in float32"
            )
            continue
        dtypes = ("auto", "float32", "bfloat16", "float16")
        command.add_argument(
            "--dtype", choices=dtypes, default="auto", help="precision of the result; auto: the source's"
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print names, shapes, sizes and totals; read no weights, write nothing",
        )
        if name == "export":
            command.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of one file")
            command.add_argument(
                "--hf", metavar="HF_DIR", type=Path, help="where configuration, tokenizer and processor come from"
            )
            command.add_argument(
                "--resume", choices=("auto", "never"), default="auto", help="keep what an interrupted export finished"
            )
    return parser.parse_args(arguments)


def main() -> int:
    """Entry point."""
    arguments = parse()
    with no_progress_bars():
        status = COMMANDS[arguments.command](arguments, Console())
    finalize()
    return status


if __name__ == "__main__":
    run(main)
