"""Two Triton kernels, each one trip through memory where torch.compile or cuDNN need several.

    quantize_rows    `fp8.quantize` on a GPU: 0.13 ms where compiled PyTorch takes 0.31 (35,074 x 5120 bf16, H200)
    attend_last      the last few keys of self-attention, see blocks.py: 0.28 ms where a second attention and joining take 1.0

Both give the same numbers but for rounding, and where Triton is missing (`triton` is then None) or does not work, everything runs without them.
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import sys
from contextlib import nullcontext
from functools import cache

import torch

import model

try:
    import triton
    import triton.language as tl
except ImportError:                                                  # comes with torch for NVIDIA GPUs
    triton = None


def jit(function):
    """Compiled once for all numbers of tokens and sizes of a picture, at the first call."""
    return triton.jit(function, do_not_specialize=["n", "N", "first", "h", "w", "cached", "residual"]) if triton else function


def on(device):
    """Kernels inside are launched on this device, whichever is the current one; in Triton's interpreter it is a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def works(device):
    """Does Triton compile for this device? It wants an NVIDIA GPU, a C compiler and, for float8, compute capability 8.9. Tried once."""
    if triton is None or device.type != "cuda":
        return False
    try:
        quantize_rows(torch.ones(1, 128, device=device))
    except Exception as error:                                       # of many kinds
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        print(f"Triton {triton.__version__} does not work here ({type(error).__name__}: {reason}): some steps are slower", file=sys.stderr)
        return False
    return True


@cache
@torch.no_grad()
def know_attention():
    """Is model.attention what every kernel for attention computes, softmax(q k / sqrt(D)) v? Tried on a few numbers: a fork may have another."""
    g = torch.Generator("cpu").manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64, generator=g, device="cpu")             # (1, K, N, D)
    want = torch.softmax(q @ k.mT / 8 ** 0.5, dim=-1) @ v
    gap = float((model.attention(*(x.transpose(1, 2).float() for x in (q, k, v))) - want.transpose(1, 2).flatten(2)).norm() / want.norm())
    if not gap < 1e-4:                                               # rounding gives 1e-7
        print(f"fast/ has no kernels for what model.attention computes (relative L2 {gap:.1e} from softmax): it runs as it is", file=sys.stderr)
    return gap < 1e-4


# ------------------------------------------------------------------------------------------------------------------ rows to float8

@jit
def float8_scale(top):
    """Of a row whose largest magnitude this is."""
    return tl.maximum(top / 448, 1.1754943508222875e-38)             # fp8.MAX, fp8.TINY


@jit
def store_float8(x, scale, y_ptr, row, channel, there, C: tl.constexpr):
    """Channels of a row -> e4m3 y (n, C)"""
    tl.store(y_ptr + row * C + channel, (x * (1 / scale)).to(tl.float8e4nv), mask=there)             # nearest even; saturates, as fp8.cast does


@jit
def store_float8_row(x, y_ptr, scale_ptr, row, channel, there, C: tl.constexpr):
    """A row in registers, 0 where there is no channel -> e4m3 y (n, C), its scale (n,)"""
    scale = float8_scale(tl.max(tl.abs(x), 0))
    store_float8(x, scale, y_ptr, row, channel, there, C)
    tl.store(scale_ptr + row, scale)


@jit
def quantize_row(x_ptr, y_ptr, scale_ptr, C: tl.constexpr, WIDTH: tl.constexpr):
    """x (n, C) any float -> e4m3 (n, C), its scale (n,)"""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = channel < C
    store_float8_row(tl.load(x_ptr + row * C + channel, mask=there, other=0).to(tl.float32), y_ptr, scale_ptr, row, channel, there, C)


def quantize_rows(x):
    """x (n, C) any float, on a GPU -> as `fp8.quantize`: e4m3 (n, C), scale (n, 1) float32"""
    n, C = x.shape
    y, scale = x.new_empty(n, C, dtype=torch.float8_e4m3fn), x.new_empty(n, 1, dtype=torch.float32)
    with on(x.device):
        quantize_row[(n,)](x.contiguous(), y, scale, C, triton.next_power_of_2(C))
    return y, scale


# ------------------------------------------------------------------------------------------------------ the last keys of attention

@jit
def attend_more(q_ptr, k_ptr, v_ptr, y_ptr, sum_ptr, scale, n, N, first, C, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """ROWS queries of one head: attention y (n, C) to the keys before `first` -> to all N keys, in the place of q (n, C). k, v (N, C)"""
    head, token, key = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS), first + tl.arange(0, KEYS)
    column = head * D + tl.arange(0, D)[None, :]
    place, inside = token[:, None].to(tl.int64) * C + column, token[:, None] < n
    there, known = key[:, None].to(tl.int64) * C + column, key[:, None] < N
    q, y = tl.load(q_ptr + place, mask=inside, other=0), tl.load(y_ptr + place, mask=inside, other=0)
    k, v = tl.load(k_ptr + there, mask=known, other=0), tl.load(v_ptr + there, mask=known, other=0)
    score = tl.where(key[None, :] < N, tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))         # (ROWS, KEYS), powers of two
    before = tl.load(sum_ptr + head * n + token, mask=token < n, other=0) * 1.4426950408889634
    top = tl.maximum(before, tl.max(score, 1))
    p, old = tl.exp2(score - top[:, None]), tl.exp2(before - top)
    y = (y * old[:, None] + tl.dot(p.to(v.dtype), v)) * (1 / (old + tl.sum(p, 1)))[:, None]
    tl.debug_barrier()                                               # all threads have read q before the first writes there
    tl.store(q_ptr + place, y.to(q_ptr.dtype.element_ty), mask=inside)


def attend_last(q, k, v, y, sums, first):
    """Attention to the keys before `first` becomes attention to all keys, with the weights that one softmax over all would give them.

    q     (B, n, K, D) bf16, each item contiguous, overwritten by the result        k, v  (B, N, K, D) bf16, N - first at most 128
    y     (B, n, K, D) bf16, attention to the keys before `first`
    sums  (B, K, n, 1) float32, logarithms of the sums of exponentials of the scores that y was made from
    """
    (_, n, K, D), N = q.shape, k.shape[1]
    with on(q.device):
        for item in zip(q, *(x.contiguous() for x in (k, v, y, sums))):
            attend_more[K, triton.cdiv(n, 64)](*item, D ** -0.5, n, N, first, K * D, D, 64, max(16, triton.next_power_of_2(N - first)))
