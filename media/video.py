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
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from jobs.parts import Parts, digest, flush, made_from, safely
from media.frames import read_frames
from media.ffmpeg import LIMIT, REMEDY, FFmpegError, feeding, ffmpeg_command, framecrc, probe, run, source
from media.sound import Recording, cut, examine, warn

SUFFIXES = (".mp4", ".mov")
LOUD = 4.0           # peaks of floats from here on are no loud music but another scale; at 1e7 the AAC encoder never ends
MONO_STEREO = ("mono", "stereo")      # 7.1 AAC plays almost nowhere
QUALITY = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "10"]      # the official quality=8, but 1.2x the size in half the time
PIXEL = 0.3          # bytes that a pixel takes so: the drawn faces 0.07, films 0.1 to 0.2 (white noise 0.9)
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
    scale: float         # of its samples: what they are divided by
    as_is: bool          # the whole file, not shifted nor damaged, AAC of one or two channels: every player has that; mp4 may hold more

    @property
    def end(self):
        return self.delay + self.seconds


def full_scale(path, recording):
    """What the samples of a file are divided by before they are written: 1, or its peak where that is of another scale, which is said."""
    if recording.peak <= LOUD:
        return 1.0
    warn(f"{path} has samples up to {recording.peak:.3g}, where 1 is full scale: its sound is written {recording.peak:.3g} times quieter")
    return recording.peak


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
    return Sound(path, recording, begin, end - begin, max(0.0, shift), full_scale(path, recording), as_is)


def _without_gaps(path):
    """Whether each packet of the sound begins where the one before ends, so that counting samples and reading timestamps is the same."""
    tick, packets = framecrc(path, "-c", "copy", kind="a")
    return all(abs(later[1] - earlier[1] - earlier[2]) * tick < 0.002 for earlier, later in zip(packets, packets[1:]))


def mux(folder, files, fps, sound, seconds, target, limit=LIMIT):
    """Write `target`: the pictures of `files`, one after the other and copied, `seconds` long in all, and a Sound, or None: copied if nothing has to
    be cut, otherwise as AAC of the samples that the model hears.  folder: of `files` and `target`, which are names in it"""
    (folder / "list.txt").write_text("".join(f"file '{name}'\n" for name in files))
    picture, samples, out = ["-f", "concat", "-auto_convert", "0", "-i", "list.txt"], [], ["-map", "0:v:0", "-c:v", "copy"]
    if len(files) > 1:      # frames come two before they are shown; a file of one frame knows of no such delay
        out += ["-bsf:v", f"setts=pts=PTS:dts=round((N-2)/({fps}*TB))"]
    if sound and sound.as_is and sound.end < seconds + 1e-3:
        picture, out = [*picture, *source(sound.path)], [*out, "-map", "1:a:0", "-c:a", "copy"]
    elif sound and sound.delay < seconds:
        channels = 1 if sound.recording.channel is not None else sound.recording.channels
        picture = [*picture, "-f", "f32le", "-ar", str(sound.recording.rate), "-ac", str(channels), "-i", "pipe:0"]
        out += ["-map", "1:a:0", "-c:a", "aac", "-b:a", "192k",
                "-af", f"adelay={1000 * sound.delay:.3f}:all=1,aformat=channel_layouts={'|'.join(MONO_STEREO)}"]
        samples = cut(sound.path, sound.recording, sound.start, min(sound.seconds, seconds - sound.delay))
    with feeding(*picture, *out, *CONTAINER, target, folder=folder, limit=limit) as encoder:
        for part in samples:
            encoder.stdin.write(np.ascontiguousarray(part / sound.scale, "<f4"))


# ---- out

def open_writer(path, plan, av_offset=0, checkpoint=None, **how):
    """A VideoWriter for what a plan will make, with the sound if there is any.

    checkpoint  that makes it: then what is finished stays when the run ends early, and the same again goes on        how  as in jobs.parts.Parts
    """
    o, size, parts = plan.config, (plan.height, plan.width), None
    if o.audio and abs(av_offset) >= plan.frames:
        raise ValueError(f"wanted av_offset within the {plan.frames} frames of the video, got {av_offset}: no sound would be left")
    need = 2**24 + bytes_needed(size, plan.frames, is_folder(path))
    if checkpoint is not None:
        made = made_from(plan, checkpoint) | dict(av_offset=av_offset, encoder=encoder(path))
        parts = Parts(os.path.abspath(path), made, plan.clips, **how)
        need += 2 * state_bytes(plan)
    return VideoWriter(path, size, plan.fps, o.audio, o.start, o.duration, av_offset, parts, need)


def state_bytes(plan):
    """Of what is saved for the next clip and in the middle of one, see `make_clips` in wan_s2v.py and sampling.Euler.state."""
    latent = 4 * plan.denoiser.out_dim * math.prod(plan.latent_shape[1:])
    past = 12 * plan.height * plan.width * max(0, 73 - plan.config.clip_frames) if plan.sound is not None else 0
    guesses = plan.config.speed.saved if plan.config.speed else 0    # see fast/caching.py
    return ((4 + guesses) * plan.latent_shape[0] + 19) * latent + past


def encoder(path):
    """What makes the parts of an output, in a word: parts of two programs must not be joined without encoding."""
    return "png" if is_folder(path) else f"ffmpeg of {os.path.getsize(ffmpeg_command()[-2])} bytes"


def is_folder(path):
    return str(path).endswith(("/", os.sep)) or os.path.isdir(path)


def check_not_read(path, inputs):
    """ValueError if a file that is to be written is among those that are read: paths, numbers of open files, others that are passed over."""
    for given in inputs:
        if isinstance(given, (str, os.PathLike, int)) and os.path.exists(path) and os.path.exists(given) and os.path.samefile(path, given):
            raise ValueError(f"cannot write {'to standard output' if path == 1 else path}: it is {given or 'standard input'}, which is read meanwhile: "
                             "choose another name")


def check_output(path, need=2**24, inputs=(), raw=False):
    """ValueError unless a video (or, for a folder, PNG frames; or raw ones, under any name) of about `need` bytes can be written, in the place of none
    of the inputs. Call it before loading anything."""
    check_not_read(path, inputs)
    full = os.path.abspath(path)
    if raw and os.path.exists(full) and not os.path.isfile(full):
        return                                                       # a named pipe, a device
    parent, folder = os.path.dirname(full), is_folder(path)
    if folder and os.path.isdir(full) and os.listdir(full) and not is_finished(full):
        raise ValueError(f"{path} is a folder that is not empty: name a file, such as {os.path.join(path, 'out.mp4')}, "
                         "or an empty folder for PNG frames")
    if not folder and not raw and os.path.splitext(full)[1].lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: wanted a name that ends in {' or '.join(SUFFIXES)}, or in / for a folder of PNG frames")
    while not os.path.lexists(parent):      # missing folders are made before the first frame comes
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ValueError(f"cannot write {path}: {parent} is a file, not a folder: choose another name")
    longest, length = os.pathconf(parent, "PC_NAME_MAX") - len(".partial9"), len(os.fsencode(os.path.basename(full)))
    if length > longest:
        raise ValueError(f"cannot write {path}: a name of at most {longest} bytes is wanted, this has {length}: choose a shorter one")
    try_to_write(parent, "choose another folder")
    try_to_write(temporary_folder(), "set TMPDIR to another folder")
    free = shutil.disk_usage(parent).free
    if free < need:
        raise ValueError(f"cannot write {path}: wanted about {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free: "
                         "make room or choose another disk")
    if not folder and not raw:
        _check_encoder()


def is_finished(folder):
    """Whether its PNG frames are all there, and only what the run had beside them is left over."""
    return os.path.isfile(f"{folder}.parts/manifest.json") and not os.path.isdir(f"{folder}.parts/frames")


def temporary_folder():
    wanted = os.environ.get("TMPDIR")
    try:
        return wanted or tempfile.gettempdir()
    except OSError as error:
        raise ValueError(f"{error.strerror or error}: set TMPDIR to a folder with room") from None


def try_to_write(folder, remedy):
    """Really tried: permission bits do not tell of read-only or full disks."""
    trial = os.path.join(folder, f".unfinished-{secrets.token_hex(4)}")
    try:
        with open(trial, "xb") as file:
            file.write(bytes(2**16))
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror}): {remedy}") from None
    finally:
        with suppress(OSError):
            os.remove(trial)


def bytes_needed(size, frames, pictures=False):
    """Of the disk, at most, for frames (height, width): as PNG; else as parts, as what plays of them, and as the video."""
    return int(frames * size[0] * size[1] * (3.1 if pictures else 3 * PIXEL))


def _check_encoder():
    try:
        run("-f", "lavfi", "-i", "color=size=16x16", "-frames:v", "1", *QUALITY, "-f", "null", "-")
    except FFmpegError as error:
        raise ValueError(f"no H.264 encoder (libx264) that works: {error}; {REMEDY}") from None
    except OSError as error:
        raise ValueError(error) from None


def new_partial(path):
    """Make out.partial.mp4 for out.mp4, empty, or whichever such name no other file has -> the name"""
    stem, suffix = os.path.splitext(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    for n in itertools.count():
        try:
            os.close(os.open(name := f"{stem}.partial{n or ''}{suffix}", os.O_CREAT | os.O_EXCL, 0o666))
            return name
        except FileExistsError:                                      # of another run, which may have begun this moment
            pass


class VideoWriter:
    """Writes clips as they are made: H.264 yuv420p at the true frame rate, with the original sound, ending at the shorter of the two.

        with VideoWriter("out.mp4", (height, width), fps=16, audio="a.wav") as out:
            for clip in clips:
                out.write(clip)          # (3, P, H, W) in [-1, 1], any P
        print(out.summary)

    path       .mp4 or .mov; a folder ("frames/", new or empty) takes every frame as 000000.png ... instead, and needs no ffmpeg
    start, duration  seconds of the sound file to use        av_offset  frames by which the sound comes later (< 0: earlier)
    parts      where finished clips are (jobs/parts.py): after an exception they stay, and the same again goes on. None: nothing stays
    need       bytes of the disk that must be free
    Every clip is encoded alone and is safe when `write` returns. At the end they are joined, as they are, under a temporary name.
    raises     ValueError for wrong input, OSError when writing fails; both one line
    """

    def __init__(self, path, size, fps=16, audio=None, start=0.0, duration=None, av_offset=0, parts=None, need=2**24):
        check_output(path, need)
        if not is_folder(path) and (size[0] % 2 or size[1] % 2):
            raise ValueError(f"H.264 (yuv420p) wants an even width and height, got {size[1]}x{size[0]}: write PNG frames instead")
        self.path, self.size, self.fps, self.as_frames = os.path.abspath(path), tuple(size), fps, is_folder(path)
        self.muted = audio is not None and self.as_frames
        self.sound = None if audio is None or self.as_frames else open_sound(audio, start, duration, shift=av_offset / fps)
        self.limit = math.ceil(self.sound.end * fps - 1e-6) if self.sound else math.inf      # the last frame begins before the sound ends
        self.parts = parts or Parts(self.path)
        self.dropped, self.summary, self.kept = 0, "", ""      # frames left out because the sound had ended; what to say at the end
        self.playable, self.renew_after = 0, 0.0      # clips in out.partial.mp4, and when it may be made again

    def __enter__(self):
        self.parts.open()
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
        else:
            self.leave()

    def write(self, clip):
        """Add a clip (3, P, H, W) in [-1, 1]. Values are truncated to 8 bits, not rounded, as the official save_video does."""
        if clip.ndim != 4 or clip.shape[0] != 3 or tuple(clip.shape[2:]) != self.size:
            raise ValueError(f"VideoWriter.write takes frames (3, P, {self.size[0]}, {self.size[1]}), got {tuple(clip.shape)}")
        shown, path = int(min(clip.shape[1], max(0, self.limit - self.parts.frames))), None
        with self.parts.errors():
            if self.as_frames:
                self._write_pictures(clip[:, :shown])
            elif shown:
                path = self.parts.folder / f"{self.parts.done:04d}.mp4"
                with safely(path) as temporary:
                    self._encode(clip[:, :shown], temporary.name)
            self.parts.add(shown, path)
        self.dropped += clip.shape[1] - shown

    def _pictures(self, clip):
        """-> (H, W, 3) uint8 of each frame"""
        for n, frame in enumerate(clip.unbind(1), self.parts.frames):                # (3, H, W)
            if not torch.isfinite(frame).all():
                raise ValueError(f"frame {n} holds NaN or infinite values: nothing sensible can be written")
            frame = ((frame.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
            yield frame.permute(1, 2, 0).contiguous().cpu().numpy()

    def _encode(self, clip, name):
        frames = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{self.size[1]}x{self.size[0]}", "-framerate", str(self.fps)]
        with feeding(*frames, "-i", "pipe:0", "-vf", TO_YUV, *QUALITY, *CONTAINER, name, folder=self.parts.folder) as encoder:
            for frame in self._pictures(clip):
                encoder.stdin.write(frame)

    def _write_pictures(self, clip):
        folder = self.parts.folder / "frames"
        folder.mkdir(exist_ok=True)
        for n, frame in enumerate(self._pictures(clip), self.parts.frames):
            Image.fromarray(frame).save(folder / f"{n:06d}.png")
            flush(folder / f"{n:06d}.png")
        flush(folder)

    def _join(self, name, limit=LIMIT):
        """All clips so far with their sound -> path of a file in the parts folder."""
        path = self.parts.folder / name
        if self.sound and self.parts.made and digest(self.sound.path) != self.parts.made["audio"]:
            raise ValueError(f"{self.sound.path} was changed while the video was made: put it back as it was, then the same command goes on")
        with safely(path) as temporary:
            mux(self.parts.folder, [clip["file"] for clip in self.parts.clips if clip["file"]], self.fps, self.sound, self.parts.frames / self.fps,
                temporary.name, limit)
        return path

    def renew_partial(self, limit=LIMIT):
        """What is finished, as out.partial.mp4, to be watched: again after every clip, in at most a hundredth of the time."""
        begin = time.monotonic()
        if self.as_frames or not self.playable < self.parts.done < self.parts.total or begin < self.renew_after:
            return
        with self.parts.errors():
            made, name = self._join("partial.mp4", limit), self.parts.partial or os.path.basename(new_partial(self.path))
            os.replace(made, self.parts.output.with_name(name))
            self.parts.name_partial(name)
        self.playable, self.renew_after = self.parts.done, time.monotonic() + 99 * (time.monotonic() - begin)

    def close(self):
        """Join the clips, add the sound, give the file its name."""
        if not self.parts.frames:
            self.leave()
            raise ValueError(f"no frames were made, {self.path} is not written")
        replaced = os.path.lexists(self.path) and not self.as_frames
        try:
            if self.as_frames:
                self._take_pictures()
            else:
                os.replace(self._join("whole.mp4"), self.path)
            flush(self.parts.output.parent)
        except (OSError, ValueError) as error:      # hours of work are not thrown away for their sound or their name
            self.parts.close()
            raise OSError(f"cannot finish {self.path} ({error}); the finished clips are kept in {self.parts.folder}") from None
        except BaseException:
            self.leave()
            raise
        seconds = self.parts.frames / self.fps
        self.summary = f"{self.path}: {self.parts.frames} frames of {self.size[1]}x{self.size[0]}, {seconds:.3f} s at {self.fps:g} fps"
        if replaced:
            self.summary += "; it takes the place of an earlier file"
        if self.muted:
            self.summary += "; pictures alone, without the sound"
        if self.dropped:
            self.summary += f"; {self.dropped} frames after the end of the sound left out"
        if self.sound and self.sound.end - seconds > 1 / self.fps:
            self.summary += f"; the last {self.sound.end - seconds:.3f} s of the sound have no picture and were cut"
        self.parts.remove()

    def _take_pictures(self):
        made = self.parts.folder / "frames"
        if made.is_dir():                          # else they were taken already, just before an end
            if len(os.listdir(made)) != self.parts.frames:
                raise ValueError(f"{made} holds {len(os.listdir(made))} frames, not {self.parts.frames}")
            if self.parts.keep:
                shutil.copytree(made, made := self.parts.folder / "copy", copy_function=os.link)
            os.rename(made, self.path)             # an empty folder of that name gives way

    def read_back(self):
        """Yield the frames of the clips that an earlier run has finished, (3, P, H, W) in [-1, 1] each, as they were written."""
        for clip in self.parts.clips:
            if clip["file"]:
                frames = list(read_frames(self.parts.folder / clip["file"]))
                yield torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1
        if self.as_frames:
            for path in sorted((self.parts.folder / "frames").glob("*")):
                yield torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[:, None] / 127.5 - 1

    def leave(self):
        """End early; `kept` then says where what is finished is."""
        parts = self.parts
        if parts.lock is not None and parts.made is None:            # nobody could go on
            parts.remove()
        elif parts.lock is not None:
            if parts.clips or parts.states:
                with suppress(OSError, ValueError):
                    self.renew_after = 0.0
                    self.renew_partial(limit=5)
                plays = f", to be watched as {parts.output.with_name(parts.partial)}" if self.playable else ""
                self.kept = f"kept in {parts.folder} up to {parts.progress()}{plays}: the same command goes on"
            parts.close()
