"""Damaged and made-up files for every parser: each is read rightly or refused with one line, writes nothing, ends, and stays small.

A parser more is one line in `files`, a good file, and one in PARSERS: what reads it, and how many damaged ones. The seeds are fixed.
    python -m pytest tests/test_fuzz.py
"""
import copy
import importlib.util
import json
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file

import convert_weights
import sample
from fast.plan import RunConfig
from formats import checkpoints, foreign, gguf_file, lora
from formats.checkpoints import open_checkpoint
from jobs.parts import Parts
from media.ffmpeg import run
from media.frames import load_pose
from media.pictures import fit_picture, load_image
from media.sound import load_audio
from media.terminal import shown
from test_convert import small
from test_published import denoiser_kind, write_gguf
from text import Tokenizer
from tiny import random_weights as fake

HERE = Path(__file__).parents[1]
TINY = HERE / "weights" / "tiny"
SECONDS, BYTES = 10, 2 * 2**30
VALUES = [None, True, False, -1, 0, 1, 2, 3.5, 10**9, 10**18, 10**400, -10**9, 1e308, float("nan"), float("inf"), "", "x", "\x1b[2J\n", "1" * 5000,
          "../../x", [], {}, [0], [None], [[]], [10**9], ["a", 1], {"a": 1}, [1] * 3000, {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
          {"Regex": "(a+)+$"}, {"type": "Replace", "pattern": {"Regex": "(x*)*y"}, "content": "x"}]


# ---- what is damaged ----

@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """{name: file} with one good file for each parser, the folder of a checkpoint around it where it needs one."""
    root = tmp_path_factory.mktemp("good")
    tone = 0.3 * np.sin(np.arange(8000) / 9).astype(np.float32)
    for ending in ("wav", "flac", "ogg"):
        soundfile.write(root / f"sound.{ending}", tone, 16000)
    face = Image.open(HERE / "samples" / "face.png").resize((48, 64))
    for ending in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        face.convert("P" if ending == "gif" else "RGB").save(root / f"picture.{ending}")
    run("-y", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=16:duration=0.5", "-c:v", "libx264", "-pix_fmt", "yuv420p", root / "pose.mp4")
    run("-y", "-f", "lavfi", "-i", "sine=duration=0.5", "-c:a", "aac", root / "sound.m4a")
    ours = root / "ours"
    shutil.copytree(TINY, ours)
    official = root / "official"
    fake.official("t2v-A14B", official, small("t2v-A14B"))
    torch.save({"a.weight": torch.randn(9, 7), "b.bias": torch.randn(7).half()}, root / "tensors.pth")
    config = small("s2v-14B")["denoiser"]
    pair = {f"diffusion_model.blocks.{i}.ffn.0.lora_{side}.weight": torch.randn(*shape)
            for i in range(2) for side, shape in (("down", (2, config.dim)), ("up", (config.ffn_dim, 2)))}
    save_file(pair | {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(2.0)}, root / "lora.safetensors", metadata={"lora_alpha": "2"})
    if importlib.util.find_spec("gguf"):
        write_gguf(root / "tensors.gguf", "wan", {"a.weight": torch.randn(64, 64), "b.bias": torch.randn(64)}, denoiser_kind, reshape=("a.weight",))
    with_parts(root / "out.mp4")
    index = next(official.glob("high*/*.index.json"))
    return {"config": ours / "config.json", "tensors": ours / "text.safetensors", "tokenizer": ours / "tokenizer.json", "index": index,
            "official config": index.with_name("config.json"), "t5": next(official.glob("*.pth")), "pth": root / "tensors.pth",
            "manifest": root / "out.mp4.parts" / "manifest.json", "state": next((root / "out.mp4.parts").glob("steps*")),
            "lora": root / "lora.safetensors", "pose": root / "pose.mp4", "gguf": root / "tensors.gguf",
            **{path.suffix: path for path in root.iterdir() if path.stem in ("sound", "picture")}}


MADE = {"steps": 4, "seed": 42}


def with_parts(out):
    """What a run leaves behind that ends after one clip and two steps of the next."""
    parts = Parts(out, MADE, 3).open()
    parts.save("clip", {"motion": torch.randn(1, 16, 2, 8, 8)})
    (parts.folder / "0000.mp4").write_bytes(bytes(1000))
    parts.add(13, parts.folder / "0000.mp4")
    parts.save("steps", {"x": torch.randn(1, 16, 2, 8, 8), "step": torch.tensor(2)})
    parts.close()


def read_parts(path):
    parts = Parts(str(path.parent).removesuffix(".parts"), MADE, 3)
    parts.read()
    for name in list(parts.states):
        parts.load(name)
    assert type(parts.frames) is int and isinstance(parts.progress(), str)


def read_folder(path):
    checkpoint = open_checkpoint(next(folder for folder in path.parents if folder.name in ("ours", "official")))
    RunConfig().resolve(checkpoint)
    for part in checkpoint.parts.values():
        assert part.parameters < 10**8


def read_lora(path):
    changes, *_ = lora.read_lora(path, small("s2v-14B")["denoiser"])
    for change in changes.values():
        assert change().isfinite().all()


PARSERS = {         # file to damage: what reads it, how many
    ".wav": (load_audio, 16), ".flac": (load_audio, 16), ".ogg": (load_audio, 8), ".m4a": (load_audio, 16),
    **dict.fromkeys((".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp"), (lambda path: fit_picture(load_image(path), (64, 64)), 16)),
    "pose": (lambda path: load_pose(path, 4, (32, 32)), 24),
    "tensors": (lambda path: [entry.read() for entry in checkpoints.open_safetensors(path).values()], 80),
    "config": (read_folder, 90), "official config": (read_folder, 40), "index": (read_folder, 40), "t5": (read_folder, 8),
    "pth": (lambda path: [entry.read() for entry in foreign.open_pickle(path).values()], 40),
    "tokenizer": (lambda path: Tokenizer(path)("a person with red hair"), 80),
    "lora": (read_lora, 50), "manifest": (read_parts, 80), "state": (read_parts, 30),
}
if importlib.util.find_spec("gguf"):                                 # the optional package that reads these
    PARSERS["gguf"] = (lambda path: [entry.read() for entry in gguf_file.open_gguf(path).values()], 80)


# ---- how ----

def damaged(data, draw):
    """bytes -> the same with one kind of damage."""
    data, at = bytearray(data), draw.randrange(max(1, len(data)))
    kind, few = draw.randrange(8), draw.choice((1, 4, 64))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        return bytes(data[:at] + draw.randbytes(few) + data[at:])
    if kind == 2:
        return bytes(data[:at] + data[at + few:])
    if kind == 3:
        return bytes(data + data[at:])
    for at in (at, *(draw.randrange(min(len(data), 4096)) for _ in range(few))) if data else ():
        data[at:at + 4] = {4: b"\xff\xff\xff\x7f", 5: bytes(4)}.get(kind, draw.randbytes(1 + kind % 2 * 3))[:len(data) - at]
    return bytes(data)


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    for key in range(min(len(value), 8)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))


def damaged_json(text, draw):
    """JSON -> the same with a value changed, a key left out, twice or added, or nested too deep; sometimes no JSON any more."""
    kind = draw.randrange(12)
    if kind == 0:
        return damaged(text.encode(), draw)
    if kind == 1:
        return ("[" * 100000 if draw.random() < 0.5 else '{"a":' * 100000).encode()
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 3))):
        path = draw.choice([path for path in places(value) if path] or [()])
        if not path:
            return json.dumps(draw.choice(VALUES)).encode()
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        new = copy.deepcopy(draw.choice(VALUES))
        if kind == 2 and isinstance(inner, dict):
            del inner[path[-1]]
        elif kind == 3 and isinstance(inner, dict):
            inner[f"{path[-1]}_"] = new
        else:
            inner[path[-1]] = new
    text = json.dumps(value)
    return (text[:1] + '"task": 7, ' + text[1:] if kind == 4 and text[:1] == "{" and len(text) > 2 else text).encode()


def damage(path, data, draw):
    if path.suffix == ".json":
        return damaged_json(data.decode(), draw)
    if path.suffix == ".safetensors" and draw.random() < 0.6:        # its header, with the length that it then has or another
        size = int.from_bytes(data[:8], "little")
        header = damaged_json(data[8:8 + size].decode(), draw)
        length = draw.choice((len(header),) * 6 + (2**63, 10**9, 0))
        return length.to_bytes(8, "little") + header + data[8 + size:]
    return damaged(data, draw)


class TooLong(BaseException):
    pass


def outcome(read, path):
    """One line, "read", or what must not be. Under a limit of memory, by an alarm clock, with an eye on the folder."""
    def ring(*_): raise TooLong
    before, (soft, hard) = sorted(path.parent.iterdir()), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
        said = "read"
    except (ValueError, OSError) as error:
        said = shown(f"error: {error}")                              # as the command line prints it
        named = any(str(folder) in said for folder in path.parents[:2])
        if not isinstance(error, (ValueError, OSError)) or not said.isprintable() or len(said) > 2000 or not named:
            said = f"FAULT {type(error).__name__} {said[:300]!r}"
    except BaseException as error:
        said = f"FAULT {type(error).__name__} {str(error)[:300]!r}"
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return said if sorted(path.parent.iterdir()) == before else f"FAULT wrote something; {said}"


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files(files, name):
    good, (read, count) = files[name], PARSERS[name]
    data = good.read_bytes()
    assert outcome(read, good) == "read"
    faults, read_rightly = [], 0
    try:
        for number in range(count):
            good.unlink()                                            # a mapped file must not change under who still has it
            good.write_bytes(damage(good, data, random.Random(f"{name} {number}")) if number else b"")
            said = outcome(read, good)
            read_rightly += said == "read"
            faults += [f"{name} {number}: {said}"] if said.startswith("FAULT") else []
    finally:
        good.unlink(missing_ok=True)
        good.write_bytes(data)
    assert not faults, "\n".join(faults)
    assert read_rightly < count                                      # else nothing was damaged


@pytest.mark.parametrize("name", [".wav", ".m4a", ".png", ".jpg", "pose", "tensors", "config", "tokenizer", "official config", "index", "t5", "lora"])
def test_the_command_line_says_one_line(files, name, tmp_path, capsys):
    """A damaged file of each kind through the whole program: status 2, one line, nothing written."""
    good, out = files[name], tmp_path / "out"
    given = {"--audio": str(HERE / "samples" / "voice.flac"), "--image": str(HERE / "samples" / "face.png"), "--ckpt": str(files["config"].parent)}
    if name in ("official config", "index", "t5"):
        given = {"--ckpt": str(next(path for path in good.parents if path.name == "official")), "--prompt": "a cat"}
    given |= {".wav": {"--audio": str(good)}, ".m4a": {"--audio": str(good)}, "pose": {"--pose-video": str(good)}}.get(name, {})
    given |= {"--image": str(good)} if name in (".png", ".jpg") else {}
    out.mkdir()
    data = good.read_bytes()
    try:
        good.unlink()
        good.write_bytes(data[:90 if good.suffix in (".wav", ".jpg") else len(data) // 3])
        if name == "lora":
            code = convert_weights.main([str(TINY), str(out / "new"), "--lora", str(good)])
        else:
            code = sample.cli([*(x for pair in given.items() for x in pair), "--size", "64x64", "--steps", "1", "--out", str(out / "a.mp4")])
    finally:
        good.unlink()
        good.write_bytes(data)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(said) == 1 and said[0].startswith("error: ") and str(good.parent) in said[0], said
    assert not list(out.iterdir())


def test_there_are_500():
    assert sum(count for _, count in PARSERS.values()) >= 500
