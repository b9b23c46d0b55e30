"""The bytes that the VAE takes on a device, counted from its layers, and in how many tiles it may be cut."""
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch

from fast.probe import GIB
from vae import VAE, CausalConv

VAE_OVERHEAD = 0.3 * GIB
VAE_WORKSPACE = 1.2          # of convolution kernels and the allocator: an H200 reserved 1.12 to 1.22 times the bytes counted, in tiles of an encoder 1.34


def vae_cuts(config, H, W, dtype, ranks=1):
    """[(tiles, bytes that the VAE then takes beside its weights)], from one tile for each rank to as many as help"""
    return [(tiles, VAE_WORKSPACE * vae_bytes(config, H, W, tiles=tiles, dtype=dtype) + VAE_OVERHEAD)
            for tiles in (ranks * n for n in (1, 2, 3, 4, 6, 8, 12, 16)) if tiles <= max(H, W)]


def vae_bytes(config, H, W, tiles=1, dtype=torch.bfloat16, chunk=1):
    """About the most bytes that encoding or decoding a video of H x W latents takes on a device, whichever is more.

    Not counted: the weights, what the caller holds and the work space of convolution kernels.
    """
    return max(vae_stream_bytes(config, H, W, tiles, dtype, chunk, decode) for decode in (False, True))


@cache
def network(config):
    """Without memory: its layers are looked at many times in a plan."""
    with torch.device("meta"):
        return VAE(config)


def vae_stream_bytes(config, H, W, tiles, dtype, chunk, decode):
    """The feature cache (two frames per causal convolution), the working set of the largest residual block or upsampling, a chunk of video."""
    net = network(config).decoder if decode else network(config).encoder
    cuts, full, frames = cut_tiles(H, W, tiles), 2 ** len(config.temporal_downsample), chunk * config.stride[0]
    n, scale, halos = chunk, 1, config.decoder_halos
    if not decode:
        n, scale, halos = frames, full, [config.encoder_halo * full >> i for i in range(len(net.stages))]
    held, live = 10 * H * W * net.middle.block1.conv1.in_channels, []             # the five convolutions of the bottleneck
    for stage, halo in zip(net.stages, halos):
        pixels = min(H, W) * scale * max(stop - start for start, stop in (tile.bounds(scale, halo) for tile in cuts))
        c_in, C, time = stage.blocks[0].conv1.in_channels, stage.blocks[0].conv1.out_channels, getattr(stage.resample, "time", None)
        cached = [layer for layer in stage.modules() if isinstance(layer, CausalConv)]
        cached += [net.conv_out if decode else net.conv_in] if scale == full else []
        held += 2 * pixels * sum(layer.in_channels for layer in cached)
        live.append(pixels * ((3 * n + 2) * c_in + n * C))                        # first block: input, normed, with its cache; output
        live.append(pixels * (n * c_in + (4 * n + 2) * C))                        # a later one: the same beside the stage's input
        if decode and stage.resample:
            n, scale, c_up = n * (2 if time else 1), 2 * scale, stage.resample.space.out_channels
            live.append(pixels * n * (c_in + C) + 4 * pixels * n * (3 * c_up if stage.shortcut else C + c_up))
        elif stage.resample:
            n, scale = n // (2 if time else 1), scale // 2
    return (held + max(live)) * dtype.itemsize + 4 * 3 * H * W * config.stride[1] ** 2 * frames // tiles   # the video is float32


# ---- tiles: less memory, same result ----

@dataclass(frozen=True)
class Tile:
    """Latent rows or columns start..stop of `size`."""
    axis: int                 # of (B, n, h, w, C): 2 rows, 3 columns
    start: int
    stop: int
    size: int

    def bounds(self, scale, halo):
        """First pixel and the one after the last, at `scale` pixels per latent, with a halo where the picture continues."""
        return max(self.start * scale - halo, 0), min(self.stop * scale + halo, self.size * scale)

    def crop(self, x, scale, have, want):
        """x (B, n, h, w, C) with `have` pixels of halo (inf: all there are) -> with `want`, a view."""
        (first, _), (start, stop) = self.bounds(scale, have), self.bounds(scale, want)
        return x.narrow(self.axis, start - first, stop - start)


def cut_tiles(H, W, tiles):
    """H x W latents -> tiles along the longer side, as equal as possible."""
    axis, size = (2, H) if H > W else (3, W)
    if not 1 <= tiles <= size:
        raise ValueError(f"{W} x {H} latents can be cut into 1 to {size} tiles, got {tiles}")
    edges = [size * i // tiles for i in range(tiles + 1)]
    return [Tile(axis, a, b, size) for a, b in zip(edges, edges[1:])]


def stream_tiles(stream, chunks, scale, tiles, ranks=None):
    """The whole stream of one tile runs before the next tile starts, so only one tile's feature cache is alive.

    stream  function (chunks, crop) -> results        chunks  (B, n, h, w, C) each, `scale` pixels per latent; they and all results wait on the host,
            unless a rank has one tile alone
    ranks   a Ranks of fast/parallel.py: each has its share of the tiles, and the results of all
    yields  (B, n, h, w, C), all of the picture
    """
    chunks = iter(chunks)
    first = next(chunks)
    (H, W), chunks = (n // scale for n in first.shape[2:4]), chain([first], chunks)
    if ranks is None or ranks.size > max(H, W):                      # too small to share: every rank has all of it
        cuts = mine = cut_tiles(H, W, tiles)
        ranks = None
    else:
        cuts = cut_tiles(H, W, shared_tiles(tiles, ranks.size, max(H, W)))
        mine = [cuts[i] for i in ranks.share(len(cuts))]
    if len(mine) == 1:
        strips = stream(chunks, mine[0].crop)
    else:
        chunks = [x.cpu() for x in chunks]
        done = [[x.cpu() for x in stream(chunks, tile.crop)] for tile in mine]
        strips = (torch.cat(parts, dim=cuts[0].axis) for parts in zip(*done))
    if ranks is None:
        yield from strips
        return
    wide, each = sum(tile.stop - tile.start for tile in mine), len(mine)
    latents = [sum(tile.stop - tile.start for tile in cuts[i:i + each]) for i in range(0, len(cuts), each)]
    for x in strips:                                                 # (B, n, h, w, C) of this rank's tiles
        yield ranks.join(x, [n * x.shape[cuts[0].axis] // wide for n in latents], cuts[0].axis)


def shared_tiles(tiles, ranks, size):
    """At least so many tiles of `size` latents, as many for each rank."""
    return ranks * min(-(-tiles // ranks), size // ranks)
