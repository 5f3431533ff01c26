"""Variants of each family's checkpoint against `from_pretrained`: what it loads whole is loaded, or a rule is named."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.quickstart.checkpoint import published_name
from megatron_cord.convert import export_tensors, read_into
from megatron_cord.convert.hf.spelling import plain_class
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.rollout.sglang.weight_sync.served import served_specs
from tests.model import family_reference, reference

FAMILIES = ("audioflamingo3", "qwen2_audio", "voxtral", "qwen2", "llama", "step_audio_2")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


def write(directory: Path, family: str, tied: bool = False) -> Tensors:
    """Write the published checkpoint; return its tensors."""
    if family == "qwen2_audio":
        reference.save(directory, reference.build(tied))
    else:
        family_reference.save(directory, family, tied)
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the weights."""
    save_file({name: t.clone() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def by_transformers(directory: Path, family: str) -> Tensors | None:
    """Return the published tensors that `from_pretrained` makes of a directory; None where it lacks one."""
    published = published_name if family in family_reference.AS_QWEN2_AUDIO else str
    try:
        model, report = plain_class(family).from_pretrained(directory, output_loading_info=True)
    except OSError:
        return None
    return None if report["missing_keys"] else {published(name): t for name, t in model.state_dict().items()}


def by_us(directory: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return the tensors of the model that is trained, and check that the engines' models are the same."""
    model = LALM(load_architecture(directory), layout, dtype)
    read_into(model, directory)
    tensors = dict(export_tensors(model))
    assert served_specs(directory).keys() == tensors.keys()
    plain = PlainModel(directory)
    for name, tensor in tensors.items():
        assert torch.equal(plain.parameters[name].to(dtype), tensor), name
    return tensors


def same(ours: Tensors, theirs: Tensors | None, dtype: torch.dtype = torch.float32) -> bool:
    return theirs is not None and all(torch.equal(theirs[name].to(dtype), tensor) for name, tensor in ours.items())


def dumped(family: str, tensors: Tensors) -> Tensors:
    """Return the names of the module's own state_dict."""
    if family not in family_reference.AS_QWEN2_AUDIO:
        return tensors
    pairs = (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("audio_tower.", "model.audio_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )

    def module_name(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)

    return {module_name(name): tensor for name, tensor in tensors.items()}


def mixed(family: str, tensors: Tensors) -> Tensors:
    """Return the language model's names as in the module, the others as published."""
    return {
        new if "layers.0" in name else name: tensor
        for (name, tensor), new in zip(tensors.items(), dumped(family, tensors), strict=True)
    }


def without_prefix(family: str, tensors: Tensors) -> Tensors:
    """Return the names of a base model within the whole one."""
    return {name.removeprefix("model."): tensor for name, tensor in dumped(family, tensors).items()}


def nested(family: str, tensors: Tensors) -> Tensors:
    """Return the names with the language model one level deeper, as transformers 5.0 wrote them."""
    return {n.replace("language_model.model.", "language_model.model.model.", 1): t for n, t in tensors.items()}


def foreign(family: str, tensors: Tensors) -> Tensors:
    """Return names under a prefix that nothing knows."""
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def lacking(family: str, tensors: Tensors) -> Tensors:
    """Return all tensors but the last norm."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("model.norm.weight")}


@pytest.mark.parametrize("spell", [dict, dumped, mixed, without_prefix, nested, foreign, lacking])
@pytest.mark.parametrize("family", FAMILIES)
def test_names(family: str, spell: Callable[..., Tensors], tmp_path: Path, layout: Layout) -> None:
    """Catches a spelling that `from_pretrained` reads whole and that is refused, and one with a tensor left random."""
    tensors = write(tmp_path, family)
    rewrite(tmp_path, tensors if spell is dict else spell(family, tensors))
    theirs = by_transformers(tmp_path, family)
    if theirs is not None:
        ours = by_us(tmp_path, layout)
        assert ours.keys() == tensors.keys() and same(ours, theirs) and same(ours, tensors)
        return
    assert spell not in (dict, dumped, mixed)
    with pytest.raises(CordError, match="missing tensor"):
        by_us(tmp_path, layout)
    with pytest.raises(CordError):
        PlainModel(tmp_path)


@pytest.mark.parametrize("save", ["whole", "base", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_itself_writes(family: str, save: str, tmp_path: Path, layout: Layout) -> None:
    """Catches a checkpoint of `save_pretrained` that is refused; of the model without its head, one that is not."""
    model: Any = reference.build(False) if family == "qwen2_audio" else family_reference.build(family, False)
    write(tmp_path, family)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "model.safetensors").unlink()
    (model.model if save == "base" else model).save_pretrained(
        tmp_path, max_shard_size="8KB" if save != "base" else 10**9
    )
    (tmp_path / "config.json").write_text(config)
    if save == "base":
        with pytest.raises(CordError, match=r"missing tensor .*lm_head\.weight"):
            by_us(tmp_path, layout)
        return
    assert same(by_us(tmp_path, layout), by_transformers(tmp_path, family))


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_audio"])
@pytest.mark.parametrize("stored", ["embedding", "both", "head", "differing"])
def test_tied_weights(
    family: str, stored: str, tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a tied output layer that is refused where it is stored too, lost where it alone is, or overwritten."""
    caplog.set_level(logging.INFO, logger="megatron_cord")
    tensors = write(tmp_path, family, tied=True)
    prefix = "language_model." if family == "qwen2_audio" else ""
    embedding, head = f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight"
    weight = tensors.pop(embedding)
    tensors |= {embedding: weight} if stored != "head" else {}
    tensors |= {head: weight + 1 if stored == "differing" else weight} if stored != "embedding" else {}
    rewrite(tmp_path, tensors)
    if stored == "differing":  # transformers leaves them untied, against the configuration
        with pytest.raises(CordError, match=r"lm_head.weight and .*embed_tokens.weight differ, .*tie_word_embeddings"):
            by_us(tmp_path, layout)
        return
    ours, theirs = by_us(tmp_path, layout), by_transformers(tmp_path, family)
    assert head not in ours and torch.equal(ours[embedding], weight)
    if family != "qwen2_audio":  # transformers' class does not tie by itself, and misses what is not stored
        assert same(ours, theirs)
    assert ("is the word embedding once more" in caplog.text) == (stored == "both")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(family: str, dtype: torch.dtype, tmp_path: Path, layout: Layout) -> None:
    """Catches a precision of the files that is refused, or that changes the numbers."""
    tensors = {name: tensor.to(dtype) for name, tensor in write(tmp_path, family).items()}
    rewrite(tmp_path, tensors)
    model = LALM(load_architecture(tmp_path), layout, torch.float32)
    read_into(model, tmp_path)
    assert same(dict(export_tensors(model)), by_transformers(tmp_path, family)) and same(
        dict(export_tensors(model)), tensors
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_computed_buffers(family: str, tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    """Catches inverse frequencies, which older transformers stored, that are refused, silent, or said three times."""
    caplog.set_level(logging.INFO, logger="megatron_cord")
    tensors = write(tmp_path, family)
    layer = next(
        re.match(r".*layers\.0\.", name) for name in tensors if "self_attn.q_proj" in name and "tower" not in name
    )
    assert layer is not None
    computed = {f"{layer[0].replace('0', str(i))}self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    rewrite(tmp_path, tensors | computed)
    assert same(by_us(tmp_path, layout), by_transformers(tmp_path, family))
    lines = [record.message for record in caplog.records if "inv_freq" in record.message]
    assert lines == [f"{tmp_path}: 2 tensors *.rotary_emb.inv_freq are ignored: the model computes them"]


@pytest.mark.parametrize("stray", ["consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"])
@pytest.mark.parametrize("sharded", [False, True])
def test_stray_files(
    stray: str, sharded: bool, tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a file beside the model's own that is read as part of it, or left out without a word."""
    caplog.set_level(logging.INFO, logger="megatron_cord")
    tensors = write(tmp_path, "voxtral")
    if sharded:
        (tmp_path / "model.safetensors").unlink()
        for shard, names in split_torch_state_dict_into_shards(
            tensors, max_shard_size="8KB"
        ).filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, tmp_path / shard)
    save_file({"tok_embeddings.weight": torch.zeros(3)}, tmp_path / stray)
    (tmp_path / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")
    if sharded and stray.startswith("model"):  # without an index it cannot be told from a shard
        with pytest.raises(CordError, match=r"unexpected tensor tok_embeddings\.weight"):
            by_us(tmp_path, layout)
        return
    model = LALM(load_architecture(tmp_path), layout, torch.float32)
    read_into(model, tmp_path)
    assert same(dict(export_tensors(model)), tensors)
    lines = [record.message for record in caplog.records if stray in record.message]
    assert lines == [f"{tmp_path}: {stray} beside the model's own weights is not read"]


def test_an_index_beside_the_whole_model(tmp_path: Path, layout: Layout) -> None:
    """Catches an index that a conversion left behind, and whose files are gone: transformers does not read it."""
    tensors = write(tmp_path, "qwen2")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert by_transformers(tmp_path, "qwen2") is not None
    assert same(by_us(tmp_path, layout), tensors)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_model.safetensors", "no .safetensors file of a model but an adapter's; merge it into its base model"),
        ("consolidated.safetensors", "no .safetensors file of a model in Hugging Face's layout but consolidated"),
    ],
)
def test_other_weights_alone(file: str, words: str, tmp_path: Path, layout: Layout) -> None:
    """Catches an adapter or a foreign layout that is refused by a list of all its tensors."""
    write(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(CordError, match=words):
        by_us(tmp_path, layout)


def test_unknown_tensors_are_refused_by_name(tmp_path: Path, layout: Layout) -> None:
    """Catches weights without a place in the model that are dropped, as transformers would: they mean another model."""
    tensors = write(tmp_path, "qwen2")
    rewrite(tmp_path, tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(10)})
    assert by_transformers(tmp_path, "qwen2") is not None
    with pytest.raises(CordError, match=r"unexpected tensor model.layers.0.self_attn.q_norm.weight .*another model's"):
        by_us(tmp_path, layout)
