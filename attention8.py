"""Self-attention in 8 bits: int8 queries and keys, float8 probabilities and values, for GPUs with 8-bit tensor cores (Triton).

The two products of attention are a denoiser's largest cost at high resolution, and 8-bit tensor cores do them at twice the rate of bf16.
How each operand is rounded follows from what the softmax does to errors:

    q      int8, one scale per token and head
    k      int8, one scale per head and block of keys, after its mean over the tokens is taken out. That shifts all scores of a query alike,
           which the softmax ignores, and it takes out what keys have in common, which would waste their few bits. Scores are then exact
           sums of integers. (With e4m3 the scores' errors are four times as large, and the exponential amplifies them.)
    v      e4m3, one scale per head and channel, after its mean over the tokens is taken out; weights that add up to one give it back
    p      e4m3, between 0 and 256: exp2(score - largest + 8), the factor falls out in the division by the sum

Tensor cores add e4m3 products in about 14 bits, too few for the sum over all tokens: each block of keys starts at zero, and the blocks are
added in float32. v is stored channel by channel, (K*D, N), as 8-bit tensor cores want it, and in the order of tokens in which a thread
holds its probabilities, so that these go from one product into the next without leaving their registers.

Axes    B batch   N tokens   K heads   D head width
"""
import torch
import torch.nn.functional as F

from fp8 import MAX, TINY, cast, multiplies_fp8

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                                                  # no GPU here
    triton = None

LOG2_E = 1.4426950408889634
QUERIES = 128                                                        # of one program
ORDER = [8 * (i // 2 % 2) + 2 * (i // 4) + i % 2 for i in range(16)]  # which token of each 16 stands at place i of v


def key_block(device):
    """(keys per block, blocks in flight): Hopper has 227 KB of shared memory per processor, Ada 99."""
    return (128, 3) if torch.cuda.get_device_capability(device)[0] >= 9 else (64, 2)


# --------------------------------------------------------------------------------------------------------------------- the kernels

def jit(function):
    """Compiled once for all N, at the first call."""
    return triton.jit(function, do_not_specialize=["N"]) if triton else function


@jit
def quantize_qk(x_ptr, mean_ptr, y_ptr, scale_ptr, factor, N, C, D: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """One head of ROWS tokens of x (N, C) bf16, less its mean (C,) -> y int8, scale * factor (K, N), or (K, N/ROWS) if SHARED."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, channel = block * ROWS + tl.arange(0, ROWS), head * D + tl.arange(0, D)
    place, inside = token[:, None].to(tl.int64) * C + channel[None, :], token[:, None] < N
    x = tl.load(x_ptr + place, mask=inside, other=0).to(tl.float32)
    if SHARED:
        x = tl.where(inside, x - tl.load(mean_ptr + channel)[None, :], 0)
    scale = tl.max(tl.abs(x), 1)                                     # (ROWS,)
    if SHARED:
        scale = tl.zeros_like(scale) + tl.max(scale, 0)
    scale = tl.maximum(scale / 127, 1.1754943508222875e-38)
    tl.store(y_ptr + place, tl.floor(x / scale[:, None] + 0.5).to(tl.int8), mask=inside)
    if SHARED:
        tl.store(scale_ptr + head * tl.num_programs(0) + block + tl.zeros_like(token), scale * factor, mask=token == block * ROWS)
    else:
        tl.store(scale_ptr + head * N + token, scale * factor, mask=token < N)


@jit
def quantize_v(x_ptr, mean_ptr, scale_ptr, y_ptr, N, C, width, D: tl.constexpr, ROWS: tl.constexpr):
    """One head of ROWS tokens of x (N, C) bf16 -> y (C, width) e4m3, (x - mean) / scale, tokens in ORDER, zeros behind the last."""
    place, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * D + tl.arange(0, D)
    token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    inside = token[:, None] < N
    x = tl.load(x_ptr + token[:, None].to(tl.int64) * C + channel[None, :], mask=inside, other=0).to(tl.float32)
    x = tl.where(inside, (x - tl.load(mean_ptr + channel)[None, :]) / tl.load(scale_ptr + channel)[None, :], 0)
    tl.store(y_ptr + channel[None, :].to(tl.int64) * width + place[:, None], x.to(tl.float8e4nv), mask=place[:, None] < width)


@jit
def attend(q_desc, k_desc, v_desc, y_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, N,
           D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr):
    """ROWS queries of one head against all keys: online softmax in powers of two, sums in float32."""
    start, head = tl.program_id(0) * ROWS, tl.program_id(1)
    token, channel, blocks = start + tl.arange(0, ROWS), head * D + tl.arange(0, D), tl.cdiv(N, KEYS)
    q = q_desc.load([start, head * D])                               # (ROWS, D)
    q_scale = tl.load(q_scale_ptr + head * N + token, mask=token < N, other=0)
    k_scale_ptr += head * blocks
    top = tl.full([ROWS], float("-inf"), tl.float32)                 # the largest score so far, less 8
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    k_scale = tl.load(k_scale_ptr)
    for block in tl.range(0, blocks, num_stages=STAGES):
        k = k_desc.load([block * KEYS, head * D])                    # (KEYS, D), zeros behind the last token
        score, scale = tl.dot(q, k.T).to(tl.float32), q_scale * k_scale
        higher = tl.maximum(top, tl.max(score, 1) * scale - 8)
        p = tl.exp2(score * scale[:, None] - higher[:, None])        # (ROWS, KEYS), at most 256
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(tl.float8e4nv).reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
        v = v_desc.load([head * D, block * KEYS])                    # (D, KEYS)
        acc = acc * shrink[:, None] + tl.dot(p, v.T)
        top = higher
        k_scale = tl.load(k_scale_ptr + block + 1)                   # for the next block; one more than there are is allocated
    total -= (blocks * KEYS - N) * tl.exp2(-top)                     # keys behind the last token scored 0, see `attention8`
    y = acc * tl.load(v_scale_ptr + channel)[None, :] / total[:, None] + tl.load(v_mean_ptr + channel)[None, :]
    y_desc.store([start, head * D], y.to(tl.bfloat16))


# ------------------------------------------------------------------------------------------------------------------ the function

def attention8(q, k, v, out=None):
    """Scaled dot-product attention of a sequence with itself, in 8 bits. On a CPU the same rounding is followed by exact attention.

    q, k, v  (B, N, K, D) bfloat16 on a GPU, D a power of two        out  takes the result; may be the memory of q
    returns  (B, N, K*D): off by about 4% of its norm on normally distributed inputs. Gradients do not pass
    raises   ValueError on a GPU without 8-bit tensor cores or without Triton
    """
    if q.device.type == "cpu":
        return emulated(q, k, v)
    if triton is None or not multiplies_fp8(q.device):
        raise ValueError("8-bit attention wants Triton and an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell): use bf16")
    out = torch.empty_like(q) if out is None else out
    with torch.cuda.device(q.device):
        for item in zip(q, k, v, out):
            attend_item(*(x.flatten(1) for x in item), q.shape[2])
    return out.flatten(2)


def attend_item(q, k, v, y, heads):
    """q, k, v (N, K*D) bf16 -> y (N, K*D) bf16"""
    (N, C), (keys, stages) = q.shape, key_block(q.device)
    D, blocks = C // heads, triton.cdiv(N, keys)
    q8, k8 = (x.new_empty(N, C, dtype=torch.int8) for x in (q, k))
    v8 = v.new_empty(C, triton.cdiv(N, 16) * 16, dtype=torch.float8_e4m3fn)                  # rows start at multiples of 16 bytes
    q_scale, k_scale = q.new_empty(heads, N, dtype=torch.float32), q.new_zeros(heads * blocks + 1, dtype=torch.float32)
    k_mean, v_mean, (low, high) = k.mean(0, dtype=torch.float32), v.mean(0, dtype=torch.float32), v.aminmax(dim=0)
    v_scale = (torch.maximum(high - v_mean, v_mean - low) / MAX).clamp(min=TINY)
    quantize_qk[triton.cdiv(N, keys), heads](q, k_mean, q8, q_scale, LOG2_E * D ** -0.5, N, C, D, keys, SHARED=False)
    quantize_qk[blocks, heads](k, k_mean, k8, k_scale, 1.0, N, C, D, keys, SHARED=True)
    quantize_v[triton.cdiv(N, keys), heads](v, v_mean, v_scale, v8, N, C, v8.shape[1], D, keys)
    shapes = (q8, [QUERIES, D]), (k8, [keys, D]), (v8, [D, keys]), (y, [QUERIES, D])
    attend[triton.cdiv(N, QUERIES), heads](*(TensorDescriptor.from_tensor(*pair) for pair in shapes), q_scale, k_scale, v_scale, v_mean, N,
                                           D, QUERIES, keys, stages, num_warps=8)


def emulated(q, k, v, keys=128):
    """What `attention8` computes, but for the rounding of the probabilities; any float, any device."""
    def int8(x, dims):
        scale = (x.abs().amax(dims, keepdim=True) / 127).clamp(min=TINY)
        return (x / scale).round() * scale
    q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
    k, v_mean = k - k.mean(1, keepdim=True), v.mean(1, keepdim=True)
    k = torch.cat([int8(block, (1, 3)) for block in k.split(keys, dim=1)], dim=1)
    v = v - v_mean
    v_scale = (v.abs().amax(1, keepdim=True) / MAX).clamp(min=TINY)
    v = cast(v / v_scale).float() * v_scale + v_mean
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (int8(q, 3), k, v)))
    return y.transpose(1, 2).flatten(2).to(dtype)
