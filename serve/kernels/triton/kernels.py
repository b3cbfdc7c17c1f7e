"""The kernels, in Triton: expand a tile of the packed weight in registers, and multiply it densely.

Only what `compress.packed` stores is read, 9/16 of the dense bytes of 16-bit values, so that a few rows of x gain by the bytes; many
rows take as long as a dense product. Nothing here belongs to one vendor.

Axes: ``R`` rows of x, ``N`` output features, ``K`` input features; a tile is [ROWS], [OUTPUTS], [DEPTH] of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expanded(first, second, bits):
    """The dense tile [OUTPUTS, 4 G] of G groups a row: ``first`` and ``second`` kept value and mask ``bits``, [OUTPUTS, G] each."""
    outputs: tl.constexpr = first.shape[0]
    groups: tl.constexpr = first.shape[1]
    zero = tl.zeros_like(first)
    # The first value is the lowest kept column's, so column 1 holds it unless column 0 does; and so on from above.
    column_0 = tl.where((bits & 1) != 0, first, zero)
    column_1 = tl.where((bits & 2) != 0, tl.where((bits & 1) != 0, second, first), zero)
    column_2 = tl.where((bits & 4) != 0, tl.where((bits & 8) != 0, first, second), zero)
    column_3 = tl.where((bits & 8) != 0, second, zero)
    # A new axis is the last one, and of two columns each time: [.., columns 0 and 2], [.., {0, 2}, {0, 1} further].
    columns = tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3))
    return tl.reshape(columns, (outputs, 4 * groups))


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x,
    values,
    mask,
    bias,
    y,
    rows,
    n,
    k,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y [R, N] = x [R, K] times the weight (``values`` [N, K/2], ``mask`` [N, K/8] bytes) plus bias [N]; or, with more than one
    split, y [SPLITS, R, N] float32: the sums over each share of K, without the bias."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    is_output, is_row = output < n, row < rows
    # Products of these may need 64 bits.
    weight_row, x_row = output.to(tl.int64), row.to(tl.int64)

    steps = tl.cdiv(k, DEPTH)
    share = tl.cdiv(steps, SPLITS)
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        kept = step * (DEPTH // 2) + tl.arange(0, DEPTH // 2)
        byte = step * (DEPTH // 8) + tl.arange(0, DEPTH // 8)
        column = step * DEPTH + tl.arange(0, DEPTH)
        # Beyond the edges a mask of zeros makes zeros of whatever the values are; x is zero there, lest a NaN be.
        pairs = tl.load(
            values + weight_row[:, None] * (k // 2) + kept[None, :],
            mask=is_output[:, None] & (kept < k // 2)[None, :],
            other=0.0,
        )
        bytes_ = tl.load(
            mask + weight_row[:, None] * (k // 8) + byte[None, :],
            mask=is_output[:, None] & (byte < k // 8)[None, :],
            other=0,
        )
        inputs = tl.load(
            x + x_row[None, :] * k + column[:, None], mask=(column < k)[:, None] & is_row[None, :], other=0.0
        )
        first, second = tl.split(tl.reshape(pairs, (OUTPUTS, DEPTH // 4, 2)))
        bits = tl.reshape(tl.join(bytes_ & 15, bytes_ >> 4), (OUTPUTS, DEPTH // 4))
        sums = tl.dot(expanded(first, second, bits), inputs, sums)

    if HAS_BIAS and SPLITS == 1:
        sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * rows + x_row)[None, :] * n + output[:, None]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["total"])
def add_splits(sums, bias, y, total, n, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    """y [total = R N] = ``sums`` [SPLITS, R N] added up, in the order of the splits, plus bias [N]."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < total
    result = tl.zeros((SIZE,), dtype=tl.float32)
    for split in range(SPLITS):
        result += tl.load(sums + split * total.to(tl.int64) + place, mask=inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + place % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
