"""The stages without the language model on one rank: the loss of a step, and the token error on what is held out.

1. CTC of the recognizer over the encoder's states, in which the encoder may learn, too.
2. Regression of the checkpoint's adapter, by the mean squared error, onto the embeddings that the recognizer expects,
   at the adapter's own fixed rate of tokens.
3. Distillation (`distillation`), which trains the same adapter.

While it is trained, the adapter's last layer is divided by the word embedding's root mean square: outputs have a mean
square of about 1 whatever the checkpoint's scale, and AdamW's steps, which do not depend on the gradient's scale, are
in proportion to the weights.
Legend: N tokens of audio, H width of the language model, K tokens that are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_cord.data.audio.features import stack_features
from megatron_cord.model.adapters import Adapter, LinearAdapter
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.parallel.transfers import to_device
from megatron_cord.warmup.config import WarmupConfig
from megatron_cord.warmup.corpus import Corpus
from megatron_cord.warmup.parts import Parts
from megatron_cord.warmup.recognizer import (
    Recognizer,
    ctc_losses,
    expected_embeddings,
    nearest_classes,
    reading_losses,
    stack,
)
from megatron_cord.warmup.states import EncoderStates
from megatron_cord.warmup.token_errors import TokenErrors, collapse, count_errors
from megatron_cord.warmup.trained_encoder import TrainedEncoder

_CHUNK = 32  # utterances that are measured together


class Stages:
    """Both of these stages on this rank.

    Args:
        config: of the warm-up.
        layout: the ranks.
        corpus: the utterances.
        states: of the encoder; where that learns, they are there once `keep_encoder` was called.
        parts: of the checkpoint; the adapter is changed, and the encoder where it learns.
        filler: token whose embedding stands for no token; None for zeros.

    Attributes:
        recognizer: fp32.
        encoder: while it learns and after; None if it does not.
        adapter: fp32, its outputs in units of `unit`.
        unit: root mean square of the rows.
        num_classes: K.
    """

    def __init__(
        self,
        config: WarmupConfig,
        layout: Layout,
        corpus: Corpus,
        states: EncoderStates,
        parts: Parts,
        filler: int | None,
    ) -> None:
        self._config, self._layout, self._corpus, self._states, self._parts = config, layout, corpus, states, parts
        assert parts.arch.adapter is not None
        assert parts.arch.encoder is not None
        vocabulary = sorted({token for each in corpus.train for token in each.token_ids})
        self._class_of = {token: number for number, token in enumerate(vocabulary, 1)}
        rows = parts.embedding_rows(vocabulary, layout.device)
        self.unit = float(rows.square().mean().sqrt())
        self._rows = rows / self.unit
        self._filler = torch.zeros_like(self._rows[0])
        if filler is not None:
            self._filler = parts.embedding_rows([filler], layout.device)[0] / self.unit
        self._stride = parts.arch.adapter.stride
        width = self._stride * parts.arch.encoder.hidden_size
        self.recognizer = Recognizer(width, config.ctc.hidden_size, self._rows, config.seed).to(layout.device)
        self.encoder: TrainedEncoder | None = None
        if config.ctc.encoder_learning_rate:
            self.encoder = TrainedEncoder(parts.encoder, parts.encoder_weights(layout.device))
        self._learns = self.encoder is not None
        self.adapter = parts.adapter
        scale_output(self.adapter, 1 / self.unit)

    @property
    def num_classes(self) -> int:
        """How many tokens are told apart."""
        return len(self._class_of)

    @property
    def ctc_module(self) -> nn.Module:
        """What the first stage trains; the encoder's weights have names that begin with "encoder."."""
        if self.encoder is None:
            return self.recognizer
        return nn.ModuleDict({"recognizer": self.recognizer, "encoder": self.encoder})

    @property
    def unknown_tokens(self) -> int:
        """How many tokens of what is held out occur in no transcript that is trained on, and are errors therefore."""
        held_out = (self._corpus.utterances[number] for number in self._corpus.held_out)
        return sum(token not in self._class_of for each in held_out for token in each.token_ids)

    def recognizer_loss(self, step: int) -> Tensor:
        """Return this rank's summand of the CTC loss of a step's batch: -log p a token, averaged over utterances."""
        settings = self._config.ctc
        batch = self._corpus.batch(step, settings.batch_size)
        places = self._own(settings.batch_size)
        numbers = [batch[place] for place in places]
        noise = [self._noise(step, place, self._tokens([batch[place]])[0]) for place in places]
        stacks = self._stacks(numbers) + settings.noise * torch.cat(noise).to(self._layout.device)
        with self._precision():
            logits = self.recognizer(stacks)
        targets = [[self._class_of[t] for t in self._corpus.utterances[number].token_ids] for number in numbers]
        return ctc_losses(logits, self._tokens(numbers), targets).sum() / settings.batch_size

    def keep_encoder(self) -> None:
        """End the encoder's learning: from now on its states are read."""
        if self.encoder is not None:
            self.encoder.store(self._parts.stored_dtype)
            self._learns = False

    def regression_loss(self, step: int) -> Tensor:
        """Return this rank's summand of the regression's loss over a step's batch.

        That is the mean squared error, in squares of `unit`, and a share of the mean of `reading_losses`.
        """
        settings = self._config.regression
        size = settings.batch_size
        batch = self._corpus.batch(step, size)
        numbers = [batch[place] for place in self._own(size)]
        with torch.no_grad():
            with self._precision():
                logits = self.recognizer(self._stacks(numbers))
            wanted = expected_embeddings(logits, self._rows, self._filler)
        found = self._adapt(numbers)
        losses = (found - wanted).square().mean(-1)
        if settings.reading:
            losses = losses + settings.reading * reading_losses(found, logits.softmax(-1), self._rows, self._filler)
        return losses.sum() / sum(self._tokens(batch))

    def recognizer_errors(self) -> TokenErrors:
        """Return the errors of what the recognizer reads in what is held out. Collective over all ranks."""

        def read(numbers: Sequence[int]) -> Tensor:
            with self._precision():
                classes: Tensor = self.recognizer(self._stacks(numbers)).argmax(-1)
            return classes

        return self._errors(read)

    def adapter_errors(self, unit: float = 1.0) -> TokenErrors:
        """Return the errors of the adapter, whose outputs are read as the nearest rows. Collective over all ranks.

        Args:
            unit: of its outputs.
        """
        return self._errors(lambda numbers: nearest_classes(self._adapt(numbers) / unit, self._rows, self._filler))

    def adapt(self, states: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Return the adapter's outputs in the scale of the word embedding, [N, H], for the language model."""
        return self._outputs(states, counts, tokens) * self.unit

    @torch.no_grad()
    def finish(self) -> None:
        """Give the adapter the scale and the precision with which it is written."""
        scale_output(self.adapter, self.unit)
        for parameter in self.adapter.parameters():
            parameter.copy_(parameter.to(self._parts.stored_dtype))

    @torch.no_grad()
    def _errors(self, read: Callable[[Sequence[int]], Tensor]) -> TokenErrors:
        """Sum the errors of what is held out over all ranks; `read` returns classes, int64 [N]."""
        found = TokenErrors()
        own = self._corpus.held_out[self._layout.rank :: self._layout.world_size]
        for start in range(0, len(own), _CHUNK):
            numbers = own[start : start + _CHUNK]
            rows = torch.split(read(numbers).cpu(), self._tokens(numbers))
            for number, classes in zip(numbers, rows, strict=True):
                transcript = [self._class_of.get(token) for token in self._corpus.utterances[number].token_ids]
                found += count_errors(collapse(classes.tolist()), transcript)
        shares = all_gather_json([found.errors, found.tokens])
        return TokenErrors(sum(errors for errors, _ in shares), sum(tokens for _, tokens in shares))

    def _adapt(self, numbers: Sequence[int]) -> Tensor:
        """Return the adapter's outputs for utterances, float32 [N, H]."""
        states = torch.cat([self._states.read(number) for number in numbers]).to(self._layout.device)
        counts = [self._states.counts[number] for number in numbers]
        return self._outputs(states, counts, self._tokens(numbers)).float()

    def _outputs(self, states: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        # In the precision of a run, whose weights are copies of fp32 ones, too.
        weights = {name: parameter.to(states.dtype) for name, parameter in self.adapter.named_parameters()}
        outputs: Tensor = functional_call(self.adapter, weights, (states, counts, tokens))
        return outputs

    def _stacks(self, numbers: Sequence[int]) -> Tensor:
        if self._learns:
            assert self.encoder is not None
            clips = self._corpus.clips(numbers)
            features = to_device(stack_features([clip.features for clip in clips]), self._layout.device)
            encoded = self.encoder(features, [clip.num_frames for clip in clips])
            states = list(torch.split(encoded, [self._states.counts[number] for number in numbers]))
        else:
            states = [self._states.read(number) for number in numbers]
        return stack(states, self._tokens(numbers), self._stride).to(self._layout.device)

    def _tokens(self, numbers: Sequence[int]) -> list[int]:
        return [self._corpus.utterances[number].num_tokens for number in numbers]

    def _own(self, size: int) -> range:
        """Return this rank's places in a batch."""
        return range(self._layout.rank, size, self._layout.world_size)

    def _noise(self, step: int, place: int, tokens: int) -> Tensor:
        """Draw noise of an utterance's stacks on the host: the same on any layout, and after any stop."""
        seed = int(np.random.SeedSequence((self._config.seed, step, place)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed >> 1)
        return torch.randn(tokens, self.recognizer.norm.normalized_shape[0], generator=generator)

    def _precision(self) -> Any:
        bfloat16 = self._config.dtype == "bfloat16"
        return torch.autocast(self._layout.device.type, torch.bfloat16, enabled=bfloat16)


@torch.no_grad()
def scale_output(adapter: Adapter, factor: float) -> None:
    """Multiply what an adapter puts out, by its last layer."""
    last = adapter.linear if isinstance(adapter, LinearAdapter) else adapter.linear2
    last.weight.mul_(factor)
    if last.bias is not None:
        last.bias.mul_(factor)
