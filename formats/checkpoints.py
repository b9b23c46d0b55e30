"""Checkpoints: a config.json, one safetensors file per network and a tokenizer.json -> networks with their weights.

`open_checkpoint` reads headers alone; a tensor is read when it is needed. Matching is strict both ways: every key of a file is used once,
every parameter of the network filled, every shape compared. Folders and files of other layouts are translated into this one as they are
opened (foreign.py), without writing anything.

A large matrix of the denoiser may be float8: X.weight float8_e4m3fn with X.weight_scale (out, 1) float32, one scale per row (fast/fp8.py).
"""
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

import audio
import model
import text
import vae

# ------------------------------------------------------------------------------------------------------------- facts per task

# The negative prompts the models were tuned with (official configs, sample_neg_prompt): pictures they should move away from.
NEGATIVE_S2V = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
BOUNDARY = {"t2v-A14B": 0.875, "i2v-A14B": 0.900}   # t/1000 from which the high-noise expert serves
SAMPLING = {                                        # guidance: one value, or (low noise, high noise); size: width, height
    "s2v-14B": dict(fps=16, frames=80, steps=40, shift=3.0, guidance=[4.5], size=[1024, 704], negative_prompt=NEGATIVE_S2V),
    "t2v-A14B": dict(fps=16, frames=81, steps=40, shift=12.0, guidance=[3.0, 4.0], size=[1280, 720], negative_prompt=NEGATIVE),
    "i2v-A14B": dict(fps=16, frames=81, steps=40, shift=5.0, guidance=[3.5, 3.5], size=[1280, 720], negative_prompt=NEGATIVE),
    "ti2v-5B": dict(fps=24, frames=121, steps=50, shift=5.0, guidance=[5.0], size=[1280, 704], negative_prompt=NEGATIVE),
}
for defaults in SAMPLING.values():
    defaults["solver"] = "unipc"

# -------------------------------------------------------------------------------------------------------------- reading files

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
LFS = b"version https://git-lfs.github.com/"              # how a Git LFS pointer begins, a text in place of a large file
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype                  # the dtype to store; `read` may return a wider one if the tensor is computed
    read: Callable[[], Tensor]

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def open_safetensors(path):
    """{name: Entry} of one safetensors file, mapped into memory.  ValueError for a damaged file or a dtype not in DTYPES"""
    from formats.checks import check_header                          # here, as below: importing `sample` does not need it
    try:
        check_header(path)
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        from formats import foreign
        raise ValueError(foreign.by_its_first_bytes(path)
                         or f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
    for name, part in slices.items():
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {part.get_dtype()}, wanted one of {', '.join(DTYPES)}: take the bf16 or fp8 file")
    return {name: Entry(path, tuple(part.get_shape()), DTYPES[part.get_dtype()], partial(file.get_tensor, name))
            for name, part in slices.items()}


def read_json(path):
    """The JSON object in a file -> dict"""
    from formats.checks import JSON_BYTES, check_bytes
    try:
        check_bytes(path, JSON_BYTES, "a config or index")
        fields = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(fields).__name__}")
    return fields


# ------------------------------------------------------------------------------------------------- networks and strict matching

E4M3 = torch.float8_e4m3fn
NETWORKS = {"denoiser": model.Denoiser, "vae": vae.VAE, "text": text.TextEncoder, "audio": audio.Wav2Vec2}
CONFIGS = {"denoiser": model.Config, "vae": vae.VAEConfig, "text": text.TextConfig, "audio": audio.AudioConfig}


class WithoutInit(TorchFunctionMode):
    """Skip initial values. On the meta device they would be useless, and the first draw alone imports seconds' worth of code."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def build(kind, config):
    """The network of one component on the meta device: names and shapes without memory."""
    with torch.device("meta"), WithoutInit():
        return NETWORKS[kind](config)


@cache
def parameter_shapes(kind, config):
    """{our name: shape} of every parameter"""
    return {name: tuple(p.shape) for name, p in build(kind, config).state_dict().items()}


def may_be_fp8(kind, name):
    from fast import fp8                                             # here, as below: who plans a run does not need it
    return kind == "denoiser" and fp8.uses_fp8(name)


def match(entries, rules, kind, config):
    """Pair the tensors of one component with its network's parameters.

    entries  {name: Entry}        rules  the name table of a foreign layout (names.py); None for our own names
    returns  {our name: Entry}, complete, in the network's order, behind a float8 weight its X.weight_scale
    raises   ValueError naming the file, the first key that does not fit, both shapes, and how many more there are
    """
    called, problems, wanted = {}, [], {}
    files = sorted({entry.file for entry in entries.values()}) or ["an empty file"]
    source = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    if rules is not None:
        from formats import foreign
        entries, called, problems = foreign.translate(entries, rules, kind, config)
    for name, shape in parameter_shapes(kind, config).items():
        wanted[name] = shape
        if name in entries and entries[name].dtype == E4M3 and may_be_fp8(kind, name):
            wanted[f"{name}_scale"] = (shape[0], 1)
    for name, entry in entries.items():
        theirs = f"{entry.file}: {called.get(name, name)}"
        if name not in wanted:
            problems.append(f"{theirs} belongs to no parameter")
        elif entry.shape != wanted[name]:
            problems.append(f"{theirs} has shape {entry.shape}, wanted {wanted[name]}")
        elif entry.dtype == E4M3 and not may_be_fp8(kind, name):
            problems.append(f"{theirs} is float8, which only the denoiser's large matrices may be")
        elif name.endswith(".weight_scale") and entry.dtype != torch.float32:
            problems.append(f"{theirs} is {entry.dtype}, wanted torch.float32")
    problems += [f"{source}: {called.get(name, name)} is missing, wanted shape {shape}"
                 for name, shape in wanted.items() if name not in entries]
    if problems:
        raise ValueError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    return {name: entries[name] for name in wanted}


def parameter_dtype(kind, name, entry, dtype):
    """The dtype in which a parameter is kept, on the device and in files, by a network whose linear layers run in `dtype` (None: as stored).

    Float8 weights and their scales stay as they are stored; the denoiser's norms and modulation, which are small, are float32.
    """
    if dtype is None or entry.dtype == E4M3 or name.endswith(".weight_scale"):
        return entry.dtype
    return torch.float32 if kind == "denoiser" and ("norm" in name or name.endswith("modulation")) else dtype


def materialise(kind, config, tensors, device="cpu", dtype=None, quantize=False, resident=None):
    """{our name: Entry} -> the network with these weights, in eval mode, without gradients.

    dtype     of the linear layers, see `parameter_dtype`        quantize  cast the denoiser's large matrices to float8 on the way
    resident  number of blocks that stay on the device while the others are streamed (fast/offload.py); None: all
    """
    dtype_of = partial(parameter_dtype, kind, dtype=dtype)
    from fast import fp8
    if quantize and kind == "denoiser":
        tensors = fp8.quantized(tensors, device)
    net = fp8.to_fp8(build(kind, config), tensors)
    if resident is not None:
        from fast import offload
        return offload.stream(net, tensors, device, dtype_of, resident)
    net.load_state_dict({name: entry.read().to(device, dtype_of(name, entry)) for name, entry in tensors.items()}, strict=True, assign=True)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------ checkpoint

@dataclass(frozen=True)
class Part:
    """One component: its config and where each of its parameters is stored."""
    kind: str                       # "denoiser", "vae", "text" or "audio"
    config: object
    tensors: dict[str, Entry]       # our name -> tensor in a file

    @property
    def nbytes(self):
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def parameters(self):
        return sum(math.prod(entry.shape) for name, entry in self.tensors.items() if not name.endswith(".weight_scale"))


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: everything known from headers, nothing read."""
    folder: Path
    task: str                       # "s2v-14B", "t2v-A14B", "i2v-A14B" or "ti2v-5B"
    boundary: float | None          # t/1000 from which the high-noise expert serves; None with one expert
    sampling: dict                  # the task's fps, frames, steps, shift, guidance, solver, size, negative_prompt
    tokenizer: Path
    parts: dict[str, Part]          # "denoiser" or "denoiser_high" and "denoiser_low", "vae", "text", for S2V "audio"
    note: str | None = None         # where the numbers come from, if they are no published model's

    def __post_init__(self):
        from formats.checks import check_checkpoint
        check_checkpoint(self)

    @property
    def experts(self):
        return [name for name in self.parts if name.startswith("denoiser")]

    @property
    def configs(self):
        return {part.kind: part.config for part in reversed(self.parts.values())}

    def sizes(self):
        """{component: GiB on disk}"""
        return {name: part.nbytes / 2**30 for name, part in self.parts.items()}

    def load(self, component, device="cpu", dtype=None, quantize=False, resident=None):
        """The network of one component (a name in `parts`) with its weights; the other arguments as in `materialise`."""
        part = self.parts[component]
        return materialise(part.kind, part.config, part.tensors, device, dtype, quantize, resident)


def change_denoisers(checkpoint, change):
    """The Checkpoint with the tensors of each expert replaced.  change  function (component, Part) -> {our name: Entry}"""
    parts = {name: dataclasses.replace(part, tensors=change(name, part)) if part.kind == "denoiser" else part
             for name, part in checkpoint.parts.items()}
    return dataclasses.replace(checkpoint, parts=parts)


def expert_names(boundary):
    return ["denoiser"] if boundary is None else ["denoiser_high", "denoiser_low"]


def open_checkpoint(folder, files=()):
    """A checkpoint folder in our, the official or the diffusers layout -> Checkpoint, checked by its headers.

    files   single files that take the place of components of the folder, which may then lack them; their keys tell which. Of two
            denoisers the high-noise expert comes first. A GGUF file as `folder` is one of these in its own folder
    raises  ValueError naming what is missing, what does not fit and in which file
    """
    folder, singles = Path(folder), {}
    if folder.suffix == ".gguf" and folder.is_file():
        folder, files = folder.parent, [folder, *files]
    if not folder.is_dir():
        from formats import foreign
        if said := foreign.by_its_first_bytes(folder):
            raise ValueError(said)
        what = "a file: give the folder of the other components first" if folder.exists() else "not there"
        raise ValueError(f"wanted a checkpoint folder, got {folder}, which is {what}")
    if files:
        from formats import foreign
        singles = foreign.open_singles(files)
    if (folder / "config.json").is_file() and "task" in read_json(folder / "config.json"):
        return open_converted(folder, singles)
    from formats import foreign
    return foreign.open_folder(folder, singles)


def open_converted(folder, singles):
    """A folder in our layout.  singles  {kind: [{their name: Entry}, ...]} in place of its files"""
    path = folder / "config.json"
    fields = read_json(path)
    kinds = {name: name.split("_")[0] for name in expert_names(fields.get("boundary"))} | {"vae": "vae", "text": "text"}
    kinds |= {"audio": "audio"} if "audio" in fields else {}
    task = fields["task"] if isinstance(fields["task"], str) else None
    lacking = ["boundary"] if "boundary" not in fields else []
    lacking += [name for name in ("sampling", *kinds.values()) if not isinstance(fields.get(name), dict)]
    if lacking or task not in SAMPLING or not fields["sampling"].keys() >= SAMPLING[task].keys():
        raise ValueError(f"{path}: wanted a task of {', '.join(SAMPLING)} with all its fields, got {repr(fields['task'])[:60]}, "
                         f"lacking {', '.join(lacking) or 'sampling values'}: convert again")
    from formats.checks import make_config, require
    given = {}
    if singles:
        from formats import foreign
        given = foreign.assign(singles, kinds, folder)
    files = {name: folder / f"{name}.safetensors" for name in kinds if name not in given}
    require(folder, [(file, name) for name, file in files.items()] + [(folder / "tokenizer.json", "tokenizer")])
    parts = {}
    for name, kind in kinds.items():
        entries, rules = given.get(name) or open_safetensors(files[name]), None
        config = make_config(kind, fields[kind], path, entries)
        if name in given:
            from formats import names
            rules = names.rules_for(kind, config, entries)
        parts[name] = Part(kind, config, match(entries, rules, kind, config))
    return Checkpoint(folder, task, fields["boundary"], fields["sampling"], folder / "tokenizer.json", parts, fields.get("note"))
