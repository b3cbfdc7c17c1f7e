"""In which order the linears of a block are pruned and where their errors show, for every family; against what the models say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress import calibration
from compress.blocks import BlockModel
from compress.sources import Source
from compress.stages import BLOCK_OUTPUT, Stage, Tap, _Planner, plan_stages
from tests import tiny_models


def stages_of(family: str, directory: Path, ignored: str = "-") -> list[Stage]:
    source = tiny_models.build(family, directory / "source", layers=1)
    model = BlockModel(Source(source), torch.float32, torch.device("cpu"))
    windows = torch.randint(5, tiny_models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.record_calls(calibration.text_set(windows).batches(3))
        model.load_block(0)
        prefix = f"{model.block_name(0)}."
        names = [name.removeprefix(prefix) for name in model.linears(0)]
        return plan_stages(model, 0, hidden[0], [name for name in names if ignored not in name])


def short(stages: list[Stage]) -> list[list[str]]:
    return [[layer.rpartition(".")[2] for layer in stage.layers] for stage in stages]


def at(module: str, side: str = "input") -> Tap:
    return Tap(module, side)  # type: ignore[arg-type]


LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        *((family, LLAMA) for family in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        ("opt", [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        # Attention and feed-forward stand side by side: both read the input, and both go into one sum, so one waits.
        ("gpt_neox", [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]),
    ],
)
def test_the_order_of_the_families(family: str, expected: list[list[str]], tmp_path: Path) -> None:
    assert short(stages_of(family, tmp_path)) == expected


def test_errors_show_in_sums_where_there_are_some(tmp_path: Path) -> None:
    shows = {layer: tap for stage in stages_of("llama", tmp_path) for layer, tap in stage.shows.items()}
    assert shows == {
        "self_attn.q_proj": at("self_attn.q_proj"),
        "self_attn.k_proj": at("self_attn.q_proj"),
        "self_attn.v_proj": at("self_attn.q_proj"),
        "self_attn.o_proj": at("post_attention_layernorm"),
        "mlp.gate_proj": at("mlp.gate_proj"),
        "mlp.up_proj": at("mlp.gate_proj"),
        "mlp.down_proj": BLOCK_OUTPUT,
    }


def test_a_norm_between_a_layer_and_the_sum_hides_the_sum(tmp_path: Path) -> None:
    """Gemma normalizes what attention and feed-forward give before it is added."""
    shows = {layer: tap for stage in stages_of("gemma2", tmp_path) for layer, tap in stage.shows.items()}
    assert shows["self_attn.o_proj"] == at("post_attention_layernorm")
    assert shows["mlp.down_proj"] == at("post_feedforward_layernorm")


def test_parallel_branches_both_go_into_the_blocks_output(tmp_path: Path) -> None:
    stages = stages_of("gpt_neox", tmp_path)
    assert stages[1].shows == {"attention.dense": BLOCK_OUTPUT}
    assert stages[2].shows == {"mlp.dense_4h_to_h": BLOCK_OUTPUT}


def test_a_layer_without_a_sum_shows_its_input_or_what_is_narrower(tmp_path: Path) -> None:
    shows = {layer: tap for stage in stages_of("phi3", tmp_path) for layer, tap in stage.shows.items()}
    assert shows["self_attn.qkv_proj"] == at("self_attn.qkv_proj")
    assert shows["mlp.gate_up_proj"] == at("mlp.gate_up_proj")
    mamba = {layer: tap for stage in stages_of("mamba", tmp_path / "mamba") for layer, tap in stage.shows.items()}
    assert mamba["mixer.x_proj"] == at("mixer.x_proj", "output")


def test_an_output_that_is_zero_is_pushed_far_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = BlockModel.load_block

    def zeroed(self: BlockModel, index: int) -> torch.nn.Module:
        block = load(self, index)
        block.self_attn.o_proj.weight.data.zero_()  # type: ignore[union-attr]
        return block

    monkeypatch.setattr(BlockModel, "load_block", zeroed)
    shows = {layer: tap for stage in stages_of("llama", tmp_path) for layer, tap in stage.shows.items()}
    assert shows["self_attn.o_proj"] == at("post_attention_layernorm")


class Unusual(torch.nn.Module):
    """A block that calls one linear twice and, if wished, writes into a view of what another one gives."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        self.norm, self.norm2 = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
        for name in ("first", "again", "attended", "up", "down"):
            setattr(self, name, torch.nn.Linear(16, 16))
        self.writes = writes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.norm(x))
        if self.writes:
            left, right = y.unbind(0)[:2]
            left += right
        h = x + self.attended(self.again(self.again(y)))
        return h + self.down(self.up(self.norm2(h)).relu())


@pytest.mark.parametrize("writes", [False, True])
def test_unusual_blocks_are_pruned_one_linear_after_the_other(writes: bool) -> None:
    """What is called twice shows nothing; where autograd is refused, the order of the calls is the order."""
    torch.manual_seed(0)
    block = Unusual(writes=writes).requires_grad_(False)
    x = torch.randn(3, 5, 16)
    names = ["down", "up", "attended", "again", "first"]
    stages = _Planner(block, lambda: block(x.clone()), x, names).stages()
    assert short(stages) == [["first"], ["again"], ["attended"], ["up"], ["down"]]
    assert not stages[1].shows
    assert stages[2].shows == {"attended": at("norm2")}
    assert stages[4].shows == {"down": BLOCK_OUTPUT}


def test_a_family_that_flattens_its_tokens(tmp_path: Path) -> None:
    """OPT, between its feed-forward layers."""
    shows = {layer: tap for stage in stages_of("opt", tmp_path) for layer, tap in stage.shows.items()}
    assert shows["fc2"] == BLOCK_OUTPUT
    assert shows["self_attn.out_proj"] == at("final_layer_norm")


def test_layers_that_stay_dense_are_in_no_stage(tmp_path: Path) -> None:
    stages = stages_of("llama", tmp_path, ignored="q_proj")
    assert short(stages) == [["k_proj", "v_proj"], *LLAMA[1:]]
    assert set(stages[0].shows.values()) == {at("self_attn.k_proj")}


def test_mamba_has_an_order_and_its_last_layer_a_sum(tmp_path: Path) -> None:
    stages = stages_of("mamba", tmp_path)
    order = [layer for group in short(stages) for layer in group]
    # dt_proj is never called, as the model multiplies by its weight itself.
    assert order == ["in_proj", "x_proj", "out_proj", "dt_proj"]
    assert next(tap for stage in stages for layer, tap in stage.shows.items() if "out_proj" in layer) == BLOCK_OUTPUT


def test_vit(tmp_path: Path) -> None:
    stages = stages_of_vit(tmp_path)
    assert len(stages) == 4
    assert BLOCK_OUTPUT in stages[-1].shows.values()


def stages_of_vit(directory: Path) -> list[Stage]:
    source = tiny_models.build("vit", directory / "source", layers=1)
    model = BlockModel(Source(source), torch.float32, torch.device("cpu"))
    images = torch.randn(
        3, 3, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        hidden = model.record_calls([{"pixel_values": images}])
        model.load_block(0)
        prefix = f"{model.block_name(0)}."
        return plan_stages(model, 0, hidden[0], [name.removeprefix(prefix) for name in model.linears(0)])
