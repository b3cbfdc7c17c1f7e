"""Property tests draw the same examples in every run: a failure on one machine is a failure on all of them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("halve", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("halve")
