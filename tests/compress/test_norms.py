"""Which linears read the output of a normalization, in every family and with modules made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.blocks import BlockModel
from compress.norms import NormOutputs, ends_with_norm
from compress.observe import InputObserver
from compress.sources import Source
from tests import tiny_models
from tests.runs import compress, tree

LLAMA = ({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"})
# As the families' forward code has it: (after a norm, not).
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,  # the norms of q and k come after their projections
    "mistral": LLAMA,
    "gemma2": LLAMA,  # its post norms go into the residual, and no linear reads them
    "gemma3": LLAMA,
    "opt": ({"q_proj", "k_proj", "v_proj", "fc1"}, {"out_proj", "fc2"}),
    "gpt2": ({"c_attn", "c_fc"}, {"attn.c_proj", "mlp.c_proj"}),
    "gpt_neox": ({"query_key_value", "dense_h_to_4h"}, {"attention.dense", "dense_4h_to_h"}),  # parallel: two norms
    "phi3": ({"qkv_proj", "gate_up_proj"}, {"o_proj", "down_proj"}),
    "mamba": ({"in_proj"}, {"x_proj", "dt_proj", "out_proj"}),
    "vit": ({"q_proj", "k_proj", "v_proj", "fc1"}, {"o_proj", "fc2"}),
}


def observed(source: Path, dtype: torch.dtype) -> list[dict[str, bool]]:
    """For each block: name of a linear in it -> after_norm."""
    model = BlockModel(Source(source), dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = (
        {"pixel_values": torch.randn(2, 3, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE, generator=generator)}
        if "Image" in type(model.model).__name__
        else {"input_ids": torch.randint(5, 300, (2, 20), generator=generator), "use_cache": False}
    )
    places = []
    with torch.no_grad():
        hidden = model.record_calls([inputs, inputs])
        for index in range(len(model.blocks)):
            block = model.load_block(index)
            after_norm = index > 0 and ends_with_norm(model, index - 1, hidden[0])
            observer = InputObserver(model.linears(index), {"after_norm"}, 80, block, normalized=after_norm)
            observer.run(model, index, hidden)
            prefix = f"{model.block_name(index)}."
            places.append({n.removeprefix(prefix): p["after_norm"] for n, p in observer.place.items()})
            hidden = [model.run_block(index, n, states) for n, states in enumerate(hidden)]
            model.drop_block(index)
    return places


def assert_places(places: list[dict[str, bool]], after: set[str], others: set[str]) -> None:
    assert len(places) == 3
    for place in places:
        assert len(place) == len(after) + len(others)
        for name, is_after in place.items():
            (found,) = [known for known in after | others if name.endswith(known)]
            assert is_after == (found in after), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXPECTED)
def test_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert EXPECTED.keys() == tiny_models.FAMILIES.keys() | tiny_models.IMAGE_FAMILIES.keys()
    source = tiny_models.build(family, tmp_path / "source", dtype=dtype)
    assert_places(observed(source, dtype), *EXPECTED[family])


QKV = {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_at_the_end_of_the_block_before(dtype: torch.dtype, tmp_path: Path) -> None:
    """OPT-350m normalizes at the end of each sublayer: q, k and v read the last norm of the block before, but for those of
    the first block, which read the embeddings."""
    source = tiny_models.build("opt", tmp_path / "source", do_layer_norm_before=False)
    first, *others = observed(source, dtype)
    assert {name.split(".")[-1] for name, after in first.items() if after} == {"fc1"}
    for place in others:
        assert {name.split(".")[-1] for name, after in place.items() if after} == QKV | {"fc1"}


def test_stade_w_of_norms_at_the_end_in_a_run(tmp_path: Path) -> None:
    """Those that read a norm are pruned as by Wanda, the others as by STADE; also where a run is resumed behind a block."""
    source = tiny_models.build("opt", tmp_path / "source", do_layer_norm_before=False, dtype=torch.float32)
    settings: dict[str, Any] = {"reconstruction": "none", "format": "dense", "add_bias": False}
    whole = compress(source, tmp_path / "whole", metric="stade-w", **settings)
    after = {record["name"] for record in whole.report["layers"] if record["after_norm"]}
    assert len(after) == 3 + 2 * len(QKV)  # fc1 of three blocks, q, k and v of two
    assert {name for name in after if ".layers.0." in name} == {"model.decoder.layers.0.fc1"}

    class Killed(BaseException):
        pass

    def kill(done: int, total: int, text: str) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(source, tmp_path / "out", metric="stade-w", checkpoint_seconds=0, progress=kill, **settings)
    resumed = compress(source, tmp_path / "out", metric="stade-w", resume=True, **settings)
    assert tree(resumed.directory) == tree(whole.directory)


def test_gpt_neox_without_a_parallel_residual(tmp_path: Path) -> None:
    source = tiny_models.build("gpt_neox", tmp_path / "source", use_parallel_residual=False)
    assert_places(observed(source, torch.bfloat16), *EXPECTED["gpt_neox"])


class Block(nn.Module):
    """Modules one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.steps = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)


def told(*modules: nn.Module, x: Tensor | None = None) -> bool:
    """Whether what the modules make of some input counts as normalized."""
    block = Block(*modules).eval()
    norms = NormOutputs(block)
    handles = norms.watch()
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)) if x is None else x
    with torch.no_grad():
        made = norms.made(block(x))
    for handle in handles:
        handle.remove()
    return made


class GemmaNorm(nn.Module):
    """(1 + weight) · x / rms(x), called by keyword below."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 2, 32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * (1 + self.weight)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = GemmaNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x=x)


NORMS = [nn.LayerNorm(32), nn.LayerNorm(32, elementwise_affine=False), nn.RMSNorm(32), GemmaNorm()]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_norms(norm: nn.Module) -> None:
    assert told(norm)
    assert told(nn.ReLU(), norm)
    assert told(ByKeyword())
    # What hands its input on as it is changes nothing about where it came from.
    assert told(norm, nn.Dropout(0.5))
    assert told(norm, nn.Identity())


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-12])
def test_norms_of_inputs_of_any_size(size: float, eps: float) -> None:
    """The constant that a norm adds to the variance dominates where the embeddings are small."""
    x = size * torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    assert told(nn.LayerNorm(32, eps=eps), x=x)
    assert told(GemmaNorm(eps), x=x)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.GELU(),
        nn.SiLU(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.Softmax(dim=-1),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.Conv1d(7, 7, 3, padding=1),
        nn.BatchNorm1d(7),
        nn.Linear(32, 32),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e3])
def test_what_is_no_norm(module: nn.Module, size: float) -> None:
    x = size * torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    assert not told(module, x=x.clone())
    assert not told(nn.LayerNorm(32), module, x=x.clone()) or isinstance(module, nn.Dropout | nn.Identity)


def test_what_is_computed_from_a_norm_is_not_straight_from_it() -> None:
    block = Block(nn.LayerNorm(32)).eval()
    norms = NormOutputs(block)
    handles = norms.watch()
    with torch.no_grad():
        y = block(torch.randn(2, 7, 32))
        assert norms.made(y)
        assert norms.made(y.view(14, 32))  # the same numbers
        assert not norms.made(y * 1)
        assert not norms.made(y[:, 1:])
        y += 1  # in place: another tensor's numbers at the same address
        assert not norms.made(y)
        norms.forget()
        again = block(torch.randn(2, 7, 32))
        assert not norms.made(again)
    for handle in handles:
        handle.remove()
