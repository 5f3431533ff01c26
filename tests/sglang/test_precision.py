"""A real server in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.engines import EngineConfig, build_engine
from megatron_cord.rollout.local import LocalEngine
from megatron_cord.rollout.sglang.server import ServerConfig, SglangServer
from megatron_cord.rollout.types import GenerationRequest
from tests.sglang.conftest import PYTHON
from tests.tiny_run import make_samples, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env")]


def in_bfloat16(checkpoint: Path) -> Path:
    """The checkpoint, its tensors rounded."""
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, checkpoint / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return checkpoint


def test_logprobs_agree_in_bfloat16(tmp_path: Path) -> None:
    """Catches a server that computes in fewer bits than it says, or rounds where transformers does not, for text or for audio."""
    checkpoint = in_bfloat16(write_checkpoint(tmp_path / "checkpoint"))
    server = SglangServer(ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON), "", tmp_path / "server.log")
    initialize(ParallelConfig(), seed=0)
    server.start()
    try:
        server.wait()
        engine = build_engine(EngineConfig(engine="sglang", servers=(server.url,)), checkpoint, torch.device("cpu"))
        local = LocalEngine(checkpoint)
        samples = make_samples(50, seed=3)
        prompts = [build(sample) for sample in samples for build in (local.prompts.audio_prompt, local.prompts.text_prompt)]
        rollouts = engine.generate([GenerationRequest(prompt, 1.0, 12, i) for i, prompt in enumerate(prompts)])
        engine.close()
        model = local._loaded()
        found, wanted = [], []
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            features = torch.stack([clip.features for clip in prompt.clips]).bfloat16() if prompt.clips else None
            frames = torch.tensor([clip.num_frames for clip in prompt.clips]) if prompt.clips else None
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([[*prompt.token_ids, *rollout.token_ids]]), features, frames).last_hidden_state
                logprobs = model.head(hidden)[0, -len(rollout.token_ids) - 1 : -1].log_softmax(-1)
            wanted.append(logprobs.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0])
            found.append(torch.tensor(rollout.logprobs))
        difference = (torch.cat(found) - torch.cat(wanted)).abs()
        share = (difference < 2e-2).float().mean()
        print(f"bfloat16: {len(difference)} tokens, {share:.1%} of log-probabilities within 2e-2, all within {difference.max():.2g}")
        assert next(iter(model.parameters.values())).dtype == torch.bfloat16
        # Logits are rounded to bfloat16 on both sides, from 4 on to the next 1/32: two roundings may fall to different sides.
        assert len(difference) > 400 and share > 0.95 and difference.max() < 5e-2
        assert difference.max() > 1e-6, "both in 32 bits"
    finally:
        server.stop()
        finalize()
