"""New masks for a trained block: weights that were pruned come back where they are worth more than kept ones beside them.

Masks are chosen before a block is trained, layer by layer. Once it is trained, the gradient of its error with respect to
the *pruned* weights says which of them it misses (as RigL grows connections, Evci et al. 2020, arXiv 1911.11134; here
with a second order). In a group of M consecutive weights of a row, with gradient g and curvature H, giving up the kept
weight a and growing the pruned weight c to its best value changes the error by

    −g_a w_a + ½ H_aa w_a² − (g_c − H_ca w_a)² / (2 H_cc),    w_c ← −(g_c − H_ca w_a) / H_cc.

H is that of Gauss and Newton for the relative error, in K-FAC's form (Martens & Grosse 2015, arXiv 1503.05671): for row r
and columns i, j it is s_r · E[x_i x_j], where s_r sums over tokens the squared derivative of the error's square root with
respect to the layer's output r, estimated by random signs (Hutchinson 1990). Only the M x M blocks of E[x xᵀ] are needed.

One exchange a group, the most promising exchanges of all layers of the block first, and no more than a share of the
groups: what other exchanges change is not in the prediction. Of thousands of predictions the lowest are those that the text
at hand flatters most, so exchanges are found on one half of the windows and ranked by what the other half predicts of
them. Whether a round of them is kept is for held-out windows to say.

Axes: ``N`` output features (rows), ``K`` input features (columns), ``M`` the length of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.architecture import LinearModule, oriented
from compress.stages import input_of


@dataclass
class Sensitivity:
    """Of a block's error to the weights of one linear, per batch on average."""

    gradient: Tensor
    """[N, K], of all weights, the pruned ones, too."""
    rows: Tensor
    """s [N], see the module."""
    moments: Tensor
    """E[x xᵀ] within the groups, [K/M, M, M]."""


@dataclass(frozen=True)
class Exchanges:
    """The best one of each group of one linear. All [N, K/M]."""

    change: Tensor
    """Of the block's error, as predicted; an exchange that is none has 0."""
    dropped: Tensor
    """Which member of the group is given up."""
    grown: Tensor
    """Which one takes its place."""
    value: Tensor
    """The weight that it gets."""


def sensitivities(
    linears: Mapping[str, LinearModule],
    m: int,
    batches: Iterable[int],
    output: Callable[[int], Tensor],
    target: Callable[[int], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
) -> dict[str, Sensitivity]:
    """One forward and two backward passes over some batches.

    Args:
        linears: of the block, by name; their weights want gradients.
        m: the length of a group.
        output: the block's output for a batch, [batch, length, hidden], with its graph.
        target: what it is compared with, shaped alike.
        loss: relative errors of the tokens, [batch, length], of which the mean is taken.
        generator: of the signs, on the CPU.

    Returns:
        By name; without the linears that no batch went through.
    """
    found: dict[str, Sensitivity] = {}
    tokens = dict.fromkeys(linears, 0)
    count = 0
    for batch in batches:
        count += 1
        with torch.enable_grad(), _watched(linears) as calls:
            out, aim = output(batch), target(batch)
            error = loss(out, aim).mean()
        names = [name for name in linears if calls[name]]
        weights = [linears[name].weight for name in names]
        gradients = torch.autograd.grad(error, weights, retain_graph=True, allow_unused=True)
        outs = [(name, y) for name in names for _, y in calls[name]]
        derivatives = torch.autograd.grad(out, [y for _, y in outs], _signs(out, aim, generator), allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            k = oriented(linears[name].weight, linears[name]).shape[1]
            if name not in found:
                found[name] = _nothing(linears[name], m)
            if gradient is not None:
                found[name].gradient += oriented(gradient.detach(), linears[name])
            for x, _ in calls[name]:
                groups = x.detach().reshape(-1, k // m, m).float()
                found[name].moments += torch.einsum("tgi,tgj->gij", groups, groups)
                tokens[name] += len(groups)
        for (name, _), derivative in zip(outs, derivatives, strict=True):
            if derivative is not None:
                found[name].rows += derivative.detach().float().square().flatten(0, -2).sum(dim=0)
    for name, sensitivity in found.items():
        sensitivity.gradient /= count
        sensitivity.rows /= count
        sensitivity.moments /= max(tokens[name], 1)
    return found


def exchanges(weight: Tensor, mask: Tensor, sensitivity: Sensitivity) -> Exchanges:
    """The exchange of each group that lowers the block's error most, as predicted.

    Args:
        weight: [N, K], zero where it is pruned.
        mask: [N, K], True where a weight is kept.
    """
    m = sensitivity.moments.shape[-1]
    w, kept, g = (tensor.unflatten(1, (-1, m)).unbind(-1) for tensor in (weight.float(), mask, sensitivity.gradient))
    like = w[0]
    change, value = torch.zeros_like(like), torch.zeros_like(like)
    dropped = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
    grown = torch.zeros_like(dropped)

    def curvature(i: int, j: int) -> Tensor:
        return sensitivity.rows[:, None] * sensitivity.moments[None, :, i, j]

    diagonal = [curvature(i, i) for i in range(m)]
    given_up = [-g[a] * w[a] + 0.5 * diagonal[a] * w[a].square() for a in range(m)]
    for c in range(m):
        room = diagonal[c].clamp_min(torch.finfo(torch.float32).tiny)
        for a in range(m):
            if a == c:
                continue
            slope = g[c] - curvature(c, a) * w[a]
            predicted = given_up[a] - 0.5 * slope.square() / room
            # (A feature that is always zero tells nothing of its weight.)
            better = kept[a] & ~kept[c] & (diagonal[c] > 0) & (predicted < change)
            change = torch.where(better, predicted, change)
            value = torch.where(better, -slope / room, value)
            dropped.masked_fill_(better, a)
            grown.masked_fill_(better, c)
    return Exchanges(change, dropped, grown, value)


def predicted(weight: Tensor, found: Exchanges, sensitivity: Sensitivity) -> Tensor:
    """What exchanges change of the block's error where it has another sensitivity than that which they were found with.

    Args:
        weight: [N, K], zero where it is pruned.

    Returns:
        [N, K/M]; 0 where there was no exchange to be found.
    """
    groups, m, _ = sensitivity.moments.shape
    here = torch.arange(groups, device=weight.device)[None]
    a, c = found.dropped, found.grown
    w, g = (tensor.unflatten(1, (-1, m)) for tensor in (weight.float(), sensitivity.gradient))

    def of(tensor: Tensor, member: Tensor) -> Tensor:
        return tensor.gather(2, member[..., None])[..., 0]

    def curvature(i: Tensor, j: Tensor) -> Tensor:
        return sensitivity.rows[:, None] * sensitivity.moments[here, i, j]

    step_a, step_c = -of(w, a), found.value
    change = of(g, a) * step_a + of(g, c) * step_c + curvature(a, c) * step_a * step_c
    change += (curvature(a, a) * step_a.square() + curvature(c, c) * step_c.square()) / 2
    return torch.where(found.change < 0, change, 0)


def chosen(changes_of: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The most promising exchanges of all linears: for each, which groups, [N, K/M] bool.

    Args:
        changes_of: of the block's error, as predicted, [N, K/M] each.
        share: of all groups, at most.
    """
    changes = torch.cat([change.flatten() for change in changes_of.values()])
    most = int(share * changes.numel())
    best = changes.topk(most, largest=False, sorted=False)
    taken = torch.zeros_like(changes, dtype=torch.bool)
    taken[best.indices] = best.values < 0
    parts = taken.split([change.numel() for change in changes_of.values()])
    return {name: part.view_as(change) for (name, change), part in zip(changes_of.items(), parts, strict=True)}


def exchanged(weight: Tensor, mask: Tensor, found: Exchanges, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and mask, [N, K] both, after the exchanges of some groups, [N, K/M] bool; new tensors."""
    m = weight.shape[1] // groups.shape[1]
    weight, mask = weight.clone(), mask.clone()
    row, group = groups.nonzero(as_tuple=True)
    dropped, grown = (group * m + member[row, group] for member in (found.dropped, found.grown))
    mask[row, dropped], weight[row, dropped] = False, 0
    mask[row, grown], weight[row, grown] = True, found.value[row, group].to(weight.dtype)
    return weight, mask


def _nothing(module: LinearModule, m: int) -> Sensitivity:
    weight = oriented(module.weight, module).detach()
    n, k = weight.shape
    return Sensitivity(
        torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format),
        torch.zeros(n, device=weight.device),
        torch.zeros(k // m, m, m, device=weight.device),
    )


def _signs(out: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """What the output is multiplied with: the derivatives of that product, squared, are on average the curvature of the mean
    of ‖out − target‖² / ‖target‖² over the tokens."""
    signs = torch.randint(0, 2, out.shape, generator=generator).to(out.device, torch.float32) * 2 - 1
    energy = target.float().square().sum(dim=-1, keepdim=True)
    tokens = energy.numel()
    scale = (2 / (tokens * energy.clamp_min(torch.finfo(torch.float32).tiny))).sqrt()
    return (signs * torch.where(energy > 0, scale, 0)).to(out.dtype)


@contextmanager
def _watched(linears: Mapping[str, LinearModule]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inputs and outputs of each call inside, by name."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        return lambda module, args, kwargs, output: calls[name].append((input_of(args, kwargs), output))

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in linears.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
