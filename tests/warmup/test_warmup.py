"""Warm-ups of a tiny grafted checkpoint, end to end: what they learn, on two ranks, after stops, and every slip.

A word is a tone, so that a random encoder's states tell words apart.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cord.cli.main import cord, invoke
from megatron_cord.convert import read_tensors
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, Prompt, Sample
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.warmup import warmup
from megatron_cord.warmup.config import CtcConfig, DistillationConfig, RegressionConfig, WarmupConfig
from megatron_cord.warmup.stages import Stages
from megatron_cord.warmup.warmup import warm_up
from tests.convert.graft.test_graft import WORDS, change, write_llm, write_whisper
from tests.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")

SPOKEN = WORDS[2:]


def recording(words: list[str]) -> np.ndarray:
    """Return a tone of 0.4 s for each word, and a pause behind it."""
    time = np.arange(6400) / 16000
    pause = np.zeros(1600, np.float32)
    tones = [0.5 * np.sin(2 * np.pi * (300 + 700 * SPOKEN.index(word)) * time).astype(np.float32) for word in words]
    return np.concatenate([part for tone in tones for part in (tone, pause)])


def write_corpus(directory: Path, number: int, seed: int = 0, *more: Sample) -> Path:
    rng = np.random.default_rng(seed)
    writer = ShardWriter(directory, shard_size=16)
    for index in range(number):
        words = [str(word) for word in rng.choice(SPOKEN, size=int(rng.integers(2, 5)))]
        writer.write(Sample(f"s{seed}-{index}", " ".join(words), waveform=recording(words)))
    for sample in more:
        writer.write(sample)
    writer.close()
    return directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llm`, `whisper`, `grafted` and `data`."""
    root = tmp_path_factory.mktemp("inputs")
    sources = [str(write_llm(root / "llm")), str(write_whisper(root / "whisper"))]
    weights = load_file(root / "whisper" / "model.safetensors")
    for name in ("encoder.conv1.weight", "encoder.conv2.weight"):
        weights[name] *= 10  # beside positions that are as large as in a trained one
    save_file(weights, root / "whisper" / "model.safetensors")
    assert invoke(cord, ["graft", *sources, str(root / "grafted"), "--hidden-size", "256"], "cord") == 0
    write_corpus(root / "data", 40)
    return root


def config_of(inputs: Path, output: Path, **settings: Any) -> WarmupConfig:
    """Return a warm-up of a second or two."""
    usual: dict[str, Any] = {
        "dtype": "float32",
        "held_out_share": 0.2,
        "warmup_steps": 5,
        "save_interval": 4,
        "ctc": CtcConfig(steps=60, batch_size=16, learning_rate=5e-3, hidden_size=48),
        "regression": RegressionConfig(steps=120, batch_size=16, learning_rate=5e-3, filler="user"),
    }
    where = {"output_dir": str(output), "checkpoint": str(inputs / "grafted"), "data": str(inputs / "data")}
    return WarmupConfig(**(where | usual | settings))


@pytest.fixture
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a warm-up that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    warm_up(config_of(inputs, output), initialize(ParallelConfig(), seed=0))
    finalize()
    return output


def summary(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return content


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


def after_calls(number: int) -> Callable[[], bool]:
    """Return a request to stop that comes with this call."""
    calls = count(1)
    return lambda: next(calls) >= number


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


def distilled_config(inputs: Path, output: Path, **settings: Any) -> WarmupConfig:
    """Return a warm-up of all three stages, the first two of them short."""
    few: dict[str, Any] = {"batch_size": 16, "learning_rate": 5e-3}
    usual: dict[str, Any] = {"steps": 10, "micro_batch_size": 3, "instruction": "what is", "measured": 5}
    return config_of(
        inputs,
        output,
        ctc=CtcConfig(steps=8, hidden_size=48, **few),
        regression=RegressionConfig(steps=8, filler="user", **few),
        distillation=DistillationConfig(**(few | {"batch_size": 8} | usual | settings)),
    )


@pytest.fixture(scope="module")
def distilled(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of such a warm-up that was never stopped."""
    output = tmp_path_factory.mktemp("distilled") / "out"
    warm_up(distilled_config(inputs, output), initialize(ParallelConfig(), seed=0))
    finalize()
    return output


def distil_on_ranks(rank: int, inputs: str, output: str) -> None:
    warm_up(distilled_config(Path(inputs), Path(output)), initialize(ParallelConfig(), seed=0))


def test_a_distillation_learns_and_changes_the_adapter_alone(inputs: Path, distilled: Path) -> None:
    """Catches a stage without effect, and a language model that is trained too."""
    nats = summary(distilled)["divergences"]
    assert 0 < nats["distillation after"] < 0.8 * nats["distillation before"]
    before, after = dict(read_tensors(inputs / "grafted")), dict(read_tensors(distilled / "model"))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != name.startswith("multi_modal_projector.")


@pytest.mark.slow
def test_a_distillation_on_two_ranks_is_that_of_one(inputs: Path, distilled: Path, tmp_path: Path) -> None:
    """Catches gradients that are not summed, and a mean over a rank's own tokens."""
    run_ranks(distil_on_ranks, 2, str(inputs), str(tmp_path / "out"))
    one, two = (summary(each)["losses"]["distillation"] for each in (distilled, tmp_path / "out"))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0.02, atol=0)


def test_a_distillation_that_is_stopped_goes_on_bitwise(
    inputs: Path, distilled: Path, layout: Layout, tmp_path: Path
) -> None:
    """Catches an adapter, or moments, of another stage that a start goes on with."""
    config = distilled_config(inputs, tmp_path / "out")
    with pytest.raises(StoppedError):
        warm_up(config, layout, after_calls(3 + 8 + 8 + 4))  # blocks of encoder states, then updates
    warm_up(config, layout)
    once, again = summary(distilled), summary(tmp_path / "out")
    assert once["losses"] == again["losses"] and once["divergences"] == again["divergences"]
    weights = "model/model.safetensors"
    assert (distilled / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_the_distillation_is_the_slow_one(
    inputs: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a view without the instruction, KL the other way round, another scale, and a mean over something else."""
    seen: list[tuple[Stages, float, int]] = []

    def look(run: Any) -> None:
        losses = [float(each.detach()) for each in run._distillation().losses(0)]
        seen.append((run._stages, sum(losses), len(losses)))

    monkeypatch.setattr(warmup._Run, "train_all", look)
    warm_up(distilled_config(inputs, tmp_path / "out", steps=1, batch_size=4), layout)
    ((stages, loss, microbatches),) = seen
    plain, prompts = PlainModel(inputs / "grafted", torch.float32), PromptBuilder(inputs / "grafted")

    def log_probs(prompt: Prompt, response: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([[*prompt.token_ids, *response]])
        clips = [torch.as_tensor(clip.features) for clip in prompt.clips]
        frames = torch.tensor([clip.num_frames for clip in prompt.clips])
        with torch.no_grad():
            given = (torch.stack(clips), frames) if clips else (None, None)
            hidden = plain.hidden(ids, *given, attention_mask=torch.ones_like(ids)).last_hidden_state
            logits = plain.head(hidden)[0, len(prompt.token_ids) - 1 : -1]
        return logits.double().log_softmax(-1)

    total, tokens = 0.0, 0
    batch = stages._corpus.batch(0, 4)
    for number, (recording, rate) in zip(batch, stages._corpus.recordings(batch), strict=True):
        text = stages._corpus.utterances[number].text
        response = prompts.response_ids(text)
        (made,) = prompts.prepare([Sample("a", text, recording, rate, instruction="what is")])
        read, heard = (log_probs(made.prompts[view], response) for view in (READ, HEAR))
        total += float((read.exp() * (read - heard)).sum())
        tokens += len(response)
    assert microbatches == 2 and loss == pytest.approx(total / tokens, rel=0.02)


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
