"""One training step: teacher forward, student forward and backward through the pipeline, update; or several updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_cord.losses import token_logprobs_from_hidden
from megatron_cord.model.lalm import LALM
from megatron_cord.model.pipeline import JointLoss, run_pipeline
from megatron_cord.rollout.types import ScoredRollout, TokenResults
from megatron_cord.trainer.step.balance import check_balancing
from megatron_cord.trainer.step.batching.batches import (
    Batching,
    Microbatch,
    TrainingSequence,
    check_responses,
    make_microbatches,
)
from megatron_cord.trainer.step.batching.packing import split_minibatches
from megatron_cord.trainer.step.controller import Controllers
from megatron_cord.trainer.step.loss_over_stages import JointLosses, LossOf
from megatron_cord.trainer.step.microbatch_loss import MicrobatchLoss, microbatch_loss
from megatron_cord.trainer.step.objective import GlobalCounts, ObjectiveConfig
from megatron_cord.trainer.step.optimizer.building import gradients_are_finite, join_reduction
from megatron_cord.trainer.step.optimizer.schedule import RateScheduler
from megatron_cord.trainer.step.results.layer_means import LayerMeans
from megatron_cord.trainer.step.results.measurements import measure_step
from megatron_cord.trainer.step.results.phases import Phases
from megatron_cord.trainer.step.results.token_results import gather_token_results
from megatron_cord.trainer.step.teacher import TaughtTokens, Teacher


@dataclass(frozen=True)
class StepResult:
    """Equal on all ranks.

    Attributes:
        metrics: scalars by name.
        rollouts: of the step over all ranks, with the token results of those that were trained on.
        skipped: an update was left out because the loss or a gradient was not finite.
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
        batches: how sequences are put into mini-batches, each of which makes an update, and microbatches.
        pad_id: fills padding.
        max_new_tokens: of the longest possible response.
        others: further teachers by name, for sequences that one of them scores.

    Attributes:
        controllers: of the streams' weights; a checkpoint keeps their state.
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
        max_new_tokens: int,
        others: Mapping[str, Teacher] | None = None,
    ) -> None:
        self.model, self.teacher, self.optimizer, self.scheduler = model, teacher, optimizer, scheduler
        self.objective, self.batches, self.pad_id = objective, batches, pad_id
        self.max_new_tokens = max_new_tokens
        self.teachers: dict[str, Teacher] = {"": teacher, **(others or {})}
        self._contrasts = {term.name: term.contrast for term in objective.terms}
        self.controllers = Controllers({t.name: t.controller for t in objective.terms if t.controller is not None})
        self.lalm: LALM = model.module
        self.layout = self.lalm.layout
        check_balancing(objective, self.lalm)

    def __call__(
        self,
        sequences: Sequence[TrainingSequence],
        rollouts: Sequence[ScoredRollout],
        begin_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Train on the step's sequences. Collective over all ranks.

        Args:
            sequences: of this data-parallel rank.
            rollouts: of the step on all data-parallel ranks, the same everywhere; zero-variance groups, which are not
                trained on, count in L_seq's denominator.
            begin_update: called before each update.
        """
        started, phases = time.perf_counter(), Phases()
        parts = split_minibatches(rollouts, self.batches.minibatches)
        own = {s.index: s for s in sequences}
        batches = [self._microbatches([own[i] for i in part if i in own]) for part in parts]
        updates = len(parts) * self.batches.passes
        if updates > 1 and self.objective.responses == "student":
            batches = [self._with_old_logprobs(batch) for batch in batches]
        objective, rates = self.objective.at(self.scheduler.num_steps), self.scheduler.rates()
        tokens: dict[int, TokenResults] = {}
        losses: list[MicrobatchLoss] = []
        norms: list[float] = []
        for number in range(updates):
            begin_update()
            if self.lalm.lora is not None:
                self.lalm.lora.reseed(self.scheduler.num_steps, number)
            part = number % len(parts)
            counts = self._counts([rollouts[i] for i in parts[part]])
            made, norm = self._update(batches[part], counts, objective, phases)
            losses += made
            norms += [] if norm is None else [norm]
            if number < len(parts):
                tokens |= gather_token_results(batches[part], made, self.layout)
        self.scheduler.step(increment=1)
        done = [replace(rollout, tokens=tokens.get(index)) for index, rollout in enumerate(rollouts)]
        metrics = measure_step(losses, done, updates, self.objective, self.layout) | {
            "grad_norm": sum(norms) / len(norms) if norms else float("nan"),
            **rates,
            **(seconds := phases.seconds()),
            "seconds_train": time.perf_counter() - started - seconds["seconds_teacher"],
        }
        by_stream = self._by_stream(done)
        metrics |= {f"stream/{name}/weight": weight for name, weight in self._weights(objective).items() if name}
        metrics |= self.controllers.metrics(by_stream)
        if len(norms) == updates:
            self.controllers.follow(by_stream)
        if objective.policy_gradient.weight_schedule.kind != "constant":
            metrics["policy_weight"] = objective.policy_gradient.weight
        if updates > 1:
            metrics |= {"updates": float(len(norms))}
        if self.lalm.routing is not None:
            metrics |= self.lalm.routing.take(updates)
        return StepResult(metrics, done, skipped=len(norms) < updates)

    def score(self, sequences: Sequence[TrainingSequence]) -> dict[int, TokenResults]:
        """Compute token results of sequences, by their index, without training on them. Collective like a step.

        Their divergence is the reverse KL, whatever is trained on, so that runs of all objectives can be compared.
        """
        microbatches = self._microbatches(sequences)
        taught = self.teacher.hidden_states(microbatches)
        own = self.objective
        measured = replace(ObjectiveConfig(), implementation=own.implementation, backend=own.backend)
        losses = self._forward_backward(microbatches, taught, {"": GlobalCounts(1, 1)}, measured, train=False)
        return gather_token_results(microbatches, losses, self.layout)

    def pool_layers(self, sequences: Sequence[TrainingSequence]) -> Tensor:
        """Return each layer's mean output over a response's tokens, float32 [layers of this stage, sequences, H].

        By the sequences' index, with the present weights. Collective over the replica's ranks, which pass the same.
        """
        microbatches = self._microbatches(sequences)
        with LayerMeans(self.lalm, microbatches) as means, torch.no_grad():
            self._pipeline(microbatches, None, None, train=False)
        return means.whole()

    def _update(
        self,
        microbatches: list[Microbatch],
        counts: Mapping[str, GlobalCounts],
        objective: ObjectiveConfig,
        phases: Phases,
    ) -> tuple[list[MicrobatchLoss], float | None]:
        """Make one update; return the microbatches' losses, and the gradient norm, None where it was skipped."""
        with phases.phase("teacher"):
            taught = self._teach(microbatches)
        if self.lalm.routing is not None:
            self._weigh_balance(microbatches)
        with phases.phase("forward_backward"):
            losses = self._forward_backward(microbatches, taught, counts, objective)
        totals = [loss.total.detach() for loss in losses]
        finite = self._everywhere(
            (not totals or bool(torch.stack(totals).isfinite().all())) and gradients_are_finite(self.model)
        )
        if not finite:
            return losses, None
        with phases.phase("optimizer"):
            _, grad_norm, _ = self.optimizer.step()
            self.teacher.follow()
        return losses, float(grad_norm or 0.0)

    def _teach(self, microbatches: list[Microbatch]) -> list[TaughtTokens | None]:
        """Return what each microbatch's teacher gives of it, one teacher after the other."""
        found: list[TaughtTokens | None] = [None] * len(microbatches)
        for name, teacher in self.teachers.items():
            own = [number for number, microbatch in enumerate(microbatches) if microbatch.taught_by == name]
            given = teacher.hidden_states([microbatches[number] for number in own], self._contrasts)
            for number, tokens in zip(own, given, strict=True):
                found[number] = tokens
        return found

    def _weigh_balance(self, microbatches: list[Microbatch]) -> None:
        """Divide the balancing loss, if there is one, by the update's sequences on all data-parallel ranks."""
        assert self.lalm.routing is not None
        if self.objective.router_aux_loss:
            own = float(sum(len(m.sequences) for m in microbatches))
            sequences = torch.full((), own, device=self.layout.device)
            dist.all_reduce(sequences, group=self.layout.dp_group)
            self.lalm.routing.weight = self.objective.router_aux_loss / sequences.clamp(min=1)

    def _counts(self, rollouts: Sequence[ScoredRollout]) -> dict[str, GlobalCounts]:
        """Return an update's denominators by stream, and under "" those of what belongs to none."""
        named = self._by_stream(rollouts)
        return {n: GlobalCounts.of(self.objective, some, self.max_new_tokens) for n, some in named.items()}

    def _by_stream(self, rollouts: Sequence[ScoredRollout]) -> dict[str, list[ScoredRollout]]:
        """Return the rollouts of each stream, and under "" those of none."""
        named: dict[str, list[ScoredRollout]] = {name: [] for name in ("", *self.objective.streams)}
        for rollout in rollouts:
            named[self.objective.stream_of(rollout)].append(rollout)
        return named

    def _weights(self, objective: ObjectiveConfig) -> dict[str, float]:
        """Return λ of each stream, with its controller's factor, or the policy gradient's own."""
        policy = {term.name: term.weight * objective.policy_gradient.weight for term in objective.policy_terms}
        return policy | {term.name: term.weight * self.controllers.factor(term.name) for term in objective.terms}

    def _microbatches(self, sequences: Sequence[TrainingSequence]) -> list[Microbatch]:
        check_responses(sequences, self.lalm.arch.language)
        return make_microbatches(
            sequences, self.batches, self.pad_id, self.layout.sequence_sharding, self.layout.device
        )

    def _with_old_logprobs(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """Score the responses before the first of several updates, without a teacher."""
        old: list[Tensor] = []

        def loss_func(batch: Microbatch, taught: TaughtTokens | None, rows: Tensor, weight: Tensor) -> Tensor:
            stats = token_logprobs_from_hidden(
                rows,
                weight,
                batch.target_ids,
                vocab_size=self.lalm.arch.language.vocab_size,
                tp_group=self.layout.vocabulary_group,
                backend=self.objective.backend,
                check_finite=False,  # the update that follows is skipped
                check_targets=False,  # checked before they went to the device
            )
            old.append(stats.student_logprob.detach())
            return stats.student_logprob.new_zeros(())

        with torch.no_grad():
            self._pipeline(microbatches, None, loss_func, train=False)
        return [replace(m, old_logprobs=o) for m, o in zip(microbatches, old, strict=True)] if old else microbatches

    def _forward_backward(
        self,
        microbatches: list[Microbatch],
        taught: list[TaughtTokens | None],
        counts: Mapping[str, GlobalCounts],
        objective: ObjectiveConfig,
        *,
        train: bool = True,
    ) -> list[MicrobatchLoss]:
        """Run the pipeline schedule; return the microbatches' losses on the last stage and nothing elsewhere."""
        losses: list[MicrobatchLoss] = []
        objectives = {stream: objective.within(stream) for stream in counts}
        weights = self._weights(objective)

        def loss_func(batch: Microbatch, taught: TaughtTokens | None, rows: Tensor, weight: Tensor) -> Tensor:
            loss = microbatch_loss(
                objectives[batch.stream],
                counts[batch.stream],
                batch,
                rows,
                weight,
                None if taught is None else taught.hidden,
                None if taught is None else taught.output_weight,
                self.lalm.arch.language.vocab_size,
                self.layout.vocabulary_group,
                self.layout.cp_group,
                weights.get(batch.stream, 1.0),  # no stream's: L_seq alone
                None if taught is None else taught.gate,
            )
            losses.append(loss)
            return loss.total

        self._pipeline(microbatches, taught, loss_func, train=train)
        return losses if self.layout.is_last_stage else []

    def _pipeline(
        self,
        microbatches: list[Microbatch],
        taught: Sequence[TaughtTokens | None] | None,
        loss_of: LossOf | None,
        *,
        train: bool,
    ) -> None:
        """Run the student's forward passes, and where it trains the backward passes, through the pipeline schedule.

        Args:
            microbatches: of this rank.
            taught: what the teacher gives of each; None: none is used.
            loss_of: called on the last stage, or with `parallel.vocabulary_over_stages` on all; None: there is no loss.
            train: whether there are backward passes.
        """
        losses, may_run = None, bool(microbatches) or self.layout.experts_span_replicas
        if loss_of is not None and may_run and self.layout.config.vocabulary_over_stages:
            models = {name: teacher.model for name, teacher in self.teachers.items()}
            losses = JointLosses(self.model, models, self._contrasts, microbatches, taught, loss_of, train=train)

        def finish(number: int, hidden: Tensor) -> Tensor:
            if loss_of is None:
                return hidden.new_zeros(())
            batch = microbatches[number]
            rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.student_rows.rows)
            if losses is not None:
                return losses.finish(number, rows)
            return loss_of(batch, None if taught is None else taught[number], rows, self.lalm.output_weight)

        if self.lalm.lora is not None:
            self.lalm.lora.train(train)  # for its dropout
        if train:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
        if self.lalm.routing is not None:
            self.lalm.routing.active = train
        inputs = [m.student for m in microbatches]
        joint = None if losses is None else JointLoss(losses.join, losses.end)
        ran = may_run and run_pipeline(self.lalm, inputs, finish, train=train, wrapped=self.model, joint=joint)
        if self.lalm.routing is not None:
            self.lalm.routing.active = False
        if train and not ran:
            join_reduction(self.model)
            self.lalm.config.finalize_model_grads_func(
                [self.model], None, pg_collection=self.layout.groups
            )  # the others wait in it

    def _everywhere(self, good: bool) -> bool:
        flag = torch.full((), float(good), device=self.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)
