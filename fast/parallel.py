"""Many GPUs make one video: the two branches of guidance on two halves of the ranks, in each half every rank owns a run of the tokens.

A rank is a process with a GPU of its own; `torchrun --nproc-per-node 4 sample.py ...` starts them. Rank r of `split` = (halves, runs) works on
branch r // runs and on run r % runs. docs/parallel.md has the picture and the arithmetic of bytes.

guidance    Half 0 computes the conditional branch, half 1 the unconditional one. A step exchanges two velocities, the size of the latents.
sequence    All tokens of a clip, video, reference and motion, are cut into runs, as equal as whole tokens allow: none is padded. All that works
            token by token stays where it is. Around `attend` tokens are exchanged for heads (Ulysses, arXiv 2309.14509): before it a rank sends
            the queries, keys and values of its tokens and gets those of all tokens for K / runs heads, after it the results go back.
            Text keys and values are computed by every rank. Audio attention needs the number of each token's latent frame and no exchange: a
            rank keeps the audio of the frames that its run touches, and a run may begin and end in the midst of one (`make_frames`).
head        Each rank's video tokens, 64 numbers each, go to all once a forward: all ranks have the velocity and take the same solver step.
VAE         Every rank encodes and decodes its tiles (fast/vae_plan.py); the pieces go to all: the next clip is encoded from them.
once        Text and sound are encoded on rank 0 and sent; noise is drawn alike by all, from the same seed.

Everything is one call: the all-to-all, of which each rank sends and receives so many rows to and from each.
"""
import os
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist

from fast import blocks, offload
from fast.probe import Memory
from model import Cond, LayerCond, Segment, unpatchify


def choose_split(ranks, mode, heads, guidance):
    """How ranks share a video -> (halves, runs).

    mode    "auto", "guidance" (two halves, the rest by tokens) or "sequence"        guidance  of each expert: 1 or less has one branch
    raises  ValueError naming the numbers of ranks that work
    """
    guided = min(guidance) > 1
    if mode == "guidance" and not guided:
        raise ValueError(f"--parallel guidance wants a guidance above 1, got {', '.join(f'{g:g}' for g in guidance)}: leave it out")
    ways = {"guidance": (2,), "sequence": (1,), "auto": (2, 1)}[mode]
    for halves in ways if guided else (1,):
        if ranks % halves == 0 and heads % (ranks // halves) == 0:
            return halves, ranks // halves
    works = sorted({halves * n for halves in (ways if guided else (1,)) for n in range(1, heads + 1) if heads % n == 0})
    raise ValueError(f"{ranks} ranks do not divide the {heads} heads of this network{' in two halves' if mode == 'guidance' else ''}: start "
                     f"{', '.join(map(str, works))} of them")


class Ranks:
    """This process among all that make one video.  rank of all of them, split (halves, runs); torch.distributed has been initialised"""

    def __init__(self, rank, split, connect=True):
        self.rank, self.split = rank, split
        self.halves, self.runs = split
        self.half, self.index = divmod(rank, self.runs)
        teams = [[half * self.runs + i for i in range(self.runs)] for half in range(self.halves)]
        pairs = [[i, self.runs + i] for i in range(self.runs)] if self.halves == 2 else []
        groups = [dist.new_group(members) if connect else None for members in teams + pairs]         # every rank makes all of them
        self.team, self.pair = groups[self.half], groups[self.halves + self.index] if pairs else None

    @property
    def size(self):
        return self.halves * self.runs

    def exchange(self, x, send, receive, group=None):
        """All-to-all along the first axis.  x (sum of send, ...): so many rows to each rank -> (sum of receive, ...): so many from each"""
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group)
        return out

    def gather(self, x, lengths, group=None):
        """The rows of all, in order of rank, on all.  x (lengths[own rank], ...) -> (sum of lengths, ...)"""
        return self.exchange(torch.cat([x] * len(lengths)), [len(x)] * len(lengths), lengths, group)

    # ---- tokens for heads, and back

    def to_heads(self, x, lengths):
        """All heads of own tokens -> own heads of all tokens.  x (B, n, K, D), lengths: n of every rank -> (B, N, K/runs, D)"""
        x = x.unflatten(2, (self.runs, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)                     # (runs*n, B, K/runs, D)
        return self.exchange(x, [x.shape[0] // self.runs] * self.runs, lengths, self.team).transpose(0, 1).contiguous()        # of one item it is

    def to_tokens(self, y, lengths):
        """Own heads of all tokens -> all heads of own tokens.  y (B, N, C/runs) -> (B, n, C)"""
        n = lengths[self.index]
        y = self.exchange(y.transpose(0, 1), lengths, [n] * self.runs, self.team)                    # (runs*n, B, C/runs)
        return y.unflatten(0, (self.runs, n)).permute(2, 1, 0, 3).flatten(2)

    def both(self, velocity):
        """Of each half its branch -> conditional and unconditional velocity, on all."""
        return self.gather(velocity[None].contiguous(), [1, 1], self.pair).unbind(0)

    # ---- outside the denoiser

    def once(self, make):
        """make() on rank 0; what it returns, tensors among it, on all."""
        made = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]

    def least(self, free):
        """The Memory to plan with, on all: of the device what the rank with the least has, of the host a share."""
        found = [None] * self.size
        dist.all_gather_object(found, tuple(free))
        share = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        device = None if free.device is None else min(memory[0] for memory in found)
        return Memory(device, *(min(memory[i] for memory in found) // share for i in (1, 2)))

    def share(self, count):
        """Tiles of the VAE that this rank works on, of `count`, a multiple of the ranks."""
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def join(self, x, lengths, axis):
        """The strips of all ranks, side by side, on all.  x (..., lengths[rank], ...) along `axis`, on any device -> (..., sum, ...)"""
        device = torch.device("cuda", torch.cuda.current_device()) if dist.is_initialized() and dist.get_backend() == "nccl" else x.device
        return self.gather(x.to(device).movedim(axis, 0).contiguous(), lengths).movedim(0, axis)


# ------------------------------------------------------------------------------------------------------------------- a run of tokens

class Run(NamedTuple):
    """What a rank needs of a clip."""
    cond: Cond                   # of the latent frames that the run touches; segments, rope and context of its tokens alone
    frames: slice                # those frames
    skip: int                    # tokens of the first of them that belong to the rank before
    lengths: tuple[int, ...]     # tokens of every rank
    video: tuple[int, ...]       # video tokens of every rank
    grid: tuple[int, int, int]   # of the whole clip


def cut_evenly(n, parts):
    """Edges of `parts` runs of n tokens, of which none has more than one more than another."""
    return [n * i // parts for i in range(parts + 1)]


def cut(cond, index, runs):
    """Run `index` of a clip -> Run"""
    (T, h, w), N = cond.grid, sum(n for n, _ in cond.segments)
    if N < runs:
        raise ValueError(f"{runs} ranks cannot share {N} tokens: start fewer")
    edges, L, hw = cut_evenly(N, runs), T * h * w, h * w
    a, b = edges[index:index + 2]
    first = min(a // hw, T - 1)                                      # of a run without video tokens the last frame, and skip is all of it
    last = min(T, max(first + 1, -(-b // hw)))
    starts = [0, *accumulate(n for n, _ in cond.segments)]
    shares = [(max(0, min(b, stop) - max(a, start)), row) for (start, stop), (_, row) in zip(pairwise(starts), cond.segments)]
    layers = tuple(layer if layer.audio is None else LayerCond(layer.text, layer.audio[:, :, first:last].clone(), layer.adain[:, :, first:last])
                   for layer in cond.layers)
    bias = cond.video_bias if cond.video_bias is None or cond.video_bias.ndim == 2 else cond.video_bias[:, first * hw:last * hw].clone()
    mine = replace(cond, grid=(last - first, h, w), segments=tuple(Segment(n, row) for n, row in shares if n), rope=cond.rope[:, a:b].clone(),
                   layers=layers, image=None if cond.image is None else cond.image[:, :, first:last].clone(), video_bias=bias,
                   context=None if cond.context is None else cond.context[:, max(0, a - L):max(0, b - L)].clone())
    lengths, video = (tuple(max(0, min(stop, end) - min(start, end)) for start, stop in pairwise(edges)) for end in (N, L))
    return Run(mine, slice(first, last), min(a, L) - first * hw, lengths, video, cond.grid)


class ParallelDenoiser:
    """FastDenoiser with its tokens spread over ranks: the same `prepare` and call, and `both` for the two branches of guidance.

    ranks  a Ranks        others as in FastDenoiser; attend gets the heads of this rank, of all tokens
    """

    def __init__(self, net, chunk=None, attend=blocks.attend, compile=False, host_layers=False, *, ranks):
        self.inner, self.ranks, self.host_layers, self.lengths = attend, ranks, host_layers, ()
        self.fast = blocks.FastDenoiser(net, chunk, attend if ranks.runs == 1 else self.attend, compile)

    def attend(self, q, k, v, layer):
        """q, k, v (B, n, K, D) of this rank's tokens -> (B, n, C)"""
        q, k, v = (self.ranks.to_heads(x, self.lengths) for x in (q, k, v))                          # (B, N, K/runs, D)
        y = self.inner(q, k, v, layer)                               # (B, N, C/runs)
        del k, v                                                     # their room is the results'
        return self.ranks.to_tokens(y, self.lengths)

    def prepare(self, **arguments):
        """As Denoiser.prepare, but when it is first needed, which a branch of guidance is on half of the ranks -> function that gives a Run"""
        @cache
        def run():
            mine = cut(self.fast.prepare(**arguments), self.ranks.index, self.ranks.runs)
            layers = offload.HostLayers(mine.cond.layers) if self.host_layers else mine.cond.layers
            return mine._replace(cond=replace(mine.cond, layers=layers))
        return run

    @torch.no_grad()
    def __call__(self, latents, t, run):
        """As Denoiser.forward: all latents -> the whole velocity, on every rank"""
        run = run()
        self.lengths = run.lengths
        x = self.fast.tokens(latents[:, :, run.frames], t, run.cond, run.skip)                       # (B, own video tokens, 4*out_dim)
        if self.ranks.runs > 1:
            x = self.ranks.gather(x.transpose(0, 1).contiguous(), run.video, self.ranks.team).transpose(0, 1)
        return unpatchify(x, run.grid)                               # (B, out_dim, T, H, W)

    def both(self, latents, t, cond, uncond):
        """-> conditional and unconditional velocity"""
        if self.ranks.halves == 1:
            return self(latents, t, cond), self(latents, t, uncond)
        return self.ranks.both(self(latents, t, (cond, uncond)[self.ranks.half]))


def sent_bytes(cfg, split, tokens, video_tokens, itemsize):
    """What a rank sends to others in one forward: queries, keys, values and results of every layer, its video tokens at the end."""
    runs = split[1]
    layer = 4 * tokens / runs * cfg.dim * (runs - 1) / runs * itemsize
    return int(cfg.n_layer * layer + video_tokens / runs * 4 * cfg.out_dim * 4 * (runs - 1))
