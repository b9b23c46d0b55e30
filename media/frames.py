"""Video frames in, and the pose frames among them. Through the ffmpeg program that imageio-ffmpeg brings.

Source  Wan-Video/Wan2.2@42bf4cf wan/speech2video.py (L297-376)
"""
import math
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import torch

from media.ffmpeg import MAX_PIXELS, FFmpegError, decoded, ffmpeg_command, framecrc, probe, source
from media.pictures import fit_frame


@contextmanager
def as_pose(path):
    """An error of ffmpeg becomes a ValueError that names the file."""
    try:
        yield
    except FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a pose video ({error}): convert it to mp4") from None


def open_pose(path):
    """What a pose video holds -> Media.  raises ValueError (one line) for what is none, or whose frames would fill memory"""
    with as_pose(path):
        info = probe(path, count=False)
    if info.video_codec is None:
        raise ValueError(f"{path} holds no picture: wanted a pose video")
    if info.width * info.height > MAX_PIXELS:
        raise ValueError(f"{path} has frames of {info.width}x{info.height}, wanted at most 4096x4096 or as many pixels: scale it down")
    return info


def pose_step(video_fps, fps=16):
    """Every how many-th frame of a pose video the official code uses; round half to even as official L318 (24, 25, 30, 40 -> 2; 12 -> 1)."""
    return max(1, round(video_fps / fps))


def nearest_frames(path, fps=16):
    """The frame nearest in time to 0, 1/fps, 2/fps, ... seconds until a video ends, at even and uneven frame rates: its numbers (n,)."""
    decoded = ["-vf", "crop=2:2:0:0", "-fps_mode", "passthrough", "-enc_time_base", "demux"]      # their times, at hardly any size
    tick, packets = framecrc(path, *decoded)
    times = np.array([pts for _, pts, _ in packets]) * float(tick)
    if not len(times):
        return np.zeros(0, int)
    last = packets[-1][2] * float(tick) or (times[-1] - times[0]) / max(1, len(times) - 1)        # how long the last frame is shown
    wanted = np.arange(max(1, math.ceil((times[-1] + last) * fps - 1e-3))) / fps
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted)


def load_pose(path, frames, size, fps=16, first=0, official=False):
    """Pose frames first ... first + frames - 1 of the video to make, as one tensor: those nearest in time, whatever rate the pose video has.

    size      (height, width) of the video; each frame is laid over it as the reference picture is
    official  every pose_step-th frame, which runs at 0.5 to 1.6 times the speed unless the rate is a multiple of fps, with grey bars (fit_frame)
    returns   (3, frames, H, W) float32 in [-1, 1]; where the pose video has ended the rest is -1 (black: no pose), with a warning
    raises    ValueError (one line) if the file is missing or not a video
    """
    info = open_pose(path)
    with as_pose(path):
        numbers = np.arange(0, decoded(path, "V", "frame"), pose_step(info.fps, fps)) if official else nearest_frames(path, fps)
    if not len(numbers):
        raise ValueError(f"{path}: no video frame could be read")
    if max(0, first - 1) < len(numbers) < first + frames:      # said once, in the clip where it ends
        print(f"warning: the pose video ends after {len(numbers)} frames at {fps:g} fps: no pose from there on", file=sys.stderr)
    clip, chosen = torch.full((3, frames, *size), -1.0), numbers[first:first + frames]
    if len(chosen):
        for n, frame in enumerate(read_frames(path, chosen[0], chosen[-1] + 1 - chosen[0]), chosen[0]):
            if n in chosen:
                clip[:, :len(chosen)][:, chosen == n] = fit_frame(frame, size, official)[:, None]
    return clip


def read_frames(path, first=0, count=None):
    """Frames first, first + 1, ... of a video, `count` of them or all -> iterator of (h, w, 3) uint8.

    One frame at a time comes through a pipe, so a long video is never in memory; as PPM, which tells its own size (after rotation).
    """
    command = ffmpeg_command("-v", "error", *source(path, "V"), "-map", "0:V:0", "-vf", rf"select=gte(n\,{first})", "-fps_mode", "passthrough",
                             *([] if count is None else ["-frames:v", str(count)]),
                             "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as ffmpeg:
        try:
            while ffmpeg.stdout.readline() == b"P6\n":
                w, h = map(int, ffmpeg.stdout.readline().split())
                ffmpeg.stdout.readline()      # 255
                frame = np.empty(h * w * 3, np.uint8)
                if ffmpeg.stdout.readinto(frame) < frame.size:
                    break
                yield frame.reshape(h, w, 3)
        finally:
            ffmpeg.kill()
