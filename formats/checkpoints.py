"""Checkpoint folders of all layouts -> our networks, without converting them.

`open_checkpoint` reads headers alone. Matching is strict both ways: every key of a file is used once, every parameter of the network
filled, every shape compared. A tensor is read when it is needed and never twice.

Float8 tensors of any layout become ours: the layers that multiply in float8 keep their bytes and get one scale per row, X.weight_scale
(out, 1) float32; anything else is multiplied out to bfloat16.
"""
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

import audio
from fast import fp8
import model
from formats import names
from fast import offload
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

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": fp8.E4M3,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype                  # in which it is to be kept; `read` may give more precision, of a tensor that was computed
    read: Callable[[], Tensor]
    scale: "Entry | None" = None        # of a float8 tensor in a foreign layout

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def open_safetensors(path):
    """{name: Entry} of one safetensors file, mapped into memory."""
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
        metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
    names.check_header(path, metadata)
    for name, part in slices.items():
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {part.get_dtype()}, wanted one of {', '.join(DTYPES)}")
    return {name: Entry(path, tuple(part.get_shape()), DTYPES[part.get_dtype()], partial(file.get_tensor, name))
            for name, part in slices.items()}


def open_pickle(path):
    """{name: Entry} of one torch.save file. Only tensors and plain containers are unpickled, nothing in the file is executed."""
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # zip: every torch.save since 1.6; the older format cannot be mapped into memory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # about pickle versions, of files that are refused right after
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} is a pickle that calls {code[1]}: refused, nothing was executed; wanted tensors alone") from None
        reason = re.search(r"WeightsUnpickler error:\s*(.+)|(.*)", str(error) or type(error).__name__)
        raise ValueError(f"{path} is not a whole file of tensors ({(reason[1] or reason[2])[:100]}): refused, nothing in it was executed; "
                         f"copy or download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: wanted a dictionary name -> tensor, got {type(tensors).__name__} with other values in it")
    return {name: Entry(path, tuple(t.shape), t.dtype, partial(lambda t: t, t)) for name, t in tensors.items()}


def read_json(path):
    try:
        fields = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(fields).__name__}")
    return fields


def shards(folder, stem):
    """The files that hold one component's tensors: those its index names, or the single one.  -> list of paths"""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    return sorted({folder / Path(file).name for file in read_json(index).get("weight_map", {}).values()})


def open_tensors(paths):
    """{name: Entry} of all files of one component. A name may stand in one file only."""
    entries = {}
    for path in paths:
        for name, entry in (open_safetensors if path.suffix == ".safetensors" else open_pickle)(path).items():
            if name in entries:
                raise ValueError(f"{name} stands in both {entries[name].file} and {path}")
            entries[name] = entry
    return entries


def open_shards(files, root, stem):
    """`open_tensors` of sharded files, compared with their index."""
    entries, index = open_tensors(files), root / f"{stem}.safetensors.index.json"
    if index.is_file():
        for name, file in read_json(index)["weight_map"].items():
            if name not in entries or entries[name].file.name != Path(file).name:
                raise ValueError(f"{index} places {name} in {file}, which does not hold it: download the folder again")
    return entries


def require(folder, wanted):
    """Every missing file in one message.  wanted: [(path, what it is)]"""
    missing = [f"{path.relative_to(folder)} ({what})" for path, what in wanted if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} is not complete, missing: {', '.join(missing)}")


# ------------------------------------------------------------------------------------------------------------ strict matching

NETWORKS = {"denoiser": model.Denoiser, "vae": vae.VAE, "text": text.TextEncoder, "audio": audio.Wav2Vec2}


class WithoutInit(TorchFunctionMode):
    """Modules are built without drawing initial values: on the meta device the first draw alone imports seconds' worth of code."""

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
    return {name: tuple(p.shape) for name, p in build(kind, config).state_dict().items()}


def take_scales(entries):
    """Tie float8 tensors to their scales, which stand under names of their own.  {their name: Entry} -> the same, problems"""
    plain, scales, problems = {}, {}, []
    for name, entry in entries.items():
        stem, _, last = name.rpartition(".")
        if last == names.FORMAT:
            names.check_format(entry.file, stem, bytes(entry.read().tolist()))
        elif last in names.SCALES:
            if f"{stem}.weight" in scales:
                problems.append(f"{entry.file}: {stem}.weight has two scales")
            scales[f"{stem}.weight"] = entry
        elif name != names.FLAG and last not in names.MARKS:
            plain[name] = entry
    for name, scale in scales.items():
        weight = plain.get(name)
        if weight is None or weight.dtype != fp8.E4M3:
            problems.append(f"{scale.file}: {name} has a scale, wanted float8, got {'nothing' if weight is None else weight.dtype}")
        elif scale.shape not in ((), (1,), weight.shape[:1], (weight.shape[0], 1)):
            problems.append(f"{scale.file}: the scale of {name} has shape {scale.shape}, wanted one number or {weight.shape[0]}, one a row")
        else:
            plain[name] = replace(weight, scale=scale)
    return plain, problems


def row_scales(entry):
    """A float8 Entry's scales as ours: (out, 1) float32"""
    if entry.scale is None:
        return torch.ones(entry.shape[0], 1)
    return entry.scale.read().float().reshape(-1, 1).expand(entry.shape[0], 1).contiguous()


def multiplied(entry, rows=4096):
    """A float8 Entry as bfloat16, some rows at a time: umT5's embedding would be 4 GB in float32."""
    if entry.scale is None:
        return entry.read().bfloat16()
    scales = row_scales(entry).view(-1, *[1] * (len(entry.shape) - 1))
    return torch.cat([(x.float() * scale).bfloat16() for x, scale in zip(entry.read().split(rows), scales.split(rows))])


def settle(kind, tensors):
    """Float8 tensors of any layout as ours keeps them.  {our name: Entry} -> the same, with X.weight_scale"""
    out = {}
    for name, entry in tensors.items():
        if entry.dtype != fp8.E4M3:
            out[name] = entry
        elif kind == "denoiser" and fp8.uses_fp8(name):
            out[name] = replace(entry, scale=None)
            out[f"{name}_scale"] = Entry(entry.file, (entry.shape[0], 1), torch.float32, partial(row_scales, entry))
        else:
            out[name] = Entry(entry.file, entry.shape, torch.bfloat16, partial(multiplied, entry))
    return out


def check_converted(kind, tensors):
    """Problems with float8 in our own layout, which is not as lenient as `settle`."""
    for name, entry in tensors.items():
        if entry.dtype == fp8.E4M3 and not (kind == "denoiser" and fp8.uses_fp8(name)):
            yield f"{entry.file}: {name} is float8, wanted bfloat16 or float32: only the denoiser's large matrices are kept so"
        elif entry.dtype == fp8.E4M3 and entry.scale is None:
            yield f"{entry.file}: {name}_scale is missing, wanted shape {(entry.shape[0], 1)}"
        elif entry.scale and (entry.scale.shape, entry.scale.dtype) != ((entry.shape[0], 1), torch.float32):
            yield f"{entry.file}: {name}_scale is {entry.scale.dtype} {entry.scale.shape}, wanted float32 {(entry.shape[0], 1)}"


def match(entries, rules, kind, config, what=None):
    """Pair a file's tensors with a network's parameters.

    entries  {their name: Entry}        rules  the name table, None for our own names        what  what the file should be, for messages
    returns  {our name: Entry}, complete, in the network's order, behind a float8 weight its X.weight_scale
    raises   ValueError naming the file, the first key that does not fit, both shapes, and how many more there are
    """
    files = sorted({entry.file for entry in entries.values()}) or ["an empty file"]
    files = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    if what in {known for _, known, _ in names.SIGNATURES} and names.describe(entries) not in (what, None):
        raise ValueError(f"{files} holds {names.describe(entries)}, wanted {what}")
    found, wanted, table = {}, parameter_shapes(kind, config), rules or [("*", "*")]
    entries, problems = take_scales(entries)
    for name, entry in entries.items():
        ours = names.rename(name, table)
        if ours is None:
            continue
        if ours not in wanted:
            problems.append(f"{entry.file}: {name} belongs to no parameter")
        elif ours in found:
            problems.append(f"{entry.file}: {name} and another key both lead to {ours}")
        elif entry.shape != wanted[ours]:
            problems.append(f"{entry.file}: {name} has shape {entry.shape}, wanted {wanted[ours]}")
        found.setdefault(ours, entry)
    theirs = names.inverse(table)
    problems += [f"{files}: {names.rename(name, theirs) or name} is missing, wanted shape {shape}"
                 for name, shape in wanted.items() if name not in found]
    problems += check_converted(kind, found) if rules is None else []
    if problems:
        raise ValueError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    return settle(kind, {name: found[name] for name in wanted})


# --------------------------------------------------------------------------------------------------------------- single files

def open_singles(paths):
    """Files that hold one component each, as ComfyUI, kijai and LightX2V publish them -> {kind: [{their name: Entry}, ...]}, in order."""
    singles = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"wanted a file with one component, got {path}, which is {'a folder' if path.is_dir() else 'not there'}")
        entries = {names.without_prefix(name): entry for name, entry in open_tensors([path]).items()}
        what, kind = names.signature(entries)
        if any("lora" in name for name in entries):
            raise ValueError(f"{path} is a LoRA: give it with --lora")
        if kind is None:
            raise ValueError(f"{path} holds {what or 'an unknown model'}: wanted a denoiser, a VAE, umT5 or wav2vec2")
        singles.setdefault(kind, []).append(entries)
    return singles


def place(singles, components, folder):
    """{kind: [entries, ...]} and {component: kind} of a folder -> {component: entries} that take the place of the folder's."""
    out = {}
    for kind, found in singles.items():
        taken = [name for name, of in components.items() if of == kind]
        if len(found) != len(taken):
            order = ", the high-noise expert first" if len(taken) == 2 else ""
            raise ValueError(f"{folder} wants {len(taken)} file{'s' * (len(taken) != 1)} in place of its {kind}{order}; got {len(found)}")
        out |= zip(taken, found)
    return out


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
        denoiser, vae_z = self.configs["denoiser"], self.configs["vae"].z_dim
        experts = {self.parts[name].config for name in self.experts}
        audio_dim, states = (self.configs["audio"].dim, self.configs["audio"].n_layer + 1) if "audio" in self.configs else (0, 0)
        for what, got, wanted in (
                ("the low-noise expert's config", experts, {denoiser}), ("latent channels of the VAE", vae_z, denoiser.out_dim),
                ("width of the text encoder", self.configs["text"].dim, denoiser.text_dim),
                ("width of the audio encoder", audio_dim, denoiser.audio_dim),
                ("hidden states of the audio encoder", states, denoiser.audio_states if denoiser.audio_dim else 0)):
            if got != wanted:
                raise ValueError(f"{self.folder}: {what}: the denoiser wants {wanted}, got {got}: these files are from different models")

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
        """One network with its weights.

        component  a name in `parts`            dtype  of its parameters; None: as stored. What the denoiser needs in float32 stays so.
        quantize, resident  as in `materialise`
        returns    nn.Module in eval mode, without gradients. Tensors are read one by one, straight from the mapped file.
        """
        part = self.parts[component]
        return materialise(part.kind, part.config, part.tensors, device, dtype, quantize, resident)


def stored_as(kind, name, dtype):
    """The dtype of a parameter when its network runs in `dtype`."""
    if name.endswith(".weight_scale"):
        return torch.float32
    return model.Denoiser.storage_dtype(name, dtype) if kind == "denoiser" else dtype


def materialise(kind, config, tensors, device="cpu", dtype=None, quantize=False, resident=None):
    """{our name: Entry} -> the network with these weights.

    dtype     of its parameters; None: as stored            quantize  cast the denoiser's large matrices to float8 on the way
    resident  number of blocks that stay on the device while the others are streamed (offload.py); None: all
    """
    def kept_as(name, entry):
        return entry.dtype if entry.dtype == fp8.E4M3 or dtype is None else stored_as(kind, name, dtype)
    if quantize and kind == "denoiser":
        tensors = fp8.quantized(tensors, device)
    return offload.stream(fp8.to_fp8(build(kind, config), tensors), tensors, device, kept_as, resident)


def open_checkpoint(folder, files=()):
    """A checkpoint folder in the converted, official or diffusers layout -> Checkpoint, checked by its headers.

    files   single files that take the place of components of the folder, which may then lack them; their keys tell which. Of two
            denoisers the high-noise expert comes first
    raises  ValueError naming what is missing, what does not fit and in which file
    """
    folder, singles = Path(folder), open_singles(files)
    if not folder.is_dir():
        what = "a file: give the folder of the other components first" if folder.exists() else "not there"
        raise ValueError(f"wanted a checkpoint folder, got {folder}, which is {what}")
    if (folder / "config.json").is_file() and "task" in read_json(folder / "config.json"):
        return open_converted(folder, singles)
    if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        return open_diffusers(folder, singles)
    official = ("config.json", "high_noise_model", "low_noise_model", "diffusion_pytorch_model*", "models_t5*", "Wan2.*_VAE.pth")
    if any(any(folder.glob(name)) for name in official):
        return open_official(folder, singles)
    raise ValueError(f"{folder} is no checkpoint: wanted a converted folder (config.json, *.safetensors), an official one (config.json or "
                     f"high_noise_model, *_VAE.pth, models_t5_*.pth) or a diffusers one (model_index.json)")


def open_converted(folder, singles):
    path = folder / "config.json"
    fields = read_json(path)
    kinds = {name: name.split("_")[0] for name in expert_names(fields.get("boundary"))} | {"vae": "vae", "text": "text"}
    kinds |= {"audio": "audio"} if "audio" in fields else {}
    lacking = ["boundary"] if "boundary" not in fields else []
    lacking += [name for name in ("sampling", *kinds.values()) if not isinstance(fields.get(name), dict)]
    if lacking or fields["task"] not in SAMPLING or not fields["sampling"].keys() >= SAMPLING[fields["task"]].keys():
        raise ValueError(f"{path}: wanted a task of {', '.join(SAMPLING)} with all its fields, got {fields['task']}, "
                         f"lacking {', '.join(lacking) or 'sampling values'}: convert again")
    given = place(singles, kinds, folder)
    files = {name: folder / f"{name}.safetensors" for name in kinds if name not in given}
    require(folder, [(file, name) for name, file in files.items()] + [(folder / "tokenizer.json", "tokenizer")])
    parts = {}
    for name, kind in kinds.items():
        values = {field: tuple(value) if isinstance(value, list) else value for field, value in fields[kind].items()}
        config = names.make_config(kind, values, path)
        entries = given.get(name) or open_tensors([files[name]])
        parts[name] = Part(kind, config, match(entries, names.rules_for(kind, config, entries) if name in given else None, kind, config))
    return Checkpoint(folder, fields["task"], fields["boundary"], fields["sampling"], folder / "tokenizer.json", parts,
                      fields.get("note"))


def expert_names(boundary):
    return ["denoiser"] if boundary is None else ["denoiser_high", "denoiser_low"]


def find_task(folder, denoiser, stride, experts):
    """The task that a folder's configs amount to."""
    if denoiser.audio_dim:
        return "s2v-14B"
    if len(experts) == 2:
        return "i2v-A14B" if denoiser.in_dim > denoiser.out_dim else "t2v-A14B"
    if stride == (4, 16, 16):
        return "ti2v-5B"
    raise ValueError(f"{folder} holds a single denoiser with the Wan2.1 VAE and no audio layers: wanted S2V, T2V-A14B or I2V-A14B with "
                     f"high_noise_model and low_noise_model, or TI2V-5B; Wan2.1 models and single experts are not supported")


def assemble(folder, parts, tokenizer, boundary=None):
    """Parts of a foreign folder -> Checkpoint, with the released model's sampling values for its task."""
    experts = [name for name in parts if name.startswith("denoiser")]
    task = find_task(folder, parts[experts[0]].config, parts["vae"].config.stride, experts)
    boundary = (boundary or BOUNDARY.get(task)) if len(experts) == 2 else None
    if len(experts) == 2 and boundary is None:
        raise ValueError(f"{folder}: no boundary is known between two experts of {task}: convert each, then write it into config.json")
    return Checkpoint(folder, task, boundary, dict(SAMPLING[task]), tokenizer, parts)


WAV2VEC = "wav2vec2-large-xlsr-53-english"


def official_files(folder, first):
    """Where an official folder keeps VAE, text encoder, tokenizer and audio encoder.  first: config.json of its (first) denoiser"""
    vaes = [folder / "Wan2.1_VAE.pth", folder / "Wan2.2_VAE.pth"]
    audio_files = [folder / WAV2VEC / "model.safetensors", folder / WAV2VEC / "pytorch_model.bin"]
    files = {"vae": next((path for path in vaes if path.is_file()), vaes[first.get("out_dim", 16) == 48]),
             "text": folder / "models_t5_umt5-xxl-enc-bf16.pth"}
    if first.get("model_type") == "s2v" or (folder / WAV2VEC).is_dir():
        files["audio"] = next((path for path in audio_files if path.is_file()), audio_files[0])
    return files


def open_official(folder, singles):
    """Wan-AI/Wan2.2-S2V-14B, -T2V-A14B, -I2V-A14B or -TI2V-5B as published."""
    roots = {"denoiser": folder}
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        roots = {"denoiser_high": folder / "high_noise_model", "denoiser_low": folder / "low_noise_model"}
    fields = {name: read_json(root / "config.json") if (root / "config.json").is_file() else {} for name, root in roots.items()}
    files = official_files(folder, next(iter(fields.values())))
    given = place(singles, dict.fromkeys(roots, "denoiser") | {kind: kind for kind in files}, folder)
    tokenizer, stem = folder / "google" / "umt5-xxl" / "tokenizer.json", "diffusion_pytorch_model"
    denoisers = {name: shards(root, stem) for name, root in roots.items() if name not in given}
    what = {"vae": "VAE", "text": "text encoder", "audio": "audio encoder"}
    require(folder, [(root / "config.json", f"config of {name}") for name, root in roots.items()]
            + [(file, name) for name, group in denoisers.items() for file in group]
            + [(file, what[name]) for name, file in files.items() if name not in given] + [(tokenizer, "tokenizer")]
            + ([(folder / WAV2VEC / "config.json", "its config")] if "audio" in files else []))
    parts = {}

    def add(name, kind, config, entries, what):
        rules = names.rules_for(kind, config, entries)
        parts[name] = Part(kind, config, match(entries, rules, kind, config, None if name in given else what))

    for name, root in roots.items():
        entries = given.get(name) or open_shards(denoisers[name], root, stem)
        config = names.denoiser_config(fields[name], entries, root / "config.json")
        add(name, "denoiser", config, entries, "an S2V denoiser" if config.audio_dim else "a T2V, I2V or TI2V denoiser")
    for name, file in files.items():
        entries = given.get(name) or open_tensors([file])
        if name == "vae":
            add(name, name, names.vae_config(entries, file), entries, f"the {file.name[:6]} VAE")
        elif name == "text":
            add(name, name, names.text_config(entries), entries, "the umT5 encoder")
        else:
            path = file.with_name("config.json")
            add(name, name, names.audio_config(read_json(path), path), entries, "a wav2vec2 encoder")
    return assemble(folder, parts, tokenizer)


def open_diffusers(folder, singles):
    """The same models as diffusers stores them: transformer (high noise), transformer_2 (low noise), vae, text_encoder, tokenizer."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    roots = {"denoiser": folder / "transformer"}
    if (folder / "transformer_2").is_dir():
        roots = {"denoiser_high": folder / "transformer", "denoiser_low": folder / "transformer_2"}
    roots |= {"vae": folder / "vae", "text": folder / "text_encoder"}
    given = place(singles, {name: name.split("_")[0] for name in roots}, folder)
    stems = {name: "model" if name == "text" else "diffusion_pytorch_model" for name in roots}
    files = {name: shards(root, stems[name]) for name, root in roots.items() if name not in given}
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    require(folder, [(root / "config.json", f"config of {name}") for name, root in roots.items()]
            + [(file, name) for name, group in files.items() for file in group] + [(tokenizer, "tokenizer")])

    parts = {}
    for name, root in roots.items():
        kind, path, fields = name.split("_")[0], root / "config.json", read_json(root / "config.json")
        entries = given.get(name) or open_shards(files[name], root, stems[name])
        if kind == "vae":
            config, what = names.vae_config_diffusers(fields, path), "a diffusers-layout VAE"
        elif kind == "text":
            config, what = names.text_config(entries), "a transformers-layout umT5 encoder"
        else:
            config, what = names.denoiser_config_diffusers(fields, path), "a diffusers-layout denoiser"
        rules = names.rules_for(kind, config, entries)
        parts[name] = Part(kind, config, match(entries, rules, kind, config, None if name in given else what))
    return assemble(folder, parts, tokenizer, index.get("boundary_ratio"))
