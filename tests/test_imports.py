"""Each module on its own, as the first one that a process imports."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_cord
from tests.test_architecture import imports, source_of

#: What the interpreter of a server imports, which has SGLang and lacks the project.
OF_SERVERS = (
    "megatron_cord.rollout.sglang.plugin.",
    "megatron_cord.model.families.audioflamingo3.sglang_model",
    "megatron_cord.model.families.qwen2_5_omni.sglang_model",
    "megatron_cord.model.families.step_audio_2.sglang_model",
    "megatron_cord.model.families.ultravox.sglang_model",
)
#: What lmms-eval imports, which is not installed beside the project unless its extra is.
OF_LMMS_EVAL = "megatron_cord.lmms_eval.model"
# Forks after the slow packages are imported, which know nothing of the project, and before Megatron-Core is, whose
# place in the order matters.
IMPORT_EACH = """
import importlib, json, os, sys, traceback
import einops, math_verify, matplotlib.pyplot, psutil, rich.progress, torch._dynamo, torch._inductor.utils
import torch.distributed.checkpoint
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


def modules() -> list[str]:
    """Return the names of all modules that the trainer's interpreter can import."""
    found = [module.name for module in pkgutil.walk_packages(megatron_cord.__path__, "megatron_cord.")]
    absent = () if importlib.util.find_spec("lmms_eval") else (OF_LMMS_EVAL,)
    return [name for name in found if not name.startswith((*OF_SERVERS, *absent))]


def problems_of(names: list[str]) -> dict[str, str]:
    """Import each of these modules in a fresh process; return the tracebacks by name."""
    environment = os.environ | {"PYTHONPATH": str(Path(megatron_cord.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    problems: dict[str, str] = json.loads(done.stdout)
    return problems


@pytest.mark.slow
def test_each_module_can_be_the_first() -> None:
    """Catches imports that only work in the entry points' order.

    Without circles (`test_architecture.py`) such an order can only be that of megatron.core and what makes it usable
    without CUDA, which `test_megatron_core_is_imported_after_the_portability_layer` finds in the source; this is the
    proof by trying.
    """
    names = modules()
    assert "megatron_cord.trainer.step.step" in names and "megatron_cord.rollout" in names
    problems = problems_of(names)
    assert not problems, "\n".join(f"{name}:\n{problem}" for name, problem in problems.items())


def test_a_user_of_megatron_core_can_be_the_first() -> None:
    """Catches an import of a room below the trainer that fails in a fresh process; commands start the trainer there."""
    problems = problems_of(["megatron_cord.model.lalm"])
    assert not problems, "\n".join(f"{name}:\n{problem}" for name, problem in problems.items())


def test_megatron_core_is_imported_after_the_portability_layer() -> None:
    """Catches a module that imports megatron.core though no package around it imports megatron_cord.parallel first."""
    graph = imports()

    def runs(module: str) -> set[str]:
        """Return what an import of the module runs: the packages around it, and what they and it name."""
        done, waiting = set[str](), [module]
        while waiting:
            name = waiting.pop()
            if name not in done:
                done.add(name)
                waiting += [*packages_around(name), *graph[name]]
        return done

    users = [(name, earlier) for name in graph if (earlier := imported_before_megatron(name)) is not None]
    assert len(users) > 10
    for name, earlier in users:
        first = set[str]().union(*(runs(module) for module in [*packages_around(name), *earlier] if module in graph))
        assert "megatron_cord.parallel" in first, (
            f"{name} imports megatron.core before megatron_cord.parallel: import that in its package's __init__"
        )


def packages_around(module: str) -> list[str]:
    """Return the packages that an import of the module runs before it."""
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def imported_before_megatron(module: str) -> list[str] | None:
    """Return what the file imports before its first import of megatron.core; None if it has none outside functions."""
    before: list[str] = []
    for node in ast.parse(source_of(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            named = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        else:
            continue
        if any(name == "megatron" or name.startswith("megatron.") for name in named):
            return before
        before += named
    return None
