"""The LLM judge: a language model behind an OpenAI-compatible endpoint (SGLang, vLLM, a hosted one) compares answers.

Answers are structured and parsed strictly, kept on disk, and asked for with bounded concurrency, time and tries. Where the judge gives none,
answer matching decides; that is counted, and said once a step.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from megatron_cord.errors import CordError
from megatron_cord.reward.comparison import Comparison, Verdict, answers_match
from megatron_cord.reward.judge.cache import JudgeCache
from megatron_cord.reward.judge.client import NoAnswerError, RefusedError, chat
from megatron_cord.reward.judge.prompt import ANSWER_SCHEMA, messages, parse_answer
from megatron_cord.runtime.log import say


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge, and how long it is waited for."""

    base_url: str = ""  #: of the endpoint, with its version: http://localhost:30000/v1
    model: str = ""  #: the name under which the endpoint serves it
    api_key_env: str | None = None  #: the environment variable that holds the key; null sends none
    concurrency: int = 8  #: questions in flight, of each rank
    timeout: float = 30.0  #: seconds for one try, and as many to connect
    tries: int = 3  #: of each question; then answer matching decides
    backoff: float = (
        0.5  #: seconds before the second try; doubled before each further one, with up to half of it at random on top
    )
    max_tokens: int = (
        16  #: of an answer; more for a judge that thinks first is of no use, as only the JSON object counts
    )

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if "@" in url.netloc:
            raise CordError(
                "reward.judge.base_url holds a name or a password, which would reach logs; use reward.judge.api_key_env"
            )
        if self.base_url and (
            url.scheme not in ("http", "https") or not url.hostname or url.port == 0
        ):  # reading a port that is none raises
            raise CordError(f"reward.judge.base_url must look like http://host:port/v1, but is {self.base_url!r}")
        if min(self.concurrency, self.tries, self.max_tokens) < 1 or self.timeout <= 0 or self.backoff < 0:
            raise CordError(
                "reward.judge: concurrency, tries and max_tokens must be at least 1, timeout positive, backoff not negative"
            )


class Judge:
    """A Comparer.

    Args:
        config: which judge.
        cache_directory: where its answers are kept.
        writer: the number of this process's file there.

    Raises:
        CordError: the key's environment variable is not set.
    """

    def __init__(self, config: JudgeConfig, cache_directory: Path, writer: int = 0) -> None:
        self.config = config
        self._key = None
        if config.api_key_env is not None:
            self._key = os.environ.get(config.api_key_env)
            if not self._key:
                raise CordError(
                    f"the environment variable {config.api_key_env}, named by reward.judge.api_key_env, is not set"
                )
        self._cache = JudgeCache(cache_directory, writer)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict each, in the same order; equal ones are asked once.

        Raises:
            CordError: the endpoint refuses the key, the address or the model.
        """
        payloads = {_key(payload): payload for payload in map(self._payload, comparisons)}
        unknown = [key for key in payloads if self._cache.get(key) is None]
        problems: list[str] = []
        if unknown:
            with ThreadPoolExecutor(self.config.concurrency) as pool:
                found = pool.map(lambda key: self._ask(key, payloads[key]), unknown)
                problems = [problem for problem in found if problem is not None]
        if problems:
            say(
                f"the judge gave no answer to {len(problems)} of {len(unknown)} questions ({problems[0]}); answers are matched instead"
            )
        return [self._verdict(comparison) for comparison in comparisons]

    def _verdict(self, comparison: Comparison) -> Verdict:
        answer, matched = self._cache.get(_key(self._payload(comparison))), answers_match(comparison)
        return Verdict(matched, matched, "fallback") if answer is None else Verdict(answer, matched, "judge")

    def _payload(self, comparison: Comparison) -> dict[str, object]:
        return {
            "model": self.config.model,
            "messages": messages(comparison),
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": ANSWER_SCHEMA},
            },
        }

    def _ask(self, key: str, payload: dict[str, object]) -> str | None:
        """Keeps the judge's answer; or says why there is none."""
        problem = None
        for attempt in range(self.config.tries):
            if attempt:
                time.sleep(self.config.backoff * 2 ** (attempt - 1) * (1 + random.random() / 2))
            try:
                self._cache.put(key, parse_answer(chat(self.config.base_url, payload, self._key, self.config.timeout)))
                return None
            except RefusedError as error:
                raise CordError(
                    f"the judge at {self.config.base_url} refuses model {self.config.model} ({error}); look at reward.judge"
                ) from None
            except NoAnswerError as error:
                problem = str(error)
                if not error.retry:
                    break
            except ValueError as error:
                problem = str(error)
        return problem


def _key(payload: dict[str, object]) -> str:
    """Everything that the answer may depend on."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
