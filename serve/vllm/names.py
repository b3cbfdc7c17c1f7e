"""The names of modules in the checkpoint and in vLLM, which renames those of some models. Imports nothing of vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WEIGHT = ".weight"


class Names:
    """How vLLM's names follow from the checkpoint's: vLLM's mappers, one after the other, as models apply them."""

    def __init__(self) -> None:
        self._mappers: list[Any] = []
        self._mapped: dict[str, str] = {}

    def rename(self, mapper: Any) -> None:
        """From now on names go through this ``WeightsMapper``, too."""
        self._mappers.append(mapper)
        self._mapped.clear()

    def is_called(self, module: str, pattern: str) -> bool:
        """Whether a module by vLLM's name is meant by a name of the checkpoint, or by ``re:`` and what that begins with."""
        if pattern.startswith("re:"):
            return any(re.match(pattern[3:], name) for name in self._originals(module))
        if pattern not in self._mapped:
            self._mapped[pattern] = _through(self._mappers, pattern)
        return self._mapped[pattern] == module

    def _originals(self, module: str) -> list[str]:
        """The names that become that one. A mapper goes one way only: what its rules could have been given is tried.

        Where none is found (rules of regular expressions are not undone), the name itself.
        """
        candidates = {module}
        for mapper in reversed(self._mappers):
            candidates |= {older for name in candidates for older in _undone(mapper, name)}
        return sorted(name for name in candidates if _through(self._mappers, name) == module) or [module]


def _through(mappers: list[Any], module: str) -> str:
    """Mappers are made for names of tensors, so a module goes as its weight; what they would drop stays as it is."""
    for mapper in mappers:
        mapped = mapper.apply_list([module + _WEIGHT])
        if mapped and mapped[0].endswith(_WEIGHT):
            module = mapped[0].removesuffix(_WEIGHT)
    return module


def _undone(mapper: Any, module: str) -> set[str]:
    """What the rules of a mapper may have made that name of: those of prefixes and suffixes are applied after those of parts."""
    name = module + _WEIGHT
    found = {name}
    for old, new in _rules(mapper, "suffix"):
        found |= {one.removesuffix(new) + old for one in found if one.endswith(new)}
    for old, new in _rules(mapper, "prefix"):
        found |= {old + one.removeprefix(new) for one in found if one.startswith(new)}
    for old, new in _rules(mapper, "substr"):
        found |= {one.replace(new, old, 1) for one in found if new and new in one}
    return {one.removesuffix(_WEIGHT) for one in found if one.endswith(_WEIGHT)}


def _rules(mapper: Any, kind: str) -> list[tuple[str, str]]:
    rules: Mapping[str, str | None] = getattr(mapper, f"orig_to_new_{kind}", {})
    return [(old, new) for old, new in rules.items() if new is not None]
