"""``python -m benchmarks.gpu_hour.summary DIR full|tiny``: the parts of the script as one JSON and one Markdown file.

Exit status 1 if a part failed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_cord.runtime.files import write_atomic, write_json

#: Metrics of the last training step that are worth a line.
TRAINING = (
    "loss",
    "grad_norm",
    "engine_logprob_difference",
    "tokens_per_second_generate",
    "tokens_per_second_teacher",
    "tokens_per_second_forward_backward",
    "model_flop_utilisation",
    "memory_peak_gb",
    "seconds",
)


def read_parts(record: Path) -> list[dict[str, Any]]:
    """Return the parts that the script has recorded, in their order."""
    lines = [line.split("\t", 3) for line in record.read_text().splitlines()]
    return [{"part": name, "status": status, "seconds": int(s), "says": says} for name, status, s, says in lines]


def read_figures(directory: Path) -> dict[str, Any]:
    """Return the figures that the parts left: of the last training step, the loss beside its baselines, the server."""
    figures: dict[str, Any] = {}
    if (metrics := directory / "metrics.jsonl").exists() and (lines := metrics.read_text().splitlines()):
        last = json.loads(lines[-1])
        figures["training"] = {name: last[name] for name in TRAINING if last.get(name) is not None}
    if (loss := directory / "loss.json").exists():
        parts = json.loads(loss.read_text())
        for part, key in (("layer", "seconds"), ("memory", "peak_bytes")):
            if part in parts:
                candidates = parts[part]["candidates"]
                figures[f"loss_{key}"] = {name: candidate[key] for name, candidate in candidates.items()}
    if (server := directory / "server.json").exists():
        figures["server"] = json.loads(server.read_text())
    return figures


def to_markdown(summary: dict[str, Any]) -> str:
    """Return the summary as a page."""
    machine = summary["machine"]
    lines = [f"# {machine['device']}, size {summary['size']}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in machine["versions"].items()), ""]
    lines += ["| part | result | seconds | |", "| --- | --- | --- | --- |"]
    for part in summary["parts"]:
        says = part["says"].replace("|", "\\|")
        lines.append(f"| {part['part']} | {part['status']} | {part['seconds']} | {says} |")
    for name, figures in summary["figures"].items():
        lines += ["", f"## {name}", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {value:.6g} |" for key, value in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both files and print how many parts passed."""
    directory, size = Path(sys.argv[1]), sys.argv[2]
    parts = read_parts(directory / "parts.tsv")
    counts = Counter(part["status"] for part in parts)
    summary = {
        "machine": json.loads((directory / "machine.json").read_text()),
        "size": size,
        "seconds": sum(part["seconds"] for part in parts),
        "parts": parts,
        "figures": read_figures(directory),
    }
    write_json(directory / "summary.json", summary)
    write_atomic(directory / "summary.md", to_markdown(summary))
    print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped: {directory}/summary.md")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
