"""Which backend a server multiplies how many of its 2:4 layers on, and why: as it says itself."""

from __future__ import annotations

import re
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from serve.measure.memory import metrics_of

METRIC = "halve:linear_layers"
"""In the /metrics of halve's own endpoint, with the labels ``phase``, ``backend`` and ``reason``; `serve.api_metrics` writes it."""

# vLLM knows no such metric; halve's plugin says it in the log (`serve.vllm.quantization.summary`), each worker for itself.
_IN_LOG = re.compile(r"halve: (\d+) linear layers (?:run 2:4 on (\w+): (.*\S)|are dense: (.*\S))")


def backends_of(base_url: str, log: str = "") -> list[dict[str, Any]]:
    """``phase``, ``backend``, ``reason`` and number of ``layers`` of each kind; nothing where a server does not say it.

    ``log``: what a server that was started here has said.
    """
    found = [
        {"phase": "all", "backend": backend or "dense", "reason": reason or why_dense, "layers": int(count)}
        for count, backend, reason, why_dense in dict.fromkeys(_IN_LOG.findall(log))
    ]
    try:
        for family in text_string_to_metric_families(metrics_of(base_url)):
            for sample in family.samples:
                if sample.name == METRIC:
                    told = {name: sample.labels.get(name, "") for name in ("phase", "backend", "reason")}
                    found.append({**told, "layers": int(sample.value)})
    except (ValueError, KeyError, IndexError):  # it is another program's text, in a form of its own
        return found
    return found
