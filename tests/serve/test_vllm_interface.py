"""That what the tests without vLLM take for granted is so in the vLLM that is installed. No engine is started."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.runs import ROOT
from tests.serve.vllm_checkpoints import needs_vllm

pytestmark = needs_vllm

PROGRAM = """
import json
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models.utils import WeightsMapper
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serve import vllm_plugin
vllm_plugin.register()
vllm_plugin.register()
from serve.vllm.linear import Outcome
from serve.vllm.names import Names
from serve.vllm.quantization import HalveQuantization
from serve.vllm.stored import Stored

def hashes(quantization):
    config = VllmConfig()
    config.quant_config = quantization
    copy = VllmConfig(quant_config=quantization, additional_config={"part": 1})  # as models of several parts make them
    assert copy.quant_config is quantization
    before = config.compute_hash(), repr(aot_compile_hash_factors(copy))
    seen = [before]
    for is_sparse in (True, False):
        quantization._waiting = {"model.layers.0.mlp.up_proj"}
        quantization._processed("model.layers.0.mlp.up_proj", Outcome(is_sparse, "why", 10, 20))
        seen.append((config.compute_hash(), repr(aot_compile_hash_factors(copy))))
    return seen

none = VllmConfig()
class Model:
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        orig_to_new_substr={".attention.": ".self_attn."},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
    )
    packed_modules_mapping = {}
quantization = HalveQuantization(Stored("bitmask"))
configure_quant_config(quantization, Model)
names = {
    pattern: quantization._names.is_called("language_model.model.layers.0.self_attn.q_proj", pattern)
    for pattern in (
        "re:model.language_model.layers.*attention",
        "model.language_model.layers.0.attention.q_proj",
        "model.language_model.layers.1.attention.q_proj",
        "re:model.layers",
    )
}
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
sizes = [
    parser.parse_args(arguments).tensor_parallel_size
    for arguments in (["--tensor_parallel_size", "2"], ["--tensor_parallel-size=2"], ["-tp", "2"])
]
print("FOUND", json.dumps({
    "unnamed": HalveQuantization.override_quantization_method(
        {"quant_method": "", "sparsity_config": {"sparsity_structure": "2:4", "format": "dense"}}, None
    ),
    "hashes": hashes(quantization), "plain": none.compute_hash(), "names": names, "sizes": sizes,
}))
"""


def test_the_plugin_fits_vllm() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    before, sparse, dense = found["hashes"]
    assert before[0] == found["plain"], "a model of which nothing is read has vLLM's own hash"
    assert len({json.dumps(one) for one in (before[1], sparse[1], dense[1])}) == 3, "kept graphs go by these"
    assert len({before[0], sparse[0], dense[0]}) == 3
    assert found["names"] == {
        "re:model.language_model.layers.*attention": True,
        "model.language_model.layers.0.attention.q_proj": True,
        "model.language_model.layers.1.attention.q_proj": False,
        "re:model.layers": False,
    }
    assert found["sizes"] == [2, 2, 2]
    assert found["unnamed"] == "halve"


LAYERS = """
import json
from unittest import mock

import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from serve import vllm_plugin
vllm_plugin.register()
from compress.packed import SCALED_DTYPES, pack, quantize, unpack
from compress.patterns import NMPattern
from serve.vllm.quantization import HalveQuantization
from serve.vllm.stored import Stored

WIDTH, HEAD = 64, 16

def weight_of(rows, dtype):
    sizes = 2.0 ** (torch.arange(rows)[:, None] % 7 - 3)
    drawn = torch.randn(rows, WIDTH) * sizes
    return quantize(pack(drawn * NMPattern(2, 4).mask(drawn.abs())), dtype)

def load(layer, ids, weights):
    for name in ("weight_packed", "weight_mask", "weight_scale"):
        parameter = getattr(layer, name)
        for shard, weight in zip(ids, weights):
            read = {"weight_packed": weight.values, "weight_mask": weight.mask, "weight_scale": weight.scale}[name]
            parameter.weight_loader(parameter, read, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)

def is_right(layer, weights, width):
    x = torch.eye(width, dtype=torch.bfloat16)
    expected = torch.cat([unpack(weight, torch.float32) for weight in weights])
    found = layer.quant_method.apply(layer, x).T.float()
    return found.shape == expected.shape and bool(((found - expected).abs() <= 2**-7 * expected.abs()).all())

def share(weight, rank, ranks):
    rows = weight.shape[0] // ranks
    return weight.rows(slice(rank * rows, (rank + 1) * rows))

def columns(weight, rank):
    from compress.packed import PackedWeight
    values, mask = (t[:, rank * t.shape[1] // 2 : (rank + 1) * t.shape[1] // 2] for t in (weight.values, weight.mask))
    return PackedWeight(values, mask, weight.scale)

torch.set_default_dtype(torch.bfloat16)
found = {}
with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
  for name, dtype in SCALED_DTYPES.items():
    for rank in range(2):
        where = [mock.patch.object(module, f"get_tensor_model_parallel_{what}", lambda value=value: value)
                 for module in (linear, parameter) for what, value in (("rank", rank), ("world_size", 2))]
        for one in where:
            one.start()
        def made(kind, prefix, *sizes, **options):
            quantization = HalveQuantization(Stored("packed", value_dtype=dtype))
            quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
            return kind(*sizes, bias=False, quant_config=quantization, prefix=prefix, **options)
        def note(what, right):
            found[f"{name} {rank} {what}"] = right
        q, k, v = weight_of(4 * HEAD, dtype), weight_of(2 * HEAD, dtype), weight_of(2 * HEAD, dtype)
        layer = made(linear.QKVParallelLinear, "a.qkv_proj", WIDTH, HEAD, 4, 2)
        load(layer, "qkv", (q, k, v))
        note("qkv", is_right(layer, [share(one, rank, 2) for one in (q, k, v)], WIDTH))
        k, v = weight_of(HEAD, dtype), weight_of(HEAD, dtype)
        layer = made(linear.QKVParallelLinear, "a.qkv_proj", WIDTH, HEAD, 4, 1)
        load(layer, "qkv", (q, k, v))
        note("one key for all", is_right(layer, [share(q, rank, 2), k, v], WIDTH))
        gate, up = weight_of(96, dtype), weight_of(96, dtype)
        layer = made(linear.MergedColumnParallelLinear, "a.gate_up_proj", WIDTH, [96, 96])
        load(layer, (0, 1), (gate, up))
        note("gate and up", is_right(layer, [share(gate, rank, 2), share(up, rank, 2)], WIDTH))
        down = weight_of(48, dtype)
        layer = made(linear.RowParallelLinear, "a.down_proj", WIDTH, 48)
        load(layer, (None,), (down,))
        note("down", is_right(layer, [columns(down, rank)], WIDTH // 2))
        layer = made(linear.RowParallelLinear, "a.down_proj", WIDTH, 48)
        for tensor in list(layer.parameters()):
            initialize_single_dummy_weight(tensor)
        layer.quant_method.process_weights_after_loading(layer)
        y = layer.quant_method.apply(layer, torch.eye(WIDTH // 2, dtype=torch.bfloat16)).T
        note("made up", bool(((y > 0).sum() * 2 == y.numel()) and y.max() < 0.01 and y.min() >= 0))
        for one in where:
            one.stop()
print("FOUND", json.dumps(found))
"""


def test_vllm_cuts_and_joins_scales_with_their_rows() -> None:
    """By its own loaders, for two ranks, as `tests.serve.vllm_stub` has them; and what it makes up is a weight."""
    done = subprocess.run([sys.executable, "-c", LAYERS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert len(found) == 2 * 2 * 5
    assert [what for what, is_right in found.items() if not is_right] == []
