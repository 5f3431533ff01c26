"""Warm-ups of a tiny grafted checkpoint, end to end: what they learn, on two ranks, after stops, and every slip."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_cord.cli.main import cord, invoke
from megatron_cord.convert import read_tensors
from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import Layout, ParallelConfig, initialize
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.warmup import warmup
from megatron_cord.warmup.config import CtcConfig, RegressionConfig
from megatron_cord.warmup.stages import Stages
from megatron_cord.warmup.warmup import warm_up
from tests.convert.graft.test_graft import WORDS, change
from tests.gloo import run_ranks
from tests.warmup.short_warmup import (
    after_calls,
    config_of,
    distilled_config,
    recording,
    summary,
    warm_up_alone,
    write_corpus,
)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a warm-up that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    warm_up_alone(config_of(inputs, output))
    return output


def test_a_warm_up_learns_to_read_and_changes_the_adapter_alone(inputs: Path, whole: Path) -> None:
    """Catches a stage that learns nothing, tensors or files that are lost, and an adapter at another scale."""
    errors = summary(whole)["token_errors"]
    assert errors["ctc before"] > 0.7 and errors["ctc after"] < 0.2
    assert errors["regression before"] > 0.7 and errors["regression after"] < 0.3
    assert abs(errors["adapter as written"] - errors["regression after"]) < 0.15
    assert summary(whole)["recordings"] == {"trained on": 32, "held out": 8, "left out": 0}
    before, after = dict(read_tensors(inputs / "grafted")), dict(read_tensors(whole / "model"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor) != name.startswith("multi_modal_projector.")
    assert load_architecture(whole / "model") == load_architecture(inputs / "grafted")
    assert {path.name for path in (inputs / "grafted").iterdir()} == {path.name for path in (whole / "model").iterdir()}


def warm_up_on_ranks(rank: int, inputs: str, output: str) -> None:
    warm_up(config_of(Path(inputs), Path(output)), initialize(ParallelConfig(), seed=0))


def test_two_ranks_are_one(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Catches gradients that are not summed, noise or order that depend on the rank, and a loss divided twice."""
    run_ranks(warm_up_on_ranks, 2, str(inputs), str(tmp_path / "out"))
    one, two = summary(whole), summary(tmp_path / "out")
    assert two["ranks"] == 2 and one["recordings"] == two["recordings"]
    for stage in ("ctc", "regression"):
        torch.testing.assert_close(torch.tensor(one["losses"][stage][:4]), torch.tensor(two["losses"][stage][:4]))
        torch.testing.assert_close(
            torch.tensor(one["losses"][stage]), torch.tensor(two["losses"][stage]), rtol=0.02, atol=1e-3
        )


def test_a_warm_up_that_is_stopped_goes_on_bitwise(
    inputs: Path, whole: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches moments, order, noise or a learning rate that a stop changes, and work that is done twice.

    It is stopped while encoding, in both stages and between them, and killed between two saved states.
    """
    output = tmp_path / "out"
    config = config_of(inputs, output)
    for calls in (1, 7, 1, 54, 9):
        with pytest.raises(StoppedError):
            warm_up(config, layout, after_calls(calls))
    assert len(list((output / "states").glob("*.safetensors"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "regression_loss", _raise_at(Stages.regression_loss, 30))
        with pytest.raises(KeyboardInterrupt):
            warm_up(config, layout)
    warm_up(config, layout)
    once, again = summary(whole), summary(output)
    assert once["losses"]["regression"] == again["losses"]["regression"]
    assert once["losses"]["ctc"] == again["losses"]["ctc"] and once["token_errors"] == again["token_errors"]
    weights = "model/model.safetensors"
    assert (whole / weights).read_bytes() == (output / weights).read_bytes()
    assert warm_up(config, layout) == again


def _raise_at(loss: Any, step: int) -> Any:
    def wrapped(self: Stages, at: int) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return loss(self, at)

    return wrapped


def test_the_regression_is_the_slow_one(
    inputs: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches targets of other utterances, a unit that is applied once only, a mean over something else, a weight."""
    seen: list[Stages] = []
    monkeypatch.setattr(warmup._Run, "train_all", lambda self: seen.append(self._stages))
    regression = RegressionConfig(steps=2, batch_size=3, filler="what", reading=0.7)
    warm_up(config_of(inputs, tmp_path / "out", regression=regression), layout)
    (stages,) = seen
    original = dict(read_tensors(inputs / "grafted"))
    table = original["language_model.model.embed_tokens.weight"].double()
    names = ("ln_pre", "linear_1", "ln_mid", "linear_2")
    weights = {name: original[f"multi_modal_projector.{name}.weight"].double() for name in names}
    corpus, ids = stages._corpus, sorted(stages._class_of)
    total, reading, rows = 0.0, 0.0, 0
    unit = table[ids].square().mean()
    known = table[[WORDS.index("what") + 3, *ids]]
    for number in corpus.batch(1, 3):
        states = stages._states.read(number)
        with torch.no_grad():
            padded = torch.nn.functional.pad(states, (0, 0, 0, -len(states) % 4)).view(-1, 4 * 16)
            p = stages.recognizer(padded).double().softmax(-1)
            wanted = p[:, :1] * table[WORDS.index("what") + 3]
            for k, token in enumerate(ids):
                wanted = wanted + p[:, k + 1 : k + 2] * table[token]
            x = _rms_norm(padded.double()) * weights["ln_pre"]
            values, gate = (x @ weights["linear_1"].T).chunk(2, -1)
            found = _rms_norm(values * gate * gate.sigmoid()) * weights["ln_mid"] @ weights["linear_2"].T
        total += float((found - wanted).square().sum())
        distances = (found[:, None] - known[None]).square().mean(-1) / unit
        reading -= float((p * (-5 * distances).log_softmax(-1)).sum())
        rows += len(found)
    stages._parts.adapter.linear2.weight.data /= stages.unit  # as it was before it was written
    loss = float(stages.regression_loss(1).detach())
    assert loss == pytest.approx(total / (rows * table.shape[1]) / float(unit) + 0.7 * reading / rows, rel=1e-3)


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("text model", "is a text model (llama), which has no adapter to warm up"),
        ("unknown word", "sample odd: its transcript has the token 0 ('<|unknown|>'), which has no row of its own"),
        ("no row", "has the token 9 ('two'), which has no row of its own among the 9"),
        ("too long", "sample odd has 5.00 s of audio"),
        ("too short", "odd: 4 tokens of audio are fewer than the 7 that its transcript of 4 tokens needs"),
        ("no transcript", "sample one has no text: its JSON needs a"),
        ("filler", "regression.filler=' ' is 0 tokens of this tokenizer"),
        ("instruction", "sample distillation: words outside the model's vocabulary: three"),
        ("address", "is an address; make a local copy"),
        ("ranks", "ctc.batch_size=1 is less than the 2 ranks"),
        ("other warm-up", "holds a warm-up that differs in seed"),
        ("other data", "holds a warm-up that differs in the content of recordings"),
        ("damaged states", "block-000000.safetensors is damaged"),
    ],
)
def test_slips_are_one_line(
    inputs: Path, whole: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, message: str
) -> None:
    """Catches a traceback, a warm-up of half of the data in silence, and one that goes on with another's state."""
    config, output = config_of(inputs, tmp_path / "out"), tmp_path / "out"
    words = ["one", "plus", "two"]
    odd: Sample | None = None
    if case == "text model":
        config = replace(config, checkpoint=str(inputs / "llm"))
    elif case == "unknown word":
        odd = Sample("odd", "one plus three", waveform=recording(words))
    elif case == "no row":
        shutil.copytree(inputs / "grafted", tmp_path / "cut")
        content = json.loads((tmp_path / "cut" / "config.json").read_text())
        change(tmp_path / "cut" / "config.json", text_config=content["text_config"] | {"vocab_size": 9})
        config = replace(config, checkpoint=str(tmp_path / "cut"))
    elif case == "too long":
        odd = Sample("odd", "one plus two", waveform=np.zeros(80000, np.float32))
    elif case == "too short":
        odd = Sample("odd", "one one one one", waveform=recording(words)[:4800])
    elif case == "no transcript":
        write_shard(tmp_path / "a.tar", {"answer": "3"})
        config = replace(config, data=str(tmp_path / "a.tar"))
    elif case == "filler":
        config = replace(config, regression=RegressionConfig())
    elif case == "instruction":
        config = distilled_config(inputs, output, instruction="what is three")
    elif case == "address":
        config = replace(config, data="https://example.org/shards")
    elif case == "ranks":
        monkeypatch.setattr(Layout, "world_size", 2)
        config = replace(config, ctc=CtcConfig(batch_size=1))
    else:
        shutil.copytree(whole, output)
        if case == "other warm-up":
            config = replace(config, seed=1)
        elif case == "other data":
            config = replace(config, data=str(write_corpus(tmp_path / "others", 40, seed=1)))
        else:
            (output / "summary.json").unlink()
            (output / "states" / "block-000000.safetensors").write_bytes(b"{")
    if odd is not None:
        config = replace(config, data=str(write_corpus(tmp_path / "shards", 4, 0, odd)))
    with pytest.raises(CordError) as caught:
        warm_up(config, layout)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def write_shard(path: Path, texts: dict[str, Any]) -> None:
    """Write a shard of one sample with these texts, by hand, as the writer refuses to."""
    with tarfile.open(path, "w") as tar:
        for suffix, content in (("json", json.dumps(texts).encode()), ("wav", encode_wav(recording(["one"])))):
            info = tarfile.TarInfo(f"one.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_recordings_that_are_left_out_are_counted(inputs: Path, layout: Layout, tmp_path: Path) -> None:
    """Catches max_skipped without effect, and recordings that vanish from the count."""
    short = Sample("short", "one one one one", waveform=recording(["one"])[:4800])
    long = Sample("long", "one", waveform=np.zeros(80000, np.float32))
    data = write_corpus(tmp_path / "shards", 18, 0, short, long)
    few = {"ctc": CtcConfig(steps=1, batch_size=2), "regression": RegressionConfig(steps=1, batch_size=2, filler=None)}
    held_out = str(write_corpus(tmp_path / "held", 3, seed=2))
    config = config_of(inputs, tmp_path / "out", data=str(data), held_out=held_out, max_skipped=0.1, **few)
    assert warm_up(config, layout)["recordings"] == {"trained on": 2, "held out": 3, "left out": 2}


def test_the_command(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that does not reach the warm-up, keys that it does not know, and bfloat16 that fails."""
    (tmp_path / "warmup.yaml").write_text(f"checkpoint: {inputs / 'grafted'}\ndata: {inputs / 'data'}\n")
    settings = ["ctc.steps=2", "regression.steps=2", "regression.filler=what", f"output_dir={tmp_path / 'out'}"]
    assert invoke(cord, ["warmup", "--config", str(tmp_path / "warmup.yaml"), *settings], "cord") == 0
    output = capsys.readouterr().out
    assert "regression after" in output and f"{tmp_path / 'out' / 'model'} is the warmed-up checkpoint" in output
    tensors = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    with pytest.raises(CordError, match=r"unknown key 'ctc\.step'"):
        invoke(cord, ["warmup", "--config", str(tmp_path / "warmup.yaml"), *settings, "ctc.step=2"], "cord")
