"""`halve eval`: perplexity with its interval, agreement, and tasks in process and through the endpoint."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from scipy import stats

from serve.loading import load_model
from serve.measure import tasks
from serve.measure.agreement import Agreement
from serve.measure.endpoint import EndpointRunner
from serve.measure.environment import processor
from serve.measure.evaluation import Endpoint, evaluate
from serve.measure.harness import HalveLM
from serve.measure.scoring import EngineRunner
from serve.server import BackgroundServer
from tests import tiny_models
from tests.runs import Called, Halve, calibration, compress, load

DATA = Path(__file__).resolve().parents[1] / "data" / "tasks"
NAMES = ["lambada_openai", "arc_easy"]
LENGTH, WINDOWS = 40, 10


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model in float32, and the packed one."""
    directory = tmp_path_factory.mktemp("eval")
    source = tiny_models.build("llama", directory / "source", layers=2, dtype=torch.float32)
    return source, compress(source, directory / "packed", metric="wanda", reconstruction="none").directory


@pytest.fixture
def run(models: tuple[Path, Path], halve: Halve):
    """`halve eval PACKED --against DENSE` over a short text."""

    def called(*arguments: str | Path, against: bool = True) -> Called:
        source, packed = models
        beside = ["--against", source] if against else []
        text = ["--text", calibration(source.parent), "--length", str(LENGTH), "--windows", str(WINDOWS)]
        device = [] if "--url" in arguments else ["--device", "cpu"]
        return halve("eval", packed, *beside, *text, *device, *arguments)

    return called


def windows_of(source: Path) -> torch.Tensor:
    ids = tiny_models.tokenizer()(calibration(source.parent).read_text()).input_ids
    return torch.tensor(ids[: LENGTH * WINDOWS]).view(WINDOWS, LENGTH)


def test_perplexity_and_agreement_by_hand(run, models: tuple[Path, Path]) -> None:
    """Against transformers' own loss and a divergence in float64."""
    document = run("--json").document
    windows = windows_of(models[0])
    with torch.no_grad():
        logits = [load(path)(windows).logits[:, :-1].double() for path in models]
    losses = [
        torch.nn.functional.cross_entropy(each.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)
        for each in logits
    ]
    for model, path, expected in zip(document["models"], models, losses, strict=True):
        assert model["directory"] == str(path)
        assert model["losses"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert model["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-4)
        low, high = np.exp(stats.ttest_1samp(expected.numpy(), 0).confidence_interval(0.95))
        assert model["interval"][0] < model["perplexity"] < model["interval"][1]
        assert model["interval"] == pytest.approx([low, high], rel=0.1)
    assert document["perplexity"] == document["models"][1]["perplexity"]
    assert document["ratio"] == document["perplexity"] / document["models"][0]["perplexity"]
    low, high = np.exp(stats.ttest_1samp((losses[1] - losses[0]).numpy(), 0).confidence_interval(0.95))
    assert document["ratio_interval"] == pytest.approx([low, high], rel=0.1)
    dense, sparse = (each.log_softmax(-1) for each in logits)
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean(1)
    top1 = (dense.argmax(-1) == sparse.argmax(-1)).double().mean(1)
    agreement = document["agreement"]
    assert agreement["kl"]["samples"] == pytest.approx(kl.tolist(), rel=1e-3)
    assert agreement["kl"]["value"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert agreement["top1"]["samples"] == pytest.approx(top1.tolist())
    assert agreement["top1"]["interval"][0] <= agreement["top1"]["value"] <= agreement["top1"]["interval"][1]
    assert document["protocol"]["windows"] == WINDOWS
    [note] = document["notes"]
    assert note.startswith(f"{models[1]} was calibrated on")


def test_a_model_agrees_with_itself(models: tuple[Path, Path]) -> None:
    source, _ = models
    text = str(calibration(source.parent))
    document = evaluate(source, against=source, text=text, length=LENGTH, windows=WINDOWS, device="cpu")
    assert document["ratio"] == 1
    assert document["ratio_interval"] == (1, 1)
    assert document["agreement"]["top1"]["samples"] == [1.0] * WINDOWS
    assert document["agreement"]["kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_without_agreement_one_model_is_loaded_at_a_time(
    run, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    alive: list[weakref.ref[torch.nn.Module]] = []

    def watched(*arguments: Any, **options: Any) -> torch.nn.Module:
        assert all(reference() is None for reference in alive)
        model = load_model(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    with_agreement = run("--json").document
    monkeypatch.setattr("serve.measure.evaluation.load_model", watched)
    document = run("--no-agreement", "--json").document
    assert len(alive) == 2
    assert "agreement" not in document
    for one, other in zip(document["models"], with_agreement["models"], strict=True):
        assert one["losses"] == other["losses"]


def test_agreement_of_banned_tokens_and_other_vocabularies() -> None:
    found = Agreement()
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 0.0, 0.0]])
    found.add(logits, logits)
    assert (found.top1, found.kl) == ([1.0], [0.0])
    found.add(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]))
    assert found.kl[1] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    with pytest.raises(Exception, match="the models predict 2 and 3 tokens"):
        found.add(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.fixture(scope="module")
def in_process(models: tuple[Path, Path]) -> dict[str, Any]:
    source, packed = models
    return evaluate(
        packed, against=source, perplexity=False, tasks=NAMES, task_data=DATA, device="cpu"
    )  # fmt: skip


def test_tasks_score_as_lm_evals_own_model_does(models: tuple[Path, Path], in_process: dict[str, Any]) -> None:
    """Every example's log-likelihood, by `HFLM`: another tokenization, batching and softmax, all lm-eval's."""
    source, _ = models
    prepared = tasks.prepare(NAMES, DATA, None)
    reference = HFLM(load(source), tokenizer=tiny_models.tokenizer(), batch_size=4, device="cpu")
    expected = simple_evaluate(
        reference, tasks=list(prepared._tasks.values()), bootstrap_iters=0, task_manager=tasks._manager()
    )
    assert expected is not None
    with EngineRunner(source, device="cpu") as runner:
        lm = HalveLM(runner, tiny_models.tokenizer(), lambda done, total, what: None)
        for name in NAMES:
            samples = sorted(expected["samples"][name], key=lambda sample: sample["doc_id"])
            requests = [
                type("Request", (), {"args": tuple(arguments)})() for s in samples for arguments in s["arguments"]
            ]
            answers = lm.loglikelihood(requests)
            theirs = [response[0] for sample in samples for response in sample["resps"]]
            assert [logprob for logprob, _ in answers] == pytest.approx([logprob for logprob, _ in theirs], abs=2e-3)
            assert [greedy for _, greedy in answers] == [greedy for _, greedy in theirs]
    found = in_process["models"][0]["tasks"]
    assert found["lambada_openai"]["metrics"].keys() == {"perplexity", "acc"}
    assert found["arc_easy"]["metrics"].keys() == {"acc", "acc_norm"}
    for name in NAMES:
        assert found[name]["examples"] == 8
        for metric, figure in found[name]["metrics"].items():
            assert figure["value"] == pytest.approx(expected["results"][name][f"{metric},none"], rel=1e-3)
            assert len(figure["samples"]) == 8
            assert figure["better"] == ("lower" if metric == "perplexity" else "higher")


def test_tasks_through_the_endpoint_equal_those_in_process(
    models: tuple[Path, Path], in_process: dict[str, Any]
) -> None:
    """The packed model on its own kernels, as it is served: every figure and every sample is the same number."""
    served = evaluate(
        models[1], perplexity=False, tasks=NAMES, task_data=DATA, device="cpu", endpoint=Endpoint()
    )  # fmt: skip
    assert served["through"] == "endpoint"
    [through], (dense, own) = served["models"], in_process["models"]
    assert own["tasks"].keys() == through["tasks"].keys() == set(NAMES)
    for name in NAMES:
        assert own["tasks"][name]["metrics"] == through["tasks"][name]["metrics"]
        assert own["tasks"][name]["sha256"] == through["tasks"][name]["sha256"]
    assert own["tasks"] != dense["tasks"]


def test_an_endpoint_that_runs_already(run, models: tuple[Path, Path], halve: Halve, tmp_path: Path) -> None:
    with BackgroundServer(str(models[1]), served_model_name="mine", device="cpu", api_key="secret") as server:
        arguments = ["--url", server.base_url, "--api-key", "secret", "--json"]
        served = run(*arguments, "--tasks", "arc_easy", "--task-data", DATA, "--limit", "7", against=False)
        assert served.code == 0, served.stderr
        wrong = run(*arguments, "--model", "other", against=False)
        assert wrong.code == 2
        assert "has no model 'other'" in wrong.message
        assert "mine" in wrong.message
        keyless = run("--url", server.base_url, against=False)
        assert keyless.code == 2
        assert "refused (401): The API key is missing or wrong" in keyless.message
    own = run("--json").document
    assert served.document["models"][0]["losses"] == pytest.approx(own["models"][1]["losses"], rel=1e-4)
    assert served.document["models"][0]["tasks"]["arc_easy"]["examples"] == 7
    assert "machine" not in served.document["environment"]
    assert own["environment"]["machine"] == processor()
    files = []
    for name, document in (("served.json", served.document), ("own.json", own)):
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps(document))
    compared = halve("compare", *files, "--gate", "perplexity<=1.001x", "--gate", "perplexity>=0.999x", "--json")
    assert compared.code == 0
    assert "through: endpoint against process" in compared.document["notes"]


def test_what_an_endpoint_cannot_tell_is_said(run) -> None:
    called = run("--through", "endpoint")
    assert called.code == 0, called.stderr
    assert "not measured: agreement: it takes both models in one process" in called.stdout


def test_people_see_it_all(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    called = run("--tasks", "arc_easy", "--task-data", DATA, "--limit", "7")
    assert called.code == 0, called.stderr
    for said in ("95 % interval", "ratio ", "same likeliest token", "KL(dense || this)", "arc_easy", "acc_norm"):
        assert said in called.stdout
    assert "Traceback" not in called.stderr


def test_what_generates_answers(models: tuple[Path, Path]) -> None:
    """`generate_until`: greedy, as transformers generates, up to the stop string; a long context loses its beginning."""
    source, _ = models
    tokenizer, model = tiny_models.tokenizer(), load(source)
    context = tiny_models.TEXT[:200]
    ids = torch.tensor([tokenizer(context).input_ids])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    stop = text[len(text) // 2 :][:3]

    def request(*arguments: Any) -> Any:
        return type("Request", (), {"args": arguments})()

    with EngineRunner(source, device="cpu", concurrency=3) as runner:
        lm = HalveLM(runner, tokenizer, lambda done, total, what: None)
        options = {"max_gen_toks": 12, "until": []}
        answers = lm.generate_until(
            [request(context, options), request(context, {**options, "until": [stop]}),
             request(tiny_models.text(3), options)]
        )  # fmt: skip
        with pytest.raises(Exception, match="this task samples its answers"):
            lm.generate_until([request(context, {"do_sample": True, "temperature": 1.0})])
    assert answers[0] == text
    assert answers[1] == text[: text.index(stop)]
    assert isinstance(answers[2], str)


def test_answers_through_the_endpoint_are_greedy_whatever_the_checkpoint_recommends(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    recommending = Path(shutil.copytree(models[0], tmp_path / "recommending"))
    advice = {"repetition_penalty": 1.8, "presence_penalty": 1.5, "frequency_penalty": 1.5, "temperature": 0.7}
    (recommending / "generation_config.json").write_text(json.dumps(advice))
    job = (tiny_models.tokenizer()(tiny_models.TEXT[:200]).input_ids, 24, ())
    with EngineRunner(models[0], device="cpu") as runner:
        [expected] = runner.generate([job])
    with (
        BackgroundServer(str(recommending), device="cpu") as server,
        EndpointRunner(server.base_url, max_length=512) as runner,
    ):
        assert runner.generate([job]) == [expected]


def test_whole_texts_are_scored_in_windows(models: tuple[Path, Path]) -> None:
    """`loglikelihood_rolling`: every token once, as lm-eval's own model scores a text that fits."""
    source, _ = models
    text = tiny_models.TEXT[:600]
    request: Any = type("Request", (), {"args": (text,)})()
    reference = HFLM(load(source), tokenizer=tiny_models.tokenizer(), device="cpu")
    with EngineRunner(source, device="cpu") as runner:
        lm = HalveLM(runner, tiny_models.tokenizer(), lambda done, total, what: None)
        [found] = lm.loglikelihood_rolling([request])
        [expected] = reference.loglikelihood_rolling([request], disable_tqdm=True)
        assert found == pytest.approx(expected, rel=1e-4)
        runner.max_length = 64
        [in_windows] = lm.loglikelihood_rolling([request])
    assert in_windows < 0
    assert in_windows == pytest.approx(found, rel=0.2)
    assert in_windows != found


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--no-perplexity"], "leaves nothing to measure"),
        (["--tasks", "arc_easy,", "--task-data", DATA], "--tasks 'arc_easy,': names of tasks"),
        (["--tasks", "arc_esay", "--task-data", DATA], "no task 'arc_esay'; did you mean 'arc_easy'"),
        (["--tasks", "mmlu", "--task-data", DATA], "'mmlu' is not one task with one data set in lm-eval, but a group"),
        (["--tasks", "piqa", "--task-data", DATA], "has no piqa.jsonl or piqa_*.jsonl"),
        (["--tasks", "arc_easy", "--task-data", "/nonesuch"], "there is no directory /nonesuch"),
        (["--limit", "5"], "--limit is for --tasks"),
        (["--model", "m"], "--model is for --url"),
        (["--api-key", "k"], "--api-key is for --url"),
        (["--timeout", "5"], "--timeout is for measuring through an endpoint"),
        (["--concurrency", "2"], "--concurrency is for --tasks or measuring through an endpoint"),
        (["--no-perplexity", "--tasks", "arc_easy", "--windows", "2"], "--text is for --perplexity"),
        (["--through", "endpoint", "--agreement"], "--agreement is for --against in this process"),
        (["--url", "http://127.0.0.1:9/v1"], "--url measures one served model"),
    ],
)  # fmt: skip
def test_wrong_calls(arguments: list[str | Path], told: str, run) -> None:
    called = run(*arguments)
    assert called.code == 2
    assert told in called.message


def test_what_is_no_checkpoint(halve: Halve, tmp_path: Path) -> None:
    for arguments, told in (
        ([tmp_path / "absent"], "there is no model directory"),
        ([tmp_path], "is empty; a model is a directory"),
    ):
        called = halve("eval", *arguments)
        assert called.code == 2
        assert told in called.message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "has no examples"),
        (b'{"question": 1}\nnot json\n', "line 2: each line must be a JSON object"),
        (b"[1]\n", "line 1: each line must be a JSON object"),
        (b'{"wrong": "fields"}\n', "does not fit the task 'arc_easy'"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_data_that_does_not_fit(content: bytes, told: str, run, tmp_path: Path) -> None:
    (tmp_path / "arc_easy.jsonl").write_bytes(content)
    called = run("--tasks", "arc_easy", "--task-data", tmp_path)
    assert called.code == 2
    assert told in called.message
    assert "arc_easy.jsonl" in called.message


def test_data_of_which_a_later_row_does_not_fit(run, tmp_path: Path) -> None:
    rows = (DATA / "arc_easy.jsonl").read_text().splitlines()
    rows[3] = json.dumps({**json.loads(rows[3]), "answerKey": "Z"})
    (tmp_path / "arc_easy.jsonl").write_text("\n".join(rows))
    called = run("--tasks", "arc_easy", "--task-data", tmp_path)
    assert called.code == 2
    assert "the data does not fit the tasks arc_easy" in called.message
    assert run("--tasks", "arc_easy", "--task-data", tmp_path, "--limit", "3", "--json").code == 0


def test_data_by_other_names(run, tmp_path: Path) -> None:
    import gzip

    rows = (DATA / "arc_easy.jsonl").read_bytes()
    (tmp_path / "arc_easy_test.jsonl.gz").write_bytes(gzip.compress(rows))
    assert tasks._data_file("arc_easy", tmp_path).name == "arc_easy_test.jsonl.gz"
    (tmp_path / "arc_easy_validation.jsonl").write_bytes(rows)
    called = run("--tasks", "arc_easy", "--task-data", tmp_path)
    assert called.code == 2
    assert (
        "more than one file for the task 'arc_easy': arc_easy_validation.jsonl, arc_easy_test.jsonl.gz"
        in (called.message)
        or "arc_easy_test.jsonl.gz, arc_easy_validation.jsonl" in called.message
    )
    (tmp_path / "arc_easy.jsonl").write_bytes(rows)
    assert tasks._data_file("arc_easy", tmp_path).name == "arc_easy.jsonl"
    (tmp_path / "arc_easy.jsonl").unlink()
    (tmp_path / "arc_easy_validation.jsonl").unlink()
    (tmp_path / "arc_easy_test.jsonl.gz").write_bytes(gzip.compress(rows)[:-200])
    assert "cannot read" in run("--tasks", "arc_easy", "--task-data", tmp_path).message


def test_without_lm_eval(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    called = run("--tasks", "arc_easy", "--task-data", DATA)
    assert called.code == 2
    assert called.message == "--tasks needs the package 'lm-eval': pip install -e '.[eval]' in the checkout of halve"


def test_without_the_hub(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is neither network nor data, what is missing is said, and what helps."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # they were read from the environment
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    called = run("--tasks", "arc_easy")
    assert called.code == 2
    assert "the data of arc_easy cannot be had from the hub" in called.message
    assert "--task-data DIR" in called.message
