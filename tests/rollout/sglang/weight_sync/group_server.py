"""A server that takes weights over a process group as SGLang does, without a model; rightly or wrongly as it is told.

A process of its own, as each side of a group is, forked as ranks are (tests/gloo.py). Streams are taken by the very
code that real servers run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.plugin.lora_merge import BASE, LORA, Base, identity, merged
from megatron_cord.rollout.sglang.plugin.weights import ABILITY, STREAMED, Buffers, Spec, Stream
from tests.gloo import PRELOADED

WORDS = {"refuses": "no room", "refuses late": "too late"}


class GroupServer:
    """A context manager.

    Args:
        manner: "good"; "old": takes no streams; "refuses" at once, "refuses late", "dies" or "hangs", each after the
            first bucket but for the first.
        checkpoint: with whose weights it merges LoRA; None: it does not.
    """

    def __init__(self, manner: str = "good", checkpoint: Path | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(manner, checkpoint, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.endpoint = Endpoint(f"http://127.0.0.1:{ours.recv()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    @property
    def loaded(self) -> dict[str, list[float]]:
        """First and last element of each tensor that was loaded."""
        return self.endpoint.get("/loaded", 10)


def _serve(manner: str, checkpoint: Path | None, ready: Any) -> None:
    torch.set_num_threads(1)
    state: dict[str, Any] = {"version": "default", "groups": {}, "loaded": {}, "requests": 0}

    one_at_a_time = threading.Lock()  # SGLang's process that holds the model does one thing after the other

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            base = None if checkpoint is None else identity(checkpoint)
            info = {"tp_size": 1, "weight_version": state["version"], BASE: base}
            info |= {} if manner == "old" else {ABILITY: True}
            self._answer(200, {"/loaded": state["loaded"] | {"requests": [state["requests"]]}}.get(self.path, info))

        def do_POST(self) -> None:
            with one_at_a_time:
                self._take()

        def _take(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            if self.path == "/init_weights_update_group":
                state["groups"][body["group_name"]] = _join(body)
            elif self.path == "/destroy_weights_update_group":
                dist.destroy_process_group(state["groups"].pop(body["group_name"]))  # told once
            elif self.path == "/update_weight_version":
                state["version"] = body["new_version"]
            elif self.path == "/update_weights_from_distributed":
                state["requests"] += 1
                try:
                    for name, tensor in _received(body, state["groups"][body["group_name"]], manner, checkpoint):
                        state["loaded"][name] = [float(tensor.flatten()[0]), float(tensor.flatten()[-1])]
                except Exception as error:
                    return self._answer(400, {"success": False, "message": str(error)})
            return self._answer(200, {"success": True})

        def _answer(self, status: int, reply: dict[str, Any]) -> None:
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()


def _join(body: dict[str, Any]) -> dist.ProcessGroup:
    world, name = body["world_size"], body["group_name"]
    store = TCPStore(body["master_address"], body["master_port"], world, is_master=False)
    group: dist.ProcessGroup
    group, _ = distributed_c10d._new_process_group_helper(
        world,
        body["rank_offset"],
        [],
        dist.Backend(body["backend"]),
        PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=60),
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _received(
    body: dict[str, Any], group: dist.ProcessGroup, manner: str, checkpoint: Path | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what SGLang's model is given to load."""
    specs = [
        Spec(n, getattr(torch, d), s) for n, d, s in zip(body["names"], body["dtypes"], body["shapes"], strict=True)
    ]
    load_format, _, scale = body["load_format"].partition(LORA)
    streamed = load_format.startswith(STREAMED)
    if streamed and manner == "old":
        raise RuntimeError(f"asked for {load_format}")
    if manner == "refuses":
        raise RuntimeError(WORDS[manner])
    counts = [int(count) for count in load_format.removeprefix(STREAMED).split(",")] if streamed else [len(specs)]
    buckets = 0

    def receive(flat: torch.Tensor) -> Any:
        nonlocal buckets
        buckets += 1
        if buckets > 1 and manner != "good":
            if manner == "refuses late":
                raise RuntimeError(WORDS[manner])
            if manner == "dies":
                os._exit(1)
            if manner == "hangs":
                time.sleep(1000)
        return dist.broadcast(flat, 0, group=group, async_op=True)

    stream = Stream(specs, counts, receive, Buffers("cpu"))
    if scale:
        assert checkpoint is not None
        yield from merged(stream, float(scale), Base(checkpoint))
    else:
        yield from stream
