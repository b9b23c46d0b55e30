"""Wan2.2 denoiser: noisy video latents + text (+ reference picture, motion, audio, pose) -> velocity.

One network serves the family; the checkpoint's config says which parts exist.
    S2V        audio_dim > 0: audio tokens, a reference picture, FramePack motion tokens, pose
    I2V        in_dim = 36: noise 16, mask 4 and picture latents 16 enter together as channels
    TI2V       the first latent frame may be clean: its tokens carry diffusion time 0
    T2V        none of these

`Denoiser.prepare` computes once per clip what the diffusion time does not change; `Denoiser.forward` is then one step.
Only self-attention mixes tokens, through the one seam `attend(q, k, v, layer)`. Everything else in a block works token by token.
This file says what is computed. fast/ computes it quickly and in little memory; tests/test_fast.py says that the two are equal.

Axes    B batch   T latent frames   P pixel frames   H W latent size   h w patch grid (H/2, W/2)   C width   K heads   D head width
        L video tokens = T*h*w   N all tokens (video, reference, motion)   S text tokens   A audio tokens of a frame   R diffusion times
Numbers linear layers follow the dtype of their weights; residual stream, norms, modulation, time and audio encoder are float32.
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/model.py, wan/modules/s2v/{model_s2v,motioner,audio_utils,auxi_blocks}.py
"""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

PATCH = (1, 2, 2)            # latent frames, rows and columns in one video token
ROPE_THETA = 10000.0
REF_TIME = 30                # RoPE time of the reference picture. A clip of 30 latent frames (120 frames) uses 0..29, so longer clips collide
MOTION_BUCKETS = (           # FramePack: motion latents from near to far are summarised more and more coarsely
    ("near", 1, (1, 2, 2)),  # name, latent frames, patch (frames, rows, columns)
    ("mid", 2, (2, 4, 4)),
    ("far", 16, (4, 8, 8)),
)
MOTION_LATENTS = sum(frames for _, frames, _ in MOTION_BUCKETS)  # 19 = latents of 73 pixel frames
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
    audio_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)  # blocks with audio attention
    pose_dim: int = 16       # channels of the pose latents
    motion_frames: int = 73  # pixel frames of motion history; the audio is padded by as many audio frames in front

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
    audio: Tensor | None = None  # keys and values (2, B, T, A, K, D), only at blocks with audio attention
    adain: Tensor | None = None  # shift and scale (2, B, T, 1, C) float32


class Segment(NamedTuple):
    """So many tokens, one behind the other, share a row of the modulation: row 0 belongs to the step's diffusion time t, row 1 to time 0."""
    tokens: int
    row: int


@dataclass(frozen=True)
class Cond:
    """Everything about a clip that the diffusion time does not change."""
    grid: tuple[int, int, int]           # T, h, w
    segments: tuple[Segment, ...]        # of all N tokens, in order
    rope: Tensor                         # cos and sin (2, N, 1, D/2) float32
    layers: tuple[LayerCond, ...]        # one per block
    image: Tensor | None = None          # channels beside the noise (B, in_dim - out_dim, T, H, W): I2V
    video_bias: Tensor | None = None     # added to the video tokens (B, L, C) or (1, C): pose and token kind
    context: Tensor | None = None        # tokens behind the video (B, N - L, C): reference, motion


# ----------------------------------------------------------------------------------------------------------- small functions

def layer_norm(x, eps, weight=None, bias=None):
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def attention(q, k, v, layer=None):
    """Scaled dot-product attention: the plain form of `attend`.  q (B, N, K, D), k v (B, M, K, D) -> (B, N, K*D)"""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))      # (B, K, N, D)
    return y.transpose(1, 2).flatten(2)                                                              # (B, N, K*D)


def per_token(values, segments):
    """One row per diffusion time -> the row of each token.  values (..., R, C) -> (..., N, C); one segment: (..., 1, C), which broadcasts"""
    parts = [values[..., row:row + 1, :].expand(*values.shape[:-2], n, -1) for n, row in segments]  # (..., n, C) each, not copied
    return parts[0][..., :1, :] if len(parts) == 1 else torch.cat(parts, dim=-2)


def timestep_embedding(t, dim):
    """Sinusoids of the diffusion time, cosines first.  t (B, R) in 0..1000 -> (B, R, dim) float32"""
    half = torch.arange(dim // 2, device=t.device, dtype=torch.float64)
    angle = t.double().unsqueeze(-1) * 10000 ** (-half / (dim // 2))                                 # (B, R, dim/2)
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


def unpatchify(x, grid):
    """Tokens of (1, 2, 2) patches -> latents.  x (B, L, 4*out) -> (B, out, T, H, W)"""
    x = x.unflatten(1, grid).unflatten(4, (PATCH[1], PATCH[2], -1))  # (B, T, h, w, 2, 2, out)
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)


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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, before the split into heads; float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias; float32."""

    def forward(self, x):
        return layer_norm(x, self.eps, self.weight.float(), self.bias.float())


class Rotary(nn.Module):
    """RoPE: rotate channel pairs (2i, 2i+1) by the token's angles.  x (B, N, K, D), rope (2, N, 1, D/2) -> (B, N, K, D) float32"""

    def forward(self, x, rope):
        (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rope                       # (B, N, K, D/2), (N, 1, D/2)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """The four projections of an attention layer; queries and keys are normalised over the full width."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)

    def split(self, x):
        return x.unflatten(2, (self.n_head, -1))                     # (B, N, C) -> (B, N, K, D)

    def query(self, x):
        """x (B, N, C) -> (B, N, K, D)"""
        q = self.q(x)
        return self.split(self.norm_q(q).to(q.dtype))

    def keys_values(self, x):
        """x (B, M, C) -> (2, B, M, K, D)"""
        k, v = self.k(x), self.v(x)
        return torch.stack([self.split(self.norm_k(k).to(v.dtype)), self.split(v)])

    def forward(self, x, keys_values):
        """Cross-attention.  x (B, N, C), keys_values (2, B, M, K, D) -> (B, N, C)"""
        return self.o(attention(self.query(x).to(keys_values.dtype), *keys_values))


class SelfAttention(Attention):
    """Attention of all tokens to each other, with rotary positions. What lies between `qkv` and `o` is the seam `attend`."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rotary = Rotary()

    def qkv(self, x, rope):
        """x (B, N, C), rope (2, N, 1, D/2) -> rotated queries and keys, and values, each (B, N, K, D)"""
        v = self.split(self.v(x))
        q, k = (self.rotary(self.split(norm(linear(x))), rope).to(v.dtype) for norm, linear in ((self.norm_q, self.q), (self.norm_k, self.k)))
        return q, k, v


class AudioInjection(Attention):
    """Tokens of one latent frame attend to the audio tokens of the same frame, after an AdaIN driven by the frame's global audio token."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.adain = Linear(cfg.dim, 2 * cfg.dim)

    def forward(self, x, audio, adain):
        """x (B, T*h*w, C) float32 of T latent frames, audio keys and values (2, B, T, A, K, D), adain shift and scale (2, B, T, 1, C) -> like x"""
        shift, scale = adain.flatten(1, 2)                           # (B*T, 1, C) each
        frames = x.unflatten(1, (audio.shape[2], -1)).flatten(0, 1)  # (B*T, h*w, C)
        y = super().forward(modulate(layer_norm(frames, ADAIN_EPS), shift, scale), audio.flatten(1, 2))
        return y.view_as(x)                                          # (B, T*h*w, C)


class Block(nn.Module):
    """One layer of the transformer. `project`, `finish` and `audio_cross_attention` work on any run of tokens (the last: of whole
    latent frames), so that fast/blocks.py can run them in chunks; `attend` alone sees all tokens. Write x = x + y: the norms keep x for
    the backward pass, and PyTorch refuses to train a network that changes it in place."""

    def __init__(self, cfg, audio):
        super().__init__()
        self.eps = cfg.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, cfg.dim))
        self.self_attn, self.cross_attn = SelfAttention(cfg), Attention(cfg)
        self.cross_norm = LayerNorm(cfg.dim, eps=cfg.eps)
        self.ffn = nn.Sequential(Linear(cfg.dim, cfg.ffn_dim), nn.GELU("tanh"), Linear(cfg.ffn_dim, cfg.dim))
        self.inject = AudioInjection(cfg) if audio else None

    def prepare(self, text, audio_local=None, audio_global=None):
        """text (B, S, C), audio_local (B, T, A, C), audio_global (B, T, 1, C) -> LayerCond"""
        return LayerCond(self.cross_attn.keys_values(text), *self.hear(audio_local, audio_global))

    def hear(self, audio_local, audio_global):
        """-> audio keys and values, and AdaIN, of LayerCond. Apart from `prepare`, as in a stream audio is new in every block and text never."""
        if self.inject is None:
            return None, None
        audio = self.inject.keys_values(audio_local.flatten(0, 1)).unflatten(1, audio_local.shape[:2])         # (2, B, T, A, K, D)
        adain = torch.stack(self.inject.adain(F.silu(audio_global)).float().chunk(2, dim=-1))                  # (2, B, T, 1, C)
        return audio, adain

    def modulations(self, mod):
        """Shift, scale and gate of self-attention, then of the FFN, for each diffusion time.  mod (B, R, 6, C) -> (6, B, R, C) float32"""
        return (self.modulation.float() + mod).permute(2, 0, 1, 3)

    def project(self, x, mod, rope):
        """x (B, N, C), mod (6, B, N or 1, C), rope (2, N, 1, D/2) -> q, k, v, each (B, N, K, D)"""
        shift1, scale1 = mod[:2]
        return self.self_attn.qkv(modulate(layer_norm(x, self.eps), shift1, scale1), rope)

    def finish(self, x, y, mod, text):
        """What follows self-attention.  x (B, N, C) float32, y (B, N, C) from `attend`, text (2, B, S, K, D) -> (B, N, C) float32"""
        gate1, shift2, scale2, gate2 = mod[2:]
        x = x + gate1 * self.self_attn.o(y).float()
        x = x + self.cross_attn(self.cross_norm(x), text)
        return x + gate2 * self.ffn(modulate(layer_norm(x, self.eps), shift2, scale2)).float()

    def audio_cross_attention(self, x, audio, adain):
        """On video tokens alone.  x (B, T*h*w, C) float32 of T latent frames, audio (2, B, T, A, K, D), adain (2, B, T, 1, C) -> like x"""
        return x + self.inject(x, audio, adain)

    def forward(self, x, mod, cond, layer, attend=attention):
        """x (B, N, C) float32, mod (B, R, 6, C) float32 of the diffusion times, cond Cond, layer this block's number -> (B, N, C) float32"""
        (text, audio, adain), (T, h, w) = cond.layers[layer], cond.grid
        mod = per_token(self.modulations(mod), cond.segments)        # (6, B, N, C)
        q, k, v = self.project(x, mod, cond.rope)                    # (B, N, K, D) each
        x = self.finish(x, attend(q, k, v, layer), mod, text)
        if self.inject is None:
            return x
        video, context = x[:, :T * h * w], x[:, T * h * w:]          # (B, L, C), (B, N - L, C)
        return torch.cat([self.audio_cross_attention(video, audio, adain), context], dim=1)


class CausalAudioEncoder(nn.Module):
    """wav2vec2 states, one per video frame -> per latent frame a few local audio tokens and one global token; causal, float32."""

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
        """x (B, channels, P) -> (B, out channels, ceil(P / stride))"""
        x = F.pad(x, (conv.kernel_size[0] - 1, 0), mode="replicate")
        return F.conv1d(x, conv.weight.float(), conv.bias.float(), conv.stride)

    def norm_act(self, x):
        return F.silu(layer_norm(x.transpose(1, 2), self.eps)).transpose(1, 2)

    def shrink(self, x):
        """(B, C/4, P) after the first convolution -> (B, T, C) with T = ceil(P / 4)"""
        x = self.norm_act(self.causal(self.conv2, self.norm_act(x)))
        return self.norm_act(self.causal(self.conv3, x)).transpose(1, 2)

    def forward(self, states):
        """states (B, audio_states, audio_dim, P) -> global (B, T, 1, C), local (B, T, A, C)"""
        weight = F.silu(self.mix.float())
        x = (states.float() * weight / weight.sum()).sum(1)          # (B, audio_dim, P)
        local = self.causal(self.conv_local, x).unflatten(1, (self.n_token, -1)).flatten(0, 1)       # (B*audio_tokens, C/4, P)
        local = self.shrink(local).unflatten(0, (-1, self.n_token)).transpose(1, 2)                  # (B, T, audio_tokens, C)
        pad = self.pad_token.float().expand(*local.shape[:2], 1, -1)                                 # (B, T, 1, C)
        whole = self.out(self.shrink(self.causal(self.conv_global, x)))                              # (B, T, C)
        return whole.unsqueeze(2), torch.cat([local, pad], dim=2)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.eps = cfg.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, cfg.dim))
        self.linear = FloatLinear(cfg.dim, cfg.out_dim * PATCH[0] * PATCH[1] * PATCH[2])

    def forward(self, x, e):
        """x (B, N, C), e time embedding (B, N or 1, C) float32 -> (B, N, patch values) float32"""
        shift, scale = (self.modulation.float().unsqueeze(2) + e.unsqueeze(1)).unbind(1)             # (B, N or 1, C) each
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
            self.audio = CausalAudioEncoder(cfg)
            self.pose = nn.Conv3d(cfg.pose_dim, C, PATCH, stride=PATCH)
            self.token_kind = nn.Embedding(3, C)                     # 0 video, 1 reference, 2 motion
            self.motion = nn.ModuleDict({name: nn.Conv3d(cfg.out_dim, C, patch, stride=patch) for name, _, patch in MOTION_BUCKETS})

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
        """Audio tokens of the clip's own latent frames.  audio (B, states, audio_dim, 4T) -> global (B, T, 1, C), local (B, T, A, C)

        The clip's first audio frame stands in for the motion frames in front of it, not the audio that was really there (official L693).
        """
        past = audio[..., :1].expand(*audio.shape[:-1], self.cfg.motion_frames)                      # (B, states, audio_dim, 73)
        return [x[:, self.cfg.motion_latents:] for x in self.audio(torch.cat([past, audio], dim=-1))]

    def context_tokens(self, ref, motion):
        """Reference and motion tokens with the embedding of their kind -> (B, N - L, C)"""
        kind = self.token_kind.weight
        ref = self.tokens(self.patch, ref) + kind[1]                 # (B, h*w, C)
        return ref if motion is None else torch.cat([ref, self.motion_tokens(motion) + kind[2]], dim=1)

    def prepare(self, shape, text, audio=None, ref=None, motion=None, pose=None, image=None, clean_frames=0):
        """Everything about a clip that does not change with the diffusion time -> Cond

        shape         (T, H, W) of the latents to come; H and W even (multiples of 8 where motion is given)
        text          (B, up to text_len, text_dim) umT5 rows of the prompt, without padding
        audio         (B, audio_states, audio_dim, 4T) wav2vec2 states, one audio frame per pixel frame; S2V only, as are the next three
        ref           (B, out_dim, 1, H, W) latent of the reference picture
        motion        (B, out_dim, 19, H, W) latents of the frames before the clip, or None to leave the motion tokens out
        pose          (B, pose_dim, T, H, W) pose latents, or None (which is zeros, not a black picture)
        image         (B, in_dim - out_dim, T, H, W) mask and picture latents: I2V
        clean_frames  number of leading latent frames that are not noisy: TI2V, 0 or 1
        """
        cfg, (T, h, w) = self.cfg, (shape[0], shape[1] // PATCH[1], shape[2] // PATCH[2])
        text = self.text(F.pad(text, (0, 0, 0, cfg.text_len - text.shape[1])))                       # (B, S, C)
        audio_global, audio_local = self.audio_latents(audio) if cfg.audio_dim else (None, None)     # (B, T, 1, C), (B, T, A, C)
        layers = tuple(block.prepare(text, audio_local, audio_global) for block in self.blocks)
        segments = [Segment(n * h * w, row) for n, row in ((clean_frames, 1), (T - clean_frames, 0)) if n]
        context = bias = None
        if cfg.audio_dim:
            context = self.context_tokens(ref, motion)               # (B, N - L, C)
            segments.append(Segment(context.shape[1], 1))
            pose = self.pose.bias if pose is None else self.tokens(self.pose, pose)                  # (C,) or (B, L, C)
            bias = self.token_kind.weight[:1] + pose                 # (1, C) or (B, L, C)
        positions = token_positions((T, h, w), bool(cfg.audio_dim), motion is not None)              # (N, 3)
        rope = rope_table(positions, cfg.dim // cfg.n_head).to(text.device)
        return Cond((T, h, w), tuple(segments), rope, layers, image, bias, context)

    def modulations(self, t):
        """t (B,) -> time embedding (B, R, C) and the blocks' modulation (B, R, 6, C), both float32; row 0 at t, row 1 at time 0"""
        times = torch.stack([t, torch.zeros_like(t)], dim=1)         # (B, R)
        e = self.time(timestep_embedding(times, self.cfg.freq_dim))  # (B, R, C)
        return e, self.time_mod(F.silu(e)).unflatten(2, (6, -1))

    def embed(self, latents, cond):
        """Noisy latents (B, out_dim, T, H, W) -> all tokens entering the first block (B, N, C) float32"""
        latents = latents if cond.image is None else torch.cat([latents, cond.image], dim=1)         # (B, in_dim, T, H, W)
        x = self.tokens(self.patch, latents)                         # (B, L, C)
        x = x if cond.video_bias is None else x + cond.video_bias
        return (x if cond.context is None else torch.cat([x, cond.context], dim=1)).float()

    def forward(self, latents, t, cond, attend=attention):
        """Velocity eps - x0 of noisy latents.

        latents  (B, out_dim, T, H, W)        t  (B,) diffusion time in 0..1000        cond  from `prepare`
        attend   function (q, k, v, layer) -> (B, N, C), each of q, k, v (B, N, K, D): self-attention of layer number `layer`
        returns  (B, out_dim, T, H, W) float32
        """
        T, h, w = cond.grid
        e, mod = self.modulations(t)                                 # (B, R, C), (B, R, 6, C)
        x = self.embed(latents, cond)                                # (B, N, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, mod, cond, layer, attend)                   # (B, N, C)
        L = T * h * w
        x = self.head(x[:, :L], per_token(e, cond.segments)[:, :L])  # (B, L, 4*out_dim)
        return unpatchify(x, cond.grid)                              # (B, out_dim, T, H, W)
