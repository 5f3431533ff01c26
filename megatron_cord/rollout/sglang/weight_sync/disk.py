"""The transport over a file system that trainer and servers share: slow, but with the fewest conditions.

Each bucket is one safetensors file; the directory gets its name when all are written, so servers see it whole or not at
all. It is removed once every server has read it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each
from megatron_cord.rollout.sglang.plugin.lora_merge import SCALE_FILE
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan, TwoBuffers
from megatron_cord.rollout.sglang.weight_sync.transport import merge_without_streams


class DiskTransport:
    """Writes the weights and lets the servers read them.

    Args:
        directory: on a file system that the servers see under the same path; the system's temporary one if None.
        timeout: seconds for a server to read everything.
    """

    in_session = False
    borrows = True

    def __init__(self, directory: Path | None, timeout: float) -> None:
        self._parent = directory or Path(tempfile.gettempdir())
        self._timeout = timeout
        self._servers: list[Endpoint] = []
        self._buffers = TwoBuffers()
        self._partial: Path | None = None
        self._files = 0

    def open(self, servers: Sequence[Endpoint], bucket_bytes: int) -> int:
        """Make a directory for this weight sync."""
        self._servers, self._files = list(servers), 0
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(tempfile.mkdtemp(prefix=".weights-", dir=self._parent))
            self._partial.chmod(0o755)  # servers may run as another user
        except OSError as error:
            raise CordError(
                f"rollout.weight_sync.directory {self._parent} is not writable: {error.strerror}; choose another"
            ) from None
        return bucket_bytes

    def merges(self, servers: Sequence[Endpoint], base: str) -> bool:
        """Return whether all servers merge LoRA over every transport, with this base."""
        return merge_without_streams(servers, base, self._timeout)

    def start(self, plans: Sequence[BucketPlan], lora_scale: float | None = None) -> None:
        """Note beside the files, which servers read when all are written, what multiplies B A."""
        if lora_scale is not None:
            assert self._partial is not None
            self._write(self._partial / SCALE_FILE, lambda file: file.write_text(json.dumps({"scale": lora_scale})))

    def buffer(self, index: int, nbytes: int) -> Tensor:
        """Return one of two, uint8 [≥ nbytes]."""
        return self._buffers.get(index, nbytes)

    def send(self, plan: BucketPlan, flat: Tensor, ready: torch.cuda.Event) -> dict[Endpoint, ServerError]:
        """Write one file."""
        assert self._partial is not None
        ready.synchronize()
        self._files += 1
        file = self._partial / f"model-{self._files:05d}.safetensors"
        tensors = {name: view.cpu() for name, view in plan.views(flat).items()}
        self._write(file, lambda file: save_file(tensors, file, {"format": "pt"}))
        return {}

    def _write(self, file: Path, write: Callable[[Path], object]) -> None:
        try:
            write(file)
        except OSError as error:
            raise CordError(f"{file}: cannot write the weights: {error.strerror}; free some space") from None

    def finish(self) -> dict[Endpoint, ServerError]:
        """Give the directory its name, let all servers read it, and remove it."""
        assert self._partial is not None
        final = self._partial.with_name(self._partial.name.removeprefix("."))
        self._partial = self._partial.replace(final)
        body = {"model_path": str(final), "load_format": "safetensors", "flush_cache": False}
        try:
            _, failures = call_each(
                self._servers, lambda server: server.post("/update_weights_from_disk", body, self._timeout)
            )
        finally:
            self.abandon()
        return failures

    def abandon(self) -> None:
        """Remove what was written."""
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    def close(self) -> None:
        """Free the buffers."""
        self.abandon()
        self._buffers = TwoBuffers()
