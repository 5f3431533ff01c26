"""transformer-engine's compiled extension (`transformer_engine_torch`) in plain torch, as far as training calls it.

transformer-engine's own Python code runs over it on a CPU: modules, autograd functions, collectives, the choice of an
attention, FusedAdam. The kernels here follow what the compiled ones compute, in fp32. It simplifies: no FP8, no
communication overlap, no fused attention (transformer-engine then takes its own unfused one). Whatever else is called
raises NotImplementedError with its name.

Legend: N tokens, I and O features, S positions, B sequences, T packed tokens, D head size.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_TYPES = ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1")
_make_enum: Any = enum.IntEnum
DType = _make_enum("DType", _TYPES, start=0)
_TORCH_TYPES = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class Absent(type):
    """A class that can be named, in annotations and defaults, but not used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Absent(f"{cls.__name__}.{name}", (), {})
        setattr(cls, name, value)
        return value

    def __int__(cls) -> int:
        return sum(cls.__name__.encode())  # of an enumeration's member, which Python code may look up

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} is not in the tests' extension.py")


class Extension(ModuleType):
    """The module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Absent(name, (), {})
        setattr(self, name, value)
        return value


def generic_gemm(
    a: Tensor,
    transposes_a: bool,
    b: Tensor,
    transposes_b: bool,
    out: Tensor | None,
    quantizer: None,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: Tensor | None,
    is_gradient: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulates: bool,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Multiply as cuBLAS does in column-major order: op(B) · op(A), rows being all dimensions but the last.

    Returns: the product, the bias's gradient where ``is_gradient``, and two results that are not made here.
    """
    if quantizer is not None or gelu:
        raise NotImplementedError("generic_gemm: FP8 and a fused GELU are not in the tests' extension.py")
    left, right = b.reshape(-1, b.shape[-1]).float(), a.reshape(-1, a.shape[-1]).float()
    product = (left.T if transposes_b else left) @ (right.T if transposes_a else right)
    bias_gradient = None
    if bias is not None and is_gradient:
        bias_gradient = left.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if out is None:
        shape = product.shape if transposes_b else (*b.shape[:-1], product.shape[-1])
        dtype = a.dtype if out_dtype is None else _TORCH_TYPES[DType(int(out_dtype))]
        return product.to(dtype).reshape(shape), bias_gradient, None, None
    if accumulates:
        out.add_(product.reshape(out.shape))
    else:
        out.copy_(product.reshape(out.shape))
    return out, bias_gradient, None, None


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transposes_a: bool,
    b: Sequence[Tensor],
    transposes_b: bool,
    out: Sequence[Tensor],
    out_dtype: Any,
    m_splits: Sequence[int] | None,
    bias: Sequence[Tensor],
    _bias_dtype: Any,
    single_output: bool,
    _gelu_input: Sequence[Tensor],
    _is_gradient: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulates: bool,
    *_: Any,
) -> Sequence[Tensor]:
    """Multiply pairs of matrices as ``generic_gemm`` does; with a single output they are its rows, one after the other.

    Returns: the biases' gradients, which are not made here.
    """
    if any(each.numel() for each in bias):
        raise NotImplementedError("te_general_grouped_gemm: biases are not in the tests' extension.py")
    outputs = torch.split(out[0], list(m_splits or ())) if single_output else out
    for left, right, into in zip(a, b, outputs, strict=True):
        generic_gemm(
            *(left, transposes_a, right, transposes_b, into, None, out_dtype, None, None, False, None, False),
            *(workspaces[0], workspace_size, accumulates),
        )
    return bias


def _scale_of(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1.0 if zero_centered else weight.float()


def _given(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, _q: None, _dtype: Any, _margin: int, zero_centered: bool
) -> tuple[Tensor, None, Tensor]:
    """Return the normed [N, I], nothing, and the reciprocal roots of the mean squares [N]."""
    rsigma = (x.float().square().mean(-1) + eps).rsqrt()
    y = x.float() * rsigma[:, None] * _scale_of(weight, zero_centered)
    return _given(out, y.to(x.dtype)), None, rsigma


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [N, I] and of the weight [I]."""
    normed = x.float() * rsigma[:, None]
    g = dz.float() * _scale_of(weight, zero_centered)
    dx = rsigma[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.float() * normed).sum(0).to(weight.dtype)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None,
    _q: None,
    _dtype: Any,
    _margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normed [N, I], means [N], and the reciprocal standard deviations [N]."""
    mean = x.float().mean(-1)
    rsigma = (x.float().var(-1, unbiased=False) + eps).rsqrt()
    y = (x.float() - mean[:, None]) * rsigma[:, None] * _scale_of(weight, zero_centered) + bias.float()
    return _given(out, y.to(x.dtype)), mean, rsigma


def layernorm_bwd(
    dz: Tensor, x: Tensor, mean: Tensor, rsigma: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [N, I], of the weight [I] and of the bias [I]."""
    normed = (x.float() - mean[:, None]) * rsigma[:, None]
    g = dz.float() * _scale_of(weight, zero_centered)
    dx = rsigma[:, None] * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.float() * normed).sum(0).to(weight.dtype), dz.float().sum(0).to(weight.dtype)


def _rotate(t: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first features of each head, their halves being the pairs; angles [S, 1, 1, features]."""
    size = angles.shape[-1]
    turned, rest = t[..., :size].float(), t[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([turned.to(t.dtype), rest], -1)


def fused_rope_forward(
    t: Tensor,
    freqs: Tensor,
    start_positions: None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Rotate queries or keys, [S, B, heads, D] or packed [T, heads, D], by freqs [S, 1, 1, features]."""
    if start_positions is not None or interleaved or cp_size != 1:
        raise NotImplementedError("fused_rope: positions, pairs side by side and context parallelism are not here")
    if cu_seqlens is None:
        assert t.dim() == 4  # [S, B, heads, D]: the only padded layout that Megatron gives it
        return _rotate(t, freqs[: t.shape[0]])
    pieces = [_rotate(t[first:end, None], freqs[: end - first])[:, 0] for first, end in pairwise(cu_seqlens.tolist())]
    return torch.cat(pieces)


def fused_rope_backward(gradient: Tensor, freqs: Tensor, *arguments: Any) -> Tensor:
    """Rotate a gradient back."""
    return fused_rope_forward(gradient, -freqs, *arguments)


def convert_thd_to_bshd(packed: Tensor, cu_seqlens: Tensor, num_sequences: int, longest: int) -> Tensor:
    """Unpack [T, heads, D] to [B, S, heads, D], zero behind each sequence."""
    padded = packed.new_zeros(num_sequences, longest, *packed.shape[1:])
    for row, (first, end) in zip(padded, pairwise(cu_seqlens.tolist()), strict=True):
        row[: end - first] = packed[first:end]
    return padded


def convert_bshd_to_thd(padded: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Pack [B, S, heads, D] to [T, heads, D]."""
    packed = padded.new_zeros(int(num_tokens), *padded.shape[2:])
    for row, (first, end) in zip(padded, pairwise(cu_seqlens.tolist()), strict=True):
        packed[first:end] = row[: end - first]
    return packed


def multi_tensor_adam(
    _chunk: int,
    _overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    corrects_bias: int,
    weight_decay: float,
) -> None:
    """Update parameters and their two moments in place by AdamW; lists: gradients, parameters, both moments."""
    assert mode == 1  # decoupled weight decay
    for gradient, parameter, first, second in zip(*lists, strict=True):
        g = gradient.float()
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        c1, c2 = (1 - beta1**step, 1 - beta2**step) if corrects_bias else (1.0, 1.0)
        update = (first / c1) / ((second / c2).sqrt() + eps) + weight_decay * parameter.float()
        parameter.add_(update.to(parameter.dtype), alpha=-lr)


def multi_tensor_l2norm(
    _chunk: int, _overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together, [1], and of each."""
    each = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return each.norm()[None], each


def multi_tensor_scale(_chunk: int, _overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: Any) -> None:
    """Write multiples of the first tensors to the second ones."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


KERNELS = (
    generic_gemm,
    te_general_grouped_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    layernorm_fwd,
    layernorm_bwd,
    fused_rope_forward,
    fused_rope_backward,
    convert_thd_to_bshd,
    convert_bshd_to_thd,
    multi_tensor_adam,
    multi_tensor_l2norm,
    multi_tensor_scale,
)


def make_extension(version: str) -> Any:
    """Build the module for a version of transformer-engine, which asks for an attention backend in its own way."""
    is_old = version.startswith("2.11.")
    extension: Any = Extension("transformer_engine_torch")
    for kernel in KERNELS:
        setattr(extension, kernel.__name__, kernel)
    extension.multi_tensor_scale_tensor = multi_tensor_scale
    extension.bgrad_quantize = lambda gradient, _quantizer: (gradient.sum(0), gradient)
    extension.DType = DType
    extension.get_cublasLt_version = lambda: 130000
    extension.get_cudnn_version = lambda: 92000
    extension.get_num_cublas_streams = lambda: 4
    enums = {
        "FP8FwdTensors": [f"GEMM{n}_{part}" for n in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")],
        "FP8BwdTensors": [f"GRAD_{part}{n}" for n in (1, 2, 3) for part in ("OUTPUT", "INPUT")],
        "NVTE_Fused_Attn_Backend": [
            *("NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"),
            *(["NVTE_F16_max512_seqlen"] if is_old else []),
        ],
    }
    for name, members in enums.items():
        setattr(extension, name, _make_enum(name, members, start=0))
    none = extension.NVTE_Fused_Attn_Backend.NVTE_No_Backend
    answer = none if is_old else (none, "there is no fused attention without CUDA")
    extension.get_fused_attn_backend = lambda *_, **__: answer
    return extension
