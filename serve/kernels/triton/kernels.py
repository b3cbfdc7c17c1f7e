"""The kernels, in Triton: expand a tile of the packed weight in registers, and multiply it densely.

Only what `compress.packed` stores is read, of 16-bit values 9/16 of the dense bytes, of 8-bit ones 5/16. Nothing here belongs to one vendor.

Values of 8 bits are made numbers by integer arithmetic on their bits, because GPUs before Hopper, and AMD's, convert other kinds of float8 or none.
They are exact in x's dtype, and so are products of them in float32; what is rounded is their sum times the scale of its row. Where x is
rounded to such values, too, it comes as numbers of its dtype, with a scale for each row.

A kernel is compiled for each combination of what Triton specialises on, so there is little of that: sizes and switches are plain
arguments, and K is given in units of 8 columns, or of 128 where it can be, so that the compiler sees that rows begin at multiples of 16
bytes.

Axes: ``R`` rows of x, ``N`` output features, ``K`` input features; a tile is [ROWS], [OUTPUTS], [DEPTH] of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compress.packed import LARGEST
from serve.kernels.triton import layout

INT8 = tl.constexpr(layout.CODES[torch.int8])
FLOAT8 = tl.constexpr(layout.CODES[torch.float8_e4m3fn])
LARGEST_INT8 = tl.constexpr(LARGEST[torch.int8])
LARGEST_FLOAT8 = tl.constexpr(LARGEST[torch.float8_e4m3fn])


@triton.jit
def numbers(values, CODE: tl.constexpr):
    """float32 of values of the dtype with that code, exactly; those of 8 bits come as uint8."""
    if CODE == INT8:
        # 2^23 and more: the integer is the last bits of the number.
        result = ((values ^ 0x80).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
    elif CODE == FLOAT8:
        # Sign, exponent and fraction at their places in a float32, whose exponent counts from 120 more; subnormal ones are subnormal there, too.
        bits = (values.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000  # 0x87F00000
        result = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    else:
        result = values.to(tl.float32)
    return result


@triton.jit
def expanded(pairs, bytes_, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """The dense tile [OUTPUTS, DEPTH] of kept values [OUTPUTS, DEPTH / 2] and bytes of the mask [OUTPUTS, DEPTH / 8]."""
    first, second = tl.split(tl.reshape(pairs, (OUTPUTS, DEPTH // 4, 2)))
    bits = tl.reshape(tl.join(bytes_ & 15, bytes_ >> 4), (OUTPUTS, DEPTH // 4))
    zero = tl.zeros_like(first)
    # The first value is the lowest kept column's, so column 1 holds it unless column 0 does; and so on from above.
    column_0 = tl.where((bits & 1) != 0, first, zero)
    column_1 = tl.where((bits & 2) != 0, tl.where((bits & 1) != 0, second, first), zero)
    column_2 = tl.where((bits & 4) != 0, tl.where((bits & 8) != 0, first, second), zero)
    column_3 = tl.where((bits & 8) != 0, second, zero)
    # A new axis is the last one, and of two columns each time: [.., columns 0 and 2], [.., {0, 2}, {0, 1} further].
    columns = tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3))
    return tl.reshape(columns, (OUTPUTS, DEPTH))


@triton.jit
def is_weight(header, n, k, MAGIC: tl.constexpr, CODE: tl.constexpr):
    """Whether the four words of a prepared weight's header say that it is one [n, k] with values of that code's dtype."""
    magic, code = tl.load(header), tl.load(header + 1)
    return (magic == MAGIC) & (code == CODE) & (tl.load(header + 2) == n) & (tl.load(header + 3) == k)


@triton.jit(do_not_specialize=["rows", "n", "units", "splits", "has_scales", "has_x_scales", "has_bias"])
def multiply(
    x,
    header,
    values,
    mask,
    scales,
    x_scales,
    bias,
    y,
    rows,
    n,
    units,
    splits,
    has_scales,
    has_x_scales,
    has_bias,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    MAGIC: tl.constexpr,
    CODE: tl.constexpr,
):
    """y [R, N] = x [R, K = units UNIT] times the weight (``values`` [N, K/2], ``mask`` [N, K/8] bytes, of 8-bit values ``scales`` [N], and
    ``x_scales`` [R] of x) plus
    bias [N]; or, with more than one split, y [splits, R, N] float32: the sums over each share of K, without scales and bias. NaN if the
    header says otherwise."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    is_output, is_row = output < n, row < rows
    # Products of these may need 64 bits.
    weight_row, x_row = output.to(tl.int64), row.to(tl.int64)
    k, half, eighth = units * UNIT, units * (UNIT // 2), units * (UNIT // 8)

    steps = (k + DEPTH - 1) // DEPTH
    share = (steps + splits - 1) // splits
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        kept = step * (DEPTH // 2) + tl.arange(0, DEPTH // 2)
        byte = step * (DEPTH // 8) + tl.arange(0, DEPTH // 8)
        column = step * DEPTH + tl.arange(0, DEPTH)
        # Beyond the edges a mask of zeros makes zeros of whatever the values are; x is zero there, lest a NaN be.
        pairs = tl.load(
            values + weight_row[:, None] * half + kept[None, :],
            mask=is_output[:, None] & (kept < half)[None, :],
            other=0,
        )
        bytes_ = tl.load(
            mask + weight_row[:, None] * eighth + byte[None, :],
            mask=is_output[:, None] & (byte < eighth)[None, :],
            other=0,
        )
        inputs = tl.load(
            x + x_row[None, :] * k + column[:, None], mask=(column < k)[:, None] & is_row[None, :], other=0.0
        )
        if CODE >= INT8:
            pairs = numbers(pairs, CODE).to(x.dtype.element_ty)
        sums = tl.dot(expanded(pairs, bytes_, OUTPUTS, DEPTH), inputs, sums)

    if CODE >= INT8:
        # (in this order: by one it stays what it is, and the second product and the bias may be one operation as without it)
        sums *= tl.load(x_scales + row, mask=row < rows * has_x_scales, other=1.0)[None, :]
        sums *= tl.load(scales + output, mask=output < n * has_scales, other=1.0)[:, None]
    sums += tl.load(bias + output, mask=output < n * has_bias, other=0.0).to(tl.float32)[:, None]
    sums = tl.where(is_weight(header, n, k, MAGIC, CODE), sums, float("nan"))
    place = (split.to(tl.int64) * rows + x_row)[None, :] * n + output[:, None]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["total", "n", "splits", "has_x_scales", "has_bias"])
def add_splits(
    sums,
    scales,
    x_scales,
    bias,
    y,
    total,
    n,
    splits,
    has_x_scales,
    has_bias,
    SIZE: tl.constexpr,
    CODE: tl.constexpr,
):
    """y [total = R N] = ``sums`` [splits, R N] added up, in the order of the splits, of 8-bit values times ``x_scales`` [R] and ``scales`` [N],
    plus bias [N]."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < total
    result = tl.zeros((SIZE,), dtype=tl.float32)
    for split in range(splits):
        result += tl.load(sums + split * total.to(tl.int64) + place, mask=inside, other=0.0)
    if CODE >= INT8:
        result *= tl.load(x_scales + place // n, mask=place < total * has_x_scales, other=1.0)
        result *= tl.load(scales + place % n, mask=inside, other=0.0)
    result += tl.load(bias + place % n, mask=place < total * has_bias, other=0.0).to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "units"])
def expand(
    header,
    values,
    mask,
    scales,
    dense,
    n,
    units,
    UNIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    MAGIC: tl.constexpr,
    CODE: tl.constexpr,
):
    """dense [N, K = units UNIT], the weight with its zeros, 8-bit values times their scale and rounded once; NaN if the header says otherwise."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k, half, eighth = units * UNIT, units * (UNIT // 2), units * (UNIT // 8)
    kept = tl.program_id(1) * (DEPTH // 2) + tl.arange(0, DEPTH // 2)
    byte = tl.program_id(1) * (DEPTH // 8) + tl.arange(0, DEPTH // 8)
    column = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    weight_row, is_output = output.to(tl.int64)[:, None], (output < n)[:, None]
    pairs = tl.load(values + weight_row * half + kept[None, :], mask=is_output & (kept < half)[None, :], other=0)
    bytes_ = tl.load(mask + weight_row * eighth + byte[None, :], mask=is_output & (byte < eighth)[None, :], other=0)
    pairs = numbers(pairs, CODE)  # (16-bit values: exact there and back)
    if CODE >= INT8:
        pairs *= tl.load(scales + output, mask=output < n, other=0.0)[:, None]
    tile = expanded(pairs, bytes_, OUTPUTS, DEPTH)
    tile = tl.where(is_weight(header, n, k, MAGIC, CODE), tile, float("nan"))
    tl.store(
        dense + weight_row * k + column[None, :],
        tile.to(dense.dtype.element_ty),
        mask=is_output & (column < k)[None, :],
    )


@triton.jit(do_not_specialize=["n", "units"])
def expand_values(
    header,
    values,
    mask,
    scales,
    dense,
    copied,
    n,
    units,
    UNIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    MAGIC: tl.constexpr,
    CODE: tl.constexpr,
):
    """dense [N, K = units UNIT] uint8, values of 8 bits with the zeros among them, and ``copied`` [N], the scales of its rows; NaN if the
    header says otherwise, as a byte cannot say it."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k, half, eighth = units * UNIT, units * (UNIT // 2), units * (UNIT // 8)
    kept = tl.program_id(1) * (DEPTH // 2) + tl.arange(0, DEPTH // 2)
    byte = tl.program_id(1) * (DEPTH // 8) + tl.arange(0, DEPTH // 8)
    column = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    weight_row, is_output = output.to(tl.int64)[:, None], (output < n)[:, None]
    pairs = tl.load(values + weight_row * half + kept[None, :], mask=is_output & (kept < half)[None, :], other=0)
    bytes_ = tl.load(mask + weight_row * eighth + byte[None, :], mask=is_output & (byte < eighth)[None, :], other=0)
    tile = expanded(pairs, bytes_, OUTPUTS, DEPTH)
    tl.store(dense + weight_row * k + column[None, :], tile, mask=is_output & (column < k)[None, :])
    if tl.program_id(1) == 0:
        scale = tl.load(scales + output, mask=output < n, other=0.0)
        scale = tl.where(is_weight(header, n, k, MAGIC, CODE), scale, float("nan"))
        tl.store(copied + output, scale, mask=output < n)


@triton.jit(do_not_specialize=["rows", "units", "has_bias"])
def scale_sums(
    sums,
    scales,
    x_scales,
    bias,
    y,
    rows,
    units,
    has_bias,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """y [R, N = units UNIT] = ``sums`` [R, N] of products of values of 8 bits, int32 or float32, times ``x_scales`` [R] and ``scales`` [N],
    plus bias [N]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    n = units * UNIT
    place = row.to(tl.int64)[:, None] * n + output[None, :]
    inside = (row < rows)[:, None] & (output < n)[None, :]
    result = tl.load(sums + place, mask=inside, other=0).to(tl.float32)
    # (in the order of the other kernels)
    result *= tl.load(x_scales + row, mask=row < rows, other=0.0)[:, None]
    result *= tl.load(scales + output, mask=output < n, other=0.0)[None, :]
    result += tl.load(bias + output, mask=output < n * has_bias, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def nearest(numbers, CODE: tl.constexpr):
    """The nearest values of 8 bits, ties to even, of float32 that are within their range; in float32, in which they are exact."""
    if CODE == INT8:
        # Between 2^23 and 2^24 the integers are all there is. (Zero comes out as +0.0, as an integer has it.)
        result = (numbers + 12582912.0) - 12582912.0
    else:
        # The same where what there is are multiples of the step between a number's neighbours, an eighth of its power of two and at least
        # 2^-9: so behind 1.5 x 2^20 of these powers. The sign is kept, of zeros too.
        bits = numbers.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        power = tl.maximum(size & 0x7F800000, 121 << 23)  # 2^-6
        behind = ((power + (20 << 23)) | 0x400000).to(tl.float32, bitcast=True)
        size = (size.to(tl.float32, bitcast=True) + behind) - behind
        result = (size.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    return result


@triton.jit
def stored(values, CODE: tl.constexpr):
    """The bytes of values of 8 bits, which come in float32: the inverse of `numbers`."""
    if CODE == INT8:
        result = values.to(tl.int32).to(tl.uint8)
    else:
        # Where the exponent counts from 120 less, exponent and fraction are at the same places from bit 20 on, subnormal ones too.
        bits = values.to(tl.int32, bitcast=True)
        small = (values * 7.52316384526264e-37).to(tl.int32, bitcast=True)  # 2^-120
        result = (((small >> 20) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)
    return result


@triton.jit(do_not_specialize=["units"])
def round_rows(x, values, scales, units, CODE: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK: tl.constexpr):
    """``values`` [R, K = 8 units] and ``scales`` [R] float32 of x [R, K], as `compress.packed.quantize_rows` has them: the values as bytes
    where ``values`` are uint8, else as numbers of x's dtype, with ``PRODUCTS`` times the scale and rounded once. A block a row."""
    k = units * 8
    row = tl.program_id(0)
    x += row.to(tl.int64) * k
    values += row.to(tl.int64) * k
    # As integers the bits of sizes have the order of the sizes, then infinity, then NaN, which no comparison loses.
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, k, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inputs = tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, inputs.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    found = tl.maximum(tl.max(largest, axis=0), 27 << 23)  # 2^-100
    is_finite = found < 0x7F800000
    size = tl.where(is_finite, found, 127 << 23).to(tl.float32, bitcast=True)
    end = tl.zeros_like(size) + (LARGEST_INT8 if CODE == INT8 else LARGEST_FLOAT8)
    scale = tl.where(is_finite, tl.div_rn(size, end), float("nan"))
    inverse = tl.div_rn(end, size)
    tl.store(scales + row, scale)
    for start in range(0, k, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inputs = tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)
        # (what limits them also keeps the compiler from making one operation, which rounds once, of this product and a sum)
        inside = tl.minimum(tl.maximum(tl.where(is_finite, inputs * inverse, 0.0), -end), end)
        rounded = nearest(inside, CODE)
        if PRODUCTS:
            rounded *= scale
        if values.dtype.element_ty == tl.uint8:
            tl.store(values + column, stored(rounded, CODE), mask=column < k)
        else:
            tl.store(values + column, rounded.to(values.dtype.element_ty), mask=column < k)
