"""`cord graft` on tiny stand-ins: what is copied, what is new, prompts, conversion, and every slip in one line."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperModel,
)

from megatron_cord.cli.main import cord, invoke
from megatron_cord.convert import read_tensors
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture

WORDS = ["user", "assistant", "what", "is", "one", "plus", "two"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
MARKS = ["<|unknown|>", "<|im_start|>", "<|im_end|>"]
WINDOW = 200  # positions, 4 s


def write_llm(
    directory: Path, kind: str = "llama", rows: int = 0, *, tied: bool = True, words: Sequence[str] = WORDS
) -> Path:
    """Write a text model whose template takes texts alone, with a row for each token and none to spare by default."""
    sizes: dict[str, Any] = {
        "vocab_size": rows or len(MARKS) + len(words), "hidden_size": 24, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.to(torch.bfloat16).save_pretrained(directory)
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*MARKS, *words])}, unk_token=MARKS[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=MARKS[0],
        eos_token=MARKS[2],
        additional_special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in MARKS[1:]],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(directory)
    (directory / "LICENSE").write_text("Apache 2.0\n")
    return directory


def write_whisper(directory: Path, window: int = WINDOW) -> Path:
    """Write a whole Whisper, decoder included, in float32; `window`: positions of its encoder, 20 ms each."""
    config = WhisperConfig(
        num_mel_bins=8, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=20, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=12, max_source_positions=window, vocab_size=60, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    whisper: Any = WhisperModel
    torch.manual_seed(1)
    whisper(config).save_pretrained(directory)
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor", "feature_size": 8,
        "hop_length": 160, "n_fft": 400, "n_samples": 2 * window * 160, "sampling_rate": 16000,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(extractor))
    return directory


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def graft(*arguments: Any) -> int:
    return invoke(cord, ["graft", *map(str, arguments), "--hidden-size", "12"], "cord")


def sample(seconds: float) -> Sample:
    waveform = (0.1 * np.random.default_rng(0).normal(size=int(16000 * seconds))).astype(np.float32)
    return Sample("s", "what is one plus two", waveform=waveform)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a text model whose config.json is spelt as published ones are, and a Whisper."""
    root = tmp_path_factory.mktemp("sources")
    llm = write_llm(root / "llm")
    config = json.loads((llm / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    published = config | {"rope_theta": 1e5, "rope_scaling": None, "torch_dtype": "bfloat16"}
    (llm / "config.json").write_text(json.dumps(published))
    return llm, write_whisper(root / "whisper")


@pytest.fixture(scope="module")
def grafted(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grafted") / "out"
    assert graft(*sources, out) == 0
    return out


def test_weights_are_those_of_the_sources(sources: tuple[Path, Path], grafted: Path) -> None:
    """Catches a tensor of the wrong source, rows that moved, a decoder left in, and a projector at another scale."""
    tensors, llm = dict(read_tensors(grafted)), dict(read_tensors(sources[0]))
    whisper = {name: tensor for name, tensor in read_tensors(sources[1]) if ".encoder." in f".{name}"}
    towers = {f"language_model.{name}": tensor for name, tensor in llm.items()}
    towers |= {f"audio_tower.{name.partition('encoder.')[2]}": tensor.bfloat16() for name, tensor in whisper.items()}
    assert {name for name in tensors if not name.startswith("multi_modal_projector.")} == towers.keys()
    embedding = tensors.pop("language_model.model.embed_tokens.weight")
    own = towers.pop("language_model.model.embed_tokens.weight")
    assert torch.equal(embedding[: len(own)], own) and len(embedding) == len(own) + 1
    torch.testing.assert_close(embedding[-1].float(), own.float().mean(0), rtol=1e-2, atol=1e-4)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in towers.items())
    with torch.no_grad():
        tokens = PlainModel(grafted, torch.float32)._model.encode_audio(torch.randn(8, 2 * WINDOW), 120)
    language, rows = load_architecture(grafted).language, len(own) + 1
    assert language == replace(load_architecture(sources[0]).language, vocab_size=rows) and language.rope_theta == 1e5
    assert tokens.shape == (15, 24) and 0.5 < float(tokens.std() / own.float().std()) < 2


def test_prompts_are_read_as_before_and_heard_by_length(sources: tuple[Path, Path], grafted: Path) -> None:
    """Catches a template that changes texts, placeholders for padding, and a placeholder that a text can spell."""
    before, after = PromptBuilder(sources[0]), PromptBuilder(grafted, long_audio="cut")
    assert before.text_prompt(sample(1)).token_ids == after.text_prompt(sample(1)).token_ids
    placeholder = load_architecture(grafted).audio_token_id
    assert placeholder == len(MARKS) + len(WORDS) and placeholder in after.special_ids
    for seconds, tokens in ((0.5, 7), (1.0, 13), (3.99, 50), (5.0, 50 + 13)):
        heard = after.audio_prompt(sample(seconds)).token_ids
        assert heard.count(placeholder) == tokens and heard[:2] == (1, WORDS.index("user") + len(MARKS))
    assert (grafted / "LICENSE").is_file()


def test_conversion_and_the_plain_model(grafted: Path, tmp_path: Path) -> None:
    """Catches a checkpoint that `cord convert` loses tensors of, or computes otherwise than the plain model."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    question = ["--text", "what is one plus two", "--tolerance", "1e-4"]
    assert invoke(cord, ["convert", "import", str(grafted), str(checkpoint)], "cord") == 0
    assert invoke(cord, ["convert", "check", str(grafted), str(checkpoint), *question], "cord") == 0
    assert invoke(cord, ["convert", "export", str(checkpoint), str(out)], "cord") == 0
    given, wanted = dict(read_tensors(out)), dict(read_tensors(grafted))
    assert given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)
    kept = {path.name for path in grafted.iterdir()}
    assert kept <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_an_untied_model_with_rows_to_spare(kind: str, sources: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches a row that is added where there is one, a family of fixed biases, and options without effect."""
    llm = write_llm(tmp_path / kind, kind, 16, tied=False)
    if kind == "mistral":  # whose class has a window by default; published configurations say null
        change(llm / "config.json", sliding_window=None)
    out, again = tmp_path / "out", tmp_path / "again"
    graft(llm, sources[1], out, "--stack", "3", "--dtype", "float32", "--seed", "1")
    graft(llm, sources[1], again, "--stack", "3", "--dtype", "float32", "--seed", "2")
    arch, tensors = load_architecture(out), load_file(out / "model.safetensors")
    assert arch.language.vocab_size == 16 and arch.audio_token_id in range(10, 16)
    assert arch.num_audio_tokens(100) == 17 and not arch.language.tied_embeddings
    assert (arch.language.qkv_bias, arch.language.qk_norm) == (kind == "qwen2", kind == "qwen3")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    projector = "multi_modal_projector.linear_1.weight"
    assert tensors[projector].shape == (12, 48)
    assert not torch.equal(tensors[projector], load_file(again / "model.safetensors")[projector])


@pytest.mark.parametrize(
    "case", ["template", "rows", "mels", "order", "speech", "bin", "tensor", "shape", "odd", "there"]
)
def test_slips_are_one_line(sources: tuple[Path, Path], grafted: Path, tmp_path: Path, case: str) -> None:
    """Catches a traceback, a file that is written before everything is checked, and a model that could not be right."""
    llm, whisper, out, options = tmp_path / "llm", tmp_path / "whisper", tmp_path / "out", []
    shutil.copytree(sources[0], llm)
    shutil.copytree(sources[1], whisper)
    weights = llm / "model.safetensors"
    tensors = load_file(weights)
    if case == "template":
        (llm / "chat_template.jinja").unlink()
        message = "has no chat template; give an instruction-tuned model"
    elif case == "rows":
        change(llm / "config.json", vocab_size=9)
        message = "the tokenizer has a token 9, but the word embedding has 9 rows"
    elif case == "mels":
        change(whisper / "preprocessor_config.json", feature_size=128)
        message = "feature_size is 128, but the encoder takes 8"
    elif case == "order":
        llm, whisper = whisper, llm
        message = "model_type 'whisper' is not supported"
    elif case == "speech":
        llm = grafted
        message = "is a model of the family ultravox, which has an encoder already"
    elif case == "bin":
        whisper.joinpath("model.safetensors").rename(whisper / "pytorch_model.bin")
        message = "convert it once with transformers"
    elif case == "tensor":
        tensors.pop("model.norm.weight")
        save_file(tensors, weights)
        message = "model.norm.weight is missing"
    elif case == "shape":
        tensors["model.norm.weight"] = torch.ones(5, dtype=torch.bfloat16)
        save_file(tensors, weights)
        message = "model.norm.weight is [5], wanted is [24]"
    elif case == "odd":
        options = ["--hidden-size", "13"]
        message = "--hidden-size 13 is odd"
    else:
        out.mkdir()
        (out / "file").write_text("")
        message = "exists already and is not overwritten"
    with pytest.raises(CordError) as caught:
        invoke(cord, ["graft", str(llm), str(whisper), str(out), *options], "cord")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert case == "there" or not list(tmp_path.glob("*out*"))
