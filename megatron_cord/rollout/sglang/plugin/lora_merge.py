"""How a server of this project takes LoRA: as A and B alone, which it merges with the weights of its own checkpoint.

The checkpoint's files are read again at each weight sync, from the page cache if there is memory for it, so that the
server keeps no second copy, errors do not add up, and it does not matter which weights it had before. It tells trainers
what its checkpoint is; those that train beside another one send merged weights.

It runs in the server's interpreter and must not import the project; the trainer takes names and `identity` from here.
Legend: r rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

#: what stands between the buckets of a stream and alpha / rank, in a load_format
LORA = ";lora="
BASE = "cord_lora_base"  #: in /server_info: the identity of the checkpoint's weights
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
    """Yield W + scale · B A, in the precision of A, for every A [r, in] and the B [out, r] behind it; and all the rest.

    Raises:
        ValueError: a factor without the other, or beside a weight that the checkpoint lacks.
    """
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors:
        module, is_a = name.removesuffix(FACTORS[0]).removesuffix(FACTORS[1]), name.endswith(FACTORS[0])
        if first is not None and not (name.endswith(FACTORS[1]) and module == first[0]):
            raise ValueError(f"LoRA for {first[0]} came without B")
        if is_a:
            first = module, tensor
        elif name.endswith(FACTORS[1]):
            if first is None:
                raise ValueError(f"LoRA for {module} came without A")
            a, first = first[1], None
            weight = base.read(f"{module}.weight").to(tensor.device, a.dtype)
            yield f"{module}.weight", (weight.float() + (tensor.float() @ a.float()) * scale).to(a.dtype)
        else:
            yield name, tensor
    if first is not None:
        raise ValueError(f"LoRA for {first[0]} came without B")
