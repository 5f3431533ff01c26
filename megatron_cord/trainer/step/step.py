"""One optimizer step: teacher forward, student forward and backward through the pipeline, update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults
from megatron_cord.trainer.step.batches import Batching, Microbatch, TrainingSequence, make_microbatches
from megatron_cord.trainer.step.objective import GlobalCounts, MicrobatchLoss, ObjectiveConfig, microbatch_loss
from megatron_cord.trainer.step.optimizer.building import gradients_are_finite, join_reduction
from megatron_cord.trainer.step.optimizer.schedule import RateScheduler
from megatron_cord.trainer.step.teacher import Teacher, whole_tokens


@dataclass(frozen=True)
class StepResult:
    """Equal on all ranks.

    Attributes:
        metrics: scalars by name.
        rollouts: of the step over all ranks, with the token results of those that were trained on.
        skipped: the update was left out because the loss or a gradient was not finite.
    """

    metrics: dict[str, float]
    rollouts: list[ScoredRollout]
    skipped: bool


class TrainStep:
    """Holds what a step needs.

    Args:
        model: the wrapped student.
        teacher: the teacher.
        optimizer, scheduler: of the student.
        objective: what is minimised.
        batches: how sequences are put into microbatches.
        pad_id: fills padding.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        teacher: Teacher,
        optimizer: MegatronOptimizer,
        scheduler: RateScheduler,
        objective: ObjectiveConfig,
        batches: Batching,
        pad_id: int,
    ) -> None:
        self.model, self.teacher, self.optimizer, self.scheduler = model, teacher, optimizer, scheduler
        self.objective, self.batches, self.pad_id = objective, batches, pad_id
        self.lalm: LALM = model.module
        self.layout = self.lalm.layout

    def __call__(self, sequences: Sequence[TrainingSequence], rollouts: Sequence[ScoredRollout]) -> StepResult:
        """Train on the step's sequences. Collective over all ranks.

        Args:
            sequences: of this data-parallel rank.
            rollouts: of the step on all data-parallel ranks, the same everywhere; zero-variance groups, which are not
                trained on, count in L_seq's denominator.
        """
        started = time.perf_counter()
        counts = GlobalCounts(
            self._count([r.rollout for r in rollouts if r.distilled]),
            self._count([r.rollout for r in rollouts if r.in_group]),
        )
        microbatches = self._microbatches(sequences)
        teacher_hidden = self.teacher.hidden_states(microbatches)
        teacher_done = time.perf_counter()
        objective = self.objective.at(self.scheduler.num_steps)
        losses = self._forward_backward(microbatches, teacher_hidden, counts, objective)
        tokens = self._gather_tokens(microbatches, losses)
        finite = self._everywhere(
            all(bool(torch.isfinite(loss.total)) for loss in losses) and gradients_are_finite(self.model)
        )
        rates = self.scheduler.rates()
        grad_norm = float("nan")
        if finite:
            _, grad_norm, _ = self.optimizer.step()
            self.teacher.follow()
        self.scheduler.step(increment=1)
        done = [replace(rollout, tokens=tokens.get(index)) for index, rollout in enumerate(rollouts)]
        metrics = self._metrics(losses, done) | {
            "grad_norm": float(grad_norm or 0.0),
            **rates,
            "seconds_teacher": teacher_done - started,
            "seconds_train": time.perf_counter() - teacher_done,
        }
        if objective.policy_gradient.weight_schedule.kind != "constant":
            metrics["policy_weight"] = objective.policy_gradient.weight
        return StepResult(metrics, done, skipped=not finite)

    def score(self, sequences: Sequence[TrainingSequence]) -> dict[int, TokenResults]:
        """Compute token results of sequences, by their index, without training on them. Collective like a step."""
        microbatches = self._microbatches(sequences)
        teacher_hidden = self.teacher.hidden_states(microbatches)
        losses = self._forward_backward(microbatches, teacher_hidden, GlobalCounts(1, 1), self.objective, train=False)
        return self._gather_tokens(microbatches, losses)

    def _count(self, rollouts: list[Rollout]) -> int:
        """Return what a loss over these responses is divided by; at least 1."""
        by_token = self.objective.normalization == "token"
        return max(1, sum(len(r.token_ids) for r in rollouts) if by_token else len(rollouts))

    def _microbatches(self, sequences: Sequence[TrainingSequence]) -> list[Microbatch]:
        return make_microbatches(
            sequences, self.batches, self.pad_id, self.layout.sequence_sharding, self.layout.device
        )

    def _forward_backward(
        self,
        microbatches: list[Microbatch],
        teacher_hidden: list[Tensor | None],
        counts: GlobalCounts,
        objective: ObjectiveConfig,
        *,
        train: bool = True,
    ) -> list[MicrobatchLoss]:
        """Run the pipeline schedule; return the microbatches' losses on the last stage and nothing elsewhere."""
        losses: list[MicrobatchLoss] = []

        def forward_step(batches: Any, model: Any) -> Any:
            batch, teacher = next(batches)

            def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.student_rows.rows)
                teacher_weight = None if teacher is None else self.teacher.output_weight
                loss = microbatch_loss(
                    objective,
                    counts,
                    batch,
                    rows,
                    self.lalm.output_weight,
                    teacher,
                    teacher_weight,
                    self.lalm.arch.language.vocab_size,
                    self.layout.tp_group,
                    self.layout.cp_group,
                )
                losses.append(loss)
                return loss.total, torch.tensor(1, device=hidden.device), {}

            return model(batch.student), loss_func

        if train:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
        if microbatches:
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(zip(microbatches, teacher_hidden, strict=True)),
                model=[self.model],
                num_microbatches=len(microbatches),
                seq_length=max(m.student.token_ids.shape[1] for m in microbatches),
                micro_batch_size=max(len(m.sequences) for m in microbatches),
                forward_only=not train,
            )
        elif train:
            join_reduction(self.model)
            self.lalm.config.finalize_model_grads_func(
                [self.model], None, pg_collection=self.layout.groups
            )  # the others wait in it
        return losses

    def _gather_tokens(self, microbatches: list[Microbatch], losses: list[MicrobatchLoss]) -> dict[int, TokenResults]:
        """Token results of all sequences of the step, by index, on every rank."""
        mine: list[list[Any]] = []
        if losses and dist.get_rank(self.layout.tp_group) == 0:
            for batch, loss in zip(microbatches, losses, strict=True):
                fields, stats, taught = [], loss.stats, batch.teacher is not None
                kl, teacher_logprob = (stats.kl, stats.teacher_logprob) if taught else (None, None)
                for values in (kl, loss.weights, stats.student_logprob, teacher_logprob):
                    whole = (
                        None
                        if values is None
                        else whole_tokens(values, batch.student_rows, batch.num_tokens, self.layout.cp_group)
                    )
                    fields.append(None if whole is None else whole.float().tolist())
                borders = accumulate((len(s.rollout.token_ids) for s in batch.sequences), initial=0)
                for sequence, (start, end) in zip(batch.sequences, pairwise(borders), strict=True):
                    mine.append([sequence.index, *(None if f is None else f[start:end] for f in fields)])
        if dist.get_rank(self.layout.cp_group) > 0:
            mine = []  # the first of them has the same
        return {index: TokenResults(*fields) for part in all_gather_json(mine) for index, *fields in part}

    def _everywhere(self, good: bool) -> bool:
        flag = torch.tensor(float(good), device=self.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _metrics(self, losses: list[MicrobatchLoss], rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64, device=self.layout.device)
        if losses and dist.get_rank(self.layout.tp_group) == 0:
            for loss in losses:
                entropy = loss.stats.entropy
                sums += torch.stack(
                    [
                        loss.token.double(),
                        loss.sequence.double(),
                        entropy.double().sum(),
                        torch.tensor(float(entropy.numel()), dtype=torch.float64, device=entropy.device),
                    ]
                )
        dist.all_reduce(sums)
        token, sequence, entropy_sum, tokens = sums.tolist()
        trained = [r for r in rollouts if r.tokens is not None]
        kl = [value for r in trained if r.tokens is not None and r.tokens.kl is not None for value in r.tokens.kl]
        unknown = math.nan  # where nothing was trained on, there is no mean: a zero would look like a collapse
        return {
            "loss": token + sequence,
            "loss_token": token,
            "loss_sequence": sequence,
            "entropy": entropy_sum / tokens if tokens else unknown,
            "kl": sum(kl) / len(kl) if kl else unknown,
            "response_tokens": sum(len(r.rollout.token_ids) for r in trained) / len(trained) if trained else unknown,
        }
