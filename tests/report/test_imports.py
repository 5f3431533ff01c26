"""What reports and plans import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_no_torch() -> None:
    """Catches an import of torch, which would cost seconds, and would be missing on a laptop that only reads runs."""
    modules = "report.page.page", "report.live.server", "report.terminal", "plan.page", "plan.report"
    code = f"import sys, {', '.join(f'megatron_cord.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
