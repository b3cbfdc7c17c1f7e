"""Attention on processors: the kernel against float64, and the attention that transformers' models take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compress import compress_model
from compress.errors import UsageError
from serve import attention
from serve.kernels import ops
from serve.kernels.cpu import attention as kernel
from serve.kernels.cpu import backend, library
from serve.loading import load_model
from tests import tiny_models

pytestmark = pytest.mark.skipif(not kernel.available(), reason="needs the library and AVX2")


@pytest.fixture(scope="module", params=["avx2", "avx512", "avx512bf16"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything with each code path that has a kernel."""
    if request.param not in library.paths():
        pytest.skip(f"this processor cannot run the code path {request.param}")
    with backend.using(request.param):
        yield request.param


def heads(batch: int, count: int, positions: int, depth: int, seed: int, factor: float = 1.0) -> Tensor:
    """[batch, count, positions, depth] as a model has it: a view of [batch, positions, count, depth]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(batch, positions, count, depth, generator=generator) * factor
    return drawn.bfloat16().transpose(1, 2)


def exact(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output [B, Q, H, E] in float64, and how far the kernel may be from it."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(tensor.double().repeat_interleave(share, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    # Sums of depth products in float32, then scale and maximum: the error of a score, twice in the exponent.
    slack = (q.abs() @ k.abs().transpose(-1, -2) * scale).amax(-1, keepdim=True) * 2**-22
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()  # where nothing is seen there are no weights
    middle = weights @ v
    # The weights are rounded to bfloat16 (by 2^-8 at most); float32 sums and the exponential are within 2^-16.
    bound = (weights @ v.abs()) * (2**-8 + 2**-16 + 2 * slack)
    bound += (middle.abs() + bound) * 2**-8 + 2**-120  # the output is rounded, too
    return middle.transpose(1, 2), bound.transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None = None) -> None:
    y = kernel.attention(q, k, v, mask, scale, causal)
    middle, bound = exact(q, k, v, scale, causal, mask)
    assert (y.shape, y.dtype, y.is_contiguous()) == (middle.shape, torch.bfloat16, True)
    worst = ((y.double() - middle).abs() / bound).max()
    assert worst <= 1, f"{worst} times the bound"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (1, 1),
        (1, 300),
        (1, 256),
        (1, 1000),
        (5, 3),
        (6, 16),
        (12, 700),
        (13, 700),
        (15, 15),
        (16, 16),
        (24, 24),
        (25, 65),
        (48, 256),
        (49, 257),
        (255, 255),
        (600, 600),
        (30, 1100),
    ],
)
def test_positions(queries: int, keys: int, causal: bool) -> None:
    """Around every tile, block and part."""
    check(heads(1, 2, queries, 64, 0), heads(1, 1, keys, 64, 1), heads(1, 1, keys, 64, 2), 0.125, causal)


@pytest.mark.parametrize("depth", [16, 32, 48, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("value_depth", [16, 64, 80, 256])
def test_depths(depth: int, value_depth: int) -> None:
    check(heads(1, 1, 70, depth, 0), heads(1, 1, 70, depth, 1), heads(1, 1, 70, value_depth, 2), depth**-0.5, True)


def some_mask(kind: str, batch: int, queries: int, keys: int) -> Tensor:
    """[batch or 1, 1, queries, keys]"""
    last = torch.arange(keys - queries, keys)[:, None]  # that a query sees
    at = torch.arange(keys)[None]
    if kind == "random":
        generator = torch.Generator().manual_seed(3)
        return torch.rand(batch, 1, queries, keys, generator=generator) < 0.3
    if kind == "window":
        return ((at <= last) & (at > last - 20))[None, None]
    if kind == "nothing":
        return torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    padding = torch.arange(batch)[:, None, None, None] * (keys // 2)
    return ((at >= padding) & (at <= last)).expand(batch, 1, queries, keys)


@pytest.mark.parametrize("kind", ["random", "window", "padding", "nothing"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (1, 900), (5, 300), (30, 30), (70, 700), (300, 600)])
def test_masks(kind: str, queries: int, keys: int) -> None:
    """Queries that see nothing give zeros; nothing of what is not seen comes through."""
    q, k, v = heads(2, 4, queries, 32, 0), heads(2, 2, keys, 32, 1), heads(2, 2, keys, 48, 2)
    mask = some_mask(kind, 2, queries, keys)
    check(q, k, v, 0.2, False, mask)
    wanted = kernel.attention(q, k, v, mask, 0.2, False)
    wide = torch.zeros(2, 1, queries, keys + 9, dtype=torch.bool)
    wide[..., :keys] = mask
    assert torch.equal(kernel.attention(q, k, v, wide[..., :keys], 0.2, False), wanted)
    assert torch.equal(kernel.attention(q, k, v, mask.expand(-1, 4, -1, -1), 0.2, False), wanted)
    hidden = ~mask.any(2).any(0).flatten()  # keys that nobody sees
    assert torch.equal(kernel.attention(q, k.masked_fill(hidden[:, None], torch.nan), v, mask, 0.2, False), wanted)


def test_a_causal_mask_is_what_causal_is() -> None:
    q, k, v = heads(1, 4, 300, 32, 0), heads(1, 2, 300, 32, 1), heads(1, 2, 300, 32, 2)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    assert torch.equal(kernel.attention(q, k, v, mask, 0.2, False), kernel.attention(q, k, v, None, 0.2, True))


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 1, 20, 20),
        torch.ones(1, 2, 20, 20, dtype=torch.bool),
        torch.ones(3, 1, 20, 20, dtype=torch.bool),
        torch.ones(1, 1, 20, 19, dtype=torch.bool),
        torch.ones(20, 20, dtype=torch.bool),
        torch.ones(1, 1, 20, 1, dtype=torch.bool).expand(1, 1, 20, 20),
    ],
)
def test_masks_that_are_none(mask: Tensor) -> None:
    q = heads(2, 2, 20, 32, 0)
    with pytest.raises(ValueError, match="a mask is"):
        kernel.attention(q, q, q, mask, 0.2, False)


@pytest.mark.parametrize("shared", [(1, 1), (3, 1), (8, 8), (24, 1), (25, 1), (32, 4)])
@pytest.mark.parametrize("depth", [16, 80, 128, 256])
def test_a_token_that_is_decoded(shared: tuple[int, int], depth: int) -> None:
    """However many heads share the keys."""
    count, groups = shared
    q, k, v = heads(2, count, 1, depth, 0), heads(2, groups, 333, depth, 1), heads(2, groups, 333, 48, 2)
    check(q, k, v, depth**-0.5, False)


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (9, 3), (6, 6)]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.booleans(),
    st.sampled_from([0.01, 1.0, 3.0]),
    st.integers(1, 3),
)
def test_any_call(
    batch: int, shared: tuple[int, int], queries: int, keys: int, causal: bool, factor: float, threads: int
) -> None:
    """Groups of heads, batches, flat and peaked weights, any number of threads with the same bits."""
    count, groups = shared
    q, k = heads(batch, count, queries, 32, 0, factor), heads(batch, groups, keys, 32, 1, factor)
    v = heads(batch, groups, keys, 48, 2)
    check(q, k, v, 0.2, causal)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        several = kernel.attention(q, k, v, None, 0.2, causal)
        torch.set_num_threads(1)
        assert torch.equal(several, kernel.attention(q, k, v, None, 0.2, causal))
    finally:
        torch.set_num_threads(before)


def test_layouts_give_the_same_bits() -> None:
    """Positions before heads, heads before positions, a part of a cache, a part of a fused projection."""
    q, k, v = heads(2, 4, 40, 32, 0), heads(2, 2, 40, 32, 1), heads(2, 2, 40, 32, 2)
    wanted = kernel.attention(q, k, v, None, 0.2, True)
    assert torch.equal(kernel.attention(q.contiguous(), k.contiguous(), v.contiguous(), None, 0.2, True), wanted)
    cache = torch.full((2, 2, 100, 32), torch.nan, dtype=torch.bfloat16)
    cache[:, :, :40] = k
    assert torch.equal(kernel.attention(q, cache[:, :, :40], v, None, 0.2, True), wanted)
    fused = torch.cat([k, v], dim=-1)
    assert torch.equal(kernel.attention(q, fused[..., :32], fused[..., 32:], None, 0.2, True), wanted)


def test_extreme_scores() -> None:
    """One weight takes all, and nothing overflows."""
    q, k, v = heads(1, 1, 40, 32, 0, 300.0), heads(1, 1, 600, 32, 1, 300.0), heads(1, 1, 600, 32, 2)
    y = kernel.attention(q, k, v, None, 1.0, False)
    best = (q.double() @ k.double().transpose(-1, -2)).argmax(-1)[0, 0]
    assert torch.equal(y[0, :, 0], v[0, 0, best])


def test_what_is_not_a_number_stays_where_it_was_seen() -> None:
    q, k, v = heads(1, 1, 300, 32, 0), heads(1, 1, 300, 32, 1), heads(1, 1, 300, 32, 2)
    clean = kernel.attention(q, k, v, None, 0.2, True)[0, :, 0]
    spoiled = q.clone()
    spoiled[0, 0, 100] = torch.nan
    y = kernel.attention(spoiled, k, v, None, 0.2, True)[0, :, 0]
    rows = torch.arange(300) == 100
    assert torch.equal(y.isnan().all(-1), rows)
    assert torch.equal(y[~rows], clean[~rows])
    spoiled = k.clone()
    spoiled[0, 0, 280] = torch.nan
    y = kernel.attention(q, spoiled, v, None, 0.2, True)[0, :, 0]
    assert torch.equal(y.isnan().all(-1), torch.arange(300) >= 280)
    assert torch.equal(y[:280], clean[:280])
    spoiled = v.clone()
    spoiled[0, 0, 280] = torch.nan
    y = kernel.attention(q, k, spoiled, None, 0.2, True)[0, :, 0]
    assert y[280:].isnan().all()
    assert torch.equal(y[:264], clean[:264])  # (queries 264 to 287 go together, and 0 times NaN is NaN)


def test_the_bound_finds_faults() -> None:
    """A key too many or too few, and another head's keys, are found."""
    q, k, v = heads(1, 2, 40, 32, 0), heads(1, 2, 41, 32, 1), heads(1, 2, 41, 32, 2)
    y = kernel.attention(q, k[:, :, :40], v[:, :, :40], None, 0.2, False).double()
    for keys, values in ((k, v), (k[:, :, :39], v[:, :, :39]), (k[:, :, :40].flip(1), v[:, :, :40].flip(1))):
        middle, bound = exact(q, keys, values, 0.2, False)
        assert ((y - middle).abs() > bound).any()


class TestGradients:
    """Against float64, where autograd goes through the formula; and against torch's own kernel, by the size of the error."""

    def gradients(self, attend: Any, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
        y = attend(*leaves)
        slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
        y.backward(slope.to(y.dtype))
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def check(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> None:
        found = self.gradients(lambda *each: kernel.DifferentiableAttention.apply(*each, scale, causal), q, k, v)
        wanted = self.gradients(lambda *each: exact(*each, scale, causal)[0], q.double(), k.double(), v.double())
        names = ("q", "k", "v")
        for name, gradient, right, tensor in zip(names, found, wanted, (q, k, v), strict=True):
            assert (gradient.shape, gradient.dtype) == (tensor.shape, torch.bfloat16)
            # P, dS and the gradients are rounded to bfloat16, each by 2^-8 at most, and independently.
            error = (gradient.double() - right).norm() / right.norm().clamp_min(1e-30)
            assert error < 2**-7, f"{name}: {error}"

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(
        ("queries", "keys"),
        [(2, 2), (24, 24), (25, 65), (64, 64), (65, 300), (300, 65), (257, 257), (600, 600), (30, 1100)],
    )
    def test_positions(self, queries: int, keys: int, causal: bool) -> None:
        q, k, v = heads(1, 4, queries, 64, 0), heads(1, 2, keys, 64, 1), heads(1, 2, keys, 64, 2)
        self.check(q, k, v, 0.125, causal)

    @pytest.mark.parametrize(("depth", "value_depth"), [(16, 16), (80, 112), (128, 64), (256, 256)])
    @pytest.mark.parametrize("shared", [(1, 1), (9, 3)])
    def test_depths(self, depth: int, value_depth: int, shared: tuple[int, int]) -> None:
        count, groups = shared
        q, k = heads(2, count, 70, depth, 0), heads(2, groups, 70, depth, 1)
        self.check(q, k, heads(2, groups, 70, value_depth, 2), depth**-0.5, True)

    def test_keys_that_nobody_sees(self) -> None:
        q, k, v = heads(1, 2, 40, 32, 0), heads(1, 1, 90, 32, 1), heads(1, 1, 90, 32, 2)
        found = self.gradients(lambda *each: kernel.DifferentiableAttention.apply(*each, 0.2, True), q, k, v)
        for gradient in found[1:]:
            assert not gradient[:, :, 40:].any()
            assert gradient[:, :, :40].any()

    def test_the_same_bits_whatever_the_threads_and_the_layout(self) -> None:
        q, k, v = heads(2, 4, 130, 32, 0), heads(2, 2, 130, 32, 1), heads(2, 2, 130, 32, 2)
        before = torch.get_num_threads()
        seen = []
        try:
            for threads, tensors in ((1, (q, k, v)), (3, (q, k, v)), (2, [each.contiguous() for each in (q, k, v)])):
                torch.set_num_threads(threads)
                seen.append(
                    self.gradients(lambda *each: kernel.DifferentiableAttention.apply(*each, 0.2, True), *tensors)
                )
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(one, first) for each in seen for one, first in zip(each, seen[0], strict=True))

    def test_under_autocast(self) -> None:
        """float32 from the rotation of the heads is taken as torch's attention takes it; gradients come back in float32."""
        q, k, v = heads(1, 4, 40, 32, 0).float(), heads(1, 2, 40, 32, 1).float(), heads(1, 2, 40, 32, 2)
        module: Any = nn.Module()
        module.num_key_value_groups = 2
        calls: list[list[Tensor]] = []
        for function in (attention.forward, sdpa_attention_forward):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                calls.append(self.gradients(lambda *each, f=function: f(module, *each, None, scaling=0.2)[0], q, k, v))
        for found, wanted in zip(*calls, strict=True):
            assert found.dtype == wanted.dtype
            assert (found.double() - wanted.double()).norm() < 0.02 * wanted.double().norm()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": torch.zeros(1, 2, 20, 32)}, "not torch.float32"),
        ({"k": torch.zeros(1, 1, 20, 16, dtype=torch.bfloat16)}, "do not belong together"),
        ({"v": torch.zeros(1, 1, 21, 32, dtype=torch.bfloat16)}, "do not belong together"),
        ({"q": torch.zeros(1, 3, 20, 32, dtype=torch.bfloat16)}, "cannot share"),
        ({"v": torch.zeros(1, 2, 20, 24, dtype=torch.bfloat16)}, "not 24"),
        ({"v": torch.zeros(1, 2, 20, 272, dtype=torch.bfloat16)}, "not 272"),
        ({"q": torch.zeros(1, 2, 0, 32, dtype=torch.bfloat16)}, "do not belong together"),
        ({"q": torch.zeros(1, 2, 32, 20, dtype=torch.bfloat16).transpose(2, 3)}, "in a row"),
    ],
)
def test_refusals(changed: dict[str, Tensor], says: str) -> None:
    right = {"q": (2, 20, 32), "k": (2, 20, 32), "v": (2, 20, 32)}
    call = {name: torch.zeros(1, *shape, dtype=torch.bfloat16) for name, shape in right.items()} | changed
    with pytest.raises(ValueError, match=says):
        kernel.attention(**({"mask": None} | call), scale=1.0, causal=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_are_none(scale: float) -> None:
    q = heads(1, 1, 20, 32, 0)
    with pytest.raises(ValueError, match="more than 0"):
        kernel.attention(q, q, q, None, scale, True)


def test_another_path_has_none() -> None:
    with backend.using("portable"):
        q = heads(1, 1, 20, 32, 0)
        assert "portable has no attention" in (kernel.why_not(q, q, q) or "")


def test_the_plain_backend_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    assert attention.name() == "sdpa"


def test_the_operator() -> None:
    q, k, v = heads(2, 4, 20, 32, 0), heads(2, 2, 20, 32, 1), heads(2, 2, 20, 48, 2)
    torch.library.opcheck(ops.attention, (q, k, v, None, 0.2, True))
    torch.library.opcheck(ops.attention, (q, k, v, torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(), 0.2, False))
    shape = ops.attention(q.to("meta"), k.to("meta"), v.to("meta"), None, 0.2, True)
    assert (shape.shape, shape.dtype) == (torch.Size((2, 20, 4, 48)), torch.bfloat16)


class TestForward:
    """What transformers calls: equal to torch's attention, and left to it where the kernel would be wrong."""

    module = nn.Module()

    @pytest.fixture(autouse=True)
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        real = ops.attention

        def count(*arguments: Any) -> Tensor:
            self.calls += 1
            return real(*arguments)

        monkeypatch.setattr(ops, "attention", count)

    def both(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: Any) -> bool:
        """Compares it with torch's; whether the kernel ran."""
        self.module.num_key_value_groups = q.shape[1] // k.shape[1]  # pyright: ignore[reportAttributeAccessIssue]
        before = self.calls
        y, _ = attention.forward(self.module, q, k, v, mask, **kwargs)
        wanted, _ = sdpa_attention_forward(self.module, q, k, v, mask, **kwargs)
        assert y.shape == wanted.shape
        torch.testing.assert_close(y, wanted, rtol=2**-6, atol=2**-6)
        return self.calls > before

    def test_the_kernel_runs(self) -> None:
        q, k = heads(1, 4, 40, 32, 0), heads(1, 2, 40, 32, 1)
        assert self.both(q, k, k, scaling=0.2)
        assert self.both(q, k, k, is_causal=False)
        assert self.both(q, k, k, sliding_window=4096, position_ids=torch.arange(40)[None], cache=None)
        longer = heads(1, 2, 60, 32, 1)  # an empty static cache
        assert self.both(q, longer, longer)
        assert self.both(q[:, :, :5], k[:, :, :5], k[:, :, :5])
        assert self.both(q[:, :, :1], k, k)  # a token that is decoded sees all that came before

    def test_with_and_without_gradients(self) -> None:
        q, k = heads(1, 4, 40, 32, 0), heads(1, 2, 40, 32, 1)
        leaf = q.clone().requires_grad_()
        assert not self.both(leaf, k, k)  # another function of the kernel's, see `TestGradients`
        y, _ = attention.forward(self.module, leaf, k, k, None)
        assert "DifferentiableAttention" in str(y.grad_fn)
        with torch.no_grad():
            assert self.both(leaf, k, k)

    def test_left_to_torch(self) -> None:
        q, k = heads(1, 4, 40, 32, 0), heads(1, 2, 40, 32, 1)
        mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        assert self.both(q, k, k, mask)
        assert not self.both(q, k, k, torch.where(mask, 0.0, -1e9).bfloat16())
        assert not self.both(q.clone().requires_grad_(), k, k, mask)
        assert not self.both(q.float(), k.float(), k.float())
        assert not self.both(q, k, k, position_bias=torch.randn(1, 4, 40, 40, dtype=torch.bfloat16))

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "opt", "gpt2", "gpt_neox", "phi3"])
    def test_models(self, family: str, tmp_path: Path) -> None:
        """Loaded models attend with the kernel, say the same as plain ones, and save nothing of it."""
        directory = tiny_models.build(family, tmp_path / family, dtype=torch.bfloat16)
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        model = load_model(directory)
        tokens = torch.randint(0, tiny_models.VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            said, wanted = model(tokens).logits.float(), plain(tokens).logits.float()
        assert self.calls > 0
        assert (said - wanted).norm() < 0.02 * wanted.norm()
        padding = torch.ones(2, 30, dtype=torch.long)
        padding[0, :7] = 0
        with torch.no_grad():
            said, wanted = (each(tokens, attention_mask=padding).logits[:, 7:].float() for each in (model, plain))
        assert (said - wanted).norm() < 0.02 * wanted.norm()
        before = self.calls
        written, right = (each.generate(tokens[:1], max_new_tokens=8, do_sample=False) for each in (model, plain))
        assert self.calls > before
        assert written.shape == right.shape
        model.save_pretrained(tmp_path / "saved")
        assert "halve" not in (tmp_path / "saved" / "config.json").read_text()


class TestPruning:
    """Blocks that are observed with it."""

    def prune(self, source: Path, out: Path, **settings: Any) -> Any:
        fields = {"metric": "wanda", "calibration": "c4", "samples": 4, "length": 64}
        return compress_model(source, out, **fields, **settings)

    def test_the_same_errors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tiny_models.build("llama", tmp_path / "source", dtype=torch.bfloat16)
        calls: list[int] = []
        real = ops.attention
        monkeypatch.setattr(ops, "attention", lambda *arguments: calls.append(1) or real(*arguments))
        wanted = self.prune(source, tmp_path / "torch").report["layers"]
        assert not calls
        found = self.prune(source, tmp_path / "halve", attention=attention.name()).report["layers"]
        assert calls
        for one, other in zip(found, wanted, strict=True):
            assert one["relative_output_error"] == pytest.approx(other["relative_output_error"], rel=0.03)

    def test_unknown(self, tmp_path: Path) -> None:
        source = tiny_models.build("llama", tmp_path / "source")
        with pytest.raises(UsageError, match="'halv' is not in transformers' registry; did you mean 'halve'"):
            self.prune(source, tmp_path / "out", attention="halv")
        assert not (tmp_path / "out.partial").exists()
