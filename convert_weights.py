"""Checkpoints of other layouts -> ours, and back.

    python convert_weights.py SRC DST                  official or diffusers folder -> config.json, *.safetensors, tokenizer.json
    python convert_weights.py SRC FILE ... DST         the same with single files in place of the components that they hold
    python convert_weights.py SRC DST --fp8            the denoiser's large matrices in float8, as fast/fp8.py multiplies them
    python convert_weights.py SRC DST --lora FILE:0.8  a LoRA merged into the denoiser
    python convert_weights.py SRC DST --to diffusers   write another layout
    python convert_weights.py SRC --check              key and parameter counts of every component; writes nothing

Tensors go from file to file one by one: a model of any size needs the memory of its largest few tensors. DST appears when it is complete.
docs/formats.md lists the layouts.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from fast import fp8
from fast.probe import any_terminal, private_memory
from formats import lora, names
from formats.checkpoints import DTYPE_NAMES, Entry, change_denoisers, open_checkpoint, parameter_dtype
from formats.foreign import FORMAT

# ---------------------------------------------------------------------------------------------------- what is done to the tensors

def cast(part, dtype):
    """A Part's tensors, to be written in `dtype` where the network runs in it; what needs more precision keeps what it has."""
    def narrow(name, entry):
        wanted = parameter_dtype(part.kind, name, entry, dtype)
        return dataclasses.replace(entry, dtype=wanted) if wanted.itemsize < entry.dtype.itemsize else entry
    return {name: narrow(name, entry) for name, entry in part.tensors.items()} if part.kind in ("denoiser", "text") else part.tensors


def merge(checkpoint, loras, device, without_image=False):
    """The Checkpoint with LoRAs added.  loras ["[high=|low=]FILE[:SCALE]", ...], as on the command line, like without_image"""
    changes, said = {name: [] for name in checkpoint.experts}, []
    for given in loras:
        expert, path, scale = re.fullmatch(r"(?:(high|low)=)?(.*?)(?::([-+]?[\d.]+(?:[eE][-+]?\d+)?))?", given).groups()
        wanted = [name for name in checkpoint.experts if expert is None or name == f"denoiser_{expert}"]
        if not wanted:
            raise ValueError(f"--lora {given}: {checkpoint.task} has one denoiser: leave out {expert}=")
        config = checkpoint.configs["denoiser"]
        change, *words = lora.read_lora(path, config, float(scale or 1), without_image)
        said.append(words)
        for name in wanted:
            changes[name].append(change)
    for strength, warning in said:
        print(strength)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    return change_denoisers(checkpoint, lambda name, part: lora.merged(part.tensors, changes[name], device))


def report(checkpoint, device):
    """What float8 changes in each layer of the denoiser, given random activations, as text."""
    texts = []
    for name in checkpoint.experts:
        layers = {key: entry for key, entry in checkpoint.parts[name].tensors.items() if fp8.is_cast(key) and entry.dtype != fp8.E4M3}
        if not layers:
            raise ValueError(f"{checkpoint.folder}: {name} is float8 already, there is nothing to compare it with: take the bf16 files")
        errors = [fp8.layer_error(key, entry.read().to(device)) for key, entry in tqdm(layers.items(), name, leave=False, disable=None)]
        texts.append(f"{name}\n{fp8.report(errors)}")
    return "\n".join(texts)


# -------------------------------------------------------------------------------------------------------------------- writing

def write_safetensors(path, tensors, progress=lambda nbytes: None):
    """Write tensors one at a time, the next being read meanwhile.

    tensors  {name: Entry}; an entry's dtype is the one written
    """
    # A tensor begins at a multiple of its element size: first those of whole 8 bytes, then the others by element size.
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize if item[1].nbytes % 8 else -8)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, entry in order:
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def fetch(entry):
        return entry.read().to("cpu", entry.dtype).contiguous().flatten().view(torch.uint8).numpy()

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(struct.pack("<Q", len(head)) + head)
        coming = [pool.submit(fetch, entry) for _, entry in order[:1]]
        for _, entry in order[1:]:
            ready = coming.pop().result()
            coming.append(pool.submit(fetch, entry))
            file.write(ready)
            progress(len(ready))
        for last in coming:
            file.write(last.result())
            progress(len(last.result()))


def write_json(path, fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def write_parts(folder, files):
    """Several components with one progress bar.  files {path in the folder: {name: Entry}}"""
    total = sum(entry.nbytes for tensors in files.values() for entry in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=total < 2**28) as bar:
        most = 0.0

        def progress(nbytes):
            nonlocal most
            most = max(most, private_memory())
            bar.set_postfix_str(f"host memory {most:.1f} GiB without mapped files", refresh=False)
            bar.update(nbytes)
        for path, tensors in files.items():
            bar.set_description(str(path))
            write_safetensors(folder / path, tensors, progress)


def compare(written, checkpoint):
    """What was written, opened again, holds the same parameters in the same dtypes."""
    for name, part in written.parts.items():
        for key, entry in checkpoint.parts[name].tensors.items():
            assert part.tensors[key].dtype == entry.dtype, f"{name} {key} was written as {part.tensors[key].dtype}"


def write_checkpoint(checkpoint, folder):
    """A Checkpoint -> our layout in an existing folder, which is opened again to check what was written."""
    fields = {"task": checkpoint.task, "boundary": checkpoint.boundary, "sampling": checkpoint.sampling, "note": checkpoint.note}
    write_json(folder / "config.json", fields | {kind: dataclasses.asdict(config) for kind, config in checkpoint.configs.items()})
    if checkpoint.tokenizer != folder / "tokenizer.json":
        shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
    write_parts(folder, {f"{name}.safetensors": part.tensors for name, part in checkpoint.parts.items()})
    compare(open_checkpoint(folder), checkpoint)


def diffusers_fields(kind, config):
    """config.json of a component as diffusers or transformers writes it."""
    table = {"denoiser": names.FIELDS_DIFFUSERS, "vae": names.FIELDS_VAE_DIFFUSERS, "text": names.FIELDS_TEXT}[kind]
    fields = {theirs: getattr(config, ours) for theirs, ours in table.items()}
    if kind == "denoiser":
        fields |= {name: value for name, value in names.SCOPE_DIFFUSERS.items() if value is not None}
        fields |= {"attention_head_dim": config.dim // config.n_head, "rope_max_seq_len": 1024}
        return {"_class_name": "WanTransformer3DModel"} | fields
    if kind == "text":
        return {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"} | fields | {
            "d_kv": config.dim_attn // config.n_head, "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False}
    channels = 3 * config.patch ** 2
    residual = {"decoder_base_dim": config.dec_dim, "is_residual": True, "patch_size": config.patch, "in_channels": channels,
                "out_channels": channels, "scale_factor_spatial": config.stride[1], "scale_factor_temporal": config.stride[0],
                "clip_output": False}
    return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0} | fields | (residual if config.shortcuts else {})


def diffusers_pipeline(task, boundary, shift):
    """{file: JSON fields} that a diffusers folder has beside its components."""
    denoiser = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanImageToVideoPipeline" if task == "i2v-A14B" else "WanPipeline", "boundary_ratio": boundary,
             "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "transformer": denoiser,
             "transformer_2": [None, None] if boundary is None else denoiser, "vae": ["diffusers", "AutoencoderKLWan"]}
    index |= {"expand_timesteps": True} if task == "ti2v-5B" else {}
    return {"model_index.json": index,
            "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2,
                                                "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift},
            # not the class of T5, which makes its own tokenizer out of the words alone and loses the bytes of rare letters
            "tokenizer/tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>",
                                                "unk_token": "<unk>", "model_max_length": 512}}


def write_diffusers(checkpoint, folder):
    """A Checkpoint -> the folder of a WanPipeline or WanImageToVideoPipeline."""
    if checkpoint.task == "s2v-14B":
        raise ValueError("diffusers has no class for S2V: --to diffusers takes T2V, I2V and TI2V")
    roots = {"denoiser": "transformer", "denoiser_high": "transformer", "denoiser_low": "transformer_2", "vae": "vae",
             "text": "text_encoder"}
    files = {}
    for name, part in checkpoint.parts.items():
        if any(entry.dtype == fp8.E4M3 for entry in part.tensors.values()):
            raise ValueError(f"{checkpoint.folder}: {name} is float8, for which diffusers has no layout: convert from the bf16 files")
        stem = "model" if name == "text" else "diffusion_pytorch_model"
        files[Path(roots[name]) / f"{stem}.safetensors"] = renamed(part, names.diffusers_rules(part.kind, part.config))
        write_json(folder / roots[name] / "config.json", diffusers_fields(part.kind, part.config))
    for file, fields in diffusers_pipeline(checkpoint.task, checkpoint.boundary, checkpoint.sampling["shift"]).items():
        write_json(folder / file, fields)
    shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer" / "tokenizer.json")
    write_parts(folder, files)
    compare(open_checkpoint(folder), checkpoint)


COMFY_FP8 = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'   # activations stay as they are: float8 ones are 2.6% off


def one_scale(weight, scale):
    """A float8 Entry and the Entry of its scales per row -> the same with one scale for the whole matrix, a single number as ComfyUI has it."""
    def read():
        rows, x = scale.read(), weight.read()
        return (x, rows) if bool((rows == rows[0]).all()) else fp8.quantize_whole(fp8.dequantize(x, rows))
    return (dataclasses.replace(weight, read=lambda: read()[0]),
            dataclasses.replace(scale, shape=(), read=lambda: read()[1][0, 0].clone()))


def write_comfy(checkpoint, folder):
    """A Checkpoint's denoisers and VAE -> single files for ComfyUI. Its text and audio encoders come with a tokenizer of their own."""
    files = {}
    for name, part in checkpoint.parts.items():
        if part.kind in ("denoiser", "vae"):
            tensors = renamed(part, names.official_rules(part.kind, part.config))
            for key in [key for key in tensors if key.endswith(".weight_scale")]:
                form, weight = torch.tensor(list(COMFY_FP8), dtype=torch.uint8), key.removesuffix("_scale")
                tensors[weight], tensors[key] = one_scale(tensors[weight], tensors[key])
                tensors[f"{weight.removesuffix('weight')}{FORMAT}"] = Entry(Path(name), tuple(form.shape), form.dtype, partial(torch.clone, form))
            files[Path("vae" if part.kind == "vae" else "diffusion_models") / f"{name}.safetensors"] = tensors
    write_parts(folder, files)
    compare(open_checkpoint(checkpoint.folder, [folder / path for path in files]), checkpoint)


def renamed(part, rules):
    """{their name: Entry} of a Part; a scale keeps its place beside its weight."""
    theirs = names.inverse(rules)
    return {names.rename(ours.removesuffix("_scale"), theirs) + "_scale" * ours.endswith(".weight_scale"): entry
            for ours, entry in part.tensors.items()}


WRITERS = {"ours": write_checkpoint, "comfy": write_comfy, "diffusers": write_diffusers}


def new_folder(target, nbytes, fill):
    """Make a folder completely or not at all: `fill(temporary folder)`, then rename.  ValueError if there is no room for nbytes."""
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: give a new folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + 2**20:
        raise ValueError(f"{target.parent} has {free / 2**30:.2f} GiB free, wanted {nbytes / 2**30:.2f} GiB: give another folder")
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        fill(temporary)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(checkpoint, dtype=None, loras=(), device="cpu", without_image=False):
    """The Checkpoint with LoRAs merged, then cast."""
    checkpoint = merge(checkpoint, loras, device, without_image) if loras else checkpoint
    if dtype is None:
        return checkpoint
    parts = {name: dataclasses.replace(part, tensors=cast(part, dtype)) for name, part in checkpoint.parts.items()}
    return dataclasses.replace(checkpoint, parts=parts)


def save(checkpoint, target, layout="ours", quantize=False, device="cpu"):
    """Write a Checkpoint into a new folder.

    layout  "ours", "comfy" or "diffusers"        quantize  the denoiser's large matrices to float8, on `device`
    raises  ValueError for anything wrong with source or target; nothing is left behind then
    """
    if quantize:
        cast_weight = fp8.quantize_whole if layout == "comfy" else fp8.quantize_weight
        checkpoint = change_denoisers(checkpoint, lambda _, part: fp8.quantized(part.tensors, device, quantize=cast_weight))
    nbytes = sum(part.nbytes for part in checkpoint.parts.values()) + checkpoint.tokenizer.stat().st_size
    new_folder(target, nbytes, partial(WRITERS[layout], checkpoint))


def convert(source, target, dtype=None):
    """Write a checkpoint folder of any known layout in ours.

    dtype   torch.bfloat16 to store the large linear layers of denoiser and text encoder so; None keeps what the files have
    raises  ValueError for anything wrong with source or target; nothing is left behind then
    """
    save(prepare(open_checkpoint(source), dtype), target)


def summary(checkpoint):
    """Key and parameter counts per component, as text."""
    lines = [f"{checkpoint.folder}: {checkpoint.task}" + ("" if checkpoint.boundary is None else f", boundary {checkpoint.boundary}")]
    for name, part in checkpoint.parts.items():
        dtypes = ", ".join(sorted({DTYPE_NAMES[entry.dtype] for entry in part.tensors.values()}))
        lines.append(f"{name:14s} {len(part.tensors):5d} tensors {part.parameters:15,d} parameters {part.nbytes / 2**30:7.3f} GiB {dtypes}")
    return "\n".join(lines)


def arguments(argv):
    """The command line -> parsed arguments with source, files and target, the latter None if nothing is to be written."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint to our layout, or from it.")
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="SRC [FILE ...] DST. SRC: folder in the official, diffusers or converted layout. FILE: single files, of "
                             "ComfyUI, kijai or LightX2V say, that take the place of the components they hold (SRC may then lack "
                             "them); of two denoisers the high-noise expert first. DST: new folder; it appears only when it is complete")
    parser.add_argument("--check", action="store_true", help="print what SRC [FILE ...] hold and write nothing")
    parser.add_argument("--dtype", choices=["keep", "bf16"], default="keep",
                        help="of the denoiser's and the text encoder's linear layers; bf16 halves float32 files (default: keep)")
    parser.add_argument("--fp8", action="store_true",
                        help="store the denoiser's large matrices in float8, with one scale per row (--to comfy: per matrix)")
    parser.add_argument("--report", action="store_true", help="print the errors that float8 brings into each layer, the worst ten; "
                                                              "without DST nothing is written")
    parser.add_argument("--lora", action="append", default=[], metavar="[high=|low=]FILE[:SCALE]",
                        help="merge a LoRA into the denoiser, or into one of two experts; may be repeated. SCALE multiplies the strength "
                             "that the file names; what is used is said")
    parser.add_argument("--without-image-keys", action="store_true",
                        help="leave out of a Wan2.1-I2V LoRA the keys of its attention to the picture, which Wan2.2 lacks")
    parser.add_argument("--to", choices=list(WRITERS), default="ours",
                        help="layout of DST; comfy: denoisers and VAE as single files; diffusers: not for S2V (default: ours)")
    args = parser.parse_args(argv)
    write = not args.check and not (args.report and len(args.paths) == 1)
    if write and len(args.paths) < 2:
        parser.error("give a target folder, or --check without one")
    args.source, *args.files = args.paths[:-1] if write else args.paths
    args.target = args.paths[-1] if write else None
    if args.target is None and (args.fp8 or args.to != "ours"):
        parser.error("--fp8 and --to need a target folder")
    return args


def main(argv=None):
    any_terminal()
    args = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                        # so that half-written folders go then, too
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        checkpoint = prepare(open_checkpoint(args.source, args.files), torch.bfloat16 if args.dtype == "bf16" else None, args.lora, device,
                             args.without_image_keys)
        errors = report(checkpoint, device) if args.report else None
        if args.target is not None:
            save(checkpoint, args.target, args.to, args.fp8, device)
            print(f"wrote {args.target}")
        if args.target is None or args.to != "comfy":
            print(summary(checkpoint if args.target is None else open_checkpoint(args.target)))
        if errors:
            print(errors)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:            # RuntimeError: out of memory, a damaged file
        print(f"error: {next(iter(str(error).splitlines()), 'the memory of this machine is full')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
