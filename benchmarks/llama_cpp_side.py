"""llama.cpp's side of a comparison, in its own virtual environment: decode and prefill of a GGUF file at batch 1.

    python -m venv runs/llama-cpp-env
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DLLAVA_BUILD=OFF" \
        runs/llama-cpp-env/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
        runs/llama-cpp-env/bin/python -I benchmarks/llama_cpp_side.py bench MODEL.gguf --threads 2 --rounds 3

Nothing of halve is imported here. ``--no-binary`` builds from source for this very processor (a wheel for every
processor cannot use its instructions); "system_info" says with which. The build takes 5 to 15 minutes of one core.

GLIBC_TUNABLES gives llama.cpp huge pages where the kernel leaves that to the program ("madvise"), which it does not ask
for itself: without them the weights that it lays out anew in memory, which are those of Q4_0, are read more slowly. It
is not the default, but leaving it out would flatter the other side; "environment" in the result says whether it was set.

Three commands:

- ``bench MODEL``: rounds of a prompt of ``--prompt`` random tokens and ``--decode`` greedy tokens after it, one at a
  time. With ``--rounds N``, N rounds after a short one to warm up, then one JSON line. With ``--serve``, a JSON line
  when the model is loaded and warm, then one for each line "go" on standard input, so that a parent can take turns
  between sides; the end of the input ends it, and between the rounds it does nothing.
- ``quantize MODEL OUT --type Q4_0``: llama.cpp's own quantizer with its defaults, which is what llama-quantize runs.
- ``logits MODEL OUT.npy --tokens 5,7,9``: the logits after every token, float32 [tokens, vocabulary].

What a round times is `llama_decode`, the wait for the logits and the argmax over them (numpy's, in place). What of
that is not llama.cpp is reported beside it: "argmax_seconds" (median a token) and "binding_seconds" (the calls through
ctypes). There is no tokenizer and no sampler. All other settings are llama.cpp's defaults, as in llama-bench.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as ll  # pyright: ignore[reportMissingImports]
import numpy as np

TYPES = {"Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0, "BF16": ll.LLAMA_FTYPE_MOSTLY_BF16}
LOAD_MODES = {"auto": ll.LLAMA_LOAD_MODE_AUTO, "mmap": ll.LLAMA_LOAD_MODE_MMAP, "none": ll.LLAMA_LOAD_MODE_NONE}
LOG: list[str] = []


@ll.llama_log_callback
def _keep_log(_level: int, text: bytes, _data: Any) -> None:
    LOG.append(text.decode(errors="replace"))


class Model:
    """A loaded GGUF file with a context of ``tokens`` positions."""

    def __init__(
        self, path: Path, *, threads: int, tokens: int, load_mode: str = "auto", all_logits: bool = False
    ) -> None:
        settings = ll.llama_model_default_params()
        settings.load_mode = LOAD_MODES[load_mode]
        self.model = ll.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise SystemExit("".join(LOG[-20:]) + f"llama.cpp cannot load {path}")
        options = ll.llama_context_default_params()
        options.n_ctx = tokens
        options.n_threads = options.n_threads_batch = threads
        if all_logits:
            options.n_batch = options.n_ubatch = options.n_outputs_max = options.n_outputs_max_per_seq = tokens
        self.context = ll.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit("".join(LOG[-20:]) + "llama.cpp cannot make a context")
        self.memory = ll.llama_get_memory(self.context)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        ll.llama_memory_clear(self.memory, False)

    def decode(self, tokens: Any, count: int) -> Any:
        """Runs ``count`` tokens (a ctypes array) and returns where the logits of the last one are."""
        if status := ll.llama_decode(self.context, ll.llama_batch_get_one(tokens, count)):
            raise SystemExit("".join(LOG[-20:]) + f"llama_decode returned {status}")
        return ll.llama_get_logits_ith(self.context, -1)  # waits until they are there

    def argmax(self, logits: Any) -> int:
        address = ctypes.addressof(logits.contents)
        return int(np.frombuffer((ctypes.c_float * self.vocabulary).from_address(address), np.float32).argmax())

    def round(self, prompt: list[int], decode: int) -> dict[str, Any]:
        """Seconds of the prompt and of each greedy token after it; and the tokens."""
        clock = time.perf_counter
        self.forget()
        first, one = (ll.llama_token * len(prompt))(*prompt), (ll.llama_token * 1)()
        began = clock()
        token = self.argmax(self.decode(first, len(prompt)))
        prefill = clock() - began
        seconds, argmax, tokens = [], [], [token]
        for _ in range(decode):
            began = clock()
            one[0] = token
            logits = self.decode(one, 1)
            inside = clock()
            token = self.argmax(logits)
            ended = clock()
            seconds.append(ended - began)
            argmax.append(ended - inside)
            tokens.append(token)
        return {
            "prefill_seconds": prefill,
            "decode_seconds": seconds,
            "argmax_seconds": statistics.median(argmax) if argmax else 0.0,
            "tokens": tokens,
        }


def call_seconds(model: Model) -> float:
    """Seconds of one pass through the bindings that llama.cpp refuses at once: what ctypes costs a token."""
    nothing = (ll.llama_token * 1)()
    samples = []
    for _ in range(200):
        began = time.perf_counter()
        ll.llama_decode(model.context, ll.llama_batch_get_one(nothing, 0))
        ll.llama_get_logits_ith(model.context, -1)
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def about(model: Model, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    buffers = [line.strip() for line in "".join(LOG).splitlines() if "buffer size" in line or "Flash Attention" in line]
    return {
        "ready": True,
        "model": path.name,
        "file_bytes": path.stat().st_size,
        "weight_bytes": ll.llama_model_size(model.model),
        "parameters": ll.llama_model_n_params(model.model),
        "threads": arguments.threads,
        "prompt": arguments.prompt,
        "decode": arguments.decode,
        "seed": arguments.seed,
        "load_mode": arguments.load_mode,
        "binding_seconds": call_seconds(model),
        "versions": {
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "llama.cpp": ll.llama_version().decode(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("GLIBC_TUNABLES", "OMP_", "GOMP_"))
        },
        "system_info": ll.llama_print_system_info().decode().strip(),
        "log": buffers,
    }


def bench(arguments: argparse.Namespace) -> None:
    drawn = random.Random(arguments.seed)
    model = Model(
        arguments.model,
        threads=arguments.threads,
        tokens=arguments.prompt + arguments.decode,
        load_mode=arguments.load_mode,
    )
    prompt = arguments.tokens or [drawn.randrange(model.vocabulary) for _ in range(arguments.prompt)]
    model.round(prompt, min(arguments.decode, 4))
    facts = about(model, arguments.model, arguments)
    if not arguments.serve:
        print(json.dumps({**facts, "rounds": [model.round(prompt, arguments.decode) for _ in range(arguments.rounds)]}))
        return
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            raise SystemExit(f"only 'go' is understood, not {line.strip()!r}")
        print(json.dumps(model.round(prompt, arguments.decode)), flush=True)


def quantize(arguments: argparse.Namespace) -> None:
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    settings = ll.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = TYPES[arguments.type], arguments.threads
    if ll.llama_model_quantize(str(arguments.model).encode(), str(partial).encode(), ctypes.byref(settings)):
        raise SystemExit("".join(LOG[-20:]) + f"llama.cpp cannot quantize {arguments.model}")
    partial.rename(arguments.out)


def logits(arguments: argparse.Namespace) -> None:
    """One forward over all tokens, as a prompt is; the logits are copied as llama.cpp has them."""
    count = len(arguments.tokens)
    model = Model(arguments.model, threads=arguments.threads, tokens=count, all_logits=True)
    batch = ll.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for place, token in enumerate(arguments.tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if status := ll.llama_decode(model.context, batch):
        raise SystemExit("".join(LOG[-20:]) + f"llama_decode returned {status}")
    found = np.empty((count, model.vocabulary), np.float32)
    for place in range(count):
        row = ll.llama_get_logits_ith(model.context, place)
        found[place] = np.ctypeslib.as_array(row, (model.vocabulary,))
    np.save(arguments.out, found)


def token_list(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (bench, quantize, logits):
        one = commands.add_parser(command.__name__)
        one.set_defaults(run=command)
        one.add_argument("model", type=Path)
        one.add_argument("--threads", type=int, default=1)
        if command is bench:
            one.add_argument("--prompt", type=int, default=128, help="tokens")
            one.add_argument("--decode", type=int, default=128, help="tokens")
            one.add_argument(
                "--seed", type=int, default=0, help="of the prompt: randrange(vocabulary) of random.Random"
            )
            one.add_argument("--tokens", type=token_list, help="the prompt itself: ids and commas")
            one.add_argument("--load-mode", choices=LOAD_MODES, default="auto")
            one.add_argument("--rounds", type=int, default=3)
            one.add_argument("--serve", action="store_true", help="a round for every line 'go' on standard input")
            continue
        one.add_argument("out", type=Path)
        if command is quantize:
            one.add_argument("--type", choices=TYPES, required=True)
        else:
            one.add_argument("--tokens", type=token_list, required=True)
    arguments = parser.parse_args()
    if getattr(arguments, "tokens", None):
        arguments.prompt = len(arguments.tokens)
    ll.llama_log_set(_keep_log, ctypes.c_void_p(0))
    ll.llama_backend_init()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
