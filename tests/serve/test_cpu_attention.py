"""Attention on processors: the kernel against float64, and the attention that transformers' models take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress import compress_model
from compress.errors import UsageError
from serve import attention
from serve.kernels import ops
from serve.kernels.cpu import attention as kernel
from serve.kernels.cpu import backend
from serve.loading import load_model
from tests import tiny_models

pytestmark = pytest.mark.skipif(not kernel.available(), reason="needs the library and AVX-512 BF16")


def heads(batch: int, count: int, positions: int, depth: int, seed: int, factor: float = 1.0) -> Tensor:
    """[batch, count, positions, depth] as a model has it: a view of [batch, positions, count, depth]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(batch, positions, count, depth, generator=generator) * factor
    return drawn.bfloat16().transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The output [B, Q, H, E] in float64, and how far the kernel may be from it."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(tensor.double().repeat_interleave(share, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    # Sums of depth products in float32, then scale and maximum: the error of a score, twice in the exponent.
    slack = (q.abs() @ k.abs().transpose(-1, -2) * scale).amax(-1, keepdim=True) * 2**-22
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    weights = scores.softmax(-1)
    middle = weights @ v
    # The weights are rounded to bfloat16 (by 2^-8 at most); float32 sums and the exponential are within 2^-16.
    bound = (weights @ v.abs()) * (2**-8 + 2**-16 + 2 * slack)
    bound += (middle.abs() + bound) * 2**-8 + 2**-120  # the output is rounded, too
    return middle.transpose(1, 2), bound.transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> None:
    y = kernel.attention(q, k, v, scale, causal)
    middle, bound = exact(q, k, v, scale, causal)
    assert (y.shape, y.dtype, y.is_contiguous()) == (middle.shape, torch.bfloat16, True)
    worst = ((y.double() - middle).abs() / bound).max()
    assert worst <= 1, f"{worst} times the bound"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (1, 300), (5, 3), (6, 16), (24, 24), (25, 65), (48, 256), (49, 257), (255, 255), (600, 600), (30, 1100)],
)
def test_positions(queries: int, keys: int, causal: bool) -> None:
    """Around every tile, block and part."""
    check(heads(1, 2, queries, 64, 0), heads(1, 1, keys, 64, 1), heads(1, 1, keys, 64, 2), 0.125, causal)


@pytest.mark.parametrize("depth", [16, 32, 48, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("value_depth", [16, 64, 80, 256])
def test_depths(depth: int, value_depth: int) -> None:
    check(heads(1, 1, 70, depth, 0), heads(1, 1, 70, depth, 1), heads(1, 1, 70, value_depth, 2), depth**-0.5, True)


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
        several = kernel.attention(q, k, v, 0.2, causal)
        torch.set_num_threads(1)
        assert torch.equal(several, kernel.attention(q, k, v, 0.2, causal))
    finally:
        torch.set_num_threads(before)


def test_layouts_give_the_same_bits() -> None:
    """Positions before heads, heads before positions, a part of a cache, a part of a fused projection."""
    q, k, v = heads(2, 4, 40, 32, 0), heads(2, 2, 40, 32, 1), heads(2, 2, 40, 32, 2)
    wanted = kernel.attention(q, k, v, 0.2, True)
    assert torch.equal(kernel.attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.2, True), wanted)
    cache = torch.full((2, 2, 100, 32), torch.nan, dtype=torch.bfloat16)
    cache[:, :, :40] = k
    assert torch.equal(kernel.attention(q, cache[:, :, :40], v, 0.2, True), wanted)
    fused = torch.cat([k, v], dim=-1)
    assert torch.equal(kernel.attention(q, fused[..., :32], fused[..., 32:], 0.2, True), wanted)


def test_extreme_scores() -> None:
    """One weight takes all, and nothing overflows."""
    q, k, v = heads(1, 1, 40, 32, 0, 300.0), heads(1, 1, 600, 32, 1, 300.0), heads(1, 1, 600, 32, 2)
    y = kernel.attention(q, k, v, 1.0, False)
    best = (q.double() @ k.double().transpose(-1, -2)).argmax(-1)[0, 0]
    assert torch.equal(y[0, :, 0], v[0, 0, best])


def test_what_is_not_a_number_stays_where_it_was_seen() -> None:
    q, k, v = heads(1, 1, 300, 32, 0), heads(1, 1, 300, 32, 1), heads(1, 1, 300, 32, 2)
    clean = kernel.attention(q, k, v, 0.2, True)[0, :, 0]
    spoiled = q.clone()
    spoiled[0, 0, 100] = torch.nan
    y = kernel.attention(spoiled, k, v, 0.2, True)[0, :, 0]
    rows = torch.arange(300) == 100
    assert torch.equal(y.isnan().all(-1), rows)
    assert torch.equal(y[~rows], clean[~rows])
    spoiled = k.clone()
    spoiled[0, 0, 280] = torch.nan
    y = kernel.attention(q, spoiled, v, 0.2, True)[0, :, 0]
    assert torch.equal(y.isnan().all(-1), torch.arange(300) >= 280)
    assert torch.equal(y[:280], clean[:280])
    spoiled = v.clone()
    spoiled[0, 0, 280] = torch.nan
    y = kernel.attention(q, k, spoiled, 0.2, True)[0, :, 0]
    assert y[280:].isnan().all()
    assert torch.equal(y[:264], clean[:264])  # (queries 264 to 287 go together, and 0 times NaN is NaN)


def test_the_bound_finds_faults() -> None:
    """A key too many or too few, and another head's keys, are found."""
    q, k, v = heads(1, 2, 40, 32, 0), heads(1, 2, 41, 32, 1), heads(1, 2, 41, 32, 2)
    y = kernel.attention(q, k[:, :, :40], v[:, :, :40], 0.2, False).double()
    for keys, values in ((k, v), (k[:, :, :39], v[:, :, :39]), (k[:, :, :40].flip(1), v[:, :, :40].flip(1))):
        middle, bound = exact(q, keys, values, 0.2, False)
        assert ((y - middle).abs() > bound).any()


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
        kernel.attention(**call, scale=1.0, causal=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_are_none(scale: float) -> None:
    q = heads(1, 1, 20, 32, 0)
    with pytest.raises(ValueError, match="more than 0"):
        kernel.attention(q, q, q, scale, True)


def test_another_path_has_none() -> None:
    with backend.using("avx512"):
        q = heads(1, 1, 20, 32, 0)
        assert "avx512 has no attention" in (kernel.why_not(q, q, q) or "")
        assert attention.name() == "sdpa"
    assert attention.name() == "halve"


def test_the_operator() -> None:
    q, k, v = heads(2, 4, 20, 32, 0), heads(2, 2, 20, 32, 1), heads(2, 2, 20, 48, 2)
    torch.library.opcheck(ops.attention, (q, k, v, 0.2, True))
    shape = ops.attention(q.to("meta"), k.to("meta"), v.to("meta"), 0.2, True)
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
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

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

    def test_left_to_torch(self) -> None:
        q, k = heads(1, 4, 40, 32, 0), heads(1, 2, 40, 32, 1)
        mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        mask[..., :3] = False
        mask[..., 0] = True
        assert not self.both(q, k, k, mask)
        assert not self.both(q[:, :, :1], k, k)
        assert not self.both(q.float(), k.float(), k.float())
        assert not self.both(q, k, k, position_bias=torch.randn(1, 4, 40, 40, dtype=torch.bfloat16))
        assert not self.both(q.clone().requires_grad_(), k, k)
        with torch.no_grad():
            assert self.both(q.clone().requires_grad_(), k, k)

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "opt", "gpt2", "gpt_neox", "phi3"])
    def test_models(self, family: str, tmp_path: Path) -> None:
        """Loaded models attend with the kernel, say the same as plain ones, and save nothing of it."""
        wide = {"sliding_window": 64} if family in ("mistral", "phi3") else {}  # no mask for so few tokens
        directory = tiny_models.build(family, tmp_path / family, dtype=torch.bfloat16, **wide)
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        model = load_model(directory)
        tokens = torch.randint(0, tiny_models.VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            said, wanted = model(tokens).logits.float(), plain(tokens).logits.float()
        assert self.calls > 0
        assert (said - wanted).norm() < 0.02 * wanted.norm()
        model.save_pretrained(tmp_path / "saved")
        assert "halve" not in (tmp_path / "saved" / "config.json").read_text()


class TestPruning:
    """Blocks that are observed with it."""

    def prune(self, source: Path, out: Path, **settings: Any) -> Any:
        fields = {"metric": "wanda", "calibration": "wikitext2", "samples": 4, "length": 64}
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
