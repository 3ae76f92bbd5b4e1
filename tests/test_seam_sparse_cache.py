"""A query-dependent sparse cache in one file: blocks attend to the past frames that score best."""

from dataclasses import dataclass

import torch
from conftest import relative_error

from streamr1_ref.cache import CacheConfig, CacheSettings
from streamr1_ref.rollout import SamplerConfig, StreamSampler, self_forcing_rollout
from streamr1_ref.tiny.student import load_student
from streamr1_ref.transformer import KVCache, attend, rotary_table, rotate


def choose(q, keys, top):
    """Numbers [B,k] of the frames of `keys` whose mean fits the mean query best, in order."""
    score = torch.einsum("bhd,bfhd->bf", q.mean(1), keys.mean(2))
    return score.topk(min(top, score.shape[1])).indices.sort().values


class SparseLayer:
    def __init__(self, cache, i):
        self.cache, self.i, self.past = cache, i, cache.past.get(i)  # of the time of the call

    def attend(self, q, k, v, *, write, kernel=attend):
        grid, kv = self.cache.grid, torch.stack([k, v])
        if write:
            self.cache.new[self.i] = kv.unflatten(2, (-1, grid[0] * grid[1]))
        if self.past is not None:
            rows, chosen = torch.arange(len(q))[:, None], choose(q, self.past[0], self.cache.top)
            k, v = torch.cat([self.past[:, rows, chosen].flatten(2, 3), kv], 2)
        table = rotary_table(torch.arange(k.shape[1] // (grid[0] * grid[1])), *grid, q.shape[-1])
        return kernel(rotate(q, table[:, -q.shape[1] :]), rotate(k, table), v)


class SparseCache(KVCache):
    def __init__(self, top, num_layers, grid):
        self.top, self.num_layers, self.grid = top, num_layers, grid
        self.past, self.new = {}, {}  # keys and values [2,B,F,tokens,heads,d] by layer

    def layers(self):
        return [SparseLayer(self, i) for i in range(self.num_layers)]

    def commit(self, frames=None):
        for i, new in self.new.items():
            self.past[i] = torch.cat([self.past.get(i, new[:, :, :0]), new[:, :, :frames]], 2)
        self.new = {}


@dataclass(frozen=True)
class SparseConfig(CacheSettings):
    top: int = 3  # frames of the past that a block sees

    def make(self, net, batch, grid, device, dtype, evict=True, frames=None):
        return SparseCache(self.top, net.num_layers, grid)


STUDENT, EMBEDS = load_student(), load_student().model.text(["a red 3 moving left"] * 2).detach()
NET = STUDENT.model.transformer.requires_grad_()
NOISE = torch.randn(2, 12, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def clip(cache):
    sampler = StreamSampler(NET, STUDENT.schedule, config=SamplerConfig(cache=cache))
    return sampler.sample(NOISE, EMBEDS, generator=torch.Generator().manual_seed(0)).split(6, 1)


def test_the_queries_decide_which_frames_are_seen():
    q = torch.eye(4)[None, :, None]  # as queries of four tokens and as keys of four frames
    assert [choose(q[:, i : i + 1], q[:, :, None], 1).item() for i in range(4)] == [0, 1, 2, 3]
    sparse, every, full = map(clip, (SparseConfig(), SparseConfig(99), CacheConfig(None)))
    assert max(map(relative_error, every + sparse[:1], full + full[:1])) < 1e-5
    assert relative_error(sparse[1], full[1]) > 1e-2  # three of six frames are shown


def test_a_rollout_trains_and_recomputing_layers_changes_no_gradient(grads=()):
    for NET.checkpointing in (True, False):
        run = {"cache": SparseConfig(), "generator": torch.Generator().manual_seed(0)}
        made = self_forcing_rollout(NET, NOISE, EMBEDS, STUDENT.schedule, **run).latents
        grads = *grads, torch.autograd.grad(made.square().sum(), list(NET.parameters()))
    assert all(map(torch.equal, *grads)) and grads[0][0].abs().max() > 0
