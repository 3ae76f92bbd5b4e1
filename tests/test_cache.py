"""Caches against the published layer; their memory, precision, checkpointing and refusals."""

import copy

import pytest
import torch
from conftest import SMALL_NET, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from streamr1_ref.cache import CacheConfig, SlideWindow, WindowKVCache, make_cache
from streamr1_ref.transformer import Attention, Block, WanConfig, WanTransformer


def published_layer(golden, name, **change):
    """Outputs per pass, recorded outputs, and the cache at the end, of a golden attention file."""
    tensors, info = golden(name)
    layer = Attention(info["dim"], info["heads"], info["eps"]).requires_grad_(False)
    layer.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    net = WanConfig(dim=info["dim"], num_heads=info["heads"], num_layers=1)
    published = {name: info[name] for name in ("window_frames", "sink_frames", "alpha")}
    cfg = CacheConfig(**published | change)
    cache, ours, theirs = make_cache(net, cfg, 1, info["frame_grid"]), [], []
    last_pass = info["passes_per_block"] - 1
    for b in range(info["blocks"]):
        cache.begin_block(info["frames_per_block"])
        for p in range(info["passes_per_block"]):
            (of_layer,) = cache.layers()
            ours.append(layer(tensors[f"x.{b}.{p}"], cache=of_layer, write=p == last_pass))
            theirs.append(tensors[f"y.{b}.{p}"])
        cache.commit()
    last = f"{info['blocks'] - 1}"
    return ours, theirs, cache, (tensors["k." + last], tensors["v." + last])


@pytest.mark.parametrize(
    "name, change",
    [
        ("attention_ema_sink", {}),
        ("attention_ema_sink_fast", {}),
        ("attention_sink_smaller_than_block", {"overflow": "overwrite"}),
    ],
)
def test_published_layer(golden, name, change):
    ours, theirs, cache, (k, v) = published_layer(golden, name, **change)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs)]
    assert len(errors) >= 10 and max(errors) < 1e-5, errors
    # un-rotated keys, sink first
    stored_k, stored_v = cache.store[:, 0, :, : cache.length].flatten(2, 3)
    assert relative_error(stored_k, k) < 1e-6 and relative_error(stored_v, v) < 1e-6


@pytest.mark.parametrize(
    "name, change",
    [
        ("attention_ema_sink_fast", {"sink": "static"}),
        ("attention_ema_sink_fast", {"sink": "none"}),
        ("attention_sink_smaller_than_block", {"overflow": "average"}),
    ],
)
def test_other_policies_are_not_the_published_one(golden, name, change):
    ours, theirs, *_ = published_layer(golden, name, **change)
    assert relative_error(ours[-1], theirs[-1]) > 1e-3


def frames_in(cache):
    """Which frame is in each place of the store, when frame j was stored as the number j."""
    return cache.store[0, 0, 0, : cache.length, 0, 0, 0].tolist()


def run(cfg, blocks, evict=True, frames=None):
    cache, count = make_cache(SMALL_NET, cfg, 1, (1, 1), evict=evict, frames=frames), 0
    for f in blocks:
        cache.begin_block(f)
        write(
            cache, torch.arange(count, count + f).float()[None, :, None, None].expand(1, f, 2, 24)
        )
        cache.seen_at_last = cache.block.visible.past + f
        cache.commit()
        count += f
    return cache


def write(cache, keys):
    """Store `keys` as queries, keys and values of the open block, in all layers."""
    for layer in cache.layers():
        layer.attend(keys, keys, keys, write=True)


@given(
    blocks=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    window=st.integers(5, 10),
    sink=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_static_sink_and_a_window_keep_the_right_frames(blocks, window, sink):
    if sink + max(blocks) > window:
        with pytest.raises(ValueError, match="window_frames: expected at least"):
            run(CacheConfig(window, sink, "static"), blocks)
        return
    cache, total = run(CacheConfig(window, sink, "static"), blocks), sum(blocks)
    kept = min(total, window)
    expected = list(range(min(sink, kept))) + list(range(total - (kept - min(sink, kept)), total))
    assert frames_in(cache) == expected
    assert cache.seen_at_last == kept == cache.length


@given(
    blocks=st.lists(st.integers(1, 4), min_size=2, max_size=10),
    sink=st.integers(1, 3),
    alpha=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_ema_sink_takes_up_each_leaving_frame_once(blocks, sink, alpha):
    assume(sink + max(blocks) <= 8)
    cache, total = run(CacheConfig(8, sink, "ema", alpha), blocks), sum(blocks)
    expected = list(map(float, range(min(sink, total))))
    # frames behind the sink that are no longer in the window
    for j in range(sink, max(sink, total - (8 - sink))):
        expected[j % sink] = alpha * expected[j % sink] + (1 - alpha) * j
    assert frames_in(cache)[:sink] == pytest.approx(expected[:total], abs=1e-4)


def test_without_eviction_the_sink_stays_and_attention_sees_the_same_window():
    """Erratum 1: equal to a static sink to the last bit, because nothing leaves."""
    frozen = run(CacheConfig(alpha=0.5), [3] * 7, evict=False, frames=21)
    static = run(CacheConfig(sink="static"), [3] * 7)
    assert frames_in(frozen) == list(map(float, range(21)))
    assert torch.equal(frozen.view, static.view)
    moving = run(CacheConfig(alpha=0.5), [3] * 7)
    assert (
        frames_in(moving)[:3] != [0.0, 1.0, 2.0] and frames_in(moving)[3:] == frames_in(static)[3:]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sink_in_half_precision_moves_only_if_it_is_kept_in_float32(dtype):
    net, generator = WanConfig(dim=48, num_heads=2, num_layers=1), torch.Generator().manual_seed(0)
    caches = {
        kind: make_cache(net, CacheConfig(sink_dtype=kind), 1, (2, 2), dtype=dtype)
        for kind in ("float32", "cache")
    }
    exact = make_cache(net, CacheConfig(), 1, (2, 2))
    for _ in range(60):
        k = torch.randn(1, 12, 2, 24, generator=generator).to(dtype)
        for cache in (exact, *caches.values()):
            cache.begin_block(3)
            write(cache, k.to(cache.store.dtype))
            cache.commit()
    sink = lambda cache: cache.store[0, 0, :, :3].float()
    assert relative_error(sink(caches["float32"]), sink(exact)) < 5e-3
    assert relative_error(sink(caches["cache"]), sink(exact)) > 5 * relative_error(
        sink(caches["float32"]), sink(exact)
    )


def test_memory_is_allocated_once():
    cache = make_cache(SMALL_NET, CacheConfig(), 2, (2, 3))
    net, prompt = WanTransformer(SMALL_NET).requires_grad_(False), torch.zeros(2, 5, 16)
    x, t = torch.randn(2, 3, 4, 4, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(2)
    buffers = lambda: (cache.store, cache.view, cache.eviction.ema)
    places = lambda: [(t.data_ptr(), t.untyped_storage().nbytes()) for t in buffers()]
    before, size = places(), cache.nbytes
    # frames in store and view, K and V, layers, batch, tokens, dim, bytes
    assert size == (9 + 9) * 2 * 2 * 2 * 6 * 48 * 4
    for _ in range(1000):
        cache.begin_block(3)
        net(x, t, prompt, cache=cache, write=True)
        cache.commit()
    assert places() == before and cache.nbytes == size
    assert cache.length == 9 and cache.evicted_frames == 3 * 1000 - 9


def test_no_host_synchronisation_and_no_data_dependent_python():
    """All bookkeeping runs on the meta device, where reading a number from a tensor is an error."""
    cache = make_cache(SMALL_NET, CacheConfig(), 1, (2, 3), device="meta")
    with torch.device("meta"):
        net = WanTransformer(SMALL_NET).requires_grad_(False)
        call = torch.empty(1, 3, 4, 4, 6), torch.empty(1), torch.empty(1, 5, 16)
        for _ in range(6):
            cache.begin_block(3)
            assert net(*call, cache=cache).shape == (1, 3, 4, 4, 6)
            assert net(*call, cache=cache, write=True).shape == (1, 3, 4, 4, 6)
            cache.commit()


@pytest.mark.parametrize("evict", [True, False])
def test_gradients_with_activation_checkpointing(evict):
    """The backward pass recomputes blocks after later ones changed the cache (LongLive #16)."""
    torch.manual_seed(0)
    plain = WanTransformer(SMALL_NET)
    wrapped = copy.deepcopy(plain)
    apply_activation_checkpointing(
        wrapped, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, Block)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 15, 4, 4, 6, generator=generator)
    prompt = torch.randn(1, 5, 16, generator=generator)

    def gradients(net):
        cache = make_cache(SMALL_NET, CacheConfig(alpha=0.5), 1, (2, 3), evict=evict, frames=15)
        loss = 0
        for block in x.split(3, 1):
            cache.begin_block(3)
            out = net(block, torch.full((1,), 500.0), prompt, cache=cache)
            loss = loss + out.square().mean()
            with torch.no_grad():
                net(out.detach(), torch.zeros(1), prompt, cache=cache, write=True)
            cache.commit()
        loss.backward()
        return [p.grad for p in net.parameters()]

    for a, b in zip(gradients(plain), gradients(wrapped)):
        assert torch.equal(a, b)
    assert any(p.grad.abs().max() > 0 for p in plain.parameters())


def test_batch_rows_are_independent():
    torch.manual_seed(0)
    net, generator = (
        WanTransformer(SMALL_NET).requires_grad_(False),
        torch.Generator().manual_seed(0),
    )
    x = torch.randn(3, 15, 4, 4, 6, generator=generator)
    prompt = torch.randn(3, 5, 16, generator=generator)

    def stream(rows):
        cache, out = make_cache(SMALL_NET, CacheConfig(alpha=0.5), len(rows), (2, 3)), []
        for block in x[rows].split(3, 1):
            cache.begin_block(3)
            time = torch.zeros(len(rows))
            out.append(net(block, time, prompt[rows], cache=cache, write=True))
            cache.commit()
        return torch.cat(out, 1)

    together = stream([0, 1, 2])
    for row in range(3):
        assert relative_error(stream([row]), together[row : row + 1]) < 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sink": "moving"}, "sink: expected one of"),
        ({"window_frames": 3}, "window_frames: expected more than sink_frames=3, got 3"),
        ({"alpha": 1.5}, "alpha: expected"),
        ({"sink_frames": -1}, "sink_frames"),
        ({"overflow": "drop"}, "overflow: expected one of"),
        ({"positions": "absolute"}, "positions: expected one of"),
        ({"sink_dtype": "int8"}, "sink_dtype: expected one of"),
        ({"max_frames": 0}, "max_frames"),
        ({"window_frames": 0, "sink": "none"}, "window_frames: expected a number of at least 1"),
        ({"alpha": float("nan")}, "alpha: expected a number"),
        ({"sink_frames": "3"}, "sink_frames: expected a number"),
    ],
)
def test_settings_that_clash_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**change)


def test_calls_that_do_not_fit_are_refused():
    net = WanTransformer(SMALL_NET).requires_grad_(False)
    cache = make_cache(SMALL_NET, CacheConfig(), 2, (2, 3))
    call = lambda B=2, f=3, H=4: net(
        torch.zeros(B, f, 4, H, 6), torch.zeros(B), torch.zeros(B, 5, 16), cache=cache
    )
    with pytest.raises(
        ValueError, match="frames of the open block is 0, got a call with 3; call cache.begin_block"
    ):
        call()
    cache.begin_block(3)
    for kwargs, message in (
        ({"B": 1}, "cache: batch is 2, got a call with 1"),
        ({"f": 2}, "frames of the open block is 3, got a call with 2"),
        ({"H": 8}, r"cache: grid is \(2, 3\), got a call with \(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**kwargs)
    with pytest.raises(ValueError, match="a block of 3 frames is open"):
        cache.begin_block(3)
    with pytest.raises(ValueError, match="the open block was not stored"):
        cache.commit()
    cache.commit(0)
    with pytest.raises(
        ValueError,
        match=r"window_frames: expected at least sink_frames \+ the block = 3 \+ 7, got 9",
    ):
        cache.begin_block(7)
    full = run(CacheConfig(window_frames=None, max_frames=6), [3, 3])
    with pytest.raises(
        ValueError, match="max_frames: this cache holds 6 frames and evicts none, got 9"
    ):
        full.begin_block(3)
    assert frames_in(full) == [0, 1, 2, 3, 4, 5] and full.open_frames == 0  # nothing was lost


def test_a_cache_that_returns_fewer_queries_is_refused():
    class Picky:
        def attend(self, q, k, v, *, write, kernel):
            return kernel(q[:, 6:], k, v)

    class PickyCache:
        layers = lambda self: [Picky(), Picky()]

    net, x = WanTransformer(SMALL_NET).requires_grad_(False), torch.zeros(1, 3, 4, 4, 6)
    expected = r"Picky.attend to return one row a query, \[1, 18, 48\], got \[1, 12, 48\]"
    with pytest.raises(ValueError, match=expected):
        net(x, torch.zeros(1), torch.zeros(1, 5, 16), cache=PickyCache())


def test_a_layer_with_another_kernel_uses_it_with_a_cache():
    """The kernel of set_attention must reach the cache, which would else pick one by accident."""
    net = WanTransformer(SMALL_NET).requires_grad_(False)
    cache = make_cache(SMALL_NET, CacheConfig(), 1, (2, 3))
    used, plain = [], net.blocks[0].self_attn.attend
    for block in net.blocks:
        block.self_attn.attend = lambda q, k, v: (used.append(k.shape[1]), plain(q, k, v))[1]
    cache.begin_block(3)
    net(torch.zeros(1, 3, 4, 4, 6), torch.zeros(1), torch.zeros(1, 5, 16), cache=cache)
    assert used == [18, 18]


@pytest.mark.parametrize("sink", ["ema", "static", "none"])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_committing_a_part_of_a_block_forgets_the_rest(sink, kept):
    """Blocks of three, of which the first frames are committed: the past has only these."""
    cfg = CacheConfig(sink=sink, alpha=0.5)
    cache, count = make_cache(SMALL_NET, cfg, 1, (1, 1)), 0
    for _ in range(8):
        cache.begin_block(3)
        write(cache, torch.arange(count, count + 3.0)[None, :, None, None].expand(1, 3, 2, 24))
        cache.commit(kept)
        count += kept
    window = frames_in(cache)[cfg.num_sink :]
    assert window == list(range(count - len(window), count))
    assert cache.length + cache.evicted_frames == count


def test_an_interrupted_opening_leaves_no_block_open(monkeypatch):
    cache, fill_view = run(CacheConfig(alpha=0.5), [3] * 4), WindowKVCache.fill_view
    expected = run(CacheConfig(alpha=0.5), [3] * 4)
    expected.begin_block(3)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(WindowKVCache, "fill_view", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.begin_block(3)
    assert cache.open_frames == 0
    monkeypatch.setattr(WindowKVCache, "fill_view", fill_view)
    cache.begin_block(3)
    assert torch.equal(cache.store, expected.store) and torch.equal(cache.view, expected.view)


def test_an_interrupted_eviction_is_never_taken_for_a_past(monkeypatch):
    cache, evict = run(CacheConfig(alpha=0.5), [3] * 4), SlideWindow.evict

    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SlideWindow, "evict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.begin_block(3)
    monkeypatch.setattr(SlideWindow, "evict", evict)
    for _ in range(2):
        with pytest.raises(ValueError, match="an eviction was interrupted.*cache.reset()"):
            cache.begin_block(3)
    cache.reset()
    cache.begin_block(3)


def test_settings_make_their_cache_and_say_what_a_stream_shows():
    made = CacheConfig(alpha=0.5).make(
        SMALL_NET, 2, (2, 3), torch.device("cpu"), torch.float64, False, 12
    )
    assert (made.capacity, made.store.dtype, made.batch) == (12, torch.float64, 2)
    assert CacheConfig().shown_frames == 9
    full = CacheConfig(window_frames=None, max_frames=12)
    assert full.shown_frames == 12
    CacheConfig().check_clip(1000), full.check_clip(12)
    with pytest.raises(ValueError, match="max_frames: a cache without a window holds 12 frames"):
        full.check_clip(13)
