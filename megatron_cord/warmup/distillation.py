"""The third stage: the frozen language model teaches the adapter what a recording is to it, on the transcript itself.

Both views have the same instruction, to repeat what was said, behind the recording or behind its transcript. The
response is the transcript, so nothing is generated, and the loss is forward KL from the model with the text prompt to
that with the audio prompt, averaged over the response's tokens. Every word of a recording is a token to be predicted,
where an answer has one word of it or none.

Ranks are data parallel, and each has the whole language model, frozen. Recordings go through the encoder again, whose
part of the time is small beside the language model's.
Legend: n response tokens of a microbatch, H width of the language model, N tokens of audio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from megatron_cord.convert import read_into
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, Sample
from megatron_cord.losses import TokenStats, distillation_loss
from megatron_cord.model.adapters import Adapter
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.encoder import AudioEncoder
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.step.batching.batches import Microbatch, TrainingSequence, make_microbatches
from megatron_cord.trainer.step.batching.token_layout import Rows
from megatron_cord.warmup.config import DistillationConfig, WarmupConfig
from megatron_cord.warmup.corpus import Corpus

#: features of clips, how many of each clip, and how many tokens of audio each becomes, to [N, H]
Adapt = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]


@dataclass(frozen=True)
class _Padded:
    """How microbatches are made (`trainer.step.batching.batches.Batching`)."""

    micro_batch_size: int
    packing: Literal["padded", "packed"] = "padded"
    tokens_per_microbatch: int = 0
    minibatches: int = 1
    passes: int = 1


class _Adapted(nn.Module):
    """Stands where the model has its adapter, and calls the one that is trained."""

    def __init__(self, adapt: Adapt) -> None:
        super().__init__()
        self._adapt = adapt

    def forward(self, features: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Map the features of clips to [N, H]."""
        return self._adapt(features, counts, tokens)


def check_prompt(config: DistillationConfig, corpus: Corpus, prompts: PromptBuilder) -> None:
    """Refuse an instruction or a system prompt that the checkpoint's chat template or tokenizer does not take.

    Raises:
        CordError: it does not, or its assistant's turns have no end.
    """
    text = corpus.utterances[0].text
    sample = Sample("distillation", text, instruction=config.instruction, system=config.system)
    prompts.text_prompt(sample)
    prompts.response_ids(text)


class Distillation:
    """The stage on this rank. Collective over all ranks, which read the checkpoint together.

    Args:
        config: of the warm-up.
        layout: of data-parallel ranks alone.
        corpus: the utterances.
        prompts: of the checkpoint.
        arch: of the checkpoint.
        encoder: as the first stage left it.
        adapt: the adapter that is trained, in the scale of the word embedding.

    Raises:
        CordError: the checkpoint's tensors do not fit its configuration.
    """

    def __init__(
        self,
        config: WarmupConfig,
        layout: Layout,
        corpus: Corpus,
        prompts: PromptBuilder,
        arch: Architecture,
        encoder: AudioEncoder,
        adapt: Adapt,
    ) -> None:
        self._config, self._layout, self._corpus, self._prompts = config.distillation, layout, corpus, prompts
        self._end = prompts.response_ids("a")[-1]
        self._vocab_size = arch.language.vocab_size
        self._model = LALM(arch, layout, getattr(torch, config.dtype), LayerConfig("torch"))
        read_into(self._model, config.checkpoint)
        self._model.requires_grad_(False)
        assert self._model.audio_encoder is not None
        self._model.audio_encoder.load_state_dict(encoder.state_dict())
        self._model.adapter = cast(Adapter, _Adapted(adapt))

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield this rank's summands of the divergence over a step's batch, nats a token, a microbatch each."""
        size = self._config.batch_size
        batch = self._corpus.batch(step, size)
        total = sum(len(self._response(number)) for number in batch)
        own = [batch[place] for place in range(self._layout.rank, size, self._layout.world_size)]
        for microbatch in self._microbatches(own):
            yield self._divergence(microbatch) / total

    @torch.no_grad()
    def held_out_divergence(self) -> float:
        """Return the mean divergence of what is held out, nats a token. Collective over all ranks."""
        held_out = self._corpus.held_out[: self._config.measured]
        own = list(held_out[self._layout.rank :: self._layout.world_size])
        size = self._config.micro_batch_size
        total = 0.0
        for start in range(0, len(own), size):
            for microbatch in self._microbatches(own[start : start + size]):
                total += float(self._divergence(microbatch))
        tokens = sum(len(self._response(number)) for number in own)
        shares = all_gather_json([total, tokens])
        return float(sum(nats for nats, _ in shares) / sum(tokens for _, tokens in shares))

    def _divergence(self, batch: Microbatch) -> Tensor:
        """Return KL(read ‖ heard), summed over the response tokens of a microbatch."""
        assert batch.teacher is not None
        assert batch.teacher_rows is not None
        with torch.no_grad():
            read = self._hidden(batch.teacher, batch.teacher_rows)
        heard = self._hidden(batch.student, batch.student_rows)
        weight = self._model.output_weight.detach()

        def summed(stats: TokenStats, rows: slice) -> Tensor:
            return stats.kl.sum()

        total, _ = distillation_loss(
            summed,
            heard,
            weight,
            read,
            weight,
            batch.target_ids,
            kind="forward_kl",
            vocab_size=self._vocab_size,
            tp_group=self._layout.tp_group,
            check_finite=False,  # what is not finite is refused with its step
        )
        return total

    def _hidden(self, given: ModelInput, rows: Rows) -> Tensor:
        """Return the hidden states that predict the response, [n, H]."""
        hidden: Tensor = self._model(given)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows.rows)

    def _microbatches(self, numbers: Sequence[int]) -> list[Microbatch]:
        corpus, settings = self._corpus, self._config
        named = [corpus.utterances[number] for number in numbers]
        samples = [
            Sample(each.name, each.text, *heard, instruction=settings.instruction, system=settings.system)
            for each, heard in zip(named, corpus.recordings(numbers), strict=True)
        ]
        sequences = [
            TrainingSequence(made.prompts[HEAR], made.prompts[READ], self._scored(number), index)
            for index, (number, made) in enumerate(zip(numbers, self._prompts.prepare(samples), strict=True))
        ]
        layout = self._layout
        return make_microbatches(
            sequences,
            _Padded(self._config.micro_batch_size),
            self._prompts.pad_id,
            layout.sequence_sharding,
            layout.device,
        )

    def _response(self, number: int) -> tuple[int, ...]:
        """Return the transcript as an assistant's whole turn."""
        return (*self._corpus.utterances[number].token_ids, self._end)

    def _scored(self, number: int) -> ScoredRollout:
        ids = self._response(number)
        rollout = Rollout(self._corpus.utterances[number].name, ids, (0.0,) * len(ids), "stop", (), "")
        return ScoredRollout(rollout, "distill")
