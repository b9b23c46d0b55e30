"""Two Triton kernels, for what neither torch.compile nor cuDNN does in one trip through memory on an NVIDIA GPU.

    quantize_rows    `fp8.quantize` of what comes from a matrix product or from attention      2 to 3 times as fast as compiled PyTorch (H200)
    attend_last      the last few keys of self-attention, see `model.self_attention`           4 times as fast as a second attention, joined

Both are exact but for rounding, and everything works without them: `triton` is None where it is not installed.
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                                                  # comes with torch for NVIDIA GPUs
    triton = None


def jit(function):
    """Compiled once for all numbers of tokens, at the first call."""
    return triton.jit(function, do_not_specialize=["n", "N", "first"]) if triton else function


# ------------------------------------------------------------------------------------------------------------------ rows to float8

@jit
def quantize_row(x_ptr, y_ptr, scale_ptr, C: tl.constexpr, WIDTH: tl.constexpr):
    """One row, held in registers: x (n, C) any float -> e4m3 (n, C), its scale (n,)"""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * C + channel, mask=channel < C, other=0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / 448, 1.1754943508222875e-38)                # fp8.MAX, fp8.TINY
    tl.store(y_ptr + row * C + channel, (x * (1 / scale)).to(tl.float8e4nv), mask=channel < C)       # nearest even; saturates, as fp8.cast does
    tl.store(scale_ptr + row, scale)


@torch.library.custom_op("wan::quantize_rows", mutates_args=(), device_types="cuda", schema="(Tensor x) -> (Tensor, Tensor)")
def quantize_rows(x):
    """x (n, C) any float, on a GPU -> as `fp8.quantize`: e4m3 (n, C), scale (n, 1) float32. One custom operation for torch.compile"""
    y, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format), x.new_empty(len(x), 1, dtype=torch.float32)
    with torch.cuda.device(x.device):
        quantize_row[(len(x),)](x.contiguous(), y, scale, x.shape[1], triton.next_power_of_2(x.shape[1]))
    return y, scale


@quantize_rows.register_fake
def _(x):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], 1, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------ the last keys of attention

@jit
def attend_more(q_ptr, k_ptr, v_ptr, y_ptr, sum_ptr, scale, n, N, first, C, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """ROWS queries of one head: attention y (n, C) to the keys before `first` -> to all N keys, in the place of q (n, C). k, v (N, C)"""
    token, head, key = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), first + tl.arange(0, KEYS)
    column = head * D + tl.arange(0, D)[None, :]
    place, inside = token[:, None].to(tl.int64) * C + column, token[:, None] < n
    there, known = key[:, None].to(tl.int64) * C + column, key[:, None] < N
    q, y = tl.load(q_ptr + place, mask=inside, other=0), tl.load(y_ptr + place, mask=inside, other=0)
    k, v = tl.load(k_ptr + there, mask=known, other=0), tl.load(v_ptr + there, mask=known, other=0)
    score = tl.where(key[None, :] < N, tl.dot(q, tl.trans(k)) * scale, float("-inf"))                # (ROWS, KEYS)
    before = tl.load(sum_ptr + head * n + token, mask=token < n, other=0)
    top = tl.maximum(before, tl.max(score, 1))
    p, old = tl.exp(score - top[:, None]), tl.exp(before - top)
    y = (y * old[:, None] + tl.dot(p.to(v.dtype), v)) / (old + tl.sum(p, 1))[:, None]
    tl.debug_barrier()                                               # all threads have read q before the first writes there
    tl.store(q_ptr + place, y.to(q_ptr.dtype.element_ty), mask=inside)


def attend_last(q, k, v, y, sums, first):
    """Attention to the keys before `first` becomes attention to all keys, with the weights that one softmax over all would give them.

    q     (B, n, K, D) bf16, each item contiguous, overwritten by the result        k, v  (B, N, K, D) bf16, N - first at most 128
    y     (B, n, K, D) bf16, attention to the keys before `first`
    sums  (B, K, n, 1) float32, logarithms of the sums of exponentials of the scores that y was made from
    """
    (_, n, K, D), N = q.shape, k.shape[1]
    with torch.cuda.device(q.device):
        for item in zip(q, *(x.contiguous() for x in (k, v, y, sums))):
            attend_more[triton.cdiv(n, 64), K](*item, D ** -0.5, n, N, first, K * D, D, 64, max(16, triton.next_power_of_2(N - first)))
