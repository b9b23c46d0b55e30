"""Causal 3D VAE: video <-> latents, for Wan2.1 (stride 4, 8, 8) and Wan2.2 (stride 4, 16, 16), streaming in time.

A video of P = 1 + 4n frames becomes T = 1 + n latent frames: the first frame is encoded alone, as a picture, and every four
frames after it become one latent. No layer looks ahead in time, so a video can pass in pieces of any length, in constant memory.

What a layer must remember of the frames before lives outside the network, in `past`: a queue with one entry per layer that looks
back. A layer takes its entry from the front and puts the new one at the back, so one pass over the network turns the queue once.
One rule covers the start: a stream starts with a single frame, which finds None in the queue. For it convolutions see zeros in
the past, and changes of the frame rate let it through as it is: one frame stays one frame, down and up.

Only the attention of the middle block looks across the picture. All that works at a higher resolution, `local` in both networks,
can therefore run on one strip of the picture after the other, with enough real pixels around each (a halo): less memory, same result.

Axes    B batch   T latent frames   P pixel frames   H W latent size   C width   n h w frames, height, width where a layer works
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/vae2_1.py and vae2_2.py, cited below as "official 2.1 L535", "official 2.2 L336"
"""
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import chain

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
        if not self.z_dim == len(self.mean) == len(self.std):
            raise ValueError(f"VAEConfig wants {self.z_dim} (z_dim) values in mean and std, got {len(self.mean)} and {len(self.std)}")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(f"VAEConfig wants {len(self.dim_mult) - 1} temporal_downsample for dim_mult {self.dim_mult}, "
                             f"got {self.temporal_downsample}")

    @property
    def stride(self):
        """Pixels per latent: (time, height, width)."""
        space = self.patch * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space

    @property
    def decoder_halos(self):
        """Pixels that a decoder stage must see around those wanted in the end, at the resolution it starts with: (13, 12, 10, 7).

        Counted backwards: every 3x3 convolution looks one pixel further (conv_out, two per block, one behind each doubling), and
        before a doubling of the picture there were half as many pixels, rounded up.
        """
        blocks = 2 * (self.num_res_blocks + 1)
        halos = [1 + blocks]
        for _ in self.temporal_downsample:
            halos.insert(0, (halos[0] + 2) // 2 + blocks)
        return tuple(halos)

    @property
    def encoder_halo(self):
        """Latent pixels whose video an encoder must see around those wanted: 9, as 68 pixels of the full resolution are 8.5.

        Counted backwards: two per block; twice as many before a halving, whose convolution looks one further to the right and
        below only; one for conv_in. Whole latent pixels keep a strip's halvings in step with those of the picture.
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


# ---- moving pixels between space, time and channels; x is (B, n, h, w, C) from here to the streams ----

def gather(x, t, s):
    """Move each t x s x s box of pixels behind the channels: (B, n*t, h*s, w*s, C) -> (B, n, h, w, C, t, s, s)."""
    x = x.unflatten(1, (-1, t)).unflatten(3, (-1, s)).unflatten(5, (-1, s))       # (B, n, t, h, s, w, s, C)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6)


def scatter(x):
    """The way back: (B, n, h, w, C, t, s, s) -> (B, n*t, h*s, w*s, C)."""
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)                                         # (B, n, t, h, s, w, s, C)
    return x.flatten(1, 2).flatten(2, 3).flatten(3, 4)


def patchify(x, s):
    """(B, n, h*s, w*s, C) -> (B, n, h, w, C*s*s). Channels count columns before rows, unlike in the shortcuts (official 2.2 L287)."""
    return gather(x, 1, s).transpose(6, 7).flatten(4)


def unpatchify(x, s):
    """(B, n, h, w, C*s*s) -> (B, n, h*s, w*s, C)."""
    return scatter(x.unflatten(4, (-1, 1, s, s)).transpose(6, 7))


def average_down(x, y, t, s):
    """Shortcut of an encoder stage: x (B, n*t, h*s, w*s, C) averaged to the shape of y, in groups of channels and neighbours.

    The first frame has no partner in time and is paired with a zero frame, which halves it (kept, official 2.2 L336).
    """
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % t, 0))
    return gather(x, t, s).flatten(4).unflatten(4, (y.shape[4], -1)).mean(5)      # (B, n, h, w, C')


def repeat_up(x, y, t, s):
    """Shortcut of a decoder stage: x (B, n, h, w, C) repeated to the shape of y (B, n*t, h*s, w*s, C').

    The first frame stays one frame: only the last of its t copies is kept, as y has no more (official 2.2 L410).
    """
    x = x.repeat_interleave(y.shape[4] * t * s * s // x.shape[4], dim=4)          # (B, n, h, w, C'*t*s*s)
    return scatter(x.unflatten(4, (-1, t, s, s)))[:, -y.shape[1]:]


@dataclass(frozen=True)
class Strip:
    """Latent rows or columns start..stop of all `size`."""
    axis: int                 # 2 rows, 3 columns
    start: int
    stop: int
    size: int

    def span(self, scale, halo):
        """First pixel and the one behind the last, at `scale` pixels per latent, with a halo where the picture goes on."""
        return max(self.start * scale - halo, 0), min(self.stop * scale + halo, self.size * scale)

    def cut(self, x, scale, have, want):
        """x (B, n, h, w, C) with `have` pixels of halo -> with `want`, a view."""
        (first, _), (start, stop) = self.span(scale, have), self.span(scale, want)
        return x.narrow(self.axis, start - first, stop - start)


def cut_strips(H, W, tiles):
    """Strips across the longer side, as equal as can be."""
    axis, size = (2, H) if H > W else (3, W)
    if not 1 <= tiles <= size:
        raise ValueError(f"{W} x {H} latents can be cut into 1 to {size} tiles, got {tiles}")
    edges = [size * i // tiles for i in range(tiles + 1)]
    return [Strip(axis, a, b, size) for a, b in zip(edges, edges[1:])]


# ---- layers ----

ONEDNN = torch.backends.mkldnn.is_available()   # the library behind PyTorch's fast convolutions on most CPUs


def convolve(x, layer):
    """A Conv2d on (B, h, w, C) or a Conv3d on (B, n, h, w, C). Channels last is the fast layout, on GPUs and CPUs, for norms too.

    On a CPU it always goes through oneDNN: left to itself PyTorch gives one small video to another kernel, up to 15 times slower.
    """
    x = x.movedim(-1, 1)
    if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        y = torch.mkldnn_convolution(x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups)
    else:
        y = (F.conv2d if x.ndim == 4 else F.conv3d)(x, layer.weight, layer.bias, layer.stride, layer.padding)
    return y.movedim(1, -1)


def pointwise(x, layer):
    """A convolution with a 1x1 or 1x1x1 kernel is a linear layer on the last axis of x (..., C)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class CausalConv(nn.Conv3d):
    """A convolution over this frame and the two before it. Its past: the input frames that the next call needs again."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__(c_in, c_out, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, past):
        assert past[0] is not None or x.shape[1] == 1, f"a stream starts with 1 frame, got {x.shape[1]}"
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0)) if past[0] is None else torch.cat([past[0], x], dim=1)   # (B, 2+n, h, w, C)
        past.popleft()
        past.append(x[:, self.stride[0] - 3:].clone())   # 2 frames, or 1 if every other is skipped; a view would keep all of x
        return convolve(x, self)


class Downsample(nn.Module):
    """Half the height and width, then half the frames if `time`: each from two frames and the one before them."""

    def __init__(self, C, time):
        super().__init__()
        self.space = nn.Conv2d(C, C, 3, stride=2)
        self.time = CausalConv(C, C, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x, past):
        y = F.pad(x.flatten(0, 1), (0, 0, 0, 1, 0, 1))                            # (B*n, h+1, w+1, C)
        y = convolve(y, self.space).unflatten(0, x.shape[:2])                     # (B, n, h/2, w/2, C)
        if self.time and past[0] is not None:
            y = self.time(y, past)                                                # (B, n/2, h/2, w/2, C)
        elif self.time:                       # the first frame stays as it is
            past.popleft()
            past.append(y)
        return y


class Upsample(nn.Module):
    """Twice the frames if `time`, the convolution making both of a pair, then twice the height and width."""

    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.time = CausalConv(c_in, 2 * c_in, (3, 1, 1)) if time else None
        self.space = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x, past):
        if self.time and past[0] is not None:
            x = self.time(x, past).unflatten(4, (2, -1)).movedim(4, 2).flatten(1, 2)   # (B, 2n, h, w, c_in)
        elif self.time:                       # the first frame stays as it is, and later ones never see it but zeros instead
            past.popleft()
            past.append(x.new_zeros(len(x), 2, *x.shape[2:]))
        y = F.interpolate(x.flatten(0, 1).movedim(-1, 1), scale_factor=2.0).movedim(1, -1)   # (B*n, 2h, 2w, c_in), nearest
        return convolve(y, self.space).unflatten(0, x.shape[:2])                  # (B, n, 2h, 2w, c_out)


class RMSNorm(nn.Module):
    """Over the channels of each pixel. The mean square is taken in float32."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) * x.shape[-1] ** -0.5
        least = max(1e-12, torch.finfo(x.dtype).tiny)                             # where all channels are 0, 0 comes out in float16 too
        return (x / rms.clamp_min(least).to(x.dtype)).mul_(self.gamma.flatten())


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = RMSNorm(c_in, 1, 1, 1)
        self.conv1 = CausalConv(c_in, c_out)
        self.norm2 = RMSNorm(c_out, 1, 1, 1)
        self.conv2 = CausalConv(c_out, c_out)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, past):
        y = self.norm2(self.conv1(F.silu(self.norm1(x), inplace=True), past))
        y = self.conv2(F.silu(y, inplace=True), past)
        return y + (pointwise(x, self.shortcut) if self.shortcut else x)


class Attention(nn.Module):
    """Each pixel looks at every pixel of its own frame; one head."""

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


class Middle(nn.Module):
    """Works where the picture is smallest; the attention is the only layer that looks across all of it."""

    def __init__(self, C):
        super().__init__()
        self.block1 = ResBlock(C, C)
        self.attention = Attention(C)
        self.block2 = ResBlock(C, C)

    def forward(self, x, past):
        return self.block2(self.attention(self.block1(x, past)), past)


class Stage(nn.Module):
    """Residual blocks at one resolution, a change of resolution (if any), and in Wan2.2 a shortcut around them all."""

    def __init__(self, c_in, c_out, blocks, resample=None, shortcut=None):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.resample = resample
        self.shortcut = shortcut              # a function of the stage's input x and output y

    def forward(self, x, past):
        y = x
        for block in self.blocks:
            y = block(y, past)
        if self.resample:
            y = self.resample(y, past)
        return y + self.shortcut(x, y) if self.shortcut else y


class Encoder(nn.Module):
    """Pixels (B, 3, P, 8H, 8W) -> mean and log variance of the latents (B, 2*z_dim, T, H, W), not normalised."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.patch, self.scale, self.halo = cfg.patch, cfg.stride[1], cfg.encoder_halo
        self.conv_in = CausalConv(3 * cfg.patch ** 2, widths[0])
        self.stages = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
            last = i == len(cfg.dim_mult) - 1
            time = not last and cfg.temporal_downsample[i]
            resample = None if last else Downsample(c_out, time)
            shortcut = partial(average_down, t=1 + time, s=2 - last) if cfg.shortcuts else None   # the last one too, t = s = 1
            self.stages.append(Stage(c_in, c_out, cfg.num_res_blocks, resample, shortcut))
        self.middle = Middle(c_out)
        self.norm_out = RMSNorm(c_out, 1, 1, 1)
        self.conv_out = CausalConv(c_out, 2 * cfg.z_dim)
        self.to_latent = nn.Conv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)

    def local(self, x, past, strip):
        """Pixels (B, P, 8H, 8W, 3), wherever they are -> what the middle block takes of this strip, (B, T, H, W, C)."""
        s, halo = self.scale, self.halo
        x = strip.cut(x, s, s * strip.size, s * halo).to(self.conv_in.weight)     # (B, P, h, w, 3)
        x = self.conv_in(patchify(x, self.patch), past)
        for stage in self.stages:
            x = stage(x, past)
        return strip.cut(x, 1, halo, 0)

    def whole(self, x, past):
        x = self.middle(x, past)                                                  # (B, T, H, W, C)
        x = self.conv_out(F.silu(self.norm_out(x), inplace=True), past)
        return pointwise(x, self.to_latent).movedim(-1, 1)

    def forward(self, x, past):
        x = x.movedim(1, -1)
        return self.whole(self.local(x, past, *cut_strips(x.shape[2] // self.scale, x.shape[3] // self.scale, 1)), past)


class Decoder(nn.Module):
    """Latents (B, z_dim, T, H, W), not normalised -> pixels (B, 3, P, 8H, 8W), not clamped."""

    def __init__(self, cfg):
        super().__init__()
        c_in = cfg.dec_dim * cfg.dim_mult[-1]
        self.patch, self.scale, self.halos = cfg.patch, 1, cfg.decoder_halos
        self.from_latent = nn.Conv3d(cfg.z_dim, cfg.z_dim, 1)
        self.conv_in = CausalConv(cfg.z_dim, c_in)
        self.middle = Middle(c_in)
        self.stages = nn.ModuleList()
        for i, mult in enumerate(reversed(cfg.dim_mult)):
            c_out = cfg.dec_dim * mult
            last = i == len(cfg.dim_mult) - 1
            time = not last and cfg.temporal_downsample[::-1][i]
            c_up = c_out if cfg.shortcuts else c_out // 2                         # Wan2.1 halves the width on the way up
            resample = None if last else Upsample(c_out, c_up, time)
            shortcut = partial(repeat_up, t=1 + time, s=2) if cfg.shortcuts and not last else None
            self.stages.append(Stage(c_in, c_out, cfg.num_res_blocks + 1, resample, shortcut))
            c_in = c_up
        self.norm_out = RMSNorm(c_out, 1, 1, 1)
        self.conv_out = CausalConv(c_out, 3 * cfg.patch ** 2)

    def whole(self, z, past):
        x = self.conv_in(pointwise(z.movedim(1, -1), self.from_latent), past)     # (B, T, H, W, C)
        return self.middle(x, past)

    def local(self, x, past, strip):
        """What the middle block gave, (B, T, H, W, C), wherever it is -> pixels of this strip, (B, P, 8H, 8W, 3)."""
        scale, have = 1, strip.size
        for stage, want in zip(self.stages, self.halos):
            x = stage(strip.cut(x, scale, have, want).to(self.conv_in.weight.device), past)
            scale, have = (2 * scale, 2 * want) if stage.resample else (scale, want)
        x = self.conv_out(F.silu(self.norm_out(x), inplace=True), past)           # (B, P, h, w, 3*patch*patch)
        return strip.cut(unpatchify(x, self.patch), scale * self.patch, have * self.patch, 0)

    def forward(self, z, past):
        return self.local(self.whole(z, past), past, *cut_strips(*z.shape[3:], 1)).movedim(-1, 1)


# ---- streams ----

def new_past(*nets):
    """The queue of a stream that has not begun: one None per layer that looks back in time."""
    return deque(None for net in nets for layer in net.modules() if isinstance(layer, CausalConv))


def in_strips(net, layers, pieces, tiles):
    """Stream `pieces` (B, n, h, w, C) through net.local, whose `layers` look back in time.

    The whole stream of one strip comes before the next strip, so that the past of one strip is all that is held. What waits for
    its turn, all pieces and all that comes of them, waits in host memory.
    """
    def stream(pieces, strip):
        past = new_past(*layers)
        for x in pieces:
            yield net.local(x, past, strip)

    first = next(pieces, None)
    if first is None:
        return
    strips, pieces = cut_strips(first.shape[2] // net.scale, first.shape[3] // net.scale, tiles), chain([first], pieces)
    if tiles == 1:
        yield from stream(pieces, *strips)
        return
    pieces = [x.cpu() for x in pieces]
    done = [[x.cpu() for x in stream(pieces, strip)] for strip in strips]
    for parts in zip(*done):
        yield torch.cat(parts, dim=strips[0].axis)


def regroup(pieces, size):
    """Cut an iterable of (B, C, any, h, w) pieces anew along time: one frame alone, then `size` frames at a time, then the rest."""
    if size < 1:
        raise ValueError(f"a chunk is 1 latent frame or more, got {size}")
    rest, want = None, 1
    for piece in pieces:
        rest = piece if rest is None else torch.cat([rest, piece], dim=2)
        while rest.shape[2] >= want:
            yield rest[:, :, :want]
            rest, want = rest[:, :, want:], size
    if rest is not None and rest.shape[2]:
        yield rest


class VAE(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.tiles = 1                        # for encode and decode that are not told otherwise
        self.stride = config.stride
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, video, chunk=None, tiles=None):
        """Video to normalised latents: the mean of the latent distribution, nothing is drawn.

        video    (B, 3, P, h, w) float in [-1, 1]; P = 1 + 4n, h and w multiples of the stride (8, or 16 for Wan2.2)
        chunk    latent frames computed together: changes memory and a little speed, not the result; by default 1 on a GPU, 2 on a CPU
        tiles    strips worked on one after the other: less memory, some more work, the same result within rounding; by default self.tiles
        returns  (B, z_dim, 1 + n, h/8, w/8) float32
        raises   ValueError for another frame count or size
        source   official 2.1 L516-542, L647, where the last (P - 1) % 4 frames are dropped in silence
        """
        self.check_frames(video.shape[2])     # the stream could only say so at its end
        return self.exactly(lambda: torch.cat(list(self.encode_stream([video], chunk, tiles)), dim=2))

    def decode(self, latents, chunk=None, tiles=None):
        """Normalised latents to video.

        latents  (B, z_dim, T, H, W)
        chunk    and tiles: as in encode
        returns  (B, 3, 1 + 4 (T-1), 8H, 8W) float32, clamped to [-1, 1] (16H, 16W for Wan2.2)
        source   official 2.1 L544-569, L657
        """
        return self.exactly(lambda: torch.cat(list(self.decode_stream([latents], chunk, tiles)), dim=2))

    def exactly(self, run):
        """run(), the whole of an encoding or decoding; if float16, which ends at 65504, overflows on the way, once more in float32."""
        result = run()
        if self.decoder.conv_in.weight.dtype == torch.float16 and not result.sum(dtype=torch.float32).isfinite():
            print("warning: the VAE's numbers are too large for float16: it goes on in float32, slower", file=sys.stderr)
            self.float()
            self.tiles *= 2                   # of half the size, as the memory was planned for float16
            result = run()
        return result

    @torch.no_grad()
    def encode_stream(self, pieces, chunk=None, tiles=None):
        """encode() for one video that comes as an iterable of (B, 3, any, h, w) pieces: a generator of latents, in constant memory.

        With more than one tile all pieces are read before the first latent comes, and wait in host memory; the device's stays constant.
        raises ValueError at once for a size that is no multiple of the stride, at the end if there were not 1 + 4n frames in all
        """
        net, (mean, std) = self.encoder, self.moments()
        past = new_past(net.middle, net.conv_out)
        for x in in_strips(net, [net.conv_in, net.stages], self.checked(pieces, self.stride[0] * self.chunk(chunk)), tiles or self.tiles):
            mu, _ = net.whole(x.to(mean.device), past).float().chunk(2, dim=1)
            yield ((mu - mean) / std).contiguous()

    @torch.no_grad()
    def decode_stream(self, pieces, chunk=None, tiles=None):
        """decode() for latents that come as an iterable of (B, z_dim, any, H, W) pieces: a generator of frames, in constant memory.

        With more than one tile the whole video is decoded into host memory before its first frames come; the device's stays constant.
        """
        net, (mean, std) = self.decoder, self.moments()
        past = new_past(net.conv_in, net.middle)
        middle = (net.whole((z.to(mean) * std + mean).to(net.conv_in.weight), past) for z in regroup(pieces, self.chunk(chunk)))
        for x in in_strips(net, [net.stages, net.conv_out], middle, tiles or self.tiles):
            yield x.to(mean).clamp(-1, 1).movedim(-1, 1).contiguous()

    def chunk(self, chunk):
        """One latent frame fills a GPU at any size worth one."""
        return chunk if chunk is not None else 1 if self.decoder.conv_in.weight.is_cuda else 2

    def checked(self, pieces, size):
        """Video pieces cut anew, (B, n, h, w, 3) each."""
        count = 0
        for x in regroup(pieces, size):
            count += x.shape[2]
            self.check_frames(count)
            if x.shape[3] % self.stride[1] or x.shape[4] % self.stride[2]:
                raise ValueError(f"vae.encode takes height and width in multiples of {self.stride[1]}, got {x.shape[3]} x {x.shape[4]}: "
                                 f"crop or resize the video")
            yield x.movedim(1, -1)

    def moments(self):
        """Mean and deviation of the raw latents, (1, z_dim, 1, 1, 1) float32 each, where the weights are."""
        device = self.decoder.conv_in.weight.device
        return [torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (self.config.mean, self.config.std)]

    def check_frames(self, P):
        t = self.stride[0]
        if P < 1 or (P - 1) % t:
            lo = max(P - (P - 1) % t, 1)
            raise ValueError(f"vae.encode takes 1 + {t}n frames, got {P}: trim to {lo} or pad to {lo + t}")


def peak_bytes(config, H, W, tiles=1, dtype=torch.bfloat16, chunk=1):
    """About the most bytes that encoding or decoding a video of H x W latents takes on a device, whichever is more.

    Not counted: the weights, what the caller holds and the work space of convolution kernels.
    """
    return max(stream_bytes(config, H, W, tiles, dtype, chunk, decode) for decode in (False, True))


def stream_bytes(config, H, W, tiles, dtype, chunk, decode):
    """Held throughout: two frames in front of each causal convolution. For a moment: what the hungriest residual block, or doubling
    of the picture, works on. Beside them a chunk of video."""
    with torch.device("meta"):
        net = VAE(config).decoder if decode else VAE(config).encoder
    strips, full, frames = cut_strips(H, W, tiles), 2 ** len(config.temporal_downsample), chunk * config.stride[0]
    n, scale, halos = chunk, 1, config.decoder_halos
    if not decode:
        n, scale, halos = frames, full, [config.encoder_halo * full >> i for i in range(len(net.stages))]
    held, live = 10 * H * W * net.middle.block1.conv1.in_channels, []             # the five convolutions that see all of the picture
    for stage, halo in zip(net.stages, halos):
        pixels = min(H, W) * scale * max(stop - start for start, stop in (strip.span(scale, halo) for strip in strips))
        c_in, C, time = stage.blocks[0].conv1.in_channels, stage.blocks[0].conv1.out_channels, getattr(stage.resample, "time", None)
        looking_back = [layer for layer in stage.modules() if isinstance(layer, CausalConv)]
        looking_back += [net.conv_out if decode else net.conv_in] if scale == full else []
        held += 2 * pixels * sum(layer.in_channels for layer in looking_back)
        live.append(pixels * ((3 * n + 2) * c_in + n * C))                        # first block: input, normed, with its past; output
        live.append(pixels * (n * c_in + (4 * n + 2) * C))                        # a later one: the same beside the stage's input
        if decode and stage.resample:
            n, scale, c_up = n * (2 if time else 1), 2 * scale, stage.resample.space.out_channels
            live.append(pixels * n * (c_in + C) + 4 * pixels * n * (3 * c_up if stage.shortcut else C + c_up))
        elif stage.resample:
            n, scale = n // (2 if time else 1), scale // 2
    return (held + max(live)) * dtype.itemsize + 4 * 3 * H * W * config.stride[1] ** 2 * frames // tiles   # the video is float32
