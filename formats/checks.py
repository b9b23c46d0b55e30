"""What a small damaged or made-up file could do: grow without end, or fail far from its cause. A config is bounded by the tensors beside it;
a file that would unpack to more than it holds is refused before it is unpacked.
"""
import math
import pickletools
import struct
import typing
import zipfile

import torch
from torch.overrides import TorchFunctionMode

from fast.plan import RunConfig
from formats.checkpoints import CONFIGS, LFS, parameter_shapes

JSON_BYTES = 2**24           # the largest index that is published has 0.2 MiB
HEADER_BYTES = 2**24         # of a safetensors file: names and shapes, and what LoRA programs write of the training
OTHERS = 1024                # the largest number of a config that is no size of a tensor: text_len 512, max_distance 128, motion_frames 73
LEAST = dict.fromkeys(("audio_dim", "audio_states", "audio_tokens", "audio_layers", "pose_dim", "eps"), 0) | {"mean": -OTHERS, "std": 1e-6}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SAMPLING = {"fps": float, "frames": int, "steps": int, "shift": float, "guidance": tuple[float, ...], "size": tuple[int, ...],
            "negative_prompt": str, "solver": str, "picture_db": float}
MOST = {"fps": 240, "frames": 10**5, "size": 2**14}
# All that torch.save writes of plain tensors. PyTorch would call others without complaint, which make gigabytes of a few bytes.
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
           "torch.storage UntypedStorage", *(f"torch {kind}Storage" for kind in (
               "Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "Float8_e4m3fn", "Float8_e5m2")),
           *(f"torch {str(dtype).removeprefix('torch.')}" for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16))}


# ----------------------------------------------------------------------------------------------------------------------- configs

def is_kind(value, kind):
    """Is a value of JSON an int, a float (or a whole number, but finite), a bool or a str?"""
    return type(value) in (int, float) and abs(value) < 1e30 if kind is float else type(value) is kind


def check_kinds(values, kinds, path):
    """ValueError unless each value is of its kind.  kinds {name: int, float, bool, str or a tuple of one of these}"""
    for name, value in values.items():
        many, kind = typing.get_origin(kinds.get(name)) is tuple, (*typing.get_args(kinds.get(name)), kinds.get(name))[0]
        if kind is not None and not (isinstance(value, tuple) and all(is_kind(x, kind) for x in value) if many else is_kind(value, kind)):
            raise ValueError(f"{path}: wanted {f'a list, each {KINDS[kind]},' if many else KINDS[kind]} as {name}, got {repr(value)[:60]}")


def check_sizes(values, path, entries):
    """ValueError for a number of a config that nothing of its size stands behind.  entries {name: Entry} of its component"""
    most = max([OTHERS, *(max(entry.shape) for entry in entries.values() if math.prod(entry.shape) and entry.shape)])
    for name, value in values.items():
        for x in value if isinstance(value, tuple) else (value,):
            if type(x) in (int, float) and not LEAST.get(name, 1) <= x <= most:
                raise ValueError(f"{path}: wanted {name} of {LEAST.get(name, 1)} to {most}, as large as a side of its tensors, got {x}")
        if isinstance(value, tuple) and len(value) > max(OTHERS, len(entries)):
            raise ValueError(f"{path}: {name} has {len(value)} values, more than its file has tensors")


class AtMost(TorchFunctionMode):
    """While a network is built: it ends with a ValueError once that has many more parameters than there are tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.left, self.tensors = 2 * tensors + 100, tensors         # some are made and thrown away again

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= func in (torch.empty, torch.ones, torch.zeros, torch.randn)
        if self.left < 0:
            raise ValueError(f"it describes a network of more layers than its {self.tensors} tensors are for")
        return func(*args, **(kwargs or {}))


def make_config(kind, fields, path, entries):
    """The config of one component.  fields {its name: value}, lists for tuples        entries {any name: Entry}, which bound it

    raises  ValueError, which begins with the path
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    check_kinds(values, typing.get_type_hints(CONFIGS[kind]), path)
    check_sizes(values, path, entries)
    try:
        config = CONFIGS[kind](**values)
        with AtMost(len(entries)):
            parameter_shapes(kind, config)
        return config
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:         # of constructors that these sizes do not suit
        raise ValueError(f"{path}: {next(iter(str(error).splitlines()), type(error).__name__)}") from None


def check_checkpoint(c):
    """ValueError for a Checkpoint of components that do not go together, or with default values that nothing can be made with"""
    if c.boundary is not None and not (is_kind(c.boundary, float) and 0 < c.boundary < 1):
        raise ValueError(f"{c.folder}: wanted a boundary between 0 and 1, or null for one expert, got {repr(c.boundary)[:60]}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in c.sampling.items()}
    check_kinds(values, SAMPLING, c.folder)
    for name, value in values.items():
        if name in MOST and not all(1 <= x <= MOST[name] for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{c.folder}: wanted {name} of 1 to {MOST[name]}, got {repr(value)[:60]}")
    try:
        RunConfig().resolve(c)                                       # as defaults of a run
    except ValueError as error:
        raise ValueError(f"{c.folder}: {error}") from None
    denoiser, vae_z = c.configs["denoiser"], c.configs["vae"].z_dim
    experts = {c.parts[name].config for name in c.experts}
    audio_dim, states = (c.configs["audio"].dim, c.configs["audio"].n_layer + 1) if "audio" in c.configs else (0, 0)
    for what, got, wanted in (
            ("the low-noise expert's config", experts, {denoiser}), ("latent channels of the VAE", vae_z, denoiser.out_dim),
            ("width of the text encoder", c.configs["text"].dim, denoiser.text_dim),
            ("width of the audio encoder", audio_dim, denoiser.audio_dim),
            ("hidden states of the audio encoder", states, denoiser.audio_states if denoiser.audio_dim else 0)):
        if got != wanted:
            raise ValueError(f"{c.folder}: {what}: the denoiser wants {wanted}, got {got}: these files are from different models")


# ------------------------------------------------------------------------------------------------------------------------- files

def require(folder, wanted):
    """ValueError with every missing file in one message, or every Git LFS pointer in place of one.  wanted [(path, what it is), ...]"""
    missing = [f"{path.relative_to(folder)} ({what})" for path, what in wanted if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} is not complete, missing: {', '.join(missing[:20])}" + f" and {len(missing) - 20} more" * (len(missing) > 20))
    if pointers := [str(path.relative_to(folder)) for path, _ in wanted if path.stat().st_size < 1000 and path.read_bytes().startswith(LFS)]:
        raise ValueError(f"{folder} was cloned without Git LFS, these are only pointers: {', '.join(pointers)}: run git lfs pull in it")


def check_bytes(path, most, what):
    """ValueError for a file larger than any that is published of its kind"""
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size / 2**20:.1f} MiB, {what} has at most {most / 2**20:.0f}: it is not the file that is meant")


def check_header(path):
    """ValueError for a safetensors file whose header alone would fill memory: its length stands in the first 8 bytes"""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < size <= path.stat().st_size:                   # else it is damaged, and safetensors says so
        raise ValueError(f"{path} has a header of {size / 2**20:.0f} MiB, wanted at most {HEADER_BYTES // 2**20}: it is no file of tensors")


def check_pickle(path):
    """ValueError for a .pth that would unpack to more than it holds, or calls what no file of plain tensors calls. Nothing is unpickled."""
    try:
        if not zipfile.is_zipfile(path):
            return                                                   # torch.load says what it is
        with zipfile.ZipFile(path) as file:
            members, held = file.infolist(), path.stat().st_size
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(member.file_size for member in members) > held
            called = {arg for member in members if member.filename.endswith("data.pkl") and not packed
                      for code, arg, _ in pickletools.genops(file.read(member)) if code.name == "GLOBAL"}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, LookupError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path} is not a whole file of tensors alone ({type(error).__name__}): download it again") from None
    if packed:
        raise ValueError(f"{path} would unpack to more than its {held / 2**20:.1f} MiB, and torch.save packs nothing: refused")
    if unknown := called - GLOBALS:
        raise ValueError(f"{path} is not a whole file of tensors alone (it calls {min(unknown)}): refused, nothing in it was executed")


def check_unpacked(path, tensors):
    """ValueError for tensors larger than the file that they were read from: views that repeat one number, or none in memory at all"""
    held, size = sum(t.numel() * t.itemsize for t in tensors.values()), path.stat().st_size
    if any(t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized for t in tensors.values()):
        raise ValueError(f"{path} holds tensors without plain numbers: save dense ones, on the CPU")
    if held > 2 * size + 4096:                                       # twice: tied embeddings stand under two names
        raise ValueError(f"{path} would unpack to {held / 2**30:.1f} GiB, it has {size / 2**20:.1f} MiB: refused")
