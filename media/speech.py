"""A sound as the model hears it, 16 kHz mono, read in pieces: an hour takes no more memory than a minute.

Source  Wan-Video/Wan2.2@42bf4cf wan/modules/s2v/audio_encoder.py L75, which calls librosa.load
"""
import math
import os
from dataclasses import dataclass

import numpy as np
import soxr
import torch

from media.sound import MIN_SAMPLES, RATE, Recording, cut, examine, warn

KEEP = 60 * RATE     # samples: what a longer sound needs is decoded again when it is needed


@dataclass(frozen=True)
class Speech:
    """A stretch of a sound file; `len` counts its samples."""
    path: str
    recording: Recording
    start: float
    duration: float | None
    length: int                      # samples
    mean: float                      # of all samples
    variance: float
    samples: torch.Tensor | None     # (length,) float32, or None where they are too many to be kept

    def __len__(self):
        return self.length

    def pieces(self, spans):
        """Yield the samples (end - first,) of each span (first, end). Spans ascend and may overlap; one is in memory at a time.

        raises  ValueError if the file has become shorter
        """
        if self.samples is not None:
            yield from (self.samples[first:end] for first, end in spans)
            return
        blocks, held, at = resampled(self.path, self.recording, self.start, self.duration), [], 0        # held: blocks, the first begins at `at`
        for first, end in spans:
            while at + sum(map(len, held)) < end:
                if (block := next(blocks, None)) is None:
                    raise ValueError(f"{self.path} has become shorter since it was examined: leave it as it is while a video is made")
                held.append(block)
                while held and at + len(held[0]) <= first:
                    at += len(held.pop(0))
            yield torch.from_numpy(np.concatenate(held)[first - at:end - at])


def resampled(path, recording, start, duration):
    """Yield the samples (n,) float32 of a part of a file at 16 kHz, the mean of its channels, block after block; errors as `cut`."""
    rate, used, made = recording.rate, 0, 0
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ") if rate != RATE else None
    for part in cut(path, recording, start, duration):
        part, used = part.T.mean(axis=0), used + len(part)
        part = resampler.resample_chunk(np.ascontiguousarray(part)) if resampler else part
        made += len(part)
        yield part
    if resampler:
        part = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        yield part
        yield np.zeros(max(math.ceil(used * (RATE / rate)) - made - len(part), 0), np.float32)       # librosa's length; soxr may fall one short


def open_speech(path, start=0.0, duration=None, keep=KEEP):
    """Decode a part of a sound once -> Speech, which keeps up to `keep` samples.  Other arguments, errors and warnings as `load_audio`"""
    path = os.fspath(path)
    if not (0 <= start < math.inf) or duration is not None and not (0 < duration < math.inf):
        raise ValueError(f"wanted start >= 0 s and duration > 0 s, got start {start} and duration {duration}: change them")
    recording = examine(path, warn)
    parts, n, mean, square, low, high = [], 0, 0.0, 0.0, math.inf, -math.inf                         # square: sum of (x - mean)^2
    for part in resampled(path, recording, start, duration):
        if not len(part):
            continue
        exact, before, n = part.astype(np.float64), n, n + len(part)
        off = exact.mean() - mean
        mean, square = mean + off * len(part) / n, square + exact.var() * len(part) + off * off * before * len(part) / n
        low, high = min(low, part.min()), max(high, part.max())
        parts.append(part)
        if n > keep:
            parts.clear()
    used = round(recording.seconds * recording.rate) - int(start * recording.rate)
    if duration is not None and used < int(duration * recording.rate):
        warn(f"{path} has {used / recording.rate:.2f} s from {start:g} s on, not the {duration:g} s wanted: using those")
    if n < MIN_SAMPLES:
        raise ValueError(f"wanted at least {1000 * MIN_SAMPLES // RATE} ms of sound, got {1000 * n / RATE:.1f} ms "
                         f"from {path}: give a longer recording or part")
    if high - low < 2e-4:  # -80 dB of full scale
        warn(f"{path} is silent: the mouth will have nothing to follow")
    samples = torch.from_numpy(np.concatenate(parts)) if n <= keep else None
    return Speech(path, recording, start, duration, n, mean, square / n, samples)
