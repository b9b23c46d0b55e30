"""What is given: names, inputs and lengths that are checked; pictures and sounds in memory, as the files that everything else reads."""
import operator
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import numpy as np
import soundfile
import torch
from PIL import Image

from fast.plan import RunConfig
from media.lengths import announced
from media.sound import check_source

LONGEST = 12 * 3600  # seconds of sound that become a video without more ado
SUBTYPES = {"float32": "FLOAT", "float64": "DOUBLE", "int16": "PCM_16", "int32": "PCM_32"}      # nothing is lost
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", os.PathLike: "a path", tuple: "numbers", type(None): "None",
         torch.device: "a torch.device", torch.dtype: "a torch.dtype"}


def check_names(options):
    """raises TypeError for the name of no field of RunConfig, with the nearest one that is; ValueError for a value of another kind"""
    hints = get_type_hints(RunConfig)
    for name, value in options.items():
        if name not in hints:
            near = get_close_matches(name, hints, 1)
            raise TypeError(f"unknown option {name}: {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(hints)}")
        kinds = get_args(hints[name]) if isinstance(hints[name], UnionType) else [hints[name]]        # X | None are two
        kinds = [get_origin(kind) or kind for kind in kinds]
        if object not in kinds and not any(is_kind(value, kind) for kind in kinds):
            raise ValueError(f"{name} must be {' or '.join(KINDS[kind] for kind in kinds)}, got {value!r:.60}")


def is_kind(value, kind):
    if kind is bool:
        return value is None or isinstance(value, (bool, np.bool_)) or isinstance(value, int) and value in (0, 1)
    if kind in (tuple, int, float):                                  # numpy's and torch's too
        try:
            return not isinstance(value, (bool, str)) and (all(is_kind(x, float) for x in value) if kind is tuple else
                                                           (operator.index if kind is int else float)(value) is not None)
        except (TypeError, ValueError, RuntimeError):
            return False
    return isinstance(value, kind)


def whole_number(name, value):
    """Any kind of integer, numpy's too -> int; None stays.  raises ValueError"""
    try:
        return value if value is None else operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value}") from None


def check_inputs(o, task, kind, stride):
    """raises ValueError for what the task needs and was not given, or was given and cannot use"""
    if kind == "s2v":
        for name in ("audio", "image"):
            if getattr(o, name) is None:
                raise ValueError(f"{task} needs an {name}: give --{name} FILE, in Python {name}_path")
        check_length(o)
        if o.pose_video:
            from media.frames import open_pose                       # here: who gives none does not need it
            open_pose(o.pose_video)
        return
    if o.audio or o.pose_video:
        raise ValueError(f"{task} makes silent video: leave out the audio and the pose video, or use an S2V checkpoint")
    if kind == "t2v" and o.image:
        raise ValueError(f"{task} takes a prompt and no picture, got {o.image}: leave it out, or use an I2V or TI2V checkpoint")
    if kind == "i2v" and not o.image:
        raise ValueError(f"{task} needs a picture: give --image FILE, in Python image_path")
    if kind != "i2v" and not o.prompt.strip():
        raise ValueError(f"{task} needs a prompt that says what is to be seen: give --prompt TEXT")
    if o.frames % stride != 1:
        raise ValueError(f"frames must be 1 + a multiple of {stride}, got {o.frames}: take {o.frames - (o.frames - 1) % stride}")


def on_cpu(o):
    """A RunConfig as a CPU carries it out, saying what it leaves out."""
    if o.vae_dtype != torch.float32:
        print(f"warning: a CPU runs the VAE in float32, not in {str(o.vae_dtype).removeprefix('torch.')}: that is less exact and may be slow there",
              file=sys.stderr)
    if o.resident is not None:
        print("warning: resident does nothing on a CPU: all blocks are in its memory", file=sys.stderr)
    return replace(o, vae_dtype=torch.float32, resident=None)


def check_length(o, seconds=None):
    """ValueError for more sound than anyone waits for: 24 h of silence are 300 KB of flac.  o RunConfig; seconds to use, None: as announced"""
    if seconds is None:
        check_source(o.audio)
        seconds = announced(o.audio)[0] - o.start
    if seconds > LONGEST and not (o.duration or o.clips or o.frames):
        raise ValueError(f"{o.audio} has {seconds / 3600:.1f} h of sound, wanted at most {LONGEST // 3600}: say how much with duration, clips or "
                         "frames")


def as_files(options):
    """{"audio": file or (samples, rate), "image": file or PIL picture, ...} -> the same with files, and what keeps those on disk.

    samples  numpy array or torch tensor, (n,), (n, channels) or (channels, n), floats in [-1, 1] or int16, int32        rate  Hz
    raises   TypeError (one line) for anything else
    """
    writers, folder = {"audio": write_sound, "image": write_picture}, None
    for name, write in writers.items():
        if not isinstance(value := options.get(name), (str, os.PathLike, type(None))):
            folder = folder or tempfile.TemporaryDirectory()         # goes when the last one who holds it does
            options = options | {name: write(value, Path(folder.name))}
    return options | {name: os.fspath(options[name]) for name in writers if options.get(name) is not None}, folder


def write_sound(value, folder):
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(f"wanted a sound file or (samples, rate), got {type(value).__name__}: give (samples, 16000) for 16 kHz")
    samples, rate = value
    samples = samples.detach().cpu().numpy() if isinstance(samples, torch.Tensor) else np.asarray(samples)
    samples = samples.astype(np.float32) if samples.dtype == np.float16 else samples
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    if samples.ndim not in (1, 2) or str(samples.dtype) not in SUBTYPES or not rate > 0:
        raise TypeError(f"wanted samples (n,) or (n, channels) of floats in [-1, 1], int16 or int32 and a rate in Hz, got {samples.dtype} "
                        f"{samples.shape} at {rate}: convert them")
    soundfile.write(folder / "samples.wav", samples, int(rate), subtype=SUBTYPES[str(samples.dtype)])
    return folder / "samples.wav"


def write_picture(value, folder):
    if not isinstance(value, Image.Image):
        raise TypeError(f"wanted a picture file or a PIL picture, got {type(value).__name__}: PIL.Image.fromarray makes one of uint8 (h, w, 3)")
    kept = value if value.mode in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA") else value.convert("RGB")
    kept.save(folder / "picture.png", exif=value.getexif(), icc_profile=value.info.get("icc_profile") if kept is value else None)
    return folder / "picture.png"


def warn_unless_known(vae, picture, path, least):
    """A checkpoint for one kind of picture says how well (dB) its VAE gives back those; what comes back worse is something else.

    picture  (1, 3, 1, height, width) in [-1, 1]        least  in dB
    """
    db = -10 * ((vae.decode(vae.encode(picture)) - picture) / 2).square().mean().log10().item()
    if db < least:
        print(f"warning: {path} is unlike the pictures this checkpoint was trained on (its VAE gives it back at {db:.1f} dB, those at {least:g} or "
              f"more): expect a poor face. `python -m tiny.faces face.png` draws one that it knows", file=sys.stderr)


@contextmanager
def default_float32():
    """Whatever torch.set_default_dtype says outside."""
    outside = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(outside)


def in_float32(results):
    """The results of a generator that runs under default_float32, while their user does not."""
    while True:
        with default_float32():
            result = next(results, None)
        if result is None:
            return
        yield result
