"""A teacher with a checkpoint of its own: whether it fits the student, and the engine that gives its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.tokenizers import load_tokenizer, vocabulary_difference
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import load_architecture
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.trainer.step.teacher import TeacherConfig


def check_teacher(
    given: str,
    student: PromptBuilder,
    student_dir: str | Path,
    key: str = "teacher.checkpoint",
    *,
    with_audio: bool = False,
) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    The loss compares probabilities of the same ids, and the teacher reads prompts that the student's tokenizer and
    chat template make. Its sizes, its tokenizer's rules and its own template may differ.

    Args:
        given: the teacher's checkpoint.
        student: makes the prompts.
        student_dir: `model.checkpoint`.
        key: of the configuration, which names the checkpoint.
        with_audio: the teacher is given audio, too: as features and placeholders that the student's processing makes.

    Raises:
        CordError: it cannot be read, or the first thing that differs.
    """
    where = f"{key}={given}"
    try:
        directory = checkpoint_directory(given)
        arch = load_architecture(directory)
        rows = arch.language.vocab_size
        teacher = PromptBuilder(directory)
        difference = vocabulary_difference(load_tokenizer(directory), load_tokenizer(student_dir))
    except CordError as error:
        raise CordError(f"{key}: {error}") from None
    if difference is None and rows != student.vocab_size:
        difference = f"its vocabulary has {rows} rows, and model.checkpoint's {student.vocab_size}"
    if difference is None and set(teacher.eos_ids) != set(student.eos_ids):
        ends = (sorted(builder.eos_ids) for builder in (teacher, student))
        difference = "its responses end with the ids {}, and model.checkpoint's with {}".format(*ends)
    if difference is not None:
        raise CordError(f"{where} does not fit: {difference}; a teacher needs the student's vocabulary")
    if with_audio and (difference := _other_audio(arch, load_architecture(student_dir))) is not None:
        raise CordError(f"{where} scores on a view with audio, and {difference}; give it a view without audio")


def _other_audio(teacher: Architecture, student: Architecture) -> str | None:
    """Return how audio is another input for the teacher than for the student; None if it is the same."""
    if teacher.encoder is None:
        return f"is a text model ({teacher.model_type})"
    if student.encoder is None or teacher.audio_token_id != student.audio_token_id:
        return f"has the placeholder {teacher.audio_token_id} for it, not the student's {student.audio_token_id}"
    if (student.encoder.chunks is None) != (teacher.encoder.chunks is None):
        return "takes clips padded to a window, or the student does, and the other takes them as long as they are"
    ours, theirs = (
        (each.num_mels, each.max_clip_frames if each.chunks is not None else each.window_frames)
        for each in (student.encoder, teacher.encoder)
    )
    if ours != theirs:
        return "takes {} mel bins and {} frames, not the student's {} and {}".format(*theirs, *ours)
    lengths = range(1, student.encoder.max_clip_frames + 1)
    for frames in lengths:
        made, wanted = teacher.num_audio_tokens(frames), student.num_audio_tokens(frames)
        if made != wanted:
            return f"makes {made} tokens of {frames} frames, not the student's {wanted}"
    return None


def answering_engine(
    rollout: RolloutConfig, teacher: TeacherConfig, device: torch.device, dtype: torch.dtype | None = None
) -> CollectiveEngine:
    """Build the engine that answers with the teacher's weights: its own servers, or the local engine. Collective.

    Args:
        rollout: how servers are used.
        teacher: with a checkpoint.
        device: of this rank.
        dtype: of the local engine; None: the checkpoint's.

    Raises:
        CordError: as `build_engine`.
    """
    assert teacher.checkpoint is not None
    if not teacher.servers:
        return build_engine(replace(rollout, engine="local"), teacher.checkpoint, device, dtype)
    servers = replace(rollout.sglang, servers=teacher.servers, servers_file=None, min_servers=1)
    return build_engine(replace(rollout, engine="sglang", sglang=servers), teacher.checkpoint, device)
