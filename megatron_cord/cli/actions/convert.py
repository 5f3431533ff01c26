"""Convert between Hugging Face checkpoints and Megatron's distributed ones, on one rank or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import numpy as np
import torch
import yaml
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_cord.convert.hf.auxiliary_files import with_dtype
from megatron_cord.convert.hf.carried import Carried, files_beside, read_carried, write_beside
from megatron_cord.convert.hf.model_card import FILE_NAME as CARD
from megatron_cord.convert.hf.model_card import model_card, without_cards
from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.convert.hf.spelling import published_tensors
from megatron_cord.convert.hf.writer import HFDirectoryWriter, check_vacant, plan_shards
from megatron_cord.convert.inventory import Entry, common_dtype, fake_model, inventory
from megatron_cord.convert.loading import find_sources
from megatron_cord.convert.megatron.writer import save_weights
from megatron_cord.convert.peft.directory import write_adapter
from megatron_cord.convert.plain import comparison
from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.audio.features import stack_features
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.tokenizers import load_tokenizer
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.runtime.progress import Bars
from megatron_cord.runtime.quiet import no_progress_bars
from megatron_cord.trainer.checkpoint import progress as run_progress
from megatron_cord.trainer.checkpoint.adapters import holds_adapters
from megatron_cord.trainer.checkpoint.checkpoints import check_weights, load_weights
from megatron_cord.trainer.checkpoint.saved_adapter import open_saved, saved_adapter
from megatron_cord.trainer.checkpoint.storage import storage_problem
from megatron_cord.trainer.model_setup import build_saved

#: The folder of a converted checkpoint with configuration, tokenizer and processor.
_AUXILIARY_FILES = "huggingface"
_WEIGHTS_ONLY = run_progress.Progress(step=0, seconds=0.0, skipped_in_a_row=0, seed=0)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(action: Callable[..., int], **options: Any) -> int:
    """Run one of the three actions with its options; return the exit status. A caller's process group stays."""
    joined = torch.distributed.is_initialized()
    with no_progress_bars():
        status = action(**options)
    if joined:
        parallel_state.destroy_model_parallel()
    else:
        finalize()
    return status


def import_checkpoint(source: Path, target: Path, *, tp: int, pp: int, dtype: str, dry_run: bool) -> int:
    """Import the Hugging Face directory `source` into the checkpoint `target`."""
    console = Console()
    arch = load_architecture(source)
    arch.check_divisible(tp, pp, ep=_layout_of(arch, tp, pp).ep)
    layout = initialize(ParallelConfig() if dry_run else _layout_of(arch, tp, pp), seed=0)
    carried = read_carried(source, arch)
    if dry_run:
        model = fake_model(arch, layout)
        _print_inventory(inventory(model), carried, _dtype(dtype) or torch.bfloat16, console)
        if not any(checkpoint_directory(source).glob("*.safetensors")):
            console.print(f"{source} has no weights to compare with", highlight=False, soft_wrap=True)
            return 0
        find_sources(model, stored_tensors(source))
        console.print(f"{source}: the weights' headers fit", highlight=False, soft_wrap=True)
        return 0
    check_vacant(target)
    stored = [tensor for _, tensor in published_tensors(source, arch)]
    precision = _dtype(dtype) or common_dtype(stored)
    model = fake_model(arch, layout, precision)
    sources = find_sources(model, stored)
    auxiliary_files = with_dtype(files_beside(source, arch), precision)

    def complete(partial: Path) -> None:
        run_progress.write_progress(partial, _WEIGHTS_ONLY, arch)
        write_beside(partial / _AUXILIARY_FILES, auxiliary_files, carried)

    total = sum(parameter.nbytes for parameter in model.parameters())
    with _disk(target, "free some space and import again"), _progress(total, layout) as advance:
        save_weights(target, model, sources, complete, advance)
    _print(layout, console, f"{target}: {len(stored)} tensors in {_name(precision)}{carried.summary()}")
    return 0


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    tp: int,
    pp: int,
    dtype: str,
    dry_run: bool,
    max_shard_size: str,
    hf: Path | None,
    resume: str,
    adapter: bool,
) -> int:
    """Export the checkpoint `source` into the Hugging Face directory `target`; LoRA is merged into its base's weights.

    The ranks share the files; each reads from the checkpoint what its own are made of. With `adapter`, LoRA is written
    as a PEFT directory instead, by the first rank.
    """
    console = Console()
    auxiliary_dir = hf or _auxiliary_dir_of(source)
    arch = load_architecture(auxiliary_dir)
    arch.check_divisible(tp, pp, ep=_layout_of(arch, tp, pp).ep)
    layout = initialize(ParallelConfig(), seed=0)
    if not dry_run:
        check_vacant(target)
        check_weights(source, arch)
    model = fake_model(arch, layout)
    saved, carried = open_saved(source, model, auxiliary_dir), read_carried(auxiliary_dir, arch)
    if adapter:
        if layout.is_main:
            write_adapter(target, saved_adapter(source, saved), arch)
        torch.distributed.barrier()
        _print(layout, console, f"{target}: a PEFT adapter of {auxiliary_dir}")
        return 0
    precision = _dtype(dtype) or saved.common_dtype()
    shards = plan_shards(saved.shapes | carried.shapes, precision, _bytes(max_shard_size), carried.dtypes)
    if dry_run:
        _print_inventory(inventory(model), carried, precision, console)
        console.print(f"{len(shards)} files of at most {max_shard_size}", highlight=False)
        return 0
    mine = shards[layout.rank :: layout.world_size]
    writer = HFDirectoryWriter(target, shards, precision)
    total = sum(shard.nbytes(precision) for shard in mine)

    def read(name: str) -> Iterator[torch.Tensor]:
        return carried.blocks(name) if name in carried.tensors else saved.blocks(name)

    with (
        _disk(target, "free some space and export again; what is finished is kept"),
        _progress(total, layout) as advance,
    ):
        if layout.is_main:
            writer.begin(_fingerprint(source) + _files_of(carried), resume=resume == "auto")
        torch.distributed.barrier()
        kept = sum(all_gather_json(writer.write_files(read, mine, advance)))
        if layout.is_main:
            files = with_dtype(files_beside(auxiliary_dir, arch), precision)
            step = run_progress.read_progress(source, arch).step
            settings = _settings_of(source) if step else {}  # an import lies anywhere
            card = model_card(target.name, source, step, settings, files.get(CARD), _name(precision))
            writer.publish(without_cards(files) | {CARD: card})
    torch.distributed.barrier()
    there = f", {kept} of them finished earlier" if kept else ""
    tensors = f"{len(saved.shapes)} tensors in {_name(precision)}{carried.summary()}"
    _print(layout, console, f"{target}: {tensors}, {len(shards)} files{there}")
    return 0


def check_checkpoint(
    source: Path,
    target: Path,
    *,
    tp: int,
    pp: int,
    text: str,
    audio: Path | None,
    data: Path | None,
    tolerance: float,
) -> int:
    """Compare the logits of the Hugging Face directory `source` and of the checkpoint `target`."""
    console = Console()
    arch = load_architecture(source)
    arch.check_divisible(tp, pp, ep=_layout_of(arch, tp, pp).ep)
    if arch.language.experts is not None and tp > 1:
        raise CordError("--tp: the logits of a mixture of experts are compared with --tp 1; split it with --pp")
    layout = initialize(_layout_of(arch, tp, pp), seed=0)
    prompts = _prompts(source, text, audio, data) if arch.encoder is not None else [_text_prompt(source, text)]
    inputs = [_model_input(prompt, layout) for prompt in prompts]
    if holds_adapters(run_progress.read_progress(target)):
        model, _ = build_saved(target, ModelConfig(str(_auxiliary_dir_of(target)), dtype="float32"), layout)
    else:
        model = LALM(arch, layout, torch.float32)
        load_weights(target, model)
    reference = None
    if layout.rank == layout.world_size - 1:  # always on a last stage
        reference = comparison.load_reference(source)
    differences = comparison.compare(model, reference, inputs)
    largest = max(difference.largest for difference in differences)
    for each in differences:
        _print(
            layout, console,
            f"{each.name}: {each.tokens} tokens, largest difference {each.largest:.2e} "
            f"of logits up to {each.scale:.2f}, same first choice at {each.agreement:.1%}",
        )  # fmt: skip
    within = largest <= tolerance  # False for nan
    _print(
        layout,
        console,
        f"largest difference {largest:.2e}: {'within' if within else 'ABOVE'} the tolerance of {tolerance:g}",
    )
    return 0 if within else 1


def _layout_of(arch: Architecture, tp: int, pp: int) -> ParallelConfig:
    """Return the layout of a conversion; tensor-parallel ranks of a mixture share out its experts."""
    if arch.language.experts is None:
        return ParallelConfig(tp=tp, pp=pp)
    return ParallelConfig(tp=tp, pp=pp, ep=tp, sequence_parallel=tp > 1)


def _auxiliary_dir_of(checkpoint: Path) -> Path:
    """Return where configuration and tokenizer are: inside the checkpoint, or where its run started from."""
    if (checkpoint / _AUXILIARY_FILES).is_dir():
        return checkpoint / _AUXILIARY_FILES
    config = _config_of(checkpoint)
    try:
        return Path(yaml.safe_load(config.read_text())["model"]["checkpoint"])
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        raise CordError(
            f"{checkpoint} does not name the Hugging Face checkpoint it began as ({config} is missing or damaged); "
            "give that with --hf HF_DIR"
        ) from None


def _config_of(checkpoint: Path) -> Path:
    """Return where the run that saved a checkpoint keeps its configuration."""
    return checkpoint.parent.parent / "config.yaml"


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration of the run that saved a checkpoint; empty without a run."""
    try:
        settings = yaml.safe_load(_config_of(checkpoint).read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) and "model" in settings else {}


def _fingerprint(checkpoint: Path) -> list[list[Any]]:
    """Return what tells whether a checkpoint is still the one that an interrupted export read."""
    return _traits(path for path in checkpoint.rglob("*") if path.is_file())


def _files_of(carried: Carried) -> list[list[Any]]:
    """Return the same of the files that carried tensors are read from."""
    return _traits({tensor.path for tensor in carried.tensors.values()})


def _traits(files: Iterable[Path]) -> list[list[Any]]:
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)]


def _text_prompt(hf_dir: Path, text: str) -> Prompt:
    ids = load_tokenizer(hf_dir).encode(text)
    if not ids:
        raise CordError(f"{hf_dir}: its tokenizer makes nothing of {text!r}; give words of its vocabulary with --text")
    return Prompt(sample_id="text", token_ids=tuple(ids))


def _prompts(hf_dir: Path, text: str, audio: Path | None, data: Path | None) -> list[Prompt]:
    builder = PromptBuilder(hf_dir, long_audio="cut")
    if data is not None:
        source = ShardDataset(data)
        samples = [source[i] for i in range(min(2, len(source)))]
    else:
        clip = _voice() if audio is None else _read_recording(audio)
        samples = [Sample(id="check", question=text, waveform=clip)]
    prompts = []
    for sample in samples:
        for kind, prompt in (("text", builder.text_prompt(sample)), ("audio", builder.audio_prompt(sample))):
            prompts.append(Prompt(sample_id=f"{sample.id} as {kind}", token_ids=prompt.token_ids, clips=prompt.clips))
    return prompts


def _read_recording(path: Path) -> np.ndarray:
    try:
        return decode_audio(path.read_bytes(), str(path))
    except OSError as error:
        raise CordError(f"{path} cannot be read ({error.strerror}); give a recording, such as a WAV file") from None


def _voice() -> np.ndarray:
    """Return three quarters of a second like a voice: harmonics of a falling pitch, swelling four times a second."""
    time = np.arange(12000) / 16000
    phase = 2 * np.pi * (140 * time - 20 * time**2)
    tones = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * tones * (0.6 + 0.4 * np.sin(8 * np.pi * time))).astype(np.float32)


def _model_input(prompt: Prompt, layout: Layout) -> ModelInput:
    return ModelInput(
        token_ids=torch.tensor([prompt.token_ids], device=layout.device),
        features=stack_features([clip.features for clip in prompt.clips]).to(layout.device) if prompt.clips else None,
        num_frames=tuple(clip.num_frames for clip in prompt.clips) if prompt.clips else None,
        sample_ids=(prompt.sample_id,),
    )


def _print_inventory(entries: list[Entry], carried: Carried, dtype: torch.dtype, console: Console) -> None:
    """Print one line a tensor, tab-separated, and totals: plain text, which other programs can search and cut.

    Carried tensors follow the model's, in their own precisions; they have no place in Megatron's model.
    """
    # The console would make spaces of the tabs.
    print("name\tshape\tbytes\tmegatron\tlayout", file=console.file)
    parts: dict[str, int] = {}
    for entry in entries:
        shape = "x".join(map(str, entry.shape))
        line = f"{entry.name}\t{shape}\t{entry.elements * dtype.itemsize}\t{entry.megatron}\t{entry.layout}"
        print(line, file=console.file)
        part = entry.megatron.split(".")[0]
        parts[part] = parts.get(part, 0) + entry.elements
    for name, tensor in carried.tensors.items():
        shape = "x".join(map(str, tensor.shape))
        print(f"{name}\t{shape}\t{tensor.nbytes}\t-\tCarried", file=console.file)
    for part, count in {**parts, "total": sum(parts.values())}.items():
        console.print(
            f"{part}: {count:,} parameters, {count * dtype.itemsize / 1e9:.3f} GB in {_name(dtype)}", highlight=False
        )
    for part, (_, count) in carried.counts().items():
        console.print(f"{part.rstrip('.')}, carried: {count:,} parameters", highlight=False)
    console.print(f"{len(entries)} tensors{carried.summary()}", highlight=False)


@contextmanager
def _progress(total: int, layout: Layout) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of bytes; what it yields is called with each portion."""
    columns = (TextColumn("tensors"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, enabled=layout.is_main) as bar:
        task = bar.add_task("", total=total)
        yield lambda portion: bar.advance(task, portion)


@contextmanager
def _disk(path: Path, advice: str) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one line."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        reason = None if isinstance(error, CordError) else storage_problem(error)
        if reason is None:
            raise
        raise CordError(f"{path} could not be written ({reason}); {advice}") from error


def _print(layout: Layout, console: Console, text: str) -> None:
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
