"""Video out while it is made: a fragmented mp4 that a player can open meanwhile, in a file or a pipe; or raw frames. And 16 kHz sound in.

A fragmented mp4 has no index at its end: each fragment of half a second says what it holds, so what is written so far always plays. A file is
written under another name, out.partial.mp4, and takes its own when it is finished: one that was there before stays until then.
Axes    P frames   H W height and width in pixels
"""
import itertools
import os
import queue
import subprocess
import sys
import tempfile
import threading

import numpy as np
import torch

from media.ffmpeg import ffmpeg_command, last_line
from media.sound import RATE
from media.video import MONO_STEREO, QUALITY, TO_YUV

# delay_moov: the header waits for the first fragment, so that it can say that the encoder's first 64 ms of sound come before the picture
LIVE = ["-tune", "zerolatency", "-g", "48"]                          # no frame waits for later ones
KNOWN = ["-probesize", "32", "-analyzeduration", "0"]                # of inputs: read nothing ahead to find out what is said already
FRAGMENTS = ["-movflags", "+delay_moov+default_base_moof", "-frag_duration", "400000", "-flush_packets", "1", "-map_metadata", "-1", "-f", "mp4"]


def meanwhile(path):
    """The name under which a file is written until it is finished: that of no file there is. A pipe or device stays what it is."""
    if isinstance(path, int) or os.path.exists(path) and not os.path.isfile(path):
        return path
    stem, suffix = os.path.splitext(path)
    return next(name for n in itertools.count() if not os.path.lexists(name := f"{stem}.partial{n or ''}{suffix}"))


class StreamWriter:
    """Frames and the sound under them, written as they come.

        with StreamWriter("out.mp4", (height, width), fps=25, rate=16000) as out:
            out.write(frames, samples)       # (3, P, H, W) in [-1, 1], (n, channels) float32; either may be empty

    path      a file, or a file descriptor; .file is what is written meanwhile          rate, channels  of the sound; rate 0: no sound
    raw       rgb24 frames one behind the other, no sound, no ffmpeg
    An exception leaves what was written so far, which is whole, as .file. Nothing is written before the first frame comes.
    raises    OSError if the reader has gone or writing fails, one line
    """

    def __init__(self, path, size, fps, rate=0, channels=1, raw=False):
        self.path, self.size, self.fps, self.rate, self.channels, self.raw = path, tuple(size), fps, 0 if raw else rate, channels, raw
        self.frames, self.out, self.encoder, self.log, self.file = 0, None, None, None, meanwhile(path)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close(quiet=kind is not None)
        if kind is None and self.frames and self.file != self.path:
            os.replace(self.file, self.path)

    def write(self, frames, samples=None):
        if tuple(frames.shape[2:]) != self.size:
            raise ValueError(f"StreamWriter.write takes frames (3, P, {self.size[0]}, {self.size[1]}), got {tuple(frames.shape)}")
        if not torch.isfinite(frames.sum(dtype=torch.float32)):      # a fifth of the time of a look at each
            raise ValueError(f"frames {self.frames} to {self.frames + frames.shape[1] - 1} hold NaN or infinite values: "
                             "nothing sensible can be written")
        pixels = frames.float().clamp(-1, 1).add_(1).div_(2).mul_(255).to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()    # (P, H, W, 3)
        if self.out is None:
            self._start()
        if self.rate and samples is not None and len(samples):
            self.sound.put(np.ascontiguousarray(samples, "<f4").tobytes())
        try:
            self.out.write(memoryview(pixels).cast("B"))
            self.out.flush()
        except OSError:
            self._failed()
        self.frames += len(pixels)

    def close(self, quiet=False):
        """End the file.  quiet: another error is on its way"""
        if self.out is None:
            return
        out, self.out = self.out, None
        if self.rate:
            self.sound.put(None)
        try:
            out.close()
        except OSError:
            pass
        if self.encoder is None:
            return
        code = self.encoder.wait()
        self.log.seek(0)
        reason = last_line(self.log.read(), code) if code else ""
        self.log.close()
        if code and not quiet:
            raise OSError(f"cannot write {self.named}: the video encoder stopped ({reason})")

    @property
    def named(self):
        return "to the pipe" if isinstance(self.path, int) else self.path

    def _start(self):
        piped = isinstance(self.path, int)
        if self.raw:
            self.out = open(self.file, "wb", closefd=not piped)
            return
        inputs = [*KNOWN, "-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{self.size[1]}x{self.size[0]}", "-framerate", str(self.fps),
                  "-thread_queue_size", "64", "-i", "pipe:0"]
        passed, codec = (), ["-map", "0:v:0"]
        if self.rate:
            reader, writer = os.pipe()
            inputs += [*KNOWN, "-f", "f32le", "-ar", str(self.rate), "-ac", str(self.channels), "-thread_queue_size", "64", "-i", f"pipe:{reader}"]
            sound = ["-c:a", "aac", "-b:a", "192k", "-af", f"aformat=channel_layouts={'|'.join(MONO_STEREO)}"]
            passed, codec = (reader,), [*codec, "-map", "1:a:0", *sound]
        self.log = tempfile.TemporaryFile()
        target = "pipe:1" if piped else f"file:{self.file}"
        command = ffmpeg_command("-v", "error", "-y", *inputs, *codec, "-vf", TO_YUV, *QUALITY, *LIVE, *FRAGMENTS, target)
        self.encoder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.path if piped else subprocess.DEVNULL, stderr=self.log,
                                        pass_fds=passed, start_new_session=True)                     # Ctrl-C is ours to handle
        self.out = self.encoder.stdin
        if self.rate:
            os.close(reader)
            self.sound = queue.Queue()                               # a thread, as ffmpeg reads picture and sound when it likes
            threading.Thread(target=feed, args=(self.sound, writer), daemon=True).start()

    def _failed(self):
        try:
            self.close()
        except OSError as error:
            raise error from None
        raise OSError(f"cannot write {self.named}: the reader has gone")


def feed(parts, fd):
    """Write bytes from a queue to a pipe until None comes or the reader has gone."""
    with open(fd, "wb", buffering=0) as pipe:
        try:
            while (part := parts.get()) is not None:
                view = memoryview(part)
                while view:
                    view = view[pipe.write(view):]
        except OSError:
            pass                                                     # whoever writes the frames says so


def pcm(file, samples):
    """Up to so many samples of 16-bit 16 kHz mono sound from a pipe -> (n,) float32; waits for them; fewer at the end."""
    data = bytearray()
    while len(data) < 2 * samples and (piece := file.read(2 * samples - len(data))):
        data += piece
    return torch.from_numpy(np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / 32768)
