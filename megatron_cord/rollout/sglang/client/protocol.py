"""Requests and replies as SGLang has them: what is sent for a prompt, and what a reply must be to be accepted."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from megatron_cord.data.audio.wav import encode_float_wav
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.rollout.chosen_experts import ChosenExperts
from megatron_cord.rollout.sglang.models import ServedModel
from megatron_cord.rollout.types import GenerationRequest

OLDEST_SGLANG = Version("0.5.21")  #: from here on servers have sessions for updates of their weights
_NO_PROBABILITY = -1e9  #: added to a logit


class BadReplyError(Exception):
    """A reply that cannot be what SGLang answers to this request."""


@dataclass(frozen=True)
class Piece:
    """What one reply brought.

    Attributes:
        token_ids: generated ones, with the one that ended it.
        logprobs: of each, as `Rollout` has them.
        reason: "stop" (the last token ended it), "length" or "abort".
        spans: (first, end, the server's name for the weights).
        best: the likeliest ids at the last position with their log-probabilities, if they were requested.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str
    spans: tuple[tuple[int, int, str], ...]
    best: tuple[tuple[int, float], ...] = ()


@dataclass
class PromptEncoder:
    """Writes prompts as servers take them: text as ids; audio as ids or text with one placeholder a clip, and samples.

    The project's processors take ids. SGLang's own tokenize text themselves, so the text is checked here to give the
    ids. A reply (``prompt_token_ids``) must show that the server had the trainer's ids in either case.

    Attributes:
        prompts: of the checkpoint.
        longest_prompt: tokens that servers take.
        model: what they run.
    """

    prompts: PromptBuilder
    longest_prompt: int
    model: ServedModel
    _audio: dict[int, tuple[Prompt, list[str]]] = field(default_factory=dict)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what would end a server or be answered otherwise than requested.

        Raises:
            CordError: names the sample.
        """
        prompt, where = request.prompt, f"sample {request.prompt.sample_id}"
        if request.max_new_tokens < 1 or request.temperature < 0:
            raise CordError(f"{where}: max_new_tokens must be at least 1 and the temperature not negative")
        if not prompt.token_ids or not all(0 <= token < self.prompts.vocab_size for token in prompt.token_ids):
            raise CordError(f"{where}: the prompt is empty or has ids outside 0..{self.prompts.vocab_size - 1}")
        marks = prompt.token_ids.count(self.prompts.audio_token_id)
        features = sum(clip.num_tokens for clip in prompt.clips)
        if marks != features:
            raise CordError(f"{where}: {marks} audio placeholders for {features} audio features; rebuild the prompt")
        if len(prompt.clips) > self.model.max_clips:
            raise CordError(
                f"{where}: SGLang takes at most {self.model.max_clips} clips a prompt of this model, not "
                f"{len(prompt.clips)}; use rollout.engine=local"
            )
        total = len(prompt.token_ids) + request.max_new_tokens
        if total > self.longest_prompt:
            raise CordError(
                f"{where}: {len(prompt.token_ids)} prompt tokens and {request.max_new_tokens} new ones, "
                f"the servers take {self.longest_prompt} in all; lower rollout.max_new_tokens, or give the servers "
                "more room (--context-length, --max-total-tokens)"
            )

    def encode(self, prompt: Prompt) -> dict[str, Any]:
        """Return `try_encode` of the prompt alone.

        Raises:
            CordError: no text tokenizes to it.
        """
        body = self.try_encode(prompt)
        if body is None:
            raise CordError(
                f"sample {prompt.sample_id}: no text tokenizes to its prompt, and SGLang takes audio with text alone; "
                "the checkpoint's chat template does not fit its tokenizer"
            )
        return body

    def try_encode(self, prompt: Prompt, more: Sequence[int] = ()) -> dict[str, Any] | None:
        """Return the prompt's part of a request, with the response so far; None if no text tokenizes to them."""
        if not prompt.clips:
            return {"input_ids": [*prompt.token_ids, *more]}
        body: dict[str, Any]
        if self.model.takes_ids:
            body = {"input_ids": [*self._once(prompt), *more]}
        else:
            text = self.prompts.text_of((*prompt.token_ids, *more))
            if text is None:
                return None
            body = {"text": text}
        if id(prompt) not in self._audio:  # the prompt is kept, too, so that its id stays its own
            wavs = [base64.b64encode(encode_float_wav(clip.waveform)).decode() for clip in prompt.clips]
            self._audio[id(prompt)] = prompt, [f"data:audio/wav;base64,{wav}" for wav in wavs]
        return body | {"audio_data": self._audio[id(prompt)][1], "return_prompt_token_ids": True}

    def _once(self, prompt: Prompt) -> list[int]:
        """Return the prompt's ids with one placeholder for each clip."""
        lengths, ids, left = (clip.num_tokens for clip in prompt.clips), list[int](), 0
        for token in prompt.token_ids:
            if token != self.prompts.audio_token_id:
                ids.append(token)
                continue
            if not left:
                left = next(lengths)
                ids.append(token)
            left -= 1
        return ids


def read_piece(reply: Any, sent: Prompt, more: Sequence[int], limit: int, vocab_size: int) -> Piece:
    """Read a reply to one prompt.

    Args:
        reply: from JSON.
        sent: the prompt, and
        more: the tokens behind it.
        limit: the most new tokens that were requested.
        vocab_size: ids are below it.

    Raises:
        BadReplyError: it is in another form, or its numbers cannot be.
        CordError: the server read another prompt than the trainer does.
    """
    try:
        meta = reply["meta_info"]
        pairs = [(float(entry[0]), _whole(entry[1])) for entry in meta.get("output_token_logprobs") or []]
        reason = str((meta["finish_reason"] or {})["type"])
        read = _whole(meta["prompt_tokens"])
        spans = _spans(meta, len(pairs))
        tops = meta.get("output_top_logprobs") or []
        best = tuple((_whole(entry[1]), float(entry[0])) for entry in tops[-1]) if tops else ()
        ids = tuple(map(_whole, reply["output_ids"]))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadReplyError(f"a reply in another form than SGLang 0.5.21's ({type(error).__name__}: {error})") from None
    if reason not in ("stop", "length", "abort"):
        raise BadReplyError(f"finish reason {reason!r}")
    if ids != tuple(token for _, token in pairs) or len(ids) > limit or (not ids and reason != "abort"):
        raise BadReplyError(f"{len(pairs)} log-probabilities for {len(ids)} tokens, of {limit} that were requested")
    if not all(0 <= token < vocab_size for token in ids) or not all(math.isfinite(p) and p <= 1e-3 for p, _ in pairs):
        raise BadReplyError("tokens outside the vocabulary, or log-probabilities that are none")
    wanted = (*sent.token_ids, *more)
    given = reply.get("prompt_token_ids")
    if reason != "abort" and (read != len(wanted) or (given is not None and tuple(given) != wanted)):
        raise CordError(
            f"sample {sent.sample_id}: the server read the prompt as {read} other tokens than the trainer's "
            f"{len(wanted)}; it has another tokenizer, chat template or feature extractor: "
            "serve the checkpoint that is trained"
        )
    return Piece(ids, tuple(min(p, 0.0) for p, _ in pairs), reason, spans, best)


def read_experts(reply: Any, sample_id: str, rows: int, experts: tuple[int, int] | None) -> ChosenExperts:
    """Read the experts that a server chose for the first `rows` tokens of prompt and response.

    Args:
        reply: from JSON, to a request for them.
        sample_id: for errors.
        rows: tokens.
        experts: layers, and experts a token.

    Raises:
        BadReplyError: they are in another form, or too few.
        CordError: the server returns none.
    """
    given = reply["meta_info"].get("routed_experts")
    if given is None or experts is None:
        raise CordError(
            f"sample {sample_id}: rollout.router_replay needs the experts that servers choose, and the server returns "
            "none; start servers of a mixture of experts with --enable-return-routed-experts (cord serve passes it on)"
        )
    try:
        numbers = np.frombuffer(base64.b64decode(given, validate=True), dtype="<i4").reshape(-1, *experts)
    except (TypeError, ValueError, binascii.Error) as error:
        raise BadReplyError(f"experts in another form than SGLang {OLDEST_SGLANG}'s ({error})") from None
    if len(numbers) < rows:
        raise BadReplyError(f"experts of {len(numbers)} tokens, of {rows} that it read")
    return ChosenExperts.of(torch.from_numpy(numbers[:rows].copy()))


def sampling(
    request: GenerationRequest, limit: int, seed: int, stop: Sequence[int], masked: Sequence[int] = (), best: int = 0
) -> dict[str, Any]:
    """Return the sampling part of a request; log-probabilities come with every answer.

    Args:
        request: its temperature, top_p and top_k.
        limit: the most new tokens.
        seed: of the server's noise, where that can be seeded.
        stop: ids that end the answer.
        masked: ids that cannot be sampled. Log-probabilities are then those of the others alone.
        best: how many of the likeliest ids at each position to return, too.
    """
    parameters: dict[str, Any] = {
        "temperature": request.temperature,
        "max_new_tokens": limit,
        "stop_token_ids": list(stop),
        "sampling_seed": seed,
        "skip_special_tokens": False,
        # Always given, whatever the server's defaults are.
        "top_p": request.top_p,
        "top_k": request.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    if masked:
        parameters["logit_bias"] = {str(token): _NO_PROBABILITY for token in masked}
    more: dict[str, Any] = {"top_logprobs_num": best} if best else {}
    if request.return_experts:
        more["return_routed_experts"] = True
    return {"sampling_params": parameters, "return_logprob": True} | more


def _spans(meta: dict[str, Any], count: int) -> tuple[tuple[int, int, str], ...]:
    """Return which weights made which tokens; a server may give one name for all of them."""
    spans = [(_whole(s["start"]), _whole(s["end"]), str(s["version"])) for s in meta.get("weight_versions") or []]
    spans = spans or [(0, count, str(meta["weight_version"]))]
    if not count:
        return ()
    edges = [0, *(end for _, end, _ in spans)]
    if [start for start, _, _ in spans] != edges[:-1] or edges[-1] != count:
        raise BadReplyError("weight versions that do not cover the tokens")
    return tuple(spans)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value
