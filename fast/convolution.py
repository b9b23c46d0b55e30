"""The VAE's 3x3x3 convolutions on Hopper, with the norm and SiLU before them and the sum behind them, in two Triton kernels.

    fill        norm, SiLU, and all that a convolution reads laid out in one piece: the two frames before, the frames, zeros around them
    convolve    a matrix product of that: a row for each pixel, the weight's columns for each tap and channel

Every frame has one row and one column of zeros, behind its last: what is left of a picture's first column is the last of the row above. So a tap is
a distance in the list of all pixels, the same for each of them, and Hopper's copy engine reads 128 pixels that follow one another like rows of any
matrix. What is computed for the zeros themselves, 1% of the pixels, is not written.

`use_kernels` puts `FastResBlock` and `FastDecoder` in the place of vae.py's where this is possible, each tried against its original before. Their
caches and parameters are the same, so that a stream may go on with the others.

Axes    n frames   h w height, width   C channels   R rows of the list, (n + 2)(h + 1)(w + 1)
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import sys

import torch
from torch import nn

from fast.kernels import jit, triton, works
from vae import CausalConv, Decoder, ResBlock, new_cache, pointwise

if triton:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 128                                                           # pixels of one program
WIDTHS = (128, 0), (128, 64), (128, 32), (64, 32), (64, 0), (16, 0)  # output channels of one program, in two products


@jit
def fill(x_ptr, past_ptr, gamma_ptr, y_ptr, next_ptr, begun, n, h, w, least, C: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """x (n, h, w, C), normed, behind past (2, h, w, C) -> y (n + 2, h + 1, w + 1, C) and its last two frames, next (2, h, w, C): one line of one.

    begun  0: there is no past, but zeros        least  the smallest root of a mean square to divide by
    """
    line, frame, column, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, COLUMNS)[:, None], tl.arange(0, WIDTH)[None, :]
    known, gamma = channel < C, tl.load(gamma_ptr + channel, mask=channel < C, other=0).to(tl.float32)
    x_ptr += (tl.cast(frame - 2, tl.int64) * h + line) * w * C
    past_ptr += (tl.cast(frame, tl.int64) * h + line) * w * C
    next_ptr += (tl.cast(frame - n, tl.int64) * h + line) * w * C
    y_ptr += (tl.cast(frame, tl.int64) * (h + 1) + line) * (w + 1) * C
    for first in tl.range(0, w + 1, COLUMNS):
        place, inside = (first + column) * C + channel, (first + column < w) & (line < h) & known
        if frame < 2:
            y = tl.load(past_ptr + place, mask=inside & (begun != 0), other=0)
        else:
            x = tl.load(x_ptr + place, mask=inside, other=0).to(tl.float32)
            x = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1) / C), least)[:, None] * gamma
            y = (x * tl.sigmoid(x)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + place, y, mask=(first + column <= w) & known)
        if frame >= n:
            tl.store(next_ptr + place, y, mask=inside)


@jit
def convolve(x, weight, weight2, bias_ptr, add_ptr, y_ptr, added, n, h, w, C: tl.constexpr, OUT: tl.constexpr,
             ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr):
    """x (R, C) as `fill` leaves it, weight (OUT, 27*C) tap by tap -> y (n, h, w, OUT), to which `add` of the same shape is added if `added`.

    A program makes ROWS pixels and the output channels of A rows of weight and, by a second product, of B more.
    """
    first, out = tl.program_id(0) * ROWS, tl.program_id(1) * (A + B)
    y = tl.zeros([ROWS, A], tl.float32)
    if B:
        y2 = tl.zeros([ROWS, B], tl.float32)
    for k in tl.range(0, 27 * (C // DEPTH), num_stages=STAGES):
        tap = k // (C // DEPTH)
        moved = (tap // 9 * (h + 1) + tap // 3 % 3 - 1) * (w + 1) + tap % 3 - 1
        pixels = x.load([first + moved, k % (C // DEPTH) * DEPTH])   # rows before the first are zeros, as all that lies outside
        y = tl.dot(pixels, weight.load([out, k * DEPTH]).T, y)
        if B:
            y2 = tl.dot(pixels, weight2.load([out + A, k * DEPTH]).T, y2)
    write(y, first, out, bias_ptr, add_ptr, y_ptr, added, n, h, w, OUT, ROWS, A)
    if B:
        write(y2, first, out + A, bias_ptr, add_ptr, y_ptr, added, n, h, w, OUT, ROWS, B)


@jit
def write(y, first, out, bias_ptr, add_ptr, y_ptr, added, n, h, w, OUT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, channel = first + tl.arange(0, ROWS), out + tl.arange(0, WIDTH)
    frame, line, column, known = row // ((h + 1) * (w + 1)), row // (w + 1) % (h + 1), row % (w + 1), channel < OUT
    place = ((frame.to(tl.int64) * h + line) * w + column)[:, None] * OUT + channel[None, :]
    mask = ((line < h) & (column < w) & (frame < n))[:, None] & known[None, :]
    y += tl.load(bias_ptr + channel, mask=known, other=0).to(tl.float32)[None, :]
    y += tl.load(add_ptr + place, mask=mask & (added != 0), other=0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------- parts of vae.py on these kernels

def suits(conv, x):
    """Hopper alone: it was measured nowhere else."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.dtype == conv.weight.dtype and conv.kernel_size == (3, 3, 3) and \
        conv.in_channels % 32 == 0 and torch.cuda.get_device_capability(x.device)[0] == 9 and works(x.device)


def read(x, norm, conv, cache):
    """What `conv` reads of x (B, n, h, w, C) behind a norm and SiLU, and of its cache, which it changes as CausalConv does -> (B, R, C)"""
    (B, n, h, w, C), past = x.shape, cache.popleft()
    buffer, following, width = x.new_empty(B, (n + 2) * (h + 1) * (w + 1), C), x.new_empty(B, 2, h, w, C), triton.next_power_of_2(C)
    for frames, before, *out in zip(x.contiguous(), x if past is None else past.contiguous(), buffer, following):
        fill[h + 1, n + 2](frames, before, norm.gamma, *out, int(past is not None), n, h, w, max(1e-12, torch.finfo(x.dtype).tiny), C, width,
                           max(1, 1024 // width))
    cache.append(following)
    return buffer


def product(buffer, shape, conv, add=None):
    """buffer from `read` of x with shape[:4], add like the result -> (B, n, h, w, c_out)"""
    (B, n, h, w), (OUT, C) = shape[:4], conv.weight.shape[:2]
    y, depth, (one, two) = buffer.new_empty(B, n, h, w, OUT), 64 if C % 64 == 0 else 32, widths(OUT)
    weight = conv.weight.permute(0, 2, 3, 4, 1).reshape(OUT, 27 * C)                                         # a view: see `use_kernels`
    for rows, more, out in zip(buffer, y if add is None else add.contiguous(), y):
        tiles = (TensorDescriptor.from_tensor(matrix, [count, depth]) for matrix, count in ((rows, ROWS), (weight, one), (weight, two or one)))
        convolve[triton.cdiv(n * (h + 1) * (w + 1), ROWS), triton.cdiv(OUT, one + two)](
            *tiles, conv.bias, more, out, int(add is not None), n, h, w, C, OUT, ROWS, one, two, depth, 4 if depth == 64 else 5, num_warps=4)
    return y


def widths(channels):
    """Of WIDTHS the one that computes fewest channels too many."""
    return min(WIDTHS, key=lambda pair: -(-channels // sum(pair)) * sum(pair))


class FastResBlock(ResBlock):
    """Shares everything with a ResBlock; for other numbers than those that suit it is that."""

    def __init__(self, block):
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)

    def forward(self, x, cache):
        if not suits(self.conv1, x):
            return super().forward(x, cache)
        with torch.cuda.device(x.device):
            y = product(read(x, self.norm1, self.conv1, cache), x.shape, self.conv1)
            buffer = read(y, self.norm2, self.conv2, cache)
            del y                                                    # before the result takes its place
            return product(buffer, x.shape, self.conv2, pointwise(x, self.shortcut) if self.shortcut else x)


class FastDecoder(Decoder):
    """The same of a Decoder's last convolution."""

    def __init__(self, decoder):
        nn.Module.__init__(self)
        self.__dict__.update(decoder.__dict__)

    def output(self, x, cache):
        if not suits(self.conv_out, x):
            return super().output(x, cache)
        with torch.cuda.device(x.device):
            return product(read(x, self.norm_out, self.conv_out, cache), x.shape, self.conv_out)


# -------------------------------------------------------------------------------------------------------------------- their use

@torch.no_grad()
def gap(fast, plain, convs):
    """Relative L2 of two functions (x, cache) that go through these convolutions: of a first frame and three more, and of their caches."""
    g, conv, made = torch.Generator(convs[0].weight.device), convs[0], []
    for run in (fast, plain):
        cache, results = new_cache(nn.ModuleList(convs)), []
        for n in (1, 3):
            x = torch.randn(1, n, 9, 21, conv.in_channels, generator=g.manual_seed(n), device=conv.weight.device).to(conv.weight)
            results += [run(x, cache), *cache]
        made.append(torch.cat([x.flatten().float() for x in results]))
    return ((made[0] - made[1]).norm() / made[1].norm()).item()


def use_kernels(vae):
    """Put these parts in the place of a VAE's, in place, where they can run; each kind is tried against its original.

    raises  ValueError if one computes something else: a fork changed vae.py. Where Triton does not work this is said, and vae.py's parts stay
    """
    blocks = [(module, name, block) for module in vae.modules() for name, block in module.named_children()
              if type(block) is ResBlock and suits(block.conv1, block.conv1.weight)]
    if not blocks:
        return vae
    for layer in vae.modules():
        if isinstance(layer, CausalConv):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)           # (OUT, 3, 3, 3, C) in memory
    kinds = {(block.conv1.in_channels, block.conv1.out_channels): block for _, _, block in blocks}.values()
    try:
        gaps = [gap(FastResBlock(block), block, [block.conv1, block.conv2]) for block in kinds]
        gaps.append(gap(FastDecoder(vae.decoder).output, vae.decoder.output, [vae.decoder.conv_out]))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                                       # of many kinds: no C compiler, a kernel that does not compile or fit
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        print(f"Triton {triton.__version__} does not work here ({type(error).__name__}: {reason}): the VAE is slower", file=sys.stderr)
        return vae
    if not max(gaps) < 0.03:                                         # rounding gives 1e-3 in float16, 8e-3 in bfloat16; not a number is no less
        raise ValueError(f"fast/convolution.py does not compute what vae.py computes (relative L2 {max(gaps):.1e}): repeat in FastResBlock and "
                         "`fill` what ResBlock, RMSNorm and CausalConv do now, and in FastDecoder what Decoder.output does")
    for module, name, block in blocks:
        module.add_module(name, FastResBlock(block))                 # in its place
    vae.decoder = FastDecoder(vae.decoder)
    return vae
