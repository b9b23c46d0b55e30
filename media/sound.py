"""Sound in: any audio file, or the sound of a video file, as 16 kHz mono samples for the model, as it is for the mp4.

Both come from one decoder, ffmpeg, and one clock: its timestamps from the first sample on. Where packets are missing there is silence.
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/s2v/audio_encoder.py L75, which calls librosa.load
"""
import math
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import soundfile

from media.ffmpeg import COUNTED, FFmpegError, NoFFmpeg, clock, decoded, ffmpeg_command, last_line, source, streams

RATE = 16000         # Hz, what wav2vec2 was trained on
MIN_SAMPLES = 720    # 45 ms: two wav2vec2 windows of 400 samples, 320 apart, the least that gives one audio frame at 30 a second
BLOCK = 1 << 13      # native samples decoded at a time
LOUDEST = 1e10       # of float samples: more than 32-bit integers written as floats
CANCELS = 0.01       # channels cancel if their sum has less than this share of the power that it would have if they were independent


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def check_source(path):
    """Refuse what no decoder needs to see: missing, a folder, unreadable, empty."""
    if (folder := os.path.isdir(path)) or os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"wanted an audio file, got the {f'folder {path}: name one file in it' if folder else f'pipe {path}: save it first'}")
    try:
        with open(path, "rb") as f:
            if not f.read(1):
                raise ValueError(f"wanted an audio file, got {path} of 0 bytes: record or download it again")
    except OSError as e:
        raise ValueError(f"cannot read the audio file {path} ({e.strerror}): check the path and its permissions") from None


def silence_put_in(path, seconds):
    """How much of the decoded `seconds` stands for packets that are missing or damaged."""
    try:
        return seconds - decoded(path, "a", "out_time_us", COUNTED) / 1e6
    except FFmpegError:      # more damage than sound
        return 0.0


def decode_soundfile(path):
    """Yield (rate, block (n, channels) float32) without ffmpeg; nothing at all if libsndfile cannot read the file."""
    try:
        with open(path, "rb") as f, soundfile.SoundFile(f) as file:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield file.samplerate, block
    except (soundfile.LibsndfileError, TypeError):
        return


def decode_ffmpeg(path, complaints):
    """Yield (rate, block (n, channels) float32) of the first audio stream, as .au, which needs no length; `complaints` takes words of damage."""
    command = ffmpeg_command("-v", "error", *source(path), "-map", "0:a:0", "-af", clock(path), "-c:a", "pcm_f32be", "-f", "au", "-")
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
            process.wait()      # it may still have something to say
        finally:
            process.kill()      # the caller may have enough before the end
        log.seek(0)
        errors = log.read().splitlines()
    if not errors:
        return
    reason = last_line(errors[0], process.returncode)
    if not read and holds_picture_only(path):
        raise ValueError(f"wanted a file with sound, got {path} without an audio stream: give the audio file itself")
    if not read:
        raise ValueError(f"wanted wav, flac, ogg, mp3, m4a, aac, opus, webm or a video with sound, got {path}, which ffmpeg "
                         f"cannot read ({reason}): convert it")
    complaints.append(reason)


def holds_picture_only(path):
    try:
        return "audio" not in streams(path)
    except FFmpegError:
        return False


def decode(path, complaints):
    """ffmpeg; without one, PNG frames can still be made for what libsndfile reads."""
    try:
        yield from decode_ffmpeg(path, complaints)
    except NoFFmpeg:
        blocks = decode_soundfile(path)
        first = next(blocks, None)
        if first is None:
            raise
        yield first
        yield from blocks


@dataclass(frozen=True)
class Recording:
    """What decoding a whole file shows."""
    rate: int              # Hz
    channels: int
    seconds: float
    channel: int | None    # the only one heard, as the sum of all is silent; None: all
    clean: bool            # ffmpeg had nothing to complain of
    peak: float = 1.0      # largest sample, where 1 is full scale


def examine(path, say=lambda message: None):
    """Decode the whole of a sound -> Recording.  say: is given one line for each thing that is wrong with it"""
    from media.lengths import announced, tagged                      # here: importing `sample` does not need them
    check_source(path)
    rate, total, power, sums, peak, complaints = RATE, 0, np.zeros(1), 0.0, 0.0, []
    for rate, block in decode(path, complaints):
        if rate < 1000:
            raise ValueError(f"wanted audio of 1 kHz or more, {path} says {rate} Hz: its header is damaged, export it again")
        total, added = total + len(block), np.einsum("nc,nc->c", block, block)
        if LOUDEST < (top := float(np.abs(block).max(initial=0))) < math.inf:
            raise ValueError(f"wanted audio in [-1, 1], {path} has samples of {top:.3g}: export it again")
        if np.isfinite(added).all():      # else refused later, if it is in the part that is used
            power, mixed, peak = power + added, block.sum(1), max(peak, top)
            sums += float(mixed @ mixed)
    seconds, (wanted, certain), channel = total / rate, announced(path), None
    if len(power) > 1 and sums < CANCELS * power.sum():
        channel = int(power.argmax())
        say(f"the {len(power)} channels of {path} cancel each other: channel {channel + 1} alone is used")
    short = wanted - seconds > 0.01 * wanted
    if certain and short and total >= MIN_SAMPLES * rate / RATE and not (complaints and tagged(path)):           # an mp3 may lack frames anywhere
        say(f"{path} announces {wanted:.2f} s but breaks off after {seconds:.2f} s: using those")
    elif complaints and total:
        lost = wanted - seconds if short else silence_put_in(path, seconds)
        what = f"damaged, {lost:.2f} s of it are lost" if lost > 0.01 else "damaged or joined"
        say(f"ffmpeg reads {path} with errors ({complaints[0]}), it is {what}: using the {seconds:.2f} s it gives")
    return Recording(rate, len(power), seconds, channel, not complaints and not (certain and short), peak)


def cut(path, recording, start, duration):
    """Yield the samples (n, channels) float32 of a part of a file, of one channel where the channels cancel; the errors of load_audio."""
    seen = used = 0  # native samples decoded, and kept
    rate = recording.rate
    first = int(start * rate)
    last = first + int(duration * rate) if duration is not None else sys.maxsize
    for _, block in decode(path, []):
        part = block[max(first - seen, 0):max(last - seen, 0)]
        if not np.isfinite(part).all():
            at = (max(first, seen) + int(np.argmin(np.isfinite(part).all(1)))) / rate
            raise ValueError(f"{path} has NaN or infinite samples (first at {at:.3f} s): export it again with numbers only")
        seen, used = seen + len(block), used + len(part)
        if len(part):
            yield part if recording.channel is None else part[:, recording.channel:recording.channel + 1]
        if seen >= last:
            return
    if not used:
        wanted = f"start at {start:g} s" if seen else "some sound"
        raise ValueError(f"wanted {wanted}, got {path} of {seen / rate:.2f} s: give a {'smaller start' if seen else 'longer recording'}")


def load_audio(path, start=0.0, duration=None):
    """Any audio file, or the sound of a video file, as 16 kHz mono.

    path      whatever ffmpeg reads (first audio stream); without an ffmpeg wav, flac, ogg, mp3, ... by libsndfile
    start     seconds to skip        duration  seconds to use, None = to the end (a shorter file gives a warning)
    returns   (samples,) float32 at 16 kHz, nominally in [-1, 1]; decoded in blocks, so memory is about twice the result; `open_speech` holds less
    raises    ValueError: file missing, unreadable, without sound, not finite, shorter than 45 ms, or start past its end
    warns     on stderr: silence, channels that cancel (one is used), file cut short or damaged (what is there is used)
    parity    the bits of librosa.load(path, sr=16000) for wav and flac, mp3 within 5e-6, opus within 1.4e-4, where libsndfile reads all of the file
    source    official L75
    """
    from media.speech import open_speech                             # here: importing `sample` does not need it
    return open_speech(path, start, duration, keep=math.inf).samples
