"""How a server of this project takes LoRA: as A and B alone, which it merges with the weights of its own checkpoint.

The checkpoint's files are read again at each weight sync, from the page cache if there is memory for it, so that the
server keeps no second copy, errors do not add up, and it does not matter which weights it had before. It tells trainers
what its checkpoint is; those that train beside another one send merged weights.

It runs in the server's interpreter and must not import the project; the trainer takes names and `identity` from here.
Legend: r rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

#: what stands in front of alpha / rank, behind all else, in the load_format of a stream or of a bucket in shared memory
LORA = ";lora="
SCALE_FILE = "cord_lora.json"  #: beside files that hold A and B: {"scale": alpha / rank}
BASE = "cord_lora_base"  #: in /server_info: the identity of the checkpoint's weights
ANY_TRANSPORT = "cord_lora_any_transport"  #: in /server_info: true where A and B are taken without a stream, too
FACTORS = (".lora_A.weight", ".lora_B.weight")
_ENDS = 1 << 20  # bytes at both ends of a file that stand for its content


def identity(directory: Path) -> str | None:
    """Return what tells a checkpoint's weights from others: names, sizes and both ends of its files, as a digest.

    None for what is no directory with safetensors files.
    """
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            digest.update(f"{path.name} {size}\n".encode() + ends + file.read())
    return digest.hexdigest() if files else None


class Base:
    """The tensors of a checkpoint's files, which stay open.

    Args:
        directory: with safetensors files.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self._files:
            raise ValueError(f"LoRA for {name}, which this server's checkpoint does not have")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def merged(tensors: Iterable[tuple[str, Tensor]], scale: float, base: Base) -> Iterator[tuple[str, Tensor]]:
    """Yield W + scale · B A, in the precision of A, for each A [r, in] and its B [out, r]; and all the rest.

    A scale of 0 yields W as the checkpoint has it.

    Raises:
        ValueError: a factor without the other, or beside a weight that the checkpoint lacks.
    """
    waiting: dict[str, tuple[str, Tensor]] = {}  # of each module, the ending and the factor that came first
    for name, tensor in tensors:
        ending = next((ending for ending in FACTORS if name.endswith(ending)), None)
        if ending is None:
            yield name, tensor
            continue
        module = name.removesuffix(ending)
        if module not in waiting:
            waiting[module] = ending, tensor
            continue
        first, other = waiting.pop(module)
        if first == ending:
            raise ValueError(f"LoRA for {module} came twice")
        a, b = (other, tensor) if first == FACTORS[0] else (tensor, other)
        weight = base.read(f"{module}.weight")
        if scale == 0.0:
            yield f"{module}.weight", weight.to(a.device)
            continue
        weight = weight.to(a.device, a.dtype)
        yield f"{module}.weight", (weight.float() + (b.float() @ a.float()) * scale).to(a.dtype)
    for module, (ending, _) in waiting.items():
        raise ValueError(f"LoRA for {module} came without {'B' if ending == FACTORS[0] else 'A'}")


def scale_of(directory: Path) -> float | None:
    """Return alpha / rank of a directory whose files hold LoRA; None for one with whole weights alone."""
    file = directory / SCALE_FILE
    return float(json.loads(file.read_text())["scale"]) if file.is_file() else None


def unpacked(bucket: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one of SGLang's flattened buckets, as views of it."""
    for place in bucket["metadata"]:
        part = bucket["flattened_tensor"][place.start_idx : place.end_idx]
        yield place.name, part.view(place.dtype).view(place.shape)
