"""What the engine costs against plain `model.generate`: decode tokens/s at batch 1, both in one run.

    python benchmarks/engine_overhead.py MODEL_DIR [--tokens 64] [--rounds 7] [--threads N]

Both sides use the same weights, greedy, with the end-of-sequence token ignored, and take turns; a round is
one request of ``--tokens`` tokens after a short prompt, prefill included. The ratio is of medians; its spread
is the smallest and largest ratio of neighbouring turns. A second table shows what batching gains: the
engine's tokens/s at 2, 4 and 8 concurrent requests. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from serve.engines.base import SamplingParams
from serve.engines.transformers import TransformersEngine

PROMPT = "The history of the city of Paris begins"


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode speed of the engine against model.generate.")
    parser.add_argument("model_dir")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    engine = TransformersEngine(arguments.model_dir)
    engine.load()
    model, tokens = engine.model, arguments.tokens  # one model, so that both sides read the same memory
    generating: Callable = model.generate  # type: ignore[assignment]
    ids = engine.tokenizer(PROMPT)["input_ids"]
    inputs = torch.tensor([ids], device=model.device)
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)

    def generate() -> float:
        start = time.perf_counter()
        generating(inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return tokens / (time.perf_counter() - start)

    def serve(requests: int = 1) -> float:
        deltas: queue.Queue = queue.Queue()
        start = time.perf_counter()
        for _ in range(requests):
            engine.submit(ids, params, deltas.put)
        ended = 0
        while ended < requests:
            ended += deltas.get().last
        return requests * tokens / (time.perf_counter() - start)

    generate()  # warm up both
    serve()
    pairs = [(serve(), generate()) for _ in range(arguments.rounds)]
    engine_speed, generate_speed = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    batched = {count: statistics.median(serve(count) for _ in range(3)) for count in (2, 4, 8)}
    engine.close()

    print(f"model.generate   {generate_speed:8.1f} tokens/s")
    print(f"engine           {engine_speed:8.1f} tokens/s   x{engine_speed / generate_speed:.3f}")
    for count, speed in batched.items():
        print(f"engine, {count} at once{speed:8.1f} tokens/s   x{speed / engine_speed:.2f} of one alone")
    print(
        json.dumps(
            {
                "generate_tokens_per_s": round(generate_speed, 2),
                "engine_tokens_per_s": round(engine_speed, 2),
                "ratio": round(engine_speed / generate_speed, 4),
                "ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
                "engine_tokens_per_s_batched": {str(k): round(v, 2) for k, v in batched.items()},
                "tokens": tokens,
                "rounds": arguments.rounds,
                "threads": torch.get_num_threads(),
                "device": str(model.device),
                "dtype": str(model.dtype),
                "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
                "date": time.strftime("%Y-%m-%d"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
