"""The loss's kernels compiled for sm_90, with ptxas from Triton's wheel; nothing runs on a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_cord.errors import CordError

pytest.importorskip("triton")

from tools import aot_kernels, sass
from tools.aot_kernels import Case

ROOT = Path(aot_kernels.__file__).parents[1]
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   LDG.E R9, desc[UR4][R2.64+0x20] ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   STL [R1], R5 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2) ;
        /*0090*/                   NOP ;
"""


def test_listings_are_counted() -> None:
    """Catches loops, loads or spills that are overlooked, and a listing of another form that counts as nothing."""
    code = sass.parse_listing(LISTING, registers=10, stack=4)
    assert code.resources == sass.Resources(registers=10, spilled=1, stack=4)
    assert (code.instructions, code.exponentials) == (9, 1)
    assert code.loops == (sass.Loop(instructions=6, exponentials=1, loaded=22),)
    with pytest.raises(CordError, match="has no EXIT"):
        sass.parse_listing("0000 LDC R1", registers=1, stack=0)


def test_all_cases_launch_one_kernel() -> None:
    """Catches a case that the backend refuses or serves without a kernel, and types or alignment that get lost."""
    cases = aot_kernels.all_cases()
    assert len({str(case) for case in cases}) == len(cases)
    seen = set()
    for case in cases:
        launch = aot_kernels.launch_of(case)
        assert launch.signature["student"] == f"*{aot_kernels.TYPES[case.logits]}"
        strides = [n for n, name in enumerate(launch.signature) if name.endswith("_stride")]
        assert all(bool(launch.attributes.get((n,))) == case.aligned for n in strides)
        seen.add((launch.function._fn_name, str(launch)))
    assert len(seen) == len(cases)


def test_the_default_kernels_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a kernel that ptxas refuses or that spills, and a sweep of the logits with masks or guards in it."""
    monkeypatch.setattr(sys, "argv", ["aot_kernels", "--quick", "--output", str(tmp_path / "kernels.json")])
    assert aot_kernels.main() == 0, capsys.readouterr()
    variants = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["variants"]
    assert len(variants) == len(aot_kernels.quick_cases())
    for variant in variants:
        assert variant["spilled"] == variant["stack"] == 0
        assert variant["registers"] <= 80  # three programs of 256 threads on a multiprocessor
        assert variant["instructions_a_pair"] < (22 if variant["kernel"].startswith("statistics") else 40), variant


def test_spills_are_refused() -> None:
    """Catches a check that overlooks spilled registers: 24 are not enough for the sweep."""
    launch = aot_kernels.launch_of(Case("reverse_kl", torch.float32))
    code = sass.read_cubin(aot_kernels.compile_launch(launch, maxnreg=24).asm["cubin"])
    assert code.resources.spilled > 0 and "24 registers spill" in aot_kernels.objection(code)


@pytest.mark.slow
def test_all_kernels_are_as_recorded() -> None:
    """Catches a variant that spills, and figures of docs/gpu.md that belong to other code or another Triton."""
    recorded = json.loads((ROOT / aot_kernels.RESULTS).read_text(encoding="utf-8"))
    variants = [aot_kernels.build(case) for case in aot_kernels.all_cases()]
    assert not any(aot_kernels.objection(variant.code) for variant in variants)
    assert [aot_kernels.as_record(variant) for variant in variants] == recorded["variants"]
