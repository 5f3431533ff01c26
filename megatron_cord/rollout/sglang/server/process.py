"""One SGLang server as a child of this process: its settings, its start, its health and its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.version import InvalidVersion, Version

from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.addresses import KEY_VARIABLE
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.client.protocol import OLDEST_SGLANG
from megatron_cord.runtime.files import read_json_object

ENVIRONMENT = ".venv-sglang"
_PROCESS = Path(__file__).parents[1] / "plugin" / "serve.py"
#: Variables of the trainer's environment that a server must not have: another interpreter's, and those of torchrun's
#: ranks.
_TRAINERS = (
    "PYTHONPATH",
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "TORCHDYNAMO_DISABLE",
)
_CPU = [
    "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-cuda-graph",
    "--disable-overlap-schedule", "--grammar-backend", "none", "--sleep-on-idle",
]  # fmt: skip


@dataclass(frozen=True)
class ServerConfig:
    """How one server runs."""

    checkpoint: Path  #: Hugging Face checkpoint, under the published names
    host: str = "127.0.0.1"  #: the address it listens on; anything but loopback needs an API key
    port: int = 0  #: 0 takes a free one
    device: Literal["cpu", "cuda"] = "cuda"  #: cpu is for tests: plain torch in the place of the server's kernels
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  #: auto: the checkpoint's own
    tp: int = 1  #: GPUs over which the model is cut
    gpus: tuple[int, ...] = ()  #: which ones; those that are visible if empty
    colocated: bool = False  #: cuda: it can give its memory to a trainer beside it and take it back
    python: Path = Path(ENVIRONMENT) / "bin" / "python"  #: the interpreter that SGLang is installed for
    max_running_requests: int = 32  #: responses generated together
    #: room in the cache of keys and values; None lets the server use what memory there is (cuda)
    max_total_tokens: int | None = None
    memory_fraction: float | None = None  #: of the GPU for weights and cache; None leaves it to SGLang
    #: cuda: responses repeat from their seeds, by SGLang's deterministic inference, which costs some speed; it has none
    #: on CPU
    seeded: bool = True
    start_timeout: float = 600.0  #: seconds until it must answer
    more: tuple[str, ...] = ()  #: SGLang's own arguments, as they are; they win

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise CordError(f"port is {self.port}; it must lie between 0 (a free one) and 65535")
        if self.tp < 1 or self.max_running_requests < 1 or self.start_timeout <= 0:
            raise CordError("tp and max_running_requests must be at least 1, start_timeout positive")


def check_version(python: Path) -> Version:
    """Return the version of SGLang that this interpreter has.

    Raises:
        CordError: none, or one without the endpoints that weight sync needs.
    """
    if not python.exists():
        raise CordError(f"{python} does not exist; install the server with: make sglang-env")
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    try:
        version = Version(answer.stdout.strip())
    except InvalidVersion:
        raise CordError(f"{python} has no sglang; install it with: make sglang-env") from None
    if version < OLDEST_SGLANG:
        raise CordError(
            f"{python} has sglang {version}; {OLDEST_SGLANG} or later is needed, as older servers cannot take weights "
            "safely"
        )
    return version


class SglangServer:
    """A running server. `start` it, `wait` until it answers, `stop` it.

    Args:
        config: how it runs.
        api_key: that requests must bear; required unless it listens on loopback.
        log: where its output goes; the key is not in it.

    Raises:
        CordError: it would listen to other machines without a key.
    """

    def __init__(self, config: ServerConfig, api_key: str, log: Path) -> None:
        self.config, self.log, self._key = config, log, api_key
        self._process: subprocess.Popen[bytes] | None = None
        port = config.port or free_port(config.host)
        reached_at = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
        self.endpoint = Endpoint(f"http://{reached_at}:{port}", api_key)  # refuses other machines without a key
        self._port = port

    @property
    def url(self) -> str:
        """http://host:port."""
        return self.endpoint.url

    @property
    def pid(self) -> int | None:
        """Of its first process; None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """Whether its first process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return at once; a second call starts it again on the same port.

        Raises:
            CordError: the checkpoint does not name its class.
        """
        self.stop()
        config = self.config
        _check_class_is_named(config.checkpoint)
        environment = os.environ | {
            "SGLANG_VLM_CACHE_SIZE_MB": "0",
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # In external/, which plugin/serve.py puts on the path.
        environment |= {
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "cord_models",
            "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "cord_models",
        }
        for name in [name for name in environment if name.startswith(_TRAINERS)]:
            del environment[name]
        if self._key:
            environment[KEY_VARIABLE] = self._key
        arguments = [
            "--model-path", str(config.checkpoint), "--host", config.host, "--port", str(self._port),
            "--dtype", _dtype(config), "--device", config.device, "--tp-size", str(config.tp),
            "--max-running-requests", str(config.max_running_requests), "--skip-server-warmup", "--enable-fp32-lm-head",
            "--nccl-port", str(free_port("127.0.0.1")),
        ]  # fmt: skip
        if config.device == "cpu":
            # Huge pages: where each bucket has a request, SGLang takes new memory for it, whose first use takes longer
            # than its transfer.
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
            arguments += [*_CPU, "--mem-fraction-static", str(config.memory_fraction or 0.3)]
            arguments += ["--max-total-tokens", str(config.max_total_tokens or 8192)]
        else:
            arguments += (
                [] if config.memory_fraction is None else ["--mem-fraction-static", str(config.memory_fraction)]
            )
            arguments += [] if config.max_total_tokens is None else ["--max-total-tokens", str(config.max_total_tokens)]
            arguments += ["--enable-deterministic-inference"] if config.seeded else []
            arguments += ["--enable-memory-saver"] if config.colocated else []
            if config.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config.gpus))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(config.python), str(_PROCESS), *arguments, *config.more],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            CordError: it ended, or does not answer in time; with the last line of its log.
        """
        deadline = time.monotonic() + self.config.start_timeout
        while not self.endpoint.is_healthy(2.0):
            if not self.running:
                raise CordError(f"the server {self.url} ended while it started: {self.last_line()}; see {self.log}")
            if time.monotonic() > deadline:
                self.stop()
                raise CordError(
                    f"the server {self.url} did not answer within {self.config.start_timeout:g} s; see {self.log}"
                )
            time.sleep(0.5)

    def stop(self) -> None:
        """End it with all its processes; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(process.pid, sign)
            except ProcessLookupError:
                break
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def last_line(self) -> str:
        """Return the last line of its log: the last error if there is one."""
        if not self.log.exists():
            return "no output"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
        return (errors or lines or ["no output"])[-1][:300]


def _check_class_is_named(checkpoint: Path) -> None:
    """Raise CordError where config.json lacks what SGLang finds the model's class by; it would end with a traceback."""
    path = checkpoint / "config.json"
    if not read_json_object(path, "download the checkpoint again").get("architectures"):
        raise CordError(
            f"{path} has no architectures, by which a server finds the model's class; copy the field from the "
            "original checkpoint"
        )


def _dtype(config: ServerConfig) -> str:
    """Return the precision in which it loads; SGLang's own auto would load float32 as 16 bits."""
    if config.dtype != "auto":
        return config.dtype
    nbytes = Counter[str]()
    for tensor in stored_tensors(config.checkpoint):
        nbytes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return nbytes.most_common(1)[0][0]


def free_port(host: str) -> int:
    """Return a port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
