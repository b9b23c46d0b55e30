"""What stands between the matrix products of a float8 block: each run of operations one trip through memory. Triton, for NVIDIA GPUs.

A block of model.py is eight products of all tokens with a matrix, two attentions, and between them norms, modulation, RoPE, gates, GELU and the
cast to float8. `project` and `finish` do what those of model.Block do, with four kernels in place of torch.compile's: a block of a stream at 704x384
takes 0.70 s for 0.73 (H200).

    products   are multiplied without scales, for which cuBLAS has faster kernels; queries, keys and values as one, where their weights lie together.
               A product's value is raw * scale of its token * scale of its channel + bias; the next kernel works it out
    normed     x + gate * product, its norm, modulated, cast to float8       rotated    a product, its norm, RoPE, into its place
    gelu       of a product, cast to float8                                  add        x + gate * product

On a CPU each does the same in PyTorch, in float32 and without a cast, from nothing but what its kernel is given. `follows` compares that with
model.py's block before it is used: where a fork's block computes something else, its own functions run, compiled.

Axes    n tokens   C channels of a product   K heads   D head width
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import sys
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from fast import fp8, kernels, padding
from fast.kernels import float8_scale, jit, store_float8, store_float8_row, triton
from model import Linear, attention

if triton:
    import triton.language as tl


class Product(NamedTuple):
    """Tokens times a layer's matrix, not yet scaled."""
    raw: torch.Tensor            # (n, C), each row contiguous
    token_scale: torch.Tensor | None                                 # (n, 1)
    layer: nn.Module             # FP8Linear; on a CPU a linear layer

    def value(self):
        """What it is worth (n, C) float32, in PyTorch"""
        y = self.raw.float() if self.token_scale is None else self.raw.float() * self.token_scale * self.layer.weight_scale.T
        return y + self.layer.bias.float()


@cache
def one(device):
    return torch.ones((), device=device)


def adjacent(layers):
    """The weights of layers (C, in) as one matrix, where each begins where the one before it ends, or None."""
    first, *others = (layer.weight for layer in layers)
    end = first.data_ptr() + first.nbytes
    for weight in others:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += weight.nbytes
    return first.as_strided((sum(len(layer.weight) for layer in layers), first.shape[1]), first.stride())


def make_adjacent(layers):
    """Put the weights of float8 layers one behind the other: before anything, a CUDA graph say, knows their addresses."""
    whole = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers])):
        layer.weight = nn.Parameter(part, requires_grad=False)


def multiply(tokens, token_scale, *layers):
    """tokens (n, in) -> Product of each layer"""
    if not tokens.is_cuda:
        return [Product(F.linear(tokens, layer.weight.float()), None, layer) for layer in layers]

    def product(weight):
        return torch._scaled_mm(tokens, weight.t(), one(tokens.device), one(tokens.device), out_dtype=torch.bfloat16, use_fast_accum=fp8.FAST_ACCUM)
    weight = adjacent(layers)
    raws = [product(layer.weight) for layer in layers] if weight is None else product(weight).split([len(layer.weight) for layer in layers], dim=1)
    return [Product(raw, token_scale, layer) for raw, layer in zip(raws, layers)]


# ----------------------------------------------------------------------------------------------------------------------- the kernels

@jit
def product_row(raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, row, channel, there):
    """The worth of a product's row at these channels."""
    raw = tl.load(raw_ptr + row * stride + channel, mask=there, other=0).to(tl.float32)
    y = raw * tl.load(token_scale_ptr + row) * tl.load(channel_scale_ptr + channel, mask=there, other=0)
    return y + tl.load(bias_ptr + channel, mask=there, other=0).to(tl.float32)


@jit
def summed_row(x_ptr, raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, gate_ptr, row, channel, there, C: tl.constexpr,
               ADD: tl.constexpr, GATE: tl.constexpr):
    """x of a row at these channels; if ADD, with a product, in the place of x too."""
    x = tl.load(x_ptr + row * C + channel, mask=there, other=0)
    if ADD:
        more = product_row(raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, row, channel, there)
        if GATE:
            more *= tl.load(gate_ptr + channel, mask=there, other=0)
        x += more
        tl.store(x_ptr + row * C + channel, x, mask=there)
    return x


@jit
def modulated(x, shift_ptr, scale_ptr, channel, there, PLUS: tl.constexpr):
    return x * (PLUS + tl.load(scale_ptr + channel, mask=there, other=0)) + tl.load(shift_ptr + channel, mask=there, other=0)


@jit
def normed_row(x_ptr, raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, gate_ptr, shift_ptr, scale_ptr, y_ptr, y_scale_ptr, eps,
               C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr):
    """A row is its first A channels and the others, at most B, both powers of two: 4,096 and 1,024 take less time than 8,192 do."""
    row, a, b = tl.program_id(0).to(tl.int64), tl.arange(0, A), A + tl.arange(0, B)
    in_a, in_b = a < C, b < C
    xa = summed_row(x_ptr, raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, gate_ptr, row, a, in_a, C, ADD, GATE)
    xb = summed_row(x_ptr, raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, gate_ptr, row, b, in_b, C, ADD, GATE)
    if NORM:
        mean = (tl.sum(xa, 0) + tl.sum(xb, 0)) / C
        xa, xb = xa - mean, tl.where(in_b, xb - mean, 0)
        root = tl.rsqrt((tl.sum(xa * xa, 0) + tl.sum(xb * xb, 0)) / C + eps)
        ya, yb = modulated(xa * root, shift_ptr, scale_ptr, a, in_a, PLUS), modulated(xb * root, shift_ptr, scale_ptr, b, in_b, PLUS)
        y_scale = float8_scale(tl.maximum(tl.max(tl.abs(ya), 0), tl.max(tl.abs(yb), 0)))
        store_float8(ya, y_scale, y_ptr, row, a, in_a, C)
        store_float8(yb, y_scale, y_ptr, row, b, in_b, C)
        tl.store(y_scale_ptr + row, y_scale)


@jit
def rotated_row(raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, eps,
               C: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr):
    """HALF: a head's channel pairs. If not SCALED, the row is what it is worth."""
    row, pair = tl.program_id(0).to(tl.int64), tl.arange(0, triton.next_power_of_2(C // 2))
    channel = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    there = channel < C
    if SCALED:
        x = product_row(raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, row, channel, there)
    else:
        x = tl.load(raw_ptr + row * stride + channel, mask=there, other=0).to(tl.float32)
    if NORM:
        x = tl.where(there, x, 0)
        x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / C + eps)
        x *= tl.load(weight_ptr + channel, mask=there, other=0).to(tl.float32)
    if ROTATE:
        a, b = tl.split(x)
        angle = row * HALF + pair % HALF
        cos, sin = tl.load(cos_ptr + angle, mask=pair < C // 2, other=0), tl.load(sin_ptr + angle, mask=pair < C // 2, other=0)
        x = tl.join(a * cos - b * sin, a * sin + b * cos)
    tl.store(y_ptr + row * C + channel, x.to(tl.bfloat16), mask=there)


@jit
def gelu_row(raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, y_ptr, y_scale_ptr, C: tl.constexpr, WIDTH: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = channel < C
    x = product_row(raw_ptr, stride, token_scale_ptr, channel_scale_ptr, bias_ptr, row, channel, there)
    x = x / (1 + tl.exp2(-2.302208198 * (x + 0.044715 * x * x * x)))                      # blocks.SigmoidGELU; 2 sqrt(2 / pi) log2(e)
    store_float8_row(tl.where(there, x, 0), y_ptr, y_scale_ptr, row, channel, there, C)


def arguments(product, otherwise=None):
    """A product's, of a kernel; of None any tensor's, which the kernel does not touch."""
    if product is None:
        return otherwise, 0, otherwise, otherwise, otherwise
    return product.raw, product.raw.stride(0), product.token_scale, product.layer.weight_scale, product.layer.bias


def in_two(C):
    """A row of C channels as two powers of two: the larger one in it, and room for the rest."""
    first = triton.next_power_of_2(C) // 2
    return first, triton.next_power_of_2(C - first)


def rows8(n, C, device):
    return torch.empty(n, C, device=device, dtype=fp8.E4M3), torch.empty(n, 1, device=device)


# ------------------------------------------------------------------------------------------------------------------- what they are for

def normed(x, shift, scale, eps, product=None, gate=None, plus=1.0):
    """x (1, n, C) float32; with a product x + gate * product takes its place -> its layer norm * (plus + scale) + shift, as `multiply` takes it"""
    if not x.is_cuda:
        if product is not None:
            add(x, product, gate)
        y = x - x.mean(-1, keepdim=True)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * (plus + scale) + shift)[0], None
    n, C = x.shape[1:]
    out = rows8(n, C, x.device)
    with kernels.on(x.device):
        normed_row[(n,)](x, *arguments(product, x), x if gate is None else gate, shift, scale, *out, eps, C, *in_two(C),
                         product is not None, gate is not None, True, plus)
    return out


def add(x, product, gate=None):
    """x + gate * product in the place of x (1, n, C)"""
    if not x.is_cuda:
        x += product.value() * (1 if gate is None else gate)
        return
    n, C = x.shape[1:]
    with kernels.on(x.device):
        normed_row[(n,)](x, *arguments(product), x if gate is None else gate, x, x, x, x, 0.0, C, *in_two(C), True,
                         gate is not None, False, 1.0)


def rotated(product, out, norm=None, rope=None):
    """A product, its RMS norm and RoPE (2, n, 1, D/2), each if given, into the place out (1, n, K, D) -> out"""
    if not out.is_cuda:
        y = product.value()
        if norm is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
        y = y.view(out.shape)
        if rope is not None:
            (a, b), (cos, sin) = y.unflatten(-1, (-1, 2)).unbind(-1), rope
            y = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        return out.copy_(y)
    (n, C), D = product.raw.shape, out.shape[3]
    cos, sin = (product.token_scale,) * 2 if rope is None else rope
    weight, eps = (product.token_scale, 0.0) if norm is None else (norm.weight, norm.eps)
    with kernels.on(out.device):
        rotated_row[(n,)](*arguments(product), weight, cos, sin, out, eps, C, D // 2, rope is not None, norm is not None, True, num_warps=8)
    return out


def rotate(x, rope, out):
    """Rows x (1, n, K, D) any float, on a GPU, rotated by RoPE (2, n, 1, D/2) into the place out (1, n, K, D) bf16"""
    _, n, K, D = x.shape
    with kernels.on(x.device):
        rotated_row[(n,)](x, K * D, x, x, x, x, *rope, out, 0.0, K * D, D // 2, True, False, False, num_warps=8)


def gelu(product):
    """-> the tanh approximation of GELU, as `multiply` takes it"""
    if not product.raw.is_cuda:
        return F.gelu(product.value(), approximate="tanh"), None
    n, C = product.raw.shape
    out = rows8(n, C, product.raw.device)
    with kernels.on(product.raw.device):
        gelu_row[(n,)](*arguments(product), *out, C, triton.next_power_of_2(C), num_warps=8)
    return out


def quantize(y):
    """y (1, n, C) -> as `multiply` takes it"""
    return kernels.quantize_rows(y[0]) if y.is_cuda else (y[0].float(), None)


# ------------------------------------------------------------------------------------------------------- model.Block, results in place

def classes(block):
    """The classes of all that a block is built of, but for what blocks.use_forms_for_compiler and float8 put in."""
    return tuple(nn.Linear if type(part) in (Linear, fp8.FP8Linear) else type(part) for name, part in block.named_modules()
                 if name not in ("ffn.1", "self_attn.rotary"))


@torch.no_grad()
def follows(kind, cfg, audio, made_of=None):
    """Do `project` and `finish` compute what those of this class of blocks do? Tried on a narrow one, on the CPU.

    cfg, audio  as of Block        made_of  `classes` of the block in question, which may have been exchanged after it was built
    """
    g, n, K, D = torch.Generator().manual_seed(0), 5, 2, 24

    def randn(*shape):
        return torch.randn(shape, generator=g)
    try:
        with torch.device("cpu"):
            block = kind(replace(cfg, dim=K * D, ffn_dim=96, n_head=K), audio).float()
            if made_of not in (None, classes(block)):
                raise TypeError("some of its parts were exchanged")
            for p in block.parameters():
                p.copy_(randn(*p.shape) / (p[0].numel() if p.ndim > 1 else 1) ** 0.5)
            x, mod, rope, text = randn(1, n, K * D), randn(6, 1, 1, K * D), randn(2, n, 1, D // 2), randn(2, 1, 7, K, D)
            parts, mine, y = block.project(x, mod, rope), torch.empty(3, 1, n, K, D), x.clone()
            project(block, y, mod, rope, *mine)
            finish(block, y, attention(*mine), mod, text, 3)
            want = torch.stack([block.finish(x, attention(*parts), mod, padding.whole(text, 3)), *(part.flatten(2) for part in parts)])
        gap = float((torch.stack([y, *mine.flatten(3)]) - want).norm() / want.norm())
        same, reason = gap < 1e-4, f"relative L2 {gap:.1e}"          # rounding gives 1e-7
    except Exception as error:                                       # of a block that is built in another way
        same, reason = False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    if not same:
        print(f"fast/rows.py does not compute what {kind.__name__}.project and finish do ({reason}): these run, compiled, which is slower",
              file=sys.stderr)
    return same


def matrices(block):
    """The layers of a block that all its tokens go through."""
    attn, cross = block.self_attn, block.cross_attn
    return attn.q, attn.k, attn.v, attn.o, cross.q, cross.o, block.ffn[0], block.ffn[2]


def server(cfg):
    """-> function(block, x, rope): are these the kernels for a block of a network of this Config, these tokens x and this RoPE?"""
    same = cache(lambda kind, audio, made_of: follows(kind, cfg, audio, made_of))

    @cache
    def modules(block):
        """All of a block that computes what model.py's does; none of another."""
        return tuple(block.modules()) if same(type(block), getattr(block, "inject", None) is not None, classes(block)) else ()

    def serves(block, x, rope):
        return len(x) == 1 and x.is_contiguous() and rope.shape[2] == 1 and rope[0].is_contiguous() and fp8.multiplies_fp8(x.device) and \
            kernels.works(x.device) and len(modules(block)) > 0 and \
            all(type(layer) is fp8.FP8Linear and layer.bias is not None and not any(side % fp8.ALIGN for side in layer.weight.shape)
                for layer in matrices(block)) and \
            not any(module._forward_hooks or module._forward_pre_hooks for module in modules(block))     # which would not be called
    return serves


def fuse_qkv(net):
    """Lay the weights of each block's queries, keys and values one behind the other, if they are float8 and all blocks are on a GPU: one product for
    three is 0.6% of a block of a stream. Elsewhere blocks that come and go give the same bits as blocks that stay, and so they are left apart."""
    for block in net.blocks if isinstance(net.blocks, nn.ModuleList) else ():
        three = [getattr(getattr(block, "self_attn", None), name, None) for name in "qkv"]             # a fork may have others
        if all(isinstance(layer, fp8.FP8Linear) and fp8.multiplies_fp8(layer.weight.device) for layer in three) and adjacent(three) is None:
            make_adjacent(three)
    torch.cuda.empty_cache()                                         # where they were
    return net


def project(block, x, mod, rope, q, k, v):
    """Block.project of x (1, n, C) into q, k, v (1, n, K, D)"""
    attn, (shift1, scale1) = block.self_attn, mod[:2]
    products = multiply(*normed(x, shift1, scale1, block.eps), attn.q, attn.k, attn.v)
    for product, out, norm in zip(products, (q, k, v), (attn.norm_q, attn.norm_k, None)):
        rotated(product, out, norm, None if norm is None else rope)


def finish(block, x, y, mod, text, pads):
    """Block.finish in place of x (1, n, C), y (1, n, C) from attention.  pads  keys that the last one of text stands for"""
    cross, norm, (gate1, shift2, scale2, gate2) = block.cross_attn, block.cross_norm, mod[2:]
    product, = multiply(*quantize(y), block.self_attn.o)
    product, = multiply(*normed(x, norm.bias.float(), norm.weight.float(), norm.eps, product, gate1, plus=0.0), cross.q)
    q = rotated(product, cross.split(torch.empty_like(x, dtype=text.dtype)), cross.norm_q)
    product, = multiply(*quantize(padding.attend(q, text, pads)), cross.o)
    product, = multiply(*normed(x, shift2, scale2, block.eps, product), block.ffn[0])
    product, = multiply(*gelu(product), block.ffn[2])
    add(x, product, gate2)
