"""Embeddings of texts: a small model of transformers, one text after the other, and a real HTTP server."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteModel

from megatron_cord.errors import CordError
from megatron_cord.reward.embedding.checkpoint import CheckpointEmbedder
from megatron_cord.reward.embedding.config import EmbeddingConfig
from megatron_cord.reward.embedding.endpoint import EndpointEmbedder
from tests.openai_server import OpenAIServer, Reply, Request
from tests.reward.embedding.small_embedder import write_embedder

WORDS = ["<pad>", "the", "answer", "is", "one", "two"]
TEXTS = ["the answer is one", "two", "is one the answer is two"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedder(tmp_path_factory.mktemp("embedding"), WORDS)


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
def test_embeddings_of_a_checkpoint(checkpoint: Path, pooling: Any) -> None:
    """Catches padding in an embedding, texts in another order, and another pooling than the named one."""
    model: Any = GraniteModel.from_pretrained(checkpoint)
    embedder = CheckpointEmbedder(EmbeddingConfig(str(checkpoint), pooling, batch_size=2), CPU)
    found = embedder.embed(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        wanted = {"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[pooling]
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-5)
    assert embedder.embed([]).shape == (0, 0)


def test_a_directory_says_its_pooling(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a guess where the directory says nothing, a cut that nobody learns of, and a directory of no model."""
    config = EmbeddingConfig(str(checkpoint))
    with pytest.raises(CordError, match=r"set reward\.embedding\.pooling to last, first or mean"):
        CheckpointEmbedder(config, CPU)
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    found = CheckpointEmbedder(config, CPU).embed(TEXTS)
    torch.testing.assert_close(found, CheckpointEmbedder(replace(config, pooling="mean"), CPU).embed(TEXTS))
    short = CheckpointEmbedder(replace(config, max_tokens=1, pooling="last"), CPU)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(short.embed([TEXTS[0]]), short.embed(["the"]))
        short.embed(TEXTS)
    assert [r.message for r in caplog.records if "reward.embedding.max_tokens" in r.message] == [
        "a response has 4 tokens of the embedding model: of such ones the first 1 count (reward.embedding.max_tokens, "
        "or the model's positions)"
    ]
    modules = checkpoint / "modules.json"
    modules.write_text('[{"type": "sentence_transformers.models.Pooling"}, {"type": "x.models.Normalize"}]')
    CheckpointEmbedder(config, CPU)
    modules.write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(CordError, match=r"has a module Dense, which is not built here"):
        CheckpointEmbedder(config, CPU)
    modules.unlink()
    with pytest.raises(CordError, match=r"reward\.embedding\.checkpoint=.* cannot be loaded"):
        CheckpointEmbedder(EmbeddingConfig(str(tmp_path), "mean"), CPU)
    with pytest.raises(CordError, match=r"reward\.embedding\.checkpoint: .* does not exist"):
        CheckpointEmbedder(EmbeddingConfig(str(tmp_path / "none"), "mean"), CPU)


def answer(requests: list[Request]) -> Reply:
    """Embed a text as its length and 1, in reverse order; the second request fails once."""
    if len(requests) == 2:
        return Reply(status=503)
    body = json.loads(requests[-1].body)
    data = [{"index": number, "embedding": [len(text), 1]} for number, text in enumerate(body["input"])]
    return Reply(json.dumps({"data": data[::-1]}).encode())


def test_embeddings_of_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches embeddings in the reply's order, a try that is not repeated, and a key that is not sent."""
    monkeypatch.setenv("EMBEDDING_KEY", "secret")
    with OpenAIServer(answer) as server:
        config = EmbeddingConfig(
            base_url=server.url, model="small", api_key_env="EMBEDDING_KEY", batch_size=2, backoff=0.0
        )
        assert EndpointEmbedder(config).embed(TEXTS).tolist() == [[float(len(text)), 1.0] for text in TEXTS]
        assert [json.loads(r.body)["input"] for r in server.requests] == [TEXTS[:2], TEXTS[2:], TEXTS[2:]]
        assert {(r.path, r.key, json.loads(r.body)["model"]) for r in server.requests} == {
            ("embeddings", "Bearer secret", "small")
        }


@pytest.mark.parametrize(
    "body", [b"{}", b'{"data": [{"index": 0, "embedding": [1]}]}', b'{"data": [{"index": 0, "embedding": ["a"]}]}']
)
def test_an_endpoint_that_answers_otherwise(body: bytes) -> None:
    """Catches a reward that is made of less than was asked for."""
    with OpenAIServer(lambda _: Reply(body)) as server:
        config = EmbeddingConfig(base_url=server.url, model="small", tries=1)
        with pytest.raises(CordError, match=r"reward\.embedding: .*embeddings"):
            EndpointEmbedder(config).embed(TEXTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "a", "base_url": "http://b/v1"}, "set one of them"),
        ({"base_url": "http://b/v1"}, r"needs reward\.embedding\.model"),
        ({"base_url": "b"}, "must look like"),
        ({"max_tokens": 0}, "must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    """Catches an endpoint that is asked for no model, or two models of which one would be left out."""
    with pytest.raises(CordError, match=message):
        EmbeddingConfig(**settings)
    with pytest.raises(CordError, match="variable NO_SUCH_KEY"):
        EndpointEmbedder(EmbeddingConfig(base_url="http://b/v1", model="a", api_key_env="NO_SUCH_KEY"))
