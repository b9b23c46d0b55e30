"""The VAE's 3x3x3 convolutions on Hopper, with the norm and SiLU before them and the sum behind them, in two Triton kernels.

    fill        norm, SiLU, and all that a convolution reads in one buffer: the two frames of the feature cache, the frames, zeros around them
    multiply    a matrix product of that buffer: its rows are pixels, the columns of the weight are the channels of one tap after the other

Every frame of the buffer has one row and one column of zeros more, behind its last. Left of a picture's first column lies the zero column of the row
above, so a tap is a distance in the list of all pixels, the same for each of them, and Hopper's copy engine reads 128 pixels in a row as it
reads any matrix. Results at the zeros, 1% of the pixels, are not written.

`use_kernels` replaces the residual blocks of a VAE by `FastResBlock` and its decoder by `FastDecoder`, after it has compared each kind with vae.py's.
Parameters and feature caches are the same: a stream may go on with either.

Axes    n frames   h w height, width   C channels   R rows of the buffer, (n + 2)(h + 1)(w + 1)
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import sys

import torch
from torch import nn

from fast.kernels import jit, triton, works
from vae import Decoder, ResBlock, new_cache, pointwise

if triton:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 128                                                           # pixels of one program
WIDTHS = (128, 0), (128, 64), (128, 32), (64, 32), (64, 0), (16, 0)  # output channels of one program, in two products
LIMITS = {torch.float16: 0.01, torch.bfloat16: 0.03}                 # of a distance from vae.py; rounding gives 6e-4 and 5e-3


@jit
def fill(x_ptr, cache_ptr, gamma_ptr, y_ptr, next_ptr, cached, n, h, w, eps, C: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """One line of one frame of the buffer: the cache (2, h, w, C), or zeros if not `cached`, then x (n, h, w, C) after norm and SiLU
    -> buffer y (R, C) and the next cache, the buffer's last two frames (2, h, w, C).  eps  the least root of a mean square"""
    line, frame, column, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, COLUMNS)[:, None], tl.arange(0, WIDTH)[None, :]
    real, gamma = channel < C, tl.load(gamma_ptr + channel, mask=channel < C, other=0).to(tl.float32)
    x_ptr += (tl.cast(frame - 2, tl.int64) * h + line) * w * C
    cache_ptr += (tl.cast(frame, tl.int64) * h + line) * w * C
    next_ptr += (tl.cast(frame - n, tl.int64) * h + line) * w * C
    y_ptr += (tl.cast(frame, tl.int64) * (h + 1) + line) * (w + 1) * C
    for first in tl.range(0, w + 1, COLUMNS):
        offset, inside = (first + column) * C + channel, (first + column < w) & (line < h) & real
        if frame < 2:
            y = tl.load(cache_ptr + offset, mask=inside & (cached != 0), other=0)
        else:
            x = tl.load(x_ptr + offset, mask=inside, other=0).to(tl.float32)
            x = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1) / C), eps)[:, None] * gamma
            y = (x * tl.sigmoid(x)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, y, mask=(first + column <= w) & real)
        if frame >= n:
            tl.store(next_ptr + offset, y, mask=inside)


@jit
def multiply(x, weight, weight2, bias_ptr, residual_ptr, y_ptr, residual, n, h, w, C: tl.constexpr, OUT: tl.constexpr,
             ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr):
    """Buffer x (R, C), weight (OUT, 27*C) tap by tap -> y (n, h, w, OUT), with the residual of the same shape added if `residual` is not 0.

    A program makes ROWS pixels and, in two products, A + B output channels.
    """
    first, out = tl.program_id(0) * ROWS, tl.program_id(1) * (A + B)
    y = tl.zeros([ROWS, A], tl.float32)
    if B:
        y2 = tl.zeros([ROWS, B], tl.float32)
    for k in tl.range(0, 27 * (C // DEPTH), num_stages=STAGES):
        tap = k // (C // DEPTH)
        distance = (tap // 9 * (h + 1) + tap // 3 % 3 - 1) * (w + 1) + tap % 3 - 1
        pixels = x.load([first + distance, k % (C // DEPTH) * DEPTH])                        # rows outside of the buffer are zeros
        y = tl.dot(pixels, weight.load([out, k * DEPTH]).T, y)
        if B:
            y2 = tl.dot(pixels, weight2.load([out + A, k * DEPTH]).T, y2)
    write(y, first, out, bias_ptr, residual_ptr, y_ptr, residual, n, h, w, OUT, ROWS, A)
    if B:
        write(y2, first, out + A, bias_ptr, residual_ptr, y_ptr, residual, n, h, w, OUT, ROWS, B)


@jit
def write(y, first, out, bias_ptr, residual_ptr, y_ptr, residual, n, h, w, OUT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The end of `multiply` for WIDTH output channels from `out` on."""
    row, channel = first + tl.arange(0, ROWS), out + tl.arange(0, WIDTH)
    frame, line, column, real = row // ((h + 1) * (w + 1)), row // (w + 1) % (h + 1), row % (w + 1), channel < OUT
    offset = ((frame.to(tl.int64) * h + line) * w + column)[:, None] * OUT + channel[None, :]
    mask = ((line < h) & (column < w) & (frame < n))[:, None] & real[None, :]
    y += tl.load(bias_ptr + channel, mask=real, other=0).to(tl.float32)[None, :]
    y += tl.load(residual_ptr + offset, mask=mask & (residual != 0), other=0).to(tl.float32)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------- parts of vae.py on these kernels

def suits(x, *convs):
    """Can the kernels run these convolutions of x? On Hopper alone, as they were measured nowhere else, and without gradients."""
    return x.is_cuda and x.dtype in LIMITS and not torch.is_grad_enabled() and torch.cuda.get_device_capability(x.device)[0] == 9 and \
        works(x.device) and all(conv.weight.dtype == x.dtype and conv.kernel_size == (3, 3, 3) and conv.in_channels % 32 == 0 for conv in convs)


def read(x, norm, conv, cache):
    """What `conv` reads of x (B, n, h, w, C) after norm and SiLU, and of its entry in the cache, which is replaced as in CausalConv -> (B, R, C)"""
    (B, n, h, w, C), old = x.shape, cache.popleft()
    assert old is not None or n == 1, f"a stream starts with 1 frame, got {n}"
    buffer, new, width = x.new_empty(B, (n + 2) * (h + 1) * (w + 1), C), x.new_empty(B, 2, h, w, C), triton.next_power_of_2(C)
    for frames, before, *out in zip(x.contiguous(), x if old is None else old.contiguous(), buffer, new):
        fill[h + 1, n + 2](frames, before, norm.gamma, *out, int(old is not None), n, h, w, max(1e-12, torch.finfo(x.dtype).tiny), C, width,
                           max(1, 1024 // width))
    cache.append(new)
    return buffer


def product(buffer, shape, conv, residual=None):
    """The convolution of a buffer from `read` of x, with shape = x.shape; residual None or like the result -> (B, n, h, w, c_out)"""
    (B, n, h, w), (OUT, C) = shape[:4], conv.weight.shape[:2]
    y, depth, (A, B2) = buffer.new_empty(B, n, h, w, OUT), 64 if C % 64 == 0 else 32, widths(OUT)
    weight = conv.weight.permute(0, 2, 3, 4, 1).reshape(OUT, 27 * C)                         # no copy of a weight in channels-last layout
    for rows, added, out in zip(buffer, y if residual is None else residual.contiguous(), y):
        tiles = (TensorDescriptor.from_tensor(matrix, [count, depth]) for matrix, count in ((rows, ROWS), (weight, A), (weight, B2 or A)))
        multiply[triton.cdiv(n * (h + 1) * (w + 1), ROWS), triton.cdiv(OUT, A + B2)](
            *tiles, conv.bias, added, out, int(residual is not None), n, h, w, C, OUT, ROWS, A, B2, depth, 4 if depth == 64 else 5, num_warps=4)
    return y


def widths(channels):
    """Of WIDTHS the one with which fewest channels are computed in vain."""
    return min(WIDTHS, key=lambda pair: -(-channels // sum(pair)) * sum(pair))


class Twin(nn.Module):
    """Has all that another module has: the same parameters and parts."""

    def __init__(self, other):
        nn.Module.__init__(self)
        self.__dict__.update(other.__dict__)


class FastResBlock(Twin, ResBlock):
    """A ResBlock by the kernels, and as vae.py has it for inputs that they cannot take."""

    def forward(self, x, cache):
        if not suits(x, self.conv1, self.conv2):
            return super().forward(x, cache)
        with torch.cuda.device(x.device):
            y = product(read(x, self.norm1, self.conv1, cache), x.shape, self.conv1)
            buffer = read(y, self.norm2, self.conv2, cache)
            del y                                                    # before the result takes its place
            return product(buffer, x.shape, self.conv2, pointwise(x, self.shortcut) if self.shortcut else x)


class FastDecoder(Twin, Decoder):
    """The same of a Decoder's last convolution."""

    def output(self, x, cache):
        if not suits(x, self.conv_out):
            return super().output(x, cache)
        with torch.cuda.device(x.device):
            return product(read(x, self.norm_out, self.conv_out, cache), x.shape, self.conv_out)


# -------------------------------------------------------------------------------------------------------------------- their use

def distance(fast, plain, convs):
    """The largest relative L2 between two functions (x, cache) through these convolutions: of results less their input, and of caches.

    A first frame and three more, of ordinary size and of a hundredth of it.
    """
    weight, found = convs[0].weight, []
    for size in (1, 0.01):
        g, caches = torch.Generator(weight.device).manual_seed(0), [new_cache(nn.ModuleList(convs)) for _ in range(2)]
        for n in (1, 3):
            x = (size * torch.randn(1, n, 5, 11, convs[0].in_channels, generator=g, device=weight.device)).to(weight)
            a, b = ([run(x, cache), *cache] for run, cache in zip((fast, plain), caches))
            a, b = ([y - x if y.shape == x.shape else y, *rest] for y, *rest in (a, b))
            found += [((p.float() - q.float()).norm() / q.float().norm()).item() for p, q in zip(a, b)]
    return max(found, key=lambda e: e if e == e else float("inf"))   # not a number is the largest


@torch.no_grad()
def check(kinds, decoder, like):
    """raises ValueError if a part computes something else than vae.py's: a fork changed that.  kinds {(c_in, c_out)}, like a tensor of the VAE's"""
    def random(*shape):
        """A ResBlock of numbers that no checkpoint has spoilt."""
        with torch.device("meta"):
            block = ResBlock(*shape)
        block, g = block.to_empty(device=like.device).to(like.dtype), torch.Generator(like.device).manual_seed(0)
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=g, device=like.device) / (p[0].numel() if p.ndim == 5 else 1) ** 0.5)
        return block
    try:
        blocks = [random(*shape) for shape in sorted(kinds)]
        pairs = [(FastResBlock(block), block, [block.conv1, block.conv2]) for block in blocks]
        if suits(like, decoder.conv_out):
            pairs.append((FastDecoder(decoder).output, decoder.output, [decoder.conv_out]))
        largest = max(distance(*pair) for pair in pairs)
    except (AttributeError, IndexError, TypeError) as error:
        largest = f"{type(error).__name__}: {error}"
    if isinstance(largest, str) or not largest < LIMITS[like.dtype]:
        raise ValueError(f"fast/convolution.py does not compute what vae.py computes (relative L2 {largest}): repeat in FastResBlock, FastDecoder "
                         "and `fill` what ResBlock, Decoder.output, RMSNorm and CausalConv do now, or use --vae-dtype float32")


@torch.no_grad()
def use_kernels(vae):
    """Replace the parts of a 16-bit VAE that the kernels can run, in place. Where Triton does not work this is said, and all stays as it is.

    raises  ValueError from `check`
    """
    if vae.dtype not in LIMITS or not suits(like := vae.decoder.conv_in.weight):
        return vae
    blocks = [(module, name, block) for module in vae.modules() for name, block in module.named_children()
              if type(block) is ResBlock and suits(like, block.conv1, block.conv2)]
    if not blocks:
        return vae
    try:
        check({(block.conv1.in_channels, block.conv1.out_channels) for _, _, block in blocks}, vae.decoder, like)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:                                       # of many kinds: no C compiler, a kernel that does not compile or fit
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        print(f"Triton {triton.__version__} does not work here ({type(error).__name__}: {reason}): the VAE is slower", file=sys.stderr)
        return vae
    for conv in (vae.decoder.conv_out, *(conv for _, _, block in blocks for conv in (block.conv1, block.conv2))):
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)                 # (OUT, 3, 3, 3, C) in memory
    for module, name, block in blocks:
        module.add_module(name, FastResBlock(block))                 # in its place
    vae.decoder = FastDecoder(vae.decoder)
    return vae
