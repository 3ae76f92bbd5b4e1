"""Kernels of this machine give the same numbers; tables, dense and flex masks are the same rule."""

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from streamr1_ref.attention import (
    BACKENDS,
    block_sizes,
    dense_mask,
    flex_mask,
    set_attention,
    teacher_forcing,
    visibility,
    why_not,
)
from streamr1_ref.transformer import WanConfig, WanTransformer, attend
from streamr1_ref.utils.runtime import default_device, default_dtype

DEVICE = default_device()
SMALL = WanConfig(
    dim=128,
    ffn_dim=96,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries, keys", [(64, 64), (48, 144), (130, 390)])
def test_kernels_agree(backend, queries, keys):
    if reason := why_not(backend, DEVICE):
        pytest.skip(reason)
    dtype, generator = default_dtype(DEVICE), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 64, generator=generator) for n in (queries, keys, keys))
    ours = BACKENDS[backend](*(x.to(DEVICE, dtype) for x in (q, k, v))).float().cpu()
    assert relative_error(ours, attend(q.double(), k.double(), v.double()).float()) < (
        1e-5 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_kernels_agree(backend):
    if reason := why_not(backend, DEVICE):
        pytest.skip(reason)
    if backend == "flex" and DEVICE.type == "cpu":
        pytest.skip("PyTorch's flex attention has no backward pass on a CPU")
    dtype, generator = default_dtype(DEVICE), torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, 2, 64, generator=generator) for n in (16, 48, 48)]

    def gradients(kernel, cast):
        leaves = [cast(x).requires_grad_() for x in inputs]
        return [
            g.float().cpu()
            for g in torch.autograd.grad(kernel(*leaves).float().square().sum(), leaves)
        ]

    for ours, reference in zip(
        gradients(BACKENDS[backend], lambda x: x.to(DEVICE, dtype)),
        gradients(attend, lambda x: x.double()),
    ):
        assert relative_error(ours, reference) < (1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_with_each_kernel(backend):
    if reason := why_not(backend, DEVICE):
        pytest.skip(reason)
    torch.manual_seed(0)
    dtype, net = default_dtype(DEVICE), WanTransformer(SMALL).requires_grad_(False)
    x, t, prompt = torch.randn(2, 3, 4, 8, 8), torch.tensor([900.0, 100.0]), torch.randn(2, 5, 16)
    reference = net(x, t, prompt)
    ours = (
        set_attention(net.to(DEVICE, dtype), backend)(
            x.to(DEVICE, dtype), t.to(DEVICE), prompt.to(DEVICE, dtype)
        )
        .float()
        .cpu()
    )
    assert relative_error(ours, reference) < (1e-5 if dtype == torch.float32 else 3e-2)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 12)),
    sink=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_tables_follow_the_rule(sizes, window, sink):
    if window is not None and window < sink + max(sizes):
        with pytest.raises(ValueError, match="window"):
            visibility(sizes, window, sink)
        return
    block = [b for b, n in enumerate(sizes) for _ in range(n)]
    end = [sum(sizes[: b + 1]) for b in block]
    sees = lambda i, j: j < end[i] and (window is None or j < sink or j >= end[i] - (window - sink))
    F = len(block)
    table = visibility(sizes, window, sink)
    forced = teacher_forcing(sizes, window, sink)
    for i in range(F):
        for j in range(F):
            assert table[i, j] == sees(i, j)
            assert forced[i, j] == sees(i, j) and not forced[i, F + j]
            assert forced[F + i, j] == (sees(i, j) and block[i] != block[j]) and forced[
                F + i, F + j
            ] == (block[i] == block[j])
    assert table.any(1).all() and forced.any(1).all()  # a query that sees nothing would be NaN


@given(frames=st.integers(1, 40), per_block=st.integers(1, 5))
def test_block_sizes_cover_all_frames(frames, per_block):
    if frames < per_block:
        with pytest.raises(ValueError, match="num_frames: expected at least frames_per_block"):
            block_sizes(frames, per_block)
        return
    sizes = block_sizes(frames, per_block)
    assert (
        sum(sizes) == frames
        and per_block <= sizes[0] < 2 * per_block
        and set(sizes[1:]) <= {per_block}
    )


@pytest.mark.parametrize("tokens, block_size", [(3, 16), (5, 8), (16, 128)])
def test_flex_mask_is_the_dense_mask(tokens, block_size):
    table = teacher_forcing([4, 3, 3], 9, 2)
    mask = flex_mask(table, tokens, block_size=block_size)
    n = len(table) * tokens
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    assert torch.equal(mask.mask_mod(0, 0, rows, columns), dense_mask(table, tokens))
    q, k, v = torch.randn(3, 1, n, 2, 16, generator=torch.Generator().manual_seed(0))
    assert (
        relative_error(BACKENDS["flex"](q, k, v, mask), attend(q, k, v, dense_mask(table, tokens)))
        < 1e-5
    )
