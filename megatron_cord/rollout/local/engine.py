"""The local engine: the plain model of the same checkpoint in this process, transformers' own where it has the class.

It takes weights as the same named tensors as a server would, so that conversion is exercised at every step even on a
laptop. Simplification: requests are answered batch by batch, not continuously.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.rollout.local.decoding import Response, TokenRules, sample_batch
from megatron_cord.rollout.local.gate import Gate
from megatron_cord.rollout.types import GenerationRequest, Rollout, WeightSource, spans_of
from megatron_cord.runtime.quiet import no_progress_bars


@dataclass(frozen=True)
class LocalEngineConfig:
    """How the local engine runs."""

    max_batch_size: int = 64  # responses generated together
    device: str = "cpu"  # a torch device
    dtype: torch.dtype | None = None  # of parameters and activations; None: the checkpoint's

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise CordError(f"max_batch_size is {self.max_batch_size}; it must be at least 1")


class LocalEngine:
    """A ``RolloutEngine`` on the checkpoint's `PlainModel`.

    Args:
        checkpoint_dir: a Hugging Face checkpoint.
        config: how it runs; None: by the defaults.
        prompts: the checkpoint's prompt builder; None: one is made.

    Attributes:
        weight_version: of the weights it generates with; 0 are the checkpoint's.
        prompts: the checkpoint's prompt builder.

    Raises:
        CordError: a directory without a whole checkpoint of a known family.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        config: LocalEngineConfig | None = None,
        prompts: PromptBuilder | None = None,
    ) -> None:
        self._config = config or LocalEngineConfig()
        self.prompts = prompts or PromptBuilder(checkpoint_dir)
        self._rules = TokenRules(self.prompts.eos_ids, self.prompts.special_ids, self.prompts.pad_id)
        with no_progress_bars():
            self._model: PlainModel | None = PlainModel(checkpoint_dir, self._config.dtype, self._config.device)
        self.weight_version = 0
        self._source: WeightSource | None = None
        self._changed: set[str] = set()  # tensors that are not the checkpoint's any more
        self._gate = Gate()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """Return one rollout a request, in their order; each depends on its request and the weights, not on the others.

        Raises:
            CordError: a prompt with ids outside the vocabulary, or placeholders that do not match its clips.
        """
        for request in requests:
            self._check(request)
        aborts = self._gate.aborts
        # Audio apart from text, as it takes the encoder; similar lengths together, as padding costs time.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        rollouts: dict[int, Rollout] = {}
        for has_audio in (False, True):
            group = [i for i in order if bool(requests[i].prompt.clips) == has_audio]
            for start in range(0, len(group), self._config.max_batch_size):
                batch = group[start : start + self._config.max_batch_size]
                responses, versions = self._sample([requests[i] for i in batch], aborts)
                for i, response in zip(batch, responses, strict=True):
                    rollouts[i] = self._rollout(requests[i], response, versions)
        return [rollouts[i] for i in range(len(requests))]

    def _sample(self, requests: list[GenerationRequest], aborts: int) -> tuple[list[Response], list[int]]:
        """Sample one batch; return also the version of the weights of each pass through the model."""
        versions: list[int] = []

        def between_tokens() -> bool:
            self._gate.pass_through()
            versions.append(self.weight_version)
            return self._gate.aborts == aborts

        with self._gate:
            versions.append(self.weight_version)
            if self._gate.aborts != aborts:
                return [Response((), (), "abort") for _ in requests], versions
            return sample_batch(self._loaded(), requests, self._rules, between_tokens), versions

    def pause(self) -> None:
        """Stop generation of other threads between two tokens; return when all have stopped.

        ``resume`` lets them go on in place. Keys and values of earlier tokens stay those of the weights that made them.
        """
        self._gate.close()

    def resume(self) -> None:
        """End a pause."""
        self._gate.open()

    def abort(self) -> None:
        """End calls of ``generate`` in other threads after their present token, unfinished ones with "abort"."""
        self._gate.abort()

    @torch.no_grad()
    def update_weights(self, source: WeightSource, version: int) -> None:
        """Copy the source's trained tensors in place, by name; the rest stays.

        Raises:
            CordError: an unknown name or another shape. Earlier tensors are then already in place, and the version is
                the old one: update again or discard the engine.
        """
        model = self._loaded()
        self._source = source
        for name, tensor in source.tensors(full=False):
            parameter = model.parameter(name)
            if parameter is None:
                nearest = ", ".join(difflib.get_close_matches(name, model.parameters, n=3)) or "none"
                raise CordError(f"weight update: the model has no tensor {name!r}; nearest: {nearest}")
            if parameter.shape != tensor.shape:
                raise CordError(
                    f"weight update: {name} has shape {list(tensor.shape)}, the model's has {list(parameter.shape)}"
                )
            parameter.copy_(tensor)
            self._changed.add(name)
        self.weight_version = version

    def rebases(self) -> bool:
        """Return True: the checkpoint's files are at hand."""
        return True

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """Have the checkpoint's weights, from its files, within the context; those of the last update after it.

        All ranks together. After an error within the context the engine is not to be used.
        """
        if self._source is None:
            yield
            return
        self._loaded().restore(self._changed)
        yield
        self.update_weights(self._source, self.weight_version)

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self._model, self._source = None, None

    def _loaded(self) -> PlainModel:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        return self._model

    def _check(self, request: GenerationRequest) -> None:
        prompt = request.prompt
        if request.max_new_tokens < 1:
            raise CordError(
                f"sample {prompt.sample_id}: max_new_tokens is {request.max_new_tokens}; request at least one token"
            )
        if request.temperature < 0:
            raise CordError(
                f"sample {prompt.sample_id}: the temperature is {request.temperature}; it must not be negative"
            )
        if not prompt.token_ids or not all(0 <= token < self.prompts.vocab_size for token in prompt.token_ids):
            raise CordError(
                f"sample {prompt.sample_id}: the prompt is empty or has ids outside 0..{self.prompts.vocab_size - 1}"
            )
        placeholders = prompt.token_ids.count(self.prompts.audio_token_id)
        features = sum(clip.num_tokens for clip in prompt.clips)
        if placeholders != features:
            raise CordError(
                f"sample {prompt.sample_id}: {placeholders} audio placeholders for {features} audio features; "
                "rebuild the prompt"
            )

    def _rollout(self, request: GenerationRequest, response: Response, versions: Sequence[int]) -> Rollout:
        return Rollout(
            prompt_id=request.prompt.sample_id,
            token_ids=response.token_ids,
            logprobs=response.logprobs,
            finish_reason=response.finish_reason,
            versions=spans_of(versions[: len(response.token_ids)]),
            text=self.prompts.decode(response.token_ids),
            experts=response.experts,
        )
