"""The repeated blocks of any Hugging Face causal language model or image classifier, held in memory one at a time.

No names of families here. The blocks are found as the repeated part of the model that holds most linear
weights; a block's linears are its modules that multiply; what a block is called with (position embeddings,
masks, cache) is recorded as the model itself passes it, whatever it is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from compress.architecture import (
    LinearModule,
    find_blocks,
    join_names,
    linears_of,
    load_config,
    renamed,
    renamings_of,
    skeleton,
    switch_biases_on,
)
from compress.attention import TORCH, set_attention
from compress.errors import SourceError, one_line
from compress.sources import Source
from compress.wide import widen

_CARRIERS = (MutableMapping, MutableSequence, MutableSet, Cache)
"""Among what a block is called with: what it may write into, for a later block to read."""

_COMPARED = 8
"""How many of the latest tensors of a shape a new one is compared with before it is kept as a new one."""


@dataclass
class _Call:
    """What one block was called with for one batch; the hidden states are taken out."""

    leaves: list[Any]
    spec: Any
    hidden_at: int
    """Which of the leaves are the hidden states."""


class _Stop(Exception):
    """Ends a forward pass once everything that was wanted has been seen."""


class BlockModel:
    """A causal language model or an image classifier whose blocks are loaded, run and dropped one by one.

    Args:
        source: the dense checkpoint.
        dtype: of weights and activations.
        device: where blocks are run.
        add_bias: give linears a bias of zeros where the configuration has a switch for it.
        attention: a name in transformers' registry of attentions, taken where the model would take torch's own.

    Raises:
        SourceError: the model cannot be built, or lacks parameters, or a switch for biases that were asked for.
        UsageError: no attention has that name.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        *,
        add_bias: bool = False,
        attention: str = TORCH,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.config = load_config(source.directory)
        self.model = skeleton(self.config, dtype)
        self.bias_switches: list[str] = []
        """Fields of the configuration that were turned on to give linears a bias."""
        self.added: set[str] = set()
        """Parameters that the checkpoint does not have: biases of zeros."""
        if add_bias:
            self.config, self.bias_switches, added = switch_biases_on(self.config, self.model)
            bare = [name for name, module in linears_of(find_blocks(self.model)[1], "").items() if module.bias is None]
            if bare and not self.bias_switches:
                raise SourceError(
                    f"--add-bias: config.json of {type(self.model).__name__} has no switch that gives the linears "
                    f"of the blocks a bias ({len(bare)} have none, the first is {bare[0]}); leave the flag out"
                )
            self.added = set(added)
            self.model = skeleton(self.config, dtype)
        self.attention = attention
        set_attention(self.model, attention)
        widen(self.model, dtype, device)
        self.block_list_name, blocks = find_blocks(self.model)
        self.blocks: list[nn.Module] = list(blocks)
        self._keys = self._match_keys()
        self._require_all_parameters()
        self._require_own_linears()
        self.carried = ""
        """What the blocks of a forward pass hand on to each other besides the hidden states, by the names of its classes; known
        once calls were recorded. Empty where there is nothing, as in most families."""
        self._calls: list[list[_Call]] = [[] for _ in self.blocks]
        self._returns_tuple = False
        self._rest_of_tuple: tuple[Any, ...] = ()
        self._shared: dict[tuple[Any, ...], list[Tensor]] = {}

    def block_name(self, index: int) -> str:
        return f"{self.block_list_name}.{index}"

    def linears(self, index: int) -> dict[str, LinearModule]:
        """The linears of a block by their full names."""
        return linears_of(self.blocks[index], self.block_name(index))

    def parameters(self, index: int) -> dict[str, nn.Parameter]:
        """The parameters of a block by their full names."""
        prefix = self.block_name(index)
        return {join_names(prefix, name): parameter for name, parameter in self.blocks[index].named_parameters()}

    def key_of(self, parameter: str) -> str:
        """The checkpoint's name of a parameter of the model, or for one that was added, the name it gets there."""
        if parameter in self.added:
            layer, _, attribute = parameter.rpartition(".")
            return self._keys[f"{layer}.weight"].removesuffix("weight") + attribute
        return self._keys[parameter]

    def load_block(self, index: int) -> nn.Module:
        """Reads the weights of a block from disk."""
        block = self.blocks[index]
        self._materialize({join_names(self.block_name(index), name): module for name, module in block.named_modules()})
        return block

    def drop_block(self, index: int) -> None:
        """Gives the memory of a block back."""
        self.blocks[index].to("meta")

    def record_calls(
        self, batches: Iterable[Mapping[str, Any]], keep: Callable[[Tensor], None] | None = None
    ) -> list[Tensor]:
        """Runs what comes before the blocks, and records what every block is called with.

        The blocks themselves are not run, but for the first one, once, to see what a block returns.

        Args:
            batches: what the model is called with, one forward pass after the other.
            keep: called with the inputs of the first block, one tensor [batch, length, hidden] a batch; nothing else holds them.

        Returns:
            These inputs, if ``keep`` was left out.

        Raises:
            SourceError: the model cannot read the batches.
        """
        surroundings = self._surroundings()
        self._materialize(surroundings)
        self._calls = [[] for _ in self.blocks]
        hidden: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            block.forward = self._recorder(index, keep or hidden.append)
        self.load_block(0)
        try:
            for inputs in batches:
                try:
                    self.model(**self.placed(inputs))
                except _Stop:
                    continue
                except ValueError as error:  # images of another size than the model's, for one
                    raise SourceError(
                        f"{type(self.model).__name__} refuses the calibration samples: {one_line(error)}"
                    ) from None
                raise AssertionError("the last block was never called")
        finally:
            for block in self.blocks:
                del block.forward
            self.drop_block(0)
        self._drop(surroundings)
        return hidden

    @contextlib.contextmanager
    def after_blocks(self) -> Iterator[Callable[[Tensor, Mapping[str, Any]], Any]]:
        """Everything but the blocks in memory; gives ``run(hidden, inputs)``: the model's output when its last block
        gives ``hidden`` for ``inputs``. The blocks themselves are not run.
        """
        inside = {id(module) for block in self.blocks for module in block.modules()}
        outside = {name: module for name, module in self.model.named_modules() if id(module) not in inside}
        self._materialize(outside)
        injected: list[Tensor] = []

        def pass_on(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                incoming = args[0] if args else kwargs["hidden_states"]
                outgoing = injected[0] if index == len(self.blocks) - 1 else incoming
                return (outgoing, *self._rest_of_tuple) if self._returns_tuple else outgoing

            return forward

        def run(hidden: Tensor, inputs: Mapping[str, Any]) -> Any:
            injected[:] = [hidden]
            return self.model(**self.placed(inputs))

        for index, block in enumerate(self.blocks):
            block.forward = pass_on(index)
        try:
            yield run
        finally:
            for block in self.blocks:
                del block.forward
            self._drop(outside)

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the model on its device, floating-point ones in its dtype."""
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def _drop(self, modules: Mapping[str, nn.Module]) -> None:
        """Gives the memory of what the modules own themselves back."""
        for module in modules.values():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to("meta")

    def run_block(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The output of a loaded block for a batch of `record_calls`, [batch, length, hidden]."""
        return self._run(self.blocks[index], self._calls[index][batch], hidden, None)

    def run_copy(self, index: int, batch: int, hidden: Tensor, block: nn.Module, dtype: torch.dtype) -> Tensor | None:
        """The output of a copy of a block in another dtype, called as the block itself is; None where a hook ended it."""
        with contextlib.suppress(_Stop):
            return self._run(block, self._calls[index][batch], hidden, dtype)
        return None

    def _run(self, block: nn.Module, call: _Call, hidden: Tensor, dtype: torch.dtype | None) -> Tensor:
        leaves = list(call.leaves)
        leaves[call.hidden_at] = hidden.to(self.device)
        if dtype is not None:
            leaves = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        output = block(*args, **kwargs)
        return output[0] if self._returns_tuple else output

    def require_same_shape(self, index: int, states: Tensor, output: Any) -> None:
        """Raises SourceError unless a block hands on what it was given, as blocks do that are all alike."""
        if not isinstance(output, Tensor) or output.shape != states.shape:
            gives = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise SourceError(
                f"{self.block_name(index)} of {type(self.model).__name__} takes {list(states.shape)} and gives {gives}; models in stages "
                "of several shapes (Swin, ConvNeXt, PVT and the like) are not supported"
            )

    def observe_block(self, index: int, batch: int, hidden: Tensor) -> Tensor | None:
        """Runs a block for its hooks; one that has seen enough ends it by `stop_forward`, and nothing comes out."""
        with contextlib.suppress(_Stop):
            return self.run_block(index, batch, hidden)
        return None

    def _recorder(self, index: int, keep: Callable[[Tensor], None]) -> Callable[..., Any]:
        block = self.blocks[index]

        def record(*args: Any, **kwargs: Any) -> Any:
            incoming = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                keep(incoming.to("cpu") if self.device.type != "cpu" else incoming)
                if not self._calls[0]:
                    output = type(block).forward(block, *args, **kwargs)
                    self._returns_tuple = isinstance(output, tuple)
                    self._rest_of_tuple = output[1:] if self._returns_tuple else ()
                    self.require_same_shape(0, incoming, output[0] if self._returns_tuple else output)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            self.carried = self.carried or ", ".join(
                sorted({type(leaf).__name__ for leaf in leaves if isinstance(leaf, _CARRIERS)})
            )
            hidden_at = next(i for i, leaf in enumerate(leaves) if leaf is incoming)
            leaves = [None if leaf is incoming else self._share(leaf) for leaf in leaves]
            self._calls[index].append(_Call(leaves, spec, hidden_at))
            if index == len(self.blocks) - 1:
                raise _Stop
            return (incoming, *self._rest_of_tuple) if self._returns_tuple else incoming

        return record

    def _share(self, leaf: Any) -> Any:
        """The same tensor object for equal tensors, so that masks and position embeddings are kept once."""
        if not isinstance(leaf, Tensor):
            return leaf
        known = self._shared.setdefault((leaf.shape, leaf.dtype), [])
        for other in known[-_COMPARED:]:
            if other is leaf or torch.equal(other, leaf):
                return other
        known.append(leaf)
        return leaf

    def _surroundings(self) -> dict[str, nn.Module]:
        """Every module outside of the blocks that is needed before them: all but the output embeddings."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        head = self.model.get_output_embeddings()
        return {
            name: module
            for name, module in self.model.named_modules()
            if id(module) not in inside and (head is None or module is not head)
        }

    def _materialize(self, modules: Mapping[str, nn.Module]) -> None:
        """Gives modules on the meta device their memory: derived buffers are computed, parameters read from disk.

        Each module gets what it owns itself; its children have to be among the modules, too. Tied parameters are read
        once.
        """
        read: dict[str, nn.Parameter] = {}
        for name, module in modules.items():
            derived = [
                (key, buffer)
                for key, buffer in module._buffers.items()
                if buffer is not None and join_names(name, key) not in self._keys
            ]
            for key, buffer in derived:
                module._buffers[key] = torch.empty_like(buffer, device=self.device)
            if derived:
                # The parameters are still on the meta device here, so this fills the buffers and nothing else.
                self.model._init_weights(module)
        for name, module in modules.items():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    full = join_names(name, key)
                    stored = self._keys.get(full, full)
                    if stored not in read:
                        read[stored] = nn.Parameter(self._read(full, parameter), requires_grad=False)
                    module._parameters[key] = read[stored]
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[key] = self._read(join_names(name, key), buffer)

    def _read(self, name: str, target: Tensor) -> Tensor:
        if name in self.added:
            return torch.zeros(target.shape, dtype=target.dtype, device=self.device)
        key = self._keys[name]
        value = self.source.tensors.read(key)
        if value.shape != target.shape:
            raise SourceError(
                f"{self.source.directory}: {key} is {list(value.shape)}, and config.json says {list(target.shape)}"
            )
        return value.to(device=self.device, dtype=target.dtype)

    def _require_all_parameters(self) -> None:
        """Before anything is done: also what the run itself never reads, such as the output layer, must be there."""
        optional = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or []
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            if (
                name not in self._keys
                and name not in self.added
                and not any(re.search(pattern, name) for pattern in optional)
            ):
                raise SourceError(
                    f"{self.source.directory} has no tensor for {name}; either a file is missing, config.json belongs to "
                    "another model, or this family stores its weights in another layout than the model holds them (as "
                    "mixtures of experts do), which is not supported yet"
                )

    def _require_own_linears(self) -> None:
        """Each block is pruned by itself, so none of its linears may be another block's, too."""
        owners: dict[str, str] = {}
        for index in range(len(self.blocks)):
            for name in self.linears(index):
                key = self._keys.get(f"{name}.weight")
                if key is not None and (other := owners.setdefault(key, name)) != name:
                    raise SourceError(
                        f"{type(self.model).__name__} shares {key} between blocks ({other}, {name}); weights that are used in "
                        "several places cannot be pruned for one of them, and this is not supported yet"
                    )

    def refuse_carried(self, what: str) -> None:
        """Raises SourceError where blocks hand something on to each other, which ``what`` does not follow."""
        if self.carried:
            raise SourceError(
                f"the blocks of {type(self.model).__name__} hand more than hidden states on to each other ({self.carried}: later "
                f"layers read keys and values of earlier ones), which {what} does not follow; choose something else"
            )

    def _match_keys(self) -> dict[str, str]:
        """Which tensor of the checkpoint belongs to which parameter or buffer of the model.

        Checkpoints of a bare base model lack its prefix ("h.0" for "transformer.h.0"), others carry one that
        the class does not have.
        """
        prefix = f"{self.model.base_model_prefix}."
        keys = {}
        others = renamed(self.source.tensors, renamings_of(self.model))
        for name in self.model.state_dict():
            for candidate in (name, name.removeprefix(prefix), prefix + name):
                if candidate in self.source.tensors:
                    keys[name] = candidate
                    break
                if candidate in others:
                    keys[name] = others[candidate]
                    break
        for tied, owner in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if owner in keys:
                keys.setdefault(tied, keys[owner])
        return keys


def stop_forward() -> None:
    """For a hook: ends the forward pass of `BlockModel.observe_block`."""
    raise _Stop
