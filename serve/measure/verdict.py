"""What an advice comes to: is a layer worth pruning, is the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from serve.measure.kernel_entries import WINS
from serve.measure.shallow import Load
from serve.measure.shapes import Layers


class Timed(NamedTuple):
    """A layer: how many times as fast it is packed, and its seconds."""

    ratio: float
    dense: float
    sparse: float


def of_layer(layers: Layers, load: Load, timed: Mapping[int, Timed]) -> dict[str, Any]:
    """One place in the blocks: how much faster at each number of rows, where that begins and ends, and whether it is worth
    it, that is, whether it is faster over a whole request."""
    decode, prefill = timed.get(load.batch), timed.get(load.batch * load.prompt)
    found: dict[str, Any] = {
        "name": layers.name,
        "n": layers.shape.n,
        "k": layers.shape.k,
        "count": layers.count,
        "ratios": {str(rows): timed[rows].ratio for rows in sorted(timed)},
        "wins_at_rows": [rows for rows in sorted(timed) if timed[rows].ratio >= WINS],
        "loses_at_rows": [rows for rows in sorted(timed) if timed[rows].ratio < WINS],
    }
    if layers.why_dense is not None:
        return {**found, "worth": False, "reason": layers.why_dense}
    if decode is None:
        return {**found, "worth": None, "reason": f"not measured at {load.batch} rows"}
    parts = [(decode, load.output - 1), (prefill, 1)] if prefill else [(decode, 1)]
    gain = sum(part.dense * times for part, times in parts) / sum(part.sparse * times for part, times in parts)
    over = "a request" if prefill else "decoding (the prompt was not measured)"
    return {**found, "worth": gain >= WINS, "reason": f"{gain:.2f} times as fast over {over}"}


def of_model(document: Mapping[str, Any], refusal: str | None) -> dict[str, Any]:
    """Whether to prune, in a headline, and the reasons."""
    memory, speedup = document["memory"], document["speedup"]
    fits, name = memory["fits"], document["device"]["name"]
    reasons: list[str] = []
    if refusal is not None:
        if fits["sparse"] and not fits["dense"] and memory["freed_bytes"]:
            reasons.append(
                "packed it would fit, and dense it does not; but each layer is expanded whenever it multiplies"
            )
        return {"prune": False, "headline": f"don't prune: {refusal}", "reasons": reasons}
    if not fits["sparse"]:
        return {
            "prune": False,
            "headline": f"don't prune for this device: {name} holds neither the dense model nor 2:4",
            "reasons": reasons,
        }
    assert speedup is not None
    request = speedup["request"]["median"]
    changes = [
        f"{label} {_change(speedup[key]['median'])}"
        for label, key in (("time per output token", "tpot"), ("time to first token", "ttft"))
    ]
    reasons.append(", ".join(changes))
    if not fits["dense"]:
        return {"prune": True, "headline": f"prune: does not fit dense, fits 2:4 (on {name})", "reasons": reasons}
    if request < WINS:
        saved = memory["freed_bytes"] / 1e9
        reasons.append(f"2:4 would still free {saved:.2f} GB; the accuracy that it costs has to be worth that")
        headline = (
            f"don't prune for speed: a request would be {request:.2f} times as fast, and less than {WINS} is noise"
        )
        return {"prune": False, "headline": headline, "reasons": reasons}
    not_worth = sorted({layer["name"] for layer in document["layers"] if layer["worth"] is False})
    if not_worth:
        reasons.append(f"leave dense, they gain nothing: {', '.join(not_worth)}")
    return {"prune": True, "headline": f"prune: a request would be {request:.2f} times as fast", "reasons": reasons}


def _change(faster: float) -> str:
    return f"{faster:.2f} times as fast"
