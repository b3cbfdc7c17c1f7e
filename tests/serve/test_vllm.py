"""vLLM with halve's plugin: the real engine on a tiny model, in every form that a 2:4 checkpoint comes in.

One process of vLLM runs all cases (`tests.serve.vllm_session`); each test looks at one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.convert import pack_checkpoint
from compress.layout import Layout
from compress.packed import SCALED_DTYPES
from compress.wide import is_emulated
from serve.kernels import choose
from serve.vllm.sound import CHECKED_VARIABLE
from tests.runs import ROOT
from tests.serve import vllm_checkpoints as checkpoints
from tests.serve.vllm_checkpoints import needs_vllm
from tests.serve.vllm_session import NEW_TOKENS, PROMPTS, Case, Result

pytestmark = needs_vllm

LINEARS_OF_VLLM = 4 * checkpoints.LAYERS  # qkv, o, gate and up, down
MIXED = ("*.layers.0.self_attn.v_proj", "*.layers.1.mlp.gate_proj", "*.layers.2.mlp.down_proj")
scaled = pytest.mark.parametrize("values", SCALED_DTYPES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints by name."""
    root = tmp_path_factory.mktemp("vllm")
    packed, zeros = checkpoints.pair(root / "whole")
    mixed, mixed_zeros = checkpoints.pair(root / "mixed", ignore=MIXED)
    of_8_bits = {name: checkpoints.pair(root / name, value_dtype=name) for name in SCALED_DTYPES}
    return {
        **{name: made[0] for name, made in of_8_bits.items()},
        **{f"{name}-zeros": made[1] for name, made in of_8_bits.items()},
        **{f"{name}-both": both(made[0], root / f"{name}-both", name) for name, made in of_8_bits.items()},
        "packed": packed,
        "zeros": zeros,
        "mixed": mixed,
        "mixed-zeros": mixed_zeros,
        "stranded-dense": checkpoints.stranded(zeros, root / "stranded-dense", "dense"),
        "stranded-bitmask": checkpoints.stranded(zeros, root / "stranded-bitmask", "sparse-24-bitmask"),
        "lora": checkpoints.adapter(root / "lora"),
        **damaged(packed, root),
        **damaged_scales(of_8_bits["int8"][0], root),
    }


def both(packed: Path, out: Path, dtype: str) -> Path:
    """The same with activations of 8 bits."""
    pack_checkpoint(packed, out, activation_dtype=dtype)
    return out


def damaged_scales(int8: Path, root: Path) -> dict[str, Path]:
    """The same of scales."""
    key = "model.layers.0.self_attn.k_proj.weight_scale"
    scale = load_file(int8 / "model.safetensors")[key]
    zero = scale.clone()
    zero[3] = 0
    wrong = {"zero": zero, "short": scale[1:].contiguous(), "dtype": scale.bfloat16()}
    made = {f"{key} {fault}": checkpoints.changed(int8, root / fault, key, tensor) for fault, tensor in wrong.items()}
    return {**made, f"{key} missing": checkpoints.without(int8, root / "missing", key)}


def damaged(packed: Path, root: Path) -> dict[str, Path]:
    """Checkpoints of which one tensor is wrong, by the name of that tensor and what is wrong with it."""
    tensors = load_file(packed / "model.safetensors")
    attention, mlp = "model.layers.1.self_attn", "model.layers.2.mlp"
    flipped = tensors[f"{mlp}.up_proj.weight_mask"].clone()
    flipped[3, 2] ^= 16
    values = tensors[f"{attention}.v_proj.weight_packed"].clone()
    values[1, 1] = torch.nan
    wrong = {
        f"{mlp}.up_proj.weight_mask flipped": flipped,
        f"{attention}.v_proj.weight_packed nan": values,
        f"{attention}.o_proj.weight_packed narrow": tensors[f"{attention}.o_proj.weight_packed"][:, 2:].contiguous(),
        f"{attention}.q_proj.weight_mask short": tensors[f"{attention}.q_proj.weight_mask"][1:].contiguous(),
        f"{mlp}.down_proj.weight_mask dtype": tensors[f"{mlp}.down_proj.weight_mask"].to(torch.int32),
    }
    made = {}
    for number, (fault, tensor) in enumerate(wrong.items()):
        made[fault] = checkpoints.changed(packed, root / f"wrong-{number}", fault.split()[0], tensor)
    missing = (f"{attention}.k_proj.weight_packed", f"{mlp}.gate_proj.weight_mask", f"{mlp}.down_proj.weight_packed")
    for number, key in enumerate(missing):
        made[f"{key} missing"] = checkpoints.without(packed, root / f"missing-{number}", key)
    return made


def cases(made: dict[str, Path]) -> list[Case]:
    def case(name: str, model: str = "", **fields: object) -> Case:
        return Case(name, str(made[model or name]), **fields)  # type: ignore[arg-type]

    lora = {"enable_lora": True, "max_lora_rank": 8}
    found = {"quantization": "halve"}
    return [
        case("zeros", scores=True),
        case("packed", scores=True, reload=True),
        case("found", "zeros", options=found, reload=True),
        case("stranded-dense"),
        case("stranded-bitmask", reload=True),
        case("mixed-zeros"),
        case("mixed"),
        case("expanded", "packed", environment={"HALVE_BACKEND": "plain"}),
        case("dummy", "packed", options={"load_format": "dummy"}),
        case("zeros float16", "zeros", options={"dtype": "float16"}),
        case("packed float16", "packed", options={"dtype": "float16"}),
        case("zeros lora", "zeros", options=lora, lora=str(made["lora"])),
        case("packed lora", "packed", options=lora, lora=str(made["lora"])),
        *(  # the plugin's check of the files is told that it was done, so that each layer has to notice by itself
            case(fault, environment={CHECKED_VARIABLE: str(made[fault].resolve())}) for fault in FAULTS
        ),
        case("in a file", "model.layers.1.self_attn.k_proj.weight_packed missing"),
        *of_8_bits(case),
        case("zeros compiled", "zeros", options={"enforce_eager": False}),
        case("packed compiled", "packed", options={"enforce_eager": False}),
    ]


def of_8_bits(case: Callable[..., Case]) -> list[Case]:
    found = []
    for name in SCALED_DTYPES:
        found += [
            case(f"{name}-zeros"),
            case(name, scores=True, reload=True),
            case(f"{name} expanded", name, environment={"HALVE_BACKEND": "plain"}, scores=True),
            case(f"{name} dummy", name, options={"load_format": "dummy"}),
            case(f"{name}-both", scores=True, reload=True),
        ]
    return [
        *found,
        case("int8-zeros float16", "int8-zeros", options={"dtype": "float16"}),
        case("int8 float16", "int8", options={"dtype": "float16"}),
        case("int8 compiled", "int8", options={"enforce_eager": False}),
        case("int8-both compiled", "int8-both", options={"enforce_eager": False}),
    ]


FAULTS = (
    "model.layers.2.mlp.up_proj.weight_mask flipped",
    "model.layers.1.self_attn.v_proj.weight_packed nan",
    "model.layers.1.self_attn.o_proj.weight_packed narrow",
    "model.layers.1.self_attn.q_proj.weight_mask short",
    "model.layers.2.mlp.down_proj.weight_mask dtype",
    "model.layers.1.self_attn.k_proj.weight_packed missing",
    "model.layers.2.mlp.gate_proj.weight_mask missing",
    "model.layers.2.mlp.down_proj.weight_packed missing",
    *(f"model.layers.0.self_attn.k_proj.weight_scale {fault}" for fault in ("zero", "short", "dtype", "missing")),
)


def run_session(cases: list[Case], directory: Path, ranks: int = 1) -> dict[str, Result]:
    """Runs the cases in a process of vLLM and returns what became of each. Several ranks have processes of their own, and
    what they log is not seen."""
    plan, results = directory / "plan.json", directory / "results.jsonl"
    plan.write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", "tests.serve.vllm_session", str(plan), str(results)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if ranks > 1:
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:ranks]))}
    done = subprocess.run(
        ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=2400,
    )
    lines = results.read_text().splitlines() if results.exists() else []
    assert len(lines) == len(cases), f"{len(lines)} of {len(cases)} cases ran; vLLM said:\n{done.stdout[-6000:]}"
    found = {result.name: result for result in (Result(**json.loads(line)) for line in lines)}
    print("\n".join(f"{result.seconds:6.1f} s  {name}" for name, result in found.items()))
    return found


@pytest.fixture(scope="module")
def session(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_session(cases(made), tmp_path_factory.mktemp("session"))


def logits_of(directory: Path, dtype: torch.dtype) -> Callable[[list[int]], torch.Tensor]:
    """transformers' model of a checkpoint: token ids -> logits [tokens, vocabulary], float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0].float()

    return logits


def complete(result: Result) -> list[list[int]]:
    assert result.error is None
    assert [len(tokens) for tokens in result.tokens] == [NEW_TOKENS] * len(PROMPTS)
    return result.tokens


@pytest.mark.parametrize("name", ["packed", "found", "stranded-dense", "stranded-bitmask", "expanded"])
def test_the_tokens_are_those_of_the_dense_checkpoint_with_zeros(session: dict[str, Result], name: str) -> None:
    expected = complete(session["zeros"])
    assert len({token for tokens in expected for token in tokens}) > 8, (
        "a model that always says the same proves nothing"
    )
    assert complete(session[name]) == expected


def test_the_same_compiled(session: dict[str, Result], made: dict[str, Path]) -> None:
    """Where the processor multiplies bfloat16. Where it cannot, compiled code rounds in other places than we do, and answers may
    part where the float32 model all but ties."""
    packed, zeros = complete(session["packed compiled"]), complete(session["zeros compiled"])
    if not is_emulated(torch.bfloat16, torch.device("cpu")):
        assert packed == zeros
    require_alike(packed, zeros, made["zeros"])


def require_alike(ones: list[list[int]], others: list[list[int]], zeros: Path) -> None:
    """Answers part only where the float32 model all but ties: by no more than the bfloat16 model is off."""
    exact, rounded = (logits_of(zeros, dtype) for dtype in (torch.float32, torch.bfloat16))
    for prompt, one, other in zip(PROMPTS, ones, others, strict=True):
        parts = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if parts is not None:
            context = [*prompt, *one[:parts]]
            right, near = exact(context)[-1], rounded(context)[-1]
            assert (right[one[parts]] - right[other[parts]]).abs() <= 2 * (near - right).abs().max()


def test_another_dtype_than_the_stored_one(session: dict[str, Result]) -> None:
    assert complete(session["packed float16"]) == complete(session["zeros float16"])


@pytest.mark.parametrize("name", ["packed", "found", "stranded-bitmask"])
def test_weights_can_be_read_anew(session: dict[str, Result], name: str) -> None:
    assert session[name].again == complete(session["zeros"])


def test_lora_on_sparse_layers(session: dict[str, Result]) -> None:
    assert complete(session["packed lora"]) == complete(session["zeros"])
    assert session["packed lora"].again == session["zeros lora"].again
    assert session["packed lora"].again != session["packed lora"].tokens, (
        "the adapter changes nothing, so this proves nothing"
    )


@pytest.mark.parametrize("name", ["dummy", *(f"{values} dummy" for values in SCALED_DTYPES)])
def test_made_up_weights_run(session: dict[str, Result], name: str) -> None:
    complete(session[name])


def test_prompt_logprobs_agree_with_transformers(session: dict[str, Result], made: dict[str, Path]) -> None:
    require_near(session, ("packed", "zeros"), made["zeros"])


def require_near(session: dict[str, Result], names: Sequence[str], directory: Path) -> None:
    """As far from the float32 model as transformers' own bfloat16 model is, but for a factor of two; over all prompts, as a few
    tokens say little of a largest error."""

    def of_transformers(dtype: torch.dtype) -> torch.Tensor:
        logits = logits_of(directory, dtype)
        return torch.cat([
            logits(prompt)[:-1].log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0] for prompt in PROMPTS
        ])  # fmt: skip

    exact, rounded = of_transformers(torch.float32), of_transformers(torch.bfloat16)
    for name in names:
        mine = torch.tensor([value for values in session[name].prompt_logprobs for value in values])
        assert (mine - exact).abs().max() <= 2 * (rounded - exact).abs().max()
        assert (mine - exact).abs().mean() <= 1.5 * (rounded - exact).abs().mean()


@scaled
def test_values_of_8_bits(
    session: dict[str, Result], made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    """Expanded they are the unpacked checkpoint. A kernel has no weight rounded to bfloat16, as that has, so its answers may part from
    those where the model all but ties. transformers' path multiplies value and scale in float32."""
    zeros = complete(session[f"{values}-zeros"])
    assert zeros != complete(session["zeros"]), "8 bits change nothing, so this proves nothing"
    assert complete(session[f"{values} expanded"]) == zeros
    require_alike(complete(session[values]), zeros, made[f"{values}-zeros"])
    assert session[values].again == session[values].tokens
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    require_near(session, (values, f"{values} expanded"), made[values])


@scaled
def test_activations_of_8_bits(
    session: dict[str, Result], made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    """What transformers' path says, which rounds by torch's operators."""
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    require_near(session, (f"{values}-both",), made[f"{values}-both"])
    assert session[f"{values}-both"].again == session[f"{values}-both"].tokens
    assert session[f"{values}-both"].prompt_logprobs != session[values].prompt_logprobs, "it changes nothing"


def test_activations_of_8_bits_compiled(
    session: dict[str, Result], made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled operations in between round elsewhere, and a number that is rounded to another value of 8 bits moves more than those do."""
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    require_alike(complete(session["int8-both compiled"]), complete(session["int8-both"]), made["int8-both"])


def test_values_of_8_bits_in_another_dtype_and_compiled(session: dict[str, Result], made: dict[str, Path]) -> None:
    require_alike(complete(session["int8 float16"]), complete(session["int8-zeros float16"]), made["int8-zeros"])
    require_alike(complete(session["int8 compiled"]), complete(session["int8-zeros"]), made["int8-zeros"])


@scaled
def test_a_line_says_what_becomes_of_values_of_8_bits(session: dict[str, Result], values: str) -> None:
    said = "\n".join(session[values].lines)
    if choose(torch.device("cpu"), SCALED_DTYPES[values], 1, 128, 128).backend.prepare is None:
        assert f"INFO halve: {LINEARS_OF_VLLM} linear layers are dense: no kernel here is faster" in said
    else:
        assert f"INFO halve: {LINEARS_OF_VLLM} linear layers run 2:4 on " in said
        assert "0.3" in said.partition("their weights take")[2].partition("of the dense ones")[0]


def test_a_line_says_what_runs_sparse_and_what_is_left(session: dict[str, Result]) -> None:
    said = "\n".join(session["packed"].lines)
    assert f"INFO halve: {LINEARS_OF_VLLM} linear layers run 2:4 on cpu: " in said
    assert "0.56" in said.partition("their weights take")[2].partition("of the dense ones")[0]
    assert "left to vLLM as they are: 1 VocabParallelEmbedding, 1 lm_head" in said
    assert not session["zeros"].lines


def test_without_a_kernel_weights_are_expanded_with_one_warning(session: dict[str, Result]) -> None:
    lines = session["expanded"].lines
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "HALVE_BACKEND asks for it" in warnings[0]
    assert f"INFO halve: {LINEARS_OF_VLLM} linear layers are dense: no kernel here is faster" in "\n".join(lines)


def test_fused_layers_of_both_kinds_are_dense(session: dict[str, Result]) -> None:
    """vLLM fuses q, k, v and gate, up; where the recipe left one of them dense, the others are expanded beside it."""
    assert complete(session["mixed"]) == complete(session["mixed-zeros"])
    said = "\n".join(session["mixed"].lines)
    assert f"{LINEARS_OF_VLLM - 3} linear layers run 2:4" in said
    assert "1 linear layers are dense: vLLM fuses them with v_proj, which is not 2:4" in said
    assert "1 linear layers are dense: vLLM fuses them with gate_proj, which is not 2:4" in said
    assert "1 down_proj" in said.partition("left to vLLM")[2]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_layer_notices_what_is_wrong_with_it(session: dict[str, Result], fault: str) -> None:
    key, kind = fault.split()
    module = key.rpartition(".")[0]
    error = session[fault].error
    assert error is not None
    assert "CorruptCheckpointError" in error or "RuntimeError" in error
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    names = {module, module.replace(module.rpartition(".")[2], fused.get(module.rpartition(".")[2], "?"))}
    assert any(name in error for name in names), error
    assert {
        "flipped": "row 3, columns 16 to 23",
        "nan": "NaN or infinite",
        "narrow": "belongs there",
        "short": "does not fit",
        "dtype": "belongs there",
        "zero": "1 scales are not finite and above zero (the first is of row 3)",
        "missing": f"has no tensor {key}",
    }[kind] in error


def test_what_is_missing_is_said_before_anything_starts(session: dict[str, Result]) -> None:
    assert session["in a file"].error == (
        "CorruptCheckpointError: the checkpoint has no tensor model.layers.1.self_attn.k_proj.weight_packed; it is damaged, "
        "or config.json is not its own"
    )


def test_the_cases_cover_every_kind_of_layer(made: dict[str, Path]) -> None:
    """The tiny model has what it is chosen for: grouped queries, a fused layer of unequal parts, a split by columns."""
    linears = {linear.name: (linear.n, linear.k) for linear in Layout.of(made["packed"]).block_linears}
    assert linears["model.layers.0.self_attn.q_proj"] != linears["model.layers.0.self_attn.k_proj"]
    assert len(linears) == 7 * checkpoints.LAYERS
