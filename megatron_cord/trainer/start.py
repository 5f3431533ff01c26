"""Where a run begins: with the newest checkpoint in its own directory, else as `resume` and `init_from` say.

So the same command continues a run at every restart, also one that began with another run's weights. What belongs to
another run is read and never changed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cord.convert.peft.directory import is_adapter
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.config import PARTS
from megatron_cord.trainer.checkpoint.adapters import check_lora
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.checkpoint.directory import CheckpointDirectory, check_whole
from megatron_cord.trainer.checkpoint.manifest import NAME as MANIFEST
from megatron_cord.trainer.checkpoint.progress import STATE, Progress, read_progress
from megatron_cord.trainer.config import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        progress: how far the run is.
        checkpoint: what training goes on from; None for a new run.
        weights: what a new run takes its weights from in place of `model.checkpoint`: a checkpoint or a Hugging Face
            directory.
        forked: training goes on from another run's checkpoint.
    """

    progress: Progress
    checkpoint: Path | None = None
    weights: Path | None = None
    forked: bool = False

    @property
    def begins(self) -> bool:
        """Whether the run begins in its directory now."""
        return self.checkpoint is None or self.forked


def find_start(config: RunConfig, checkpoints: Checkpoints) -> Start:
    """Return where the run begins. Collective.

    Raises:
        CordError: the checkpoint that is named is not there, not whole, or of another kind of run; or output_dir holds
            a run that the configuration does not continue.
    """
    try:
        checkpoint_directory(config.model.checkpoint)  # at once, before anything is built from it
    except CordError as error:
        raise CordError(f"model.checkpoint: {error}") from None
    newest = checkpoints.newest()
    if newest is not None and config.resume == "never":
        raise CordError(
            f"{newest} exists and resume=never was given; choose another output_dir, or resume=auto to continue that "
            "run"
        )
    own = checkpoints.newest_undamaged()
    if own is not None:
        return _go_on(config, own)
    if config.resume not in ("auto", "never"):
        other = _find_checkpoint(Path(config.resume), f"resume={config.resume}", needs_optimizer=True)
        progress = _check(config, other, read_progress(other))
        logger.info("continuing the run of %s in %s, which holds no checkpoint yet", other, config.output_dir)
        made_with = replace(progress.made_with, begun=progress.step)
        return Start(replace(progress, made_with=made_with, spent=0.0), checkpoint=other, forked=True)
    return _begin(config)


def _go_on(config: RunConfig, own: Path) -> Start:
    progress = _check(config, own, read_progress(own))
    began = progress.made_with.settings["init_from"]
    if config.init_from is not None and config.init_from != began:
        raise CordError(
            f"{own} belongs to a run that began with init_from={began or 'null'}, not {config.init_from}; choose "
            "another output_dir for a new run"
        )
    if config.resume not in ("auto", "never") and Path(config.resume).resolve() != own.resolve():
        logger.info(
            "resume=%s counts only where output_dir holds no checkpoint: %s goes on (to go back, choose another "
            "output_dir)",
            config.resume,
            own,
        )
    return Start(progress, checkpoint=own)


def _begin(config: RunConfig) -> Start:
    """Begin a new run."""
    progress = Progress(0, 0.0, 0, config.seed)
    if config.init_from is None:
        logger.info("a new run begins in %s", config.output_dir)
        return Start(progress)
    named = config.init_from.startswith("hf:")
    given = checkpoint_directory(config.init_from) if named else Path(config.init_from)
    if is_adapter(given):
        if not config.model.lora.enabled:
            raise CordError(
                f"init_from={given} is a LoRA adapter: set model.lora.rank and .alpha to its own "
                "(adapter_config.json), or merge it into its base"
            )
        if config.init_optimizer:
            raise CordError(f"init_optimizer=true: {given} is a PEFT directory, which holds no optimizer")
        source = given
        logger.info("a new run begins in %s with the adapter of %s", config.output_dir, given)
    elif (given / "config.json").is_file():
        if config.model.lora.enabled:
            raise CordError(
                f"init_from={given} holds whole weights, and with model.lora those of model.checkpoint stay: name it "
                "as model.checkpoint, and the weights of a frozen teacher, if they are others, as teacher.checkpoint"
            )
        if config.init_optimizer:
            raise CordError(f"init_optimizer=true: {given} is a Hugging Face directory, which holds no optimizer")
        source = given
        logger.info("a new run begins in %s with the weights of %s", config.output_dir, given)
    else:
        source = _find_checkpoint(given, f"init_from={given}", needs_optimizer=config.init_optimizer)
        check_lora(source, read_progress(source), config.model, f"init_from={given}")
        words = "weights and optimizer" if config.init_optimizer else "weights"
        logger.info("a new run begins in %s with the %s of %s", config.output_dir, words, source)
    changed = config.model.lora.whole if config.model.lora.enabled else PARTS
    return Start(replace(progress, made_with=replace(progress.made_with, trained=changed)), weights=source)


def _find_checkpoint(path: Path, given: str, *, needs_optimizer: bool) -> Path:
    """Return the checkpoint that a user names by its own directory or by its run's. Collective."""
    if (path / STATE).is_file() and not needs_optimizer and not (path / MANIFEST).is_file():
        return path  # was imported, and holds weights alone
    if any((path / name).is_file() for name in (STATE, MANIFEST, "metadata.json")):
        return check_whole(path)
    folder = path / "checkpoints"
    newest = CheckpointDirectory(folder).newest_undamaged(own=False) if folder.is_dir() else None
    if newest is None:
        if path.is_dir():
            found = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
            reason = f"is neither a checkpoint nor a run with one (it holds {found})"
        else:
            reason = f"does not exist (looked at {path.absolute()})"
        raise CordError(f"{given} {reason}; give the directory of a checkpoint, or of a run")
    return newest


def _check(config: RunConfig, checkpoint: Path, progress: Progress) -> Progress:
    """Refuse what cannot be meant."""
    if not progress.made_with.settings:
        raise CordError(
            f"{checkpoint} was written by an earlier revision and does not say with which settings and data; "
            f"init_from={checkpoint} takes its weights"
        )
    check_lora(checkpoint, progress, config.model, str(checkpoint))
    if progress.seed != config.seed:
        raise CordError(
            f"{checkpoint} belongs to a run with seed={progress.seed}; resume with that seed or choose "
            "another output_dir"
        )
    if progress.step > config.train.steps:
        raise CordError(
            f"{checkpoint} is after step {progress.step}, and train.steps={config.train.steps} lies behind it; raise "
            "train.steps, or choose another output_dir"
        )
    shuffled = progress.made_with.settings["data"]["shuffle"]
    if shuffled != config.data.shuffle:
        raise CordError(
            f"{checkpoint} belongs to a run with data.shuffle={str(shuffled).lower()}: in another order, samples would "
            "be left out or come twice; resume with that order or choose another output_dir"
        )
    return progress
