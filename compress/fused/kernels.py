"""The kernels, in Triton. Nothing here belongs to one vendor."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (kernels are in the syntax of Python, with types of their own)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank(scores, M: tl.constexpr):
    """Of [M, X] scores: how many others of its M beat each one. Of equal ones the earlier wins, as in `NMPattern.keep`."""
    member = tl.arange(0, M)
    mine, other = scores[:, None, :], scores[None, :, :]
    is_later = (member[None, :] > member[:, None])[:, :, None]
    # Written so that a NaN, too, loses or wins against each other one, and never both.
    beats = tl.where(is_later, other > mine, (mine > other) == 0) & (member[None, :] != member[:, None])[:, :, None]
    return tl.sum(beats.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["groups", "keep_n"])
def keep_largest(scores, mask, groups, keep_n, M: tl.constexpr, GROUPS: tl.constexpr):
    """mask [groups, M] uint8 = 1 for the ``keep_n`` largest of scores [groups, M]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = group[None, :] * M + tl.arange(0, M)[:, None]
    inside = (group < groups)[None, :]
    found = tl.load(scores + place, mask=inside, other=0.0)
    tl.store(mask + place, (rank(found, M) < keep_n).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["start", "size", "n", "k", "keep_n"])
def prune_block(
    columns,
    upper,
    inverse_diagonal,
    mask,
    errors,
    start,
    size,
    n,
    k,
    keep_n,
    GIVEN: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """See `compress.fused.Kernels.prune_block`.

    Axes: groups of M columns, the M columns of a group, outputs. The whole block [BLOCK / M, M, OUTPUTS] stays in registers.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < n
    member = tl.arange(0, M)
    group = tl.arange(0, BLOCK // M)
    column = group[:, None] * M + member[None, :]  # within the block
    row = (start + column).to(tl.int64)
    block = tl.load(
        columns + row[:, :, None] * n + output[None, None, :],
        mask=(column < size)[:, :, None] & is_output[None, None, :],
        other=0.0,
    )
    for current in range((size + M - 1) // M):
        of_group = start + current * M + member
        exists = current * M + member < size
        place = of_group.to(tl.int64)[:, None] * n + output[None, :]
        inside = exists[:, None] & is_output[None, :]
        weights = tl.sum(tl.where((group == current)[:, None, None], block, 0.0), axis=0)  # [M, OUTPUTS]
        scale = tl.load(inverse_diagonal + of_group, mask=exists, other=0.0)
        if GIVEN:
            kept = tl.load(mask + place, mask=inside, other=1) != 0
        else:
            kept = rank((weights * scale[:, None]) * (weights * scale[:, None]), M) < keep_n
            tl.store(mask + place, kept.to(tl.uint8), mask=inside)
        error = tl.zeros_like(weights)
        for i in tl.static_range(M):
            mine = tl.where(kept, 0.0, weights * scale[:, None])
            found = tl.sum(tl.where((member == i)[:, None], mine, 0.0), axis=0)  # [OUTPUTS]
            error = tl.where((member == i)[:, None], found[None, :], error)
            factor = (start + current * M + i).to(tl.int64) * k
            within = tl.load(upper + factor + of_group, mask=(member > i) & exists, other=0.0)
            weights = tl.where((member > i)[:, None], weights - within[:, None] * found[None, :], weights)
            behind = (group > current)[:, None] & (column < size)
            further = tl.load(upper + factor + start + column, mask=behind, other=0.0)
            block = tl.where(behind[:, :, None], block - further[:, :, None] * found[None, None, :], block)
        tl.store(columns + place, tl.where(kept, weights, 0.0), mask=inside)
        tl.store(errors + (current * M + member)[:, None] * n + output[None, :], error, mask=inside)
