"""The parts of one layer of vLLM: modules of the checkpoint that are fused (q, k, v; gate, up) and split (tensor parallel).

Imports nothing of vLLM.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress.errors import CorruptCheckpointError

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What fused layers are made of, by the names that most models have."""
_QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Shard:
    """A module of the checkpoint and the rows of the fused weight that are its."""

    module: str
    rows: slice


def modules_of(prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules of the checkpoint behind vLLM's layer ``prefix``; ``fused``: fused name -> names of its parts."""
    parent, dot, name = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in fused.get(name, [name])]


def shards_of(modules: Sequence[str], sizes: Sequence[int]) -> list[Shard]:
    """One a module, or a single one where the checkpoint stores them fused. ``sizes``: rows of each part on this rank."""
    if len(modules) != len(sizes):
        return [Shard(modules[0] if len(modules) == 1 else ", ".join(modules), slice(0, sum(sizes)))]
    shards, start = [], 0
    for module, size in zip(modules, sizes, strict=True):
        shards.append(Shard(module, slice(start, start + size)))
        start += size
    return shards


@dataclass
class Loads:
    """Which parts of which tensors of a layer were read, so that what was not has a name."""

    modules: Sequence[str]
    parts: int
    read: dict[str, set[Any]] = field(default_factory=dict)

    def recording(
        self, tensor: str, loader: Callable[..., Any], check: Callable[[Tensor], None]
    ) -> Callable[..., None]:
        """vLLM's loader of a parameter, with a check of what comes and a record of it.

        vLLM binds arguments to the loader by name when it reads weights anew. The layer, whose method the loader is, is
        not kept alive.
        """
        method = weakref.WeakMethod(loader) if hasattr(loader, "__self__") else lambda: loader

        def load(param: Any, loaded_weight: Tensor, *shard: Any) -> None:
            check(loaded_weight)
            original = method()
            assert original is not None, "the layer is there as long as its parameters"
            try:
                original(param, loaded_weight, *shard)
            except (AssertionError, RuntimeError) as error:
                raise CorruptCheckpointError(
                    f"{self._name(shard)}.{tensor} {list(loaded_weight.shape)} does not fit into {list(param.shape)} of this "
                    f"rank ({' '.join(str(error).split()) or type(error).__name__}); config.json and the weights do not "
                    "belong together"
                ) from None
            self.read.setdefault(tensor, set()).update(part_numbers(shard))

        return load

    def require(self, expected: Mapping[str, Collection[int]]) -> None:
        """Raises CorruptCheckpointError, naming the first that is missing; forgets what was read.

        Where nothing was recorded, another loader than that of checkpoints filled the layer.

        Args:
            expected: tensor -> the numbers of the parts that have one.
        """
        read, self.read = self.read, {}
        if not read:
            return
        for tensor, parts in expected.items():
            there = read.get(tensor, set())
            if None in there or not there <= set(range(self.parts)):
                continue  # read at once, or in parts that only the model knows
            for part in sorted(parts):
                if part not in there:
                    raise CorruptCheckpointError(
                        f"the checkpoint has no tensor {self._name((part,))}.{tensor}; it is damaged, get it again"
                    )

    def _name(self, shard: tuple[Any, ...]) -> str:
        number = next(iter(part_numbers(shard)))
        if isinstance(number, int) and len(self.modules) == self.parts > number:
            return self.modules[number]
        return self.modules[0] if len(self.modules) == 1 else ", ".join(self.modules)


def part_numbers(shard: tuple[Any, ...]) -> set[Any]:
    """The parts that vLLM's shard id stands for: a number, a letter of q, k, v, several numbers, or none for all."""
    identity = shard[0] if shard else None
    if isinstance(identity, tuple):
        return set(identity)
    return {_QKV.index(identity) if identity in _QKV else identity}
