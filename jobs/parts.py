"""What is finished of a video, on disk, so that the same command goes on where it stopped: the folder out.mp4.parts/ beside out.mp4.

    manifest.json           what is made (`made_from`), and which of the files below count
    0000.mp4, 0001.mp4      a clip each; for PNG output frames/000000.png, ...
    clip-*.safetensors      float tensors that the next clip begins with
    steps-*.safetensors     float tensors of the sampler in the middle of a clip
    lock                    who writes (jobs/lock.py)

Every file is written under a temporary name, flushed to the disk and renamed. The manifest comes last, so a clip is finished when the manifest
that names it and the state after it has its name; whatever no manifest names is removed. A run may end anywhere, by a power cut too.
"""
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jobs import lock, stop

EVERY = 10
FREE = ("device", "compile", "resident", "size", "enlarge", "audio", "image", "pose_video", "clips", "frames", "split")      # see `made_from`


# ------------------------------------------------------------------------------------------------------------------ files that last

@contextmanager
def safely(path):
    """A temporary name to write to. When the block is done, that file is flushed to the disk and renamed to `path`; else it goes."""
    temporary = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush(path):
    """Of a file or folder: to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path):
    """sha256 of a file"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------------ what is made

def made_from(plan, checkpoint):
    """{name: value} of all that the frames depend on, beyond rounding.

    Files count by what is in them, not by their names. Of FREE, device and pixels come as they are in the plan, the rest changes no more than
    rounding: so a run may go on elsewhere, with more memory or less; but another kind of device draws other noise.
    """
    o = plan.config
    made = {field.name: getattr(o, field.name) for field in fields(o) if field.name not in FREE}
    made |= {name: digest(path) if (path := getattr(o, name)) else None for name in ("audio", "image", "pose_video")}
    made |= dict(width=plan.width, height=plan.height, clips=plan.clips, frames=plan.frames, device=o.device.type,
                 checkpoint=headers(checkpoint))
    return json.loads(json.dumps(made, default=str))                 # as it will be read


def headers(checkpoint):
    """A hash of the configs, of names, shapes and dtypes of all tensors, and of the ends of their files: 30 GB are not read."""
    found = hashlib.sha256(repr((checkpoint.configs, checkpoint.experts, checkpoint.boundary, checkpoint.sampling)).encode())
    files = {}
    for part in checkpoint.parts.values():
        for name, entry in sorted(part.tensors.items()):
            found.update(repr((name, entry.shape, entry.dtype)).encode())
            files[entry.file] = None
    for path in [checkpoint.tokenizer, *files]:
        if path is not None and os.path.isfile(path):
            with open(path, "rb") as file:
                found.update(file.read(2**16))
                file.seek(-min(2**16, size := os.fstat(file.fileno()).st_size), os.SEEK_END)
                found.update(file.read() + str(size).encode())
    return found.hexdigest()


def difference(before, now):
    """What differs between two of `made_from`, in a few words."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    values = [[json.dumps(made.get(name), ensure_ascii=False) for made in (before, now)] for name in names]      # without control characters
    words = [f"another {name}" if max(map(len, pair)) > 30 else f"{name} {pair[0]}, now {pair[1]}" for name, pair in zip(names, values)]
    return "; ".join(words[:4]) + f" and {len(words) - 4} more" * (len(words) > 4)


# ------------------------------------------------------------------------------------------------------------------ the folder

class Parts:
    """The folder of one output; `open` before use, `close` or `remove` after.

    path      of the output        made   from `made_from`; None: for this process alone, nothing goes on later
    every     steps between two states of the sampler; None: EVERY, or more, so that they take about a hundredth of the time at most
    keep      the folder when all is done        restart   begin anew whatever is there
    total     clips that there will be
    """

    def __init__(self, path, made=None, total=0, every=None, keep=False, restart=False):
        if every is not None and every < 1:
            raise ValueError(f"--save-every wants a number of steps from 1 on, got {every}")
        self.output, self.folder = Path(path), Path(f"{path}.parts")
        self.made, self.total, self.every, self.keep, self.restart = made, total, every, keep, restart
        self.clips, self.states, self.pending, self.partial = [], {}, {}, None      # clips and states: {"file", "sha256", ..} each
        self.lock, self.new, self.save_after = None, [], 0.0         # save_after: moment before which no state is due

    @property
    def done(self):
        return len(self.clips)

    @property
    def frames(self):
        return sum(clip["frames"] for clip in self.clips)

    def progress(self):
        """How far an earlier run came: "clip 3 of 12"; "" if there was none."""
        words = [f"clip {self.done} of {self.total}"] if self.done else []
        if "steps" in self.states:
            words.append(f"step {self.states['steps']['step']} of {self.made['steps']}")
        return ", ".join(words)

    def open(self):
        """raises  ValueError (one line): another process writes it; it holds another video; it is damaged"""
        self.new = [path for path in self.folder.parents if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock.take(self.folder / "lock")
        try:
            self.read()
            if not (self.clips or self.states):                      # what lies there is of no use
                self.forget_partial()
            self.sweep()
        except BaseException:
            lock.give(self.lock)
            self.lock = None
            raise
        return self

    def read(self):
        path = self.folder / "manifest.json"
        if not path.exists():
            return
        try:
            if path.stat().st_size > 2**26:
                raise ValueError("its manifest is no text of this program")
            found = json.loads(path.read_text(encoding="utf8"))
            made, clips, states, partial = found["made"], list(found["clips"]), dict(found["states"]), found["partial"]
            if not isinstance(made, dict | None) or partial is not None and not re.fullmatch(r"[^/]*\.partial\d*\.\w+", partial):
                raise ValueError("its manifest is no text of this program")
            for entry, number in [*((clip, "frames") for clip in clips), *((state, "step") for state in states.values())]:
                if not self.is_whole(entry["file"], entry["sha256"], entry[number], number == "frames"):
                    raise ValueError(f"{entry['file']!r} is not what was written")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            if self.restart:
                return
            raise ValueError(f"{self.folder} is damaged ({error}): add --restart to begin anew, or choose another --out") from None
        self.partial = partial
        if made is None or self.restart or not (clips or states):
            return
        if made != self.made:
            what = "this one is saved from Python" if self.made is None else difference(made, self.made)
            raise ValueError(f"{self.folder} holds finished parts of another video ({what}): add --restart to begin anew, or choose another --out")
        self.clips, self.states = clips, states

    def is_whole(self, file, sha256, number, may_lack):
        if type(number) is not int or number < 0:
            return False
        if file is None:                                             # PNG frames, or a clip after the end of the sound
            return may_lack
        return re.fullmatch(r"[\w.-]+", file) is not None and digest(self.folder / file) == sha256

    def sweep(self):
        """Remove what does not count."""
        counted = {entry["file"] for entry in [*self.clips, *self.states.values()]} | {"lock", "frames"}
        counted |= {"manifest.json"} if self.clips or self.states else set()
        for path in self.folder.iterdir():
            if path.name not in counted:
                remove(path)
        for path in (self.folder / "frames").glob("*"):
            if not (path.stem.isdigit() and int(path.stem) < self.frames):
                remove(path)

    def commit(self, clips, states):
        """From here on these count, and the files of states that no longer do are removed."""
        with safely(self.folder / "manifest.json") as path:
            path.write_text(json.dumps(dict(made=self.made, clips=clips, states=states, partial=self.partial), indent=1), encoding="utf8")
        old, self.clips, self.states = self.states, clips, states
        for name in {entry["file"] for entry in old.values()} - {entry["file"] for entry in states.values()}:
            remove(self.folder / name)

    @contextmanager
    def errors(self):
        """What goes wrong with the disk, in one line that says what to do.  raises OSError"""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = str(error)
            if not self.folder.is_dir():
                reason = f"{self.folder} has gone: put it back, then the same command goes on"
            elif getattr(error, "errno", 0) == errno.ENOSPC or shutil.disk_usage(self.folder).free < 2**20:
                reason = "the disk is full: make room, then the same command goes on"
            raise OSError(f"cannot write {self.output}: {reason}") from None

    # ---- what the pipeline asks for

    def due(self, step):
        """Whether the sampler's state after so many steps is worth saving."""
        wanted = step % self.every == 0 if self.every else step % EVERY == 0 and time.monotonic() >= self.save_after
        return self.made is not None and (wanted or stop.number > 0)

    def load(self, name, **shapes):
        """{tensor name: tensor} last saved under "clip" or "steps", or None.  shapes of some   raises ValueError for what is no such file"""
        if name not in self.states:
            return None
        try:
            state = load_file(self.folder / self.states[name]["file"])
            wrong = [key for key, shape in shapes.items() if state[key].shape != shape] + [key for key in state if not state[key].isfinite().all()]
            if wrong:
                raise ValueError(f"another {wrong[0]} was wanted")
            return state
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{self.folder} is damaged ({error}): add --restart to begin anew, or choose another --out") from None

    def save(self, name, tensors):
        """"clip": what the clip after the running one begins with, which counts once that is added; "steps": of the sampler, counts now."""
        if self.made is None:
            return
        begin = time.monotonic()
        path = self.folder / f"{name}-{self.done:04d}-{secrets.token_hex(4)}.safetensors"
        with self.errors():
            with safely(path) as temporary:
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
            entry = {name: dict(file=path.name, sha256=digest(path), step=int(tensors.get("step", 0)))}
            if name == "clip":
                self.pending = entry
            else:
                self.commit(self.clips, self.states | entry)
                self.save_after = time.monotonic() + 99 * (time.monotonic() - begin)

    # ---- what the writer asks for

    def add(self, frames, path=None):
        """A clip is finished: its file in the folder, if it is one."""
        clip = dict(file=path and path.name, sha256=path and digest(path), frames=frames)
        self.commit([*self.clips, clip], self.pending)
        self.pending = {}

    def close(self):
        """Let another process have it; a folder with nothing finished goes."""
        if self.lock is not None and (self.folder / "manifest.json").exists():       # not `clips`: a signal may have come between the two
            lock.give(self.lock)
            self.lock = None
        self.remove()

    def remove(self):
        """All is done, or nothing is to be kept."""
        if self.lock is None:
            return
        self.forget_partial()
        if not (self.keep and self.clips):
            remove(self.folder / "manifest.json")                    # first: from here on the rest counts for nothing
            remove(self.folder)
            for path in self.new:                                    # made for an output that did not come
                with suppress(OSError):
                    path.rmdir()
        lock.give(self.lock)
        self.lock = None

    def name_partial(self, name):
        """What can be watched: from here on it goes with the folder."""
        if name == self.partial:
            return
        self.partial = name
        try:
            self.commit(self.clips, self.states)
        except OSError:
            self.forget_partial()
            raise

    def forget_partial(self):
        if self.partial:
            remove(self.output.with_name(self.partial))
        self.partial = None


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
