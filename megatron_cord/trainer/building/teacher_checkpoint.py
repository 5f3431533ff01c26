"""A teacher with a checkpoint of its own: whether it fits the student, and the engine that gives its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.tokenizers import load_tokenizer, vocabulary_difference
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import load_architecture
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.trainer.step.teacher import TeacherConfig


def check_teacher(given: str, student: PromptBuilder, student_dir: str | Path) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    The loss compares probabilities of the same ids, and the teacher reads prompts that the student's tokenizer and
    chat template make. Its sizes, its tokenizer's rules and its own template may differ.

    Args:
        given: `teacher.checkpoint`.
        student: makes the prompts.
        student_dir: `model.checkpoint`.

    Raises:
        CordError: it cannot be read, or the first thing that differs.
    """
    where = f"teacher.checkpoint={given}"
    try:
        directory = checkpoint_directory(given)
        rows = load_architecture(directory).language.vocab_size
        teacher = PromptBuilder(directory)
        difference = vocabulary_difference(load_tokenizer(directory), load_tokenizer(student_dir))
    except CordError as error:
        raise CordError(f"teacher.checkpoint: {error}") from None
    if difference is None and rows != student.vocab_size:
        difference = f"its vocabulary has {rows} rows, and model.checkpoint's {student.vocab_size}"
    if difference is None and set(teacher.eos_ids) != set(student.eos_ids):
        ends = (sorted(builder.eos_ids) for builder in (teacher, student))
        difference = "its responses end with the ids {}, and model.checkpoint's with {}".format(*ends)
    if difference is not None:
        raise CordError(f"{where} does not fit: {difference}; a teacher needs the student's vocabulary")


def answering_engine(rollout: RolloutConfig, teacher: TeacherConfig, device: torch.device) -> CollectiveEngine:
    """Build the engine that answers with the teacher's weights: its own servers, or the local engine. Collective.

    Args:
        rollout: how servers are used.
        teacher: with a checkpoint.
        device: of this rank.

    Raises:
        CordError: as `build_engine`.
    """
    assert teacher.checkpoint is not None
    if not teacher.servers:
        return build_engine(replace(rollout, engine="local"), teacher.checkpoint, device)
    servers = replace(rollout.sglang, servers=teacher.servers, servers_file=None, min_servers=1)
    return build_engine(replace(rollout, engine="sglang", sglang=servers), teacher.checkpoint, device)
