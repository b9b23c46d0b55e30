"""Self-attention in 8 bits: int8 queries and keys, float8 probabilities and values, for GPUs with 8-bit tensor cores (Triton).

The two products of attention are most of a denoiser's work at high resolution, and 8-bit tensor cores do them at twice the rate of bf16.
How each operand is rounded follows from what the softmax makes of its errors:

    q      int8, one scale per token and head
    k      int8, one scale per head and block of keys, after its mean over the tokens is taken out: that shifts all scores of a query
           alike, which the softmax ignores. Scores are then exact sums of integers; e4m3 would make four times their error
    p      e4m3, at most 256 = exp2(8 + score - largest); the factor falls out in the division by the sum
    v      e4m3, one scale per head and channel, after its mean over the tokens is taken out. The mean comes back at the end, since
           weights add up to one, corrected by the mean of what rounding changed: bf16 values often lie halfway between two e4m3
           numbers, and what was taken out sends them all the same way (3% of the result at 35,074 tokens, 6% at 79,200)

Tensor cores add e4m3 products in about 14 bits, too few for a sum over all tokens: each block of keys starts at zero, and the blocks are
added in float32. v is stored channel by channel, as 8-bit tensor cores want it, and in the order of tokens in which a thread holds its
probabilities, so that these go from the first product into the second without leaving their registers.

Only v needs new memory. The int8 numbers of one token's head lie in the first half of the place where its bf16 numbers were, and those of
the queries are read by one program alone, which at its end writes the result over them.

Axes    B batch   N tokens   K heads   D head width   C = K*D
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import torch
import torch.nn.functional as F

from fast.fp8 import E4M3, MAX, TINY, cast, multiplies_fp8
from fast.kernels import jit, know_attention, on, triton

if triton:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
QUERIES = 64                                                         # of one program: three programs share a processor of Hopper
KEYS = 128                                                           # in a block; the 8-bit tensors are padded to whole blocks
STAGES = 2                                                           # blocks in flight


# --------------------------------------------------------------------------------------------------------------------- the kernels

@jit
def quantize_rows(x_ptr, mean_ptr, y_ptr, scale_ptr, factor, N, C, D: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """ROWS tokens of one head: x (N, C) bf16 less its mean (C,) -> y int8 (N, K, 2, D) in the same memory, of which [:, :, 0] is written,
    and scale * factor, one per token (K, programs * ROWS) or, if SHARED, one per program and without the mean (K, programs)."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, channel = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    place, inside = token[:, None].to(tl.int64) * C + head * D, token[:, None] < N
    x = tl.load(x_ptr + place + channel[None, :], mask=inside, other=0).to(tl.float32)
    if SHARED:
        x = tl.where(inside, x - tl.load(mean_ptr + head * D + channel)[None, :], 0)
    largest = tl.max(tl.abs(x), 1)                                   # (ROWS,)
    if SHARED:
        largest = tl.zeros_like(largest) + tl.max(largest, 0)
    scale = tl.maximum(largest / 127, 1.1754943508222875e-38)        # TINY
    tl.debug_barrier()                                               # all threads have read x before the first writes y
    tl.store(y_ptr + 2 * place + channel[None, :], tl.floor(x / scale[:, None] + 0.5).to(tl.int8), mask=inside)
    programs = tl.num_programs(0)
    if SHARED:
        tl.store(scale_ptr + head * programs + token // ROWS, scale * factor, mask=token == block * ROWS)
    else:
        tl.store(scale_ptr + head * programs * ROWS + token, scale * factor)


@jit
def quantize_columns(x_ptr, mean_ptr, scale_ptr, y_ptr, sum_ptr, N, C, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS tokens of one head: x (N, C) bf16 -> (x - mean) / scale in e4m3, y (C, tokens), and its sum over them, (programs, C).

    Place 4c + 2h + e of each 16 tokens holds token 8h + 2c + e (c 0..3; h, e 0..1), as `attend` orders the probabilities.
    """
    place, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * D + tl.arange(0, D)
    token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    inside = token[:, None] < N
    x = tl.load(x_ptr + token[:, None].to(tl.int64) * C + channel[None, :], mask=inside, other=0).to(tl.float32)
    x = tl.where(inside, (x - tl.load(mean_ptr + channel)[None, :]) / tl.load(scale_ptr + channel)[None, :], 0)
    y = x.to(tl.float8e4nv)
    tl.store(y_ptr + channel[None, :].to(tl.int64) * (tl.num_programs(0) * ROWS) + place[:, None], y)
    tl.store(sum_ptr + tl.program_id(0) * C + channel, tl.sum(y.to(tl.float32), 0))


@jit
def tile(x, row, column, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """(ROWS, COLUMNS) of a matrix of so many rows, zeros behind the last, by Hopper's copy engine or by ordinary loads."""
    if TMA:
        return x.load([row, column])
    else:
        place = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
        return tl.load(x + tl.cast(row, tl.int64) * stride + column + place, mask=row + tl.arange(0, ROWS)[:, None] < rows, other=0.0)


@jit
def attend(q, k, v, y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, N, C, width,
           D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr):
    """ROWS queries of one head against all keys: softmax in powers of two with a running maximum, sums in float32.

    q and k (N, 2C) int8, see `quantize_rows`, v (C, width) e4m3 with zeros behind the last token -> y (N, C) bf16, which may be q's memory
    """
    token, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    channel, blocks = head * D + tl.arange(0, D), width // KEYS
    q = tile(q, tl.program_id(0) * ROWS, head * 2 * D, N, 2 * C, ROWS, D, TMA)                                # (ROWS, D)
    q_scale = tl.load(q_scale_ptr + head * width + token)
    k_scale_ptr += head * blocks
    k_scale = tl.load(k_scale_ptr)
    top = tl.full([ROWS], float("-inf"), tl.float32)                 # the largest score so far, less 8
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        score = tl.dot(q, tile(k, block * KEYS, head * 2 * D, N, 2 * C, KEYS, D, TMA).T).to(tl.float32)
        scale = tl.minimum(q_scale * k_scale, 4)                     # or p could pass 448, where float32 has no fractions left
        higher = tl.maximum(top, tl.max(score, 1) * scale - 8)
        p = tl.exp2(score * scale[:, None] - higher[:, None])        # (ROWS, KEYS)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(tl.float8e4nv).reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
        acc = acc * shrink[:, None] + tl.dot(p, tile(v, head * D, block * KEYS, C, width, D, KEYS, TMA).T)
        top = higher
        k_scale = tl.load(k_scale_ptr + block + 1)                   # of the next block; one more than there are is allocated
    total -= (width - N) * tl.exp2(-top)                             # keys behind the last token scored 0, and that is never above the
    y = acc * tl.load(v_scale_ptr + channel)[None, :] / total[:, None] + tl.load(v_mean_ptr + channel)[None, :]  # top: scores average 0
    tl.store(y_ptr + token[:, None].to(tl.int64) * C + channel[None, :], y.to(tl.bfloat16), mask=token[:, None] < N)


# ------------------------------------------------------------------------------------------------------------------ the function

def check(device):
    """raises ValueError on a GPU without 8-bit tensor cores, or without Triton. A CPU will do: there the rounding is imitated"""
    if device.type != "cpu" and (triton is None or not multiplies_fp8(device)):
        raise ValueError("8-bit attention wants Triton and an NVIDIA GPU of compute capability 8.9 or more: leave it out on this machine")
    if not know_attention():
        raise ValueError("8-bit attention wants model.attention to be a plain softmax, that of this fork is not: leave it out")


def attention8(q, k, v, layer=None):
    """Attention of a sequence to itself in 8 bits. On a CPU the same rounding is followed by exact attention. No gradients.

    q, k, v  (B, N, K, D), D a power of two from 32 on. On a GPU bfloat16, and if contiguous q and k are written over
    returns  (B, N, K*D), in q's memory if that was written over; off by 3.6% of its norm on normally distributed inputs
    raises   ValueError on a GPU without 8-bit tensor cores, without Triton, or where Triton fails
    """
    check(q.device)
    if q.device.type == "cpu":
        return emulated(q, k, v)
    heads, dtype, (q, k, v) = q.shape[2], q.dtype, (x.to(torch.bfloat16).flatten(2).contiguous() for x in (q, k, v))            # (B, N, C)
    try:
        with on(q.device):
            for item in zip(q, k, v):
                attend_item(*item, heads)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                                       # of many kinds: no C compiler, a kernel that does not compile or fit
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        raise ValueError(f"8-bit attention fails with Triton {triton.__version__} on {torch.cuda.get_device_name(q.device)} "
                         f"({type(error).__name__}: {reason}): leave it out on this machine") from error
    return q.to(dtype)


def attend_item(q, k, v, heads):
    """q, k, v (N, C) bf16, contiguous. The result takes the place of q; k is lost"""
    (N, C), device = q.shape, q.device
    D, blocks = C // heads, triton.cdiv(N, KEYS)
    width, grid = blocks * KEYS, (blocks, heads)
    k_mean, v_mean, (low, high) = k.mean(0, dtype=torch.float32), v.mean(0, dtype=torch.float32), v.aminmax(dim=0)
    v_scale = (torch.maximum(high - v_mean, v_mean - low) / MAX).clamp(min=TINY)                        # (C,)
    q8, k8, v8 = q.view(torch.int8), k.view(torch.int8), torch.empty(C, width, dtype=E4M3, device=device)
    q_scale, k_scale, v_sum = (torch.empty(n, device=device) for n in (heads * width, heads * blocks + 1, blocks * C))
    quantize_rows[grid](q, k_mean, q8, q_scale, LOG2_E * D ** -0.5, N, C, D, KEYS, SHARED=False)
    quantize_rows[grid](k, k_mean, k8, k_scale, 1.0, N, C, D, KEYS, SHARED=True)
    quantize_columns[grid](v, v_mean, v_scale, v8, v_sum, N, C, D, KEYS, num_warps=8)
    v_mean -= v_scale * v_sum.view(blocks, C).sum(0) / N             # (C,)
    tma = torch.cuda.get_device_capability(device)[0] == 9           # measured there alone
    if tma:
        q8, k8, v8 = (TensorDescriptor.from_tensor(x, shape) for x, shape in ((q8, [QUERIES, D]), (k8, [KEYS, D]), (v8, [D, KEYS])))
    attend[triton.cdiv(N, QUERIES), heads](q8, k8, v8, q, q_scale, k_scale, v_scale, v_mean, N, C, width, D, QUERIES, KEYS, STAGES, tma)


def emulated(q, k, v):
    """What `attention8` computes, but for the rounding of the probabilities; any float, any device."""
    def int8(x, dims):
        scale = (x.abs().amax(dims, keepdim=True) / 127).clamp(min=TINY)
        return (x / scale).round() * scale
    q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
    k = k - k.mean(1, keepdim=True)
    k = torch.cat([int8(block, (1, 3)) for block in k.split(KEYS, dim=1)], dim=1)
    rest = v - v.mean(1, keepdim=True)
    scale = (rest.abs().amax(1, keepdim=True) / MAX).clamp(min=TINY)
    rest = cast(rest / scale).float() * scale
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (int8(q, 3), k, rest + (v - rest).mean(1, keepdim=True))))
    return y.transpose(1, 2).flatten(2).to(dtype)
