"""A response in the making: the next request that it needs, and what the answers add to it.

Some tokens must never be sampled (an audio placeholder would need audio that is not there). Masking them on the server
would change the log-probabilities, which SGLang takes after masks. So they end the server's answer instead, are
dropped, and the position is drawn again: a sampled response is then one of the masked distribution, with
log-probabilities of the unmasked one; a greedy response takes the likeliest token that is allowed, and so does one
whose top_p or top_k leave, draw after draw, none but these. A trained model hardly ever needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

from megatron_cord.rollout.chosen_experts import ChosenExperts
from megatron_cord.rollout.sglang.client.protocol import (
    BadReplyError,
    Piece,
    PromptEncoder,
    read_experts,
    read_piece,
    sampling,
)
from megatron_cord.rollout.types import GenerationRequest, Rollout, spans_of

_DRAWS = 16  #: of one position in vain, after which the tokens left by top_p and top_k are taken for forbidden ones
_GREEDY = 1e-6  #: below this temperature SGLang takes the likeliest token, so that another draw would be the same


class PartialResponse:
    """One request's response.

    Args:
        request: checked by `PromptEncoder.check`.
        encoder: writes prompts as servers take them.

    Attributes:
        finish_reason: None until it is whole.
    """

    def __init__(self, request: GenerationRequest, encoder: PromptEncoder) -> None:
        self.request = request
        self._encoder, self._prompts = encoder, encoder.prompts
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._experts: ChosenExperts | None = None
        self._draws = 0
        self._in_vain = 0  # draws of the present position
        self._likeliest = False  # the next token is chosen here, of the likeliest ones
        self._masked = False  # the server masks: no text makes it draw a position again
        self.finish_reason: Literal["stop", "length"] | None = None

    def next_request(self) -> dict[str, Any]:
        """Return the body of the next request, but for its name."""
        prompt = self._encoder.try_encode(self.request.prompt, self._ids)
        if prompt is None:
            self._begin_masked()
            prompt = self._encoder.encode(self.request.prompt)
        limit = 1 if self._likeliest else self.request.max_new_tokens - len(self._ids)
        forbidden = self._prompts.special_ids
        stop = self._prompts.eos_ids if self._masked else (*self._prompts.eos_ids, *forbidden)
        best = len(forbidden) + 1 if self._likeliest else 0
        return prompt | sampling(self.request, limit, self._seed(), stop, forbidden if self._masked else (), best)

    def add(self, reply: Any, version_of: Callable[[str], int]) -> bool:
        """Add the answer to the last request; return whether the response is whole now.

        Args:
            reply: from JSON.
            version_of: the version that a server's name for weights means; raises what ends this attempt.

        Raises:
            BadReplyError: the answer cannot be one, or was cut short by the server.
        """
        limit = 1 if self._likeliest else self.request.max_new_tokens - len(self._ids)
        piece = read_piece(reply, self.request.prompt, self._ids, limit, self._prompts.vocab_size)
        if piece.reason == "abort":
            raise BadReplyError("it ended the response by itself")
        versions = [version_of(name) for start, end, name in piece.spans for _ in range(start, end)]
        ids, logprobs = list(piece.token_ids), list(piece.logprobs)
        forbidden = set(self._prompts.special_ids)
        redraw = ids[-1] in forbidden
        if any(token in forbidden for token in ids[:-1]) or (redraw and self._masked):
            raise BadReplyError("it went on after a token that ends the answer")
        if piece.reason == "length" and len(ids) < limit:
            raise BadReplyError(f"it cut the response after {len(ids)} of {limit} tokens")
        if redraw and self._likeliest:
            ids[-1], logprobs[-1] = self._allowed(piece, forbidden)
            redraw = False
        kept = len(ids) - redraw
        self._in_vain = (self._in_vain if kept == 0 else 0) + redraw
        none_left = self.request.is_truncated and self._in_vain >= _DRAWS
        self._likeliest = redraw and (self.request.temperature < _GREEDY or none_left)
        self._draws += redraw
        self._ids += ids[:kept]
        self._logprobs += logprobs[:kept]
        self._versions += versions[:kept]
        if self._ids and self._ids[-1] in self._prompts.eos_ids:
            self.finish_reason = "stop"
        elif len(self._ids) == self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.request.return_experts:
            rows = len(self.request.prompt.token_ids) + len(self._ids) - 1  # the last request read all of them
            self._experts = read_experts(reply, self.request.prompt.sample_id, rows, self._encoder.model.experts)
        return self.finish_reason is not None

    def rollout(self) -> Rollout:
        """Return the whole response."""
        assert self.finish_reason is not None
        ids = tuple(self._ids)
        return Rollout(
            self.request.prompt.sample_id,
            ids,
            tuple(self._logprobs),
            self.finish_reason,
            spans_of(self._versions),
            self._prompts.decode(ids),
            self._experts,
        )

    def _allowed(self, piece: Piece, forbidden: set[int]) -> tuple[int, float]:
        for token, logprob in piece.best:
            if token not in forbidden:
                return token, logprob
        raise BadReplyError(f"of {len(piece.best)} likeliest tokens none is allowed")

    def _begin_masked(self) -> None:
        self._ids, self._logprobs, self._versions = [], [], []
        self._likeliest, self._masked = False, True

    def _seed(self) -> int:
        """Return 31 bits that depend on the request alone, and on how often a position was drawn again."""
        name = f"{self.request.seed}\n{self.request.prompt.sample_id}\n{self._draws}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") >> 1


def aborted(request: GenerationRequest) -> Rollout:
    """Return what stands for a response that was not made."""
    return Rollout(request.prompt.sample_id, (), (), "abort", (), "")
