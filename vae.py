"""Causal 3D VAE: video <-> latents, for Wan2.1 (stride 4, 8, 8) and Wan2.2 (stride 4, 16, 16), streaming in time.

A video of P = 1 + 4n frames has T = 1 + n latent frames: the first frame is encoded alone, as a picture, then every four frames become
one latent frame. All layers are causal in time, so a video can be processed in chunks of any length, in constant memory.

Feature cache. A causal convolution needs the last frames of its previous input. They live outside the network, in `cache`: a queue with an entry per
temporal convolution. Each layer takes its entry from the front and appends the new one at the back. A stream starts with a single frame and None in
every entry: convolutions then pad with zeros, and changes of the frame rate let the frame through, so that one frame stays one frame.

Tiles. Only the attention of the bottleneck mixes all pixels of a frame. The stages of higher resolution can therefore run on one tile of
the picture after the other, each read with a halo of neighbouring pixels: less memory, same result.

Axes    B batch   T latent frames   P pixel frames   H W latent size   C width   n h w frames, height, width at a layer
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/vae2_1.py and vae2_2.py, cited below as "official 2.1 L535", "official 2.2 L336"
"""
import math
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:              # the released Wan2.1 VAE, 126.9 M parameters
    dim: int = 96             # encoder width at full resolution
    dec_dim: int = 96         # decoder width at full resolution
    z_dim: int = 16           # latent channels
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)         # width of each stage, in units of dim; all but the last halve the picture
    num_res_blocks: int = 2                          # per encoder stage; decoder stages have one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # which of the halvings also halve the frame rate
    patch: int = 1            # pixels of a patch x patch square enter as channels
    shortcuts: bool = False   # stages have an average-down or repeat-up path around them
    mean: tuple[float, ...] = (  # per latent channel, over the training videos: normalised latents have mean 0, deviation 1
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

    def __post_init__(self):
        if not (self.z_dim == len(self.mean) == len(self.std) and len(self.dim_mult) == 1 + len(self.temporal_downsample)):
            raise ValueError(f"VAEConfig wants {self.z_dim} (z_dim) values in mean and std and {len(self.dim_mult) - 1} in temporal_downsample, "
                             f"got {len(self.mean)}, {len(self.std)} and {len(self.temporal_downsample)}")

    @property
    def stride(self):
        """Pixels per latent: (time, height, width)."""
        space = self.patch * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space

    @property
    def decoder_halos(self):
        """Halo of a tile at the input of every decoder stage, in pixels of that resolution: (13, 12, 10, 7).

        Counted from the output: one per 3x3 convolution (conv_out, two per block, one per upsampling); half before an upsampling, rounded up.
        """
        blocks = 2 * (self.num_res_blocks + 1)
        halos = [1 + blocks]
        for _ in self.temporal_downsample:
            halos.insert(0, (halos[0] + 2) // 2 + blocks)
        return tuple(halos)

    @property
    def encoder_halo(self):
        """Halo of a tile of the encoder's input, in latent pixels: 9 (68 pixels of video, 8.5 latent pixels, are seen).

        Counted from the bottleneck: one per 3x3 convolution; twice as many before a downsampling, and one for its convolution. A whole
        number of latent pixels keeps the downsamplings of a tile aligned with those of the picture.
        """
        halo = 2 * self.num_res_blocks
        for _ in self.temporal_downsample:
            halo = 2 * halo + 1 + 2 * self.num_res_blocks
        return -(-(halo + 1) // 2 ** len(self.temporal_downsample))


VAE22 = VAEConfig(            # the released Wan2.2 VAE, 704.7 M parameters
    dim=160, dec_dim=256, z_dim=48, patch=2, shortcuts=True,
    mean=(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
          0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
          -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
          -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    std=(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744))


# ---- pixels between space, time and channels; x is (B, n, h, w, C) from here to the streams ----

def space_to_depth(x, t, s):
    """Move each t x s x s box of pixels behind the channels: (B, n*t, h*s, w*s, C) -> (B, n, h, w, C, t, s, s)."""
    x = x.unflatten(1, (-1, t)).unflatten(3, (-1, s)).unflatten(5, (-1, s))       # (B, n, t, h, s, w, s, C)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6)                                      # (B, n, h, w, C, t, s, s)


def depth_to_space(x):
    """The inverse: (B, n, h, w, C, t, s, s) -> (B, n*t, h*s, w*s, C)."""
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)                                         # (B, n, t, h, s, w, s, C)
    return x.flatten(1, 2).flatten(2, 3).flatten(3, 4)                            # (B, n*t, h*s, w*s, C)


def average_down(x, y, t, s):
    """Shortcut of an encoder stage: x (B, n*t, h*s, w*s, C) averaged to the shape of y, in groups of channels and neighbours.

    The first frame has no partner in time and is paired with a zero frame, which halves it (kept, official 2.2 L336).
    """
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % t, 0))                          # (B, n*t, h*s, w*s, C)
    x = space_to_depth(x, t, s).flatten(4)                                        # (B, n, h, w, C*t*s*s)
    return x.unflatten(4, (y.shape[4], -1)).mean(5)                               # (B, n, h, w, C')


def repeat_up(x, y, t, s):
    """Shortcut of a decoder stage: x (B, n, h, w, C) repeated to the shape of y (B, n*t, h*s, w*s, C').

    The first frame stays one frame: only the last of its t copies is kept, as y has no more (official 2.2 L410).
    """
    x = x.repeat_interleave(y.shape[4] * t * s * s // x.shape[4], dim=4)          # (B, n, h, w, C'*t*s*s)
    return depth_to_space(x.unflatten(4, (-1, t, s, s)))[:, -y.shape[1]:]         # (B, n*t, h*s, w*s, C')


def uncropped(x, scale, have, want):
    return x


ONEDNN = torch.backends.mkldnn.is_available()   # the library behind PyTorch's fast convolutions on most CPUs


def convolve(x, layer):
    """A Conv2d on (B, h, w, C) or a Conv3d on (B, n, h, w, C). Channels last is the fast layout for convolutions and norms alike.

    On a CPU oneDNN is called by name: PyTorch's own choice for a single small video is another kernel, up to 15 times slower.
    """
    x = x.movedim(-1, 1)                                                          # (B, C, h, w) or (B, C, n, h, w)
    if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        y = torch.mkldnn_convolution(x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups)
    else:
        y = (F.conv2d if x.ndim == 4 else F.conv3d)(x, layer.weight, layer.bias, layer.stride, layer.padding)
    return y.movedim(1, -1)                                                       # (B, h', w', C') or (B, n', h', w', C')


def pointwise(x, layer):
    """A convolution of kernel size 1, as a linear layer on the last axis: x (..., C) -> (..., C')."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class CausalConv(nn.Conv3d):
    """A convolution over this frame and the two before it; x (B, n, h, w, c_in). It caches the input frames that the next call needs."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__(c_in, c_out, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, cache):
        assert cache[0] is not None or x.shape[1] == 1, f"a stream starts with 1 frame, got {x.shape[1]}"
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0)) if cache[0] is None else torch.cat([cache[0], x], dim=1)   # (B, 2+n, h, w, c_in)
        cache.popleft()                                                           # freed before the convolution
        cache.append(x[:, self.stride[0] - 3:].clone())                           # 2 frames, or 1 with stride 2; a view would keep all of x
        return convolve(x, self)                                                  # (B, n or n/2, h, w, c_out)


class Downsample(nn.Module):
    """Half the height and width, then half the frames if `time`: each from two frames and the one before them."""

    def __init__(self, C, time):
        super().__init__()
        self.space = nn.Conv2d(C, C, 3, stride=2)
        self.time = CausalConv(C, C, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x, cache):
        y = F.pad(x.flatten(0, 1), (0, 0, 0, 1, 0, 1))                            # (B*n, h+1, w+1, C)
        y = convolve(y, self.space).unflatten(0, x.shape[:2])                     # (B, n, h/2, w/2, C)
        if self.time and cache[0] is not None:
            y = self.time(y, cache)                                               # (B, n/2, h/2, w/2, C)
        elif self.time:                                                           # the first frame is kept as it is
            cache.popleft()
            cache.append(y)
        return y


class Upsample(nn.Module):
    """Twice the frames if `time`, both of a pair from one convolution, then twice the height and width."""

    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.time = CausalConv(c_in, 2 * c_in, (3, 1, 1)) if time else None
        self.space = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x, cache):
        if self.time and cache[0] is not None:
            x = self.time(x, cache).unflatten(4, (2, -1)).movedim(4, 2).flatten(1, 2)   # (B, 2n, h, w, c_in)
        elif self.time:                                                           # the first frame is kept as it is; later frames see zeros for it
            cache.popleft()
            cache.append(x.new_zeros(len(x), 2, *x.shape[2:]))
        y = x.flatten(0, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2)   # (B*n, 2h, 2w, c_in), nearest
        return convolve(y, self.space).unflatten(0, x.shape[:2])                  # (B, n, 2h, 2w, c_out)


class RMSNorm(nn.Module):
    """Over the channels of each pixel; x (..., C). The norm is accumulated in float32."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) * x.shape[-1] ** -0.5   # (..., 1)
        least = max(1e-12, torch.finfo(x.dtype).tiny)                             # 1e-12 is 0 in float16, and 0/0 not a number
        return (x / rms.clamp_min(least).to(x.dtype)).mul_(self.gamma.flatten())


class ResBlock(nn.Module):
    """x (B, n, h, w, c_in) -> (B, n, h, w, c_out)"""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = RMSNorm(c_in, 1, 1, 1)
        self.conv1 = CausalConv(c_in, c_out)
        self.norm2 = RMSNorm(c_out, 1, 1, 1)
        self.conv2 = CausalConv(c_out, c_out)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, cache):
        y = self.norm2(self.conv1(F.silu(self.norm1(x), inplace=True), cache))
        y = self.conv2(F.silu(y, inplace=True), cache)
        return y + (pointwise(x, self.shortcut) if self.shortcut else x)


class Attention(nn.Module):
    """Self-attention among the pixels of each frame, with one head."""

    def __init__(self, C):
        super().__init__()
        self.norm = RMSNorm(C, 1, 1)
        self.qkv = nn.Conv2d(C, 3 * C, 1)
        self.proj = nn.Conv2d(C, C, 1)

    def forward(self, x):
        y = self.norm(x).flatten(0, 1).flatten(1, 2).unsqueeze(1)                 # (B*n, 1, h*w, C)
        q, k, v = pointwise(y, self.qkv).chunk(3, dim=3)                          # (B*n, 1, h*w, C) each
        y = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)              # (B, n, h, w, C)
        return x + pointwise(y, self.proj)


class MidBlock(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, C):
        super().__init__()
        self.block1 = ResBlock(C, C)
        self.attention = Attention(C)
        self.block2 = ResBlock(C, C)

    def forward(self, x, cache):
        return self.block2(self.attention(self.block1(x, cache)), cache)


class Stage(nn.Module):
    """Residual blocks at one resolution, then a change of resolution (if any); in Wan2.2 a shortcut around all of it."""

    def __init__(self, c_in, c_out, blocks, resample=None, shortcut=None):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.resample = resample
        self.shortcut = shortcut              # a function of the stage's input x and output y

    def forward(self, x, cache):
        y = x
        for block in self.blocks:
            y = block(y, cache)                                                   # (B, n, h, w, c_out)
        if self.resample:
            y = self.resample(y, cache)                                           # half or twice n, h, w
        return y + self.shortcut(x, y) if self.shortcut else y


class Encoder(nn.Module):
    """Pixels (B, 3, P, 8H, 8W) -> mean and log variance of the latents (B, 2*z_dim, T, H, W), not normalised."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.patch, self.scale, self.halo = cfg.patch, cfg.stride[1], cfg.encoder_halo
        self.conv_in = CausalConv(3 * cfg.patch ** 2, widths[0])
        self.stages = nn.ModuleList()
        for c_in, c_out, time in zip(widths, widths[1:], (*cfg.temporal_downsample, None)):   # the last stage keeps its resolution
            resample = None if time is None else Downsample(c_out, time)
            shortcut = partial(average_down, t=1 + bool(time), s=1 if time is None else 2) if cfg.shortcuts else None
            self.stages.append(Stage(c_in, c_out, cfg.num_res_blocks, resample, shortcut))
        self.middle = MidBlock(c_out)
        self.norm_out = RMSNorm(c_out, 1, 1, 1)
        self.conv_out = CausalConv(c_out, 2 * cfg.z_dim)
        self.to_latent = nn.Conv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)

    def run_stages(self, x, cache, crop=uncropped):
        """All pixels (B, P, 8H, 8W, 3), on any device -> the bottleneck's input (B, T, H, W, C), cropped to a tile."""
        x = crop(x, self.scale, math.inf, self.scale * self.halo).to(self.conv_in.weight)   # (B, P, h, w, 3)
        x = space_to_depth(x, 1, self.patch).transpose(6, 7).flatten(4)           # (B, P, h/p, w/p, 3*p*p), columns before rows (official 2.2 L287)
        x = self.conv_in(x, cache)                                                # (B, P, h/p, w/p, dim)
        for stage in self.stages:
            x = stage(x, cache)                                                   # (B, T, H + halos, W + halos, C) in the end
        return crop(x, 1, self.halo, 0)

    def bottleneck(self, x, cache):
        """(B, T, H, W, C) -> mean and log variance (B, 2*z_dim, T, H, W)"""
        x = self.middle(x, cache)
        x = self.conv_out(F.silu(self.norm_out(x), inplace=True), cache)          # (B, T, H, W, 2*z_dim)
        return pointwise(x, self.to_latent).movedim(-1, 1)

    def forward(self, x, cache):
        return self.bottleneck(self.run_stages(x.movedim(1, -1), cache), cache)   # (B, 2*z_dim, T, H, W)


class Decoder(nn.Module):
    """Latents (B, z_dim, T, H, W), not normalised -> pixels (B, 3, P, 8H, 8W), not clamped."""

    def __init__(self, cfg):
        super().__init__()
        c_in = cfg.dec_dim * cfg.dim_mult[-1]
        self.patch, self.scale, self.halos = cfg.patch, 1, cfg.decoder_halos
        self.from_latent = nn.Conv3d(cfg.z_dim, cfg.z_dim, 1)
        self.conv_in = CausalConv(cfg.z_dim, c_in)
        self.middle = MidBlock(c_in)
        self.stages = nn.ModuleList()
        for mult, time in zip(reversed(cfg.dim_mult), (*reversed(cfg.temporal_downsample), None)):   # the last stage keeps its resolution
            c_out = cfg.dec_dim * mult
            c_up = c_out if cfg.shortcuts else c_out // 2                         # Wan2.1 halves the width on the way up
            resample = None if time is None else Upsample(c_out, c_up, time)
            shortcut = partial(repeat_up, t=1 + time, s=2) if cfg.shortcuts and resample else None
            self.stages.append(Stage(c_in, c_out, cfg.num_res_blocks + 1, resample, shortcut))
            c_in = c_up
        self.norm_out = RMSNorm(c_out, 1, 1, 1)
        self.conv_out = CausalConv(c_out, 3 * cfg.patch ** 2)

    def bottleneck(self, z, cache):
        """Latents (B, z_dim, T, H, W) -> (B, T, H, W, C)"""
        x = self.conv_in(pointwise(z.movedim(1, -1), self.from_latent), cache)    # (B, T, H, W, C)
        return self.middle(x, cache)

    def run_stages(self, x, cache, crop=uncropped):
        """All of the bottleneck's output (B, T, H, W, C), on any device -> pixels (B, P, 8H, 8W, 3), cropped to a tile."""
        scale, have = 1, math.inf
        for stage, want in zip(self.stages, self.halos):
            x = crop(x, scale, have, want).to(self.conv_in.weight.device)         # (B, n, h, w, C)
            x = stage(x, cache)                                                   # (B, 2n or n, 2h, 2w, C')
            scale, have = (2 * scale, 2 * want) if stage.resample else (scale, want)
        x = self.output(x, cache)                                                 # (B, P, h/p, w/p, 3*p*p)
        x = depth_to_space(x.unflatten(4, (-1, 1, self.patch, self.patch)).transpose(6, 7))   # (B, P, h, w, 3)
        return crop(x, scale * self.patch, have * self.patch, 0)

    def output(self, x, cache):
        return self.conv_out(F.silu(self.norm_out(x), inplace=True), cache)       # (B, P, h, w, 3*patch*patch)

    def forward(self, z, cache):
        return self.run_stages(self.bottleneck(z, cache), cache).movedim(-1, 1)   # (B, 3, P, 8H, 8W)


# ---- streams ----

def new_cache(*nets):
    """The feature cache of a stream that has not begun: None for every temporal convolution."""
    return deque(None for net in nets for layer in net.modules() if isinstance(layer, CausalConv))


def in_tiles(net, layers, chunks, tiles, ranks=None):
    """Stream `chunks` (B, n, h, w, C) through net.run_stages, whose temporal convolutions are in `layers`; in tiles as fast/vae_plan.py says."""
    def stream(chunks, crop):
        cache = new_cache(*layers)
        return (net.run_stages(x, cache, crop) for x in chunks)

    if tiles == 1 and ranks is None:
        return stream(chunks, uncropped)
    from fast.vae_plan import stream_tiles                                        # here: a whole picture does without
    return stream_tiles(stream, chunks, net.scale, tiles, ranks)


def regroup(pieces, size):
    """Cut an iterable of (B, C, any, h, w) pieces anew along time: one frame alone, then `size` frames at a time, then the rest."""
    rest, want = None, 1
    for piece in pieces:
        rest = piece if rest is None else torch.cat([rest, piece], dim=2)         # (B, C, any, h, w)
        while rest.shape[2] >= want:
            yield rest[:, :, :want]                                               # (B, C, want, h, w)
            rest, want = rest[:, :, want:], size
    if rest.shape[2]:
        yield rest


class VAE(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.stride = config.stride
        self.tiles = 1        # more tiles, one after the other: less memory, some more work, the same result within rounding
        self.ranks = None     # a Ranks of fast/parallel.py: each works on its share of the tiles
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, video, chunk=None):
        """Video to normalised latents: the mean of the latent distribution, not a sample.

        video    (B, 3, P, h, w) float in [-1, 1]; P = 1 + 4n, h and w multiples of the stride (8, or 16 for Wan2.2)
        chunk    latent frames computed together: changes memory and a little speed, not the result; by default 1 on a GPU, 2 on a CPU
        returns  (B, z_dim, 1 + n, h/8, w/8) float32
        raises   ValueError for another frame count or size
        source   official 2.1 L516-542, L647, where the last (P - 1) % 4 frames are dropped without notice
        """
        self.check_size(*video.shape[2:])     # at once; a stream knows its length only at the end
        return self.with_fp32_fallback(lambda: torch.cat(list(self.encode_stream([video], chunk)), dim=2))

    def decode(self, latents, chunk=None):
        """Normalised latents to video.

        latents  (B, z_dim, T, H, W)        chunk  as in encode
        returns  (B, 3, 1 + 4 (T-1), 8H, 8W) float32, clamped to [-1, 1] (16H, 16W for Wan2.2)
        source   official 2.1 L544-569, L657
        """
        return self.with_fp32_fallback(lambda: torch.cat(list(self.decode_stream([latents], chunk)), dim=2))

    def with_fp32_fallback(self, run):
        """run() encodes or decodes a whole video. If its result is not finite in float16 (maximum 65504), it runs again in float32."""
        result = run()
        if self.dtype == torch.float16 and not result.sum(dtype=torch.float32).isfinite():
            print("warning: the VAE's numbers are too large for float16: it goes on in float32, slower", file=sys.stderr)
            self.widen()
            result = run()
        return result

    @property
    def dtype(self):
        return self.decoder.conv_in.weight.dtype

    def widen(self):
        """From float16 to float32, in tiles of half the size: the memory was planned for float16."""
        self.float()
        self.tiles *= 2

    @torch.no_grad()
    def encode_stream(self, pieces, chunk=None):
        """encode() for one video that comes as an iterable of (B, 3, any, h, w) pieces: a generator of latents, in constant memory.

        With more than one tile all pieces are read before the first latent comes, and wait in host memory.
        raises   ValueError at once for a size that is no multiple of the stride, at the end if there were not 1 + 4n frames in all
        """
        net, (mean, std) = self.encoder, self.latent_statistics()
        cache, chunks = new_cache(net.middle, net.conv_out), self.checked(pieces, self.stride[0] * self.chunk(chunk))
        for x in in_tiles(net, [net.conv_in, net.stages], chunks, self.tiles, self.ranks):
            mu, _ = net.bottleneck(x.to(mean.device), cache).float().chunk(2, dim=1)   # (B, z_dim, T, H, W)
            yield ((mu - mean) / std).contiguous()

    @torch.no_grad()
    def decode_stream(self, pieces, chunk=None):
        """decode() for latents that come as an iterable of (B, z_dim, any, H, W) pieces: a generator of frames, in constant memory.

        With more than one tile the whole video is decoded into host memory before its first frames come.
        """
        net, (mean, std) = self.decoder, self.latent_statistics()
        cache, chunks = new_cache(net.conv_in, net.middle), regroup(pieces, self.chunk(chunk))
        chunks = (net.bottleneck((z.to(mean) * std + mean).to(net.conv_in.weight), cache) for z in chunks)   # (B, T, H, W, C) each
        for x in in_tiles(net, [net.stages, net.conv_out], chunks, self.tiles, self.ranks):
            yield x.to(mean).clamp(-1, 1).movedim(-1, 1).contiguous()             # (B, 3, P, 8H, 8W)

    def chunk(self, chunk):
        """One latent frame fills a GPU at any useful size."""
        return chunk or (1 if self.decoder.conv_in.weight.is_cuda else 2)

    def checked(self, pieces, size):
        """Video pieces regrouped, (B, n, h, w, 3) each; the errors of encode_stream."""
        P = 0
        for x in regroup(pieces, size):
            P += x.shape[2]
            self.check_size(P, *x.shape[3:])
            yield x.movedim(1, -1)

    def check_size(self, P, h, w):
        t, s, _ = self.stride
        if P < 1 or (P - 1) % t:
            low = max(P - (P - 1) % t, 1)
            raise ValueError(f"vae.encode takes 1 + {t}n frames, got {P}: trim to {low} or pad to {low + t}")
        if h % s or w % s:
            raise ValueError(f"vae.encode takes height and width in multiples of {s}, got {h} x {w}: crop or resize the video")

    def latent_statistics(self):
        """Mean and deviation of the raw latents, (1, z_dim, 1, 1, 1) float32 each, on the device of the weights."""
        device = self.decoder.conv_in.weight.device
        return [torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (self.config.mean, self.config.std)]
