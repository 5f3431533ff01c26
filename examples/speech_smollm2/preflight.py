"""Look before anything is computed: processor, memory, packages, layout, and what a directory was made of.

Each fault is one line. What only the weights tell (no chat template, features of other mel bands) is refused by
`cord graft`, which comes first.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_cord.convert.graft.gguf import gguf_architecture, gguf_file
from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.errors import CordError
from megatron_cord.losses.kernels.matmul import multiplies_bfloat16
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import ParallelConfig
from megatron_cord.runtime.files import checkpoint_fingerprint, file_digest, fingerprint, read_json_object, write_json

RECORD = "inputs.json"
_GB = 1e9
#: Of one rank: what it holds whatever the model is (programs, 1,000 questions' features), and how often it holds the
#: weights (trainer and engine in the run's precision, and what one of them is loaded from).
_RANK_BYTES, _COPIES = 4.0 * _GB, 3
_PACKAGES = {"piper": "piper", "gguf": "gguf"}  # by extra


def choose_dtype(asked: str | None) -> str:
    """Return the precision to compute in: the one that is asked for, else bfloat16 where the hardware multiplies it.

    Raises:
        CordError: bfloat16 is asked for on a processor that would convert every operand.
    """
    has_bfloat16 = torch.cuda.is_available() or multiplies_bfloat16()
    if asked == "bfloat16" and not has_bfloat16:
        raise CordError(
            "model.dtype=bfloat16: this processor has no bfloat16 products (avx512_bf16, amx_bf16), and would be "
            "slower than with float32; leave model.dtype out, or set it to float32"
        )
    return asked or ("bfloat16" if has_bfloat16 else "float32")


def check_packages(llm: Path, voice: Path | None) -> None:
    """Refuse inputs that need a package which is not there."""
    needed = {"gguf": gguf_file(llm) is not None, "piper": voice is not None}
    if missing := [extra for extra, is_needed in needed.items() if is_needed and find_spec(_PACKAGES[extra]) is None]:
        raise CordError(
            f"the extra {missing[0]} is missing; make speech installs it, or pip install -e '.[{missing[0]}]'"
        )
    if voice is not None and not voice.is_file():
        raise CordError(f"--voice {voice}: no such file; give a Piper voice (.onnx, its .onnx.json beside it)")


def check_memory(llm: Path, dtype: str, ranks: int) -> None:
    """Refuse ranks that this machine cannot hold.

    Raises:
        CordError: it cannot, or there is no model.
    """
    size = getattr(torch, dtype).itemsize
    if (file := gguf_file(llm)) is not None:
        weights = file.stat().st_size * 2 * size  # taken for four bits a weight
    else:
        weights = sum(tensor.nbytes / tensor.dtype.itemsize for tensor in stored_tensors(llm)) * size
    needed, free = ranks * (_RANK_BYTES + _COPIES * weights), psutil.virtual_memory().available
    if needed > free:
        fewer = "--ranks 1 takes half of it" if ranks > 1 else "choose a smaller model"
        raise CordError(
            f"{llm} on {ranks} ranks takes about {needed / _GB:.0f} GB of memory, and {free / _GB:.0f} GB are free; "
            f"{fewer}"
        )


def check_layout(model: Path, parallel: ParallelConfig, ranks: int) -> None:
    """Refuse a layout that cannot hold the model, naming the size that does not divide.

    Raises:
        CordError: it cannot; with SmolLM2's nine heads that is every even tp.
    """
    if parallel.tp * parallel.pp > 1:  # reading a GGUF file takes seconds, and nothing is split without these
        file = gguf_file(model)
        try:
            (load_architecture(model) if file is None else gguf_architecture(file)).check_divisible(
                parallel.tp, parallel.pp, parallel.virtual_pp, parallel.pipeline_layers, parallel.ep
            )
        except CordError as error:
            raise CordError(f"{error}; ranks share the batch without any: --ranks {ranks} with parallel.tp=1") from None
    if ranks % (size := parallel.tp * parallel.pp * parallel.cp):
        raise CordError(f"--ranks {ranks} is no multiple of parallel.tp × parallel.pp × parallel.cp = {size}")


def claim(root: Path, inputs: Mapping[str, Any]) -> None:
    """Write down what a directory is made of, or compare it with what is written there.

    Raises:
        CordError: it was made of something else.
    """
    path = root / RECORD
    if not path.is_file():
        write_json(path, dict(inputs))
        return
    begun = read_json_object(path, f"remove {root} and begin anew")
    if changed := sorted(name for name in begun.keys() | inputs.keys() if begun.get(name) != inputs.get(name)):
        raise CordError(f"{root} was begun with another {' and '.join(changed)}; remove it, or give another --root")


def stands_for(given: Path, suffixes: Collection[str] = (".safetensors", ".json", ".gguf", ".bin", ".onnx")) -> str:
    """Return what tells a directory of weights, or a file (a voice with its .json), from others, wherever it lies."""
    if given.is_dir():
        return checkpoint_fingerprint(given, suffixes)
    files = (given, given.with_name(f"{given.name}.json"))
    return fingerprint(part for file in files if file.is_file() for part in (file.name, file_digest(file)))


def default_ranks() -> int:
    """Return two where there are two cores, else one."""
    return 2 if len(os.sched_getaffinity(0)) > 1 else 1
