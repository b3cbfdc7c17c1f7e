"""Multiplies packed weights on NVIDIA GPUs with the kernels of `src/sparse24.cu`.

Up to `plan.MOST_ROWS` rows of x, the weight is read once, 9/16 of the dense bytes (5/16 where its values are of 8 bits, which become x's
dtype in registers), straight into the sparse tensor cores. Where x is rounded to values of 8 bits, too, these are multiplied as numbers of
its dtype, exactly, and the sums by their scales. For up
to `plan.MOST_PASSES` times as many, it is read again for each such part of x. Above, a kernel expands it, and the product is dense or,
where it is asked for, cuSPARSELt's (`prefill.py`): of values of 8 bits, products of them and their scales are rounded to x's dtype there, unless x
is rounded to such values, too: then both are multiplied as bytes (`serve.kernels.narrow`), where the GPU can. Where a second form is kept
(`beside.py`), that takes all above `plan.MOST_ROWS`. None is kept of values of 8 bits: it would have 16, more than the bytes that they save, and of
which dtype only x says, long after.

Everything that takes time or may fail is done when a weight is prepared: kernels are found in the cache or compiled, and
loaded. A product then is some launches on torch's current stream, one for up to `plan.MOST_ROWS` rows, without synchronization
or search, so CUDA graphs capture it.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import warnings
from collections.abc import Sequence
from ctypes import Structure, c_int, c_uint32, c_void_p
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from compress.errors import one_line
from compress.packed import LARGEST, PackedWeight, pack, quantize
from serve import support
from serve.kernels import narrow, ways
from serve.kernels.aligned import aligned
from serve.kernels.cuda import beside, compiler, driver, layout, plan, prefill
from serve.kernels.cuda import cache as disk
from serve.kernels.cuda.compiler import CompilerError
from serve.kernels.cuda.driver import Config, Driver, DriverError
from serve.kernels.cuda.plan import MOST_PASSES, MOST_ROWS, Active, Device, Form
from serve.kernels.proof import problem
from serve.kernels.triton import rounding

logger = logging.getLogger(__name__)

LINKS = 24
"""Products in a chain that proves that launches may overlap."""

_TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.int8: "Int8", torch.float8_e4m3fn: "Float8"}
ACTIVATIONS = (torch.bfloat16, torch.float16)
"""What x may be."""


class Arguments(Structure):
    """``Arguments`` of ``sparse24.cu``."""

    _fields_ = (
        ("weight", c_void_p),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("x_scales", c_void_p),
        ("rows", c_int),
        ("n", c_int),
        ("k", c_int),
        ("splits", c_int),
        ("dtype", c_uint32),
    )


@dataclass
class Kernels:
    """The kernels for a dtype of x and one of values, loaded on a device.

    Attributes:
        dtype: of x, and of values if they have no other.
        values: of 8 bits, or None.
        functions: the driver's, by name.
        active: which forms there are, and in which clusters.
        overlap: whether a kernel may begin before the one in front of it has ended (`driver.config`).
        measured: which of them, in which clusters, were measured to be the fastest, and what launches are made of them.
    """

    driver: Driver
    device: Device
    dtype: torch.dtype
    functions: dict[str, int]
    active: Active
    overlap: bool = False
    values: torch.dtype | None = None
    measured: ways.Ways = field(default_factory=ways.Ways)

    @property
    def code(self) -> int:
        """Of the weights that they take."""
        return layout.CODES[self.values or self.dtype]

    def multiply(
        self,
        x: Tensor,
        prepared: Tensor,
        bias: Tensor | None,
        y: Tensor,
        stream: int,
        *,
        form: Form | None = None,
        splits: int = 0,
        overlap: bool | None = None,
        x_scales: Tensor | None = None,
    ) -> None:
        """y [rows, n] = x [rows, k] times the weight plus bias, for 1 to `MOST_ROWS` rows.

        Args:
            x_scales: [rows] float32 in a row, that x is to be multiplied by, if its values and the weight's are of 8 bits.
            form: one of `active` that takes so many rows, with ``splits``, into how many blocks the sum along K is cut; left out:
                what was measured, or else what `plan.choose` says.
            overlap: None: as ``self.overlap`` says.

        Raises:
            DriverError: the driver refused.
        """
        rows, k = x.shape
        n = y.shape[1]
        key = (rows, n, k, form, splits, self.overlap if overlap is None else overlap)
        found = self.measured.made.get(key)
        if found is None:
            found = self.measured.made[key] = self._configured(*key)
        function, how, cut = found
        arguments = Arguments(
            *(prepared.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()),
            None if x_scales is None else x_scales.data_ptr(),
            *(rows, n, k, cut, self.code),
        )
        self.driver.launch(function, how, stream, arguments)

    def expand(self, prepared: Tensor, dense: Tensor, stream: int) -> None:
        """Writes the dense weight [n, k], to the bit as `compress.packed.unpack` does. Raises DriverError."""
        n, k = dense.shape
        self._expand("expand_weight", prepared, dense, n, k, stream)

    def expand_values(self, prepared: Tensor, n: int, k: int, stream: int) -> tuple[Tensor, Tensor]:
        """The values of 8 bits of the dense weight [n, k], with its zeros, and the scales of its rows [n] float32; NaN, if it is another
        weight. Raises DriverError."""
        assert self.values is not None
        written = prepared.new_empty(n * k + 4 * n)
        self._expand("expand_values", prepared, written, n, k, stream)
        return written[: n * k].view(self.values).view(n, k), written[n * k :].view(torch.float32)

    def _expand(self, function: str, prepared: Tensor, to: Tensor, n: int, k: int, stream: int) -> None:
        units = layout.ceil_div(n, layout.UNIT) * layout.ceil_div(k, layout.UNIT)
        how = driver.config(layout.ceil_div(units, plan.EXPAND_WARPS), 32 * plan.EXPAND_WARPS, 0)
        arguments = Arguments(prepared.data_ptr(), None, None, to.data_ptr(), None, 0, n, k, 1, self.code)
        self.driver.launch(self.functions[function], how, stream, arguments)

    def _configured(
        self, rows: int, n: int, k: int, form: Form | None, splits: int, overlap: bool
    ) -> tuple[int, Config, int]:
        if form is None:
            form, splits = self._cut(rows, n, k)
        grid = form.row_blocks(n) * splits
        how = driver.config(grid, form.threads, form.shared_bytes, cluster=splits, overlap=overlap)
        return self.functions[form.name], how, splits

    def _cut(self, rows: int, n: int, k: int) -> tuple[Form, int]:
        """The kernel, and into how many blocks the sum along K is cut."""
        forms = plan.for_rows(self.active, rows)
        if wanted := self.measured.find(8 * forms[0].tiles, n, k):
            ways = {plan.way_name(form, splits): (form, splits) for form in forms for splits in self.active[form]}
            if wanted in ways:
                return ways[wanted]
        return plan.choose(self.active, rows, n, k, self.device)


def load(
    device: Device,
    dtype: torch.dtype,
    with_driver: Driver,
    forms: Sequence[Form] | None = None,
    values: torch.dtype | None = None,
    measured: ways.Ways | None = None,
) -> Kernels:
    """Finds or compiles the kernels for a dtype of x, and loads them into the calling thread's context.

    Args:
        forms: other ones than `plan.forms` says.
        values: of the weight, where they are of 8 bits.
        measured: where it looks for which of them are the fastest; None: it guesses.

    Raises:
        CompilerError: there is no compiler, or it refused.
        DriverError: the driver refused.
    """
    forms = plan.forms(device.capability, layout.unit_bytes(values or dtype)) if forms is None else forms
    text = compiler.source(forms, _TYPES[dtype], *([] if values is None else [_TYPES[values]]))
    arch = compiler.architecture(device.capability)
    cubin = disk.cubin(text, arch, compiler.version(), lambda: compiler.compile_cubin(text, arch)[0])
    functions = with_driver.load(cubin, plan.functions(forms, values is not None))
    active: dict[Form, dict[int, int]] = {}
    for form in forms:
        function = functions[form.name]
        with_driver.allow_shared_bytes(function, form.shared_bytes)
        active[form] = {1: device.processors * form.resident}
        for splits in plan.possible_splits(device.capability)[1:]:
            how = driver.config(splits, form.threads, form.shared_bytes, cluster=splits)
            if clusters := with_driver.clusters_at_once(function, how):
                active[form][splits] = clusters
    return Kernels(with_driver, device, dtype, functions, active, values=values, measured=measured or ways.Ways())


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights with values of that dtype cannot be multiplied here, or None. Compiles and loads the kernels if need be: for values of 8
    bits those for every dtype of x, because which one it is the weight does not say, and the first product may be one that is captured."""
    if refusal := support.kernel_refusal("cuda", device.type, str(dtype).removeprefix("torch.")) or _why_no_device():
        return refusal
    index = torch.cuda.current_device() if device.index is None else device.index
    if refusal := support.capability_refusal("cuda", torch.cuda.get_device_capability(index)):
        return refusal
    kinds = [(of_x, dtype) for of_x in ACTIVATIONS] if dtype in LARGEST else [(dtype,)]
    return next((found for kind in kinds if isinstance(found := _kernels(index, *kind), str)), None)


def _why_no_device() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    with warnings.catch_warnings():  # torch warns of a driver that does not do; `halve doctor` shows what it says
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return "torch finds no CUDA device that it can use"
    return None


@cache
def _kernels(index: int, dtype: torch.dtype, values: torch.dtype | None = None) -> Kernels | str:
    """The kernels on a device, for a dtype of x and values of 8 bits or of the same dtype, or why there are none."""
    properties = torch.cuda.get_device_properties(index)
    try:
        with torch.cuda.device(index):
            torch.cuda.current_stream().synchronize()  # makes torch's context the thread's
            device = Device((properties.major, properties.minor), properties.multi_processor_count)
            measured = ways.of("cuda", index, values or dtype, dtype)
            kernels = load(device, dtype, driver.default(), values=values, measured=measured)
            where, stream = torch.device("cuda", index), torch._C._cuda_getCurrentRawStream(index)
            if problem := wrong(kernels, where, stream):
                return problem
            kernels.overlap = plan.has_clusters(device.capability) and overlaps_rightly(kernels, where, stream)
            return kernels
    except (CompilerError, DriverError) as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a kernel that failed says so at the next call that waits for it
        return f"the kernels failed on this device: {one_line(error)}"


def wrong(kernels: Kernels, device: torch.device, stream: int) -> str | None:
    """What the kernels of a device compute wrongly, or None: a small product by each of them in each cluster, against float64. It is
    so deep that their pipelines are filled anew, and has an edge. Of values of 8 bits also one by x that is rounded to such.

    Done once, when they are loaded, because a kernel that is wrong on some device or driver must not be used there.

    Raises:
        DriverError: the driver refused.
    """
    for groups, forms in _by_groups(kernels.active).items():
        n, k = 72, layout.UNIT * groups * (max(form.stages for form in forms) + 1) + 8
        known = problem(MOST_ROWS, n, k, kernels.dtype, kernels.values)
        prepared = layout.prepare(known.packed).to(device)
        bias = known.bias.to(device)
        for one in (known,) if kernels.values is None else (known, known.rounded()):
            x, scales = one.x.to(device), None if one.x_scale is None else one.x_scale.to(device)
            for form, splits in [(one_of, cut) for one_of in forms for cut in kernels.active[one_of]]:
                rows = 8 * form.tiles
                y = torch.full((rows, n), torch.nan, dtype=kernels.dtype, device=device)
                of_x = None if scales is None else scales[:rows]
                kernels.multiply(x[:rows], prepared, bias, y, stream, form=form, splits=splits, x_scales=of_x)
                if not one.is_solved_by(y):
                    return (
                        f"the kernel {form.name} for {rows} rows of x{'' if of_x is None else ' with scales'}, in clusters of {splits}, "
                        "computes wrongly on this device; please report it, with `halve doctor`"
                    )
    n, k = 72, 328
    known = problem(1, n, k, kernels.dtype, kernels.values)
    prepared = layout.prepare(known.packed).to(device)
    dense = torch.full((n, k), torch.nan, dtype=kernels.dtype, device=device)
    kernels.expand(prepared, dense, stream)
    is_right = torch.equal(dense.cpu(), known.weight)
    if kernels.values is not None:
        values, scales = kernels.expand_values(prepared, n, k, stream)
        is_right &= torch.equal(values.view(torch.uint8).cpu(), known.in_bytes()[1].view(torch.uint8))
        is_right &= torch.equal(scales.cpu(), known.scales)
    if not is_right:
        return "the kernel that expands weights is wrong on this device; please report it, with `halve doctor`"
    return None


def _by_groups(active: Active) -> dict[int, list[Form]]:
    """Forms by how many groups of warps take turns."""
    found: dict[int, list[Form]] = {}
    for form in active:
        found.setdefault(form.groups, []).append(form)
    return found


def overlaps_rightly(kernels: Kernels, device: torch.device, stream: int) -> bool:
    """Whether launches that overlap see all that the one before them wrote: chains of products, each of the result before it and with
    nothing in between, alone and in clusters.

    Raises:
        DriverError: the driver refused.
    """
    n, rows = 520, 8
    known = problem(rows, n, n, kernels.dtype)
    weight = pack((known.weight / n**0.5).to(kernels.dtype))
    prepared = layout.prepare(weight if kernels.values is None else quantize(weight, kernels.values)).to(device)
    for form in plan.for_rows(kernels.active, rows):
        for splits in (1, max(kernels.active[form])):
            ends = []
            for overlap in (False, True):
                chain = torch.full((LINKS + 1, rows, n), torch.nan, dtype=kernels.dtype, device=device)
                chain[0] = known.x.to(device)
                for before, after in itertools.pairwise(chain):
                    kernels.multiply(before, prepared, None, after, stream, form=form, splits=splits, overlap=overlap)
                ends.append(chain.cpu())
            if not torch.equal(*ends):
                logger.warning("launches that overlap compute wrongly on this device, so they wait for each other")
                return False
    return True


def _way_names(device: torch.device, values: torch.dtype, dtype: torch.dtype, rows: int, n: int, k: int) -> list[str]:
    """See `ways.Choices`; none where there are no kernels."""
    index = torch.cuda.current_device() if device.index is None else device.index
    kernels = _kernels(index, dtype) if values == dtype else _kernels(index, dtype, values)
    if isinstance(kernels, str):
        return []
    return [plan.way_name(*way) for way in plan.ranked(kernels.active, rows, n, k, kernels.device)]


CHOICES = ways.Choices(tuple(8 * tiles for tiles in plan.TILES), _way_names)


def reason(dtype: torch.dtype, rows: int) -> str:
    """What is done with so many rows of x, by a weight with values of that dtype."""
    if rows <= MOST_ROWS:
        return f"sparse tensor cores, the weight is read once past {rows} rows of x"
    by_library = prefill.wanted() == "cusparselt"
    if beside.wanted() and dtype not in LARGEST:
        how = "cuSPARSELt where it can, else dense" if by_library else "dense"
        return f"{how}, by a second form of the weight; {beside.VARIABLE} asks for it"
    if rows <= MOST_PASSES * MOST_ROWS:
        return f"sparse tensor cores, the weight is read once for each {MOST_ROWS} rows of x"
    if by_library and rows >= prefill.LEAST_ROWS:
        return "cuSPARSELt where it can, on the weight expanded and compressed anew; HALVE_PREFILL asks for it"
    how = "multiplied densely, in bytes where x is rounded, too" if dtype in LARGEST else "multiplied densely"
    return f"the weight is expanded, then {how}: sparse kernels take up to {MOST_PASSES * MOST_ROWS} rows of x"


def prepare(weight: PackedWeight, name: str = "weight") -> Tensor:
    """The bytes of a packed weight [N, K] in the order of the kernels, [bytes] uint8; see `layout.prepare`. What many rows are multiplied
    by follows, where it is asked for (`beside.py`), unless values are of 8 bits."""
    prepared = layout.prepare(weight, name)
    index, dtype = prepared.device.index or 0, weight.values.dtype
    for of_x in ACTIVATIONS if dtype in LARGEST else (dtype,):
        prefill.prove(prepared.device, of_x)
    if weight.quantizes_x:
        rounding.prove(prepared.device, dtype)
        narrow.prove(prepared.device, dtype)
    if prepared.device.type == "cuda" and (beside.wanted() or prefill.wanted() == "cusparselt") and all(weight.shape):
        stream = torch._C._cuda_getCurrentRawStream(index)
        if dtype not in LARGEST and isinstance(kernels := _kernels(index, dtype), Kernels):
            prepared = _for_many_rows(kernels, prepared, weight.shape, stream)
        elif weight.quantizes_x and isinstance(kernels := _kernels(index, ACTIVATIONS[0], dtype), Kernels):
            most = narrow.most_rows(weight.shape[0])
            rows = sorted({min(searched, most) for searched in prefill.SEARCHED_ROWS})
            prefill.search(kernels.expand_values(prepared, *weight.shape, stream)[0], stream, rows)
    # A kernel may fetch the weight before what stands in front of it on its stream has ended.
    torch.cuda.current_stream(prepared.device).synchronize()
    return prepared


def _for_many_rows(kernels: Kernels, prepared: Tensor, shape: tuple[int, int], stream: int) -> Tensor:
    """The prepared weight [N, K], with its second form where that is asked for. The library looks for its best algorithms."""
    dense = torch.empty(shape, dtype=kernels.dtype, device=prepared.device)
    kernels.expand(prepared, dense, stream)
    if not beside.wanted():
        prefill.search(dense, stream)
        return prepared
    prefill.search(dense, stream, beside.SEARCHED_ROWS)
    return beside.keep(prepared, dense, stream)


restore = layout.restore


def linear(x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, quantizes_x: bool = False) -> Tensor:
    """x [..., K] times the transposed prepared weight [N, K] plus bias [N] -> [..., N], in x's dtype.

    Args:
        quantizes_x: whether x is rounded to values of 8 bits first, see `compress.packed.PackedWeight`.

    Where launches overlap, the weight is read while the kernel before this one on the stream still runs; so whoever writes a prepared
    weight by a kernel waits for it before the first product, as `prepare` does. (Copies from the host are waited for anyway.)

    Raises:
        ValueError: x, the prepared weight and the bias do not belong together; says what is wrong. A weight of another
            16-bit dtype or another shape of the same size is found by the kernel, and gives NaN (where many rows go by a second form, no kernel
            looks: then it is not found).
        RuntimeError: there are no kernels for this device, or the driver refused.
    """
    # A decoding step calls this for every layer, so each operation on tensors here is felt.
    shape = x.shape
    k = shape[-1] if shape else 0
    device = x.device
    if x.dtype not in ACTIVATIONS or not k or k % 8 or prepared.device != device:
        raise ValueError(f"x is {_described(x)}, the prepared weight {_described(prepared)}")
    length = prepared.numel()
    values = layout.scaled_dtype(length, n, k)
    behind = 0 if values is not None else length - layout.prepared_bytes(n, k)
    if prepared.dtype is not torch.uint8 or behind < 0 or prepared.data_ptr() % 16:
        raise ValueError(f"{_described(prepared)} is no prepared weight [{n}, {k}]")
    if quantizes_x and values is None:
        raise ValueError("x is rounded where the weight's values are of 8 bits, and these are not")
    if behind:
        beside.find(prepared, n, k, x.dtype)
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or bias.device != device):
        raise ValueError(f"a bias of {n} numbers in {x.dtype} on {device} is needed, this is {_described(bias)}")
    kernels = _kernels(device.index, x.dtype) if values is None else _kernels(device.index, x.dtype, values)
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device.index):
            return _linear(kernels, x, prepared, bias, n, quantizes_x)
    return _linear(kernels, x, prepared, bias, n, quantizes_x)


def _linear(kernels: Kernels, x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, quantizes_x: bool) -> Tensor:
    shape = x.shape
    rows, k = x.numel() // shape[-1], shape[-1]
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    bias = bias if bias is None else bias.contiguous()
    if rows > MOST_ROWS and kernels.values is None and prepared.numel() > layout.prepared_bytes(n, k):
        return beside.linear(aligned(x).view(rows, k), prepared, bias, n, stream).view(*shape[:-1], n)
    scales = None
    if quantizes_x:
        assert kernels.values is not None
        if rows > MOST_PASSES * MOST_ROWS and narrow.takes(x.device, kernels.values, x.dtype, n, k):
            y = _of_bytes(kernels, aligned(x).view(rows, k), prepared, bias, n, stream)
            if y is not None:
                return y.view(*shape[:-1], n)
        # By a dense product of 16-bit numbers there is nothing to scale the sums by, and in float16 they might be infinite.
        form = rounding.Form.PRODUCTS if rows > MOST_PASSES * MOST_ROWS else rounding.Form.NUMBERS
        x, scales = rounding.round_rows(aligned(x).view(rows, k), kernels.values, form)
    try:
        if rows > MOST_PASSES * MOST_ROWS:
            dense = x.new_empty(n, k)
            if n:
                kernels.expand(prepared, dense, stream)
            return prefill.linear(aligned(x).view(rows, -1), dense, bias, stream).view(*shape[:-1], n)
        y = x.new_empty(*shape[:-1], n)
        if y.numel():
            flat, result = aligned(x).view(rows, k), y.view(rows, n)
            if rows <= MOST_ROWS:
                kernels.multiply(flat, prepared, bias, result, stream, x_scales=scales)
            else:
                of_x = itertools.repeat(None) if scales is None else scales.split(MOST_ROWS)
                for part, into, own in zip(flat.split(MOST_ROWS), result.split(MOST_ROWS), of_x, strict=False):
                    kernels.multiply(part, prepared, bias, into, stream, x_scales=own)
    except DriverError as error:
        raise RuntimeError(str(error)) from error
    return y


def _of_bytes(kernels: Kernels, x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, stream: int) -> Tensor | None:
    """x [rows, k], many of them, rounded to values of 8 bits and multiplied as such -> [rows, n], or None, see `narrow.linear`."""
    assert kernels.values is not None
    rounded, x_scales = rounding.round_rows(x, kernels.values, rounding.Form.BYTES)
    try:
        weight, scales = kernels.expand_values(prepared, n, x.shape[1], stream)
    except DriverError as error:
        raise RuntimeError(str(error)) from error
    # (the kernel in Triton that reads the bias was compiled, and tried, for an aligned one)
    added = None if bias is None else aligned(bias)
    return narrow.linear(narrow.Operands(rounded, x_scales, weight, scales, added, x.dtype), stream)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


assert ctypes.sizeof(Arguments) == 64
