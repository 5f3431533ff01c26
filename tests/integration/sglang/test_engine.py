"""The engine on real servers: the same answers as transformers', weights, pauses, and servers that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_cord.data.samples import HEAR, READ
from megatron_cord.model.config import LoraConfig
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.local.sampling import likeliest
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.engine import SGLangEngine
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig
from megatron_cord.rollout.types import GenerationRequest, Rollout, TensorSpec, WeightSource
from megatron_cord.rollout.weights import PlainWeights
from tests.integration.sglang.answers import TRANSPORTS, check_adapters, compare, conversations
from tests.integration.sglang.conftest import Servers
from tests.tiny_run import make_samples

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    initialize(ParallelConfig(), seed=0)
    yield
    finalize()


def connect(
    servers: Servers, transport: str = "process_group", min_servers: int = 2, **settings: object
) -> tuple[CollectiveEngine, SGLangEngine]:
    config = RolloutConfig(
        engine="sglang",
        sglang=SGLangConfig(servers_file=servers.file, min_servers=min_servers, **settings),  # type: ignore[arg-type]
        weight_sync=WeightSyncConfig(transport=transport, bucket_bytes=1 << 20, timeout_seconds=120),  # type: ignore[arg-type]
    )
    engine = build_engine(config, servers.checkpoint, torch.device("cpu"))
    assert isinstance(engine.engine, SGLangEngine)
    return engine, engine.engine


def questions(
    engine: SGLangEngine | LocalEngine, count: int, temperature: float = 0.0, limit: int = 12
) -> list[GenerationRequest]:
    """So many spoken and so many written ones."""
    samples = make_samples(count, seed=7)
    prompts = [engine.prompts.audio_prompt(s) for s in samples] + [engine.prompts.text_prompt(s) for s in samples]
    return [GenerationRequest(prompt, temperature, limit, i) for i, prompt in enumerate(prompts)]


def changed(servers: Servers, factor: float) -> PlainWeights:
    """Head, audio tower and projector, larger."""
    stored = load_file(servers.checkpoint / "model.safetensors")
    larger = {name: tensor * factor for name, tensor in stored.items() if "language_model.model" not in name}
    return PlainWeights(larger, servers.checkpoint)


def check_equal_to_local(
    servers: Servers, engine: CollectiveEngine, factor: float, version: int, count: int = 10
) -> None:
    """Check that the servers answer as a local engine with these weights."""
    local = LocalEngine(servers.checkpoint)
    local.update_weights(changed(servers, factor), version)
    asked = questions(local, count)
    found = engine.generate(asked)
    share, largest = compare(found, local.generate(asked))
    assert share >= 0.99 and largest < 1e-3, (share, largest)
    assert {span.version for rollout in found for span in rollout.versions} == {version}


def checksums(servers: Servers) -> list[list[dict[str, str]]]:
    return [Endpoint(url).checksums(60.0) for url in servers.supervisor.urls]


def test_answers_in_conversations_are_transformers(servers: Servers) -> None:
    """Catches a server that dies of a second clip, or that hears clips in another order or another clip's length."""
    engine, _ = connect(servers)
    local = LocalEngine(servers.checkpoint)
    prepared = local.prompts.prepare(conversations(40))
    asked = [GenerationRequest(item.prompts[view], 0.0, 12) for view in (HEAR, READ) for item in prepared]
    share, largest = compare(engine.generate(asked), local.generate(asked))
    print(f"conversations: {share:.2%} of tokens equal, log-probabilities within {largest:.2g}")
    assert share >= 0.99 and largest < 1e-3


def test_greedy_answers_are_transformers(servers: Servers) -> None:
    """Catches another model than the trainer's, by attention to padding, 16 bits, another template or features."""
    engine, own = connect(servers)
    local = LocalEngine(servers.checkpoint)
    asked = questions(local, 100)
    share, largest = compare(engine.generate(asked), local.generate(asked))
    print(f"float32: {share:.2%} of tokens equal, log-probabilities within {largest:.2g}")
    assert share >= 0.99 and largest < 1e-3
    sampled = engine.generate(questions(own, 20, temperature=1.5))
    with torch.no_grad():
        for request, rollout in zip(questions(own, 20, temperature=1.5), sampled, strict=True):
            assert not set(rollout.token_ids) & set(own.prompts.special_ids)
            if not request.prompt.clips:
                ids = torch.tensor([[*request.prompt.token_ids, *rollout.token_ids]])
                model = local._loaded()
                logits = model.head(model.hidden(ids, None, None).last_hidden_state)[
                    0, len(request.prompt.token_ids) - 1 : -1
                ]
                wanted = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
                assert torch.allclose(torch.tensor(rollout.logprobs), wanted, atol=1e-3), "temperature 1 scale"
    engine.close()


def test_truncated_samples_are_of_the_tokens_that_the_local_engine_keeps(servers: Servers) -> None:
    """Catches another meaning of top_p and top_k than the local engine's, and log-probabilities of the part alone."""
    engine, own = connect(servers)
    local, temperature, top_p, top_k = LocalEngine(servers.checkpoint), 1.5, 0.5, 6
    prompt = own.prompts.text_prompt(make_samples(1, seed=7)[0])
    asked = [GenerationRequest(prompt, temperature, 8, seed, top_p, top_k) for seed in range(60)]
    drawn, forbidden = set[int](), list(own.prompts.special_ids)
    model = local._loaded()
    with torch.no_grad():
        for rollout in engine.generate(asked):
            ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids]])
            logits = model.head(model.hidden(ids, None, None).last_hidden_state)[0, len(prompt.token_ids) - 1 : -1]
            count = len(logits)
            bounds = torch.full((count,), top_p + 1e-4, dtype=torch.float64), torch.full((count,), top_k)
            kept = likeliest(logits.double() / temperature, *bounds)
            kept[:, forbidden] = False
            chosen = torch.tensor(rollout.token_ids)[:, None]
            assert (kept.gather(1, chosen)[:, 0] | ~kept.any(-1)).all()
            wanted = logits.log_softmax(-1).gather(1, chosen)[:, 0]
            assert torch.allclose(torch.tensor(rollout.logprobs), wanted, atol=1e-3)
            drawn.add(rollout.token_ids[0])
    assert len(drawn) > 1
    engine.close()


@pytest.mark.parametrize("transport", ["process_group", "shared_memory", "disk"])
def test_new_weights_by_each_transport(transport: str, servers: Servers) -> None:
    """Catches weights that reach one server only, or not the audio tower, and cached audio of older weights."""
    engine, _ = connect(servers, transport)
    check_equal_to_local(servers, engine, 1.0, 0, 4)
    engine.update_weights(changed(servers, 1.5), 3)
    check_equal_to_local(servers, engine, 1.5, 3)
    one, two = checksums(servers)
    assert one == two
    engine.close()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_responses_go_on_with_new_weights(mode: str, servers: Servers) -> None:
    """Catches a pause that loses or restarts responses, tokens without their version, and servers that stay paused."""
    engine, own = connect(servers, pause=mode)
    asked = questions(own, 4, temperature=1.0, limit=300)
    spans: list[tuple[int, ...]] = []
    for version in range(1, 8):  # the pause may come before the first token, or after the last
        made: list[Rollout] = []
        thread = threading.Thread(target=lambda made=made: made.extend(own.generate(asked)))
        thread.start()
        time.sleep(0.25 * 2**version)
        own.pause()
        engine.update_weights(changed(servers, 1 + version / 100), version)
        own.resume()
        thread.join()
        assert [r.prompt_id for r in made] == [request.prompt.sample_id for request in asked]
        assert all(r.finish_reason != "abort" and len(r.logprobs) == len(r.token_ids) for r in made)
        spans = [tuple(span.version for span in r.versions) for r in made]
        assert set(spans) <= {(version - 1,), (version - 1, version), (version,)}, spans
        if (version - 1, version) in spans:
            break
    assert any(len(versions) == 2 for versions in spans), spans
    if mode == "retract":
        check_equal_to_local(servers, engine, 1 + version / 100, version, 4)
    engine.close()


def test_abort_and_memory(servers: Servers) -> None:
    """Catches an abort that waits, a server that dies of giving its memory back while it works.

    Also one that stays without it.
    """
    engine, own = connect(servers)
    asked = questions(own, 8, temperature=1.0, limit=80)
    made: list[Rollout] = []
    thread = threading.Thread(target=lambda: made.extend(own.generate(asked)))
    thread.start()
    while not any(server.in_flight for server in own._pool.servers.values()):
        time.sleep(0.01)
    own.abort()
    thread.join()
    assert "abort" in [r.finish_reason for r in made] and len(made) == len(asked)
    own.release_memory()
    own.restore_memory()
    engine.update_weights(changed(servers, 1.2), 1)
    check_equal_to_local(servers, engine, 1.2, 1, 4)
    engine.close()


def test_kill_during_generation(servers: Servers) -> None:
    """Catches a rollout lost or doubled with its server, and a server that comes back with the checkpoint's weights."""
    engine, own = connect(servers)
    engine.update_weights(changed(servers, 1.3), 1)
    asked = questions(own, 30, limit=60)
    killed = threading.Timer(0.5, lambda: os.killpg(servers.supervisor.pids[0] or 0, signal.SIGKILL))
    killed.start()
    found = engine.generate(asked)
    killed.join()
    assert Counter(r.prompt_id for r in found) == Counter(request.prompt.sample_id for request in asked)
    local = LocalEngine(servers.checkpoint)
    local.update_weights(changed(servers, 1.3), 1)
    share, largest = compare(found, local.generate(asked))
    assert share >= 0.99 and largest < 1e-3, (share, largest)
    time.sleep(2)
    servers.wait_until_ready()
    engine.update_weights(changed(servers, 1.4), 2)
    assert set(own._pool.servers) == set(servers.supervisor.urls), "the server must be back"
    one, two = checksums(servers)
    assert one == two
    check_equal_to_local(servers, engine, 1.4, 2, 4)
    engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_lora_alone_reaches_both_servers(transport: str, servers: Servers) -> None:
    """Catches adapters that a server loses, merges with another weight, or adds to those of the version before.

    They are on encoder and language model, and change at each of three weight syncs.
    """
    servers.wait_until_ready()
    engine, own = connect(servers, transport)
    lora = LoraConfig(rank=4, alpha=8, whole=("adapter",))
    check_adapters(engine, servers.checkpoint, servers.supervisor.urls, questions(own, 10), lora)
    one, two = checksums(servers)
    assert one == two
    engine.close()


class Killing:
    """Weights in whose middle a server is killed."""

    in_main_replica = True
    lora_scale = None

    def __init__(self, weights: WeightSource, pid: int) -> None:
        self.weights = weights
        self.pid: int | None = pid

    def without_lora(self) -> Killing:
        return self

    def specs(self, *, full: bool, merged: bool = True) -> list[TensorSpec]:
        return self.weights.specs(full=full)

    def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(self.weights.tensors(full=full, in_pieces=in_pieces)):
            if number == 20 and self.pid is not None:
                os.killpg(self.pid, signal.SIGKILL)
                self.pid = None
            yield pair


@pytest.mark.parametrize("transport", ["process_group", "shared_memory"])
def test_kill_during_a_weight_sync(transport: str, servers: Servers) -> None:
    """Catches a trainer that hangs in a broadcast, a survivor with half of the weights.

    Also a server that comes back with old ones.
    """
    servers.wait_until_ready()
    engine, own = connect(servers, transport)
    source = Killing(changed(servers, 1.1), servers.supervisor.pids[1] or 0)
    engine.update_weights(source, 1)
    assert source.pid is None and list(own._pool.servers) == servers.supervisor.urls[:1]
    check_equal_to_local(servers, engine, 1.1, 1, 4)
    time.sleep(2)
    servers.wait_until_ready()
    engine.update_weights(changed(servers, 1.2), 2)
    assert set(own._pool.servers) == set(servers.supervisor.urls)
    one, two = checksums(servers)
    assert one == two
    check_equal_to_local(servers, engine, 1.2, 2, 4)
    engine.close()
