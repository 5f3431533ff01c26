"""How much a step computed, how fast, and with how much memory: metrics in the groups tokens, speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from megatron_cord.model.architecture import Architecture
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.memory_use import peak_memory
from megatron_cord.parallel.transfers import to_device
from megatron_cord.rollout.types import Rollout
from megatron_cord.trainer.step.batching.batches import TrainingSequence


@dataclass(frozen=True)
class StepWork:
    """Sums over what a step generated, and what each of its passes trained on.

    Attributes:
        generated_tokens: by the engine, of all responses that the step asked for at once; 0 in a replay.
        sequences: trained on.
        scored: of them, those that the teacher scores.
        student_tokens: audio, the rest of the prompt, and response.
        teacher_tokens: the same of the scored sequences, as the teacher takes them, on both views of a contrast.
        response_tokens: of the sequences.
        clips: of audio.
        clip_frames: log-mel frames of the clips, without padding.
        taught_clips: of audio that the teacher takes.
    """

    generated_tokens: int
    sequences: int
    scored: int
    student_tokens: int
    teacher_tokens: int
    response_tokens: int
    clips: int
    clip_frames: int
    taught_clips: int = 0

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], sequences: Sequence[TrainingSequence]) -> StepWork:
        """Return the sums over these responses and sequences."""
        return cls(
            generated_tokens=sum(len(r.token_ids) for r in rollouts),
            sequences=len(sequences),
            scored=sum(s.teacher is not None for s in sequences),
            student_tokens=sum(s.student_tokens for s in sequences),
            teacher_tokens=sum(s.teacher_tokens + s.contrast_tokens for s in sequences),
            response_tokens=sum(len(s.rollout.token_ids) for s in sequences),
            clips=sum(len(s.student.clips) for s in sequences),
            clip_frames=sum(clip.num_frames for s in sequences for clip in s.student.clips),
            taught_clips=sum(len(p.clips) for s in sequences for p in (s.teacher, s.contrast) if p is not None),
        )


#: Metrics of utilisation, from the architectures of student and teacher, a step's work over all ranks, and the seconds
#: of its updates.
Utilise = Callable[[Architecture, Architecture, StepWork, float], Mapping[str, float]]


def measure_throughput(
    own: StepWork,
    seconds: Mapping[str, float],
    passes: int,
    layout: Layout,
    utilise: Callable[[StepWork, float], Mapping[str, float]],
) -> dict[str, float]:
    """Return tokens, tokens a second by phase, utilisation, and peaks of memory. Collective over all ranks.

    Seconds and peaks are those of the slowest and the fullest rank.

    Args:
        own: of this rank's replica.
        seconds: of the step's phases on this rank, `seconds_PHASE`; the same phases on all ranks.
        passes: over the sequences, in each of which teacher and student take them all.
        layout: this rank's place.
        utilise: returns the metrics of utilisation, from the work of all ranks and the seconds of its updates.
    """
    work, largest = _over_ranks(own, {**seconds, **peak_memory()}, layout)
    tokens = {
        "generate": work.generated_tokens,
        "teacher": passes * work.teacher_tokens,
        "forward_backward": passes * work.student_tokens,
    }
    metrics = {
        "tokens_generated": float(tokens["generate"]),
        "tokens_teacher": float(tokens["teacher"]),
        "tokens_student": float(tokens["forward_backward"]),
    }
    for phase, count in tokens.items():
        if count and (taken := largest.get(f"seconds_{phase}", 0.0)) > 0:
            metrics[f"tokens_per_second_{phase}"] = count / taken
    metrics["tokens_per_second"] = work.student_tokens / largest["seconds"]
    metrics |= utilise(work, largest["seconds_update"])
    return metrics | {name: value for name, value in largest.items() if name.startswith("memory_")}


def _over_ranks(own: StepWork, values: Mapping[str, float], layout: Layout) -> tuple[StepWork, dict[str, float]]:
    """Return the sum of all replicas' work, and the largest of each value, by a single exchange."""
    first_of_replica = dist.get_rank(layout.replica_group) == 0  # the others have the same work
    counts = [count * first_of_replica for count in asdict(own).values()]
    mine = to_device(torch.tensor([*counts, *values.values()], dtype=torch.float64), layout.device)
    gathered = mine.new_empty(layout.world_size, len(mine))
    dist.all_gather(list(gathered.unbind()), mine)
    columns = list(zip(*gathered.tolist(), strict=True))
    work = StepWork(*(round(sum(column)) for column in columns[: len(counts)]))
    return work, {name: max(column) for name, column in zip(values, columns[len(counts) :], strict=True)}
