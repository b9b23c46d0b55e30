"""Video files out: finished clips with the original sound. Through the ffmpeg program that imageio-ffmpeg brings.

Axes    P frames   H W height and width in pixels; clips are (3, P, H, W) float in [-1, 1], sizes (height, width)
Source  Wan-Video/Wan2.2@42bf4cf wan/utils/utils.py (save_video, merge_video_audio)
Unlike the official code, which catches every error here, whatever goes wrong is raised as a one-line ValueError or OSError.
"""
import itertools
import math
import os
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from media.ffmpeg import REMEDY, FFmpegError, ffmpeg_command, framecrc, last_line, probe, run, source
from media.sound import Recording, cut, examine

SUFFIXES = (".mp4", ".mov")
MONO_STEREO = ("mono", "stereo")      # 7.1 AAC plays almost nowhere
QUALITY = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "10"]      # the official quality=8, but 1.2x the size in half the time
# Tagged BT.709, so that players show the colours that went in; untagged files (the official ones) are guessed at by size.
TO_YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p," \
         "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
CONTAINER = ["-map_metadata", "-1", "-movflags", "+faststart", "-f", "mp4"]      # no names, places or dates from the sound file


# ---- sound

@dataclass(frozen=True)
class Sound:
    """A stretch of a sound file, and where it stands under the picture (all in seconds)."""
    path: str
    recording: Recording
    start: float         # first second used
    seconds: float       # length used
    delay: float         # silence before it
    as_is: bool          # the whole file, not shifted nor damaged, AAC of one or two channels: every player has that; mp4 may hold more

    @property
    def end(self):
        return self.delay + self.seconds


def open_sound(path, start=0.0, duration=None, shift=0.0):
    """The stretch of a file that will be heard.  shift > 0: that many seconds later than the picture; < 0: earlier, the beginning cut."""
    info = probe(path, count=False)
    if not info.has_audio:
        raise ValueError(f"{path} holds no sound")
    recording = examine(path)
    length, begin = recording.seconds, start + max(0.0, -shift)
    end = length if duration is None else min(length, start + duration)
    if end <= begin:
        raise ValueError(f"{path} is {length:.2f} s long, nothing is left of it from {begin:.2f} s on: choose an earlier start")
    whole = begin == 0 and shift <= 0 and end == length and recording.clean and recording.channel is None
    plays = info.audio_codec == "aac" and info.audio_layout in MONO_STEREO
    as_is = whole and plays and info.video_codec is None and _without_gaps(path)      # beside a picture, sound may not start at 0
    return Sound(path, recording, begin, end - begin, max(0.0, shift), as_is)


def _without_gaps(path):
    """Whether each packet of the sound begins where the one before ends, so that counting samples and reading timestamps is the same."""
    tick, packets = framecrc(path, "-c", "copy", kind="a")
    return all(abs(later[1] - earlier[1] - earlier[2]) * tick < 0.002 for earlier, later in zip(packets, packets[1:]))


def add_sound(video, sound, seconds, target):
    """Write `target`: the picture of `video` (copied), `seconds` long, and `sound`: copied if nothing has to be cut, otherwise as AAC of the
    samples that the model hears."""
    if sound.as_is and sound.end < seconds + 1e-3:
        run("-y", "-i", video, *source(sound.path), "-map", "0:v:0", "-map", "1:a:0", "-c", "copy", *CONTAINER, target)
        return
    channels = 1 if sound.recording.channel is not None else sound.recording.channels
    samples = ["-f", "f32le", "-ar", str(sound.recording.rate), "-ac", str(channels), "-i", "pipe:0"]
    codec = ["-c:v", "copy", "-c:a", "aac", "-b:a", "192k", "-af", f"adelay={1000 * sound.delay:.3f}:all=1,aformat=channel_layouts={'|'.join(MONO_STEREO)}"]
    command = ffmpeg_command("-v", "error", "-y", "-i", str(video), *samples, "-map", "0:v:0", "-map", "1:a:0", *codec, *CONTAINER, str(target))
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True) as encoder:
            try:
                for part in cut(sound.path, sound.recording, sound.start, min(sound.seconds, seconds - sound.delay)):
                    encoder.stdin.write(np.ascontiguousarray(part, "<f4"))
            except BrokenPipeError:      # the encoder says why
                pass
            except BaseException:
                encoder.kill()
                raise
        log.seek(0)
        if encoder.returncode:
            raise FFmpegError(f"ffmpeg failed: {last_line(log.read(), encoder.returncode)}")


# ---- out

def is_folder(path):
    return str(path).endswith(("/", os.sep)) or os.path.isdir(path)


def check_output(path, need=2**24):
    """ValueError unless a video (or, for a folder, PNG frames) of about `need` bytes can be written. Call it before loading anything."""
    full = os.path.abspath(path)
    parent, folder = os.path.dirname(full), is_folder(path)
    if folder and os.path.isdir(full) and os.listdir(full):
        raise ValueError(f"{path} is a folder that is not empty: name a file, such as {os.path.join(path, 'out.mp4')}, "
                         "or an empty folder for PNG frames")
    if not folder and os.path.splitext(full)[1].lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: wanted a name that ends in {' or '.join(SUFFIXES)}, or in / for a folder of PNG frames")
    while not os.path.lexists(parent):      # missing folders are made when the first frame comes
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ValueError(f"cannot write {path}: {parent} is a file, not a folder: choose another name")
    trial = _temporary(os.path.join(parent, "x"))
    try:
        with open(trial, "xb") as file:      # really tried: permission bits do not tell of read-only or full disks
            file.write(bytes(2**16))
    except OSError as error:
        raise ValueError(f"cannot write into {parent} ({error.strerror}): choose another folder") from None
    finally:
        _remove(trial)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise ValueError(f"cannot write {path}: wanted about {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free: "
                         "make room or choose another disk")
    if not folder:
        _check_encoder()


def _check_encoder():
    try:
        run("-f", "lavfi", "-i", "color=size=16x16", "-frames:v", "1", *QUALITY, "-f", "null", "-")
    except FFmpegError as error:
        raise ValueError(f"no H.264 encoder (libx264) that works: {error}; {REMEDY}") from None
    except OSError as error:
        raise ValueError(error) from None


def _temporary(path, suffix=""):
    return os.path.join(os.path.dirname(path), f".unfinished-{secrets.token_hex(4)}{suffix}")


def _remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


class VideoWriter:
    """Writes clips as they are made: H.264 yuv420p at the true frame rate, with the original sound, ending at the shorter of the two.

        with VideoWriter("out.mp4", (height, width), fps=16, audio="a.wav") as out:
            for clip in clips:
                out.write(clip)          # (3, P, H, W) in [-1, 1], any P
        print(out.summary)

    path       .mp4 or .mov; a folder ("frames/", new or empty) takes every frame as 000000.png ... instead, and needs no ffmpeg
    start, duration  seconds of the sound file to use        av_offset  frames by which the sound comes later (< 0: earlier)
    Everything is written under a temporary name beside `path` and renamed at the end. If the block is left by an exception (Ctrl-C too)
    nothing stays behind, unless finish_partial() was called: it keeps what was written so far as out.partial.mp4.
    A killed process leaves .unfinished-*.mp4, which is playable: the encoder ends the file when the pipe closes.
    raises     ValueError for wrong input, OSError when writing fails; both one line
    """

    def __init__(self, path, size, fps=16, audio=None, start=0.0, duration=None, av_offset=0):
        check_output(path)
        if not is_folder(path) and (size[0] % 2 or size[1] % 2):
            raise ValueError(f"H.264 (yuv420p) wants an even width and height, got {size[1]}x{size[0]}: write PNG frames instead")
        self.path, self.size, self.fps, self.as_frames = os.path.abspath(path), tuple(size), fps, is_folder(path)
        self.sound = None if audio is None or self.as_frames else open_sound(audio, start, duration, shift=av_offset / fps)
        self.limit = math.ceil(self.sound.end * fps - 1e-6) if self.sound else math.inf      # the last frame begins before the sound ends
        self.temp = _temporary(self.path, "" if self.as_frames else ".mp4")
        self.frames = self.dropped = 0      # written, and left out because the sound had ended
        self.encoder = self.log = None
        self.done, self.summary = False, ""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, clip):
        """Add a clip (3, P, H, W) in [-1, 1]. Values are truncated to 8 bits, not rounded, as the official save_video does."""
        if clip.ndim != 4 or clip.shape[0] != 3 or tuple(clip.shape[2:]) != self.size:
            raise ValueError(f"VideoWriter.write takes frames (3, P, {self.size[0]}, {self.size[1]}), got {tuple(clip.shape)}")
        if not self.frames:
            self._start()
        for frame in clip.unbind(1):                                                 # (3, H, W)
            if self.frames >= self.limit:
                self.dropped += 1
                continue
            if not torch.isfinite(frame).all():
                raise ValueError(f"frame {self.frames} holds NaN or infinite values: nothing sensible can be written")
            frame = ((frame.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
            self._put(frame.permute(1, 2, 0).contiguous().cpu().numpy())             # (H, W, 3)
            self.frames += 1

    def close(self):
        """Finish the file, add the sound, give it its name."""
        if not self.done:
            if not self.frames:
                self.abort()
                raise ValueError(f"no frames were made, {self.path} is not written")
            self._finish(self.path)

    def finish_partial(self):
        """End early and keep the frames written so far, with their sound, as a valid file out.partial.mp4 (or folder) -> its path.
        None if there are no frames to keep."""
        if self.done or not self.frames:
            self.abort()
            return None
        target = self._partial_name()
        self._finish(target)
        return target

    def abort(self):
        """Stop and leave nothing behind. Harmless after close() or finish_partial()."""
        self.done = True
        if self.encoder is not None:
            self.encoder.kill()
            self._wait()
            self.log.close()
        _remove(self.temp)

    def _start(self):
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if self.as_frames:
            os.makedirs(self.temp, exist_ok=True)
        elif self.encoder is None:
            frames = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{self.size[1]}x{self.size[0]}", "-framerate", str(self.fps)]
            command = ffmpeg_command("-v", "error", *frames, "-i", "pipe:0", "-vf", TO_YUV, *QUALITY, *CONTAINER, self.temp)
            self.log = tempfile.TemporaryFile()
            self.encoder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.log,
                                            start_new_session=True)      # Ctrl-C is ours to handle

    def _put(self, frame):
        if self.as_frames:
            try:
                Image.fromarray(frame).save(os.path.join(self.temp, f"{self.frames:06d}.png"))
            except OSError as error:
                self.abort()
                raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None
            return
        try:
            self.encoder.stdin.write(frame)
        except OSError:      # the encoder is gone
            self._failed()

    def _wait(self):
        """Close the pipe and wait for the encoder -> its exit status."""
        try:
            self.encoder.stdin.close()
        except OSError:      # frames still in the pipe of a dead encoder
            pass
        return self.encoder.wait()

    def _failed(self):
        code = self._wait()
        self.log.seek(0)
        reason = last_line(self.log.read(), code)
        self.abort()
        raise OSError(f"cannot write {self.path}: the video encoder stopped ({reason})")

    def _partial_name(self):
        stem, suffix = os.path.splitext(self.path)
        names = (f"{stem}.partial{n or ''}{suffix}" for n in itertools.count())
        return next(name for name in names if not os.path.lexists(name))      # an earlier one may be all that someone has

    def _finish(self, target):
        seconds, muxed = self.frames / self.fps, _temporary(self.path, ".mp4")
        try:
            if self.encoder is not None and self._wait():
                self._failed()
            try:
                if self.as_frames and os.path.isdir(target):
                    os.rmdir(target)      # empty, see check_output
                elif self.sound and self.sound.delay < seconds:
                    add_sound(self.temp, self.sound, seconds, muxed)
                    os.replace(muxed, self.temp)
                os.replace(self.temp, target)
            except (OSError, ValueError) as error:      # the picture is finished: hours of work are not thrown away for its sound or its name
                kept = self._partial_name()
                os.replace(self.temp, kept)
                raise OSError(f"cannot finish {target} ({error}); the finished picture is kept as {kept}") from None
        finally:
            _remove(muxed)
            self.abort()
        self._summarise(target, seconds)

    def _summarise(self, target, seconds):
        self.summary = f"{target}: {self.frames} frames of {self.size[1]}x{self.size[0]}, {seconds:.3f} s at {self.fps:g} fps"
        if self.dropped:
            self.summary += f"; {self.dropped} frames after the end of the sound left out"
        if self.sound and self.sound.end - seconds > 1 / self.fps:
            self.summary += f"; the last {self.sound.end - seconds:.3f} s of the sound have no picture and were cut"
