"""One side of `benchmarks.decode`: a model in a process of its own, which generates once for every line that it reads.

    python -m benchmarks.decode_side halve|onnx|eager|compile|freeze DIR --threads 2 [--prompt 128] [--output 128]

It prints a line when it is ready, and then for every ``go`` on standard input one JSON line with the seconds of the prefill
and of each decoded token. ``halve`` is what `halve bench` and the endpoint run; ``onnx`` what they run of a graph that `halve export` made; ``eager`` is transformers as it is;
``compile`` is transformers with a static cache and ``torch.compile`` of the model's forward pass, the way its documentation
shows; ``freeze`` is that with inductor's freezing, which packs dense weights beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.quiet import quiet_transformers


def load(kind: str, directory: Path) -> Any:
    """The model; only ``halve`` gets halve's kernels."""
    if kind == "halve":
        from serve.loading import load_model

        return load_model(directory)
    if kind == "onnx":
        from serve.onnx.model import OnnxModel, read_record

        return OnnxModel(directory, is_packed=read_record(directory)["weights"] == "packed")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval().requires_grad_(False)


def generator(kind: str, model: Any, prompt: int, output: int) -> Callable[[Tensor], dict[str, Any]]:
    """A function from prompt ids [1, prompt] to the seconds of a greedy generation."""
    from transformers import DynamicCache, StaticCache

    compiled = kind in ("compile", "freeze")
    decode = torch.compile(model.forward) if compiled else model.forward
    static = StaticCache(config=model.config, max_cache_len=prompt + output) if compiled else None

    def generate(ids: Tensor) -> dict[str, Any]:
        if static is not None:
            static.reset()
        cache = static if static is not None else DynamicCache(config=None if kind == "onnx" else model.config)
        started = time.perf_counter()
        result = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = result.logits[:, -1:].argmax(dim=-1)
        seconds = [time.perf_counter()]
        prefill = seconds[0] - started
        for i in range(output):
            # The compiled forward wants its position from outside, as `generate` gives it.
            extra = {"position_ids": torch.tensor([[prompt + i]])} if compiled else {}
            result = decode(input_ids=token, past_key_values=cache, use_cache=True, **extra)
            token = result.logits[:, -1:].argmax(dim=-1)
            seconds.append(time.perf_counter())
        decoded = [b - a for a, b in itertools.pairwise(seconds)]
        return {"prefill_seconds": prefill, "token_seconds": decoded, "last": int(token)}

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["halve", "onnx", "eager", "compile", "freeze"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.kind == "freeze":
        import torch._inductor.config as inductor

        inductor.freezing = True
    with quiet_transformers(), torch.no_grad():
        model = load(arguments.kind, arguments.directory)
        generate = generator(arguments.kind, model, arguments.prompt, arguments.output)
        ids = torch.randint(model.config.vocab_size, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
        generate(ids)
        generate(ids)
        print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
        for line in sys.stdin:
            if line.strip() == "go":
                print(json.dumps(generate(ids)), flush=True)


if __name__ == "__main__":
    main()
