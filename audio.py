"""Speech for the S2V denoiser: 16 kHz samples -> wav2vec2 hidden states -> one audio frame per video frame.

An audio frame is one feature vector of every hidden state: wav2vec2 gives 50 a second, they are interpolated to 30 a second, and each
video frame takes the one nearest in time.

Axes    B batch   S hidden states (n_layer + 1)   T audio frames: 50/s out of wav2vec2, 30/s after interpolation (T30)
        C width   K heads   D head width   P video frames
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/s2v/audio_encoder.py ("official L66"), which calls transformers 4.51.3 Wav2Vec2 ("HF");
        the network is wav2vec2-large-xlsr-53 (arXiv 2006.11477, 2006.13979).
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

RATE_50 = 50         # audio frames a second out of wav2vec2: 16000 Hz / 320 samples
WINDOW = 60.0        # seconds: longer sound is encoded in overlapping windows, or attention would grow with its square


# ---- wav2vec2 --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AudioConfig:            # wav2vec2-large-xlsr-53; only the layer-norm, pre-norm ("stable") variant is built
    dim: int = 1024           # C
    ffn_dim: int = 4096
    n_head: int = 16          # K, so D = 64
    n_layer: int = 24         # so S = 25
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = True
    pos_kernel: int = 128     # positional convolution, in audio frames: 2.56 s
    pos_groups: int = 16
    eps: float = 1e-5

    @property
    def hop(self):            # samples from one audio frame to the next: 320, 20 ms
        return math.prod(self.conv_stride)

    @property
    def field(self):          # receptive field of an audio frame in samples: 400, 25 ms
        return 1 + sum((k - 1) * math.prod(self.conv_stride[:i]) for i, k in enumerate(self.conv_kernel))

    def frames(self, samples):
        """How many audio frames at 50/s so many samples give."""
        return max((samples - self.field) // self.hop + 1, 0)


class ConvLayer(nn.Module):
    """Strided convolution, layer norm over channels, GELU."""

    def __init__(self, c_in, c_out, kernel, stride, bias):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel, stride, bias=bias)
        self.norm = nn.LayerNorm(c_out)  # eps 1e-5 whatever the config says, as HF

    def forward(self, x):                                                 # (B, c_in, samples)
        x = self.norm(self.conv(x).transpose(1, 2))                       # (B, shorter, c_out)
        return F.gelu(x).transpose(1, 2)                                  # (B, c_out, shorter)


class PositionalConv(nn.Module):
    """Grouped convolution whose kernel is v scaled to length g, one length per tap (weight norm over the other axes)."""

    def __init__(self, dim, kernel, groups):
        super().__init__()
        self.groups = groups
        self.g = nn.Parameter(torch.empty(1, 1, kernel))
        self.v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x):                                                 # (B, T, C)
        T, kernel = x.shape[1], self.v.shape[2]
        weight = self.v * (self.g / self.v.norm(dim=(0, 1), keepdim=True))
        x = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups)   # (B, C, T+1): the kernel is even
        return F.gelu(x[:, :, :T]).transpose(1, 2)                        # (B, T, C)


class Block(nn.Module):
    """Pre-norm transformer layer with full attention."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.norm1 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm2 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU(), nn.Linear(cfg.ffn_dim, cfg.dim))

    def forward(self, x):                                                 # (B, T, C)
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(2, (self.n_head, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, K, T, D)
        y = F.scaled_dot_product_attention(q, k, v)                       # (B, K, T, D)
        x = x + self.o(y.transpose(1, 2).flatten(2))                      # (B, T, C)
        return x + self.ffn(self.norm2(x))


class Wav2Vec2(nn.Module):
    """wav2vec2 without its CTC head: normalised 16 kHz samples (B, samples) -> all hidden states (S, B, T, C) at 50/s.

    State 0 is the input of the first layer, state i the residual stream after layer i. Only the last one has passed the final norm
    (HF <= 4.51.3, which the official code pins; newer releases leave it out).
    """

    def __init__(self, cfg=AudioConfig()):
        super().__init__()
        self.config = cfg
        widths = (1, *cfg.conv_dim)
        self.conv = nn.ModuleList(ConvLayer(*layer, cfg.conv_bias) for layer in
                                  zip(widths, widths[1:], cfg.conv_kernel, cfg.conv_stride))
        self.norm_in = nn.LayerNorm(cfg.conv_dim[-1], cfg.eps)
        self.project = nn.Linear(cfg.conv_dim[-1], cfg.dim)
        self.pos_conv = PositionalConv(cfg.dim, cfg.pos_kernel, cfg.pos_groups)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.dim, cfg.eps)

    def forward(self, values):
        x = values.unsqueeze(1)                                           # (B, 1, samples)
        for layer in self.conv:
            x = layer(x)                                                  # (B, conv_dim, T) in the end
        x = self.project(self.norm_in(x.transpose(1, 2)))                 # (B, T, C)
        x = x + self.pos_conv(x)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        states[-1] = self.norm(x)
        return torch.stack(states)                                        # (S, B, T, C)


def normalise(wav, var_mean=None):
    """Zero mean and unit variance over the whole sound, as the HF processor.  var_mean: of the whole, where `wav` is a piece of it"""
    var, mean = var_mean or torch.var_mean(wav, correction=0)
    return (wav - mean) / torch.sqrt(var + 1e-7)


@torch.no_grad()
def encode(encoder, values):
    """Normalised samples (n,) -> (S, T, C) float32 on the device of the samples, wherever the encoder is."""
    weight = encoder.project.weight
    return encoder(values.to(weight)[None])[:, 0].float().to(values.device)


def hidden_states(encoder, wav):
    """wav (samples,) float32 16 kHz -> (S, T, C) float32, T = 50 a second: the whole sound in one pass."""
    return encode(encoder, normalise(wav))


# ---- 50 audio frames a second -> one per video frame -----------------------------------------------------------------

def positions_30(T):
    """Where the int(T/50*30) audio frames at 30/s lie among T at 50/s; first on first, last on last.  (T30,) float32."""
    T30 = int(T / RATE_50 * 30)
    step = torch.tensor(float(T - 1)) / max(T30 - 1, 1)
    return torch.arange(T30) * step  # float32 like F.interpolate(align_corners=True), which is what the official code calls


def interpolate(states, position):
    """Linear interpolation of states (S, T, C) at fractional audio frames position (n,) -> (S, n, C)."""
    position = position.to(states.device)
    left = position.long()
    right = (left + 1).clamp(max=states.shape[1] - 1)
    return torch.lerp(states[:, left], states[:, right], (position - left)[:, None])


def resample_50_to_30(states):
    """(S, T, C) at 50/s -> (S, int(T/50*30), C) at 30/s (official L44-64)."""
    return interpolate(states, positions_30(states.shape[1]))


def audio_frame_indices(T30, fps, clip_frames):
    """The audio frame at 30/s of every video frame, nearest in time, ties to even: (P,) int64, and the number of clips.

    P is clips * clip_frames. Sound that fills n clips exactly gives n + 1 (official L148), so some video frames always come after its end.
    """
    clips = int(T30 / (clip_frames * (30 / fps))) + 1
    P = clips * clip_frames
    seconds = np.linspace(0, P / fps, P, endpoint=False)  # rounded like the official times: decides ties at 20 or 24 fps
    return torch.from_numpy(np.rint(seconds * 30).astype(np.int64)), clips


def align_to_fps(states30, fps=16, clip_frames=80, neighbours=0):
    """Audio frames at 30/s -> one per video frame, zeros after the end of the sound.

    states30    (S, T30, C)        neighbours  audio frames added on each side, int(30/fps) apart (the released model uses 0)
    returns     (S, (2 * neighbours + 1) * C, P), clips
    source      official L136-189
    """
    S, T30, C = states30.shape
    indices, clips = audio_frame_indices(T30, fps, clip_frames)
    heard = indices[indices < T30]
    offsets = torch.arange(-neighbours, neighbours + 1) * int(30 / fps)
    chosen = (heard[:, None] + offsets).clamp(0, T30 - 1).to(states30.device)        # (n, 2 * neighbours + 1)
    features = states30[:, chosen].flatten(2).transpose(1, 2)                        # (S, C', n)
    return F.pad(features, (0, len(indices) - len(heard))), clips                    # (S, C', P)


def windows(T, size):
    """Cut T audio frames into windows of at most `size`: (first, end, keep_from, keep_to), end not included.

    A twelfth of the window on each side is context only, unless the sound starts or ends there. State 0 is then the same as in one pass,
    as its convolutions see 1.3 s to either side. The layers differ: with random weights, whose attention ranges over the whole sound,
    60 s windows on 150 s move them by 4 to 7% (relative L2), by 30% with three times larger queries and keys. Trained weights are not
    measured. tests/test_audio.py prints such a table.
    """
    if T <= size:
        return [(0, T, 0, T)]
    margin = size // 12
    step = size - 2 * margin
    return [(max(a - margin, 0), min(a + step + margin, T), a, min(a + step, T)) for a in range(0, T, step)]


def audio_features(encoder, wav, fps=16, clip_frames=80, window=WINDOW):
    """wav2vec2 hidden states of a sound, one audio frame per video frame.

    wav      (samples,) float32, 16 kHz mono, from media.sound.load_audio        fps  video frames per second
    window   seconds: longer sound is encoded in overlapping windows, in time and memory linear in its length; None = never.
             Normalisation is over the whole sound either way, so windows change only how far convolutions and attention see.
    returns  features (S, C, P) float32 on the device of wav, zeros after the sound, P = clips * clip_frames; and clips
    raises   ValueError if wav is not 1-D, shorter than 45 ms, or the window shorter than 1 s
    source   official L66-89, L136-189
    """
    cfg = encoder.config
    T = cfg.frames(len(wav)) if wav.ndim == 1 else 0
    if int(T / RATE_50 * 30) < 1:
        raise ValueError(f"audio_features takes (samples,) with at least {cfg.field + cfg.hop} samples, got {tuple(wav.shape)}: use load_audio")
    if window is not None and window < 1:
        raise ValueError(f"wanted an audio window of at least 1 s, got {window}: 60 keeps results of short files exact")
    values, position = normalise(wav), positions_30(T)
    states30 = torch.empty(cfg.n_layer + 1, len(position), cfg.dim, device=wav.device)             # (S, T30, C)
    for first, end, keep_from, keep_to in windows(T, T if window is None else int(window * RATE_50)):
        states = encode(encoder, values[first * cfg.hop:(end - 1) * cfg.hop + cfg.field])      # (S, end - first, C)
        mine = (position >= keep_from) & (position < keep_to)
        states30[:, mine] = interpolate(states, position[mine] - first)
    return align_to_fps(states30, fps, clip_frames)
