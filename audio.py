"""Speech for the S2V denoiser: any audio file -> 16 kHz mono -> wav2vec2 hidden states -> one feature column per video frame.

Axes    B batch   S hidden states (n_layer + 1)   T time: 50 columns/s out of wav2vec2, 30/s after interpolation
        C width   K heads   D head width   P video frames
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/s2v/audio_encoder.py ("official L66"), which calls librosa.load and
        transformers 4.51.3 Wav2Vec2 ("HF"); the network is wav2vec2-large-xlsr-53 (arXiv 2006.11477, 2006.13979).
"""
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import imageio_ffmpeg
import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import nn

RATE = 16000         # Hz, what wav2vec2 was trained on
MIN_SAMPLES = 720    # 45 ms: two 400-sample wav2vec2 windows 320 apart, the least that gives one column at 30/s
BLOCK = 1 << 13      # native samples decoded at a time; also what a damaged flac can lose before its bad spot
WINDOW = 60.0        # seconds: longer sound is encoded in overlapping windows, or attention would grow with its square


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# ---- file -> samples -------------------------------------------------------------------------------------------------

def check_source(path):
    """Refuse what no decoder needs to see: missing, a folder, unreadable, empty."""
    if os.path.isdir(path):
        raise ValueError(f"wanted an audio file, got the folder {path}: name one file in it")
    try:
        with open(path, "rb") as f:
            if not f.read(1):
                raise ValueError(f"wanted an audio file, got {path} of 0 bytes: record or download it again")
    except OSError as e:
        raise ValueError(f"cannot read the audio file {path} ({e.strerror}): check the path and its permissions") from None


class Stream(soundfile.SoundFile):
    """Reads straight on: soundfile seeks after every read of a seekable file, which corrupts some mp3 at the joins (by 0.12)."""

    def seekable(self):
        return False


def decode_soundfile(path):
    """Yield (rate, block (n, channels) float32); nothing at all if libsndfile cannot read the file."""
    with open(path, "rb") as f:  # opened here so that libsndfile trusts the content, not the name
        try:
            file = Stream(f)
        except (soundfile.LibsndfileError, TypeError):  # TypeError: a name ending in .raw
            return
        announced, read = file.frames if file.frames < 2 ** 40 else 0, 0  # flac written to a pipe says 2 ** 63
        short = re.search(r"^ ?(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info, re.M)  # wav and aiff
        if short and 0 < int(short[2]) < int(short[1]) < 0x7FFF0000:  # programs that write to a pipe leave a huge size there
            announced *= int(short[1]) / int(short[2])
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                read += len(block)
                yield file.samplerate, block
        except soundfile.LibsndfileError:
            pass  # a damaged flac: reported below
        if MIN_SAMPLES * file.samplerate < read * RATE < 0.99 * announced * RATE:  # mp3 lengths are estimates
            warn(f"{path} announces {announced / file.samplerate:.2f} s but breaks off after {read / file.samplerate:.2f} s: using those")


def decode_ffmpeg(path):
    """Yield (rate, block (n, channels) float32) of the first audio stream, through the bundled ffmpeg."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-protocol_whitelist", "file", "-i", f"file:{path}",
               "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-"]  # .au: a header that needs no length
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            read, head = 0, process.stdout.read(24)
            if len(head) == 24:
                _, offset, _, _, rate, channels = struct.unpack(">6I", head)
                process.stdout.read(offset - 24)
                while data := process.stdout.read(4 * channels * BLOCK):
                    block = np.frombuffer(data, ">f4", len(data) // (4 * channels) * channels).reshape(-1, channels)
                    read += len(block)
                    yield rate, block.astype(np.float32)
        finally:
            process.kill()  # the caller may have enough before the end
        log.seek(0)
        error = log.read().decode(errors="replace").strip().splitlines()
    if read and error:
        warn(f"ffmpeg reads {path} with errors ({error[0].split('] ')[-1]}): using the {read / rate:.2f} s it gives")
    elif any("matches no streams" in line for line in error):
        raise ValueError(f"wanted a file with sound, got {path} without an audio stream: give the audio file itself")
    elif error:
        raise ValueError(f"wanted wav, flac, ogg, mp3, m4a, aac, opus, webm or a video with sound, got {path}, which libsndfile "
                         f"and ffmpeg cannot read ({error[0].split('] ')[-1]}): convert it")


def decode(path):
    """libsndfile first, as librosa does, ffmpeg for what it cannot read."""
    blocks = decode_soundfile(path)
    first = next(blocks, None)
    if first is None:
        yield from decode_ffmpeg(path)
    else:
        yield first
        yield from blocks


def mono_blocks(path, start, duration):
    """Yield (rate, samples (n,)) of the wanted part, channels averaged; the errors of load_audio."""
    seen = used = 0  # native samples decoded, and kept
    rate = RATE
    for rate, block in decode(path):
        if rate < 1000:
            raise ValueError(f"wanted audio of 1 kHz or more, {path} says {rate} Hz: its header is damaged, export it again")
        first = int(start * rate)
        last = first + int(duration * rate) if duration is not None else sys.maxsize
        part = block.T.mean(axis=0)[max(first - seen, 0):max(last - seen, 0)]
        if not np.isfinite(part).all():
            at = (max(first, seen) + int(np.argmin(np.isfinite(part)))) / rate
            raise ValueError(f"{path} has NaN or infinite samples (first at {at:.3f} s): export it again with numbers only")
        seen, used = seen + len(block), used + len(part)
        if len(part):
            yield rate, part
        if seen >= last:
            return
    if not used:
        wanted = f"start at {start:g} s" if seen else "some sound"
        raise ValueError(f"wanted {wanted}, got {path} of {seen / rate:.2f} s: give a {'smaller start' if seen else 'longer recording'}")
    if duration is not None:
        warn(f"{path} has {used / rate:.2f} s from {start:g} s on, not the {duration:g} s wanted: using those")


def load_audio(path, start=0.0, duration=None):
    """Any audio file, or the sound of a video file, as 16 kHz mono.

    path      wav, flac, ogg, mp3, ... by libsndfile; m4a, aac, webm, mp4, ... by ffmpeg (first audio stream)
    start     seconds to skip        duration  seconds to use, None = to the end (a shorter file gives a warning)
    returns   (samples,) float32 at 16 kHz, nominally in [-1, 1]; decoded in blocks, so memory is about twice the result
    raises    ValueError: file missing, unreadable, without sound, not finite, shorter than 45 ms, or start past its end
    warns     on stderr: silence, file cut short or damaged (what is there is used)
    parity    the bits of librosa.load(path, sr=16000); ffmpeg's lossy formats within 2e-5, as librosa takes them through 16 bits
    source    official L75
    """
    path = os.fspath(path)
    if not (0 <= start < math.inf) or duration is not None and not (0 < duration < math.inf):
        raise ValueError(f"wanted start >= 0 s and duration > 0 s, got start {start} and duration {duration}: change them")
    check_source(path)
    resampler, used, parts = None, 0, []
    for rate, part in mono_blocks(path, start, duration):
        used += len(part)
        if rate != RATE:
            resampler = resampler or soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
            part = resampler.resample_chunk(np.ascontiguousarray(part))
        parts.append(part)
    if resampler:
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        length = math.ceil(used * (RATE / rate))  # librosa's length; soxr may fall one sample short
        parts.append(np.zeros(max(length - sum(map(len, parts)), 0), np.float32))
    wav = np.concatenate(parts)
    if len(wav) < MIN_SAMPLES:
        raise ValueError(f"wanted at least {1000 * MIN_SAMPLES // RATE} ms of sound, got {1000 * len(wav) / RATE:.1f} ms "
                         f"from {path}: give a longer recording or part")
    if np.ptp(wav) < 2e-4:  # -80 dB of full scale
        warn(f"{path} is silent: the mouth will have nothing to follow")
    return torch.from_numpy(wav)


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
    pos_kernel: int = 128     # positional convolution, in columns: 2.56 s
    pos_groups: int = 16
    eps: float = 1e-5

    @property
    def hop(self):            # samples from one column to the next: 320, 20 ms
        return math.prod(self.conv_stride)

    @property
    def field(self):          # samples one column sees: 400, 25 ms
        return 1 + sum((k - 1) * math.prod(self.conv_stride[:i]) for i, k in enumerate(self.conv_kernel))

    def columns(self, samples):
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
        x = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups)
        return F.gelu(x[:, :, :T]).transpose(1, 2)                        # an even kernel gives T + 1: the last is dropped


class Block(nn.Module):
    """Pre-norm transformer layer; every column sees all others, no mask."""

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


class AudioEncoder(nn.Module):
    """wav2vec2 without its CTC head: normalised 16 kHz samples (B, samples) -> all hidden states (S, B, T, C) at 50/s.

    State 0 is the input of the first layer, state i the residual stream after layer i; only the last passes the final
    norm (HF <= 4.51.3, which the official code pins; newer releases leave it out).
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


def normalise(wav):
    """Zero mean and unit variance over the whole sound, as the HF processor."""
    var, mean = torch.var_mean(wav, correction=0)
    return (wav - mean) / torch.sqrt(var + 1e-7)


@torch.no_grad()
def encode(encoder, values):
    """Normalised samples (n,) -> (S, T, C) float32 on the device of the samples, wherever the encoder is."""
    weight = encoder.project.weight
    return encoder(values.to(weight)[None])[:, 0].float().to(values.device)


def hidden_states(encoder, wav):
    """wav (samples,) float32 16 kHz -> (S, T, C) float32, T = 50 a second: the whole sound in one pass."""
    return encode(encoder, normalise(wav))


# ---- 50 columns a second -> one per video frame ----------------------------------------------------------------------

def positions_30(T):
    """Where the int(T/50*30) columns at 30/s lie among T columns at 50/s; first on first, last on last.  (T30,) float32."""
    T30 = int(T / 50 * 30)
    step = torch.tensor(float(T - 1)) / max(T30 - 1, 1)
    return torch.arange(T30) * step  # float32 like F.interpolate(align_corners=True), which is what the official code calls


def between(states, position):
    """Linear interpolation of states (S, T, C) at fractional columns position (n,) -> (S, n, C)."""
    position = position.to(states.device)
    left = position.long()
    right = (left + 1).clamp(max=states.shape[1] - 1)
    return torch.lerp(states[:, left], states[:, right], (position - left)[:, None])


def resample_50_to_30(states):
    """(S, T, C) at 50/s -> (S, int(T/50*30), C) at 30/s (official L44-64)."""
    return between(states, positions_30(states.shape[1]))


def frame_columns(T30, fps, clip_frames):
    """For every frame of the video its column at 30/s, nearest in time, ties to even: (P,) int64, and the number of clips.

    P is clips * clip_frames; there is always room left, so sound that fills n clips exactly gives n + 1 (official L148).
    """
    clips = int(T30 / (clip_frames * (30 / fps))) + 1
    P = clips * clip_frames
    seconds = np.linspace(0, P / fps, P, endpoint=False)  # rounded like the official times: decides ties at 20 or 24 fps
    return torch.from_numpy(np.rint(seconds * 30).astype(np.int64)), clips


def align_to_fps(states30, fps=16, clip_frames=80, neighbours=0):
    """Columns at 30/s -> one per video frame, zeros after the end of the sound.

    states30    (S, T30, C)        neighbours  columns added on each side, int(30/fps) apart (the released model uses 0)
    returns     (S, (2 * neighbours + 1) * C, P), clips
    source      official L136-189
    """
    S, T30, C = states30.shape
    columns, clips = frame_columns(T30, fps, clip_frames)
    heard = columns[columns < T30]
    offsets = torch.arange(-neighbours, neighbours + 1) * int(30 / fps)
    chosen = (heard[:, None] + offsets).clamp(0, T30 - 1).to(states30.device)       # (n, 2 * neighbours + 1)
    features = states30[:, chosen].flatten(2).transpose(1, 2)                        # (S, C', n)
    return F.pad(features, (0, len(columns) - len(heard))), clips


def windows(T, size):
    """Cut T columns into windows of at most `size`: (first, end, keep_from, keep_to), all in columns, end not included.

    A twelfth of the window on each side is context only, unless the sound starts or ends there. State 0 is then the same as in
    one pass (its convolutions see 1.3 s to either side). The layers are not: with random weights, whose attention ranges over
    the whole sound, 60 s windows on 150 s move them by 4 to 7% (relative L2), by 30% with three times larger queries and keys.
    Trained weights are not measured. test_audio.py prints such a table.
    """
    if T <= size:
        return [(0, T, 0, T)]
    margin = size // 12
    step = size - 2 * margin
    return [(max(a - margin, 0), min(a + step + margin, T), a, min(a + step, T)) for a in range(0, T, step)]


def audio_features(encoder, wav, fps=16, clip_frames=80, window=WINDOW):
    """wav2vec2 hidden states of a sound, one column per video frame.

    wav      (samples,) float32, 16 kHz mono, from load_audio        fps  video frames per second
    window   seconds: longer sound is encoded in overlapping windows, in time and memory linear in its length; None = never.
             Normalisation is over the whole sound either way, so windows change only how far convolutions and attention see.
    returns  features (S, C, P) float32 on the device of wav, zeros after the sound, P = clips * clip_frames; and clips
    raises   ValueError if wav is not 1-D, shorter than 45 ms, or the window shorter than 1 s
    source   official L66-89, L136-189
    """
    cfg = encoder.config
    T = cfg.columns(len(wav)) if wav.ndim == 1 else 0
    if int(T / 50 * 30) < 1:
        raise ValueError(f"audio_features takes (samples,) with at least {MIN_SAMPLES} samples, got {tuple(wav.shape)}: use load_audio")
    if window is not None and window < 1:
        raise ValueError(f"wanted an audio window of at least 1 s, got {window}: 60 keeps results of short files exact")
    values, position = normalise(wav), positions_30(T)
    states30 = torch.empty(cfg.n_layer + 1, len(position), cfg.dim, device=wav.device)
    for first, end, keep_from, keep_to in windows(T, T if window is None else int(window * RATE / cfg.hop)):
        states = encode(encoder, values[first * cfg.hop:(end - 1) * cfg.hop + cfg.field])      # (S, end - first, C)
        mine = (position >= keep_from) & (position < keep_to)
        states30[:, mine] = between(states, position[mine] - first)
    return align_to_fps(states30, fps, clip_frames)
