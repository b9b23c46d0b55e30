"""The denoiser on a GPU: the functions of model.py on token chunks, with results written in place, compiled, on the fastest attention kernel.

`FastDenoiser` has the `prepare` and the call of model.py's Denoiser and gives the same numbers. What it changes, and what that buys:

token chunks   Everything but `attend` works token by token, so it runs on 8192 tokens at a time where memory is short. At 1280x704 the
               temporaries of a block shrink from 9 GiB to 1 GiB, at no cost in time (H200).
in place       A block's result takes the place of its input x, attention's result that of the queries: 1.5 and 0.8 GiB at 1280x704.
compiled       Norm, modulation, RoPE, cast, gate and GELU fuse to one pass over memory each: a bf16 forward at 832x480 takes 3.16 s instead
               of 3.55 s, a float8 one 2.6 s (H200). RoPE and GELU are written in forms that the compiler turns into faster kernels.
attention      cuDNN's kernel is 1.6 times as fast as flash attention on Hopper; it works on 256 queries and KEYS keys at a time, and keys
               left over make it 8% slower, so they are attended to afterwards (kernels.py).

A change of model.py's `Block.project`, `finish` or `audio_cross_attention` acts here too, since these are what runs. A change of how
`Block.forward` or `Denoiser.forward` put them together must be repeated here: `verify` notices if it is not, before a run begins.
"""
import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast import kernels, offload
from model import Config, Rotary, attention, unpatchify

QUERIES = 66 * 256           # attended to at once: with 40 heads they fill the 132 processors of an H200 20 times, without a rest
KEYS, LONG = 128, 4096       # keys in a block of cuDNN's kernel; fewest keys for which a rest is taken apart


class Span(NamedTuple):
    """Tokens start..stop share diffusion time number `time`."""
    start: int
    stop: int
    time: int


def make_spans(segments, chunk=None):
    """Cut a clip's segments into spans of at most `chunk` tokens -> (Span, ...)"""
    spans, start = [], 0
    for tokens, time in segments:
        stop = start + tokens
        spans += [Span(a, min(a + (chunk or tokens), stop), time) for a in range(start, stop, chunk or tokens)]
        start = stop
    return tuple(spans)


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
    for rows in q.split(QUERIES, dim=1):
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
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and kernels.works(q.device) and \
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
    """One compiled function serves all blocks, spans of any length and clips of any length."""
    return torch.compile(function, dynamic=True)


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
        self.net, self.chunk, self.attend, self.host_layers = net, chunk, attend, host_layers
        run = compiled if compile else lambda function: function
        self.project, self.finish, self.audio = run(project_into), run(finish_in_place), run(audio_in_place)
        for block in offload.all_blocks(net) if compile else ():
            use_forms_for_compiler(block)

    @torch.no_grad()
    def prepare(self, **arguments):
        """As Denoiser.prepare -> Cond"""
        cond = self.net.prepare(**arguments)
        return replace(cond, layers=offload.HostLayers(cond.layers)) if self.host_layers else cond

    @torch.no_grad()
    def __call__(self, latents, t, cond):
        """As Denoiser.forward: latents (B, out_dim, T, H, W), t (B,) -> velocity (B, out_dim, T, H, W) float32"""
        net, spans, (T, h, w) = self.net, make_spans(cond.segments, self.chunk), cond.grid
        e, mod = net.modulations(t)                                  # (B, R, C), (B, R, 6, C)
        x = net.embed(latents, cond)                                 # (B, N, C), which no one else holds
        with attention_backend(latents.device):
            for layer, block in enumerate(net.blocks):               # a ModuleList, or offload.py's stream of blocks
                self.block(block, x, block.modulations(mod), cond, layer, spans)
        video = [span for span in spans if span.stop <= T * h * w]
        return unpatchify(torch.cat([net.head(x[:, a:b], e[:, r:r + 1]) for a, b, r in video], dim=1), cond.grid)

    def block(self, block, x, mod, cond, layer, spans):
        """Block.forward in place of x.  x (B, N, C) float32, mod (6, B, R, C)"""
        text, audio, adain = cond.layers[layer]
        y = self.self_attention(block, x, mod, cond.rope, layer, spans, text.dtype)
        for a, b, r in spans:
            self.finish(block, x[:, a:b], y[:, a:b], mod[:, :, r:r + 1], text)
        if block.inject is None:
            return
        T, hw = cond.grid[0], cond.grid[1] * cond.grid[2]
        step = max(1, (spans[0].stop - spans[0].start) // hw)        # as many latent frames at a time as the longest span holds
        for f in range(0, T, step):
            self.audio(block, x[:, f * hw:min(f + step, T) * hw], audio[:, :, f:f + step], adain[:, :, f:f + step])

    def self_attention(self, block, x, mod, rope, layer, spans, dtype):
        """-> (B, N, C), in the place of the queries; keys and values are free again when it returns"""
        q, k, v = (block.self_attn.split(torch.empty_like(x, dtype=dtype)) for _ in range(3))        # (B, N, K, D)
        for a, b, r in spans:
            self.project(block, x[:, a:b], mod[:, :, r:r + 1], rope[:, a:b], q[:, a:b], k[:, a:b], v[:, a:b])
        return self.attend(q, k, v, layer)


SMALL = Config(dim=48, ffn_dim=96, n_head=2, n_layer=2, text_dim=16, text_len=6, freq_dim=16, audio_dim=16, audio_states=2, audio_tokens=2,
               audio_layers=(1,))


@torch.no_grad()
def verify(denoiser):
    """Does this file still compute what model.py computes? Tried on a small network of the class `denoiser` on the CPU, in about 50 ms.

    raises  ValueError if not: a fork changed how model.py puts the parts of a block together
    """
    g = torch.Generator().manual_seed(0)
    def randn(*shape): return torch.randn(shape, generator=g)
    net = denoiser(SMALL).eval()
    for parameter in net.parameters():
        parameter.copy_(randn(*parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    cond = net.prepare((2, 8, 8), randn(1, 4, 16), randn(1, 2, 16, 8), randn(1, 16, 1, 8, 8), randn(1, 16, 19, 8, 8))
    latents, t = randn(1, 16, 2, 8, 8), torch.full((1,), 500.0)
    want, twin = net(latents, t, cond), copy.deepcopy(net)
    for block in twin.blocks:
        use_forms_for_compiler(block)
    gap = float((FastDenoiser(twin, chunk=13)(latents, t, cond) - want).norm() / want.norm())
    if not gap < 1e-5:
        raise ValueError(f"fast/blocks.py does not compute what model.py computes (relative L2 {gap:.1e}): repeat the change of Block.forward "
                         "or Denoiser.forward there, or put it into project, finish or audio_cross_attention")
