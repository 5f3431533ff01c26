"""The LLM judge: a language model at an OpenAI-compatible endpoint (SGLang, vLLM, a hosted one) compares answers.

It rates answers without a reference, and verifies reasoning. What it says has a schema, is parsed strictly and kept on
disk; concurrency, time and tries are bounded. Where it gives no verdict, answer matching decides; that is counted, and
logged once a step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.reward.comparison import Comparison, Verdict, answers_match
from megatron_cord.reward.judge.cache import JudgeCache
from megatron_cord.reward.judge.prompt import ANSWER_SCHEMA, messages, parse_answer
from megatron_cord.reward.judge.rating import RATING_SCHEMA, OpenAnswer, parse_rating, rating_messages
from megatron_cord.reward.judge.reasoning import REASONING_SCHEMA, Reasoning, parse_soundness, reasoning_messages
from megatron_cord.runtime.openai_client import (
    AccessRefusedError,
    EndpointError,
    OpenAIClient,
    Patience,
    check_endpoint_url,
)

logger = logging.getLogger(__name__)

_MAX_REPLY_BYTES = 1 << 20


@dataclass(frozen=True)
class JudgeConfig:
    """Address, model and patience of the judge."""

    base_url: str = ""  #: of the endpoint, with its version: http://localhost:30000/v1
    model: str = ""  #: the name under which the endpoint serves it
    api_key_env: str | None = None  #: the environment variable that holds the key; null sends none
    concurrency: int = 8  #: comparisons in flight, of each rank
    timeout: float = 30.0  #: seconds for one try, connecting included
    tries: int = 3  #: of each comparison; then answer matching decides
    #: seconds before the second try; doubled before each further one, with up to half of it at random on top
    backoff: float = 0.5
    #: of an answer; more for a judge that reasons first is of no use, as only the JSON object counts
    max_tokens: int = 16

    def __post_init__(self) -> None:
        if self.base_url:
            check_endpoint_url(self.base_url, "reward.judge.base_url")
        if min(self.concurrency, self.tries, self.max_tokens) < 1 or self.timeout <= 0 or self.backoff < 0:
            raise CordError(
                "reward.judge: concurrency, tries and max_tokens must be at least 1, timeout positive, "
                "backoff not negative"
            )

    @property
    def is_given(self) -> bool:
        """Whether there is a judge."""
        return bool(self.base_url and self.model)


class Judge:
    """A `Comparer`, and a `Verifier`.

    Args:
        config: address, model and patience.
        cache_directory: of its answers.
        writer: the number of this process's file there.

    Raises:
        CordError: the key's environment variable is not set.
    """

    def __init__(self, config: JudgeConfig, cache_directory: Path, writer: int = 0) -> None:
        if config.api_key_env is not None and not os.environ.get(config.api_key_env):
            raise CordError(
                f"the environment variable {config.api_key_env}, named by reward.judge.api_key_env, is not set"
            )
        self.config = config
        self._client = OpenAIClient(
            config.base_url,
            api_key_env=config.api_key_env,
            patience=Patience(config.timeout, config.tries, config.backoff),
            max_reply_bytes=_MAX_REPLY_BYTES,
            name="reward.judge.base_url",
        )
        self._cache = JudgeCache(cache_directory, writer)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict each, in the same order; equal comparisons are sent once.

        Raises:
            CordError: the endpoint refuses the key, the address or the model.
        """
        payloads = {_key(payload): payload for payload in map(self._payload, comparisons)}
        unknown = {key: payload for key, payload in payloads.items() if self._cache.get(key) is None}
        if problems := self._answer(unknown, parse_answer):
            logger.warning(
                "the judge gave no answer to %d of %d questions (%s); rewards compare these by rules instead",
                len(problems),
                len(unknown),
                problems[0],
            )
        return [self._verdict(comparison) for comparison in comparisons]

    def rate(self, answers: Sequence[OpenAnswer]) -> list[int]:
        """Return a rating from 1 to 5 for each, in the same order; equal ones are sent once.

        Raises:
            CordError: the endpoint refuses the key, the address or the model, or some have no rating after all tries;
                the others are kept.
        """
        payloads = {answer: self._request(rating_messages(answer), "rating", RATING_SCHEMA) for answer in answers}
        keys = {answer: _key(payload) for answer, payload in payloads.items()}
        unknown = {key: payloads[answer] for answer, key in keys.items() if self._cache.rating(key) is None}
        if problems := self._answer(unknown, parse_rating):
            raise CordError(
                f"the judge gave no rating to {len(problems)} of {len(answers)} responses ({problems[0]}); the others "
                "are kept: start again when it answers"
            )
        return [rating for answer in answers if (rating := self._cache.rating(keys[answer])) is not None]

    def verify(self, given: Sequence[Reasoning]) -> list[bool | None]:
        """Return for each whether its reasoning is sound, in the same order; None where there is no verdict.

        Raises:
            CordError: the endpoint refuses the key, the address or the model.
        """
        payloads = {each: self._request(reasoning_messages(each), "soundness", REASONING_SCHEMA) for each in given}
        keys = {each: _key(payload) for each, payload in payloads.items()}
        unknown = {key: payloads[each] for each, key in keys.items() if self._cache.get(key) is None}
        if problems := self._answer(unknown, parse_soundness):
            logger.warning(
                "the judge gave no verdict on the reasoning of %d of %d responses (%s); they count as unsound",
                len(problems),
                len(unknown),
                problems[0],
            )
        return [self._cache.get(keys[each]) for each in given]

    def _answer(self, unknown: Mapping[str, dict[str, object]], parse: Callable[[Any], bool | int]) -> list[str]:
        """Get answers to requests into the cache; return the reasons for which some have none."""
        if not unknown:
            return []
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            results = pool.map(lambda key: self._judge(key, unknown[key], parse), unknown)
            return [problem for problem in results if problem is not None]

    def _verdict(self, comparison: Comparison) -> Verdict:
        answer, matched = self._cache.get(_key(self._payload(comparison))), answers_match(comparison)
        return Verdict(matched, matched, "fallback") if answer is None else Verdict(answer, matched, "judge")

    def _payload(self, comparison: Comparison) -> dict[str, object]:
        return self._request(messages(comparison), "verdict", ANSWER_SCHEMA)

    def _request(self, chat: list[dict[str, str]], name: str, schema: dict[str, object]) -> dict[str, object]:
        return {
            "model": self.config.model,
            "messages": chat,
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": name, "strict": True, "schema": schema},
            },
        }

    def _judge(self, key: str, payload: dict[str, object], parse: Callable[[Any], bool | int]) -> str | None:
        """Get an answer into the cache; return the reason where there is none."""
        try:
            answer = self._client.post("chat/completions", parse=lambda body: parse(_content(body)), json=payload)
        except AccessRefusedError as error:
            raise CordError(f"the judge refuses model {self.config.model}; check reward.judge: {error}") from None
        except EndpointError as error:
            return str(error)
        self._cache.put(key, answer)
        return None


def _content(body: bytes) -> Any:
    """Return what the model wrote in a reply of the chat protocol. Raises ValueError for another one."""
    try:
        return json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise ValueError("a reply that is not of the chat protocol") from None


def _key(payload: dict[str, object]) -> str:
    """Return a hash of everything that the answer may depend on."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
