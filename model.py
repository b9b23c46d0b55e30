"""Wan2.2 denoiser: noisy video latents + text (+ reference picture, motion, audio, pose) -> velocity.

One network serves the family; the checkpoint's config says which parts exist.
    S2V        audio_dim > 0: audio tokens, a reference picture, FramePack motion tokens, pose
    I2V        in_dim = 36: noise 16, mask 4 and picture latents 16 enter together as channels
    TI2V       the first latent frame may be clean: its tokens carry time 0
    T2V        none of these

Everything that does not change with the diffusion time is computed once per clip by `Denoiser.prepare`; a step is then the pure
function `Denoiser.forward(latents, t, cond)`. Only self-attention mixes tokens. All the rest of a block is per token, so it runs
over spans of tokens that share one diffusion time: video tokens at t, reference and motion tokens at 0.

Axes    B batch   T latent frames   P pixel frames   H W latent size   h w patch grid (H/2, W/2)   C width   K heads   D head width
        L video tokens = T*h*w   N all tokens (video, reference, motion)   n tokens of one span   S text tokens   R diffusion times
Numbers linear layers follow the dtype of their weights; residual stream, norms, modulation, time and audio encoder are float32.
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/model.py, wan/modules/s2v/{model_s2v,motioner,audio_utils,auxi_blocks}.py
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast import kernels

PATCH = (1, 2, 2)            # latent frames, rows and columns in one video token
ROPE_THETA = 10000.0
REF_TIME = 30                # RoPE time of the reference picture. A clip of 30 latent frames (120 frames) uses 0..29, so longer clips collide
MOTION_BUCKETS = (           # FramePack: motion latents from near to far are summarised more and more coarsely
    ("near", 1, (1, 2, 2)),  # name, latent frames, patch (frames, rows, columns)
    ("mid", 2, (2, 4, 4)),
    ("far", 16, (4, 8, 8)),
)
MOTION_LATENTS = sum(frames for _, frames, _ in MOTION_BUCKETS)  # 19 = latents of 73 pixel frames
QUERIES, KEYS, LONG = 66 * 256, 128, 4096                        # see `self_attention`: queries at once, keys in a block, fewest to be split
ADAIN_EPS = 1e-5             # every other norm has 1e-6 (official audio_utils.py, diffusers' AdaLayerNorm default)


@dataclass(frozen=True)
class Config:
    """Sizes of one expert. Defaults: the released S2V-14B, as its config.json says."""
    dim: int = 5120          # C
    ffn_dim: int = 13824
    n_head: int = 40         # K, so D = 128
    n_layer: int = 40
    in_dim: int = 16         # channels entering the patch embedding (36 for I2V)
    out_dim: int = 16        # channels of the VAE's latents
    text_dim: int = 4096
    text_len: int = 512      # S: shorter prompts are padded with zero rows, which are attended to
    freq_dim: int = 256
    eps: float = 1e-6
    audio_dim: int = 1024    # width of the wav2vec2 states; 0 = no S2V parts
    audio_states: int = 25   # wav2vec2 hidden states mixed into one
    audio_tokens: int = 4    # audio tokens per latent frame, before the learned pad token
    audio_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)  # blocks followed by audio attention
    pose_dim: int = 16       # channels of the pose latents
    motion_frames: int = 73  # pixel frames of motion history; the audio is padded by as many columns in front

    def __post_init__(self):
        object.__setattr__(self, "audio_layers", tuple(self.audio_layers) if self.audio_dim else ())
        if self.dim % self.n_head or (self.dim // self.n_head) % 2:
            raise ValueError(f"dim must split into n_head heads of even width, got dim {self.dim} and n_head {self.n_head}")
        if any(not 0 <= i < self.n_layer for i in self.audio_layers):
            raise ValueError(f"audio_layers must lie in 0..{self.n_layer - 1}, got {self.audio_layers}")

    @property
    def motion_latents(self):
        return (self.motion_frames + 3) // 4


class LayerCond(NamedTuple):
    """What one block attends to besides the video: constant over a clip's diffusion steps."""
    text: Tensor                 # keys and values (2, B, S, K, D)
    audio: Tensor | None = None  # keys and values (2, B, T, audio_tokens + 1, K, D), only at blocks with audio attention
    adain: Tensor | None = None  # shift and scale (2, B, T, 1, C) float32


class Span(NamedTuple):
    """Tokens start..stop share diffusion time number `time` (0: the step's t, 1: zero)."""
    start: int
    stop: int
    time: int


@dataclass(frozen=True)
class Cond:
    """Everything about a clip that the diffusion time does not change."""
    grid: tuple[int, int, int]         # T, h, w
    spans: tuple[Span, ...]            # cover all N tokens
    rope: Tensor                       # cos and sin (2, N, 1, D/2) float32
    layers: tuple[LayerCond, ...]      # one per block
    image: Tensor | None = None        # channels beside the noise (B, in_dim - out_dim, T, H, W): I2V
    video_bias: Tensor | None = None   # added to the video tokens (B, L, C) or (1, 1, C): pose and token kind
    context: Tensor | None = None      # tokens behind the video (B, N - L, C): reference, motion


# ----------------------------------------------------------------------------------------------------------- small functions

def layer_norm(x, eps, weight=None, bias=None):
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def attention(q, k, v):
    """Scaled dot-product attention.  q (B, N, K, D), k v (B, M, K, D) -> (B, N, K*D)"""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).flatten(2)


def self_attention(q, k, v):
    """`attention` of a sequence to itself. Without gradients the results take the places of q, QUERIES at a time, which saves memory.

    cuDNN's kernel for Hopper works on 256 queries and KEYS keys at a time. Keys left over make it 8% slower (H200): they are attended to
    afterwards. The tiles of 40 heads and QUERIES fill the 132 processors of an H200 20 times, without a rest.
    """
    if torch.is_grad_enabled():
        return attention(q, k, v)
    n = k.shape[1]
    whole = n // KEYS * KEYS if n >= LONG and hopper_attention(q) else n
    for rows in q.split(QUERIES, dim=1):
        attend_in_place(rows, k, v, whole)
    return q.flatten(2)


def attend_in_place(q, k, v, whole):
    """`attention`, in the place of q; the first `whole` keys by cuDNN, and the others, if there are, after them."""
    if whole == k.shape[1]:
        q.copy_(attention(q, k, v).view_as(q))
    else:
        first = (x.transpose(1, 2) for x in (q, k[:, :whole], v[:, :whole]))
        y, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(*first, None, True)[:2]
        kernels.attend_last(q, k, v, y.transpose(1, 2), sums, whole)


def hopper_attention(q):
    """Would cuDNN compute attention of q (B, N, K, D), on a GPU whose kernel is known?"""
    q = q.transpose(1, 2)
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and kernels.works(q.device) and \
        torch.backends.cuda.can_use_cudnn_attention(torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False))


def attention_backend(device):
    """On a GPU cuDNN's attention first, 1.6 times as fast as flash attention on Hopper; the others where it cannot serve."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True) if device.type == "cuda" else nullcontext()


def rotate(x, rope):
    """Rotate channel pairs (2i, 2i+1) by the token's angles.  x (B, n, K, D), rope (2, n, 1, D/2) -> float32

    Two ways to the same bits: compiled, the first is one pass over x; eagerly it would make a forward on a CPU 5% slower.
    """
    x = x.float().unflatten(-1, (-1, 2))                             # (B, n, K, D/2, 2)
    if torch.compiler.is_compiling():
        cos, sin = rope.unsqueeze(-1)
        return (x * cos + x.flip(-1) * torch.cat([-sin, sin], dim=-1)).flatten(-2)
    (a, b), (cos, sin) = x.unbind(-1), rope
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def join(parts):
    """Concatenate along the tokens; one part is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add(x, y):
    """x + y; without gradients in the place of x, so that a span of tokens leaves nothing behind. Compiled functions write there once."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def timestep_embedding(t, dim):
    """Sinusoids of the diffusion time.  t (B, R) in 0..1000 -> (B, R, dim) float32, cosines first"""
    half = torch.arange(dim // 2, device=t.device, dtype=torch.float64)
    angle = t.double().unsqueeze(-1) * 10000 ** (-half / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def grid_positions(times, rows, columns):
    """(time, row, column) of every token of a grid, time slowest -> (len(times)*len(rows)*len(columns), 3)"""
    return torch.cartesian_prod(*(torch.as_tensor(p, dtype=torch.float64) for p in (times, rows, columns)))


def stretched(start, stop, n):
    """n whole positions spread over start..stop-1. numpy's rounding decides where a truncation falls (official s2v_utils.py L40)."""
    return torch.from_numpy(np.linspace(start, stop - 1, n)).trunc()


def token_positions(grid, ref, motion):
    """RoPE positions of video, reference and motion tokens -> (N, 3).  grid (T, h, w); ref, motion: are these tokens present?"""
    T, h, w = grid
    parts = [grid_positions(range(T), range(h), range(w))]
    if ref:
        parts.append(grid_positions([REF_TIME], range(h), range(w)))
    start = 0
    for _, frames, (pt, ph, pw) in MOTION_BUCKETS if motion else ():
        start -= frames                                              # -1, -3, -19: time runs backwards from the clip's start
        coarse_h, coarse_w = h * PATCH[1] // ph, w * PATCH[2] // pw
        parts.append(grid_positions(stretched(start, start + frames, frames // pt), stretched(0, h, coarse_h), stretched(0, w, coarse_w)))
    return torch.cat(parts)


def rope_table(positions, head_dim):
    """cos and sin of every token's angles.  positions (N, 3) -> (2, N, 1, D/2) float32

    A head's D/2 channel pairs are divided among time, row and column: D=128 gives 22 + 21 + 21. Angles are made in float64.
    """
    spatial = head_dim // 6                                          # channel pairs for rows, and as many for columns
    pairs = (head_dim // 2 - 2 * spatial, spatial, spatial)
    angles = [positions[:, axis:axis + 1] * ROPE_THETA ** (-torch.arange(n, dtype=torch.float64) / n) for axis, n in enumerate(pairs)]
    angles = torch.cat(angles, dim=1)                                # (N, D/2)
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2).float()


@lru_cache(maxsize=2)
def clip_rope(grid, ref, motion, head_dim, device):
    """The table of all tokens of a clip, on the device: one for both guidance branches and for every clip of a kind."""
    return rope_table(token_positions(grid, ref, motion), head_dim).to(device)


def make_spans(segments, chunk=None):
    """Cut [(tokens, time), ...] into spans of at most `chunk` tokens, so that the per-token work of a block needs bounded memory."""
    spans, start = [], 0
    for tokens, time in segments:
        stop = start + tokens
        spans += [Span(a, min(a + (chunk or tokens), stop), time) for a in range(start, stop, chunk or tokens)]
        start = stop
    return tuple(spans)


def expert_index(t, boundary):
    """Which expert serves diffusion time t (0..1000): 0 = the only or high-noise one, 1 = the low-noise one (t below boundary)."""
    return 0 if boundary is None or t >= boundary * 1000 else 1


# ------------------------------------------------------------------------------------------------------------------- layers

class Linear(nn.Linear):
    """A linear layer that takes any float input and computes in the dtype of its weight."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class FloatLinear(nn.Linear):
    """A linear layer that computes in float32, however its weight is stored."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class GELU(nn.Module):
    """The tanh approximation of GELU. Compiled it is written with a sigmoid, equal but for rounding: tanh is slow there."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        y = x.float()
        return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, before the split into heads; float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class Attention(nn.Module):
    """The four projections of an attention layer; q and k are normalised over the full width."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)

    def split(self, x):
        return x.unflatten(2, (self.n_head, -1))                     # (B, N, C) -> (B, N, K, D)

    def query(self, x):
        q = self.q(x)
        return self.split(self.norm_q(q).to(q.dtype))                # (B, N, K, D)

    def keys_values(self, x):
        """x (B, M, C) -> (2, B, M, K, D)"""
        k, v = self.k(x), self.v(x)
        return torch.stack([self.split(self.norm_k(k).to(v.dtype)), self.split(v)])


class AudioInjection(Attention):
    """Tokens of one latent frame attend to the audio tokens of the same frame, after an AdaIN driven by the frame's global audio token."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.adain = Linear(cfg.dim, 2 * cfg.dim)

    def forward(self, x, audio, adain):
        """x (B, t*h*w, C) float32 of t latent frames, with their keys and values (2, B, t, M, K, D), shift and scale (2, B, t, 1, C) -> x"""
        shift, scale = adain.flatten(1, 2)
        frames = x.unflatten(1, (audio.shape[2], -1)).flatten(0, 1)  # (B*t, h*w, C)
        q = self.query(modulate(layer_norm(frames, ADAIN_EPS), shift, scale)).to(audio.dtype)      # a float8 layer has a dtype of its own
        y = attention(q, *audio.flatten(1, 2))
        return add(x, self.o(y).view_as(x))


class Block(nn.Module):
    attend = staticmethod(self_attention)                            # may write over its arguments. See use_attention8

    def __init__(self, cfg, audio):
        super().__init__()
        self.eps = cfg.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, cfg.dim))
        self.self_attn, self.cross_attn = Attention(cfg), Attention(cfg)
        self.cross_norm = nn.LayerNorm(cfg.dim, eps=cfg.eps)
        self.ffn = nn.Sequential(Linear(cfg.dim, cfg.ffn_dim), GELU(), Linear(cfg.ffn_dim, cfg.dim))
        self.inject = AudioInjection(cfg) if audio else None

    def prepare(self, text, audio_local=None, audio_global=None):
        """text (B, S, C), audio_local (B, T, audio_tokens + 1, C), audio_global (B, T, 1, C) -> LayerCond"""
        if self.inject is None:
            return LayerCond(self.cross_attn.keys_values(text))
        audio = self.inject.keys_values(audio_local.flatten(0, 1)).unflatten(1, audio_local.shape[:2])
        adain = torch.stack(self.inject.adain(F.silu(audio_global)).float().chunk(2, dim=-1))
        return LayerCond(self.cross_attn.keys_values(text), audio, adain)

    def qkv(self, x, mod, rope, places):
        """Rotated queries, keys and values of one span; without gradients in their `places`.

        x (B, n, C), mod (B, 6, 1, C), rope (2, n, 1, D/2) -> three (B, n, K, D)
        """
        attn, shift, scale = self.self_attn, mod[:, 0], mod[:, 1]
        x = modulate(layer_norm(x, self.eps), shift, scale)
        v = attn.split(attn.v(x))
        q, k = (rotate(attn.split(norm(proj(x))), rope).to(v.dtype) for norm, proj in ((attn.norm_q, attn.q), (attn.norm_k, attn.k)))
        return (q, k, v) if torch.is_grad_enabled() else [place.copy_(part) for place, part in zip(places, (q, k, v))]

    def mix(self, x, y, mod, text):
        """The rest of the block for one span.  x (B, n, C) float32, y (B, n, C) self-attention output, text (2, B, S, K, D) -> x"""
        gate, ffn_shift, ffn_scale, ffn_gate = mod[:, 2:].unbind(1)
        x = add(x, self.self_attn.o(y).float() * gate)
        x = add(x, self.cross_attn.o(attention(self.cross_attn.query(layer_norm(x, self.eps, *self.affine())), *text)))
        return add(x, self.ffn(modulate(layer_norm(x, self.eps), ffn_shift, ffn_scale)).float() * ffn_gate)

    def affine(self):
        return self.cross_norm.weight.float(), self.cross_norm.bias.float()

    def forward(self, x, mod, rope, cond, spans, grid):
        """x (B, N, C) float32, mod (B, R, 6, C) float32, rope (2, N, 1, D/2), cond this layer's LayerCond -> (B, N, C) float32

        Without gradients the result takes the place of x in memory.
        """
        mod = (self.modulation.float() + mod).unsqueeze(3)           # (B, R, 6, 1, C)
        y = self.look(x, mod, rope, cond.text.dtype, spans)
        parts = [self.mix(x[:, a:b], y[:, a:b], mod[:, r], cond.text) for a, b, r in spans]
        x = join(parts) if torch.is_grad_enabled() else x
        return x if self.inject is None else self.hear(x, cond, spans, grid)

    def look(self, x, mod, rope, dtype, spans):
        """Self-attention of all tokens.  Arguments as `forward`, mod (B, R, 6, 1, C) -> (B, N, C)"""
        places = () if torch.is_grad_enabled() else [self.self_attn.split(torch.empty_like(x, dtype=dtype)) for _ in range(3)]
        parts = [self.qkv(x[:, a:b], mod[:, r], rope[:, a:b], [place[:, a:b] for place in places]) for a, b, r in spans]
        return self.attend(*(places or map(join, zip(*parts))))

    def hear(self, x, cond, spans, grid):
        """Audio attention on the video tokens, as many latent frames at a time as the longest span holds."""
        (T, h, w), hw = grid, grid[1] * grid[2]
        step = max(1, (spans[0].stop - spans[0].start) // hw)
        video = [self.inject(x[:, f * hw:min(f + step, T) * hw], cond.audio[:, :, f:f + step], cond.adain[:, :, f:f + step])
                 for f in range(0, T, step)]
        return join([*video, x[:, T * hw:]]) if torch.is_grad_enabled() else x


class AudioEncoder(nn.Module):
    """wav2vec2 states, one column per video frame -> per latent frame a few local audio tokens and one global token; causal, float32."""

    def __init__(self, cfg):
        super().__init__()
        C, n = cfg.dim, cfg.audio_tokens
        self.n_token, self.eps = n, 1e-6
        self.mix = nn.Parameter(torch.zeros(1, cfg.audio_states, 1, 1))
        self.conv_local = nn.Conv1d(cfg.audio_dim, C // 4 * n, 3)
        self.conv_global = nn.Conv1d(cfg.audio_dim, C // 4, 3)
        self.conv2 = nn.Conv1d(C // 4, C // 2, 3, stride=2)          # conv2 and conv3 serve local and global tokens alike
        self.conv3 = nn.Conv1d(C // 2, C, 3, stride=2)
        self.out = FloatLinear(C, C)
        self.pad_token = nn.Parameter(torch.zeros(1, 1, 1, C))

    def causal(self, conv, x):
        x = F.pad(x, (conv.kernel_size[0] - 1, 0), mode="replicate")
        return F.conv1d(x, conv.weight.float(), conv.bias.float(), conv.stride)

    def norm_act(self, x):
        return F.silu(layer_norm(x.transpose(1, 2), self.eps)).transpose(1, 2)

    def shrink(self, x):
        """(B, C/4, P) after the first convolution -> (B, T, C) with T = ceil(P / 4)"""
        x = self.norm_act(self.causal(self.conv2, self.norm_act(x)))
        return self.norm_act(self.causal(self.conv3, x)).transpose(1, 2)

    def forward(self, states):
        """states (B, audio_states, audio_dim, P) -> global (B, T, 1, C), local (B, T, audio_tokens + 1, C)"""
        weight = F.silu(self.mix.float())
        x = (states.float() * weight / weight.sum()).sum(1)          # (B, audio_dim, P)
        local = self.causal(self.conv_local, x).unflatten(1, (self.n_token, -1)).flatten(0, 1)
        local = self.shrink(local).unflatten(0, (-1, self.n_token)).transpose(1, 2)          # (B, T, audio_tokens, C)
        pad = self.pad_token.float().expand(*local.shape[:2], 1, -1)
        return self.out(self.shrink(self.causal(self.conv_global, x))).unsqueeze(2), torch.cat([local, pad], dim=2)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.eps = cfg.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, cfg.dim))
        self.linear = FloatLinear(cfg.dim, cfg.out_dim * PATCH[0] * PATCH[1] * PATCH[2])

    def forward(self, x, e):
        """x (B, n, C), e time embedding (B, 1, C) float32 -> (B, n, patch values)"""
        shift, scale = (self.modulation.float() + e.unsqueeze(2)).unbind(2)
        return self.linear(modulate(layer_norm(x, self.eps), shift, scale))


# -------------------------------------------------------------------------------------------------------------- the denoiser

class Denoiser(nn.Module):
    """One expert. `prepare` once per clip and guidance branch, `forward` once per step."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.cfg = cfg
        self.patch = nn.Conv3d(cfg.in_dim, C, PATCH, stride=PATCH)
        self.text = nn.Sequential(Linear(cfg.text_dim, C), nn.GELU("tanh"), Linear(C, C))
        self.time = nn.Sequential(FloatLinear(cfg.freq_dim, C), nn.SiLU(), FloatLinear(C, C))
        self.time_mod = FloatLinear(C, 6 * C)
        self.blocks = nn.ModuleList(Block(cfg, audio=i in cfg.audio_layers) for i in range(cfg.n_layer))
        self.head = Head(cfg)
        if cfg.audio_dim:
            self.audio = AudioEncoder(cfg)
            self.pose = nn.Conv3d(cfg.pose_dim, C, PATCH, stride=PATCH)
            self.token_kind = nn.Embedding(3, C)                     # 0 video, 1 reference, 2 motion
            self.motion = nn.ModuleDict({name: nn.Conv3d(cfg.out_dim, C, patch, stride=patch) for name, _, patch in MOTION_BUCKETS})

    @staticmethod
    def storage_dtype(name, dtype):
        """The dtype in which a parameter is kept when the model runs in `dtype`: norms and modulation, which are small, in float32."""
        return torch.float32 if "norm" in name or name.endswith("modulation") else dtype

    def tokens(self, conv, x):
        """(B, channels, T, H, W) -> (B, T*h*w, C), contiguous: fused attention wants unit stride along the channels, and every later
        tensor of tokens takes its strides from here"""
        return conv(x.to(conv.weight.dtype)).flatten(2).transpose(1, 2).contiguous()

    def motion_tokens(self, latents):
        """Past latents from old to new (B, 16, any T, H, W) -> tokens from near to far (B, M, C)"""
        T = latents.shape[2]
        latents = F.pad(latents, (0, 0, 0, 0, max(0, MOTION_LATENTS - T), 0))  # a short history has zeros in front of it
        parts, stop = [], latents.shape[2]
        for name, frames, _ in MOTION_BUCKETS:
            parts.append(self.tokens(self.motion[name], latents[:, :, stop - frames:stop]))
            stop -= frames
        return torch.cat(parts, dim=1)

    def audio_latents(self, audio):
        """Audio tokens of the clip's own latent frames.  audio (B, states, audio_dim, 4T) -> global (B, T, 1, C), local (B, T, tokens + 1, C)

        The clip's first column stands in for the motion frames in front of it, not the audio that was really there (official L693).
        """
        past = audio[..., :1].expand(*audio.shape[:-1], self.cfg.motion_frames)
        return [x[:, self.cfg.motion_latents:] for x in self.audio(torch.cat([past, audio], dim=-1))]

    def context_tokens(self, ref, motion):
        """Reference and motion tokens with the embedding of their kind -> (B, N - L, C)"""
        kind = self.token_kind.weight
        ref = self.tokens(self.patch, ref) + kind[1]
        return ref if motion is None else torch.cat([ref, self.motion_tokens(motion) + kind[2]], dim=1)

    def prepare(self, shape, text, audio=None, ref=None, motion=None, pose=None, image=None, clean_frames=0, chunk=None):
        """Everything about a clip that does not change with the diffusion time.

        shape         (T, H, W) of the latents to come; H and W even (multiples of 8 where motion is given)
        text          (B, up to text_len, text_dim) umT5 rows of the prompt, without padding
        audio         (B, audio_states, audio_dim, 4T) wav2vec2 states, one column per pixel frame; S2V only, as are the next three
        ref           (B, out_dim, 1, H, W) latent of the reference picture
        motion        (B, out_dim, 19, H, W) latents of the frames before the clip, or None to leave the motion tokens out
        pose          (B, pose_dim, T, H, W) pose latents, or None (which is zeros, not a black picture)
        image         (B, in_dim - out_dim, T, H, W) mask and picture latents: I2V
        clean_frames  number of leading latent frames that are not noisy: TI2V, 0 or 1
        chunk         longest span of tokens that is worked on at once
        """
        (T, H, W), (_, ph, pw), cfg = shape, PATCH, self.cfg
        grid = T, h, w = T, H // ph, W // pw
        text = self.text(F.pad(text, (0, 0, 0, cfg.text_len - text.shape[1])))               # (B, S, C)
        audio_global, audio_local = self.audio_latents(audio) if cfg.audio_dim else (None, None)
        layers = tuple(block.prepare(text, audio_local, audio_global) for block in self.blocks)
        segments = [(n * h * w, time) for n, time in ((clean_frames, 1), (T - clean_frames, 0)) if n]
        context = bias = None
        if cfg.audio_dim:
            context = self.context_tokens(ref, motion)
            segments.append((context.shape[1], 1))
            bias = self.token_kind.weight[:1] + (self.pose.bias if pose is None else self.tokens(self.pose, pose))
        rope = clip_rope(grid, bool(cfg.audio_dim), motion is not None, cfg.dim // cfg.n_head, text.device)
        return Cond(grid, make_spans(segments, chunk), rope, layers, image, bias, context)

    def modulations(self, t):
        """t (B,) -> time embedding (B, R, C) and the blocks' modulation (B, R, 6, C), both float32; time 0 is t, time 1 is zero"""
        times = torch.stack([t, torch.zeros_like(t)], dim=1)
        e = self.time(timestep_embedding(times, self.cfg.freq_dim))
        return e, self.time_mod(F.silu(e)).unflatten(2, (6, -1))

    def embed(self, latents, cond):
        """Noisy latents -> all tokens entering the first block (B, N, C)"""
        x = self.tokens(self.patch, latents if cond.image is None else torch.cat([latents, cond.image], dim=1))
        x = x if cond.video_bias is None else x + cond.video_bias
        return (x if cond.context is None else torch.cat([x, cond.context], dim=1)).float()

    def velocities(self, latents, t, conds):
        """Velocities eps - x0 of the same noisy latents under one or more conditions, in a single pass over the blocks.

        latents  (B, out_dim, T, H, W)        t  (B,) diffusion time in 0..1000        conds  of one clip, from `prepare`
        returns  one (B, out_dim, T, H, W) float32 per condition
        """
        e, mod = self.modulations(t)
        xs = [self.embed(latents, cond) for cond in conds]           # (B, N, C) each
        with attention_backend(latents.device):
            for i, block in enumerate(self.blocks):                  # a ModuleList, or offload.py's stream of blocks
                xs = [block(x, mod, cond.rope, cond.layers[i], cond.spans, cond.grid) for x, cond in zip(xs, conds)]
        return [self.unpatchify(x, e, cond) for x, cond in zip(xs, conds)]

    def forward(self, latents, t, cond):
        return self.velocities(latents, t, (cond,))[0]

    def unpatchify(self, x, e, cond):
        """The head on the video tokens.  x (B, N, C), e (B, R, C) -> (B, out_dim, T, H, W) float32"""
        (T, h, w), (_, ph, pw) = cond.grid, PATCH
        x = join([self.head(x[:, a:b], e[:, r:r + 1]) for a, b, r in cond.spans if b <= T * h * w])
        x = x.float().unflatten(1, (T, h, w)).unflatten(4, (ph, pw, -1))                     # (B, T, h, w, 2, 2, out)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)                    # (B, out, T, H, W)


@cache
def fast(function):
    """A compiled function, one for all blocks, for spans of any length in tensors of any length: a later clip has more tokens than the first."""
    return torch.compile(function, dynamic=True)


def all_blocks(net):
    """Every module that computes a block, in a ModuleList or in offload.py's stream of blocks."""
    return net.blocks if isinstance(net.blocks, nn.ModuleList) else net.blocks.modules


def compile_blocks(net):
    """Compile the per-token parts of all blocks: norms, modulation, RoPE, casts and gates fuse with each other; attention stays as it is."""
    for block in all_blocks(net):
        block.qkv, block.mix = partial(fast(Block.qkv), block), partial(fast(Block.mix), block)
        if block.inject is not None:
            block.inject.forward = partial(fast(AudioInjection.forward), block.inject)


def use_attention8(net):
    """Self-attention in 8 bits: faster, and off by a few percent. For inference alone."""
    from fast.attention8 import attention8                                # here: it needs fp8.py, which nothing else in this file does
    for block in all_blocks(net):
        block.attend = attention8
