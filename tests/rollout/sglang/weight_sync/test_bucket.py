"""Buckets: what lies where, what a stream must bring, and how much memory a weight sync's buffers take."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.weight_sync.bucket import fill, plan_buckets
from megatron_cord.rollout.sglang.weight_sync.shared_memory import packed_address
from megatron_cord.rollout.types import TensorSpec

SPECS = [
    TensorSpec("a", (3, 5), torch.float32),
    TensorSpec("b", (7,), torch.bfloat16),
    TensorSpec("c", (2, 2), torch.bfloat16),
    TensorSpec("scalar", (), torch.float32),
    TensorSpec("large", (50, 4), torch.float32),
    TensorSpec("d", (1,), torch.float16),
]


def tensors_of(specs: list[TensorSpec]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator).to(spec.dtype) for spec in specs}


@pytest.mark.parametrize("max_bytes", [1, 60, 100, 10_000])
def test_round_trip(max_bytes: int) -> None:
    """Catches a tensor that is lost, cut, doubled, reordered or misaligned at any size of bucket."""
    given = tensors_of(SPECS)
    plans = plan_buckets(SPECS, max_bytes)
    buffer = torch.zeros(max(plan.nbytes for plan in plans), dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    stream = iter(given.items())
    for plan in plans:
        flat = fill(plan, stream, lambda: buffer)
        assert flat.data_ptr() == buffer.data_ptr()
        found |= {name: view.clone() for name, view in plan.views(buffer).items()}
        assert plan.nbytes <= max_bytes or len(plan.specs) == 1
        assert all(start % spec.dtype.itemsize == 0 for spec, start in zip(plan.specs, plan.starts, strict=True))
    assert list(found) == [spec.name for spec in SPECS] and next(stream, None) is None
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in given.items())


def test_layout_is_the_servers() -> None:
    """Catches a gap between tensors: servers rebuild the offsets from shapes and dtypes alone."""
    for plan in plan_buckets(SPECS, 10_000):
        end = 0
        for spec, start in zip(plan.specs, plan.starts, strict=True):
            assert start == end
            end += spec.nbytes
        assert end == plan.nbytes


def test_sent_in_the_planned_dtype() -> None:
    """Catches bytes of the trainer's dtype under the server's dtype."""
    (plan,) = plan_buckets([TensorSpec("a", (4,), torch.bfloat16)], 100)
    buffer = torch.zeros(plan.nbytes, dtype=torch.uint8)
    value = torch.tensor([1.0, 2.001, -3.7, 1e-3])
    fill(plan, iter([("a", value)]), lambda: buffer)
    assert torch.equal(plan.views(buffer)["a"], value.bfloat16())


def test_borrowed_memory() -> None:
    """Catches a lone tensor that is copied although it could be sent from where it lies.

    Also one that is sent so in another dtype or order.
    """
    (plan,) = plan_buckets([TensorSpec("a", (4, 6), torch.float32)], 100)
    buffer = torch.zeros(plan.nbytes, dtype=torch.uint8)
    for given, borrowed in (
        (torch.randn(4, 6), True),
        (torch.randn(6, 4).T, False),
        (torch.randn(4, 6).double(), False),
    ):
        flat = fill(plan, iter([("a", given)]), lambda: buffer, borrow=True)
        assert torch.equal(plan.views(flat)["a"], given.float())
        assert (flat.data_ptr() == given.data_ptr()) == borrowed and (flat.data_ptr() == buffer.data_ptr()) != borrowed
        assert fill(plan, iter([("a", given)]), lambda: buffer).data_ptr() == buffer.data_ptr()


def test_a_tensor_in_pieces() -> None:
    """Catches rows of a fused tensor's part that come in another order, and pieces of another tensor."""
    fused = torch.arange(24.0).view(2, 3, 2, 2)  # 2 groups of query, key and value, each of 2 rows
    (plan,) = plan_buckets([TensorSpec("key", (4, 2), torch.float32)], 100)
    buffer = torch.zeros(plan.nbytes, dtype=torch.uint8)
    fill(plan, iter([("key", fused[:, 1])]), lambda: buffer, borrow=True)
    assert torch.equal(plan.views(buffer)["key"], torch.cat([fused[0, 1], fused[1, 1]]))
    for other in (fused[:, 1, :1], torch.zeros(4)):
        with pytest.raises(CordError, match="was planned but"):
            fill(plan, iter([("key", other)]), lambda: buffer)
    (scalar,) = plan_buckets([TensorSpec("key", (), torch.float32)], 100)
    with pytest.raises(CordError, match="was planned but"):
        fill(scalar, iter([("key", torch.zeros(1))]), lambda: buffer)


@pytest.mark.parametrize(("name", "shape"), [("x", (3, 5)), ("a", (5, 3)), (None, ())])
def test_another_stream(name: str | None, shape: tuple[int, ...]) -> None:
    """Catches bytes that would be sent under another tensor's name, and a stream that ends early."""
    (plan,) = plan_buckets(SPECS[:1], 100)
    stream = iter([] if name is None else [(name, torch.zeros(shape))])
    with pytest.raises(CordError, match=r"a \[3, 5\] was planned but"):
        fill(plan, stream, lambda: torch.zeros(plan.nbytes, dtype=torch.uint8))


@pytest.mark.parametrize("borrow", [False, True])
def test_memory_is_two_buckets(borrow: bool) -> None:
    """Catches a stream that is read ahead or kept: of 64 tensors of 1 MiB, more than one alive beside the buffers.

    Also a buffer that is made although no tensor must be copied.
    """
    count, alive, most = 64, [0], [0]
    specs = [TensorSpec(str(i), (1 << 18,), torch.float32) for i in range(count)]

    class Counted(Tensor):
        def __del__(self) -> None:
            alive[0] -= 1

    def stream() -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield spec.name, torch.ones(spec.shape).as_subclass(Counted)

    plans = plan_buckets(specs, 1 << 20 if borrow else 4 << 20)
    tensors, made = stream(), []

    def buffer() -> Tensor:
        made.append(torch.zeros(4 << 20, dtype=torch.uint8))
        return made[-1]

    for plan in plans:
        fill(plan, tensors, buffer, borrow=borrow)
    assert len(plans) == (count if borrow else count // 4) and len(made) == (0 if borrow else len(plans))
    assert most[0] <= 2  # the one that is copied or borrowed, and the one that is made


def test_address_holds_no_bytes_and_no_code_of_ours() -> None:
    """Catches a payload with the tensor's bytes in it.

    Also one that names anything that SGLang's unpickler does not let through.
    """
    from torch import UntypedStorage

    specs = [TensorSpec("a", (1 << 16,), torch.float32), TensorSpec("b", (3,), torch.bfloat16)]
    (plan,) = plan_buckets(specs, 1 << 20)
    buffer = torch.empty(0, dtype=torch.uint8).set_(UntypedStorage._new_using_filename_cpu(plan.nbytes))
    fill(plan, iter(tensors_of(specs).items()), lambda: buffer)
    packed = packed_address(plan, buffer)
    assert len(packed) < 2000
    named: set[str] = set()

    class Listing(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            named.add(f"{module}.{name}")
            return super().find_class(module, name)

    opened = Listing(io.BytesIO(packed)).load()
    assert named <= {
        *(
            f"torch.multiprocessing.reductions.rebuild_{kind}"
            for kind in ("tensor", "typed_storage", "storage_filename")
        ),
        *(
            "torch.Tensor",
            "torch.storage.UntypedStorage",
            "torch.Size",
            "torch.uint8",
            "torch.float32",
            "torch.bfloat16",
            "types.SimpleNamespace",
        ),
    }
    assert torch.equal(opened["flattened_tensor"], buffer)
    assert [(m.name, m.start_idx, m.end_idx, m.numel) for m in opened["metadata"]] == [
        ("a", 0, 1 << 18, 1 << 18),
        ("b", 1 << 18, (1 << 18) + 6, 6),
    ]


@pytest.mark.parametrize("max_bytes", [1, 100, 200, 10_000])
def test_a_and_b_are_in_one_bucket(max_bytes: int) -> None:
    """Catches A of LoRA in another bucket than its B, where servers load each bucket by itself."""
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2)}
    specs = [
        TensorSpec(f"layer{number}.{factor}.weight", shape, torch.float32)
        for number in range(3)
        for factor, shape in shapes.items()
    ]
    specs.insert(2, TensorSpec("layer0.bias", (3,), torch.float32))
    plans = plan_buckets(specs, max_bytes)
    assert [spec for plan in plans for spec in plan.specs] == specs
    assert all(plan.starts[-1] + plan.specs[-1].nbytes == plan.nbytes for plan in plans)
    for plan in plans:
        modules = [spec.name.split(".")[0] for spec in plan.specs if "lora" in spec.name]
        assert all(modules.count(module) == 2 for module in modules)
    assert len(plans) == {1: 4, 100: 4, 200: 3, 10_000: 1}[max_bytes]
