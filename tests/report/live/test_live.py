"""The live page over HTTP: what it finds, what it refuses, and that it follows a run that goes on."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import yaml

from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.report.live import search as search_module
from megatron_cord.report.live.live import LiveRun
from megatron_cord.report.live.search import ORDERS, Query, mean_divergence, search
from megatron_cord.report.live.server import make_server
from megatron_cord.report.run.reading import read_run
from megatron_cord.rollout.rollout_file import dump_file
from tests.report.fixture import HOSTILE, STEPS, rewrite, write_lines
from tests.tiny_run import make_samples, write_shards

ROOT = Path(__file__).parents[3]


@contextmanager
def serving(*runs: Path) -> Iterator[int]:
    """Return the port of a server of the runs' pages."""
    with make_server(runs, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def port(finished_run: Path) -> Iterator[int]:
    with serving(finished_run) as number:
        yield number


def ask(
    port: int, address: str, method: str = "GET", host: str = "", extra: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; the address is sent as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest(method, address, skip_host=bool(host))
    if host:
        connection.putheader("Host", host)
    for name, value in (extra or {}).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def page(port: int, address: str) -> str:
    status, headers, body = ask(port, address)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    return unescape(body.decode())


def test_views(port: int) -> None:
    """Catches a view that fails or lacks what it is for."""
    overview = page(port, "/")
    for title in ("Accuracy", "Gap", "Time", "Time of a step", "Divergence by position", "Voices", "Configuration"):
        assert f">{title}</" in overview, title
    assert f"{11 * STEPS} matches in steps 1 to {STEPS}; 1 to 30 shown" in " ".join(page(port, "/rollouts").split())
    compare = page(port, "/compare?a=25&b=75")
    assert "Hearing, step 25" in compare and "Hearing, step 75" in compare and "Hearing, step 100" not in compare
    assert "broken" in page(port, "/compare?kind=broken") and "fixed</span>" not in page(port, "/compare?kind=broken")


def test_it_listens_on_this_machine_alone(finished_run: Path) -> None:
    """Catches a page that the whole network can read."""
    with make_server([finished_run], 0) as server:
        assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "address",
    [
        "/../config.yaml", "/../../../../etc/passwd", "/%2e%2e/config.yaml", "/..%2fconfig.yaml",
        "/style.css/../config.yaml", "//etc/passwd", "/config.yaml", "/metrics.jsonl",
        "/rollouts/step_000001.parquet", "/style.css%00",
        "\\..\\config.yaml", "/assets/page/page.html", "/page/page.html", "/shared/style.css",
        "/audio?set=evaluation&id=../../config.yaml", "/audio?set=../heldout&id=x", "/audio?set=train&id=x", "/audio",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(port: int, address: str) -> None:
    """Catches a server that hands out the run's files, or those of the machine."""
    status, _, body = ask(port, address)
    assert status == 404 and b"evaluation:" not in body and b"root:" not in body and b"{%" not in body


def test_who_may_ask(port: int) -> None:
    """Catches a page of another name that reads the run (DNS rebinding), and a server that can be written to."""
    for host in ("127.0.0.1", "localhost", f"localhost:{port}", "[::1]:9000", "127.0.0.1:22"):
        assert ask(port, "/version", host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost.", "x@localhost"):
        if host:
            assert ask(port, "/version", host=host)[0] == 421, host
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(port, "/", method)[0] == 501
    status, headers, body = ask(port, "/", "HEAD")
    assert status == 200 and body == b"" and int(headers["Content-Length"]) > 10_000


def test_every_answer_has_the_policy(port: int) -> None:
    """Catches a response, or an error, that another page may embed, or without bounds on scripts and requests."""
    for address in (
        "/",
        "/rollouts",
        "/rollouts?reward_from=x",
        "/nowhere",
        "/live.js",
        "/audio?set=evaluation&id=x",
        "/version",
    ):
        _, headers, body = ask(port, address)
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in headers
        if "html" in headers["Content-Type"]:
            assert not re.search(r"<script(?! src=)|\son\w+=|https?://|javascript:", body.decode()), address


def test_answers_and_questions_are_text(port: int, run_copy: Path) -> None:
    """Catches what a model, or who asks for a page, says becoming part of the page."""
    hostile = ask(port, "/compare?text=%3Cscript%3Ealert(1)%3C/script%3E")[2].decode()
    assert "<script>alert" not in hostile and "&lt;script&gt;alert(1)" in hostile
    rewrite(
        dump_file(run_copy / "rollouts", STEPS),
        [{"question": HOSTILE, "response": HOSTILE, "tokens": [HOSTILE], "id": 'a"&b'}],
    )
    with serving(run_copy) as other:
        drawn = ask(other, f"/rollouts?step_from={STEPS}")[2].decode()
    assert "<script>document" not in drawn and "<img" not in drawn and "id=a%22%26b" in drawn


def test_audio(port: int, finished_run: Path) -> None:
    """Catches a recording of another question, or one that is no WAV file."""
    answer = read_run(finished_run).evaluations[0].answers[3]
    status, headers, body = ask(port, f"/audio?set=evaluation&id={answer.id}")
    assert status == 200 and headers["Content-Type"] == "audio/wav"
    with wave.open(io.BytesIO(body)) as wav:
        assert (wav.getframerate(), wav.getnframes()) == (16000, 16000)
    for asked, wanted in (("0-", body), ("44-", body[44:]), ("44-99", body[44:100]), ("0-999999", body)):
        status, headers, part = ask(port, f"/audio?set=evaluation&id={answer.id}", extra={"Range": f"bytes={asked}"})
        first = int(asked.partition("-")[0])
        assert (
            status == 206
            and part == wanted
            and headers["Content-Range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(body)}"
        )
    for nonsense in ("bytes=9-4", "bytes=99999999-", "bytes=-5", "lines=1-2", "bytes=0-1,3-4"):
        assert ask(port, f"/audio?set=evaluation&id={answer.id}", extra={"Range": nonsense})[::2] == (200, body)
    assert ask(port, f"/audio?set=train&id={answer.id}")[0] == 404  # the configuration names no data.train


def test_audio_of_several_sets(run_copy: Path, tmp_path: Path) -> None:
    """Catches a recording of another set with the same id, and an address that is taken for a directory."""
    for seed, name in enumerate(("a", "b")):
        write_shards(tmp_path / name, [replace(make_samples(1, seed=seed)[0], id="q1")])
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config.setdefault("data", {})["train"] = {
        **{name: {"path": str(tmp_path / name), "weight": 1.0} for name in ("a", "b")},
        "c": {"path": "https://nowhere.invalid/c", "weight": 1.0},
    }
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    with serving(run_copy) as port:
        for name in ("a", "b"):
            status, _, body = ask(port, f"/audio?set=train&id={name}/q1")
            assert status == 200 and body == encode_wav(ShardDataset(tmp_path / name)[0].waveform)
        assert [ask(port, f"/audio?set=train&id={name}/q1")[0] for name in ("c", "d")] == [404, 404]
        assert ask(port, "/audio?set=train&id=q1")[0] == 404


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/rollouts?reward_from=high", "reward from: 'high' is no number"),
        ("/rollouts?length_to=nan", "length to: 'nan' is no number"),
        ("/rollouts?order=best", "there is no order 'best'; choose one of newest first"),
        ("/compare?a=7", "there is no evaluation of step 7; there are those of 0, 25, 50, 75, 100"),
        ("/compare?a=-1", "'-1' is no step"),
    ],
)
def test_questions_that_make_no_sense(port: int, address: str, message: str) -> None:
    """Catches a traceback in the terminal and an empty page in the browser."""
    status, _, body = ask(port, address)
    assert status == 400 and message in unescape(body.decode())


def test_search(finished_run: Path) -> None:
    """Catches bounds without their ends or with unmeasured values, a text found by its case, and a wrong order."""
    files = read_run(finished_run).rollout_files
    whole = [rollout for step in files for rollout in search(files, Query(step_from=step, step_to=step)).rollouts]
    assert len(whole) == 11 * STEPS
    assert search(files, Query(role="policy", reward_from=1, reward_to=1)).count == sum(r.reward == 1 for r in whole)
    assert search(files, Query(reward_from=0)).count == sum(r.reward is not None for r in whole)
    measured = sorted(value for r in whole if (value := mean_divergence(r)) is not None)
    assert len(measured) == 3 * STEPS
    assert search(files, Query(divergence_from=measured[10], divergence_to=measured[20])).count == 11
    assert search(files, Query(text="WHAT IS")).count == sum("what is" in r.question for r in whole)
    assert [mean_divergence(r) for r in search(files, Query(order="largest divergence")).rollouts] == measured[:-31:-1]
    assert [r.step for r in search(files, Query(skip=22)).rollouts[:12]] == [STEPS - 2] * 11 + [STEPS - 3]
    lengths = [len(r.tokens) for r in search(files, Query(order="longest", length_from=11)).rollouts]
    assert lengths == sorted(lengths, reverse=True) and min(lengths) >= 11
    assert search(files, Query(text="nobody says this")).count == 0 and search({}, Query()).steps is None
    assert all(search(files, Query(order=order)).count == 11 * STEPS for order in ORDERS)


def test_a_long_record_is_looked_at_in_parts(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that reads thousands of files, and steps that no part shows."""
    monkeypatch.setattr(search_module, "WINDOW", 30)
    files, seen, last = read_run(finished_run).rollout_files, [], None
    while True:
        found = search(files, Query(step_to=last))
        assert found.steps is not None
        seen.append(found.steps)
        if found.earlier is None:
            break
        last = found.earlier
    assert seen == [(71, 100), (41, 70), (11, 40), (1, 10)]


def test_it_follows_the_run(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that stays as it was at the start, and one that is drawn again although nothing has changed."""
    monkeypatch.setattr("megatron_cord.report.live.live._AT_MOST_EVERY", 0.0)
    (run_copy / "summary.json").unlink()
    live = LiveRun(run_copy)
    version, first = live.version(), live.overview()
    assert (
        live.version() == version and live.overview() is first and "has not finished" in first and 'id="heads"' in first
    )
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 101, "loss": 1.0}) + "\n" + '{"step": 102, "lo')
    assert live.version() != version and "101 steps" in live.overview()
    write_lines(run_copy / "alerts.jsonl", [{"step": 101, "kind": "collapse", "words": "the reward fell"}])
    assert "<strong>collapse</strong> at step 101: the reward fell" in live.overview()
    shutil.copy(dump_file(run_copy / "rollouts", 100), dump_file(run_copy / "rollouts", 101))
    assert "in steps 1 to 101" in live.rollouts({})


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    """Catches a page that needs an evaluation, a step or a rollout dump to be drawn."""
    with pytest.raises(CordError, match="is not a run directory"):
        make_server([tmp_path], 0)
    (tmp_path / "config.yaml").write_text("train:\n  steps: 5\nrecord:\n  rollouts: null\n")
    live = LiveRun(tmp_path)
    assert (
        "No metrics yet" in live.overview()
        and "No recorded step" in live.rollouts({})
        and "no evaluation yet" in live.compare({})
    )


def test_a_damaged_file_is_named(run_copy: Path) -> None:
    """Catches a traceback, or a page without a word, where a rollout's file lost its end."""
    path = dump_file(run_copy / "rollouts", 7)
    path.write_bytes(path.read_bytes()[:100])
    with serving(run_copy) as other:
        status, _, body = ask(other, "/rollouts")
    assert status == 400 and "step_000007.parquet is damaged" in unescape(body.decode())


def test_tool(finished_run: Path) -> None:
    """Catches a command without an address, one that does not end at Ctrl-C, and a taken port without advice."""
    command = [sys.executable, str(ROOT / "tools" / "report.py"), "--serve", str(finished_run), "--port"]
    # A shell that runs the tests in the background has Ctrl-C ignored, which children inherit.
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server = subprocess.Popen(
            [*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}
        )
    finally:
        signal.signal(signal.SIGINT, heeded)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        port = int(address.removeprefix("http://127.0.0.1:").removesuffix("/"))
        assert ask(port, "/version")[0] == 200
        second = subprocess.run(
            [*command, str(port)],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert (
            second.returncode == 2
            and second.stderr.startswith(f"error: cannot listen on port {port} (")
            and "--port" in second.stderr
        )
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 130
        assert server.stderr is not None and "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_several_runs(several_runs: list[Path], tmp_path: Path) -> None:
    """Catches a comparison that stands still, and a run's own page that is missing, another's, or without its way back.

    Also recordings and versions of another run, and a damaged file in one of them that ends the server.
    """
    runs = [shutil.copytree(run, tmp_path / name) for run, name in zip(several_runs, "abc", strict=True)]
    with serving(*runs) as port:
        first = page(port, "/")
        assert "Settings that differ" in first and 'href="2/"' in first and "var(--run-3)" in first
        clip = re.search(r'src="([12]/audio[^"]*)"', first)
        assert clip is not None and ask(port, "/" + unescape(clip[1]))[0] == 200
        versions = {address: ask(port, f"{address}/version")[2] for address in ("", "/1", "/2", "/3")}
        assert len(set(versions.values())) == 4
        own = page(port, "/2/")
        assert "<h1>b</h1>" in own and 'href="../"' in own and "Configuration" in own
        assert f"{11 * STEPS} matches" in " ".join(page(port, "/1/rollouts").split())
        answer = json.loads(heldout_file(runs[2], STEPS).read_text())["answers"][1]["id"]
        assert ask(port, f"/3/audio?set=evaluation&id={answer}")[0] == 200
        for address in (
            "/4/",
            "/0/",
            "/1",
            "/audio?set=evaluation&id=x",
            "/rollouts",
            f"/1/audio?id={answer}",
            "/1/2/",
        ):
            assert ask(port, address)[0] == 404, address
        time.sleep(2.1)  # files are looked at every two seconds
        lines = (runs[1] / "metrics.jsonl").read_text().splitlines()
        write_lines(runs[1] / "metrics.jsonl", [json.loads(line) for line in lines] + [{"step": 76, "kl": 0.1}])
        assert ask(port, "/version")[2] != versions[""] and ask(port, "/1/version")[2] == versions["/1"]
        assert "76 of 100 steps" in page(port, "/")
        time.sleep(2.1)
        (runs[1] / "metrics.jsonl").write_text("no JSON\n")
        status, _, body = ask(port, "/")
        assert status == 400 and b"metrics.jsonl:1: not valid JSON" in body
