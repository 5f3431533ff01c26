"""The layer that makes Megatron-Core run without CUDA, and that leaves a machine with CUDA alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.parallel import layout, portability
from megatron_cord.parallel.fused_adam import FusedAdam

without_cuda = pytest.mark.skipif(portability.has_cuda(), reason="this machine has CUDA, where the layer does nothing")


@without_cuda
@pytest.mark.parametrize("visible", [None, "0", "", "-1"])
def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None) -> None:
    """Catches ranks that train on the CPUs of a GPU machine unnoticed, and ones that may not where CPUs are meant."""
    monkeypatch.setattr(portability, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    portability.refuse_idle_gpus()  # a driver without a GPU
    (tmp_path / "nvidia0").touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if visible in ("", "-1"):
        portability.refuse_idle_gpus()
        return
    with pytest.raises(CordError, match=r"nvidia0, but torch .* without CUDA.*make setup-cuda.*CUDA_VISIBLE_DEVICES="):
        layout.initialize(layout.ParallelConfig(), 1)


FACTORIES: dict[str, Callable[..., torch.Tensor]] = {
    "empty": lambda **k: torch.empty(2, **k),
    "zeros": lambda **k: torch.zeros(2, **k),
    "ones": lambda **k: torch.ones(2, **k),
    "full": lambda **k: torch.full((2,), 1.0, **k),
    "tensor": lambda **k: torch.tensor([1.0, 2.0], **k),
    "as_tensor": lambda **k: torch.as_tensor([1.0, 2.0], **k),
    "arange": lambda **k: torch.arange(2, **k),
    "linspace": lambda **k: torch.linspace(0, 1, 2, **k),
    "eye": lambda **k: torch.eye(2, **k),
    "rand": lambda **k: torch.rand(2, **k),
    "randn": lambda **k: torch.randn(2, **k),
    "randint": lambda **k: torch.randint(0, 3, (2,), **k),
}
LIKE: dict[str, Callable[..., torch.Tensor]] = {
    "empty_like": torch.empty_like,
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda t, **k: torch.full_like(t, 1.0, **k),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
}


@without_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0), 0], ids=str)
def test_factories_map_cuda_to_the_cpu(device: Any) -> None:
    """Catches a factory that names a missing device."""
    for name, make in FACTORIES.items():
        assert make(device=device).device.type == "cpu", name
    for name, make in LIKE.items():
        assert make(torch.ones(2), device=device).device.type == "cpu", name


@without_cuda
def test_other_devices_stay() -> None:
    """Catches a mapping that sends every device to the CPU."""
    assert {make(device="meta").device.type for make in FACTORIES.values()} == {"meta"}
    assert {make(device=None).device.type for make in FACTORIES.values()} == {"cpu"}
    assert (
        torch.ones(2).to("meta").device.type == "meta"
        and torch.nn.Linear(1, 1).to(device="meta").weight.device.type == "meta"
    )
    assert torch.empty(2, pin_memory=True).tolist() is not None  # pinning needs CUDA


@without_cuda
def test_a_device_context_is_obeyed() -> None:
    """Catches factories that torch fails to recognise in `with torch.device(...)`, as transformers needs."""
    with torch.device("meta"):
        assert {name: make().device.type for name, make in FACTORIES.items()} == dict.fromkeys(FACTORIES, "meta")
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


@without_cuda
def test_moves_streams_and_generators() -> None:
    """Catches calls that Megatron makes with CUDA's names and that do nothing useful, or fail, without it."""
    tensor, module = torch.ones(2), torch.nn.Linear(1, 1)
    assert tensor.cuda() is tensor and tensor.pin_memory() is tensor and module.cuda() is module
    assert (
        tensor.to("cuda", torch.float64).dtype == torch.float64
        and tensor.to(device=torch.device("cuda")).device.type == "cpu"
    )
    assert module.to("cuda:0") is module and module.to(device="cuda").weight.device.type == "cpu"
    current: Any = torch.cuda.current_device()
    assert current == torch.device("cpu") and not torch.cuda.is_available()
    cuda: Any = torch.cuda
    stream, event = cuda.Stream(), cuda.Event(enable_timing=False)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record(stream)
        tensor.record_stream(stream)
    assert event.query()
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)


@without_cuda
def test_tensor_types_have_the_names_that_megatron_compares() -> None:
    """Catches a mixed-precision optimizer that does not recognise its parameters, and conversions that do nothing."""
    names = {
        dtype: torch.ones(1, dtype=dtype).type()
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    }
    assert names == {
        torch.float32: "torch.cuda.FloatTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.int64: "torch.LongTensor",
    }
    assert torch.ones(1).type(torch.int64).dtype == torch.int64


@without_cuda
def test_megatron_takes_the_fused_optimizer() -> None:
    """Catches a version of Megatron-Core that looks for its optimizer under another name."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.Adam is FusedAdam and distrib_optimizer.Adam is FusedAdam
    assert portability.backend() == "gloo" and portability.device() == torch.device("cpu")
    assert portability.install() is None  # a second time is free


GROUPS = """
import os
import time
from pathlib import Path
import torch
import torch.distributed as dist
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize

def polling():
    return sum(path.read_text() == "gloo_tcp_loop\\n" for path in Path("/proc/self/task").glob("*/comm"))

def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()

alone()
child = os.fork()
if child == 0:  # it has its parent's list of devices, but not their threads
    alone()
    deadline = time.monotonic() + 10  # a thread gives itself its name, after it was started
    while not polling() and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(polling())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
for _ in range(3):
    layout = initialize(ParallelConfig(), seed=0)
    assert polling() == 1, polling()
    dist.all_reduce(torch.ones(1), group=layout.dp_group)
    finalize()
"""


@without_cuda
def test_gloo_groups_share_a_polling_thread() -> None:
    """Catches a thread that polls for every group, two dozen a rank, and more of them after each layout.

    Also groups of a forked process that wait for a thread of its parent.
    """
    done = subprocess.run([sys.executable, "-c", GROUPS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


SCRIPT = """
import sys, torch
sys.modules["megatron.core"] = torch  # stands for a Megatron-Core that is there already
try:
    import megatron_cord.parallel
except RuntimeError as error:
    assert "import megatron_cord.parallel first" in str(error)
else:
    raise SystemExit("not refused")
assert torch.empty(1).type() == "torch.FloatTensor"
del sys.modules["megatron.core"]

torch.cuda.is_available = lambda: True
import torch._dynamo  # wraps torch.manual_seed, whoever imports it first
def names_of_torch():
    spaces = (torch, torch.cuda, torch.distributed, torch.Tensor, torch.nn.Module)
    return {f"{space.__name__}.{name}": value for space in spaces for name, value in vars(space).items()}
before = names_of_torch()
import megatron_cord.parallel
after = names_of_torch()
changed = [name for name in before if before[name] is not after[name]]
assert not changed, changed
assert megatron_cord.parallel.portability.backend() == "nccl"
from megatron.core import optimizer
from megatron_cord.parallel.fused_adam import FusedAdam
# neither apex nor transformer-engine is here
assert optimizer.Adam is FusedAdam and not optimizer.USING_PYTORCH_OPTIMIZER

del sys.modules["megatron_cord.parallel.portability"]  # once more, where one of them is
optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam = False, dict
import megatron_cord.parallel.portability as again
again.install()
assert optimizer.Adam is dict
"""


def test_the_order_of_imports_and_machines_with_cuda() -> None:
    """Catches a late import that leaves Megatron half patched, and other patches where torch reports CUDA.

    The device is only reported: the test shows that nothing of torch is patched, not that CUDA works.
    """
    root = str(Path(portability.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
