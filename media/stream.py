"""Video out while it is made: a fragmented mp4 that a player can open meanwhile, in a file or a pipe; or raw frames. And 16 kHz sound in.

A fragmented mp4 has no index at its end: each fragment of half a second says what it holds, so what is written so far always plays. A file is
written under another name, out.partial.mp4, and takes its own when it is finished: one that was there before stays until then.
Axes    P frames   H W height and width in pixels
"""
import os
import queue
import subprocess
import tempfile
import threading
import time

import numpy as np
import torch

from media import mp3
from media.ffmpeg import ffmpeg_command, last_line
from media.video import MONO_STEREO, QUALITY, TO_YUV, new_partial

# delay_moov: the header waits for the first fragment, so that it can say that the encoder's first 64 ms of sound come before the picture
LIVE = ["-tune", "zerolatency", "-g", "48"]                          # no frame waits for later ones
WAITING = 24                 # frames: ffmpeg takes none while its sound is 0.1 to 0.3 s behind them, and that comes with later frames
PATIENCE = 2                 # seconds for those that wait, after an error, and for the encoder
KNOWN = ["-probesize", "32", "-analyzeduration", "0"]                # of inputs: read nothing ahead to find out what is said already
FRAGMENTS = ["-movflags", "+delay_moov+default_base_moof", "-frag_duration", "400000", "-flush_packets", "1", "-map_metadata", "-1", "-f", "mp4"]


def meanwhile(path):
    """Make the file that is written until it is finished -> its name. A pipe or device stays what it is."""
    return path if isinstance(path, int) or os.path.exists(path) and not os.path.isfile(path) else new_partial(path)


class StreamWriter:
    """Frames and the sound under them, written as they come.

        with StreamWriter("out.mp4", (height, width), fps=25, rate=16000) as out:
            out.write(frames, samples)       # (3, P, H, W) in [-1, 1], (n, channels) float32; either may be empty

    path      a file, or a file descriptor          rate, channels  of the sound; rate 0: no sound
    file      what is written meanwhile, None before the first frame comes and where nothing could be written
    raw       rgb24 frames one behind the other, no sound, no ffmpeg
    waiting   frames that wait for ffmpeg, at most: WAITING, and as many as their sound is given later than they
    waited    seconds in all in which `write` waited for who takes them: the reader, the disk or the encoder
    An exception leaves what was written so far, which is whole, as .file.
    raises    OSError if the reader has gone or writing fails, one line
    """

    def __init__(self, path, size, fps, rate=0, channels=1, raw=False, waiting=WAITING):
        self.path, self.size, self.fps, self.rate, self.channels = path, tuple(size), fps, 0 if raw else rate, channels
        self.raw, self.waiting, self.waited = raw, waiting, 0.0
        self.frames, self.pictures, self.sound, self.encoder, self.file = 0, None, None, None, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.close(quiet=kind is not None)
        finally:
            if self.file not in (None, self.path) and os.path.exists(self.file) and not os.path.getsize(self.file):
                os.remove(self.file)                                 # of a disk that was full from the first
                self.file = None
        if kind is None and self.frames and self.file != self.path:
            try:
                os.replace(self.file, self.path)
            except OSError as error:
                raise OSError(f"cannot write {self.path}: {error.strerror}") from None

    def write(self, frames, samples=None):
        if tuple(frames.shape[2:]) != self.size:
            raise ValueError(f"StreamWriter.write takes frames (3, P, {self.size[0]}, {self.size[1]}), got {tuple(frames.shape)}")
        if not torch.isfinite(frames.sum(dtype=torch.float32)):      # a fifth of the time of a look at each
            raise ValueError(f"frames {self.frames} to {self.frames + frames.shape[1] - 1} hold NaN or infinite values: "
                             "nothing sensible can be written")
        pixels = frames.float().clamp(-1, 1).add_(1).div_(2).mul_(255).to(torch.uint8)
        pixels = pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()                       # (P, H, W, 3)
        if self.pictures is None:
            self._start()
        if self.sound and samples is not None and len(samples):
            self.sound.put(np.ascontiguousarray(samples, "<f4").tobytes())
        begin = time.perf_counter()
        for frame in pixels:
            self.pictures.put(memoryview(frame).cast("B"))
        self.waited += time.perf_counter() - begin
        if self.pictures.error:
            self.close()
        self.frames += len(pixels)

    def close(self, quiet=False):
        """End the file.  quiet: another error is on its way, and a reader that stalls is not waited for"""
        if self.pictures is None:
            return
        pictures, self.pictures = self.pictures, None
        if self.sound:
            self.sound.close(0)
        patience = PATIENCE if quiet else None
        pictures.close(patience)
        reason = "the reader has gone" if isinstance(pictures.error, BrokenPipeError) else pictures.error and pictures.error.strerror
        if self.encoder:
            try:
                code = self.encoder.wait(patience)
            except subprocess.TimeoutExpired:
                self.encoder.kill()
                code = self.encoder.wait()
            self.log.seek(0)
            said = last_line(self.log.read(), code) if code else ""
            gone = isinstance(self.path, int) and "Broken pipe" in said
            reason = "the reader has gone" if gone else f"the video encoder stopped ({said})" if code else reason
            self.log.close()
        if reason and not quiet:
            reason += ": make room or choose another disk" * ("No space left" in reason)
            raise OSError(f"cannot write {self.named}: {reason}")

    @property
    def named(self):
        return "to the pipe" if isinstance(self.path, int) else self.path

    def _start(self):
        piped, self.file = isinstance(self.path, int), meanwhile(self.path)
        if self.raw:
            file = os.dup(self.file) if piped else self.file         # a thread may outlive the caller's
            self.pictures = Pipe(open(file, "wb", buffering=0), self.waiting)
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
        self.encoder = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=self.path if piped else subprocess.DEVNULL, stderr=self.log,
                                        pass_fds=passed, start_new_session=True)                     # Ctrl-C is ours to handle
        self.pictures = Pipe(self.encoder.stdin, self.waiting)
        if self.rate:
            os.close(reader)
            self.sound = Pipe(open(writer, "wb", buffering=0))


class Pipe:
    """Bytes on their way into an unbuffered file, in a thread: who writes waits only if `most` parts wait already. Once writing fails, with .error,
    parts are dropped."""

    def __init__(self, file, most=0):
        self.parts, self.error = queue.Queue(most), None
        self.thread = threading.Thread(target=self.feed, args=(file,), daemon=True)
        self.put = self.parts.put
        self.thread.start()

    def feed(self, file):
        with file:
            while (part := self.parts.get()) is not None:
                try:
                    while part and not self.error:
                        part = part[file.write(part):]
                except OSError as error:
                    self.error = error

    def close(self, seconds=None):
        """Wait until all is written, or dropped.  seconds  that it may take: what waits then is dropped, and the thread ends with the reader"""
        try:
            self.parts.put(None, timeout=seconds)
        except queue.Full:
            with self.parts.mutex:
                self.parts.queue.clear()
            self.parts.put(None)
        self.thread.join(seconds)


def pcm(file, samples):
    """Up to so many samples of 16-bit 16 kHz mono sound from a pipe -> (n,) float32; waits for them; fewer at the end."""
    data = bytearray()
    while len(data) < 2 * samples and (piece := file.read(2 * samples - len(data))):
        data += piece
    return torch.from_numpy(np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / 32768)


BEGINS = dict(wav=b"RIFF", aiff=b"FORM", flac=b"fLaC", ogg=b"OggS", mp3=b"ID3", webm=b"\x1aE\xdf\xa3")


def named_format(samples):
    """The name of the file format that what came from a pipe begins with, or None. Of mp3 and aac without a header two frames must fit together."""
    data = (samples[:8192] * 32768).to(torch.int16).numpy().tobytes()
    if name := "m4a" if data[4:8] == b"ftyp" else next((name for name, begins in BEGINS.items() if data.startswith(begins)), None):
        return name
    for name, length in (("mp3", lambda at: mp3.frame(data, at)[0]), ("aac", lambda at: mp3.adts_frame(data, at))):
        if (n := length(0)) and length(n):
            return name
    return None
