"""A packed model under vLLM for a while: mixed requests, sixteen at once; does anything fail, grow or change?

    python -m benchmarks.vllm_soak MODEL [--minutes 20] [--concurrency 16]

Requests are drawn with a fixed seed: completions and chats, whole and streamed, some with log-probabilities, of 1 to 400
prompt words and 1 to 96 tokens, greedy and sampled; one in twelve hangs up after a few tokens, one in forty is one that the
server has to refuse. Before and after, sixteen fixed prompts are answered one after the other, greedily: the answers must be
the same to the letter. The memory of the server's processes is read every ten seconds; it has grown if the median of the
last fifth is more than 1 % above that of the second fifth (the first one fills caches).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from benchmarks.vllm_speed import memory
from serve.engines.vllm import VllmServer, installed
from serve.measure.environment import environment

RESULTS = Path(__file__).parent / "results"
WORDS = [
    "the",
    "mill",
    "on",
    "the",
    "river",
    "had",
    "a",
    "wheel",
    "that",
    "turned",
    "all",
    "day",
    "and",
    "the",
    "miller",
    "who",
    "lived",
    "there",
    "counted",
    "sacks",
    "of",
    "flour",
    "while",
    "rain",
    "fell",
    "on",
    "the",
    "fields",
    "and",
    "a",
    "cat",
    "slept",
    "between",
    "them",
    "because",
    "nobody",
    "had",
    "work",
    "for",
    "it",
    "before",
    "the",
    "winter",
    "came",
]
FIXED = 16


async def one(client: openai.AsyncOpenAI, model: str, draw: random.Random) -> str:
    """One request of the mix. Returns its kind; raises what the client raises for a wrong answer."""
    prompt = " ".join(draw.choices(WORDS, k=int(4 ** draw.uniform(0, 4.3))))
    tokens = draw.randint(1, 96)
    sampling: dict[str, Any] = {"max_tokens": tokens}
    sampling["temperature"] = draw.choice([0, 0, 0.7, 1.0])
    kind = draw.choices(["completion", "stream", "chat", "logprobs", "hang up", "refused"], [30, 30, 20, 12, 8, 2])[0]
    if kind == "completion":
        answer = await client.completions.create(model=model, prompt=prompt, **sampling)
        assert answer.usage is not None
        assert 0 < answer.usage.completion_tokens <= tokens
    elif kind == "chat":
        messages: Any = [{"role": "user", "content": prompt}]
        answer = await client.chat.completions.create(model=model, messages=messages, **sampling)
        assert answer.choices[0].finish_reason in ("stop", "length")
    elif kind == "logprobs":
        answer = await client.completions.create(model=model, prompt=prompt, logprobs=2, **sampling)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert all(value is not None and value <= 0 for value in logprobs.token_logprobs or [])
    elif kind == "refused":
        try:
            await client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=-1)
        except openai.BadRequestError:
            return kind
        raise AssertionError("a temperature below zero was taken")
    else:
        stream = await client.completions.create(model=model, prompt=prompt, stream=True, **sampling)
        seen = 0
        async for _ in stream:
            seen += 1
            if kind == "hang up" and seen > 2:
                await stream.close()
                break
        assert seen
    return kind


async def fixed_answers(client: openai.AsyncOpenAI, model: str) -> list[str]:
    """The fixed prompts one after the other, so that no batch of another size rounds another way."""
    draw = random.Random(1)
    answers = []
    for _ in range(FIXED):
        prompt = " ".join(draw.choices(WORDS, k=24))
        answer = await client.completions.create(
            model=model, prompt=prompt, max_tokens=32, temperature=0, extra_body={"ignore_eos": True}
        )
        answers.append(answer.choices[0].text)
    return answers


async def soak(server: VllmServer, minutes: float, concurrency: int) -> dict[str, Any]:
    client = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=600)
    before = await fixed_answers(client, server.model)
    kinds: Counter[str] = Counter()
    errors: list[str] = []
    held: list[list[float]] = []
    started = time.monotonic()

    async def worker(number: int) -> None:
        draw = random.Random(number + 100)
        while time.monotonic() - started < 60 * minutes:
            try:
                kinds[await one(client, server.model, draw)] += 1
            except (openai.OpenAIError, AssertionError) as error:
                errors.append(f"{type(error).__name__}: {error}")

    async def watch() -> None:
        while time.monotonic() - started < 60 * minutes:
            held.append([time.monotonic() - started, memory(server)])
            await asyncio.sleep(10)

    await asyncio.gather(watch(), *(worker(number) for number in range(concurrency)))
    seconds = time.monotonic() - started
    after = await fixed_answers(client, server.model)
    await client.close()
    fifth = max(1, len(held) // 5)
    early = statistics.median(value for _, value in held[fifth : 2 * fifth])
    late = statistics.median(value for _, value in held[-fifth:])
    return {
        "minutes": seconds / 60,
        "concurrency": concurrency,
        "requests": dict(kinds),
        "errors": errors,
        "same_answers": sum(a == b for a, b in zip(before, after, strict=True)),
        "fixed_prompts": FIXED,
        "memory_early_bytes": early,
        "memory_late_bytes": late,
        "memory_ratio": late / early,
        "memory": held,
        "passed": not errors and before == after and late <= 1.01 * early,
    }


def render(document: dict[str, Any]) -> str:
    requests = ", ".join(f"{count} {kind}" for kind, count in sorted(document["requests"].items()))
    return (
        f"# A soak of vLLM {document['vllm'][1]} ({document['vllm'][0]}) with {document['model']}, packed 2:4\n\n"
        f"{document['minutes']:.1f} minutes, {document['concurrency']} requests at once: {sum(document['requests'].values())} "
        f"answered as they should be ({requests}), {len(document['errors'])} errors. Memory of the server's processes: "
        f"{document['memory_early_bytes'] / 2**20:.0f} MiB in the second fifth, {document['memory_late_bytes'] / 2**20:.0f} MiB "
        f"in the last ({document['memory_ratio']:.4f}). {document['same_answers']} of {document['fixed_prompts']} greedy answers "
        f"the same before and after. {'Passed.' if document['passed'] else '**Failed.**'}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--name", default="vllm_soak", help="of the results files")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with VllmServer(str(arguments.model), max_model_len=1024, max_num_seqs=arguments.concurrency) as server:
        document = asyncio.run(soak(server, arguments.minutes, arguments.concurrency))
    document |= {"model": arguments.model.name, "vllm": installed(), "environment": environment()}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(document) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(render(document))
    print(render(document))
    if not document["passed"]:
        print("\n".join(document["errors"][:10]))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
