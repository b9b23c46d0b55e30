"""fast/blocks.py computes what model.py computes.  python -m pytest -s tests/test_fast.py"""
import copy

import pytest
import torch
from test_model import TASKS, VARIANTS, small_clip, small_net

from fast import blocks, offload
from fast.attention8 import attention8
from fast.blocks import FastDenoiser, FlipRotary, SigmoidGELU, get_ready, make_chunks, use_forms_for_compiler, verify
from model import Block, Config, Denoiser, Rotary, attention


def gap(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("task, extra", VARIANTS)
@pytest.mark.parametrize("chunk", [None, 7, 37])
def test_chunks_in_place_give_the_same_bits(task, extra, chunk):
    net = small_net(task)
    latents, t, arguments = small_clip(net, **extra)
    before, cond = latents.clone(), net.prepare(**arguments)
    want, fast = net(latents, t, cond), FastDenoiser(net, chunk=chunk)
    fast_cond = fast.prepare(**arguments)
    relative = gap(fast(latents, t, fast_cond), want)
    print(f"{task} {extra} chunks of {chunk}: relative L2 {relative:.1e}")
    assert relative < 2e-6                                           # sums of matrix products of other heights are ordered otherwise
    if chunk is None:
        assert torch.equal(fast(latents, t, fast_cond), want)
    assert torch.equal(fast(latents, t, fast_cond), fast(latents, t, fast_cond)) and torch.equal(latents, before)


def test_chunks_cover_every_token_once():
    for segments in (((10, 0),), ((10, 0), (7, 1)), ((3, 1), (10, 0))):
        for chunk in (None, 1, 3, 4, 100):
            chunks = make_chunks(segments, chunk)
            assert [row for a, b, row in chunks for _ in range(a, b)] == [row for n, row in segments for _ in range(n)]
            assert [a for a, _, _ in chunks] == [0, *(b for _, b, _ in chunks)][:-1] and all(b - a <= (chunk or 100) for a, b, _ in chunks)


def test_attention_in_place_of_the_queries():
    q, k, v = torch.randn(3, 2, 50, 4, 24).unbind(0)
    want, place, kept = attention(q, k, v), q.data_ptr(), k.clone()
    got = blocks.attend(q, k, v, 0)
    assert torch.equal(got, want) and got.data_ptr() == place and torch.equal(k, kept)


def test_the_seam_sees_every_layer_once():
    net = small_net("s2v")
    latents, t, arguments = small_clip(net, motion=True)
    for runner in (lambda attend: net(latents, t, net.prepare(**arguments), attend),
                   lambda attend: FastDenoiser(net, 13, attend)(latents, t, net.prepare(**arguments))):
        seen = []

        def watched(q, k, v, layer):
            seen.append((layer, q.shape))
            return attention(q, k, v)
        runner(watched)
        assert [layer for layer, _ in seen] == list(range(net.cfg.n_layer)) and len({shape for _, shape in seen}) == 1


def test_forms_for_the_compiler():
    x, rope = torch.randn(2, 9, 3, 16), torch.randn(2, 9, 1, 8)
    assert torch.equal(FlipRotary()(x, rope), Rotary()(x, rope))
    x = torch.linspace(-12, 12, 4001)
    assert gap(SigmoidGELU()(x), torch.nn.functional.gelu(x, approximate="tanh")) < 2e-7
    assert SigmoidGELU()(x.bfloat16()).dtype == torch.bfloat16


def test_text_keys_on_the_host_give_the_same_bits():
    net = small_net("s2v")
    latents, t, arguments = small_clip(net, motion=True)
    fast, host = FastDenoiser(net), FastDenoiser(net, host_layers=True)
    assert isinstance(host.prepare(**arguments).layers, offload.HostLayers)
    assert torch.equal(host(latents, t, host.prepare(**arguments)), fast(latents, t, fast.prepare(**arguments)))


def test_8_bit_attention_is_near_exact_attention():
    net = small_net("s2v")
    latents, t, arguments = small_clip(net, motion=True)
    want = FastDenoiser(net)(latents, t, net.prepare(**arguments))
    assert 0 < gap(FastDenoiser(net, attend=attention8)(latents, t, net.prepare(**arguments)), want) < 0.02


# ---- a fork's changes

CFG = small_net("s2v").cfg


class Doubled(Block):
    """A change of a part that fast/ uses as it is."""

    def finish(self, x, y, mod, text):
        return super().finish(x, 2 * y, mod, text)


class Added(Block):
    """A change of how the parts are put together, which fast/ does not know."""

    def forward(self, x, mod, cond, layer, attend=attention):
        x = super().forward(x, mod, cond, layer, attend)
        return x + 0.1 * x.roll(1, dims=-1)


class LastLayer(Block):
    """Another change of that kind, of one layer alone."""

    def forward(self, x, mod, cond, layer, attend=attention):
        x = super().forward(x, mod, cond, layer, attend)
        return x + 0.1 * x.roll(1, dims=-1) if layer == 2 else x


class OtherActivation(Block):
    """A change that the forms for the compiler would undo."""

    def __init__(self, cfg, audio):
        super().__init__(cfg, audio)
        self.ffn[1] = torch.nn.SiLU()


class CleanFrames(Denoiser):
    """A change that shows only where the first frame is clean."""

    def forward(self, latents, t, cond, attend=attention):
        return super().forward(latents, t, cond, attend) * (1.1 if cond.segments[0].row else 1)


class Scalar(Denoiser):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.unused = torch.nn.Parameter(torch.tensor(1.0))


def fork(kind):
    class Fork(Denoiser):
        def __init__(self, cfg):
            super().__init__(cfg)
            for i, block in enumerate(self.blocks):
                self.blocks[i] = kind(cfg, block.inject is not None)
    return Fork


def test_a_fork_is_followed_or_noticed():
    for cfg in (CFG, Config(), small_net("t2v").cfg, small_net("i2v").cfg, small_net("ti2v").cfg):
        verify(Denoiser, cfg)
    verify(fork(Doubled), CFG)
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    verify(type("Watched", (Scalar,), dict(forward=lambda self, *args: seen.append(torch.get_num_threads()) or Scalar.forward(self, *args))), CFG)
    assert set(seen) == {1} and torch.get_num_threads() == 2         # many wait for one another: 50 s of a start on 64 cores
    torch.set_num_threads(threads)
    for kind, cfg in ((fork(Added), CFG), (fork(LastLayer), CFG), (CleanFrames, small_net("ti2v").cfg)):
        with pytest.raises(ValueError, match="does not compute what model.py computes"):
            verify(kind, cfg)
    with pytest.raises(ValueError, match="see use_forms_for_compiler"):
        verify(fork(OtherActivation), CFG)


def test_a_fork_is_noticed_in_a_thread():
    get_ready(Scalar, CFG, torch.device("cpu"), True)()
    wait = get_ready(fork(Added), CFG, torch.device("cpu"), False)
    with pytest.raises(ValueError, match="does not compute what model.py computes"):
        wait()


@pytest.mark.parametrize("part", ["project", "finish", "audio_cross_attention", "modulations"])
def test_verify_notices_each_part(part, monkeypatch):
    """Were one of them not called, or called on other tokens, the networks would differ."""
    whole = getattr(Block, part)
    runs = []

    def changed(self, *args):
        runs.append(part)
        out = whole(self, *args)
        return tuple(x * 1.01 for x in out) if isinstance(out, tuple) else out * 1.01
    monkeypatch.setattr(Block, part, changed)
    verify(Denoiser, CFG)                                                 # both follow
    assert len(runs) > 2


def test_two_forms_of_a_block_are_deep_copies():
    net = small_net("s2v")
    twin = copy.deepcopy(net)
    for block in twin.blocks:
        use_forms_for_compiler(block)
    latents, t, arguments = small_clip(net, motion=True)
    assert gap(twin(latents, t, twin.prepare(**arguments)), net(latents, t, net.prepare(**arguments))) < 1e-6
    assert set(TASKS) == {"t2v", "i2v", "ti2v", "s2v"}
