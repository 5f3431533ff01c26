"""An embedding model behind an OpenAI-compatible endpoint: POST embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.reward.embedding.config import EmbeddingConfig
from megatron_cord.runtime.openai_client import EndpointError, OpenAIClient, Patience


class EndpointEmbedder:
    """An `Embedder` of an endpoint.

    Args:
        config: address, model and patience.

    Raises:
        CordError: the key's environment variable is not set.
    """

    def __init__(self, config: EmbeddingConfig) -> None:
        if config.api_key_env is not None and not os.environ.get(config.api_key_env):
            raise CordError(
                f"the environment variable {config.api_key_env}, named by reward.embedding.api_key_env, is not set"
            )
        self._config = config
        self._client = OpenAIClient(
            config.base_url,
            api_key_env=config.api_key_env,
            patience=Patience(config.timeout, config.tries, config.backoff),
            name="reward.embedding.base_url",
        )

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return float32 [texts, D] in the texts' order, as the endpoint gives them.

        Raises:
            CordError: the endpoint refuses the request, or does not serve after all tries.
        """
        size, parts = self._config.batch_size, []
        for start in range(0, len(texts), size):
            portion = list(texts[start : start + size])
            try:
                parts.append(
                    self._client.post(
                        "embeddings",
                        parse=partial(_embeddings, count=len(portion)),
                        json={"model": self._config.model, "input": portion},
                    )
                )
            except EndpointError as error:
                raise CordError(f"reward.embedding: {error}; the same command goes on when it serves") from None
        return torch.cat(parts) if parts else torch.zeros(0, 0)


def _embeddings(body: bytes, count: int) -> Tensor:
    """Return float32 [count, D] of a reply. Raises ValueError for another one."""
    try:
        entries = json.loads(body)["data"]
        vectors = torch.tensor([entry["embedding"] for entry in sorted(entries, key=lambda e: int(e["index"]))])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("a reply that is not of the embeddings protocol") from None
    if vectors.dim() != 2 or len(vectors) != count or not vectors.isfinite().all():
        raise ValueError(f"a reply of other than {count} embeddings of finite numbers")
    return vectors.float()
