"""fast/rows.py computes what model.py's block computes, or does not run.  python -m pytest -s tests/test_rows.py"""
import pytest
import torch
from test_fast import Doubled, OtherActivation, gap
from test_model import VARIANTS, small_clip, small_net

import live
from fast import rows
from fast.blocks import FastDenoiser
from fast.fp8 import FP8Linear
from fast.rings import GPURing
from fast.rings8 import Ring8
from model import Block


@pytest.mark.parametrize("task, extra", VARIANTS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_denoiser_of_rows_is_the_plain_one(task, extra, chunk):
    """In PyTorch, in float32; tests/gpu compares the kernels with that."""
    net = small_net(task)
    latents, t, arguments = small_clip(net, **extra)
    fast = FastDenoiser(net, chunk=chunk)
    fast.serves, want = lambda block, x: True, net(latents, t, net.prepare(**arguments))
    relative = gap(fast(latents, t, fast.prepare(**arguments)), want)
    print(f"{task} {extra} chunks of {chunk}: relative L2 {relative:.1e}")
    assert relative < 2e-6


class Projected(Block):
    def project(self, x, mod, rope):
        q, k, v = super().project(x, mod, rope)
        return q, k, 1.001 * v


class Built(Block):
    """Of other arguments."""

    def __init__(self, cfg, audio, more):
        super().__init__(cfg, audio)


def test_a_fork_runs_its_own_functions(capsys):
    assert rows.follows(Block) and capsys.readouterr().err == ""
    for kind in (Doubled, Projected, OtherActivation, Built):
        assert not rows.follows(kind) and not rows.follows(kind)
        assert capsys.readouterr().err.count("fast/rows.py does not compute what Block.project and Block.finish do now") == 1


def test_float8_blocks_on_a_gpu_alone_are_served(monkeypatch):
    block, x = small_net("s2v").blocks[0], torch.zeros(1, 2, 3)
    assert not rows.serves(block, x)
    monkeypatch.setattr(rows.fp8, "multiplies_fp8", lambda device: True)
    monkeypatch.setattr(rows.kernels, "works", lambda device: True)
    assert not rows.serves(block, x)
    monkeypatch.setattr(rows, "matrices", lambda block: [FP8Linear(16, 16)])
    assert rows.serves(block, x) and not rows.serves(block, x.expand(2, 2, 3)) and not rows.serves(block, x.mT)
    monkeypatch.setattr(rows, "matrices", lambda block: [FP8Linear(16, 24)])
    assert not rows.serves(block, x)
    monkeypatch.setattr(rows, "matrices", lambda block: [FP8Linear(16, 16), FP8Linear(16, 16, bias=False)])
    assert not rows.serves(block, x)


def test_weights_that_lie_together_are_one_matrix():
    layers = [FP8Linear(16, n) for n in (8, 24, 8)]
    for i, layer in enumerate(layers):
        layer.weight.data.copy_(torch.full((1, 16), i + 1.0))
    assert rows.lie_together(layers) is None
    before = torch.cat([layer.weight for layer in layers])
    rows.lay_together(layers)
    assert torch.equal(rows.lie_together(layers).float(), before.float()) and rows.lie_together(layers).data_ptr() == layers[0].weight.data_ptr()
    assert all(not layer.weight.requires_grad and layer.weight.shape == (n, 16) for layer, n in zip(layers, (8, 24, 8)))
    assert rows.lie_together(layers[::-1]) is None and rows.lie_together([layers[0], layers[2]]) is None


def test_keys_and_values_are_made_in_the_ring():
    """Those of a whole block in its place: none is copied."""
    net, n, window = small_net("s2v"), 4, 6
    C, K = net.cfg.dim, net.cfg.n_head
    ring = GPURing.__new__(GPURing)
    ring.n, ring.S, ring.layers, ring.ref_keys = n, 10, list(torch.zeros(net.cfg.n_layer, 2, 1, 10 + window * n, K, C // K)), None
    attend, seen = ring.at(slot=3, seen=6, moved=None), []

    def watched(q, k, v, layer):
        seen.append([x.data_ptr() for x in (k, v)])
        return q.flatten(2)
    watched.places = attend.places
    rope, mod = torch.zeros(2, live.BLOCK * n, 1, C // K // 2), torch.zeros(6, 1, 1, C)
    fast, x = FastDenoiser(net), torch.randn(1, live.BLOCK * n, C)
    fast.self_attention(fast.project, net.blocks[1], x, mod, rope, 1, [(0, live.BLOCK * n, 0)], torch.float32, watched)
    assert seen == [[x[:, 10 + 3 * n:].data_ptr() for x in ring.layers[1]]]
    assert not ring.layers[1][:, :, :10 + 3 * n].any() and ring.layers[1][1, :, 10 + 3 * n:].any() and not ring.layers[0].any()


def test_every_ring_has_what_a_stream_asks_for():
    assert all(hasattr(kind, name) for kind in (live.Ring, GPURing, Ring8) for name in ("begin", "at", "attend", "state", "restore"))
