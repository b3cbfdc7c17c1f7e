"""Multiplies packed weights on GPUs by kernels in Triton, where those of `serve.kernels.cuda` do not run or were measured to be slower.

They do not run on AMD's GPUs, and on NVIDIA's where NVRTC is missing, refuses, or its kernels prove wrong. The weight is read as it is stored, expanded
in registers and multiplied densely, in x's dtype whatever that of its values is, so few rows of x gain by the bytes that need not be read. For more than `MOST_ROWS` the weight
is expanded once for all, and torch multiplies. Where x is rounded to values of 8 bits, they are numbers of its dtype as well, and their scales
multiply the sums; for more than `MOST_ROWS` they are multiplied as bytes (`serve.kernels.narrow`) where the GPU can, else products of values and
scales, rounded to its dtype.

Triton compiles when a kernel is first launched and keeps the result on disk. All that it compiles for a dtype of values, with any dtype
of x, is launched, and compared with float64, before a weight is prepared.
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.packed import LARGEST, PackedWeight
from serve import support
from serve.kernels import narrow, ways
from serve.kernels.aligned import aligned
from serve.kernels.proof import problem
from serve.kernels.triton import layout, rounding

MOST_ROWS = 512
"""Of x, for the kernel that expands in registers: each 128 rows expand the weight anew. By reasoning, not by measurement."""
_EXPANDED = (32, 256)  # rows and columns of the weight in a block of `kernels.expand`
_SIZE = 1024
"""Numbers that a block of `kernels.add_splits` adds up."""
_MOST_SPLITS = 16
_LEAST_STEPS = 4
"""Along K for a block, fewer of which do not pay."""
_WAYS = {f"{number} splits": number for number in (1, 2, 4, 8, _MOST_SPLITS)}
"""By their names in tables (`serve.kernels.ways`)."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: ``rows`` of x, ``outputs`` and ``depth`` along K for a block of ``warps``, ``stages`` in flight."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


def tiles(rows: int, *, amd: bool = False, scaled: bool = False) -> Tiles:
    """For so many rows of x. What they need of shared memory every such GPU has (tested: 99 KB, and AMD's 64).

    By reasoning, not by measurement: the least tile that takes all rows at once, up to 128.

    Args:
        scaled: values are of 8 bits, and to make them numbers takes registers.
    """
    taken = next((size for size in (16, 32, 64) if rows <= size), 128)
    if taken == 128:
        return Tiles(128, 64, 64, 8, 2 if amd else 3)
    return Tiles(taken, 64, 128, 8 if scaled and taken == 64 else 4, 2 if amd else 4 if taken == 16 else 3)


def splits(cut: Tiles, rows: int, n: int, k: int, processors: int) -> int:
    """Into how many blocks the sum along K is cut, so that there are about two blocks for each processor."""
    blocks = -(-n // cut.outputs) * -(-rows // cut.rows)
    steps = -(-k // cut.depth)
    found = 1
    while found < _MOST_SPLITS and 2 * found * blocks <= 2 * processors and steps >= 2 * found * _LEAST_STEPS:
        found *= 2
    return found


@dataclass(frozen=True)
class Kernels:
    """The kernels. They are launched on the current device, which has to be that of the tensors."""

    module: ModuleType
    processors: int
    amd: bool = False

    def multiply(
        self,
        x: Tensor,
        prepared: Tensor,
        bias: Tensor | None,
        y: Tensor,
        *,
        number_of_splits: int = 0,
        x_scales: Tensor | None = None,
    ) -> None:
        """y [rows, n] = x [rows, k] times the prepared weight plus bias; all in a row in memory and from a multiple of 16 bytes on.

        Args:
            x_scales: [rows] float32, that x is to be multiplied by, if its values and the weight's are of 8 bits.
            number_of_splits: of the sum along K; 0: what was measured, or else what `splits` says.
        """
        (rows, k), n = x.shape, y.shape[1]
        weight, unit = layout.parts(prepared, n, k, x.dtype), _unit(k)
        code, values, scales = _operands(weight)
        cut = tiles(rows, amd=self.amd, scaled=weight.scale is not None)
        split = number_of_splits or self._measured(x, weight, n, cut) or splits(cut, rows, n, k, self.processors)
        sums = y if split == 1 else x.new_empty(split, rows, n, dtype=torch.float32)
        added = x if bias is None else bias  # (a pointer is needed, and not looked at)
        of_x = scales if x_scales is None else x_scales
        self.module.multiply[-(-n // cut.outputs), -(-rows // cut.rows), split](
            *(x, _header(prepared), values, weight.mask, scales, of_x, added, sums, rows, n, k // unit, split),
            *(int(split == 1), int(x_scales is not None and split == 1), int(bias is not None and split == 1)),
            UNIT=unit,
            ROWS=cut.rows,
            OUTPUTS=cut.outputs,
            DEPTH=cut.depth,
            MAGIC=layout.MAGIC,
            CODE=code,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        if split > 1:
            self.module.add_splits[(-(-rows * n // _SIZE),)](
                *(sums, scales, of_x, added, y, rows * n, n, split, int(x_scales is not None), int(bias is not None)),
                SIZE=_SIZE,
                CODE=code,
            )

    def _measured(self, x: Tensor, weight: PackedWeight, n: int, cut: Tiles) -> int:
        """Into how many blocks the sum was measured to be cut best, 0 where it was not."""
        rows, k = x.shape
        if rows > cut.rows:
            return 0
        return _WAYS.get(ways.of("triton", x.device.index, weight.values.dtype, x.dtype).find(cut.rows, n, k) or "", 0)

    def expand(self, prepared: Tensor, dense: Tensor) -> None:
        """Writes the dense weight [n, k], to the bit as `compress.packed.unpack` does."""
        n, k = dense.shape
        weight, unit, (outputs, depth) = layout.parts(prepared, n, k, dense.dtype), _unit(k), _EXPANDED
        code, values, scales = _operands(weight)
        self.module.expand[-(-n // outputs), -(-k // depth)](
            *(_header(prepared), values, weight.mask, scales, dense, n, k // unit),
            UNIT=unit,
            OUTPUTS=outputs,
            DEPTH=depth,
            MAGIC=layout.MAGIC,
            CODE=code,
        )

    def expand_values(self, prepared: Tensor, n: int, k: int, values: torch.dtype) -> tuple[Tensor, Tensor]:
        """The values of 8 bits of the dense weight [n, k], with its zeros, and the scales of its rows [n] float32; NaN, if it is another
        weight."""
        weight, unit, (outputs, depth) = layout.parts(prepared, n, k, values), _unit(k), _EXPANDED
        code, kept, scales = _operands(weight)
        dense, copied = kept.new_empty(n, k), scales.new_empty(n)
        self.module.expand_values[-(-n // outputs), -(-k // depth)](
            *(_header(prepared), kept, weight.mask, scales, dense, copied, n, k // unit),
            UNIT=unit,
            OUTPUTS=outputs,
            DEPTH=depth,
            MAGIC=layout.MAGIC,
            CODE=code,
        )
        return dense.view(values), copied


def _unit(k: int) -> int:
    """In which columns are counted: in larger ones the compiler can read more at once."""
    return 8 if k % 128 else 128


def _operands(weight: PackedWeight) -> tuple[int, Tensor, Tensor]:
    """Code, values and scales as the kernels take them: bytes of 8-bit values, and of others a pointer that is not looked at."""
    code = layout.CODES[weight.values.dtype]
    if weight.scale is None:
        return code, weight.values, weight.values
    return code, weight.values.view(torch.uint8), weight.scale


def _header(prepared: Tensor) -> Tensor:
    return prepared[:16].view(torch.int32)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights with values of that dtype cannot be multiplied here, or None. Compiles and tries the kernels if need be."""
    if refusal := support.kernel_refusal("triton", device.type, str(dtype).removeprefix("torch.")):
        return refusal
    with warnings.catch_warnings():  # torch warns of a driver that does not do; `halve doctor` shows what it says
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return "torch finds no GPU that it can use"
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _kernels(index, dtype)
    return found if isinstance(found, str) else None


@cache
def _kernels(index: int, dtype: torch.dtype) -> Kernels | str:
    """The kernels for values of a dtype on a device, or why there are none."""
    properties = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    if refusal := _without_matrix_units(properties, amd):
        return refusal
    try:
        module = importlib.import_module("serve.kernels.triton.kernels")
        kernels = Kernels(module, properties.multi_processor_count, amd)
        with torch.cuda.device(index):
            return wrong(kernels, torch.device("cuda", index), dtype) or kernels
    except Exception as error:  # Triton, its compilers and the driver raise what they like
        return f"Triton's kernels do not run here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _without_matrix_units(properties: Any, amd: bool) -> str | None:
    """Why a GPU multiplies faster densely whatever is saved: Triton would use its scalar units, and torch something better."""
    if not amd:
        return support.capability_refusal("triton", (properties.major, properties.minor))
    name = properties.gcnArchName.partition(":")[0]
    if name.startswith(support.AMD_MATRIX_UNITS):
        return None
    return f"the GPU is {name}, and matrix units are known of {', '.join(support.AMD_MATRIX_UNITS)}"


def wrong(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernels compute wrongly on a device of values of a dtype, or None: small products by each of them, with each dtype that x may
    have, against float64, of values of 8 bits also by x that is rounded to such."""
    scaled = dtype if dtype in LARGEST else None
    for of_x in (dtype,) if scaled is None else layout.ACTIVATIONS:
        for n, k in ((200, 328), (192, 1024)):  # both units of columns
            known = problem(128, n, k, of_x, scaled)
            prepared = layout.prepare(known.packed).to(device)
            bias = known.bias.to(device)
            for one in (known,) if scaled is None else (known, known.rounded()):
                x, scales = one.x.to(device), None if one.x_scale is None else one.x_scale.to(device)
                for rows, number_of_splits in itertools.product((16, 32, 64, 128), (1, 2)):
                    y = torch.full((rows, n), torch.nan, dtype=of_x, device=device)
                    own = None if scales is None else scales[:rows]
                    kernels.multiply(x[:rows], prepared, bias, y, number_of_splits=number_of_splits, x_scales=own)
                    if not one.is_solved_by(y):
                        return (
                            f"Triton's kernel for {rows} rows of x{'' if own is None else ' with scales'} computes wrongly on this "
                            "device; please report it, with `halve doctor`"
                        )
            dense = torch.full((n, k), torch.nan, dtype=of_x, device=device)
            kernels.expand(prepared, dense)
            is_right = torch.equal(dense.cpu(), known.weight)
            if scaled is not None:
                values, scales = kernels.expand_values(prepared, n, k, scaled)
                is_right &= torch.equal(values.view(torch.uint8).cpu(), known.in_bytes()[1].view(torch.uint8))
                is_right &= torch.equal(scales.cpu(), known.scales)
            if not is_right:
                return "Triton's kernel that expands weights is wrong on this device; please report it, with `halve doctor`"
    return None


def _way_names(device: torch.device, values: torch.dtype, dtype: torch.dtype, rows: int, n: int, k: int) -> list[str]:
    """See `ways.Choices`; none where there are no kernels."""
    kernels = _kernels(torch.cuda.current_device() if device.index is None else device.index, values)
    if isinstance(kernels, str):
        return []
    cut = tiles(rows, amd=kernels.amd, scaled=values in LARGEST)
    guessed = splits(cut, rows, n, k, kernels.processors)
    names = [name for name, number in _WAYS.items() if number <= max(1, -(-k // cut.depth))]
    return sorted(names, key=lambda name: _WAYS[name] != guessed)


CHOICES = ways.Choices((16, 32, 64, 128), _way_names)


def reason(dtype: torch.dtype, rows: int) -> str:
    """What is done with so many rows of x."""
    if rows <= MOST_ROWS:
        return "a Triton kernel expands the weight in registers, then multiplies densely"
    how = "multiplied densely, in bytes where x is rounded, too" if dtype in LARGEST else "multiplied densely"
    return f"the weight is expanded, then {how}: Triton's kernel takes up to {MOST_ROWS} rows of x"


def prepare(weight: PackedWeight, name: str = "weight") -> Tensor:
    """The bytes of a packed weight [N, K], [bytes] uint8, on its device; see `layout.prepare`."""
    if weight.quantizes_x:
        rounding.prove(weight.values.device, weight.values.dtype)
        narrow.prove(weight.values.device, weight.values.dtype)
    return layout.prepare(weight, name)


restore = layout.restore


def linear(x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, quantizes_x: bool = False) -> Tensor:
    """x [..., K] times the transposed prepared weight [N, K] plus bias [N] -> [..., N], in x's dtype.

    Args:
        quantizes_x: whether x is rounded to values of 8 bits first, see `compress.packed.PackedWeight`.

    Raises:
        ValueError: x, the prepared weight and the bias do not belong together; says what is wrong. A weight of the other
            16-bit dtype or of another shape of the same size is found by the kernel, and gives NaN.
        RuntimeError: there are no kernels for this device.
    """
    k = x.shape[-1] if x.ndim else 0
    if x.dtype not in layout.ACTIVATIONS or not k or k % 8 or prepared.device != x.device:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}, the prepared weight is on {prepared.device}: they do not go together"
        )
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or bias.device != x.device):
        raise ValueError(
            f"a bias of {n} numbers in {x.dtype} on {x.device} is needed, this is {bias.dtype} {list(bias.shape)}"
        )
    values = layout.parts(prepared, n, k, x.dtype).values.dtype  # raises where it is another weight
    if quantizes_x and values not in LARGEST:
        raise ValueError("x is rounded where the weight's values are of 8 bits, and these are not")
    kernels, rounded_to = _kernels(x.device.index, values), values if quantizes_x else None
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    if torch.cuda.current_device() == x.device.index:
        return _linear(kernels, x, prepared, bias, n, rounded_to)
    with torch.cuda.device(x.device.index):
        return _linear(kernels, x, prepared, bias, n, rounded_to)


def _linear(
    kernels: Kernels, x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, rounded_to: torch.dtype | None
) -> Tensor:
    if not x.numel() or not n:
        return x.new_empty(*x.shape[:-1], n)
    k, scales = x.shape[-1], None
    many = x.numel() > MOST_ROWS * k
    if rounded_to is not None:
        if many and narrow.takes(x.device, rounded_to, x.dtype, n, k):
            rounded, scales = rounding.round_rows(aligned(x).view(-1, k), rounded_to, rounding.Form.BYTES)
            weight, own = kernels.expand_values(prepared, n, k, rounded_to)
            added, stream = None if bias is None else aligned(bias), torch._C._cuda_getCurrentRawStream(x.device.index)
            found = narrow.linear(narrow.Operands(rounded, scales, weight, own, added, x.dtype), stream)
            if found is not None:
                return found.view(*x.shape[:-1], n)
        # By a dense product of 16-bit numbers there is nothing to scale the sums by, and in float16 they might be infinite.
        form = rounding.Form.PRODUCTS if many else rounding.Form.NUMBERS
        rounded, scales = rounding.round_rows(aligned(x).view(-1, k), rounded_to, form)
        x = rounded.view(x.shape)
    if many:
        dense = x.new_empty(n, k)
        kernels.expand(prepared, dense)
        return functional.linear(x, dense, bias)
    y, added = x.new_empty(*x.shape[:-1], n), None if bias is None else aligned(bias)
    kernels.multiply(aligned(x).view(-1, k), prepared, added, y.view(-1, n), x_scales=scales)
    return y
