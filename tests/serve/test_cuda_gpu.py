"""What needs a GPU: the same checks that `benchmarks.gpu` begins with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import gpu_checks


@pytest.mark.gpu
@pytest.mark.parametrize("check", [*gpu_checks.CHECKS, *gpu_checks.WITHOUT_THEM], ids=lambda check: check.__name__)
def test_on_the_gpu(check: Callable[[], None]) -> None:
    check()
