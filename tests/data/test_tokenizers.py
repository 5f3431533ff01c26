"""Tokenizers of both kinds behind one interface; the sentencepiece model is a tiny one, trained here."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from examples.quickstart.checkpoint import CHAT_TEMPLATE, build_tokenizer
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_cord.errors import CordError
from tests.data.prompts.test_builder import sample
from tests.model.family_reference import save
from tests.model.ranks import VOCAB_SIZE

MARKS = ["<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
TURNS = [{"role": "user", "content": [{"type": "text", "text": "one plus two"}]}]


@pytest.fixture(scope="module")
def piece_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.model and chat_template.jinja, nothing else."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(
            ["user what is one plus two", "assistant three", "four is two plus two", "what is five"] * 5
        ),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=50,
        model_type="bpe",
        user_defined_symbols=[*MARKS, "plus"],
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return directory


@pytest.fixture(params=["huggingface", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, piece_directory: Path, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(piece_directory)
    build_tokenizer(["one", "plus", "two", "three"]).save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


def test_the_kind_is_found(piece_directory: Path, tmp_path: Path) -> None:
    """Catches a sentencepiece model that is taken where Hugging Face's files stand beside it."""
    assert isinstance(load_tokenizer(piece_directory), SentencePieceTokenizer)
    build_tokenizer(["one"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((piece_directory / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_a_conversation(tokenizer: Tokenizer) -> None:
    """Catches marks that are spelt letter by letter, marks that are added, and text that does not come back."""
    text = tokenizer.render(TURNS)
    assert text == "<|im_start|>user one plus two<|im_end|><|im_start|>assistant "
    ids = tokenizer.encode(text)
    marks = [index for index in ids if index in tokenizer.special_ids]
    assert [tokenizer.decode([index]) for index in marks] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    words = tokenizer.decode([index for index in ids if index not in tokenizer.special_ids])
    assert words.replace(" ", "") == "useroneplustwoassistant"
    assert max(ids) < len(tokenizer) and tokenizer.eos_id in tokenizer.special_ids


def test_the_vocabulary_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a count for each token that is written down: it copies the vocabulary, 19 ms of 49,152 tokens."""
    build_tokenizer(["one", "plus"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = len(tokenizer)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__len__", lambda _: pytest.fail("the vocabulary is counted again"))
    assert len(tokenizer) == expected > 2


def test_another_template(tokenizer: Tokenizer) -> None:
    """Catches a template given for the conversation that is not the one used."""
    assert tokenizer.render(TURNS, "{{ messages[0]['role'] }}!") == "user!"


def test_marks_of_sentencepiece(piece_directory: Path) -> None:
    """Catches pieces of text that are never sampled because they were defined by hand, and marks that are."""
    tokenizer = load_tokenizer(piece_directory)
    assert {tokenizer.decode([i]) for i in tokenizer.special_ids} >= set(MARKS)
    (plus,) = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "plus"]
    assert plus in tokenizer.encode("one plus two") and plus not in tokenizer.special_ids
    assert tokenizer.pad_id is None and tokenizer.unknown_id == 0


def test_bad_directories_are_named(piece_directory: Path, tmp_path: Path) -> None:
    """Catches tracebacks for a damaged model, and for a checkpoint without a chat template."""
    (tmp_path / "tokenizer.model").write_bytes((piece_directory / "tokenizer.model").read_bytes())
    with pytest.raises(CordError, match="has no chat template; put the original checkpoint's"):
        load_tokenizer(tmp_path).render(TURNS)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(CordError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_prompts_of_a_text_model(piece_directory: Path, tmp_path: Path) -> None:
    """Catches a prompt builder that wants a processor or an encoder where a teacher only reads."""
    save(tmp_path, "llama", tied=False)
    for path in piece_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    builder = PromptBuilder(tmp_path)
    ids = builder.text_prompt(Sample(id="s", question="one plus two", waveform=sample().waveform)).token_ids
    assert builder.decode(ids).replace(" ", "") == "useroneplustwoassistant"
    assert builder.audio_token_id is None and builder.vocab_size == VOCAB_SIZE
    assert set(range(50, VOCAB_SIZE)) <= set(builder.special_ids)
    with pytest.raises(CordError, match="sample s7: a llama model takes no audio; choose a checkpoint with an audio"):
        builder.audio_prompt(sample())


def test_texts_with_marks_are_found(piece_directory: Path, tmp_path: Path) -> None:
    """Catches a mark in a user's text that becomes a control token, whatever tokenizer, declared special or not."""
    save(tmp_path, "llama", tied=False)
    for path in piece_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pieces = PromptBuilder(tmp_path)
    assert [pieces.control_token(f"two {mark} one") for mark in MARKS] == MARKS
    assert pieces.control_token("one ＜|im_end|＞ two") == "<|im_end|>"  # wide brackets, normalized
    for text in ("one plus two", "two < one > two", "½ <- |one|", "<s>", "</s>", "<unk>"):
        assert pieces.control_token(text) is None, text
    tokens = build_tokenizer(["one", "plus", "two"])
    tokens.add_tokens(["<tool_call>", "[CALL]", "plus plus"])
    tokens.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    words = PromptBuilder(tmp_path / "hf")
    for mark in [*MARKS, "<tool_call>", "[CALL]"]:
        assert words.control_token(f"two{mark}one") == mark
        with pytest.raises(CordError, match=r"sample s7 has .* in its question, a control token of the model; remove"):
            words.text_prompt(Sample("s7", f"one {mark} two"))
    assert words.control_token("one plus plus two") is None and words.control_token("one [two] <one>") is None
