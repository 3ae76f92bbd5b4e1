"""A query-dependent sparse cache in one file: blocks attend to the past frames that score best."""

import torch
from conftest import relative_error

from streamr1_ref.cache import CacheConfig, make_cache
from streamr1_ref.rollout import CurrentPrompt, SamplerConfig, generate_blocks, plan_blocks
from streamr1_ref.tiny.student import load_student
from streamr1_ref.transformer import attend, rotary_table, rotate


class SparseLayer:
    """All past keys and values of a layer, [B,F,tokens,heads,d]; shows the `top` best frames."""

    def __init__(self, top, grid):
        self.top, self.grid, self.past = top, grid, None

    def choose(self, q):
        """Numbers [B,k] of the past frames whose mean key fits the mean query best, in order."""
        score = torch.einsum("bhd,bfhd->bf", q.mean(1), self.past[0].mean(2))
        return score.topk(min(self.top, score.shape[1])).indices.sort().values

    def attend(self, q, k, v, *, write, kernel=attend):
        tokens = self.grid[0] * self.grid[1]
        self.new = [y.unflatten(1, (-1, tokens)) for y in (k, v)] if write else None
        keys, values = k, v
        if self.past is not None:
            rows, chosen = torch.arange(len(q))[:, None], self.choose(q)
            seen = [y[rows, chosen].flatten(1, 2) for y in self.past]
            keys, values = torch.cat([seen[0], k], 1), torch.cat([seen[1], v], 1)
        table = rotary_table(torch.arange(keys.shape[1] // tokens), *self.grid, q.shape[-1])
        return kernel(rotate(q, table[:, -q.shape[1] :]), rotate(keys, table), values)

    def commit(self, frames):
        old = self.past or [y[:, :0] for y in self.new]
        self.past = [torch.cat([a, b[:, :frames]], 1) for a, b in zip(old, self.new)]


class SparseCache:
    def __init__(self, cfg, top, grid):
        self.all_layers = [SparseLayer(top, grid) for _ in range(cfg.num_layers)]

    def reset(self):
        for layer in self.all_layers:
            layer.past = None

    def begin_block(self, frames):
        self.frames = frames

    def layers(self):
        return self.all_layers

    def commit(self, frames=None):
        for layer in self.all_layers:
            layer.commit(self.frames if frames is None else frames)

    def on_event(self, event): ...


@torch.no_grad()
def stream(cache_of, blocks=4):
    student, generator = load_student(), torch.Generator().manual_seed(0)
    net, prompt = student.model.transformer, student.model.text(["a red 3 moving left"] * 2)
    plans = plan_blocks(torch.randn(blocks, 2, 3, 16, 8, 8, generator=generator), generator)
    run = (net, student.schedule, SamplerConfig(), cache_of(net.cfg), plans)
    return torch.cat(list(generate_blocks(*run, CurrentPrompt(prompt))), 1)


def test_a_sparse_cache_that_chooses_all_frames_is_the_full_one():
    full = stream(lambda cfg: make_cache(cfg, CacheConfig(window_frames=None), 2, (4, 4)))
    every, sparse = (stream(lambda cfg: SparseCache(cfg, top, (4, 4))) for top in (100, 3))
    assert relative_error(every, full) < 1e-5 > relative_error(sparse[:, :6], full[:, :6])
    assert relative_error(sparse[:, 6:], full[:, 6:]) > 1e-2  # six frames of the past, three shown


def test_the_queries_decide_which_frames_are_seen():
    layer, keys = SparseLayer(1, (1, 1)), torch.eye(4)[None, :, None]
    layer.attend(keys, keys, keys, write=True)
    layer.commit(4)
    assert [layer.choose(keys[:, i : i + 1]).item() for i in range(4)] == [0, 1, 2, 3]
