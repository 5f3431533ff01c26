"""An embedding model that transformers loads in this process, such as Qwen3-Embedding or a sentence encoder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.reward.embedding.config import EmbeddingConfig
from megatron_cord.runtime.quiet import no_progress_bars

logger = logging.getLogger(__name__)
#: sentence-transformers' names of poolings, and ours
_POOLINGS = {"pooling_mode_lasttoken": "last", "pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}


class CheckpointEmbedder:
    """An `Embedder` of a Hugging Face directory.

    Args:
        config: with a checkpoint.
        device: where it computes.

    Raises:
        CordError: the directory is none of an embedding model, or does not say how its states are pooled.
    """

    def __init__(self, config: EmbeddingConfig, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer  # takes seconds to import

        assert config.checkpoint is not None
        try:
            directory = checkpoint_directory(config.checkpoint)
        except CordError as error:
            raise CordError(f"reward.embedding.checkpoint: {error}") from None
        self._config, self._device, self._has_warned = config, device, False
        self._pooling = _find_pooling(directory) if config.pooling == "auto" else config.pooling
        try:
            with no_progress_bars():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
                model: Any = AutoModel.from_pretrained(
                    directory, dtype="auto", local_files_only=True, use_safetensors=True
                )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CordError(f"reward.embedding.checkpoint={config.checkpoint} cannot be loaded ({why})") from None
        _check_modules(directory)
        # A longer text than there are positions for would be an error of torch's in the middle of a run.
        self._limit: int = min(config.max_tokens, getattr(model.config, "max_position_embeddings", config.max_tokens))
        self._model = model.to(device).eval()
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token_id is None:
            raise CordError(f"reward.embedding.checkpoint={config.checkpoint}: its tokenizer has no token to pad with")

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return float32 [texts, D] in the texts' order, in host memory.

        Raises:
            CordError: a text of which the tokenizer makes no token.
        """
        size = self._config.batch_size
        parts = [self._embed(list(texts[start : start + size])) for start in range(0, len(texts), size)]
        return torch.cat(parts) if parts else torch.zeros(0, 0)

    def _embed(self, texts: list[str]) -> Tensor:
        limit = self._limit
        whole: list[list[int]] = self._tokenizer(texts)["input_ids"]
        ids, longest = [encoded[:limit] for encoded in whole], max(map(len, whole))
        if longest > limit and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a response has %d tokens of the embedding model: of such ones the first %d count "
                "(reward.embedding.max_tokens, or the model's positions)",
                longest,
                limit,
            )
        if empty := [text for text, encoded in zip(texts, ids, strict=True) if not encoded]:
            raise CordError(f"reward.embedding.checkpoint: its tokenizer makes no token of {empty[0]!r}")
        padded = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._device)
        hidden = self._model(**{key: padded[key] for key in ("input_ids", "attention_mask")}).last_hidden_state.float()
        return _pooled(hidden, padded["attention_mask"], self._pooling).cpu()


def _check_modules(directory: Path) -> None:
    """Refuse modules of sentence-transformers behind the pooling that change what a cosine compares."""
    path = directory / "modules.json"
    if not path.is_file():
        return  # a plain transformers model
    try:
        kinds = [str(each["type"]).rpartition(".")[2] for each in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CordError(f"{path} cannot be read ({error}); repair it, or take another model") from None
    if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise CordError(
            f"reward.embedding.checkpoint={directory} has a module {other[0]}, which is not built here; serve it and "
            "name it by reward.embedding.base_url, or take another model"
        )


def _pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return [texts, D] of hidden states [texts, tokens, D], padded on the right, and their mask [texts, tokens]."""
    lengths = mask.sum(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    if pooling == "first":
        return hidden[:, 0]
    return (hidden * mask[..., None]).sum(1) / lengths[:, None]


def _find_pooling(directory: Path) -> str:
    """Return the pooling that a directory of sentence-transformers names."""
    path = directory / "1_Pooling" / "config.json"
    try:
        given = json.loads(path.read_text())
        found = [ours for theirs, ours in _POOLINGS.items() if given.get(theirs)]
    except (OSError, ValueError, AttributeError):
        found = []
    if len(found) != 1:
        raise CordError(
            f"reward.embedding.checkpoint={directory} does not say how its states become one embedding "
            "(1_Pooling/config.json); set reward.embedding.pooling to last, first or mean"
        )
    return found[0]
