"""The templates and other assets of the pages."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2

from megatron_cord.evaluation.statistics import why_no_gap
from megatron_cord.report.page.charts import css_dashes, format_number, format_percent
from megatron_cord.report.page.overview import format_duration
from megatron_cord.report.page.tokens import LEVELS, WEIGHT_LEVELS, annotate

_ASSETS = Path(__file__).parents[1] / "assets"


@cache
def templates() -> jinja2.Environment:
    """Return the templates, which escape every text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": format_percent, "number": format_number, "duration": format_duration}
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}"
    environment.globals |= {"annotate": annotate, "levels": LEVELS, "weight_levels": WEIGHT_LEVELS}
    environment.globals |= {"why_no_gap": why_no_gap, "dashes": css_dashes()}
    return environment


@cache
def asset(name: str) -> str:
    """Read a file of `assets` by its path there."""
    return (_ASSETS / name).read_text(encoding="utf-8")
