"""Sound in: any audio file, or the sound of a video file, as 16 kHz mono samples.

Source  Wan-Video/Wan2.2@42bf4cf wan/modules/s2v/audio_encoder.py L75, which calls librosa.load
"""
import math
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np
import soundfile
import soxr
import torch

from media.ffmpeg import FFmpegError, ffmpeg_command, last_line, source, streams

RATE = 16000         # Hz, what wav2vec2 was trained on
MIN_SAMPLES = 720    # 45 ms: two wav2vec2 windows of 400 samples, 320 apart, the least that gives one audio frame at 30 a second
BLOCK = 1 << 13      # native samples decoded at a time; also what a damaged flac can lose before its bad spot


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


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
    """Reads without seeking: soundfile seeks after every read of a seekable file, which corrupts some mp3 at the joins (by 0.12)."""

    def seekable(self):
        return False


def held_share(path):
    """How much of the sound chunk that its header promises a wav or aiff file holds, up to 1; 1 for other formats."""
    with open(path, "rb") as f:
        order = {b"RIFF": "<", b"FORM": ">"}.get(f.read(12)[:4])
        while order and len(head := f.read(8)) == 8:
            name, size = struct.unpack(f"{order}4sI", head)
            if name in (b"data", b"SSND"):
                held = os.path.getsize(path) - f.tell()
                return min(held / size, 1) if 0 < size < 0x7FFF0000 else 1      # programs that write to a pipe leave 0 or a huge size
            f.seek(size + size % 2, os.SEEK_CUR)
    return 1


def decode_soundfile(path):
    """Yield (rate, block (n, channels) float32); nothing at all if libsndfile cannot read the file."""
    with open(path, "rb") as f:      # opened here, so that libsndfile goes by the content and not by the name
        try:
            file = Stream(f)
        except (soundfile.LibsndfileError, TypeError):      # TypeError: a name ending in .raw
            return
        announced, read = file.frames / (held_share(path) or 1) if file.frames < 2**40 else 0, 0      # flac written to a pipe says 2**63
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                read += len(block)
                yield file.samplerate, block
        except soundfile.LibsndfileError:
            pass      # a damaged flac: reported below
        if MIN_SAMPLES * file.samplerate < read * RATE < 0.99 * announced * RATE:      # mp3 lengths are estimates
            warn(f"{path} announces {announced / file.samplerate:.2f} s but breaks off after {read / file.samplerate:.2f} s: using those")


def decode_ffmpeg(path):
    """Yield (rate, block (n, channels) float32) of the first audio stream, through the bundled ffmpeg."""
    command = ffmpeg_command("-v", "error", *source(path), "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-")      # .au: no length needed
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process:
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
            process.kill()      # the caller may have enough before the end
        log.seek(0)
        errors = log.read().splitlines()
    reason = last_line(b"\n".join(errors[:1]), process.returncode)
    if errors and read:
        warn(f"ffmpeg reads {path} with errors ({reason}): using the {read / rate:.2f} s it gives")
    elif errors and holds_picture_only(path):
        raise ValueError(f"wanted a file with sound, got {path} without an audio stream: give the audio file itself")
    elif errors:
        raise ValueError(f"wanted wav, flac, ogg, mp3, m4a, aac, opus, webm or a video with sound, got {path}, which libsndfile "
                         f"and ffmpeg cannot read ({reason}): convert it")


def holds_picture_only(path):
    try:
        return "audio" not in streams(path)
    except FFmpegError:
        return False


def decode(path):
    """libsndfile first, as librosa does; ffmpeg for what libsndfile cannot read."""
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
