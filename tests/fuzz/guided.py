"""`python tests/fuzz/guided.py NAME SECONDS` fuzzes one of the targets with atheris, guided by coverage.

Needs `pip install atheris`, which is no dependency.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(
    include=["megatron_cord.data", "megatron_cord.evaluation", "megatron_cord.reward", "megatron_cord.config.loading"]
):
    from tests.fuzz.targets import attempt


def main() -> None:
    """Fuzz for so many seconds; libFuzzer prints what breaks a target, and exits with a status other than 0."""
    name, seconds = sys.argv[1], sys.argv[2]
    options = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=4096",
        "-max_len=4096",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, *sys.argv[3:]], lambda content: attempt(name, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
