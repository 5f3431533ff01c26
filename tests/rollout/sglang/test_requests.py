"""What is requested of servers and what of their replies is accepted: tokens, audio, experts."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.rollout.sglang.client.protocol import PromptEncoder
from megatron_cord.rollout.sglang.engine import SGLangEngine
from megatron_cord.rollout.sglang.models import served_model
from megatron_cord.rollout.types import GenerationRequest
from tests.model.family_reference import save_whole
from tests.rollout.sglang.connection import connect, requests
from tests.rollout.sglang.fake_sglang import FakeServer, Reply, answer_to
from tests.tiny_run import WORDS, make_samples

pytestmark = pytest.mark.usefixtures("one_rank")


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


@pytest.mark.parametrize("family", ["audioflamingo3", "step_audio_2", "ultravox", "voxtral"])
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
