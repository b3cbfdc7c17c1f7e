"""Many engines of vLLM one after the other in one process, because to import vLLM takes longer than to load a tiny model.

    python -m tests.serve.vllm_session PLAN RESULTS

PLAN is JSON: a list of `Case`. RESULTS gets a JSON line for each, written as it ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROMPTS = [list(range(5, 60)), list(range(60, 70))]
NEW_TOKENS = 24
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        options: of ``vllm.LLM``; ``environment``: set while it runs.
        reload: whether the weights are read anew before it generates a second time.
        lora: the directory of an adapter to generate with a second time.
        scores: whether it gives the log-probabilities of the prompts, too.
    """

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    reload: bool = False
    lora: str | None = None
    scores: bool = False


@dataclass
class Result:
    """What it generated (token ids of each prompt), the log-probabilities of the prompts' own tokens, what halve said."""

    name: str
    tokens: list[list[int]] = field(default_factory=list)
    again: list[list[int]] = field(default_factory=list)
    prompt_logprobs: list[list[float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@contextlib.contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def run(case: Case) -> Result:
    import torch
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    result = Result(case.name)
    handler = _Lines(result.lines)
    logging.getLogger("vllm.halve").addHandler(handler)
    scores = 0 if case.scores else None
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=scores)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    engine = None
    try:
        with _set(case.environment):
            options = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, **case.options}
            engine = vllm.LLM(model=case.model, **options)
            outputs = engine.generate(prompts, greedy, use_tqdm=False)
            result.tokens = [list(output.outputs[0].token_ids) for output in outputs]
            for prompt, output in zip(PROMPTS, outputs, strict=True) if case.scores else ():
                pairs = zip(prompt[1:], (output.prompt_logprobs or [])[1:], strict=True)
                result.prompt_logprobs.append([step[token].logprob for token, step in pairs if step is not None])
            if case.reload:
                engine.collective_rpc("reload_weights")
            if case.reload or case.lora:
                request = LoRARequest("adapter", 1, case.lora) if case.lora else None
                outputs = engine.generate(prompts, greedy, use_tqdm=False, lora_request=request)
                result.again = [list(output.outputs[0].token_ids) for output in outputs]
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("vllm.halve").removeHandler(handler)
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        engine = None
        gc.collect()
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()
    return result


def main() -> None:
    plan, results = map(Path, sys.argv[1:3])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with results.open("w") as out:
        for fields in json.loads(plan.read_text()):
            started = time.monotonic()
            result = run(Case(**fields))
            result.seconds = time.monotonic() - started
            out.write(json.dumps(asdict(result)) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
