"""What importing rewards costs: configurations and commands name them long before a model is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_rewards_import_nothing_heavy() -> None:
    """Would catch torch, an HTTP client or sympy imported only to read a configuration or to compare two numbers."""
    program = (
        "import sys\n"
        "from megatron_cord.reward import RewardConfig, answers_agree\n"
        "assert RewardConfig() and answers_agree('1/2', '0.50')\n"
        "print(*{'torch', 'wandb', 'httpx', 'sympy', 'pyarrow', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""
