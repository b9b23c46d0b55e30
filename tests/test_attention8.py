"""Self-attention in 8 bits: what its rounding costs, on a CPU and on the GPU.

    python -m pytest -q -s test_attention8.py

Errors are relative L2 distances from exact attention (float64, or float32 on the CPU) of the same inputs, and printed even when the test
passes.
"""
import pytest
import torch
import torch.nn.functional as F

from fast import attention8 as module
from fast.attention8 import attention8
from fast.fp8 import multiplies_fp8
from model import Config, Denoiser, self_attention, use_attention8

D = 128
gpu = pytest.mark.skipif(not (torch.cuda.is_available() and module.triton and multiplies_fp8(torch.device("cuda"))),
                         reason="needs Triton and a GPU with 8-bit tensor cores")
CASES = {               # factor of q and k, offset of k, offset of v, tolerance
    "normal": (1, 0, 0, 0.045),           # 1.2% q and k, 2.1% v, 2.8% p; e4m3 for q and k would make it 5.3%
    "peaky": (3, 0, 0, 0.06),             # a few keys take all the weight; e4m3 for q and k would make it 13%
    "offset": (1, 8, 4, 0.01),            # what keys and values have in common costs nothing
}


def inputs(case, shape, device="cpu", dtype=torch.bfloat16, seed=0):
    factor, k_offset, v_offset, tolerance = CASES[case]
    g = torch.Generator(device).manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g, device=device) for _ in range(3))
    return [x.to(dtype) for x in (q * factor, k * factor + k_offset, v + v_offset)], tolerance


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def on_copies(q, k, v):
    """attention8 writes over q and k."""
    return attention8(q.clone(), k.clone(), v)


def exact(q, k, v, rows=slice(None)):
    """Attention of some queries, head by head -> (B, rows, K*D) float64"""
    q, k, v = (x.double().transpose(1, 2) for x in (q[:, rows], k, v))
    heads = [F.scaled_dot_product_attention(q[:, i], k[:, i], v[:, i]) for i in range(q.shape[1])]
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize("case", CASES)
def test_rounding(case):
    (q, k, v), tolerance = inputs(case, (2, 300, 2, D), dtype=torch.float32)
    e = error(attention8(q, k, v), exact(q, k, v))
    print(f"\n{case}: CPU, 300 tokens: {e:.4f} (tolerance {tolerance})")
    assert e < tolerance


def test_constant_shifts():
    """A vector added to all keys changes nothing, one added to all values is added to the result."""
    (q, k, v), _ = inputs("normal", (1, 200, 1, D), dtype=torch.float32)
    shift = torch.randn(D)
    assert error(attention8(q, k + 100 * shift, v), attention8(q, k, v)) < 1e-3    # float32 sums, and roundings that fall the other way
    assert error(attention8(q, k, v + shift), attention8(q, k, v) + shift) < 1e-3


def test_zeros():
    x = torch.zeros(1, 10, 1, D)
    assert attention8(x, x, x).eq(0).all()


@gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 1037, 3, D), (2, 257, 2, D), (1, 5, 1, D), (1, 1280, 2, 64), (1, 79200, 2, D)])
def test_gpu(case, shape):
    (q, k, v), tolerance = inputs(case, shape, "cuda")
    rows = torch.randint(shape[1], (min(shape[1], 256),), device="cuda")
    want = exact(q, k, v, rows)
    y = on_copies(q, k, v)
    e = error(y[:, rows], want)
    print(f"\n{case}: GPU, {shape}: {e:.4f} (tolerance {tolerance})")
    assert y.isfinite().all() and e < tolerance
    again = attention8(q, k, v)
    assert again.data_ptr() == q.data_ptr() and again.equal(y)       # in place, and the same every time


@gpu
def test_gpu_takes_what_is_not_contiguous():
    (q, k, v), _ = inputs("normal", (2, 3, 300, D), "cuda")          # heads before tokens
    want = on_copies(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    before = q.clone()
    assert attention8(*(x.transpose(1, 2) for x in (q, k, v))).equal(want) and q.equal(before)


@gpu
def test_gpu_memory():
    """New memory is for the values in float8, small scales, and little more. At full size: at small ones PyTorch's sums over the tokens
    take more (6.8 bytes per number at 20,000 x 1024)."""
    q, k, v = (torch.randn(1, 79200, 40, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attention8(q, k, v)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention8(q, k, v)
    more = (torch.cuda.max_memory_allocated() - start) / v.numel()
    print(f"\n{more:.3f} bytes per number of v")
    assert more < 1.15


@gpu
def test_gpu_without_copy_engine(monkeypatch):
    """The kernel for other GPUs than Hopper reads its tiles by ordinary loads: the same numbers."""
    (q, k, v), _ = inputs("normal", (1, 1037, 2, D), "cuda")
    y = on_copies(q, k, v)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert error(on_copies(q, k, v), y) < 1e-4


@gpu
def test_gpu_large_values():
    (q, k, v), _ = inputs("normal", (1, 700, 2, D), "cuda")
    assert all(attention8(q * s, k * s, v * s).isfinite().all() for s in (1e-12, 1e4, 1e12))


@gpu
def test_gpu_failure_is_one_line(monkeypatch):
    def broken(*args):
        raise RuntimeError("first\nsecond")
    monkeypatch.setattr(module, "attend_item", broken)
    with pytest.raises(ValueError, match=r"fails with Triton .*RuntimeError: first\): leave it out"):
        attention8(*[torch.zeros(1, 8, 1, D, device="cuda")] * 3)


def test_no_tensor_cores(monkeypatch):
    monkeypatch.setattr(module, "multiplies_fp8", lambda device: False)
    with pytest.raises(ValueError, match="leave it out"):
        attention8(*[torch.zeros(1, 8, 1, D, device="meta")] * 3)


def test_only_self_attention_of_every_block_changes():
    """A small denoiser: the velocity moves by what 8-bit attention costs, and not at all without it."""
    cfg = Config(dim=128, ffn_dim=128, n_head=2, n_layer=2, text_dim=16, text_len=4, audio_dim=0)
    torch.manual_seed(0)
    net = Denoiser(cfg).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    cond = net.prepare((2, 8, 8), torch.randn(1, 3, 16), chunk=20)
    latents, t = torch.randn(1, 16, 2, 8, 8), torch.full((1,), 500.0)
    before = net(latents, t, cond)
    use_attention8(net)
    e = error(net(latents, t, cond), before)
    print(f"\nvelocity: {e:.4f}")
    assert 1e-6 < e < 0.03
    assert all(block.attend is attention8 for block in net.blocks) and Denoiser(cfg).blocks[0].attend is self_attention
