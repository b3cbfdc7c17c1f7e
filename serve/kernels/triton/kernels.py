"""The kernels, in Triton: expand a tile of the packed weight in registers, and multiply it densely.

Only what `compress.packed` stores is read, 9/16 of the dense bytes of 16-bit values. Nothing here belongs to one vendor.

A kernel is compiled for each combination of what Triton specialises on, so there is little of that: sizes and switches are plain
arguments, and K is given in units of 8 columns, or of 128 where it can be, so that the compiler sees that rows begin at multiples of 16
bytes.

Axes: ``R`` rows of x, ``N`` output features, ``K`` input features; a tile is [ROWS], [OUTPUTS], [DEPTH] of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Whether the four words of a prepared weight's header say that it is one [n, k] of the dtype with that code."""
    magic, code = tl.load(header), tl.load(header + 1)
    return (magic == MAGIC) & (code == CODE) & (tl.load(header + 2) == n) & (tl.load(header + 3) == k)


@triton.jit(do_not_specialize=["rows", "n", "units", "splits", "has_bias"])
def multiply(
    x,
    header,
    values,
    mask,
    bias,
    y,
    rows,
    n,
    units,
    splits,
    has_bias,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    MAGIC: tl.constexpr,
    CODE: tl.constexpr,
):
    """y [R, N] = x [R, K = units UNIT] times the weight (``values`` [N, K/2], ``mask`` [N, K/8] bytes) plus bias [N]; or, with more than
    one split, y [splits, R, N] float32: the sums over each share of K, without the bias. NaN if the header says otherwise."""
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
            other=0.0,
        )
        bytes_ = tl.load(
            mask + weight_row[:, None] * eighth + byte[None, :],
            mask=is_output[:, None] & (byte < eighth)[None, :],
            other=0,
        )
        inputs = tl.load(
            x + x_row[None, :] * k + column[:, None], mask=(column < k)[:, None] & is_row[None, :], other=0.0
        )
        sums = tl.dot(expanded(pairs, bytes_, OUTPUTS, DEPTH), inputs, sums)

    sums += tl.load(bias + output, mask=output < n * has_bias, other=0.0).to(tl.float32)[:, None]
    sums = tl.where(is_weight(header, n, k, MAGIC, CODE), sums, float("nan"))
    place = (split.to(tl.int64) * rows + x_row)[None, :] * n + output[:, None]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["total", "n", "splits", "has_bias"])
def add_splits(sums, bias, y, total, n, splits, has_bias, SIZE: tl.constexpr):
    """y [total = R N] = ``sums`` [splits, R N] added up, in the order of the splits, plus bias [N]."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < total
    result = tl.load(bias + place % n, mask=place < total * has_bias, other=0.0).to(tl.float32)
    for split in range(splits):
        result += tl.load(sums + split * total.to(tl.int64) + place, mask=inside, other=0.0)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "units"])
def expand(
    header,
    values,
    mask,
    dense,
    n,
    units,
    UNIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    MAGIC: tl.constexpr,
    CODE: tl.constexpr,
):
    """dense [N, K = units UNIT], the weight with its zeros; NaN if the header says otherwise."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k, half, eighth = units * UNIT, units * (UNIT // 2), units * (UNIT // 8)
    kept = tl.program_id(1) * (DEPTH // 2) + tl.arange(0, DEPTH // 2)
    byte = tl.program_id(1) * (DEPTH // 8) + tl.arange(0, DEPTH // 8)
    column = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    weight_row, is_output = output.to(tl.int64)[:, None], (output < n)[:, None]
    pairs = tl.load(values + weight_row * half + kept[None, :], mask=is_output & (kept < half)[None, :], other=0.0)
    bytes_ = tl.load(mask + weight_row * eighth + byte[None, :], mask=is_output & (byte < eighth)[None, :], other=0)
    tile = expanded(pairs, bytes_, OUTPUTS, DEPTH).to(tl.float32)  # (exact there and back)
    tile = tl.where(is_weight(header, n, k, MAGIC, CODE), tile, float("nan"))
    tl.store(
        dense + weight_row * k + column[None, :],
        tile.to(dense.dtype.element_ty),
        mask=is_output & (column < k)[None, :],
    )
