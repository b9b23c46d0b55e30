"""The ffmpeg program that imageio-ffmpeg brings: commands, their errors, and what a media file holds.

The wheel has no ffprobe. Facts are read from formats that ffmpeg documents: the framecrc muxer and the -progress report, not its log.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import imageio_ffmpeg

LIMIT = 3600         # seconds that ffmpeg may take for anything: an hour of sound takes it less than a minute
REMEDY = "pip install imageio-ffmpeg; without it sound must be wav, flac, ogg or mp3 and the output PNG frames, with a path that ends in /"
# The clock of every sound: the timestamps of its packets, from the first on. Missing packets leave silence; where timestamps go back, as where
# two files were joined, what follows is put behind what came before. Less than 20 ms is rounding.
CLOCK = "asetpts='st(0,if(isnan(PREV_INPTS),-PTS,if(lt(PTS+ld(0),ld(1)-0.02/TB),ld(1)-PTS,ld(0))));" \
        "st(1,PTS+ld(0)+NB_SAMPLES/SR/TB);PTS+ld(0)',aresample=async=1:min_hard_comp=0.02:first_pts=0"
COUNTED = "asetpts=N/SR/TB"                  # samples counted, nothing put in
UNTIMED = ("1/14112000", "1/28224000")       # ticks of raw mp3 and aac: ffmpeg makes up their timestamps, and counts what is no sound as well
MAX_PIXELS = 2**24    # of a frame that ffmpeg decodes, 4096x4096: it holds up to 20 of them, and one takes 36 bytes a pixel while it is scaled here


class FFmpegError(OSError):
    """ffmpeg ran and failed."""


class NoFFmpeg(OSError):
    """There is no ffmpeg program."""


def ffmpeg_command(*args):
    """A command line for subprocess. The program ends with this process, however that ends, and does not read the terminal."""
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        program = ""
    if not shutil.which(program):
        raise NoFFmpeg(f"no ffmpeg program found: {REMEDY}")
    return [*with_parent(), str(os.getpid()), program, "-nostdin", *args]


@cache
def with_parent():
    """What a command begins with so that the system kills it when its parent, whose number follows, is gone: before it has begun, too."""
    if setpriv := shutil.which("setpriv"):                           # of util-linux
        return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"']
    program = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
    return [sys.executable, "-ISc", program]


def source(path, kind="a"):
    """Input arguments for a local file, whatever its name holds; playlists cannot reach the network.  kind "V": no larger frames are decoded"""
    return [*["-max_pixels", str(MAX_PIXELS)] * (kind == "V"), "-protocol_whitelist", "file,pipe", "-i", "file:" + os.path.abspath(path)]


def run(*args):
    """Run ffmpeg to its end -> what it wrote to stdout.  FFmpegError with ffmpeg's own last line if it fails."""
    try:
        done = subprocess.run(ffmpeg_command("-v", "error", *args), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, start_new_session=True)
    except subprocess.TimeoutExpired:
        raise FFmpegError(f"ffmpeg did not end within {LIMIT} s") from None
    if done.returncode:
        raise FFmpegError(f"ffmpeg failed: {last_line(done.stderr, done.returncode)}")
    return done.stdout.decode(errors="replace")


@contextmanager
def feeding(*args, folder, limit=LIMIT):
    """A running ffmpeg, in `folder`, whose standard input the block writes. It is waited for at the block's end, and killed if that is left early.

    Ctrl-C in a terminal does not reach it.  raises  FFmpegError with ffmpeg's own last line if it fails or takes more than `limit` seconds
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(ffmpeg_command("-v", "error", "-y", *args), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                                   cwd=folder, start_new_session=True)
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), process.kill()))
        timer.daemon = True
        try:
            timer.start()
            with suppress(BrokenPipeError):                          # it is gone, and says why below
                yield process
                process.stdin.close()
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            with suppress(OSError):
                process.stdin.close()
        log.seek(0)
        if late.is_set():
            raise FFmpegError(f"ffmpeg did not end within {limit:g} s")
        if process.returncode:
            raise FFmpegError(f"ffmpeg failed: {last_line(log.read(), process.returncode)}")


def last_line(stderr, code):
    """For a message: what ffmpeg said last, without "[out#0/mp4 @ 0x55..]"; if it said nothing, how it ended."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line not in ("", "Conversion failed!")]
    if lines:
        return re.sub(r"^(\[[^]]*\] *)+", "", lines[-1])
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def streams(path):
    """The first picture (no cover art) and the first sound of a file -> {"video": {...}, "audio": {...}}, either may be missing.

    Their fields are those of a framecrc header, such as codec_id, dimensions, sample_rate.  FFmpegError if ffmpeg can read neither.
    """
    header = run(*source(path), "-map", "0:V:0?", "-map", "0:a:0?", "-c", "copy", "-t", "0", "-f", "framecrc", "-")
    found = {}
    for name, index, value in re.findall(r"^#(\w+) (\d+): *(.+)$", header, re.MULTILINE):      # "#codec_id 0: h264"
        found.setdefault(index, {})[name] = value
    return {fields["media_type"]: fields for fields in found.values()}


def framecrc(path, *options, kind="V"):
    """What the framecrc muxer says of the first picture ("V") or sound ("a") -> seconds per tick (Fraction), a list of (dts, pts, duration) in ticks."""
    report = run(*source(path, kind), "-map", f"0:{kind}:0", *options, "-f", "framecrc", "-")
    tick = re.search(r"^#tb 0: (\S+)", report, re.MULTILINE)
    packets = [line.split(",")[1:4] for line in report.splitlines() if line[0] != "#"]         # stream, dts, pts, duration, size, checksum
    return Fraction(tick[1] if tick else 1), [tuple(map(int, packet)) for packet in packets]


def frame_rate(path):
    """Mean frames per second of the picture, from its decoding timestamps; of a single frame, from its duration; 0 if unknown.

    Timestamps are whole ticks, often milliseconds. A whole rate, or one of 1000/1001 of it, is taken if the ticks allow it.
    """
    tick, packets = framecrc(path, "-c", "copy")
    times = [dts for dts, *_ in packets]
    steps, ticks = (len(times) - 1, times[-1] - times[0]) if len(times) > 1 else (1, sum(duration for *_, duration in packets))
    if not ticks:
        return 0.0
    rate = steps / (ticks * tick)
    likely = [r for r in (Fraction(round(rate)), round(rate) * Fraction(1000, 1001)) if abs(r * ticks * tick - steps) <= r * tick]
    return float(min(likely or [rate], key=lambda r: r != rate))                               # one that fits exactly, else the whole one


@dataclass(frozen=True)
class Media:
    """What a file holds; the picture fields are 0 or None without a picture, the sound fields without sound."""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    frames: int = 0               # decoded, not what the header claims; 0 if not counted
    video_codec: str | None = None
    audio_codec: str | None = None
    audio_layout: str | None = None      # "mono", "stereo", "5.1", ...
    audio_duration: float = 0.0   # seconds, decoded; 0 if not counted

    @property
    def has_audio(self):
        return self.audio_codec is not None


def probe(path, count=True):
    """What ffmpeg finds in a file -> Media.  count=False decodes nothing; otherwise everything is decoded once.

    raises  ValueError if the file is missing or holds neither picture nor sound
    """
    if not os.path.isfile(path):
        raise ValueError(f"file not found: {path}")
    try:
        found = streams(path)
    except FFmpegError as error:
        raise ValueError(f"{path} holds no video or sound that can be read ({error})") from None
    video, audio, width, height, fps, frames, seconds = found.get("video"), found.get("audio"), 0, 0, 0.0, 0, 0.0
    if video:
        (width, height), fps = map(int, video["dimensions"].split("x")), frame_rate(path)
        frames = decoded(path, "V", "frame") if count else 0
    if audio and count:
        seconds = decoded(path, "a", "out_time_us") / 1e6
    codecs = video and video["codec_id"], audio and audio["codec_id"]
    return Media(width, height, fps, frames, *codecs, audio and audio.get("channel_layout_name"), seconds)


def clock(path):
    """The filter that gives a sound its times."""
    try:
        tick = streams(path).get("audio", {}).get("tb")
    except FFmpegError:      # decoding will say what is wrong
        return CLOCK
    return CLOCK if tick not in UNTIMED else counted(path) if tick == UNTIMED[0] else COUNTED


def counted(path):
    """The clock of raw mp3: samples counted, with silence in the place of lost frames."""
    from media.mp3 import holes, tagged                              # here: importing `sample` does not need it
    (found, samples), jumps, gone = holes(path), "", 0
    if found:
        tick, packets = framecrc(path, "-c", "copy", kind="a")
        rate, room = int(streams(path)["audio"]["sample_rate"]), sum(frames for _, frames in found)
        skipped = round(-min(0, packets[0][1]) * tick * rate)        # of the first frame, as its encoder says
        heard = decoded(path, "a", "out_time_us", COUNTED) / 1e6
        seconds = tagged(path)                                       # damaged frames may have been decoded, or whole ones not
        lost = (seconds - heard) * rate / samples if seconds else room
        for before, frames in found:
            silent = max(0, round(lost * frames / room)) * samples
            jumps += f"+{silent}*gte(N,{before - gone - skipped})"
            gone += silent
    return COUNTED if not jumps else f"asetpts='(N{jumps})/SR/TB',aresample=async=1:min_hard_comp=0.02:first_pts=0"


def decoded(path, kind, field, times=None):
    """Decode the first picture ("V") or sound ("a") to nowhere -> the last value of one field of ffmpeg's -progress report."""
    how = ["-fps_mode", "passthrough"] if kind == "V" else ["-af", times or clock(path)]
    report = run(*source(path, kind), "-map", f"0:{kind}:0", *how, "-f", "null", "-progress", "pipe:1", "-nostats", "-")
    values = re.findall(rf"^{field}=(\d+)", report, re.MULTILINE)
    return int(values[-1]) if values else 0
