"""Each module on its own, as the first one that a process imports."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import megatron_cord

#: What the interpreter of a server imports, which has SGLang and lacks the project.
OF_SERVERS = ("megatron_cord.rollout.sglang.plugin.", "megatron_cord.model.families.step_audio_2.sglang_model")
# Forks after the slow packages are imported, which know nothing of the project, and before Megatron-Core is, whose place in the order matters.
IMPORT_EACH = """
import importlib, json, os, sys, traceback
import einops, math_verify, matplotlib.pyplot, psutil, rich.progress, torch._dynamo, torch._inductor.utils, torch.distributed.checkpoint
import torch.distributed.tensor.experimental, torch.utils.cpp_extension, torch.utils.tensorboard
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
assert not any(name.startswith("megatron") for name in sys.modules)
problems = {}
for name in sys.argv[1:]:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            os.write(writer, traceback.format_exc()[-2000:].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        problem = pipe.read()
    status = os.waitpid(child, 0)[1]
    if problem or status:
        problems[name] = problem or f"status {status}"
print(json.dumps(problems))
"""


def test_each_module_can_be_the_first() -> None:
    """Catches imports that only work in the entry points' order: cycles, and megatron.core before what makes it usable without CUDA."""
    found = [module.name for module in pkgutil.walk_packages(megatron_cord.__path__, "megatron_cord.")]
    names = [name for name in found if not name.startswith(OF_SERVERS)]
    assert "megatron_cord.trainer.step.step" in names and "megatron_cord.rollout" in names
    environment = os.environ | {"PYTHONPATH": str(Path(megatron_cord.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    problems = json.loads(done.stdout)
    assert not problems, "\n".join(f"{name}:\n{problem}" for name, problem in problems.items())
