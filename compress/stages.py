"""In which order the linears of a decoder block can be pruned, and where their outputs go. No names of families here.

Two linears of which neither reads what the other makes can be pruned together: q, k and v; then o; then gate and up; then
down. Which of them are independent is asked of autograd: in a pass in which the outputs of some linears are marked, the
inputs that carry no mark depend on none of them. (Which tokens a router sends where carries none.)

Where the output of a linear is added to the residual stream as it is, the sum is a better thing to look at than the output
alone, because it carries what every layer before has lost. Sums can be seen where they go into a norm or out of the block, and
are recognised by experiment: the output is pushed by random numbers, and the sum moves by just these. Where a family
multiplies the output before it is added, there is no such sum.
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

_MOVED = 1e-3
"""Of the push, that a sum in float32 may miss it by."""
_PUSH = 0.01
"""Least push, as a share of the largest sum: far above float32's rounding of it, however small the output is."""


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

    That is a sum [..., N]; or the linear's input [..., K], under the name of the first linear that reads it; or its output
    [..., N], where that is narrower. A linear that is not in ``shows`` has no such tensor: it is called more than once in a
    pass, or never, or not with every token (an expert).
    """

    layers: tuple[str, ...]
    shows: Mapping[str, Tap]


class Taps:
    """Hooks that keep the tensors at some taps of a block in one forward pass.

    Args:
        seen: called at each tap but the block's own output, which no hook sees.
        copies: of the tensors are kept, as models and callers may write into them later; else the tensors themselves.
    """

    def __init__(
        self, block: nn.Module, taps: Iterable[Tap], seen: Callable[[], None] = lambda: None, *, copies: bool = True
    ) -> None:
        self.tensors: dict[Tap, Tensor] = {}
        self._seen = seen
        self._copies = copies
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
            self._keep(tap, input_of(args, kwargs))

        return keep

    def _on_output(self, tap: Tap) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._keep(tap, output)

        return keep

    def _keep(self, tap: Tap, x: Tensor) -> None:
        self.tensors[tap] = x.clone() if self._copies else x
        self._seen()

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
        calls: dict[Tap, int] = {}
        tensors = self._pass(
            [tap for name in self._linears for tap in (_into(name), _out_of(name))], calls, copies=False
        )
        order = [tap.module for tap in tensors if tap in calls and tap.side == "input"]
        shows = self._where_it_shows(tensors, calls)
        stages = []
        for level in self._levels(order):
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

    def _levels(self, order: list[str]) -> list[list[str]]:
        """The linears by what they depend on: those of each level read what levels before it make, and nothing else.

        Args:
            order: of the calls. Linears that are not in it, because the model multiplies by their weights itself, come last.
        """
        left = dict.fromkeys(order)
        levels = []
        while left:
            try:
                free = self._independent(left)
            except RuntimeError:  # the block writes into a tensor in a way that autograd refuses
                free = set()
            # (one that is called twice depends on itself)
            level = [name for name in self._linears if name in free] or list(left)[:1]
            levels.append(level)
            for name in level:
                del left[name]
        others = [name for name in self._linears if name not in order]
        return [*levels, others] if others else levels

    def _independent(self, marked: Iterable[str]) -> set[str]:
        """Those of the linears whose inputs do not depend on the outputs of any of them."""
        marked = set(marked)
        dependent: set[str] = set()

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if input_of(args, kwargs).requires_grad:
                    dependent.add(name)

            return hook

        def mark(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output.detach().requires_grad_().clone()  # (into a leaf itself, nothing may be written)

        modules = {name: self._linears[name] for name in marked}
        handles = [module.register_forward_pre_hook(look(name), with_kwargs=True) for name, module in modules.items()]
        handles += [module.register_forward_hook(mark) for module in modules.values()]
        try:
            with torch.enable_grad():
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        return marked - dependent

    @torch.no_grad()
    def _where_it_shows(self, tensors: Mapping[Tap, Tensor], calls: Mapping[Tap, int]) -> dict[str, Tap]:
        """For each linear that sees every token once: a sum, or its input, or its output.

        Args:
            tensors: what goes into the linears and comes out, the tensors themselves.
            calls: how often.
        """
        norms = norms_of(self._block, self._run)
        often: dict[Tap, int] = {}
        found = self._pass(
            [Tap(name, "input") for name, module in self._block.named_modules() if module in norms], often
        )
        sums = {tap: tensor for tap, tensor in found.items() if often.get(tap, 1) == 1}  # in the order of the pass
        readers: dict[tuple[Any, ...], list[str]] = {}
        for name in self._linears:
            if _into(name) in tensors:
                readers.setdefault(_identity(tensors[_into(name)]), []).append(name)
        shows = {}
        tokens = self._hidden.shape[:-1].numel()  # (some families have them all in one row between their linears)
        for name in self._linears:
            if calls[_into(name)] != 1:
                continue
            x, y = tensors[_into(name)], tensors[_out_of(name)]
            if {x.shape[:-1].numel(), y.shape[:-1].numel()} != {tokens}:
                continue
            first, *others = readers[_identity(x)]
            at_input = others or x.shape[-1] <= y.shape[-1]
            shows[name] = self._sum_of(name, y, sums) or (_into(first) if at_input else _out_of(name))
        return shows

    def _sum_of(self, name: str, output: Tensor, before: Mapping[Tap, Tensor]) -> Tap | None:
        """The last sum of the pass into which the output of a linear goes as it is.

        Args:
            before: the sums, and the block's output, in a pass without a push.
        """
        like = (output.numel(), output.shape[-1])
        fitting = {tap: x for tap, x in before.items() if (x.numel(), x.shape[-1]) == like}
        size = max([_size(output), *(_PUSH * _size(x) for x in fitting.values())])
        if not fitting or size == 0:
            return None
        push = size * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)

        def shove(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + push

        handle = self._block.get_submodule(name).register_forward_hook(shove)
        try:
            after = self._pass(fitting)
        finally:
            handle.remove()
        allowed = _MOVED * float(push.norm())
        exact = [tap for tap, x in fitting.items() if float((after[tap] - x - push.view_as(x)).norm()) <= allowed]
        return exact[-1] if exact else None

    def _pass(
        self, wanted: Iterable[Tap], calls: dict[Tap, int] | None = None, *, copies: bool = True
    ) -> dict[Tap, Tensor]:
        """The tensors at the taps, in the order of the pass, and the block's output; ``calls`` gets how often each was
        passed."""
        wanted = list(wanted)
        taps = Taps(self._block, wanted, copies=copies)
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


def _into(name: str) -> Tap:
    return Tap(name, "input")


def _out_of(name: str) -> Tap:
    return Tap(name, "output")


def _size(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _identity(x: Tensor) -> tuple[Any, ...]:
    """The same for the same tensor while it is held."""
    return x.data_ptr(), x.shape, x.stride(), x._version
