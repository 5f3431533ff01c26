"""`cord graft` of a text model in a GGUF file: weights, tokenizer and marks are those of the model it was made of."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_cord.cli.main import cord, invoke
from megatron_cord.convert import read_tensors
from megatron_cord.convert.graft.gguf import gguf_architecture
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from tests.convert.graft.test_graft import sample, write_whisper

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

LETTERS = [chr(ord("a") + i) for i in range(26)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġ", "Ċ", "?", "th", "qu"]
START, END = 1, 2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADS, GROUPS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_model() -> Any:
    torch.manual_seed(0)
    llama: Any = LlamaForCausalLM
    config: Any = LlamaConfig
    return llama(
        config(
            vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=256, rope_theta=5e4,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of queries or keys in the order of GGUF's: a head's two halves in turn."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Any, *, template: str | None = TEMPLATE, kind: str = "llama", scaling: bool = False
) -> Path:
    """Write a model's file: matrices with 8 bits, vectors with 32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("Tiny")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5e4)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["t h", "q u"])
    writer.add_bos_token_id(START)
    writer.add_eos_token_id(END)
    if template is not None:
        writer.add_chat_template(template)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        own = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if own is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            own = f"blk.{layer}.{NAMES[part]}.weight"
            heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(NAMES[part])
            tensor = tensor if heads is None else interleaved(tensor, heads)
        if tensor.dim() == 1:
            writer.add_tensor(own, tensor.numpy())
        else:
            writer.add_tensor(own, gguf.quants.quantize(tensor.numpy(), eight_bits), raw_dtype=eight_bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_tokenizer_and_marks(tmp_path: Path) -> None:
    """Catches rows of queries in GGUF's order, bos for eos (as transformers has them), and leftovers of the graft."""
    model = write_model()
    file = write_gguf(tmp_path / "llm" / "tiny.gguf", model)
    (file.parent / "LICENSE").write_text("Apache 2.0\n")
    whisper, out = write_whisper(tmp_path / "whisper"), tmp_path / "out"
    for given, options in ((file, ["--dtype", "float32"]), (file.parent, [])):
        target = out / given.name
        arguments = [str(given), str(whisper), str(target), "--hidden-size", "12", *options]
        assert invoke(cord, ["graft", *arguments], "cord") == 0
        tensors, precision = dict(read_tensors(target)), torch.float32 if options else torch.bfloat16
        for name, wanted in model.state_dict().items():
            if name == "lm_head.weight":
                continue
            given_rows = tensors[f"language_model.{name}"][: len(wanted)]
            assert given_rows.dtype == precision
            error = (given_rows.float() - wanted).abs().max() / wanted.abs().max()
            assert error < 0.012, name  # a step of 8 bits is 1/127 of the largest of 32 weights
        assert (target / "LICENSE").is_file()
    assert {path.name for path in out.iterdir()} == {file.name, file.parent.name}
    builder = PromptBuilder(target)
    prompt = builder.text_prompt(sample(1)).token_ids
    text = "".join(builder.token_strings(prompt))
    assert builder.eos_ids == (END,) and prompt[0] == START
    assert text.replace(" ", "").startswith("<|im_start|>user") and "whatisoneplustwo" in text.replace(" ", "")
    assert json.loads((target / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
    assert json.loads((target / "config.json").read_text())["text_config"]["rope_parameters"]["rope_theta"] == 5e4


def test_sizes_are_known_without_the_weights(tmp_path: Path) -> None:
    """Catches heads that are mixed up, on which a layout depends."""
    language = gguf_architecture(write_gguf(tmp_path / "tiny.gguf", write_model())).language
    assert (language.num_heads, language.num_kv_heads, language.num_layers) == (HEADS, GROUPS, 2)
    assert (language.hidden_size, language.ffn_hidden_size, language.vocab_size) == (32, 64, len(TOKENS))
    with pytest.raises(CordError, match="is a phi3, which is not supported"):
        gguf_architecture(write_gguf(tmp_path / "other.gguf", write_model(), kind="phi3"))


@pytest.mark.parametrize("case", ["template", "kind", "damaged", "two", "rotary"])
def test_slips_are_one_line(tmp_path: Path, case: str) -> None:
    """Catches a traceback of a library, and a file that is used though it cannot be right."""
    file = tmp_path / "llm" / "tiny.gguf"
    write_gguf(
        file,
        write_model(),
        template=None if case == "template" else TEMPLATE,
        kind="phi3" if case == "kind" else "llama",
        scaling=case == "rotary",
    )
    given = file
    if case == "rotary":
        message = "has scaled rotary positions, which are not read from GGUF"
    elif case == "template":
        message = "has no chat template; give an instruction-tuned model"
    elif case == "kind":
        message = "is a phi3, which is not supported; choose one of llama, "
    elif case == "damaged":
        file.write_bytes(file.read_bytes()[:3000])
        message = "cannot be read as GGUF"
    else:
        file.with_name("other.gguf").write_bytes(b"")
        given, message = file.parent, "holds other.gguf, tiny.gguf; give one of the files"
    arguments = [str(given), str(write_whisper(tmp_path / "whisper")), str(tmp_path / "out")]
    with pytest.raises(CordError) as caught:
        invoke(cord, ["graft", *arguments], "cord")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"llm", "whisper"}
