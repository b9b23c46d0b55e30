"""Folders and files of other layouts -> ours, without writing anything: official and diffusers folders, and single files as ComfyUI, kijai
and LightX2V publish them. names.py has their names; checkpoints.py compares what comes out with the network.

A float8 tensor X.weight stands for float8 value x scale. The scale is X.scale_weight or X.weight_scale: one number, or one per row;
without one it is 1. Where our layers multiply in float8 the bytes are kept and the scale becomes X.weight_scale (out, 1); any other float8
tensor is multiplied out to bfloat16.
"""
import math
import pickle
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fast.fp8 import E4M3
from formats import checks, gguf_file, names
from formats.checkpoints import BOUNDARY, LFS, SAMPLING, Checkpoint, Entry, Part, match, may_be_fp8, open_safetensors, parameter_shapes, read_json
from formats.checks import require

WAV2VEC = "wav2vec2-large-xlsr-53-english"
SCALES = ("scale_weight", "weight_scale")                        # ComfyUI until 2025 and kijai; ComfyUI since, LightX2V, ours
IGNORED = ("scale_input", "input_scale", "scaled_fp8")           # scales of activations, which are scaled per token here; a mark
FORMAT = "comfy_quant"                                           # how ComfyUI stored a layer: JSON in bytes, {"format": ...}

# -------------------------------------------------------------------------------------------------------------- reading files


def by_its_first_bytes(path):
    """What is wrong with a file that cannot be opened as one of tensors, and what to do; None for nothing known."""
    head = path.open("rb").read(200).lstrip().lower() if path.is_file() else b""
    if head.startswith(b"gguf"):
        return f"{path} is a GGUF file, wanted a safetensors or pth file: take that of the same model"
    if head.startswith(LFS):
        return f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder, or download the file"
    return f"{path} is a web page, not the file: download it again" if head.startswith((b"<!doctype html", b"<html")) else None


def open_pickle(path):
    """{name: Entry} of one torch.save file, mapped into memory. Only tensors and plain containers are unpickled, nothing is executed.

    raises  ValueError for anything else: code, a damaged file, the format from before PyTorch 1.6
    """
    checks.check_pickle(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, MemoryError) as error:
        raise ValueError(by_its_first_bytes(path) or f"{path} is not a whole file of tensors alone ({type(error).__name__}): "
                         "refused, nothing in it was executed; download it again") from error
    nested = [name for name, value in tensors.items() if isinstance(value, dict)] if isinstance(tensors, dict) else []
    if nested:
        raise ValueError(f"{path} is a training checkpoint, its tensors are nested in {' or '.join(map(repr, nested))}: take one out, with "
                         f"torch.save(torch.load(FILE, weights_only=True)[{nested[0]!r}], NEW)")
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: wanted a dictionary name -> tensor, got {type(tensors).__name__} with other values in it")
    checks.check_unpacked(path, tensors)
    return {name: Entry(path, tuple(t.shape), t.dtype, partial(Tensor.detach, t)) for name, t in tensors.items()}


def open_tensors(paths):
    """{name: Entry} of all files of one component. A name may stand in one file only."""
    entries = {}
    for path in paths:
        open_file = gguf_file.open_gguf if gguf_file.is_gguf(path) else open_safetensors if path.suffix == ".safetensors" else open_pickle
        for name, entry in open_file(path).items():
            if name in entries:
                raise ValueError(f"{name} stands in both {entries[name].file} and {path}")
            entries[name] = entry
    return entries


def read_index(path):
    """An index of shards -> the names of their files"""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(
            isinstance(file, str) and Path(file).name not in ("", "..") and "\0" not in file for file in names.values()):
        raise ValueError(f"{path}: wanted weight_map, the name of a file for each tensor: download the index again")
    return names.values()


def shards(folder, stem):
    """The files that hold one component's tensors: those its index names, or the single one; without any, the name of the one wanted.

    Safetensors come before .bin, plain names before a variant such as STEM.fp16.safetensors.
    raises  ValueError for several variants of which none is plain
    """
    for start, ending in ((stem, "safetensors"), ("pytorch_model" if stem == "model" else stem, "bin")):
        name = re.compile(rf"{start}(?:\.(\w+))?\.{ending}|{start}\.{ending}\.index(?:\.(\w+))?\.json")
        found = {}                                                   # {variant: path}, an index before a single file
        for path in sorted(folder.glob(f"{start}.*"), key=lambda path: path.suffix == ".json"):
            if match := name.fullmatch(path.name):
                found[match[1] or match[2] or ""] = path
        if len(found) > 1 and "" not in found:
            raise ValueError(f"{folder} holds several variants of {start}: {', '.join(sorted(found))}: keep the files of one")
        if found:
            path = found.get("") or next(iter(found.values()))
            weights = read_index(path) if path.suffix == ".json" else [path.name]
            return sorted({folder / Path(file).name for file in weights})
    return [folder / f"{stem}.safetensors"]


# -------------------------------------------------------------------------------------------------------- names and float8 scales

def split_scales(entries):
    """Tell float8 scales from the other tensors.  {their name: Entry} -> the others, {their name of a weight: scale Entry}, problems"""
    plain, scales, problems = {}, {}, []
    for name, entry in entries.items():
        stem, _, last = name.rpartition(".")
        if last == FORMAT and entry.dtype == torch.uint8 and b'"float8_e4m3fn"' not in (form := bytes(entry.read().flatten()[:200].tolist())):
            problems.append(f"{entry.file}: {stem} is stored as {form[:80]}, wanted float8_e4m3fn: take the bf16 or fp8_scaled file")
        elif last in SCALES and f"{stem}.weight" in scales:
            problems.append(f"{entry.file}: {stem}.weight has two scales")
        elif last in SCALES:
            scales[f"{stem}.weight"] = entry
        elif last not in (FORMAT, *IGNORED):
            plain[name] = entry
    for name, scale in scales.items():
        weight = plain.get(name)
        if weight is None or weight.dtype != E4M3 or not weight.shape:
            problems.append(f"{scale.file}: {name} has a scale, wanted float8, got {'nothing' if weight is None else weight.dtype}")
        elif scale.shape not in ((), (1,), weight.shape[:1], (weight.shape[0], 1)):
            problems.append(f"{scale.file}: the scale of {name} has shape {scale.shape}, wanted one number or {weight.shape[0]}, one a row")
    return plain, scales, problems


def row_scales(weight, scale):
    """A float8 Entry and the Entry of its scale, or None -> one scale per row (out, 1) float32"""
    scale = torch.ones(()) if scale is None else scale.read().float()
    return scale.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()


def multiplied(weight, scale, rows=4096):
    """A float8 Entry and the Entry of its scale -> bfloat16, some rows at a time: in float32 umT5's embedding would take 4 GB."""
    scales = row_scales(weight, scale).view(-1, *[1] * (len(weight.shape) - 1))
    return torch.cat([(x.float() * s).bfloat16() for x, s in zip(weight.read().split(rows), scales.split(rows))])


def in_shape(entry, shape):
    """A tensor of a GGUF file, whose programs know four axes at most and drop those of length 1, in the shape of its parameter."""
    if shape is None or math.prod(shape) != math.prod(entry.shape) or len(shape) == len(entry.shape):
        return entry
    return replace(entry, shape=shape, read=lambda: entry.read().view(shape))


def translate(entries, rules, kind, config):
    """The tensors of one component under our names, with our float8 scales.

    entries  {their name: Entry}        rules  their name table
    returns  {our name: Entry}, {our name: their name} for messages, [problem, ...]. An unknown key is kept, as "?" and its name.
    raises   ValueError if these are the tensors of another component
    """
    found = names.layout(entries)[0]
    if found not in (kind, None):
        raise ValueError(f"{next(iter(entries.values())).file} holds the component {found}, wanted {kind}")
    plain, scales, problems = split_scales(entries)
    out, called = {}, {}
    for name, entry in plain.items():
        ours = names.rename(name, rules)
        if ours is None:
            continue
        ours = ours or f"?{name}"
        if ours in out:
            problems.append(f"{entry.file}: {name} and {called[ours]} both lead to {ours}")
        called[ours] = name
        if entry.dtype == E4M3 and may_be_fp8(kind, ours):
            out[f"{ours}_scale"] = Entry(entry.file, (*entry.shape[:1], 1), torch.float32, partial(row_scales, entry, scales.get(name)))
        elif entry.file.suffix == ".gguf":
            entry = in_shape(entry, parameter_shapes(kind, config).get(ours))
        elif entry.dtype == E4M3:
            entry = replace(entry, dtype=torch.bfloat16, read=partial(multiplied, entry, scales.get(name)))
        out[ours] = entry
    theirs = names.inverse(rules)
    missing = [ours for ours in parameter_shapes(kind, config) if ours not in out]
    return out, called | {ours: names.rename(ours, theirs) or ours for ours in missing}, problems


# --------------------------------------------------------------------------------------------------------------- single files

def open_singles(paths):
    """Files with one component each -> {kind: [{their name: Entry}, ...]}, in order."""
    singles = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"wanted a file with one component, got {path}, which is {'a folder' if path.is_dir() else 'not there'}")
        entries = {names.without_prefix(name): entry for name, entry in open_tensors([path]).items()}
        kind = names.layout(entries)[0]
        if any(re.search("lora_|dora_|hada_|lokr_", name) for name in entries):
            raise ValueError(f"{path} is a LoRA: give it with --lora")
        if kind is None:
            raise ValueError(f"{path} holds an unknown model: wanted a denoiser, a VAE, umT5 or wav2vec2")
        singles.setdefault(kind, []).append(entries)
    return singles


def assign(singles, kinds, folder):
    """Which component each single file replaces.  kinds {component: kind} of the folder -> {component: {their name: Entry}}"""
    out = {}
    for kind, found in singles.items():
        taken = [name for name, of in kinds.items() if of == kind]
        if len(found) != len(taken):
            order = ", the high-noise expert first" if len(taken) == 2 else ""
            raise ValueError(f"{folder} wants {len(taken)} file{'s' * (len(taken) != 1)} in place of its {kind}{order}; got {len(found)}")
        out |= zip(taken, found)
    return out


# -------------------------------------------------------------------------------------------------------------------- folders

@dataclass(frozen=True)
class Source:
    """Where a foreign folder keeps one component."""
    kind: str
    files: list[Path]
    config: Path | None = None          # None: the shapes of the tensors tell the sizes


def official_sources(folder):
    """{component: Source} and the tokenizer of Wan-AI/Wan2.2-S2V-14B, -T2V-A14B, -I2V-A14B or -TI2V-5B as published."""
    noise = {f"denoiser_{side}": folder / f"{side}_noise_model" for side in ("high", "low")}
    roots = noise if any(root.is_dir() for root in noise.values()) else {"denoiser": folder}
    sources = {name: Source("denoiser", shards(root, "diffusion_pytorch_model"), root / "config.json") for name, root in roots.items()}
    first = next(iter(roots.values())) / "config.json"
    fields = read_json(first) if first.is_file() else {}
    vaes = [folder / "Wan2.1_VAE.pth", folder / "Wan2.2_VAE.pth"]
    sources["vae"] = Source("vae", [next((path for path in vaes if path.is_file()), vaes[fields.get("out_dim") == 48])])
    sources["text"] = Source("text", [folder / "models_t5_umt5-xxl-enc-bf16.pth"])
    if fields.get("model_type") == "s2v":
        sources["audio"] = Source("audio", [folder / WAV2VEC / "model.safetensors"], folder / WAV2VEC / "config.json")
    return sources, folder / "google" / "umt5-xxl" / "tokenizer.json"


def diffusers_sources(folder):
    """The same of a diffusers folder: transformer (high noise), transformer_2 (low noise), vae, text_encoder, tokenizer.

    FastVideo's Wan2.2-S2V-14B-Diffusers has audio_encoder beside them, and the official names and config in transformer.
    """
    roots = {"denoiser": "transformer"}
    if (folder / "transformer_2").is_dir():
        roots = {"denoiser_high": "transformer", "denoiser_low": "transformer_2"}
    sources = {name: Source("denoiser", shards(folder / root, "diffusion_pytorch_model"), folder / root / "config.json")
               for name, root in roots.items()}
    sources["vae"] = Source("vae", shards(folder / "vae", "diffusion_pytorch_model"), folder / "vae" / "config.json")
    sources["text"] = Source("text", shards(folder / "text_encoder", "model"))
    first = sources[next(iter(roots))].config
    if (folder / "audio_encoder").is_dir() or first.is_file() and read_json(first).get("model_type") == "s2v":
        sources["audio"] = Source("audio", shards(folder / "audio_encoder", "model"), folder / "audio_encoder" / "config.json")
    return sources, folder / "tokenizer" / "tokenizer.json"


def gguf_singles(folder, sources, given):
    """The GGUF files in a folder in place of files it lacks, as from `open_singles`; a name tells the low-noise expert.  given  kinds"""
    lacking = {source.kind for source in sources.values() if not all(file.is_file() for file in source.files)} - {*given}
    found = open_singles(sorted(folder.glob("*.gguf"), key=lambda path: ("low" in path.name.lower(), path.name))) if lacking else {}
    return {kind: entries for kind, entries in found.items() if kind in lacking}


def open_folder(folder, singles):
    """An official or diffusers folder -> Checkpoint with the released sampling values of its task.  singles  from `open_singles`"""
    boundary = None
    if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        sources, tokenizer = diffusers_sources(folder)
        boundary = read_json(folder / "model_index.json").get("boundary_ratio") if (folder / "model_index.json").is_file() else None
    elif any(any(folder.glob(name)) for name in ("config.json", "high_noise_model", "low_noise_model", "diffusion_pytorch_model*", "*.pth")):
        sources, tokenizer = official_sources(folder)
    else:
        raise ValueError(f"{folder} is no checkpoint: wanted a converted folder (config.json, *.safetensors), an official one (config.json "
                         f"or high_noise_model, *_VAE.pth, models_t5_*.pth) or a diffusers one (model_index.json)")
    singles = gguf_singles(folder, sources, singles) | singles
    given = assign(singles, {name: source.kind for name, source in sources.items()}, folder)
    require(folder, [(file, name) for name, source in sources.items() if name not in given for file in source.files]
            + [(source.config, f"config of {name}") for name, source in sources.items() if source.config] + [(tokenizer, "tokenizer")])
    parts = {}
    for name, source in sources.items():
        entries, path = given.get(name) or open_tensors(source.files), source.config or source.files[0]
        config = names.read_config(source.kind, read_json(path) if source.config else None, entries, path)
        parts[name] = Part(source.kind, config, match(entries, names.rules_for(source.kind, config, entries), source.kind, config))
    task = find_task(folder, parts)
    boundary = (boundary or BOUNDARY.get(task)) if "denoiser_high" in parts else None
    if "denoiser_high" in parts and boundary is None:
        raise ValueError(f"{folder}: no boundary is known between two experts of {task}: convert each, then write it into config.json")
    return Checkpoint(folder, task, boundary, dict(SAMPLING[task]), tokenizer, parts)


def find_task(folder, parts):
    """The task that the networks of a folder were trained for."""
    denoiser = next(iter(parts.values())).config
    if denoiser.audio_dim:
        return "s2v-14B"
    if "denoiser_high" in parts:
        return "i2v-A14B" if denoiser.in_dim > denoiser.out_dim else "t2v-A14B"
    if parts["vae"].config.shortcuts:
        return "ti2v-5B"
    raise ValueError(f"{folder} holds a single denoiser with the Wan2.1 VAE and no audio layers: wanted S2V, T2V-A14B or I2V-A14B with "
                     f"high_noise_model and low_noise_model, or TI2V-5B; Wan2.1 models and single experts are not supported")
