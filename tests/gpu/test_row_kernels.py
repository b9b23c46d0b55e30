"""The kernels between a float8 block's products, against the same in PyTorch.  pytest -s tests/gpu/test_row_kernels.py"""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from fast import padding, rows
from fast.blocks import finish_in_place, project_into
from fast.fp8 import E4M3, FP8Linear, dequantize, multiplies_fp8, quantize, quantize_weight, relative_error, to_fp8
from model import Block, Config, RMSNorm, attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or not multiplies_fp8(torch.device("cuda")), reason="needs 8-bit tensor cores")
N, K, D = 200, 3, 128
C = K * D


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def product(width, parts=1):
    """A product whose rows are a part of longer ones."""
    layer = FP8Linear(16, width).cuda()
    layer.weight_scale.copy_(randn(width, 1).abs())
    layer.bias.copy_(randn(width, seed=1))
    return rows.Product(randn(N, parts * width, seed=2).bfloat16()[:, -width:], randn(N, 1, seed=3).abs(), layer)


def on_cpu(part):
    if isinstance(part, rows.Product):
        layer = FP8Linear(16, len(part.layer.bias))
        layer.weight_scale.copy_(part.layer.weight_scale)
        layer.bias.copy_(part.layer.bias)
        return rows.Product(part.raw.cpu(), part.token_scale.cpu(), layer)
    return part.cpu() if isinstance(part, (torch.Tensor, nn.Module)) else part


def compare(name, got, want, tolerance):
    e = relative_error(got.cpu(), want)
    print(f"\n{name}: {e:.1e} (tolerance {tolerance:.1e})")
    assert e < tolerance


@torch.no_grad()
@pytest.mark.parametrize("given", ("norm", "gate", "affine", "add"))
def test_norms(given):
    C = 336                                                          # 256 and 80 of 128 channels
    x, shift, scale, gate = randn(1, N, C), *(randn(1, 1, C, seed=i) for i in range(3))
    more = dict(norm=(), gate=(product(C, 3), gate), affine=(product(C), None, 0.0), add=(product(C), gate))[given]
    theirs = x.cpu()
    if given == "add":
        rows.add(x, *more)
        rows.add(theirs, *map(on_cpu, more))
    else:
        y, token_scale = rows.normed(x, shift, scale, 1e-6, *more)
        want, _ = rows.normed(theirs, shift.cpu(), scale.cpu(), 1e-6, *map(on_cpu, more))
        assert y.dtype == E4M3
        compare("norm", dequantize(y, token_scale), dequantize(*quantize(want)), 5e-3)
    compare("x", x, theirs, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("normed, rotated", ((True, True), (True, False), (False, False)))
def test_norm_and_rope(normed, rotated):
    p, norm, rope = product(C, 3), RMSNorm(C, 0.5).cuda(), randn(2, N, 1, D // 2)
    norm.weight.copy_(randn(C, seed=5))
    out = torch.empty(1, N + 7, K, D, device="cuda", dtype=torch.bfloat16)[:, 7:]
    given = norm if normed else None, rope if rotated else None
    want = rows.rotated(on_cpu(p), torch.empty(1, N, K, D), *map(on_cpu, given))
    norm.cuda()
    assert rows.rotated(p, out, *given) is out
    compare("rotated", out, want, 3e-3)


@torch.no_grad()
def test_gelu():
    p = product(13824)
    y, token_scale = rows.gelu(p)
    compare("gelu", dequantize(y, token_scale), dequantize(*quantize(rows.gelu(on_cpu(p))[0])), 5e-3)


@torch.no_grad()
@pytest.mark.parametrize("together", (False, True))
def test_a_block(together):
    """About as far from the block without float8 as its own functions in float8 are."""
    cfg = Config(dim=640, ffn_dim=1792, n_head=5)
    block = Block(cfg, False).cuda()
    for i, p in enumerate(block.parameters()):
        p.copy_(randn(*p.shape, seed=i) / (p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    state = block.state_dict()
    names = [name for name, value in state.items() if value.ndim == 2 and "modulation" not in name]
    with torch.device("meta"):
        fast = to_fp8(Block(cfg, False), [f"{name}_scale" for name in names])
    fast = fast.to_empty(device="cuda")
    fast.load_state_dict({**state, **{n: v for name in names for n, v in zip((name, f"{name}_scale"), quantize_weight(state[name]))}})
    if together:
        rows.fuse_qkv(SimpleNamespace(blocks=nn.ModuleList([fast])))
        assert rows.adjacent([fast.self_attn.q, fast.self_attn.k, fast.self_attn.v]) is not None
    D = cfg.dim // cfg.n_head
    x, mod, rope, text = randn(1, 300, cfg.dim), randn(6, 1, 1, cfg.dim), randn(2, 300, 1, D // 2), randn(2, 1, 40, cfg.n_head, D).bfloat16()
    assert rows.server(cfg)(fast, x, rope)

    def run(block, project, finish, dtype):
        y, parts = x.clone(), torch.empty(3, 1, 300, cfg.n_head, D, device="cuda", dtype=dtype)
        project(block, y, mod, rope, *parts)
        finish(block, y, attention(*parts), mod, text.to(dtype))
        return torch.cat([y.flatten(), parts.float().flatten()])
    want = run(block, project_into, finish_in_place, torch.float32)
    theirs, mine = (relative_error(run(fast, *how, torch.bfloat16), want) for how in ((project_into, finish_in_place),
                                                                                         (rows.project, partial(rows.finish, pads=1))))
    print(f"\na float8 block: {mine:.3%} off, by model.py {theirs:.3%}")
    assert mine < 1.1 * theirs < 0.1


@torch.no_grad()
@pytest.mark.parametrize("words", [0, 5, 63, 64, 130, 250, 400, 511])
def test_one_key_for_all_the_padding_of_a_prompt(words):
    q, text = randn(1, N, K, D).bfloat16(), randn(2, 1, 512, K, D, seed=1).bfloat16()
    text[:, :, words:] = text[:, :, -1:]
    text[0, :, -1] *= 1 + 3 * (words % 2)                            # to half of the queries it matters more
    text[:, :, words:] = text[:, :, -1:]
    few, pads = text[:, :, :words + 1].clone(), 512 - words
    want = attention(q.float().cpu(), *text.float().cpu())
    compare(f"text attention to {words + 1} keys", padding.attend(q, few, pads).float(), want, 5e-3)
