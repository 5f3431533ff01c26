"""A traced step against the formulas of plans: each was written without the other.

The model is small and its sizes are odd, so that a wrong formula does not come out right by chance.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_cord.cli.actions.plan_trace import Request, print_trace
from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import (
    AdapterArchitecture,
    Architecture,
    EncoderArchitecture,
    ExpertsArchitecture,
    LanguageArchitecture,
)
from megatron_cord.plan import GPUS, make_work, memory, traffic, train_flops
from megatron_cord.plan.memory import optimizer_bytes
from megatron_cord.plan.parameters import rank_counts
from megatron_cord.plan.speed import operations
from megatron_cord.plan.trace.records import RankTrace
from megatron_cord.plan.trace.step import trace_step
from megatron_cord.trainer.config import RunConfig

ARCH = Architecture(
    model_type="qwen2_audio",
    encoder=EncoderArchitecture(
        num_mels=16, hidden_size=96, num_layers=3, num_heads=4, ffn_hidden_size=336, max_positions=48
    ),
    language=LanguageArchitecture(
        hidden_size=192, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, ffn_hidden_size=496, vocab_size=4992,
        max_positions=512, rope_theta=10000.0, norm_epsilon=1e-5, qkv_bias=True, tied_embeddings=False,
    ),
    audio_token_id=7,
    adapter=AdapterArchitecture("linear"),
)  # fmt: skip
MIXTURE = replace(
    ARCH,
    language=replace(
        ARCH.language,
        ffn_hidden_size=144,
        qkv_bias=False,
        qk_norm=True,
        experts=ExpertsArchitecture(8, 2, normalized=True),
    ),
)
#: For tests of what does not grow with the layers.
SHALLOW = replace(ARCH, language=replace(ARCH.language, num_layers=2))
SECONDS = 0.62  # two thirds of a window; an odd number of positions
LAYOUTS = {
    "tp2 dp2": (4, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "tp2 dp2, streams": (
        4,
        ("parallel.tp=2", "parallel.sequence_parallel=true", "model.freeze=[]",
         "objective.streams={a: {student: read}, b: {teacher: hear, contrast: {view: read}, responses: 2}}"),
    ),
    "tp2 dp2, all-reduce": (4, ("parallel.tp=2",)),
    "tp2 pp2 dp2, recomputed": (
        8, ("parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true", "model.recompute=[language_model]"),
    ),
    "pp2 interleaved dp2": (4, ("parallel.pp=2", "parallel.virtual_pp=2", "model.freeze=[]")),
    "pp3, uneven": (3, ("parallel.pp=3", "parallel.pipeline_layers=[1,2,1]", "model.freeze=[]")),
    "tp2 pp2 vocabulary over stages": (
        8,
        ("parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true", "parallel.vocabulary_over_stages=true"),
    ),
    "dp4, encoder trained": (4, ("model.freeze=[]",)),
    "tp2 dp1, selective": (
        2,
        ("parallel.tp=2", "parallel.sequence_parallel=true", "model.recompute=[audio_encoder,language_model]",
         "model.recompute_granularity=selective", "model.freeze=[]"),
    ),
}  # fmt: skip
EXPERTS = {
    "tp2 sp ep4": (4, ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=4")),
    "pp2 interleaved ep2 dp2, recomputed": (
        4,
        ("parallel.pp=2", "parallel.virtual_pp=2", "parallel.ep=2", "model.recompute=[language_model]"),
    ),
    "ep2 dp4": (4, ("parallel.ep=2", "objective.router_aux_loss=0.01")),
}


def configured(*more: str) -> RunConfig:
    """Return a run's configuration."""
    settings = [
        "output_dir=x", "model.checkpoint=x", "data.train=x", "data.evaluation=x", "train.micro_batch_size=2",
        "model.freeze=[audio_encoder,adapter]", "rollout.prompts_per_step=8", "rollout.policy_prompts_per_step=4",
        "rollout.policy_rollouts=2", "rollout.max_new_tokens=40", "objective.implementation=fused",
    ]  # fmt: skip
    return load_config(RunConfig, None, [*settings, *more])


def traced(gpus: int, *more: str, arch: Architecture = ARCH) -> tuple[RunConfig, Any, list[RankTrace]]:
    """Trace a step of this configuration."""
    config = configured(*more)
    work = make_work(config, arch, gpus, audio_seconds=SECONDS, text_tokens=30)
    return config, work, trace_step(config, arch, work, GPUS["h100"], audio_seconds=SECONDS)


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout == "dp4, encoder trained" else pytest.param(layout, marks=pytest.mark.slow)
        for layout in LAYOUTS
    ],
)
def test_formulas_of_plans_are_what_the_code_does(layout: str) -> None:
    """Catches a formula that lags behind the code: bytes of states, operations, bytes sent, and activations."""
    compare_with_plan(ARCH, *LAYOUTS[layout])


@pytest.mark.parametrize("layout", [n if n == "ep2 dp4" else pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS])
def test_formulas_of_experts(layout: str) -> None:
    """Catches experts, or what their ranks exchange, that the formulas or the trace count wrongly or leave out."""
    for trace in compare_with_plan(MIXTURE, *EXPERTS[layout]):
        kinds = {(c.kind, c.group) for c in trace.phases["forward_backward"].collectives}
        assert ("all_to_all", "ep") in kinds and "other" not in {group for _, group in kinds}
        assert 0 < trace.trained_experts == trace.experts < trace.parameters


def compare_with_plan(arch: Architecture, gpus: int, settings: tuple[str, ...]) -> list[RankTrace]:
    """Compare the trace of a configuration with the formulas; return it."""
    config, work, traces = traced(gpus, *settings, arch=arch)
    parallel, item = config.parallel, 2
    assert len(traces) == parallel.pp
    for trace in traces:
        stages = parallel.layers_per_stage(arch.language.num_layers)
        counts = rank_counts(arch, parallel.tp, parallel.pp, trace.stage, stages, parallel.ep)
        assert trace.parameters == counts.total
        assert trace.trained == counts.trained(config.model.trained_parts)
        assert trace.state_bytes["weights"] == pytest.approx(counts.total * item, rel=1e-3)  # masks of key biases
        assert trace.state_bytes["gradients"] == pytest.approx(4 * trace.trained, rel=0.01)  # buffers are padded
        copies = work.dp * parallel.tp // parallel.ep
        planned = optimizer_bytes(config.optimizer, trace.trained - trace.experts, 0, item, work.dp)
        planned += optimizer_bytes(config.optimizer, trace.experts, 0, item, max(1, copies))
        assert trace.state_bytes["optimizer"] == pytest.approx(planned, rel=0.01)
        sent = traffic(config, arch, work, trace.stage)
        for group in ("tp", "dp", "pp", "ep", "vocabulary"):
            counted = sum(phase.sent(group) for phase in trace.phases.values())
            # The formula leaves out the gates, which travel with the tokens.
            margin = 0.03 if group == "ep" else 0.02
            assert counted == pytest.approx(getattr(sent, group), rel=margin, abs=20_000), (trace.stage, group)
    ranks = work.dp * parallel.tp
    # Every tensor-parallel rank computes the convolutions, which a small encoder feels, the more beside small experts.
    margin = 0.05 if arch.language.experts is None else 0.08
    assert ranks * sum(t.flops for t in traces) == pytest.approx(sum(train_flops(config, arch, work)), rel=margin)
    used = memory(config, arch, work, local_engine=False)
    busiest = traces[used.stage]
    in_step = busiest.phases["forward_backward"].peak + busiest.phases["optimizer"].grown
    assert used.total - used.overhead == pytest.approx(in_step, rel=0.1)
    return traces


def test_a_stage_of_a_thousand_ranks() -> None:
    """Catches groups, or shares of the optimizer, that are only right in small worlds."""
    settings = ("parallel.tp=4", "parallel.pp=2", "parallel.sequence_parallel=true", "rollout.prompts_per_step=256")
    config, work, (first, last) = traced(1024, *settings, arch=SHALLOW)
    assert work.dp == 128 and first.world == 1024 and last.rank == 512
    reduced = [c for c in last.phases["gradient_reduction"].collectives if c.group == "dp"]
    assert [(c.kind, c.ranks) for c in reduced] == [("reduce_scatter", 128)]
    assert last.state_bytes["optimizer"] == pytest.approx(12 * last.trained / 128, rel=0.1)
    assert traffic(config, SHALLOW, work, 1).dp == pytest.approx(
        sum(phase.sent("dp") for phase in last.phases.values()), rel=0.02
    )


@pytest.mark.slow
def test_several_teachers() -> None:
    """Catches a teacher that is left out, built twice, or scores what is another's, and sizes of the wrong one."""
    small = replace(ARCH, language=replace(ARCH.language, num_layers=2, hidden_size=96))
    more = (
        "objective.policy_gradient.enabled=false", "teachers.asr.checkpoint=asr", "teachers.same.mode=frozen",
        "data.train={a: {path: a, taught_by: asr}, b: {path: b}}",
        "objective.streams={main: {}, more: {taught_by: same}}",
    )  # fmt: skip
    config = configured(*more)
    one = configured("objective.policy_gradient.enabled=false", "objective.streams={main: {}, more: {}}")
    works = [make_work(each, ARCH, 4, audio_seconds=SECONDS, text_tokens=30) for each in (config, one)]
    works[0] = replace(works[0], others=(("asr", small),))
    (several,), (alone,) = (
        trace_step(each, ARCH, work, GPUS["h100"], audio_seconds=SECONDS)
        for each, work in zip((config, one), works, strict=True)
    )
    assert (several.taught, several.taught_microbatches) == (alone.taught, 1 + 1 + 1)  # a rank has two samples
    planned = memory(config, ARCH, works[0], local_engine=False).teacher
    assert several.state_bytes["teacher"] == pytest.approx(planned, rel=1e-3)
    flops, whole = (trace.phases["teacher"].forward_flops for trace in (several, alone))
    by_expert, by_own = (operations(config, ARCH, replace(works[0], teacher=arch)).layers for arch in (small, None))
    # Of a rank's four responses one is the expert's; of all ranks' sixteen, four.
    assert flops == pytest.approx(whole + (by_expert - by_own) / 4 / works[0].dp, rel=0.02) and flops < 0.95 * whole


@pytest.mark.slow
def test_context_parallel_ranks() -> None:
    """Catches ranks that share sequences and are taken for replicas, or whose exchange is not counted."""
    config, work, (trace,) = traced(4, "parallel.cp=2", "objective.implementation=cached_grad")
    assert (work.dp, trace.world) == (2, 4)
    assert trace.phases["forward_backward"].sent("cp") > 0
    assert [c.ranks for c in trace.phases["gradient_reduction"].collectives if c.kind == "reduce_scatter"] == [4]
    # Its attention has a mask in place of the causal one, so it is counted whole.
    assert trace.flops * 4 == pytest.approx(sum(train_flops(config, ARCH, work)), rel=0.15)


def test_the_command_prints_what_was_traced(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches tables and JSON that differ from the records, and a number of GPUs that is not simulated."""
    config = configured("parallel.tp=2", "rollout.policy_prompts_per_step=0", "objective.policy_gradient.enabled=false")
    lengths = {"audio_seconds": SECONDS, "text_tokens": 30, "teacher": None}
    print_trace(Request(config, SHALLOW, GPUS["h100"], [4, 32], 4, lengths), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert [step["gpus"] for step in printed["steps"]] == [4, 32]
    (traced_rank,) = printed["traces"]
    assert traced_rank["flops"] * 4 == pytest.approx(printed["planned"]["flops"], rel=0.1)
    assert {rate["kind"] for rate in printed["rates"]} == {"published", "assumed"}
    print_trace(Request(config, SHALLOW, GPUS["h100"], [4, 32], 4, lengths), as_json=False)
    text = capsys.readouterr().out
    assert "collectives of a rank" in text and "by cord plan's formulas" in text and "weight sync" in text


def test_what_no_trace_covers_is_refused() -> None:
    """Catches a trace inside of a run, whose process groups it would end."""
    from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize

    config = configured()
    work = make_work(config, ARCH, 1, audio_seconds=SECONDS)
    initialize(ParallelConfig(), seed=0)
    try:
        with pytest.raises(CordError, match="process groups of its own"):
            trace_step(config, ARCH, work, GPUS["h100"])
    finally:
        finalize()
    with pytest.raises(CordError, match="cannot be laid out"):
        make_work(replace(config, parallel=replace(config.parallel, tp=2)), ARCH, 3)
