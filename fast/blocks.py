"""The denoiser on a GPU: the functions of model.py on token chunks, with results written in place, compiled, on the fastest attention kernel.

`FastDenoiser` has the `prepare` and the call of model.py's Denoiser and gives the same numbers. What it changes, and what that buys:

token chunks   Everything but `attend` works token by token, so it runs on 8192 or 4096 tokens at a time where memory is short. At 1280x704 the
               temporaries of a block shrink from 9 GiB to 1 GiB, at no cost in time (H200).
in place       A block's result takes the place of its input x, attention's result that of the queries: 1.5 and 0.8 GiB at 1280x704.
compiled       Norm, modulation, RoPE, cast, gate and GELU fuse to one pass over memory each: a bf16 forward at 832x480 takes 3.16 s instead
               of 3.55 s (H200). RoPE and GELU are written in forms that the compiler turns into faster kernels.
rows           In float8 on an NVIDIA GPU `project` and `finish` are those of rows.py in place of compiled ones, and text attention is
               that of padding.py.
attention      cuDNN's kernel is 1.6 times as fast as flash attention on Hopper; it works on 256 queries and KEYS keys at a time, and keys
               left over make it 8% slower, so they are attended to afterwards (kernels.py).

A change of model.py's `Block.project`, `finish` or `audio_cross_attention` acts here too, since these are what runs: rows.py stands aside when it
computes something else. A change of how `Block.forward` or `Denoiser.forward` put them together must be repeated here: `verify` notices if it is
not, before a run begins.
"""
import copy
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast import kernels, offload, padding, rows
from model import Rotary, attention, unpatchify

QUERIES = 66 * 256           # attended to at once: with 40 heads they fill the 132 processors of an H200 20 times, without a rest
KEYS, LONG = 128, 4096       # keys in a block of cuDNN's kernel; fewest keys for which a rest is taken apart


class Chunk(NamedTuple):
    """Tokens start..stop, which share a row of the modulation."""
    start: int
    stop: int
    row: int


def make_chunks(segments, size=None):
    """Cut a clip's segments into chunks of at most `size` tokens -> (Chunk, ...)"""
    chunks, start = [], 0
    for tokens, row in segments:
        stop = start + tokens
        chunks += [Chunk(a, min(a + (size or tokens), stop), row) for a in range(start, stop, size or tokens)]
        start = stop
    return tuple(chunks)


class Frames(NamedTuple):
    """Tokens start..stop, which lie in latent frames first..end: whole frames, or a part of one."""
    start: int
    stop: int
    first: int
    end: int


def make_frames(tokens, hw, size, skip=0):
    """Cut video tokens, the first of which has `skip` tokens of its latent frame before it, into whole frames, as many at a time as `size` tokens
    hold, and what is left of one at either end -> (Frames, ...)"""
    parts, start = [], 0
    while start < tokens:
        first, gone = divmod(skip + start, hw)
        n = 1 if gone else min(max(1, size // hw), max(1, (tokens - start) // hw))
        stop = min(tokens, start + n * hw - gone)
        parts.append(Frames(start, stop, first, first + n))
        start = stop
    return tuple(parts)


# ------------------------------------------------------------------------------------------------------ attention, exact, in place

def attention_backend(device):
    """On a GPU cuDNN's attention first; the others where it cannot serve."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True) if device.type == "cuda" else nullcontext()


def attend(q, k, v, layer=None):
    """`model.attention` of a sequence to itself. Inference only: the result takes the place of q, QUERIES rows at a time.

    q, k, v (B, N, K, D) -> (B, N, K*D)
    """
    n = k.shape[1]
    whole = n // KEYS * KEYS if n >= LONG and takes_last_keys_apart(q) else n
    for rows in q.split(QUERIES * max(1, 40 // q.shape[2]), dim=1):              # a rank of many has few heads
        attend_rows(rows, k, v, whole)                               # a function, so that one part's results are free before the next
    return q.flatten(2)


def attend_rows(q, k, v, whole):
    """The first `whole` keys by the fastest kernel, the others, if there are any, after them. The result takes the place of q."""
    if whole == k.shape[1]:
        q.copy_(attention(q, k, v).view_as(q))
        return
    first = (x.transpose(1, 2) for x in (q, k[:, :whole], v[:, :whole]))
    y, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(*first, None, True)[:2]
    kernels.attend_last(q, k, v, y.transpose(1, 2), sums, whole)


def takes_last_keys_apart(q):
    """Would cuDNN compute attention of q (B, N, K, D), on a GPU whose kernel is known?"""
    q = q.transpose(1, 2)
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and kernels.works(q.device) and kernels.know_attention() and \
        torch.backends.cuda.can_use_cudnn_attention(torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False))


# --------------------------------------------------------------------------- the per-token parts of model.Block, results in place

def project_into(block, x, mod, rope, q, k, v):
    for buffer, part in zip((q, k, v), block.project(x, mod, rope)):
        buffer.copy_(part)


def finish_in_place(block, x, y, mod, text):
    x.copy_(block.finish(x, y, mod, text))


def audio_in_place(block, x, audio, adain):
    x.copy_(block.audio_cross_attention(x, audio, adain))


@cache
def compiled(function):
    """One compiled function serves all blocks, chunks of any length and clips of any length.

    deterministic  A norm adds in one order on every GPU of a kind. Else a stopwatch chooses it, for each device anew, and a seed's video is another.
    """
    return torch.compile(function, dynamic=True, options={"deterministic": True})


class SigmoidGELU(nn.Module):
    """The tanh approximation of GELU by a sigmoid, equal but for rounding: compiled, tanh is slow."""

    def forward(self, x):
        y = x.float()
        return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


class FlipRotary(Rotary):
    """The same bits as Rotary; compiled, one pass over x."""

    def forward(self, x, rope):
        x, (cos, sin) = x.float().unflatten(-1, (-1, 2)), rope.unsqueeze(-1)     # (B, N, K, D/2, 2), (N, 1, D/2, 1)
        return (x * cos + x.flip(-1) * torch.cat([-sin, sin], dim=-1)).flatten(-2)


def use_forms_for_compiler(block):
    block.ffn[1], block.self_attn.rotary = SigmoidGELU(), FlipRotary()


# ----------------------------------------------------------------------------------------------------------------- the denoiser

class FastDenoiser:
    """model.py's Denoiser, run as this file says. Inference only.

    net     a Denoiser, with float8 layers or streamed blocks if the plan wants them; compiling changes its GELU and RoPE
    chunk   most tokens worked on at once, None: all of a segment        compile      the per-token parts
    attend  self-attention, as in Denoiser.forward                       host_layers  text keys and values wait in host memory
    """

    def __init__(self, net, chunk=None, attend=attend, compile=False, host_layers=False):
        self.net, self.chunk, self.attend, self.host_layers, self.trims = net, chunk, attend, host_layers, compile
        run = compiled if compile else lambda function: function
        self.project, self.finish, self.audio_cross_attention = run(project_into), run(finish_in_place), run(audio_in_place)
        self.serves = rows.server(net.cfg) if compile else lambda block, x, rope: False
        for block in offload.all_blocks(net) if compile else ():
            use_forms_for_compiler(block)

    @torch.no_grad()
    def prepare(self, **arguments):
        """As Denoiser.prepare -> Cond, which no plain Denoiser can read: compiled, one key of text stands for all padding"""
        cond = self.net.prepare(**arguments)
        if self.trims and "text" in arguments:
            cond = padding.trim(cond, arguments["text"].shape[1])
        return replace(cond, layers=offload.HostLayers(cond.layers)) if self.host_layers else cond

    @torch.no_grad()
    def __call__(self, latents, t, cond, attend=None):
        """As Denoiser.forward: latents (B, out_dim, T, H, W), t (B,) -> velocity (B, out_dim, T, H, W) float32.  attend  None: self.attend"""
        return unpatchify(self.tokens(latents, t, cond, attend=attend), cond.grid)

    def tokens(self, latents, t, cond, skip=0, attend=None):
        """What the head says of every video token (B, L, 4*out_dim).

        skip  the first tokens of the grid that are left out: cond.segments and cond.rope begin behind them, and may end in the midst of the video
        """
        (T, h, w), chunks = cond.grid, make_chunks(cond.segments, self.chunk)
        video = min(T * h * w - skip, chunks[-1].stop)               # L
        frames = make_frames(video, h * w, chunks[0].stop, skip)
        e, mod = self.net.modulations(t)                             # (B, R, C), (B, R, 6, C)
        x = self.net.embed(latents, cond)[:, skip:skip + chunks[-1].stop]        # (B, N, C), which no one else holds
        self.run_blocks(x, mod, cond, chunks, frames, attend)
        return self.head(x, e, chunks, video)

    def run_blocks(self, x, mod, cond, chunks, frames, attend=None):
        """All blocks in place of x (B, N, C)"""
        with attention_backend(x.device):
            for layer, block in enumerate(self.net.blocks):          # a ModuleList, or offload.py's stream of blocks
                self.block(block, x, block.modulations(mod), cond, layer, chunks, frames, attend or self.attend)

    def head(self, x, e, chunks, video):
        """What comes out of the last block (B, N, C) -> what the head says of the video's tokens (B, video, 4*out_dim)"""
        mine = [chunk for chunk in chunks if chunk.stop <= video] or [Chunk(0, 0, 0)]
        return torch.cat([self.net.head(x[:, a:b], e[:, r:r + 1]) for a, b, r in mine], dim=1)

    def block(self, block, x, mod, cond, layer, chunks, frames, attend):
        """Block.forward in place of x.  x (B, N, C) float32, mod (6, B, R, C)"""
        (text, audio, adain), pads = cond.layers[layer], padding.pads_of(cond)
        if self.serves(block, x, cond.rope):
            project, finish = rows.project, partial(rows.finish, pads=pads)
        else:
            project, finish, text = self.project, self.finish, padding.whole(text, pads)
        y = self.self_attention(project, block, x, mod, cond.rope, layer, chunks, text.dtype, attend)
        for a, b, r in chunks:
            finish(block, x[:, a:b], y[:, a:b], mod[:, :, r:r + 1], text)
        del y
        if block.inject is not None:
            self.audio_layer(block, x, audio, adain, frames)

    def audio_layer(self, block, x, audio, adain, frames):
        """Block.audio_cross_attention in place of x, some latent frames at a time."""
        for a, b, first, end in frames:
            self.audio_cross_attention(block, x[:, a:b], audio[:, :, first:end], adain[:, :, first:end])

    def self_attention(self, project, block, x, mod, rope, layer, chunks, dtype, attend):
        """-> (B, N, C), in the place of the queries; keys and values are free again when it returns. An `attend` may have places for them."""
        def empty():
            return block.self_attn.split(torch.empty_like(x, dtype=dtype))
        q, (k, v) = empty(), attend.places(layer) if hasattr(attend, "places") else (empty(), empty())         # (B, N, K, D)
        for a, b, r in chunks:
            project(block, x[:, a:b], mod[:, :, r:r + 1], rope[:, a:b], q[:, a:b], k[:, a:b], v[:, a:b])
        return attend(q, k, v, layer)


def small_cases(net, g):
    """Inputs of every kind that the task of a small network has: (latents, arguments of `prepare`)"""
    cfg, (T, H, W) = net.cfg, (2, 8, 8)
    def randn(*shape): return torch.randn(1, *shape, generator=g)
    arguments = dict(shape=(T, H, W), text=randn(4, cfg.text_dim))
    if cfg.audio_dim:
        arguments |= dict(audio=randn(cfg.audio_states, cfg.audio_dim, 4 * T), ref=randn(cfg.out_dim, 1, H, W))
        others = [dict(), dict(motion=randn(cfg.out_dim, cfg.motion_latents, H, W), pose=randn(cfg.pose_dim, T, H, W))]
    elif cfg.in_dim > cfg.out_dim:
        others = [dict(image=randn(cfg.in_dim - cfg.out_dim, T, H, W))]
    else:
        others = [dict(), dict(clean_frames=1)]
    return [(randn(cfg.out_dim, T, H, W), arguments | other) for other in others]


@contextmanager
def one_thread():
    """Many threads would wait for one another longer than small work takes: seconds on 16 cores, a minute on 64 that do other things too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@one_thread()
def verify(denoiser, cfg):
    """Does this file still compute what model.py computes? Tried on a narrow network of the class `denoiser` with all its layers, on the CPU.

    raises  ValueError if not: a fork changed how model.py puts the parts of a block together
    """
    g = torch.Generator().manual_seed(0)
    narrow = dict(dim=48, ffn_dim=96, n_head=2, text_dim=16, text_len=6, freq_dim=16, audio_dim=16 if cfg.audio_dim else 0)
    net = denoiser(replace(cfg, **narrow)).eval()
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=g) / (p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    twin, t = copy.deepcopy(net), torch.full((1,), 500.0)
    for block in twin.blocks:
        use_forms_for_compiler(block)
    for latents, arguments in small_cases(net, g):
        cond = net.prepare(**arguments)
        want = net(latents, t, cond)
        for kind, other in (("", net), (" in the forms for the compiler, see use_forms_for_compiler", twin)):
            gap = float((FastDenoiser(other, chunk=29)(latents, t, cond) - want).norm() / want.norm())
            if not gap < 1e-4:                                       # rounding gives 1e-6
                raise ValueError(f"fast/blocks.py does not compute what model.py computes{kind} (relative L2 {gap:.1e}): repeat there what "
                                 "Block.forward or Denoiser.forward do now, or put it into project, finish or audio_cross_attention")


def get_ready(denoiser, cfg, device, compile):
    """`verify`, and what torch.compile does before it first compiles on a GPU, imports and starting its processes: seconds, in a thread, beside the
    loading of other networks -> function that waits for it and raises what it raised"""
    def work():
        verify(denoiser, cfg)
        if compile and device.type == "cuda":
            torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    return ThreadPoolExecutor(1).submit(work).result
