"""The teacher: a forward pass on its own view, for hidden states of response tokens, never logits.

It is the same model, with LoRA off if it is frozen, or one with a checkpoint of its own, laid out over the ranks as the
student is. Where a stream contrasts it with itself on a second view (`losses.contrast`), there are two forward passes,
one after the other, and the hidden states of the mixture take the place of the first one's, microbatch by microbatch.

Legend: n response tokens of a microbatch that this rank's student scores; H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.convert import read_into
from megatron_cord.errors import CordError
from megatron_cord.losses import token_logprobs_from_hidden
from megatron_cord.losses.contrast import contrast_gate, contrasted_hidden
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.model.pipeline import run_pipeline
from megatron_cord.parallel.transfers import to_device, to_host
from megatron_cord.trainer.step.batching.batches import Microbatch
from megatron_cord.trainer.step.batching.token_layout import Rows
from megatron_cord.trainer.step.moving_average import MovingAverage
from megatron_cord.trainer.step.streams import ContrastConfig


@dataclass(frozen=True)
class TeacherConfig:
    """Which weights the teacher has."""

    #: frozen: the initial weights; live: the student's current ones under stop-gradient; ema: their exponential
    #: moving average
    mode: Literal["frozen", "live", "ema"] = "frozen"
    #: a Hugging Face directory, or hf://OWNER/NAME, of a teacher of its own in place of model.checkpoint: of another
    #: size, or a text model, with the same vocabulary; it needs mode frozen
    checkpoint: str | None = None
    #: SGLang servers (http://host:port of each) that run teacher.checkpoint, for its reference answers; without them
    #: the local engine gives these before the first step
    servers: tuple[str, ...] = ()
    ema_decay: float = 0.999  #: of mode ema: the share of the average that an update keeps
    #: keep its hidden states, and float32 averages of a bfloat16 model, in host memory until they are needed
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise CordError(f"teacher.ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if self.checkpoint is not None and self.mode != "frozen":
            raise CordError(
                f"teacher.mode={self.mode} takes the student's weights, and teacher.checkpoint others; set one of them"
            )
        if self.servers and self.checkpoint is None:
            raise CordError(
                "teacher.servers run teacher.checkpoint, which is not set; rollout.sglang is for the student"
            )


@dataclass(frozen=True, eq=False)
class TaughtTokens:
    """What the teacher gives of a microbatch's n tokens, without gradient."""

    hidden: Tensor  #: [n, H], in host memory with ``offload``
    output_weight: Tensor  #: [V_padded / TP, H], of the same model
    gate: Tensor | None = None  #: float [n], by which w_t is multiplied; None: all tokens count


@dataclass(frozen=True, eq=False)
class _Scored:
    """A microbatch on one of the teacher's views."""

    number: int  #: of the microbatch
    batch: Microbatch
    given: ModelInput
    rows: Rows


class Teacher:
    """The teacher's model and its forward pass through the pipeline.

    Args:
        config: which weights.
        student: the model that is trained; it is the teacher's model too where the weights are the same.
        checkpoint_dir: the initial weights, unless the teacher has a checkpoint of its own.
        has_trained: what the teacher needs of the student has, or will be given, other weights than the initial ones,
            even if it is frozen from now on.
        with_audio: whether a view that it scores on has audio: it then needs the audio encoder and the adapter, too.
    """

    def __init__(
        self,
        config: TeacherConfig,
        student: LALM,
        checkpoint_dir: str,
        *,
        has_trained: bool = False,
        with_audio: bool = False,
    ) -> None:
        self.offload = config.offload
        self.average: MovingAverage | None = None  #: of mode ema, unless the language model is frozen
        lora = student.lora
        if config.mode == "ema" and lora is not None and lora.has("language_model"):
            raise CordError(
                "teacher.mode=ema keeps no average of LoRA adapters; with model.lora take frozen, which is the model "
                "with its adapters off, or live"
            )
        beside = set[torch.nn.Parameter]() if lora is None else set(lora.parameters())  # can be switched off
        needed = (student if with_audio else student.language_model).parameters()
        is_frozen = all(not p.requires_grad for p in needed if p not in beside)
        frozen_everywhere = torch.tensor(float(is_frozen), device=student.layout.device)
        dist.all_reduce(frozen_everywhere, op=dist.ReduceOp.MIN, group=student.layout.pp_group)
        is_student = bool(frozen_everywhere) and (config.mode == "ema" or not has_trained)
        if config.checkpoint is None and (config.mode == "live" or is_student):
            self.model = student  # what is frozen is its own frozen teacher, and its own average
            self._lora, self._without_lora = lora, config.mode == "frozen"
        else:
            self._lora = None
            own = config.checkpoint
            arch = student.arch if own is None else load_architecture(own)
            self.model = LALM(arch, student.layout, student.config.params_dtype, student.layers)
            read_into(self.model, checkpoint_dir if own is None else own)
            self.model.requires_grad_(False)
            if config.mode == "ema":
                self.average = MovingAverage(config.ema_decay, student, self.model, offload=config.offload)

    @property
    def output_weight(self) -> Tensor:
        """[V_padded / TP, H], on the last stage."""
        return self.model.output_weight.detach()

    def follow(self) -> None:
        """Move the average, if there is one, towards the student's updated weights."""
        if self.average is not None:
            self.average.update()

    def _weights(self) -> AbstractContextManager[None]:
        """Return the context in which the model has the teacher's weights: with LoRA, a frozen one is without it."""
        if self._lora is None:
            return nullcontext()
        self._lora.eval()
        return self._lora.disabled() if self._without_lora else nullcontext()

    @torch.no_grad()
    def hidden_states(
        self, microbatches: Sequence[Microbatch], contrasts: Mapping[str, ContrastConfig | None] | None = None
    ) -> list[TaughtTokens | None]:
        """Run the forward pass over the microbatches that have a teacher's input.

        Args:
            microbatches: of this rank.
            contrasts: of the streams, by name, where microbatches have an input to contrast with.

        Returns:
            for each microbatch what the last stage has of it; None on other stages and for a microbatch without a
            teacher's input.
        """
        if self.average is not None:
            self.average.wait()  # the student's next update, too, must not overtake the average of the last one
        found: list[TaughtTokens | None] = [None] * len(microbatches)

        def keep(scored: _Scored, hidden: Tensor) -> None:
            found[scored.number] = TaughtTokens(self._kept(hidden), self.output_weight)

        def contrast(scored: _Scored, other: Tensor) -> None:
            first, config = found[scored.number], (contrasts or {})[scored.batch.stream]
            assert first is not None
            assert config is not None
            hidden = first.hidden.to(other.device, non_blocking=True)
            gate = None
            if config.gate is not None:
                logprob, against = (self._logprobs(states, scored.batch) for states in (hidden, other))
                gate = contrast_gate(logprob, against, config.gate)
            mixed = contrasted_hidden(hidden, other, config.alpha)
            found[scored.number] = TaughtTokens(self._kept(mixed), self.output_weight, gate)

        with self._weights():
            views = [(n, m, m.teacher, m.teacher_rows) for n, m in enumerate(microbatches)]
            self._forward(views, keep)
            views = [(n, m, m.contrast, m.contrast_rows) for n, m in enumerate(microbatches)]
            self._forward(views, contrast)
        return found

    def _forward(
        self,
        views: Sequence[tuple[int, Microbatch, ModelInput | None, Rows | None]],
        take: Callable[[_Scored, Tensor], None],
    ) -> None:
        """Run the microbatches that have an input through the pipeline.

        Args:
            views: number, microbatch, and its input with the rows that predict the response.
            take: called on the last stage with a microbatch and its hidden states [n, H], in their order.
        """
        scored = [_Scored(n, m, given, rows) for n, m, given, rows in views if given is not None and rows is not None]
        if not scored and not self.model.layout.experts_span_replicas:
            return

        def finish(number: int, hidden: Tensor) -> Tensor:
            one = scored[number]
            rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, one.rows.rows)
            if one.batch.student_rows.tokens is not None:
                # Prompts differ in length, so the tokens are split over the ranks differently than the student's.
                whole = whole_tokens(rows, one.rows, one.batch.num_tokens, self.model.layout.cp_group)
                rows = whole.index_select(0, to_device(one.batch.student_rows.tokens, whole.device))
            take(one, rows)
            return hidden.new_zeros(())

        run_pipeline(self.model, [one.given for one in scored], finish, train=False)

    def _kept(self, hidden: Tensor) -> Tensor:
        return to_host(hidden) if self.offload else hidden

    def _logprobs(self, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return log q of the response's tokens, [n], from hidden states [n, H]. Collective over the TP ranks."""
        stats = token_logprobs_from_hidden(
            hidden,
            self.output_weight,
            batch.target_ids,
            vocab_size=self.model.arch.language.vocab_size,
            tp_group=self.model.layout.tp_group,
            check_finite=False,  # the loss is not finite then, and its update is skipped
            check_targets=False,  # checked before they went to the device
        )
        return stats.student_logprob


def whole_tokens(values: Tensor, rows: Rows, num_tokens: int, cp_group: dist.ProcessGroup) -> Tensor:
    """Gather [N, …] of each context-parallel rank's [n, …], without gradient, on all of them. Collective."""
    if rows.tokens is None:
        return values.detach()
    tokens = to_device(rows.tokens, values.device)
    whole = values.new_zeros(num_tokens, *values.shape[1:]).index_copy(0, tokens, values.detach())
    dist.all_reduce(whole, group=cp_group)
    return whole
