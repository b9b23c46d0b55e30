"""The Triton kernels, and self-attention in parts.  python -m pytest -q -s test_kernels.py

The kernels run on an NVIDIA GPU. Without one, that of attention runs in Triton's interpreter, where Triton is installed, in float32 (not the cast: the
interpreter of Triton 3.6 makes 64 of 127 there):
    TRITON_INTERPRET=1 python -m pytest -q -s test_kernels.py
What is around them is tested on a CPU as well. Errors are relative L2 distances, and printed even when the test passes.
"""
import math
import os
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from fast import fp8
from fast import kernels
import model
from fast.fp8 import E4M3, dequantize, quantize, relative_error
from model import attention, attention_backend, self_attention

D = 128
GPU = torch.cuda.is_available()
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
gpu = pytest.mark.skipif(not (GPU and kernels.triton and fp8.multiplies_fp8(torch.device("cuda"))),
                         reason="needs Triton and a GPU of compute capability 8.9")
runs = pytest.mark.skipif(not (kernels.triton and (GPU or INTERPRETED)), reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
hopper = pytest.mark.skipif(not (GPU and kernels.triton and torch.cuda.get_device_capability()[0] == 9), reason="needs Triton and a Hopper GPU")


@pytest.fixture
def device(monkeypatch):
    if not GPU:
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return "cuda" if GPU else "cpu"


def inputs(B, N, K, factor=1, device="cpu", dtype=torch.float32, last=0):
    """q, k, v (B, N, K, D); the last keys, if any, carry a good part of every query's weight."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, N, K, D, generator=g, device=device) for _ in range(3))
    if last:
        k[:, -last:] += q.mean(1, keepdim=True) * 2
        q = q + k[:, -last:].mean(1, keepdim=True)
    return [x.to(dtype) for x in (q * factor, k * factor, v)]


def exact(q, k, v):
    """-> (B, n, K*D) float64, and the logarithms of the sums of exponentials (B, K, n, 1)"""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * D ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1, keepdim=True)


def joined(q, k, v, y, sums, first):
    """What `attend_last` computes."""
    rest, rest_sums = exact(q, k[:, first:], v[:, first:])
    weight = torch.sigmoid(rest_sums - sums).transpose(1, 2)         # (B, n, K, 1)
    q.copy_(torch.lerp(y.double(), rest.view(y.shape), weight))


# ---- rows to float8

@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_quantize_rows(dtype):
    """One trip through memory gives what `quantize` gives, but for quotients that a rounding sends over the middle of two e4m3 numbers."""
    assert kernels.works(torch.device("cuda"))
    for n, C in ((1, 96), (1000, 5120), (33, 13824)):
        x = torch.randn(n, 2 * C, device="cuda").mul(torch.logspace(-4, 4, n, device="cuda")[:, None]).to(dtype)[:, ::2]
        x[n // 2] = 0
        (q, scale), (want, want_scale) = kernels.quantize_rows(x), quantize(x)
        assert q.shape == want.shape and q.dtype == E4M3 and scale.shape == want_scale.shape and scale.dtype == torch.float32
        assert torch.allclose(scale, want_scale, rtol=1e-6, atol=0) and (q[n // 2].float() == 0).all()
        other = (q.float() != want.float()).double().mean().item()
        print(f"\n{dtype}, ({n}, {C}): {other:.4%} of the values differ, by {relative_error(q.float(), want.float()):.1e} of all")
        assert other < 1e-3 and relative_error(q.float(), want.float()) < 1e-3
    x[0, 3], x[1, 5] = math.nan, math.inf
    y = dequantize(*kernels.quantize_rows(x))
    assert y[:2].isnan().any(1).all() and y[2:].isfinite().all()     # a fault stays visible


def test_quantize_tokens_is_quantize(monkeypatch, capsys):
    """Where Triton is missing or broken too, which is said once; torch.compile sees the shapes, dtypes and strides that will come."""
    class Broken:
        __version__ = "3.0"
    x = torch.randn(40, 64).t()
    for given in (None, Broken):
        monkeypatch.setattr(kernels, "triton", given)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(fp8.quantize_tokens(x), quantize(x)))
    torch.library.opcheck(fp8.quantize_tokens, (x,), test_utils=("test_schema", "test_faketensor"))
    monkeypatch.setattr(kernels, "quantize_rows", lambda x: 1 / 0)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    kernels.works.cache_clear()
    assert not kernels.works(torch.device("cuda")) and not kernels.works(torch.device("cuda"))
    assert capsys.readouterr().err == "Triton 3.0 does not work here (ZeroDivisionError: division by zero): some steps are slower\n"
    kernels.works.cache_clear()


# ---- self-attention in parts

def test_some_queries_after_the_others(monkeypatch):
    """The results take the places of the queries, unless gradients are wanted."""
    monkeypatch.setattr(model, "QUERIES", 64)
    q, k, v = inputs(2, 299, 2)
    want = attention(q, k, v)
    kept = self_attention(q, k, v)
    with torch.no_grad():
        y = self_attention(q, k, v)
    assert torch.equal(kept, want) and relative_error(y, want) < 1e-6 and y.data_ptr() == q.data_ptr() and y.shape == want.shape


@pytest.mark.parametrize("tokens, parts", [(300, 2), (256, 1), (100, 1)])
def test_last_keys_are_apart(tokens, parts, monkeypatch):
    """As on a Hopper GPU, with its two kernels in PyTorch."""
    def cudnn(q, k, v, bias, want_sums):                             # (B, K, n, D)
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return y, sums[..., None]
    calls = []
    monkeypatch.setattr(model, "QUERIES", 64)
    monkeypatch.setattr(model, "LONG", 128)
    monkeypatch.setattr(model, "hopper_attention", lambda q: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    monkeypatch.setattr(kernels, "attend_last", lambda *args: calls.append(args[-1]) or joined(*args))
    q, k, v = inputs(2, tokens, 2, last=10)
    want, _ = exact(q, k, v)
    with torch.no_grad():
        e = relative_error(self_attention(q, k, v), want)
    print(f"\n{tokens} tokens: {e:.1e} (tolerance 3e-6, float32)")
    assert e < 3e-6 and calls == [256] * (5 if parts == 2 else 0)


@runs
@pytest.mark.parametrize("first", (128, 204, 254))
@pytest.mark.parametrize("factor", (1, 3))
def test_attend_last(first, factor, device):
    """From exact attention to the first keys to exact attention to all, for some of the queries."""
    q, k, v = inputs(2, 256 if first == 128 else 255, 3, factor, device, torch.bfloat16 if GPU else torch.float32, last=20)
    rows = slice(40, 139)
    want, (y, sums) = exact(q[:, rows], k, v)[0], exact(q[:, rows], k[:, :first], v[:, :first])
    before, kept = relative_error(y, want), q.clone()
    kernels.attend_last(q[:, rows], k, v, y.view(2, 99, 3, D).to(q.dtype), sums.float(), first)
    e, tolerance = relative_error(q[:, rows].flatten(2), want), 0.005 if GPU else 3e-6
    print(f"\nfactor {factor}, {first} keys and {k.shape[1] - first}: {e:.1e} (tolerance {tolerance}), {before:.1%} before")
    assert e < tolerance < before / 5                                # bf16 rounds twice by 0.2%; float32
    assert torch.equal(q[:, :40], kept[:, :40]) and torch.equal(q[:, 139:], kept[:, 139:])


@hopper
@pytest.mark.parametrize("last", (2, 96, 127))
@pytest.mark.parametrize("factor", (1, 3))
def test_gpu_last_keys(last, factor, monkeypatch):
    """Nearly as close to float64 as cuDNN's kernel alone, also where the last keys carry most of the weight; in three rounds."""
    monkeypatch.setattr(model, "QUERIES", 3000)
    q, k, v = inputs(2, 8192 + last, 4, factor, "cuda", torch.bfloat16, last)
    want, _ = exact(q, k, v)
    with torch.no_grad(), attention_backend(q.device):
        whole, two, alone = (relative_error(y, want) for y in (attention(q, k, v), self_attention(q.clone(), k, v),
                                                               attention(q, k[:, :8192], v[:, :8192])))
    print(f"\nfactor {factor}, 8192 keys and {last}: {two:.2%} in two parts, {whole:.2%} whole, {alone:.0%} without the last keys")
    assert two < 1.5 * whole and alone > 20 * two                    # bf16 rounds twice: seen are 1.0 to 1.33


@hopper
def test_gpu_memory():
    """New memory is for QUERIES results and the sums of their exponentials."""
    q, k, v = (torch.randn(1, 79200, 40, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad(), attention_backend(q.device):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            self_attention(q, k, v)
            torch.cuda.synchronize()
            more = (torch.cuda.max_memory_allocated() - start) / (model.QUERIES * 40 * D)
    print(f"\n{more:.3f} bytes per number of {model.QUERIES} results")
    assert more < 2.2                                                # 2 for bf16, 4 / 128 for a sum
