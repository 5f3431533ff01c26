"""Two real servers of one checkpoint under the supervisor, on this machine's CPU, for all tests of the engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
)

from examples.quickstart.checkpoint import (
    TinyModelConfig,
    create_checkpoint,
    initialize,
    published_name,
    save_checkpoint,
)
from examples.quickstart.omni_checkpoint import TinyOmniConfig, create_omni_checkpoint
from megatron_cord.convert.graft import Projector, graft
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.rollout.sglang.client.addresses import write_servers_file
from megatron_cord.rollout.sglang.server.process import ENVIRONMENT, ServerConfig
from megatron_cord.rollout.sglang.server.supervisor import Supervisor, SupervisorConfig
from tests.convert.graft.test_graft import write_whisper
from tests.data.test_mistral_tokenizer import AUDIO, MARKS, write_tokenizer
from tests.model.family_reference import DECODER, save_whole, text_config
from tests.model.ranks import MELS, WINDOW
from tests.model.reference import randomise
from tests.tiny_run import ROOT, WORDS

PYTHON = ROOT / ENVIRONMENT / "bin" / "python"
HEAD = "language_model.lm_head.weight"
#: Families whose architecture transformers writes with a model, not with a configuration.
_NAMED = {
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
}


def write_talking_checkpoint(directory: Path) -> Path:
    """Write a random checkpoint of the quickstart's size, four buckets, that hardly ever generates a special token."""
    create_checkpoint(directory, TinyModelConfig(window_seconds=1), [*WORDS, "system"], seed=0)
    return make_talk(directory, HEAD)


def write_talking(directory: Path, family: str, *, tied: bool = False) -> Path:
    """Write the same of another family, FAMILY or FAMILY+TEXT, smaller but for qwen2_audio+TEXT."""
    if family.startswith("qwen2_audio+"):
        return _write_talking_qwen2_audio(directory, family.partition("+")[2])
    save_whole(directory, family, WORDS, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    text = config["text_config"]
    text["max_position_embeddings"] = 512  # recordings of several clips
    if family == "step_audio_2":
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]  # as published
    if family in _NAMED:
        config["architectures"] = [_NAMED[family]]
    (directory / "config.json").write_text(json.dumps(config))
    if family == "audioflamingo3":
        _sharpen_attention(directory)
    if tied:
        return make_talk(directory, "language_model.model.embed_tokens.weight", 1.0)
    return make_talk(directory, "lm_head.weight" if family == "step_audio_2" else HEAD)


def write_talking_qwen3_omni(directory: Path) -> Path:
    """Write the same of Qwen3-Omni, with the marks and settings that its processor needs for images and videos."""
    marks = {
        "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>",
        "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    }  # fmt: skip
    create_omni_checkpoint(directory, TinyOmniConfig(vision_layers=3), [*WORDS, "system", *marks.values()], seed=0)
    ids = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((directory / "config.json").read_text())
    config["thinker_config"] |= {
        "image_token_id": ids["<|IMAGE|>"], "video_token_id": ids["<|VIDEO|>"],
        "vision_start_token_id": ids["<|vision_bos|>"], "vision_end_token_id": ids["<|vision_eos|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer | marks))
    extractor = json.loads((directory / "preprocessor_config.json").read_text())
    pixels = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
    images = {"processor_class": "Qwen3OmniMoeProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(extractor | pixels | images))
    videos = {"processor_class": "Qwen3OmniMoeProcessor", "video_processor_type": "Qwen2VLVideoProcessor"}
    (directory / "video_preprocessor_config.json").write_text(json.dumps(pixels | videos))
    return make_talk(directory, "thinker.lm_head.weight")


def _write_talking_qwen2_audio(directory: Path, kind: str) -> Path:
    """Write the quickstart's checkpoint with another text model; SGLang's processor takes windows of whole seconds."""
    write_talking_checkpoint(directory)
    qwen2_audio: Any = Qwen2AudioForConditionalGeneration
    config = Qwen2AudioConfig.from_pretrained(directory)
    kept = {name: getattr(config.text_config, name) for name in ("vocab_size", "max_position_embeddings")}
    config.text_config = AutoConfig.for_model(**text_config(kind, tied=False) | kept)
    torch.manual_seed(0)
    model = qwen2_audio(config)
    initialize(model, TinyModelConfig.sinusoid_scale)
    model.generation_config = GenerationConfig.from_pretrained(directory)
    save_checkpoint(directory, model, AutoProcessor.from_pretrained(directory))
    return make_talk(directory, HEAD)


def write_talking_voxtral(directory: Path) -> Path:
    """Write a Voxtral with Mistral's tokenizer alone, of bytes, as published ones have it."""
    directory.mkdir(parents=True)
    write_tokenizer(directory)
    audio = VoxtralEncoderConfig(
        num_mel_bins=MELS, hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_source_positions=WINDOW // 2,
    )  # fmt: skip
    text = LlamaConfig(**DECODER | {"vocab_size": len(MARKS) + 256, "max_position_embeddings": 512}, head_dim=10)
    voxtral: Any = VoxtralForConditionalGeneration
    torch.manual_seed(0)
    model = voxtral(VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO))
    randomise(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    save_file(
        {published_name(name): tensor.detach() for name, tensor in model.named_parameters()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": MELS, "n_samples": 160 * WINDOW}
    (directory / "preprocessor_config.json").write_text(json.dumps(extractor | {"hop_length": 160}))
    return make_talk(directory, HEAD)


def write_talking_graft(directory: Path, window: int = 24) -> Path:
    """Write what `cord graft` makes of a random Llama and a random Whisper with so many positions of 20 ms.

    It hardly ever generates a special token.
    """
    parts = directory.with_name(f"{directory.name}-parts")
    llm = save_whole(parts / "llm", "llama", WORDS)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    graft(llm, write_whisper(parts / "whisper", window), directory, Projector(hidden_size=12))
    return make_talk(directory, HEAD)


def write_talking_qwen2_5_omni(directory: Path) -> Path:
    """Write a small Qwen2.5-Omni with the parts that are not served."""
    save_whole(directory, "qwen2_5_omni", WORDS)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["thinker_config"]["text_config"]["max_position_embeddings"] = 512  # recordings of several clips
    config["architectures"] = ["Qwen2_5OmniModel"]  # as published
    path.write_text(json.dumps(config))
    others = {"talker.codec_head.weight": torch.ones(2, 2), "thinker.visual.merger.ln_q.weight": torch.ones(2)}
    save_file(others | load_file(directory / "model.safetensors"), directory / "model.safetensors", {"format": "pt"})
    return make_talk(directory, "thinker.lm_head.weight")


def _sharpen_attention(directory: Path) -> None:
    """Scale up the attention of a checkpoint's decoder, so that the answers depend on more than the last token."""
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if name.startswith("language_model.") and name.endswith(("q_proj.weight", "o_proj.weight")):
            tensors[name] *= 4
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def make_talk(directory: Path, head: str, factor: float = 3.0) -> Path:
    """Change a checkpoint's output layer of this name so that it hardly ever generates a special token."""
    tensors = load_file(directory / "model.safetensors")
    prompts = PromptBuilder(directory)
    scale = torch.full((prompts.vocab_size, 1), factor)
    scale[list(prompts.special_ids)] = 0.0
    scale[list(prompts.eos_ids)] = 1.0  # and seldom ends
    tensors[head] = tensors[head] * scale
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@dataclass
class Servers:
    """The two servers, as tests use them."""

    checkpoint: Path
    file: Path
    supervisor: Supervisor

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Wait until all answer."""
        deadline = time.monotonic() + timeout
        while not all(server.ready for server in self.supervisor.watched):
            assert time.monotonic() < deadline, [server.server.last_line() for server in self.supervisor.watched]
            time.sleep(0.5)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two float32 servers with a supervisor that starts them again."""
    if not PYTHON.exists():
        pytest.skip("the server is not installed; make sglang-env")
    work = tmp_path_factory.mktemp("servers")
    checkpoint = write_talking_checkpoint(work / "checkpoint")
    config: dict[str, Any] = {"checkpoint": checkpoint, "device": "cpu", "python": PYTHON, "max_total_tokens": 4096}
    supervisor = Supervisor(SupervisorConfig(count=2, log_dir=work / "log"), ServerConfig(**config), "")
    stop = threading.Event()
    with supervisor:
        write_servers_file(work / "servers.json", checkpoint, "0.5.21", supervisor.urls)
        thread = threading.Thread(target=supervisor.run, args=(stop,), daemon=True)
        thread.start()
        found = Servers(checkpoint, work / "servers.json", supervisor)
        found.wait_until_ready()
        yield found
        stop.set()
        thread.join()
