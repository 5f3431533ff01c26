"""The engine on servers that only speak SGLang's protocol: what it accepts and what it does when they fail.

The real server is in tests/integration/sglang.
"""

from __future__ import annotations

import base64
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.sglang.client.protocol import PromptEncoder
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.engine import SGLangEngine
from megatron_cord.rollout.sglang.models import served_model
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig
from megatron_cord.rollout.types import GenerationRequest, VersionSpan
from megatron_cord.rollout.weights import PlainWeights
from tests.model.family_reference import save_whole
from tests.rollout.sglang.fake_sglang import FakeServer, Reply, answer_to
from tests.tiny_run import WORDS, make_samples, write_checkpoint

QUICK: dict[str, Any] = {"request_seconds": 20.0, "reissue_seconds": None, "start_seconds": 20.0}
HEAD = "language_model.lm_head.weight"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    initialize(ParallelConfig(), seed=0)
    yield
    finalize()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "checkpoint")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as everything:
        yield everything


def connect(checkpoint: Path, servers: list[FakeServer], stack: ExitStack, **settings: Any) -> CollectiveEngine:
    """Return the engine on these servers, started here; weights go over the disk, which they do not read."""
    for server in servers:
        stack.enter_context(server)
    config = RolloutConfig(
        engine="sglang",
        sglang=SGLangConfig(servers=tuple(s.url for s in servers), **QUICK | settings),
        weight_sync=WeightSyncConfig(transport="disk"),
    )
    engine = build_engine(config, checkpoint, torch.device("cpu"))
    stack.callback(engine.close)
    return engine


def head_of(checkpoint: Path) -> PlainWeights:
    """Return the checkpoint's output layer as the weights that were trained."""
    return PlainWeights({HEAD: load_file(checkpoint / "model.safetensors")[HEAD]}, checkpoint)


def requests(count: int, **more: Any) -> list[GenerationRequest]:
    """Of prompts that all differ."""
    return [
        replace(GenerationRequest(Prompt(f"s{i}", (2, 7 + i % 10, 7 + i // 10 % 10)), 1.0, 8, i), **more)
        for i in range(count)
    ]


def check(engine: CollectiveEngine, count: int = 30, version: int = 0) -> None:
    """Each request is answered once, by its own answer."""
    asked = requests(count)
    for request, rollout in zip(asked, engine.generate(asked), strict=True):
        wanted = tuple(answer_to(request.prompt.token_ids))
        assert (rollout.prompt_id, rollout.token_ids, rollout.finish_reason) == (
            request.prompt.sample_id,
            wanted,
            "stop",
        )
        assert rollout.logprobs == (-0.5,) * 4 and rollout.versions == (VersionSpan(0, 4, version),)


def test_requests_are_spread_and_bounded(checkpoint: Path, stack: ExitStack) -> None:
    """Catches rollouts out of order, one server that gets all, and more requests at once than allowed."""
    servers = [FakeServer(), FakeServer()]
    for server in servers:
        server.seconds = 0.02
    check(connect(checkpoint, servers, stack, max_in_flight=6), 40)
    counts = [len(server.asked) for server in servers]
    assert sum(counts) == 40 and min(counts) >= 10, counts
    assert all(server.most <= 6 for server in servers)
    assert {len({body["rid"] for body in server.asked}) for server in servers} == set(counts)
    sampling = servers[0].asked[0]["sampling_params"]
    assert sampling["temperature"] == 1.0 and 3 in sampling["stop_token_ids"] and 5 in sampling["stop_token_ids"]


@pytest.mark.parametrize("manner", ["500", "garbage", "break", "older", "foreign ids", "cut off"])
def test_a_server_that_fails_is_left_out(
    manner: str, checkpoint: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a rollout lost, doubled or believed that a failing server made, and a failure in silence."""
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack)
    engine.update_weights(head_of(checkpoint), 4)
    assert good.version == bad.version == "4"
    if manner == "older":
        bad.version = "default"  # it was started again, with the checkpoint's weights
    manners: dict[str, str | Callable[[Reply], Reply]] = {
        "older": "good",
        "foreign ids": lambda body: bad.good(body, [7, 24, 3]),
        "cut off": lambda body: bad.good(body, [7], "length"),
    }
    bad.manner = manners.get(manner, manner)
    check(engine, version=4)
    assert 1 <= len(bad.asked) < 20
    lines = [line for line in caplog.messages if bad.url in line]
    assert lines and lines[0].startswith(f"rollout: {bad.url} gets no requests"), lines
    bad.manner = "good"
    engine.update_weights(head_of(checkpoint), 5)
    before = len(bad.asked)
    check(engine, version=5)
    assert len(bad.asked) > before, "a weight sync must bring a server back"


def test_a_hanging_server(checkpoint: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that waits for a server that accepts requests and never answers.

    Also requests that are not withdrawn from it.
    """
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack, reissue_seconds=2.0, request_seconds=300.0)
    bad.manner = "hang"
    check(engine)
    withdrawn = {body["rid"] for path, body in bad.calls if path == "/abort_request"}
    assert withdrawn and withdrawn <= {body["rid"] for body in bad.asked}
    assert "it is requested from another server, too" in caplog.text


def test_the_time_for_a_request_is_bounded(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a request without an end where re-issuing is off."""
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack, request_seconds=3.0)
    bad.manner = "hang"
    check(engine)


def test_a_request_that_always_fails_stops_the_run(checkpoint: Path, stack: ExitStack) -> None:
    """Catches endless repetition, an error without the sample's name, and a refusal that is tried again."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack, tries=2)
    server.manner = "500"
    with pytest.raises(CordError, match=r"sample s0: 2 tries .* answered 500"):
        engine.generate(requests(1))
    server.manner = "good"
    engine.update_weights(head_of(checkpoint), 1)
    server.key = "another"
    with pytest.raises(CordError, match=r"refuses a request \(401\)"):
        engine.generate(requests(1))


def test_when_all_are_lost_they_are_waited_for(
    checkpoint: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends with its last server, rollouts of the restarted server's old weights.

    Also what was made before that is lost.
    """
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    engine.update_weights(head_of(checkpoint), 3)
    check(engine, 5, version=3)
    port = int(server.url.rsplit(":", 1)[1])
    server.__exit__(None, None, None)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    assert [r.finish_reason for r in own.generate(requests(3))] == ["abort"] * 3
    again: list[FakeServer] = []  # with the checkpoint's weights
    starter = threading.Timer(1.5, lambda: again.append(stack.enter_context(FakeServer(port=port))))
    starter.start()
    check(engine, version=3)
    starter.join()
    assert again[0].version == "3" and "/update_weights_from_disk" in [path for path, _ in again[0].calls]
    assert "waiting for 1 server" in caplog.text


def test_abort_returns_what_is_whole(checkpoint: Path, stack: ExitStack) -> None:
    """Catches an abort that waits for the servers, loses whole responses, or leaves requests with the servers."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    reply = server.good
    server.manner = lambda body: reply(body) if body["input_ids"][1] % 2 else (server.leave.wait(30), reply(body))[1]
    own = engine.engine
    assert isinstance(own, SGLangEngine)

    def abort_soon() -> None:
        while len(server.asked) < 10:
            time.sleep(0.02)
        time.sleep(0.5)
        own.abort()

    thread = threading.Thread(target=abort_soon)
    thread.start()
    rollouts = own.generate(requests(10))
    thread.join()
    assert [r.finish_reason for r in rollouts] == ["stop", "abort"] * 5
    assert len([path for path, _ in server.calls if path == "/abort_request"]) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_must_not_be_sampled_is_drawn_again(
    temperature: float, checkpoint: Path, stack: ExitStack
) -> None:
    """Catches a placeholder in a response, a response that ends there, and a seed that would draw it again for ever."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)

    def reply(body: Reply) -> Reply:
        given = body["input_ids"][3:]
        if not given and body["sampling_params"]["max_new_tokens"] > 1 and len(server.asked) == 1:
            return server.good(body, [9, 5])
        if body.get("top_logprobs_num"):
            chosen = server.good(body, [5])
            chosen["meta_info"]["output_top_logprobs"] = [[[-0.1, 5, None], [-0.2, 4, None], [-0.3, 11, None]]]
            return chosen
        return server.good(body, [12, 3])

    server.manner = reply
    (rollout,) = engine.generate(requests(1, temperature=temperature))
    assert rollout.finish_reason == "stop"
    assert rollout.token_ids == ((9, 11, 12, 3) if temperature == 0 else (9, 12, 3))
    assert rollout.logprobs == ((-0.5, -0.3, -0.5, -0.5) if temperature == 0 else (-0.5,) * 3)
    assert [body["input_ids"][3:] for body in server.asked] == ([[], [9], [9, 11]] if temperature == 0 else [[], [9]])
    assert [body["sampling_params"]["max_new_tokens"] for body in server.asked] == (
        [8, 1, 6] if temperature == 0 else [8, 7]
    )
    seeds = [body["sampling_params"]["sampling_seed"] for body in server.asked]
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**31 for seed in seeds)


def test_truncated_sampling_is_the_servers(checkpoint: Path, stack: ExitStack) -> None:
    """Catches bounds that are not sent, and a response drawn for ever where only forbidden tokens are left."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    forbidden = own.prompts.special_ids[0]

    def reply(body: Reply) -> Reply:
        likeliest = {"output_top_logprobs": [[[-0.1, forbidden, None], [-2.5, 8, None]]]}
        ids = [3] if body.get("input_ids", [])[-1] == 8 else [forbidden]
        answer = server.good(body, ids)
        return answer | {"meta_info": answer["meta_info"] | likeliest}

    server.manner = reply
    (rollout,) = engine.generate(requests(1, top_p=0.5, top_k=3))
    assert rollout.token_ids == (8, 3) and rollout.logprobs == (-2.5, -0.5)
    sent = [body["sampling_params"] for body in server.asked]
    assert all(sampling["top_p"] == 0.5 and sampling["top_k"] == 3 for sampling in sent) and len(sent) < 40
    assert sent[-2]["max_new_tokens"] == 1 and len({sampling["sampling_seed"] for sampling in sent[:-2]}) > 10
    server.manner = "good"
    engine.generate(requests(1))
    assert server.asked[-1]["sampling_params"]["top_p"] == 1.0 and server.asked[-1]["sampling_params"]["top_k"] == -1


def test_audio_goes_as_text_with_one_placeholder(checkpoint: Path, stack: ExitStack) -> None:
    """Catches expanded placeholders, which SGLang refuses, audio that is rounded.

    Also a server that reads another prompt.
    """
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    sample = make_samples(1)[0]
    prompt = own.prompts.audio_prompt(sample)
    ids = list(prompt.token_ids)
    server.manner = lambda body: server.good(body | {"prompt": ids}, [7, 3]) | {"prompt_token_ids": ids}
    (rollout,) = engine.generate([GenerationRequest(prompt, 1.0, 8)])
    body = server.asked[0]
    assert (
        rollout.token_ids == (7, 3)
        and body["text"].count("<|audio_bos|><|AUDIO|><|audio_eos|>") == 1
        and "input_ids" not in body
    )
    data = base64.b64decode(body["audio_data"][0].removeprefix("data:audio/wav;base64,"))
    assert data[44:] == sample.waveform.astype("<f4").tobytes()
    server.manner = lambda body: server.good(body | {"prompt": ids}, [7, 3]) | {"prompt_token_ids": [*ids[:-1], 9]}
    with pytest.raises(CordError, match="another tokenizer, chat template or feature extractor"):
        engine.generate([GenerationRequest(prompt, 1.0, 8)])


@pytest.mark.parametrize("family", ["step_audio_2", "ultravox", "voxtral"])
def test_several_clips_go_with_their_prompt(family: str, tmp_path: Path) -> None:
    """Catches a clip that is left out or sent in another order, and clips side by side under one placeholder.

    Also an answer that goes on behind other ids than it had.
    """
    checkpoint = save_whole(tmp_path / "checkpoint", family, WORDS)
    sample = make_samples(1)[0]
    prompts = PromptBuilder(checkpoint, long_audio="cut")
    prompt, placeholder = prompts.audio_prompt(sample), prompts.audio_token_id
    body = PromptEncoder(prompts, 512, served_model(checkpoint)).try_encode(prompt, (7, 3))
    assert body is not None and "text" not in body and body["input_ids"][-2:] == [7, 3]
    assert len(prompt.clips) == body["input_ids"].count(placeholder) == len(body["audio_data"]) > 1
    lengths = iter(clip.num_tokens for clip in prompt.clips)
    expanded = [i for index in body["input_ids"] for i in [index] * (next(lengths) if index == placeholder else 1)]
    assert tuple(expanded[:-2]) == prompt.token_ids
    sent = b"".join(base64.b64decode(data.removeprefix("data:audio/wav;base64,"))[44:] for data in body["audio_data"])
    assert sent == sample.waveform.astype("<f4").tobytes()


def test_a_prompt_that_is_no_text_is_named(checkpoint: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a template that the tokenizer reads in another way, noticed only by answers to another question."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    prompt = own.prompts.audio_prompt(make_samples(1)[0])
    monkeypatch.setattr(PromptBuilder, "text_of", lambda self, ids: None)
    with pytest.raises(CordError, match=f"sample {prompt.sample_id}: no text tokenizes to its prompt"):
        engine.generate([GenerationRequest(prompt, 1.0, 8)])
    assert server.asked == []


def test_nothing_is_sent_that_would_kill_a_server(checkpoint: Path, stack: ExitStack) -> None:
    """Catches ids outside the vocabulary, of which SGLang dies, lengths that do not fit.

    Also more clips in one prompt than the family may have.
    """
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    audio = own.prompts.audio_prompt(make_samples(1)[0])
    two = replace(audio, clips=audio.clips * 2, token_ids=audio.token_ids + (5,) * audio.clips[0].num_tokens)
    one_clip = replace(served_model(checkpoint), max_clips=1)
    with pytest.raises(CordError, match="SGLang takes at most 1 clips a prompt of this model, not 2"):
        PromptEncoder(own.prompts, 128, one_clip).check(GenerationRequest(two, 1.0, 8))
    wrong = [
        (Prompt("x", (2, 24)), 8, "ids outside 0..23"),
        (Prompt("x", ()), 8, "is empty"),
        (Prompt("x", (2,)), 0, "at least 1"),
        (Prompt("x", (2,)), 128, "the servers take 128 in all"),
        (Prompt("x", (2, 5)), 8, "1 audio placeholders for 0"),
    ]
    for prompt, limit, message in wrong:
        with pytest.raises(CordError, match=message):
            engine.generate([GenerationRequest(prompt, 1.0, limit)])
    assert server.asked == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"version": "0.5.20"}, "runs SGLang 0.5.20; 0.5.21 or later"),
        ({"version": "nightly"}, "runs SGLang nightly"),
        ({"model_type": "qwen2"}, "serves a qwen2 model"),
    ],
)
def test_servers_that_cannot_be_trained_from(told: Reply, message: str, checkpoint: Path, stack: ExitStack) -> None:
    """Catches an older server, which would take weights without a session.

    Also another model, noticed only by wrong answers.
    """
    server = FakeServer()
    server.info |= told
    with pytest.raises(CordError, match=message):
        connect(checkpoint, [server], stack)


def test_scaled_logprobs_are_refused(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a server whose log-probabilities depend on the temperature: every importance weight would be wrong."""
    server = FakeServer()
    probes = iter([[[-1.0, 0], [-2.0, 1]], [[-1.2, 0], [-1.7, 1]]])
    original = server._generate

    def generate(handler: Any, body: Reply, probe: bool) -> None:
        server.info["probe"] = next(probes)
        original(handler, body, probe)

    server._generate = generate  # type: ignore[method-assign]
    with pytest.raises(CordError, match="scales log-probabilities by the sampling temperature"):
        connect(checkpoint, [server], stack)


def test_a_run_begins_with_the_checkpoints_weights(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a new run that starts from what an earlier one, which was killed, left in its servers."""
    server = FakeServer()
    server.version = "120"
    connect(checkpoint, [server], stack)
    paths = [path for path, _ in server.calls]
    assert ("/update_weights_from_disk", {"model_path": "here", "flush_cache": True}) in server.calls
    assert server.version == "default" and paths.index("/continue_generation") < paths.index(
        "/update_weights_from_disk"
    )


def test_a_run_begins_with_servers_that_an_earlier_one_left_paused(checkpoint: Path, stack: ExitStack) -> None:
    """Catches waiting for a paused server to say that it is healthy before it is told to go on."""
    server = FakeServer()
    server.paused = True
    connect(checkpoint, [server], stack)
    assert not server.paused


def test_all_servers_go_on_after_a_pause(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a cache that is not flushed since responses wait.

    Also a server that fails a weight sync and is paused for ever.
    """
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    source = head_of(checkpoint)
    own.pause()
    assert good.paused and bad.paused
    bad.loads = False
    engine.update_weights(source, 1)
    assert good.version == "1" and bad.version == "default"
    own.resume()
    assert not good.paused and not bad.paused


def test_weights_that_nobody_takes(checkpoint: Path, stack: ExitStack) -> None:
    """Catches endless repetition of a weight sync with servers that answer but cannot load."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack, start_seconds=1.0)
    server.loads = False
    with pytest.raises(
        CordError, match=r"no rollout server takes the weights of version 2: .*update_weights_from_disk failed"
    ):
        engine.update_weights(head_of(checkpoint), 2)


def test_a_wrong_key(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a run that waits for servers which are there, but for others, and a key in the message."""
    with pytest.raises(
        CordError, match=r"refuses the API key; set rollout.sglang.api_key_file or MEGATRON_CORD_SERVER_KEY"
    ) as caught:
        connect(checkpoint, [FakeServer(key="the right one")], stack)
    assert "the right one" not in str(caught.value)


def test_too_few_servers(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a run that waits for ever, and an error that does not say for whom."""
    sglang = SGLangConfig(servers=("http://127.0.0.1:9",), start_seconds=0.5)
    engine = RolloutConfig(engine="sglang", sglang=sglang)
    with pytest.raises(CordError, match=r"0 rollout servers answer, 1 are needed, .*unreachable.*cord serve"):
        build_engine(engine, checkpoint, torch.device("cpu"))
    with pytest.raises(CordError, match=r"rollout.sglang.servers or rollout.sglang.servers_file"):
        RolloutConfig(engine="sglang")


def test_experts_of_a_server(tmp_path: Path, stack: ExitStack) -> None:
    """Catches experts of other tokens or in another order, what is no list of them, and a server that returns none."""
    checkpoint = save_whole(tmp_path / "mixture", "qwen3_moe", WORDS, tied=False)
    server = FakeServer()
    server.info["model_type"] = "qwen3_moe"
    language = load_architecture(checkpoint).language
    assert language.experts is not None
    asked = requests(2, return_experts=True)
    asked[1] = replace(asked[1], return_experts=False)
    rows = len(asked[0].prompt.token_ids) + len(answer_to(asked[0].prompt.token_ids)) - 1
    size = (rows, language.num_layers, language.experts.per_token)
    experts = torch.arange(math.prod(size)).view(size) % language.experts.count

    def returning(given: bytes) -> Callable[[Reply], Reply]:
        def answer(body: Reply) -> Reply:
            reply = server.good(body)
            if body.get("return_routed_experts"):
                reply["meta_info"]["routed_experts"] = base64.b64encode(given).decode()
            return reply

        return answer

    server.manner = returning(experts.int().numpy().tobytes())
    first, second = connect(checkpoint, [server], stack).generate(asked)
    assert first.experts is not None and torch.equal(first.experts.tensor().long(), experts)
    assert second.experts is None
    short = experts[1:].int().numpy().tobytes()
    for manner, words in (
        (returning(b"123"), "in another form"),
        (returning(short), f"of {rows} that it read"),
        ("good", "start servers of a mixture of experts with --enable-return-routed-experts"),
    ):
        other = stack.enter_context(FakeServer(manner))
        other.info["model_type"] = "qwen3_moe"
        with pytest.raises(CordError, match=words):
            connect(checkpoint, [other], stack, tries=1).generate(asked[:1])
