"""Property tests draw the same examples in every run: a failure on one machine is a failure on all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("halve", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("halve")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many tiny matrices: on a busy machine threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _bits_of_the_dense_model(plain_backend: None) -> None:
    """What compress writes is compared with the dense model with zeros to the bit, which the plain backend keeps."""
