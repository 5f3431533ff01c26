"""The quickstart with a mixture of experts: `python -m examples.quickstart.omni [--seed S] [a.b=value …]`.

The same task as the quickstart's (examples/quickstart/run.py); the model is a tiny Qwen3-Omni, whose experts two ranks
share out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from examples.quickstart.omni_checkpoint import TinyOmniConfig
from examples.quickstart.run import QUICKSTART, run
from megatron_cord.runtime import entry

OMNI = replace(QUICKSTART, name="quickstart-omni", config=Path(__file__).parent / "omni.yaml", model=TinyOmniConfig())


def main() -> int:
    """Run the example."""
    return run(OMNI, __doc__.splitlines()[0])


if __name__ == "__main__":
    entry.run(main)
