"""Let this environment use another one's packages, behind its own.

``.venv-next/bin/python tools/borrow_packages.py .venv/bin/python``
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    """Entry point."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    lender = subprocess.run([sys.argv[1], "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    # A plain path in a .pth file would leave out the lender's own .pth files, the one of this project among them.
    (Path(sysconfig.get_path("purelib")) / "borrowed.pth").write_text(f"import site; site.addsitedir({lender!r})\n")


if __name__ == "__main__":
    main()
