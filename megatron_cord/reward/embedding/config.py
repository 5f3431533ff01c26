"""Which model embeds responses; it imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import check_endpoint_url


@dataclass(frozen=True)
class EmbeddingConfig:
    """The embedding model of reward.terms.embedding: files that are loaded here, or an endpoint."""

    #: a Hugging Face directory, or hf://OWNER/NAME, of an embedding model that transformers loads, on each rank
    checkpoint: str | None = None
    #: what of the last hidden states is the embedding: the last token's, the first token's, their mean; auto: as the
    #: checkpoint's 1_Pooling/config.json says
    pooling: Literal["auto", "last", "first", "mean"] = "auto"
    max_tokens: int = 8192  #: of a text; of a longer one the first so many count, and the run says so once
    batch_size: int = 16  #: texts that go through the model, or into a request, together
    base_url: str = ""  #: in place of checkpoint: an OpenAI-compatible endpoint with its version, http://host:port/v1
    model: str = ""  #: the name under which the endpoint serves it
    api_key_env: str | None = None  #: the environment variable that holds the endpoint's key; null sends none
    timeout: float = 30.0  #: seconds for one try of a request, connecting included
    tries: int = 5  #: of each request; then the run stops, as rewards without this term would be others
    backoff: float = 1.0  #: seconds before the second try; doubled before each further one

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.base_url:
            raise CordError("reward.embedding: checkpoint and base_url name two models; set one of them")
        if self.base_url:
            check_endpoint_url(self.base_url, "reward.embedding.base_url")
            if not self.model:
                raise CordError("reward.embedding.base_url needs reward.embedding.model, the name of the model there")
        if min(self.max_tokens, self.batch_size, self.tries) < 1 or self.timeout <= 0 or self.backoff < 0:
            raise CordError(
                "reward.embedding: max_tokens, batch_size and tries must be at least 1, timeout positive, backoff not "
                "negative"
            )

    @property
    def is_given(self) -> bool:
        """Whether a model is named."""
        return self.checkpoint is not None or bool(self.base_url)
