"""What a video is made from, and files that are whole or not there."""
import hashlib
import json
import os
import secrets
from contextlib import contextmanager
from dataclasses import fields

FREE = ("device", "compile", "resident", "size", "enlarge", "audio", "image", "pose_video", "clips", "frames", "split")      # see `made_from`


@contextmanager
def safely(path):
    """A temporary name to write to. When the block is done, that file is flushed to the disk and renamed to `path`; else it goes."""
    temporary = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path):
    """sha256 of a file"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def made_from(plan, checkpoint):
    """{name: value} of all that the frames depend on, beyond rounding. Files count by what is in them."""
    o = plan.config
    made = {field.name: getattr(o, field.name) for field in fields(o) if field.name not in FREE}
    made |= {name: digest(path) if (path := getattr(o, name)) else None for name in ("audio", "image", "pose_video")}
    files = sorted({str(entry.file) for part in checkpoint.parts.values() for entry in part.tensors.values() if entry.file})
    ends = [(os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files if os.path.isfile(path)]
    made |= dict(width=plan.width, height=plan.height, clips=plan.clips, frames=plan.frames, device=o.device.type,
                 checkpoint=hashlib.sha256(repr((checkpoint.configs, ends)).encode()).hexdigest())
    return json.loads(json.dumps(made, default=str))                 # as it will be read


def difference(before, now):
    """What differs between two of `made_from`, in a few words."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    values = [[json.dumps(made.get(name), ensure_ascii=False) for made in (before, now)] for name in names]      # without control characters
    words = [f"another {name}" if max(map(len, pair)) > 30 else f"{name} {pair[0]}, now {pair[1]}" for name, pair in zip(names, values)]
    return "; ".join(words[:4]) + f" and {len(words) - 4} more" * (len(words) > 4)
