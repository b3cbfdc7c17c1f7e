"""What needs a GPU: the same checks that `benchmarks.gpu` begins with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import gpu_checks, gpu_narrow

CHECKS = (*gpu_checks.CHECKS, gpu_narrow.of_bytes, *gpu_checks.WITHOUT_THEM)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_gpu(check: Callable[[], None]) -> None:
    check()
