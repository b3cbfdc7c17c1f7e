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
