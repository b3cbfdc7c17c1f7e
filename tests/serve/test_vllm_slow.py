"""What takes minutes of vLLM: every family it serves on a processor, two ranks, and a real model.

python -m pytest tests/serve/test_vllm_slow.py -m slow
"""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.convert import unpack_checkpoint
from compress.packed import SCALED_DTYPES
from tests.runs import compress
from tests.serve import vllm_checkpoints as checkpoints
from tests.serve.test_vllm import complete, run_session
from tests.serve.vllm_session import Case, Result

pytestmark = [checkpoints.needs_vllm, pytest.mark.slow]


def three(name: str, packed: Path, zeros: Path, **options: object) -> list[Case]:
    """A model dense with zeros under vLLM alone, packed, and with zeros that the plugin finds."""
    return [
        Case(f"{name} zeros", str(zeros), options=options),
        Case(f"{name} packed", str(packed), options=options),
        Case(f"{name} found", str(zeros), options={**options, "quantization": "halve"}),
    ]


def scaled(name: str, root: Path, family: str = "llama", value_dtype: str = "int8", **options: object) -> list[Case]:
    """A model with values of 8 bits, expanded as it is read, and dense with its zeros."""
    packed, zeros = checkpoints.pair(root / value_dtype, family, value_dtype=value_dtype)
    return [
        Case(f"{name} {value_dtype} zeros", str(zeros), options=options),
        Case(f"{name} {value_dtype}", str(packed), options=options, environment={"HALVE_BACKEND": "plain"}),
    ]


def require_equal(session: dict[str, Result], name: str) -> None:
    expected = complete(session[f"{name} zeros"])
    for kind in ("packed", "found"):
        assert complete(session[f"{name} {kind}"]) == expected
        assert "linear layers run 2:4" in "\n".join(session[f"{name} {kind}"].lines)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Each family in a process of its own: vLLM's backend for models of transformers changes what it finds there."""
    found: dict[str, Result] = {}
    for family in checkpoints.SETTINGS:
        root = tmp_path_factory.mktemp(family)
        found |= run_session([*three(family, *checkpoints.pair(root, family)), *scaled(family, root, family)], root)
    return found


@pytest.mark.parametrize("family", sorted(checkpoints.SETTINGS))
def test_every_family(families: dict[str, Result], family: str) -> None:
    require_equal(families, family)
    assert complete(families[f"{family} int8"]) == complete(families[f"{family} int8 zeros"])
    assert complete(families[f"{family} int8"]) != complete(families[f"{family} packed"])


def test_two_ranks(tmp_path: Path) -> None:
    """Rows and columns are split, and every rank prepares its own part."""
    packed, zeros = checkpoints.pair(tmp_path / "whole")
    bitmask = checkpoints.stranded(zeros, tmp_path / "bitmask", "sparse-24-bitmask")
    options = {"tensor_parallel_size": 2}
    compiled = {**options, "enforce_eager": False}
    cases = [
        *three("tp", packed, zeros, **options),
        Case("tp bitmask", str(bitmask), options=options),
        Case("compiled zeros", str(zeros), options=compiled),
        Case("compiled packed", str(packed), options=compiled),
        *(case for values in SCALED_DTYPES for case in scaled("tp", tmp_path, value_dtype=values, **options)),
    ]
    session = run_session(cases, tmp_path, ranks=2)
    expected = complete(session["tp zeros"])
    for name in ("tp packed", "tp found", "tp bitmask"):
        assert complete(session[name]) == expected
    assert complete(session["compiled packed"]) == complete(session["compiled zeros"])
    for values in SCALED_DTYPES:
        assert complete(session[f"tp {values}"]) == complete(session[f"tp {values} zeros"])


def test_smollm2(tmp_path: Path) -> None:
    """A real model, eager and compiled; on one rank, because its 9 heads cannot be split in two."""
    from benchmarks.demo import prepare_smollm2

    source = prepare_smollm2(tmp_path / "smollm2")
    packed = compress(source, tmp_path / "packed", metric="wanda", reconstruction="none").directory
    unpack_checkpoint(packed, tmp_path / "zeros")
    eager = three("eager", packed, tmp_path / "zeros")
    compiled = three("compiled", packed, tmp_path / "zeros", enforce_eager=False)
    session = run_session([*eager, *compiled], tmp_path)
    for name in ("eager", "compiled"):
        expected = complete(session[f"{name} zeros"])
        assert complete(session[f"{name} packed"]) == expected
        assert complete(session[f"{name} found"]) == expected


def test_experts_are_left_to_vllm(tmp_path: Path) -> None:
    """A mixture of experts whose attention is 2:4: what is not 2:4, and what is no linear layer, stays as it is."""
    model = checkpoints.mixture(tmp_path / "mixture")
    cases = [Case("zeros", str(model)), Case("found", str(model), options={"quantization": "halve"})]
    session = run_session(cases, tmp_path)
    assert complete(session["found"]) == complete(session["zeros"])
    said = "\n".join(session["found"].lines)
    assert "4 linear layers run 2:4" in said
    assert "2 linear layers are dense: not 2:4" in said
    assert "1 embed_tokens, 2 experts, 1 lm_head" in said
