"""In which order the linears of a decoder block can be pruned, and where their outputs go. No names of families here.

Two linears of which neither reads what the other makes can be pruned together: q, k and v; then o; then gate and up; then
down. Which of them are independent is asked of autograd: in a pass in which the outputs of some linears are marked, the
inputs that carry no mark depend on none of them.

Where the output of a linear is added to the residual stream as it is, the sum is a better thing to look at than the output
alone, because it carries what every layer before has lost. Sums can be seen where they go into a norm or out of the block, and
are recognised by experiment: the output is pushed by random numbers, and the sum moves by just these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.architecture import linears_of
from compress.blocks import BlockModel
from compress.norms import norms_of

_MOVED = 0.01
"""Of the push, that a sum in float32 may miss it by."""


@dataclass(frozen=True)
class Tap:
    """A tensor in the forward pass of a block: what goes into one of its modules, or comes out.

    ``module`` is the module's name in the block, empty for the block itself.
    """

    module: str
    side: Literal["input", "output"]


BLOCK_OUTPUT = Tap("", "output")


@dataclass(frozen=True)
class Stage:
    """Linears that are pruned together, by their names in the block, and for each where its error shows.

    That is a sum, or an output of its own, [..., N]; or the input [..., K] that it shares with other linears. A linear
    that is not in ``shows`` has no such tensor: it is called more than once in a pass, or not with every token (an expert).
    """

    layers: tuple[str, ...]
    shows: Mapping[str, Tap]


class Taps:
    """Hooks that keep the tensors at some taps of a block in one forward pass.

    Args:
        seen: called at each tap but the block's own output, which no hook sees.
    """

    def __init__(self, block: nn.Module, taps: Iterable[Tap], seen: Callable[[], None] = lambda: None) -> None:
        self.tensors: dict[Tap, Tensor] = {}
        self._seen = seen
        self._handles = []
        for tap in dict.fromkeys(taps):
            if tap == BLOCK_OUTPUT:
                continue
            module = block.get_submodule(tap.module)
            if tap.side == "input":
                self._handles.append(module.register_forward_pre_hook(self._on_input(tap), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._on_output(tap)))

    def _on_input(self, tap: Tap) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.tensors[tap] = _input_of(args, kwargs)
            self._seen()

        return keep

    def _on_output(self, tap: Tap) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.tensors[tap] = output
            self._seen()

        return keep

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def plan_stages(model: BlockModel, index: int, hidden: Tensor, wanted: Iterable[str]) -> list[Stage]:
    """The stages of a loaded block in the order in which they have to be pruned.

    Args:
        hidden: the block's inputs in the first batch, [batch, length, hidden].
        wanted: names, in the block, of the linears that will be pruned.
    """
    block = copy.deepcopy(model.blocks[index]).float()
    return _Planner(block, lambda: model.run_copy(index, 0, hidden, block, torch.float32), hidden, wanted).stages()


class _Planner:
    """Experiments on a float32 copy of a block."""

    def __init__(
        self, block: nn.Module, run: Callable[[], Tensor | None], hidden: Tensor, wanted: Iterable[str]
    ) -> None:
        wanted = frozenset(wanted)
        self._block = block
        self._run = run
        self._hidden = hidden
        self._linears = {name: module for name, module in linears_of(block, "").items() if name in wanted}

    def stages(self) -> list[Stage]:
        shows = self._where_it_shows()
        stages = []
        for level in self._levels():
            while level:
                # Of linears that go into one sum, only one can make up for what is missing there.
                taken: set[Tap] = set()
                layers, later = [], []
                for name in level:
                    tap = shows.get(name)
                    shared = tap is not None and tap.side == "input" and tap.module in self._linears
                    if tap in taken and not shared:
                        later.append(name)
                        continue
                    layers.append(name)
                    if tap is not None:
                        taken.add(tap)
                stages.append(Stage(tuple(layers), {name: shows[name] for name in layers if name in shows}))
                level = later
        return stages

    def _levels(self) -> list[list[str]]:
        """The linears by what they depend on: those of each level read what levels before it make, and nothing else."""
        left = dict(self._linears)
        levels = []
        while left:
            free = self._independent(left)
            level = [name for name in left if name in free] or list(left)  # (called twice: it depends on itself)
            levels.append(level)
            for name in level:
                del left[name]
        return levels

    def _independent(self, marked: Mapping[str, nn.Module]) -> set[str]:
        """Those of the linears whose inputs do not depend on the outputs of any of them; those that are never called, too."""
        dependent: set[str] = set()

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if _input_of(args, kwargs).requires_grad:
                    dependent.add(name)

            return hook

        def mark(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output.detach().requires_grad_()

        handles = [module.register_forward_pre_hook(look(name), with_kwargs=True) for name, module in marked.items()]
        handles += [module.register_forward_hook(mark) for module in marked.values()]
        try:
            with torch.enable_grad():
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        return marked.keys() - dependent

    @torch.no_grad()
    def _where_it_shows(self) -> dict[str, Tap]:
        """For each linear that sees every token once: a sum, an input that others read, too, or its own output."""
        norms = norms_of(self._block, self._run)
        sums = [Tap(name, "input") for name, module in self._block.named_modules() if module in norms]
        inputs = [Tap(name, "input") for name in self._linears]
        outputs = [Tap(name, "output") for name in self._linears]
        calls: dict[Tap, int] = {}
        tensors = self._pass([*sums, *inputs, *outputs], calls)
        sums = [tap for tap in tensors if tap in sums and calls[tap] == 1]  # in the order of the pass
        readers: dict[tuple[Any, ...], list[str]] = {}
        for tap in inputs:
            if tap in tensors:
                readers.setdefault(_identity(tensors[tap]), []).append(tap.module)
        shows = {}
        tokens = self._hidden.shape[:-1].numel()  # (some families have them all in one row between their linears)
        for name in self._linears:
            own, into = Tap(name, "output"), Tap(name, "input")
            if calls.get(own) != 1 or {tensors[tap].shape[:-1].numel() for tap in (own, into)} != {tokens}:
                continue
            sharing = readers[_identity(tensors[into])]
            shows[name] = self._sum_of(name, tensors, sums) or (Tap(sharing[0], "input") if len(sharing) > 1 else own)
        return shows

    def _sum_of(self, name: str, before: Mapping[Tap, Tensor], sums: list[Tap]) -> Tap | None:
        """The last sum of the pass into which the output of a linear goes as it is."""
        output = before[Tap(name, "output")]
        like = (output.numel(), output.shape[-1])
        fitting = [tap for tap in [*sums, BLOCK_OUTPUT] if (before[tap].numel(), before[tap].shape[-1]) == like]
        if not fitting:
            return None
        generator = torch.Generator().manual_seed(0)
        push = torch.randn(output.shape, generator=generator).to(output)
        push *= output.square().mean().sqrt().clamp_min(torch.finfo(output.dtype).tiny)

        def shove(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + push

        handle = self._block.get_submodule(name).register_forward_hook(shove)
        try:
            after = self._pass(fitting)
        finally:
            handle.remove()
        size = float(push.norm())
        exact = [
            tap
            for tap in fitting
            if float((after[tap] - before[tap] - push.view_as(before[tap])).norm()) <= _MOVED * size
        ]
        return exact[-1] if exact else None

    def _pass(self, wanted: Iterable[Tap], calls: dict[Tap, int] | None = None) -> dict[Tap, Tensor]:
        """The tensors at the taps, in the order of the pass, and the block's output."""
        taps = Taps(self._block, wanted)
        counts: list[Any] = []
        if calls is not None:
            # (a second call overwrites what the first has left)
            for tap in wanted:
                module = self._block.get_submodule(tap.module)
                calls[tap] = 0

                def count(module: nn.Module, args: Any, output: Any, tap: Tap = tap) -> None:
                    calls[tap] += 1

                counts.append(module.register_forward_hook(count))
        try:
            output = self._run()
            assert output is not None, "no hook ends this pass"
            return {**taps.tensors, BLOCK_OUTPUT: output}
        finally:
            taps.remove()
            for handle in counts:
                handle.remove()


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _identity(x: Tensor) -> tuple[Any, ...]:
    """The same for the same tensor while it is held."""
    return x.data_ptr(), x.shape, x.stride(), x._version
