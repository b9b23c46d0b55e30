"""fast/rows.py computes what model.py's block computes, or does not run.  python -m pytest -s tests/test_rows.py"""
import copy
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from test_fast import Doubled, OtherActivation, gap
from test_model import VARIANTS, small_clip, small_net

import live
import model
from fast import attention8, blocks, kernels, padding, rows
from fast.blocks import FastDenoiser
from fast.fp8 import FP8Linear
from fast.rings import GPURing
from fast.rings8 import Ring8
from model import Block, Config, RMSNorm


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("task, extra", VARIANTS)
@pytest.mark.parametrize("chunk, trims", [(None, False), (7, True)])
def test_a_denoiser_of_rows_is_the_plain_one(task, extra, chunk, trims, monkeypatch):
    """With all of a prompt's padding, and with one key for it; in PyTorch, in float32; tests/gpu compares the kernels with that."""
    ran, finish = [], rows.finish
    monkeypatch.setattr(rows, "finish", lambda *given, **more: ran.append(given[0]) or finish(*given, **more))
    net = small_net(task)
    latents, t, arguments = small_clip(net, **extra)
    fast = FastDenoiser(net, chunk=chunk)
    fast.serves, fast.trims, want = lambda *given: True, trims, net(latents, t, net.prepare(**arguments))
    relative = gap(fast(latents, t, fast.prepare(**arguments)), want)
    print(f"{task} {extra} chunks of {chunk}: relative L2 {relative:.1e}")
    assert relative < 2e-6 and {id(block) for block in ran} == {id(block) for block in net.blocks}


class Projected(Block):
    def project(self, x, mod, rope):
        q, k, v = super().project(x, mod, rope)
        return q, k, 1.001 * v


class Built(Block):
    """Of other arguments."""

    def __init__(self, cfg, audio, more):
        super().__init__(cfg, audio)


class AudioBlocks(Block):
    """A change of blocks with an audio layer alone."""

    def finish(self, x, y, mod, text):
        return super().finish(x, y if self.inject is None else 1.1 * y, mod, text)


class Configured(Block):
    """A change that another network's Config brings."""

    def finish(self, x, y, mod, text):
        return super().finish(x, y * (1 + self.eps * 1000), mod, text)


def other_norm(kind):
    """Blocks whose queries have another norm, with the same weight and eps."""
    class Other(Block):
        def __init__(self, cfg, audio):
            super().__init__(cfg, audio)
            self.self_attn.norm_q = kind(cfg.dim, cfg.eps)
    return Other


class PlusOne(RMSNorm):
    def forward(self, x):
        return super().forward(x) / self.weight * (1 + self.weight)


def test_a_fork_runs_its_own_functions(capsys, monkeypatch):
    cfg = Config()
    assert rows.follows(Block, cfg, False) and rows.follows(Block, replace(cfg, audio_dim=0, eps=1e-5), True) and capsys.readouterr().err == ""
    for kind in (Doubled, Projected, OtherActivation, Built, other_norm(torch.nn.LayerNorm), other_norm(PlusOne)):
        assert not rows.follows(kind, cfg, False)
        assert capsys.readouterr().err.count(f"fast/rows.py does not compute what {kind.__name__}.project and finish do") == 1
    assert rows.follows(AudioBlocks, cfg, False) and not rows.follows(AudioBlocks, cfg, True)
    assert rows.follows(Configured, replace(cfg, eps=1e-9), False) and not rows.follows(Configured, cfg, False)
    rows.follows(Built, replace(cfg, eps=1e-7), False)
    assert "TypeError: " in capsys.readouterr().err


@pytest.mark.parametrize("part", ["layer_norm", "modulate"])
def test_a_changed_function_of_the_model_is_noticed(part, monkeypatch):
    whole = getattr(model, part)
    monkeypatch.setattr(model, part, lambda *args: 1.01 * whole(*args))
    assert not rows.follows(Block, Config(), False)


def test_another_attention_has_no_kernels(monkeypatch):
    """One that is softer: rows.py, keys apart and 8 bits leave it to itself."""
    def softer(q, k, v, layer=None):
        return plain(q / 2, k, v)
    plain = model.attention
    assert kernels.know_attention()
    for module in (model, padding, rows):
        monkeypatch.setattr(module, "attention", softer)
    monkeypatch.setattr(attention8, "know_attention", kernels.know_attention.__wrapped__)
    assert not kernels.know_attention.__wrapped__() and not rows.follows(Block, Config(), False)
    with pytest.raises(ValueError, match="8-bit attention wants model.attention to be a plain softmax"):
        attention8.check(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(blocks.kernels, "know_attention", kernels.know_attention.__wrapped__)
        patch.setattr(blocks.kernels, "works", lambda device: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.backends.cuda, "SDPAParams", lambda *given: None)
        patch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda given: True)
        q = torch.zeros(1, 5, 2, 64).as_subclass(OnGPU)
        assert not blocks.takes_last_keys_apart(q)
        patch.setattr(model, "attention", plain)
        assert blocks.takes_last_keys_apart(q)


def float8(block):
    """In place: its matrices become layers of 8 bits, of no numbers in particular."""
    for layers, names in ((block.self_attn, "qkvo"), (block.cross_attn, "qo")):
        for name in names:
            setattr(layers, name, FP8Linear(32, 32))
    block.ffn[0], block.ffn[2] = FP8Linear(32, 64), FP8Linear(64, 32)
    return block


class Adapted(FP8Linear):
    def forward(self, x):
        return super().forward(x) + 1


@dataclass(frozen=True)
class Listed(Config):
    window: list = field(default_factory=lambda: [-1, -1])


def test_float8_blocks_on_a_gpu_alone_are_served(monkeypatch, capsys):
    net, x, rope = small_net("s2v"), torch.zeros(1, 2, 3), torch.zeros(2, 9, 1, 4)[:, 3:5]

    def served(change=lambda block: None, x=x, rope=rope, cfg=net.cfg):
        block = copy.deepcopy(net.blocks[0])
        change(block)
        return rows.server(cfg)(block, x, rope)
    assert not served(float8)
    monkeypatch.setattr(rows.fp8, "multiplies_fp8", lambda device: True)
    monkeypatch.setattr(rows.kernels, "works", lambda device: True)
    assert not served()
    for block in net.blocks:
        float8(block)
    assert served() and served(blocks.use_forms_for_compiler) and served(cfg=Listed())
    assert not served(x=x.expand(2, 2, 3)) and not served(x=x.mT) and served(rope=rope.half())
    for other in (torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 1, 8)[..., ::2], torch.zeros(2, 1, 1, 4).expand(2, 2, 1, 4)):
        assert not served(rope=other)
    for layer in (FP8Linear(32, 32, bias=False), FP8Linear(32, 24), torch.nn.Linear(32, 32)):
        assert not served(lambda block, layer=layer: setattr(block.cross_attn, "q", layer))
    assert not served(lambda block: block.ffn[2].register_forward_hook(lambda *given: None))
    assert not served(lambda block: block.self_attn.norm_q.register_forward_pre_hook(lambda *given: None)) and capsys.readouterr().err == ""
    for name, other in (("q", Adapted(32, 32)), ("norm_q", PlusOne(32, 1e-6))):
        assert not served(lambda block, name=name, other=other: setattr(block.self_attn, name, other))
        assert capsys.readouterr().err.count("TypeError: some of its parts were exchanged") == 1
    serves, block = rows.server(net.cfg), copy.deepcopy(net.blocks[0])
    assert serves(block, x, rope)
    block.cross_attn.q = torch.nn.Sequential(block.cross_attn.q)     # later, too
    assert not serves(block, x, rope)
    monkeypatch.setattr(blocks, "compiled", lambda function: function)
    fast = FastDenoiser(net, compile=True)
    assert all(fast.serves(block, x, rope) for block in net.blocks) and not FastDenoiser(net).serves(net.blocks[0], x, rope)
    monkeypatch.setattr(rows, "follows", lambda *given: given[:3] != (Block, net.cfg, True))
    assert not served() and FastDenoiser(net, compile=True).serves(net.blocks[1], x, rope) is (net.blocks[1].inject is None)


def test_weights_that_adjacent_are_one_matrix():
    layers = [FP8Linear(16, n) for n in (8, 24, 8)]
    for i, layer in enumerate(layers):
        layer.weight.data.copy_(torch.full((1, 16), i + 1.0))
    assert rows.adjacent(layers) is None
    before = torch.cat([layer.weight for layer in layers])
    rows.make_adjacent(layers)
    assert torch.equal(rows.adjacent(layers).float(), before.float()) and rows.adjacent(layers).data_ptr() == layers[0].weight.data_ptr()
    assert all(not layer.weight.requires_grad and layer.weight.shape == (n, 16) for layer, n in zip(layers, (8, 24, 8)))
    assert rows.adjacent(layers[::-1]) is None and rows.adjacent([layers[0], layers[2]]) is None
    assert [layer.weight.float().mean().item() for layer in layers] == [1, 2, 3]


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


def test_queries_keys_and_values_of_resident_float8_blocks_are_fused(monkeypatch):
    net = small_net("s2v")
    rows.fuse_qkv(net)
    for block in net.blocks:
        for name in "qkv":
            setattr(block.self_attn, name, FP8Linear(16, 16))
    before = [block.self_attn.q.weight.data_ptr() for block in net.blocks]
    rows.fuse_qkv(net)
    assert before == [block.self_attn.q.weight.data_ptr() for block in net.blocks]                  # nothing here multiplies 8 bits
    monkeypatch.setattr(rows.fp8, "multiplies_fp8", lambda device: True)
    assert rows.fuse_qkv(net) is net
    three = [[getattr(block.self_attn, name) for name in "qkv"] for block in net.blocks]
    assert all(rows.adjacent(layers) is not None for layers in three)


def test_an_8_bit_ring_takes_nothing_of_a_plain_one():
    """But for `at`: its memory is another."""
    assert {name for name, value in vars(live.Ring).items() if callable(value)} - set(vars(Ring8)) == {"at"}


class Placed(model.Denoiser):
    """Text tokens know their place."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.place = torch.nn.Parameter(0.1 * torch.randn(cfg.text_len, cfg.dim))
        self.text.register_forward_hook(lambda module, given, out: out + self.place)


class Unpadded(model.Denoiser):
    """A prompt's own tokens alone."""

    def prepare(self, text, **others):
        cond = super().prepare(text=text, **others)
        return replace(cond, layers=tuple(layer._replace(text=layer.text[:, :, :text.shape[1]]) for layer in cond.layers))


class Longer(model.Denoiser):
    """Keys of another kind behind the prompt's."""

    def prepare(self, **given):
        cond = super().prepare(**given)
        return replace(cond, layers=tuple(layer._replace(text=torch.cat([layer.text, layer.text[:, :, :2]], dim=2)) for layer in cond.layers))


@dataclass(frozen=True)
class StrongCond(model.Cond):
    strength: float = 1.0


class Strong(model.Denoiser):
    """Conditions of its own."""

    def prepare(self, **given):
        return StrongCond(**vars(super().prepare(**given)), strength=2.0)


@pytest.mark.parametrize("kind", [model.Denoiser, Placed, Unpadded, Longer, Strong])
def test_one_key_for_the_padding_where_it_is_alike(kind, monkeypatch):
    """Of a fork's as of ours; what is computed is the same either way, and a compiled denoiser alone trims."""
    torch.manual_seed(0)
    net = kind(small_net("t2v").cfg).eval().requires_grad_(False)
    latents, t, arguments = small_clip(net)
    words, all_keys = arguments["text"].shape[1], net.cfg.text_len
    monkeypatch.setattr(blocks, "compiled", lambda function: function)                   # whose import takes seconds
    blocks.verify(kind, net.cfg)
    fast, want = FastDenoiser(net), net.prepare(**arguments)
    assert not FastDenoiser(net).trims and FastDenoiser(net, compile=True).trims and words + 2 < all_keys
    assert fast.prepare(**arguments).layers[0].text.shape == want.layers[0].text.shape
    fast.trims = True
    cond = fast.prepare(**arguments)
    for layer, plain in zip(cond.layers, want.layers):
        assert layer.text.shape[2] == (words + 1 if kind is model.Denoiser else plain.text.shape[2])
        assert layer.text.untyped_storage().nbytes() == layer.text.nbytes or kind is not model.Denoiser
        assert torch.equal(padding.whole(layer.text, padding.pads_of(cond)), plain.text)
    assert gap(fast(latents, t, cond), net(latents, t, want)) < 2e-6


@pytest.mark.parametrize("S, words, trimmed", [(300, 0, True), (300, 255, True), (300, 256, False), (20, 18, True), (20, 19, False), (20, 20, False)])
def test_a_long_prompt_keeps_its_padding(S, words, trimmed):
    """cuDNN is faster then, and where there is none there is nothing to trim."""
    text = torch.randn(2, 1, S, 1, 4)
    text[:, :, words:] = text[:, :, -1:]
    cond = model.Cond((1, 1, 1), (), None, (model.LayerCond(text), model.LayerCond(2 * text)))
    found = padding.trim(cond, words)
    assert (found is not cond) is trimmed and padding.pads_of(cond) == 1
    if trimmed:
        assert found.pads == S - words and found.grid == cond.grid and [layer.text.shape[2] for layer in found.layers] == [words + 1] * 2


def test_a_fork_may_call_its_prompt_otherwise():
    class Named(model.Denoiser):
        def prepare(self, prompt, **others):
            return super().prepare(text=prompt, **others)
    net = Named(small_net("t2v").cfg).eval().requires_grad_(False)
    latents, t, arguments = small_clip(net)
    fast, arguments["prompt"] = FastDenoiser(net), arguments.pop("text")
    fast.trims = True
    assert gap(fast(latents, t, fast.prepare(**arguments)), net(latents, t, net.prepare(**arguments))) < 2e-6


@torch.no_grad()
def test_keys_of_a_fork_that_lie_otherwise_are_made_contiguous():
    """Keys and values of one product, (n, 2C) for two times (n, C)."""
    both = torch.randn(1, 20, 2 * 2 * 16)
    both[:, 5:] = both[:, -1:].clone()
    text = both.unflatten(2, (2, 2, 16)).permute(2, 0, 1, 3, 4)
    cond = padding.trim(model.Cond((1, 1, 1), (), None, (model.LayerCond(text),)), 5)
    few = cond.layers[0].text
    assert few.is_contiguous() and torch.equal(few, text[:, :, :6]) and not text.is_contiguous()
    q = torch.randn(1, 7, 2, 16)
    assert gap(padding.attend(q, few, cond.pads), model.attention(q, *text)) < 1e-6


@pytest.mark.parametrize("place", [5, 12, 19])
def test_padding_that_differs_in_one_row_of_one_layer_is_kept(place):
    texts = torch.randn(3, 2, 1, 20, 1, 4)
    texts[:, :, :, 5:] = texts[:, :, :, -1:]
    assert padding.trim(cond := model.Cond((1, 1, 1), (), None, tuple(map(model.LayerCond, texts))), 5) is not cond
    texts[1, 0, :, place] *= 1.1
    assert padding.trim(cond, 5) is cond


# -------------------------------------------------- the kernels in Triton's interpreter: TRITON_INTERPRET=1, whose bf16 is off by 0.4%

INTERPRETED = kernels.triton and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, TRITON_INTERPRET=1 and no GPU")
@pytest.mark.parametrize("gate, normed, rotated", ((True, True, True), (False, True, False), (False, False, False)))
def test_kernels_in_the_interpreter(gate, normed, rotated):
    g, n, K, D = torch.Generator().manual_seed(0), 3, 5, 64
    layer, norm, C = FP8Linear(64, K * D), RMSNorm(K * D, 0.5), K * D

    def randn(*shape):
        return torch.randn(shape, generator=g)
    for value, shape in ((layer.weight_scale, (C, 1)), (layer.bias, (C,)), (norm.weight, (C,))):
        value.data.copy_(randn(*shape))
    p, rope = rows.Product(randn(n, 3 * C).bfloat16()[:, C:2 * C], randn(n, 1), layer), randn(2, n, 1, D // 2) if rotated else None
    a, gate = randn(1, n, C), randn(1, 1, C) if gate else None
    b, out, want = a.clone(), torch.empty(1, n, K, D, dtype=torch.bfloat16), torch.empty(1, n, K, D)
    rows.add(a, p, gate)
    rows.normed_row[(n,)](b, *rows.arguments(p, b), b if gate is None else gate, b, b, b, b, 0.0, C, *rows.in_two(C), True, gate is not None,
                          False, 1.0)
    assert gap(b, a) < 1e-6
    with torch.no_grad():
        rows.rotated(p, want, norm if normed else None, rope)
    cos, sin = (p.token_scale,) * 2 if rope is None else rope
    rows.rotated_row[(n,)](*rows.arguments(p, None), norm.weight.detach(), cos, sin, out, norm.eps, C, D // 2, rotated, normed, True)
    assert gap(out, want) < 8e-3


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, TRITON_INTERPRET=1 and no GPU")
@pytest.mark.parametrize("words", [0, 3, 63, 64, 255])
def test_one_key_for_all_the_padding_in_the_interpreter(words):
    g = torch.Generator().manual_seed(0)
    q, text = torch.randn(1, 70, 2, 64, generator=g), torch.randn(2, 1, 300, 2, 64, generator=g)
    text[:, :, words:] = text[:, :, -1:]
    cond = padding.trim(model.Cond((1, 1, 1), (), None, (model.LayerCond(text),)), words)
    assert gap(padding.attend(q.as_subclass(OnGPU), cond.layers[0].text, cond.pads), model.attention(q.double(), *text.double())) < 1e-6
