"""Watches the inputs and outputs of a block's linears during the calibration pass; layers that read one input share it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from compress.architecture import LinearModule, shape_of
from compress.blocks import BlockModel, stop_forward
from compress.layer_statistics import OUTPUT_NEEDS, PLACE_NEEDS
from compress.norms import NormOutputs
from compress.products import Products
from compress.stages import BLOCK_OUTPUT, Tap, Taps
from compress.statistics import ACCUMULATORS, InputStatistics
from compress.sums import SumOfSquares


class InputObserver:
    """Gathers the statistics of every linear of a block, once for all that read the same tensor.

    Which layers share an input is seen in the first batch, from the tensors themselves (q, k and v; gate and
    up), and must stay so. From the second batch on, the forward pass ends as soon as every linear has been
    called as often as in the first and every tap was seen: what comes after that is not needed. A linear whose module is
    never called, because the model multiplies by its weight itself, is watched in that product (`compress.products`).

    Args:
        linears: by full name.
        needs: names of statistics; those that are not of inputs, outputs or the place in the graph are ignored.
        tokens: how many tokens will come in all.
        block: the module that holds the linears.
        windows: in how many windows, or images, the tokens come.
        normalized: whether the block's input comes straight from a normalization (`compress.norms.ends_with_norm`); of
            interest only where the place in the graph is needed.
    """

    def __init__(
        self,
        linears: Mapping[str, LinearModule],
        needs: Iterable[str],
        tokens: int,
        block: nn.Module,
        windows: int = 1,
        normalized: bool = False,
    ) -> None:
        self.linears = linears
        self._block = block
        self._whole = False
        self.outputs: dict[str, SumOfSquares] = {}
        """Of the linears' outputs, where that is needed."""
        self.place: dict[str, dict[str, bool]] = {}
        """Facts about the place of a linear in the graph, where they are needed."""
        needs = frozenset(needs)
        self._needs = needs & ACCUMULATORS.keys()
        self._wants_outputs = bool(needs & OUTPUT_NEEDS)
        self._norms = NormOutputs(block, normalized) if needs & PLACE_NEEDS else None
        self._tokens = tokens
        self.windows = windows
        self._leader: dict[str, str] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._calls_of_first_batch: int | None = None
        self._calls = 0
        self._seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        self._called: set[str] = set()
        self._by_hand: set[str] = set()

    def statistics(self, name: str) -> InputStatistics | None:
        """The statistics of a linear's input, or None where it was never called (an expert that got no token)."""
        leader = self._leader.get(name)
        return None if leader is None else self._statistics[leader]

    def sharing(self, name: str) -> list[str]:
        """The linears that read the same input as this one, itself included."""
        return [other for other, leader in self._leader.items() if leader == self._leader.get(name)]

    def run(
        self,
        model: BlockModel,
        index: int,
        hidden: list[Tensor],
        taps: Iterable[Tap] = (),
        after: Callable[[int, Mapping[Tap, Tensor]], None] = lambda batch, tensors: None,
    ) -> None:
        """Passes all batches through a loaded block.

        Args:
            hidden: its inputs, [batch, length, hidden] each.
            taps: tensors of the pass that are wanted, too.
            after: called after each batch with its number and the tensors at the taps.
        """
        wanted = list(taps)
        self._whole = BLOCK_OUTPUT in wanted
        tapped = Taps(self._block, wanted, self._count_call)
        handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self.linears.items()
        ]
        if self._wants_outputs:
            handles += [module.register_forward_hook(self._output_hook(name)) for name, module in self.linears.items()]
        if self._norms is not None:
            handles += self._norms.watch()
        try:
            for batch, states in enumerate(hidden):
                self._calls = 0
                self._seen = {}
                self._called.clear()
                with self._products():
                    output = model.observe_block(index, batch, states)
                if output is not None:
                    tapped.tensors[BLOCK_OUTPUT] = output
                after(batch, tapped.tensors)
                tapped.tensors.clear()
                if self._calls_of_first_batch is None:
                    self._calls_of_first_batch = self._calls
                    if self._norms is not None:
                        self._norms.forget()
        finally:
            self._seen = {}
            tapped.remove()
            for handle in handles:
                handle.remove()

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        """Watches products outside of modules in the first batch, and later where the first batch had any."""
        if self._calls_of_first_batch is not None and not self._by_hand:
            return contextlib.nullcontext()
        return Products(self.linears, self._called, self._see_product)

    def _see_product(self, name: str, x: Tensor, y: Tensor) -> None:
        self._by_hand.add(name)
        self._see_input(name, x)
        if self._wants_outputs:
            self._see_output(name, y)

    def _hook(self, name: str) -> Any:
        def observe(module: LinearModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._called.add(name)
            self._see_input(name, args[0] if args else next(iter(kwargs.values())))

        return observe

    def _output_hook(self, name: str) -> Any:
        def observe(module: LinearModule, args: tuple[Any, ...], output: Tensor) -> None:
            self._see_output(name, output)

        return observe

    def _see_input(self, name: str, x: Tensor) -> None:
        """x [..., K]"""
        # The tensor is held until the batch is over, so its address belongs to no other.
        key = (x.data_ptr(), x.shape, x.stride(), x._version)
        leader, _ = self._seen.setdefault(key, (name, x))
        if self._calls_of_first_batch is None or name not in self._leader:
            self._leader.setdefault(name, leader)
            if self._norms is not None:
                self.place.setdefault(name, {"after_norm": self._norms.made(x)})
        if self._leader[name] == name:
            if name not in self._statistics:
                self._statistics[name] = InputStatistics(
                    self._needs,
                    features=shape_of(self.linears[name])[1],
                    device=x.device,
                    tokens=self._tokens,
                    windows=self.windows,
                )
            self._statistics[name].update(x)
        elif self._leader[name] != leader:
            raise AssertionError(
                f"{name} shared its input with {self._leader[name]} in the first batch and does not any more"
            )
        self._count_call()

    def _see_output(self, name: str, output: Tensor) -> None:
        """The output [..., N]"""
        y = output.detach().reshape(-1, output.shape[-1])  # [T, N]
        if name not in self.outputs:
            self.outputs[name] = SumOfSquares(y.shape[1], y.device, self._tokens)
        self.outputs[name].update(y)
        self._count_call()

    def _count_call(self) -> None:
        self._calls += 1
        if self._calls == self._calls_of_first_batch and not self._whole:
            stop_forward()
