"""What is measured beside the kernels that a device gets, as far as a machine without a GPU can see it."""

from __future__ import annotations

from benchmarks import gpu_table, gpu_variants
from serve.kernels.cuda import plan

HOPPER = (9, 0)


def test_alternatives_fit_and_are_others() -> None:
    usual = plan.forms(HOPPER)
    for form in gpu_variants.ALTERNATIVES:
        assert form not in usual
        assert form.resident * (form.shared_bytes / 1024 + 1) <= plan.shared_kib(HOPPER)
        assert form.threads <= 256
        # What the source asks for: every lane of a group copies as much of x, and sums fit in the place of the stages.
        assert form.tiles * 64 % (32 * form.panels) == 0
        assert form.tiles * 8 * (form.panels * 64 + 4) * 4 <= form.stages * plan.stage_bytes(form.tiles, form.panels)
    assert len({form.name for form in gpu_variants.ALTERNATIVES}) == len(gpu_variants.ALTERNATIVES)
    assert {form.tiles for form in gpu_variants.ALTERNATIVES} == {1, 2, 4, 8}


def test_the_table_ranks_them() -> None:
    rows = [
        {"clusters": {"a": {1: 132}}, "usual": ["a"]},
        {"n": 64, "k": 128, "rows": 1, "chosen": "a in 1", "microseconds": {"a in 1": 3.0, "b in 2": 2.0}, "wrong": {}},
        {"n": 64, "k": 128, "rows": 8, "chosen": "a in 1", "microseconds": {"b in 2": 2.0}, "wrong": {"a in 1": "3 outputs"}},
        {"n": 64, "k": 128, "rows": 9, "chosen": "a in 1", "microseconds": {}, "wrong": {"b in 2": "why"}},
    ]  # fmt: skip
    text = "\n".join(gpu_table.variants(rows))
    assert "| 64 x 128 | 1 | a in 1 | 3.00 | b in 2 | 2.00 | a in 1 3.00 |" in text
    assert "| 64 x 128 | 8 | a in 1 |  | b in 2 | 2.00 |  |" in text
    assert "| 64 x 128 | 9 | a in 1 | | none is right | | |" in text
    assert "- WRONG a in 1: 3 outputs" in text
