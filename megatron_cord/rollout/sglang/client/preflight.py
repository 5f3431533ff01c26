"""What a server must be like before a run uses it: checked once for each, by the main rank."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from packaging.version import InvalidVersion, Version

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.client.protocol import OLDEST_SGLANG

BASE = "default"  #: SGLang's name for the weights that a server was started with
_ANSWER_SECONDS = 60.0  #: for a single token, or for an answer that takes no work
_LOAD_SECONDS = 600.0  #: for the checkpoint to be read again
#: Tokens by which SGLang requires prompts to be shorter than what fits: one for the next token, five of its own.
_SPARE = 6


def check_server(server: Endpoint, model_type: str) -> int:
    """Check one server.

    Returns:
        how many tokens of prompt and response fit.

    Raises:
        ServerError: it does not answer.
        CordError: it cannot be used for training, with how to start it.
    """
    info = server.get("/server_info", _ANSWER_SECONDS)
    try:
        version = Version(str(info.get("version")))
    except InvalidVersion:
        version = None
    if version is None or version < OLDEST_SGLANG:
        raise CordError(
            f"{server.url} runs SGLang {info.get('version')}; {OLDEST_SGLANG} or later is needed, as older ones cannot "
            "take weights safely"
        )
    server.abilities(_ANSWER_SECONDS)
    model = server.get("/model_info", _ANSWER_SECONDS)
    if model.get("model_type") != model_type:
        raise CordError(
            f"{server.url} serves a {model.get('model_type')} model, the trainer's is {model_type}; "
            "serve the checkpoint that is trained"
        )
    _check_logprobs(server)
    longest = info.get("max_req_input_len")
    if type(longest) is not int or longest < 1:
        raise ServerError(f"{server.url}/server_info has no max_req_input_len", 200)
    return longest + _SPARE


def restore_base_weights(server: Endpoint) -> None:
    """Load the weights again that the server was started with, whatever an earlier run has left in it.

    Raises:
        ServerError: it does not take them.
    """
    # Not model_path, which after a weight sync over the disk is where those weights were.
    path = str(server.get("/model_info", _ANSWER_SECONDS).get("tokenizer_path"))
    with suppress(ServerError):  # there is no open session, which is the aim
        server.post("/end_weight_update", {}, _ANSWER_SECONDS)
    server.post("/update_weights_from_disk", {"model_path": path, "flush_cache": True}, _LOAD_SECONDS)
    server.post("/update_weight_version", {"new_version": BASE, "abort_all_requests": False}, _ANSWER_SECONDS)


def _check_logprobs(server: Endpoint) -> None:
    """Check that log-probabilities do not depend on the temperature: else no importance weight is right."""
    one, two = (_first_logprobs(server, temperature) for temperature in (1.0, 2.0))
    if any(abs(a - b) > 1e-2 for a, b in zip(one, two, strict=True)):
        raise CordError(
            f"{server.url} scales log-probabilities by the sampling temperature; start it with cord serve, "
            "or with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
        )


def _first_logprobs(server: Endpoint, temperature: float) -> list[float]:
    body: dict[str, Any] = {
        "input_ids": [0],
        "sampling_params": {"temperature": temperature, "max_new_tokens": 1},
        "return_logprob": True,
        "token_ids_logprob": [0, 1, 2],
    }
    meta = server.post("/generate", body, _ANSWER_SECONDS).get("meta_info")
    try:
        return [float(entry[0]) for entry in meta["output_token_ids_logprobs"][0]]  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        raise ServerError(f"{server.url}/generate answers in another form than SGLang {OLDEST_SGLANG}'s", 200) from None
