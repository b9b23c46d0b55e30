"""Checkpoint folders of other layouts -> our networks: the only file that knows foreign names.

    python convert_weights.py SRC DST         official or diffusers folder -> config.json, *.safetensors, tokenizer.json
    python convert_weights.py SRC --check     key and parameter counts of every component; writes nothing

A component (denoiser, vae, text, audio) is described by one table, their name -> our name. Matching is strict both ways: every key of
the file is used once, every parameter of the network filled, every shape compared. `open_checkpoint` runs the same match on headers
alone, so a folder can be used as it is; a tensor is read when it is needed and never twice.

Source  Wan-Video/Wan2.2@42bf4cf wan/configs/*.py and each from_pretrained; huggingface/diffusers WanTransformer3DModel, AutoencoderKLWan
"""
import argparse
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import audio
import fp8
import model
import offload
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

# ---------------------------------------------------------------------------------------------------------------- name tables
# (their name, our name): `#` is a number, `*` anything, in the same order on both sides; what stands in [] may be absent.
# None: known and not needed. The first match wins, in both directions, so special cases stand above general ones.

DENOISER = [
    ("patch_embedding.*", "patch.*"),
    ("text_embedding.*", "text.*"),
    ("time_embedding.*", "time.*"),
    ("time_projection.1.*", "time_mod.*"),
    ("blocks.#.norm3.*", "blocks.#.cross_norm.*"),
    ("blocks.#.*", "blocks.#.*"),
    ("head.modulation", "head.modulation"),
    ("head.head.*", "head.linear.*"),
    ("cond_encoder.*", "pose.*"),
    ("trainable_cond_mask.weight", "token_kind.weight"),
    ("frame_packer.proj.*", "motion.near.*"),
    ("frame_packer.proj_2x.*", "motion.mid.*"),
    ("frame_packer.proj_4x.*", "motion.far.*"),
    ("casual_audio_encoder.weights", "audio.mix"),
    ("casual_audio_encoder.encoder.padding_tokens", "audio.pad_token"),
    ("casual_audio_encoder.encoder.final_linear.*", "audio.out.*"),
    ("casual_audio_encoder.encoder.conv1_*.conv.*", "audio.conv_*.*"),
    ("casual_audio_encoder.encoder.conv#.conv.*", "audio.conv#.*"),
]
DENOISER_DIFFUSERS = [
    ("patch_embedding.*", "patch.*"),
    ("condition_embedder.text_embedder.linear_1.*", "text.0.*"),
    ("condition_embedder.text_embedder.linear_2.*", "text.2.*"),
    ("condition_embedder.time_embedder.linear_1.*", "time.0.*"),
    ("condition_embedder.time_embedder.linear_2.*", "time.2.*"),
    ("condition_embedder.time_proj.*", "time_mod.*"),
    ("blocks.#.scale_shift_table", "blocks.#.modulation"),
    ("blocks.#.norm2.*", "blocks.#.cross_norm.*"),
    ("blocks.#.attn1.to_out.0.*", "blocks.#.self_attn.o.*"),
    ("blocks.#.attn1.norm_*", "blocks.#.self_attn.norm_*"),
    ("blocks.#.attn1.to_*.*", "blocks.#.self_attn.*.*"),
    ("blocks.#.attn2.to_out.0.*", "blocks.#.cross_attn.o.*"),
    ("blocks.#.attn2.norm_*", "blocks.#.cross_attn.norm_*"),
    ("blocks.#.attn2.to_*.*", "blocks.#.cross_attn.*.*"),
    ("blocks.#.ffn.net.0.proj.*", "blocks.#.ffn.0.*"),
    ("blocks.#.ffn.net.2.*", "blocks.#.ffn.2.*"),
    ("scale_shift_table", "head.modulation"),
    ("proj_out.*", "head.linear.*"),
]
VAE = [
    ("conv1.*", "encoder.to_latent.*"),
    ("conv2.*", "decoder.from_latent.*"),
    ("*.conv1.*", "*.conv_in.*"),
    ("*.head.0.gamma", "*.norm_out.gamma"),
    ("*.head.2.*", "*.conv_out.*"),
    ("*.middle.1.to_qkv.*", "*.middle.attention.qkv.*"),
    ("*.middle.1.*", "*.middle.attention.*"),
]
VAE_BLOCK = [
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.*", "conv1.*"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.*", "conv2.*"),
    ("shortcut.*", "shortcut.*"),
]
VAE_RESAMPLE = [
    ("resample.1.*", "space.*"),
    ("time_conv.*", "time.*"),
]
VAE_DIFFUSERS = [
    ("quant_conv.*", "encoder.to_latent.*"),
    ("post_quant_conv.*", "decoder.from_latent.*"),
    ("*.conv_in.*", "*.conv_in.*"),
    ("*.norm_out.gamma", "*.norm_out.gamma"),
    ("*.conv_out.*", "*.conv_out.*"),
    ("*.mid_block.attentions.0.to_qkv.*", "*.middle.attention.qkv.*"),
    ("*.mid_block.attentions.0.*", "*.middle.attention.*"),
]
VAE_BLOCK_DIFFUSERS = [
    ("norm#.gamma", "norm#.gamma"),
    ("conv#.*", "conv#.*"),
    ("conv_shortcut.*", "shortcut.*"),
]
TEXT = [
    ("token_embedding.weight", "embed.weight"),
    ("blocks.#.pos_embedding.embedding.weight", "blocks.#.attn.position.weight"),
    ("blocks.#.ffn.gate.0.weight", "blocks.#.ffn.gate.weight"),
    ("blocks.#.ffn.fc1.weight", "blocks.#.ffn.up.weight"),
    ("blocks.#.ffn.fc2.weight", "blocks.#.ffn.down.weight"),
    ("blocks.#.*", "blocks.#.*"),
    ("norm.weight", "norm.weight"),
]
TEXT_DIFFUSERS = [
    ("shared.weight", "embed.weight"),
    ("encoder.embed_tokens.weight", None),          # the same tensor again, written by some versions of transformers
    ("encoder.block.#.layer.0.SelfAttention.relative_attention_bias.weight", "blocks.#.attn.position.weight"),
    ("encoder.block.#.layer.0.SelfAttention.*", "blocks.#.attn.*"),
    ("encoder.block.#.layer.0.layer_norm.weight", "blocks.#.norm1.weight"),
    ("encoder.block.#.layer.1.layer_norm.weight", "blocks.#.norm2.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wi_0.weight", "blocks.#.ffn.gate.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wi_1.weight", "blocks.#.ffn.up.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wo.weight", "blocks.#.ffn.down.weight"),
    ("encoder.final_layer_norm.weight", "norm.weight"),
]
AUDIO = [
    ("lm_head.*", None),                            # letters, for speech recognition
    ("[wav2vec2.]masked_spec_embed", None),         # training only
    ("[wav2vec2.]feature_extractor.conv_layers.#.conv.*", "conv.#.conv.*"),
    ("[wav2vec2.]feature_extractor.conv_layers.#.layer_norm.*", "conv.#.norm.*"),
    ("[wav2vec2.]feature_projection.layer_norm.*", "norm_in.*"),
    ("[wav2vec2.]feature_projection.projection.*", "project.*"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.bias", "pos_conv.bias"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.weight_g", "pos_conv.g"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.weight_v", "pos_conv.v"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.parametrizations.weight.original0", "pos_conv.g"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.parametrizations.weight.original1", "pos_conv.v"),
    ("[wav2vec2.]encoder.layer_norm.*", "norm.*"),
    ("[wav2vec2.]encoder.layers.#.attention.out_proj.*", "blocks.#.o.*"),
    ("[wav2vec2.]encoder.layers.#.layer_norm.*", "blocks.#.norm1.*"),
    ("[wav2vec2.]encoder.layers.#.final_layer_norm.*", "blocks.#.norm2.*"),
    ("[wav2vec2.]encoder.layers.#.feed_forward.intermediate_dense.*", "blocks.#.ffn.0.*"),
    ("[wav2vec2.]encoder.layers.#.feed_forward.output_dense.*", "blocks.#.ffn.2.*"),
    ("[wav2vec2.]encoder.layers.#.attention.*_proj.*", "blocks.#.*.*"),
]


def injector_rules(config):
    """Audio attention number j follows block audio_layers[j] and lives in that block here."""
    rules = []
    for j, layer in enumerate(config.audio_layers):
        rules.append((f"audio_injector.injector_adain_layers.{j}.linear.*", f"blocks.{layer}.inject.adain.*"))
        rules.append((f"audio_injector.injector.{j}.*", f"blocks.{layer}.inject.*"))
    return rules


def official_rules(kind, config):
    """The name table of an official component."""
    if kind == "denoiser":
        return injector_rules(config) + DENOISER
    return vae_rules(config) if kind == "vae" else {"text": TEXT, "audio": AUDIO}[kind]


def vae_place(config, net, stage, j):
    """Where the official file keeps block j of a stage, or behind the blocks its resampler: Wan2.1 counts through all stages."""
    row = "downsamples" if net == "encoder" else "upsamples"
    n = config.num_res_blocks + (net == "decoder")
    return f"{net}.{row}.{stage}.{row}.{j}" if config.shortcuts else f"{net}.{row}.{stage * (n + 1) + j}"


def vae_place_diffusers(config, net, stage, j):
    row, n = ("down", config.num_res_blocks) if net == "encoder" else ("up", config.num_res_blocks + 1)
    if net == "encoder" and not config.shortcuts:
        return f"encoder.down_blocks.{stage * (n + 1) + j}"
    return f"{net}.{row}_blocks.{stage}." + (f"resnets.{j}" if j < n else f"{row}sampler" if config.shortcuts else f"{row}samplers.0")


def vae_rules(config, diffusers=False):
    """The table of a VAE's names, which depends on how many blocks a stage has."""
    table, block, place, middle = VAE, VAE_BLOCK, vae_place, "middle.{}"
    if diffusers:
        table, block, place, middle = VAE_DIFFUSERS, VAE_BLOCK_DIFFUSERS, vae_place_diffusers, "mid_block.resnets.{}"
    rules = []
    for net, n in (("encoder", config.num_res_blocks), ("decoder", config.num_res_blocks + 1)):
        for stage in range(len(config.dim_mult)):
            pieces = [(j, f"blocks.{j}", block) for j in range(n)] + [(n, "resample", VAE_RESAMPLE)]
            rules += [(f"{place(config, net, stage, j)}.{theirs}", f"{net}.stages.{stage}.{where}.{ours}")
                      for j, where, piece in pieces for theirs, ours in piece]
        rules += [(f"{net}.{middle.format(i)}.{theirs}", f"{net}.middle.{name}.{ours}")
                  for i, name in ((0, "block1"), (1 if diffusers else 2, "block2")) for theirs, ours in block]
    return rules + table


@cache
def pattern(template):
    regex = re.escape(template).replace(r"\[", "(?:").replace(r"\]", ")?").replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
    return re.compile(regex)


def rename(name, rules):
    """Their name -> our name; None for a known key that is not needed, "" for an unknown one."""
    for theirs, ours in rules:
        if match := pattern(theirs).fullmatch(name):
            parts = iter(match.groups())
            return ours and re.sub(r"[#*]", lambda _: next(parts), re.sub(r"[\[\]]", "", ours))
    return ""


def inverse(rules):
    """Our name -> their name. Where two of theirs lead to one of ours, the first is the one written."""
    return [(ours, theirs) for theirs, ours in rules if ours]


# -------------------------------------------------------------------------------------------------------------- reading files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def open_safetensors(path):
    """{name: Entry} of one safetensors file, mapped into memory."""
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
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

NETWORKS = {"denoiser": model.Denoiser, "vae": vae.VAE, "text": text.TextEncoder, "audio": audio.AudioEncoder}
CONFIGS = {"denoiser": model.Config, "vae": vae.VAEConfig, "text": text.TextConfig, "audio": audio.AudioConfig}

SIGNATURES = [   # how keys begin by which a file gives itself away; the first that occurs counts
    ("model.diffusion_model.", "a single file for ComfyUI"),
    ("diffusion_model.", "a LoRA or a single file for ComfyUI"),
    ("casual_audio_encoder.", "an S2V denoiser"),
    ("img_emb.", "a Wan2.1 image-to-video denoiser"),
    ("condition_embedder.", "a diffusers-layout denoiser"),
    ("blocks.0.self_attn.", "a T2V, I2V or TI2V denoiser"),
    ("decoder.upsamples.0.upsamples.", "the Wan2.2 VAE"),
    ("decoder.upsamples.", "the Wan2.1 VAE"),
    ("decoder.up_blocks.", "a diffusers-layout VAE"),
    ("blocks.0.attn.", "the umT5 encoder"),
    ("encoder.block.", "a transformers-layout umT5 encoder"),
    ("wav2vec2.", "a wav2vec2 encoder"),
    ("feature_extractor.conv_layers.", "a wav2vec2 encoder"),
]


def describe(names):
    """What a file with these keys is, or None."""
    return next((what for start, what in SIGNATURES if any(name.startswith(start) for name in names)), None)


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


def match(entries, rules, kind, config, what):
    """Pair a file's tensors with a network's parameters.

    entries  {their name: Entry}        rules  the name table        what  what the file should be, for messages
    returns  {our name: Entry}, complete
    raises   ValueError naming the file, the first key that does not fit, both shapes, and how many more there are
    """
    found, problems, wanted = {}, [], parameter_shapes(kind, config)
    files = sorted({entry.file for entry in entries.values()}) or ["an empty file"]
    files = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    if what in dict(SIGNATURES).values() and describe(entries) not in (what, None):
        raise ValueError(f"{files} holds {describe(entries)}, wanted {what}")
    for name, entry in entries.items():
        ours = rename(name, rules)
        if ours is None:
            continue
        if ours not in wanted:
            problems.append(f"{entry.file}: {name} belongs to no parameter")
        elif ours in found:
            problems.append(f"{entry.file}: {name} and another key both lead to {ours}")
        elif entry.shape != wanted[ours]:
            problems.append(f"{entry.file}: {name} has shape {entry.shape}, wanted {wanted[ours]}")
        found.setdefault(ours, entry)
    theirs = inverse(rules)
    problems += [f"{files}: {rename(name, theirs) or name} is missing, wanted shape {shape}"
                 for name, shape in wanted.items() if name not in found]
    if problems:
        raise ValueError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    return found


# ------------------------------------------------------------------------------------------------------------ foreign configs

# official config.json of a denoiser -> model.Config (official model_s2v.py L253-288, model.py L305-321)
FIELDS = {"dim": "dim", "ffn_dim": "ffn_dim", "num_heads": "n_head", "num_layers": "n_layer", "in_dim": "in_dim", "out_dim": "out_dim",
          "text_len": "text_len", "freq_dim": "freq_dim", "eps": "eps"}
FIELDS_S2V = {"audio_dim": "audio_dim", "num_audio_token": "audio_tokens", "audio_inject_layers": "audio_layers", "cond_dim": "pose_dim"}
OPTIONAL = {"in_dim", "out_dim", "text_len", "freq_dim", "eps", "num_audio_token"}   # model.Config has the official class's default
# The part of the official code that the released models run, and all that is built here. The S2V fields must be there: the official
# class has other defaults. The other four are never written by the official code.
SCOPE = {"patch_size": [1, 2, 2], "window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True}
SCOPE_S2V = {"enable_adain": True, "adain_mode": "attn_norm", "zero_timestep": True, "enable_framepack": True, "enable_motioner": False,
             "add_last_motion": True}
# Without effect in that scope: initialisation, and settings of the parts left out.
INERT = {"model_type", "text_dim", "zero_init", "enable_tsm", "trainable_token_pos_emb", "trainable_token", "motion_token_num",
         "framepack_drop_mode", "motion_frames", "func_type"}
FIELDS_AUDIO = {"hidden_size": "dim", "intermediate_size": "ffn_dim", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
                "conv_dim": "conv_dim", "conv_kernel": "conv_kernel", "conv_stride": "conv_stride", "conv_bias": "conv_bias",
                "num_conv_pos_embeddings": "pos_kernel", "num_conv_pos_embedding_groups": "pos_groups", "layer_norm_eps": "eps"}
SCOPE_AUDIO = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "hidden_act": "gelu", "feat_extract_activation": "gelu",
               "add_adapter": False}
FIELDS_DIFFUSERS = {"num_attention_heads": "n_head", "ffn_dim": "ffn_dim", "num_layers": "n_layer", "in_channels": "in_dim",
                    "out_channels": "out_dim", "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps"}
SCOPE_DIFFUSERS = {"patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None,
                   "image_dim": None, "pos_embed_seq_len": None}
INERT_DIFFUSERS = {"attention_head_dim", "rope_max_seq_len"}


def take_fields(fields, table, scope, inert, path, optional=()):
    """A foreign config.json's fields under our names.

    fields  its content        table  their name -> ours        scope  name -> the only value supported        inert  names without effect
    raises  ValueError naming a missing field, or a field with what was wanted and what came
    """
    for name in table:
        if name not in fields and name not in optional:
            raise ValueError(f"{path} lacks the field {name}: take config.json from the folder of the weights")
    for name, value in scope.items():
        got = fields.get(name, value)
        if (list(got) if isinstance(got, tuple) else got) != value:
            raise ValueError(f"{path}: wanted {name} = {value}, got {got}: only what the released models use is built")
    unknown = sorted(n for n in fields if n not in table and n not in scope and n not in inert and not n.startswith("_"))
    if unknown:
        print(f"{path}: unknown field{'s' * (len(unknown) > 1)} {', '.join(unknown)} ignored", file=sys.stderr)
    return {ours: tuple(fields[name]) if isinstance(fields[name], list) else fields[name] for name, ours in table.items() if name in fields}


def make_config(kind, fields, path):
    try:
        return CONFIGS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def denoiser_config(fields, entries, path):
    """Official config.json + tensors -> model.Config. Two sizes are written in no config: text_dim and audio_states."""
    s2v = fields.get("model_type") == "s2v" or "audio_inject_layers" in fields
    for name in SCOPE_S2V if s2v else ():
        if name not in fields:
            raise ValueError(f"{path} lacks the field {name}: take config.json from the folder of the weights")
    table, scope, inert = (FIELDS | FIELDS_S2V, SCOPE | SCOPE_S2V, INERT) if s2v else (FIELDS, SCOPE, INERT)
    ours = take_fields(fields, table, scope, inert, path, OPTIONAL)
    if "text_embedding.0.weight" in entries:
        ours["text_dim"] = entries["text_embedding.0.weight"].shape[1]
    if s2v and "casual_audio_encoder.weights" in entries:
        ours["audio_states"] = entries["casual_audio_encoder.weights"].shape[1]
    return make_config("denoiser", ours if s2v else ours | {"audio_dim": 0}, path)


def denoiser_config_diffusers(fields, path):
    ours = take_fields(fields, FIELDS_DIFFUSERS, SCOPE_DIFFUSERS, INERT_DIFFUSERS, path)
    dim = fields["num_attention_heads"] * fields.get("attention_head_dim", 128)
    return make_config("denoiser", ours | {"dim": dim, "audio_dim": 0}, path)


def vae_config(entries, path):
    """Sizes of an official VAE from the shapes of its tensors: there is no config beside them."""
    shape = {name: entry.shape for name, entry in entries.items()}
    shortcuts = "encoder.downsamples.0.downsamples.0.residual.0.gamma" in shape
    flat = r"encoder\.downsamples\.(\d+)\." + (r"downsamples\.(\d+)\." if shortcuts else "") + r"resample\.1\.weight"
    resamplers = sorted(tuple(map(int, m.groups())) for name in shape if (m := re.fullmatch(flat, name)))
    if not resamplers or "conv2.weight" not in shape:
        return vae.VAEConfig()                                         # not a VAE: matching says what it is
    z_dim, dim, n = shape["conv2.weight"][0], shape["encoder.conv1.weight"][0], resamplers[0][-1]
    known = {config.z_dim: config for config in (vae.VAEConfig(), vae.VAE22)}
    if z_dim not in known:
        raise ValueError(f"{path}: wanted {' or '.join(map(str, known))} latent channels, got {z_dim}: no mean and deviation are known")
    config = dataclasses.replace(known[z_dim], dim=dim, num_res_blocks=n, shortcuts=shortcuts)
    mult = tuple(shape[vae_place(config, "encoder", stage, n - 1) + ".residual.6.weight"][0] // dim for stage in range(len(resamplers) + 1))
    halves = (vae_place(config, "encoder", stage, n) + ".time_conv.weight" in shape for stage in range(len(resamplers)))
    patch = math.isqrt(shape["encoder.conv1.weight"][1] // 3)
    dec_dim = shape["decoder.head.0.gamma"][0] // mult[0]
    return dataclasses.replace(config, dim_mult=mult, temporal_downsample=tuple(halves), patch=patch, dec_dim=dec_dim)


def vae_config_diffusers(fields, path):
    table = {"base_dim": "dim", "z_dim": "z_dim", "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
             "temperal_downsample": "temporal_downsample", "latents_mean": "mean", "latents_std": "std"}
    scope = {"attn_scales": []}
    ours = take_fields(fields, table, scope, set(fields), path)
    return make_config("vae", ours | {"dec_dim": fields.get("decoder_base_dim") or ours["dim"], "patch": fields.get("patch_size") or 1,
                                      "shortcuts": fields.get("is_residual", False)}, path)


def text_config(entries, rules):
    """umT5 sizes from the shapes of its tensors: the official code keeps no config beside them."""
    tensors = {ours: entry for name, entry in entries.items() if (ours := rename(name, rules))}
    try:
        vocab, dim = tensors["embed.weight"].shape
        n_bucket, n_head = tensors["blocks.0.attn.position.weight"].shape
        return text.TextConfig(
            vocab=vocab, dim=dim, dim_attn=tensors["blocks.0.attn.q.weight"].shape[0], ffn=tensors["blocks.0.ffn.up.weight"].shape[0],
            n_head=n_head, n_layer=sum(name.endswith(".attn.q.weight") for name in tensors), n_bucket=n_bucket)
    except (KeyError, ValueError):
        return text.TextConfig()                                       # not umT5: matching against the released size says so


def audio_config(fields, path):
    """transformers' config.json of a wav2vec2 -> audio.AudioConfig"""
    return make_config("audio", take_fields(fields, FIELDS_AUDIO, SCOPE_AUDIO, set(fields), path), path)


def identify(name, fields, entries):
    """An official module told by its keys -> kind, config, name table.  name for messages, fields its constructor's arguments"""
    what = describe(entries) or "an unknown model"
    if what.endswith("denoiser"):
        kind, config = "denoiser", denoiser_config(fields, entries, name)
    elif what.endswith("VAE"):
        kind, config = "vae", vae_config(entries, name)
    elif what == "the umT5 encoder":
        kind, config = "text", text_config(entries, TEXT)
    elif what == "a wav2vec2 encoder":
        kind, config = "audio", audio_config(fields.get("config", fields), name)
    else:
        raise ValueError(f"{name} is {what}: wanted an official denoiser, VAE, umT5 encoder or wav2vec2 encoder")
    return kind, config, official_rules(kind, config)


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
        return sum(math.prod(entry.shape) for entry in self.tensors.values())


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

    def load(self, component, device="cpu", dtype=None):
        """One network with its weights.

        component  a name in `parts`            dtype  of its parameters; None: as stored. What the denoiser needs in float32 stays so.
        returns    nn.Module in eval mode, without gradients. Tensors are read one by one, straight from the mapped file.
        """
        part = self.parts[component]
        return materialise(part.kind, part.config, part.tensors, device, dtype)


def stored_as(kind, name, dtype):
    """The dtype of a parameter when its network runs in `dtype`."""
    return model.Denoiser.storage_dtype(name, dtype) if kind == "denoiser" else dtype


def materialise(kind, config, tensors, device="cpu", dtype=None, quantize=False, resident=None):
    """{our name: Entry} -> the network with these weights.

    dtype     of its parameters; None: as stored            quantize  cast the denoiser's large matrices to float8 on the way
    resident  number of blocks that stay on the device while the others are streamed (offload.py); None: all
    """
    def kept_as(name, entry):
        scaled = entry.dtype == torch.float8_e4m3fn or name.endswith(".weight_scale")
        return entry.dtype if scaled or dtype is None else stored_as(kind, name, dtype)
    if quantize:
        tensors = fp8.quantized(tensors, device)
    return offload.stream(fp8.to_fp8(build(kind, config), tensors), tensors, device, kept_as, resident)


def open_checkpoint(folder):
    """A checkpoint folder in the converted, official or diffusers layout -> Checkpoint, checked by its headers.

    raises  ValueError naming what is missing, what does not fit and in which file
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"wanted a checkpoint folder, got {folder}, which is {'a file' if folder.exists() else 'not there'}")
    if (folder / "config.json").is_file() and "task" in read_json(folder / "config.json"):
        return open_converted(folder)
    if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        return open_diffusers(folder)
    official = ("config.json", "high_noise_model", "low_noise_model", "diffusion_pytorch_model*", "models_t5*", "Wan2.*_VAE.pth")
    if any(any(folder.glob(name)) for name in official):
        return open_official(folder)
    raise ValueError(f"{folder} is no checkpoint: wanted a converted folder (config.json, *.safetensors), an official one (config.json or "
                     f"high_noise_model, *_VAE.pth, models_t5_*.pth) or a diffusers one (model_index.json)")


def open_converted(folder):
    path = folder / "config.json"
    fields = read_json(path)
    kinds = {name: name.split("_")[0] for name in expert_names(fields.get("boundary"))} | {"vae": "vae", "text": "text"}
    kinds |= {"audio": "audio"} if "audio" in fields else {}
    lacking = ["boundary"] if "boundary" not in fields else []
    lacking += [name for name in ("sampling", *kinds.values()) if not isinstance(fields.get(name), dict)]
    if lacking or fields["task"] not in SAMPLING or not fields["sampling"].keys() >= SAMPLING[fields["task"]].keys():
        raise ValueError(f"{path}: wanted a task of {', '.join(SAMPLING)} with all its fields, got {fields['task']}, "
                         f"lacking {', '.join(lacking) or 'sampling values'}: convert again")
    files = {name: folder / f"{name}.safetensors" for name in kinds}
    require(folder, [(file, name) for name, file in files.items()] + [(folder / "tokenizer.json", "tokenizer")])
    parts = {}
    for name, kind in kinds.items():
        values = {field: tuple(value) if isinstance(value, list) else value for field, value in fields[kind].items()}
        config = make_config(kind, values, path)
        parts[name] = Part(kind, config, match(open_tensors([files[name]]), [("*", "*")], kind, config, None))
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


def open_official(folder):
    """Wan-AI/Wan2.2-S2V-14B, -T2V-A14B, -I2V-A14B or -TI2V-5B as published."""
    roots = {"denoiser": folder}
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        roots = {"denoiser_high": folder / "high_noise_model", "denoiser_low": folder / "low_noise_model"}
    configs = {name: read_json(root / "config.json") if (root / "config.json").is_file() else {} for name, root in roots.items()}
    first = next(iter(configs.values()))
    wav2vec = folder / WAV2VEC
    s2v = first.get("model_type") == "s2v" or wav2vec.is_dir()
    vaes = [folder / "Wan2.1_VAE.pth", folder / "Wan2.2_VAE.pth"]
    vae_file = next((path for path in vaes if path.is_file()), vaes[first.get("out_dim", 16) == 48])
    text_file, tokenizer = folder / "models_t5_umt5-xxl-enc-bf16.pth", folder / "google" / "umt5-xxl" / "tokenizer.json"
    audio_files = [wav2vec / "model.safetensors", wav2vec / "pytorch_model.bin"]
    audio_file = next((path for path in audio_files if path.is_file()), audio_files[0])
    shard_files = {name: shards(root, "diffusion_pytorch_model") for name, root in roots.items()}
    wanted = [(root / "config.json", f"config of {name}") for name, root in roots.items()]
    wanted += [(file, name) for name, files in shard_files.items() for file in files]
    wanted += [(vae_file, "VAE"), (text_file, "text encoder"), (tokenizer, "tokenizer")]
    wanted += [(audio_file, "audio encoder"), (wav2vec / "config.json", "its config")] if s2v else []
    require(folder, wanted)

    parts = {}

    def add(name, kind, config, entries, what):
        parts[name] = Part(kind, config, match(entries, official_rules(kind, config), kind, config, what))

    for name, root in roots.items():
        entries = open_shards(shard_files[name], root, "diffusion_pytorch_model")
        config = denoiser_config(configs[name], entries, root / "config.json")
        add(name, "denoiser", config, entries, "an S2V denoiser" if config.audio_dim else "a T2V, I2V or TI2V denoiser")
    entries = open_tensors([vae_file])
    add("vae", "vae", vae_config(entries, vae_file), entries, f"the {vae_file.name[:6]} VAE")
    entries = open_tensors([text_file])
    add("text", "text", text_config(entries, TEXT), entries, "the umT5 encoder")
    if s2v:
        path = wav2vec / "config.json"
        add("audio", "audio", audio_config(read_json(path), path), open_tensors([audio_file]), "a wav2vec2 encoder")
    return assemble(folder, parts, tokenizer)


def open_diffusers(folder):
    """The same models as diffusers stores them: transformer (high noise), transformer_2 (low noise), vae, text_encoder, tokenizer."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    roots = {"denoiser": folder / "transformer"}
    if (folder / "transformer_2").is_dir():
        roots = {"denoiser_high": folder / "transformer", "denoiser_low": folder / "transformer_2"}
    roots |= {"vae": folder / "vae", "text": folder / "text_encoder"}
    stems = {name: "model" if name == "text" else "diffusion_pytorch_model" for name in roots}
    files = {name: shards(root, stems[name]) for name, root in roots.items()}
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    require(folder, [(root / "config.json", f"config of {name}") for name, root in roots.items()]
            + [(file, name) for name in roots for file in files[name]] + [(tokenizer, "tokenizer")])

    parts = {}
    for name, root in roots.items():
        entries, fields = open_shards(files[name], root, stems[name]), read_json(root / "config.json")
        if name == "vae":
            config = vae_config_diffusers(fields, root / "config.json")
            parts[name] = Part("vae", config, match(entries, vae_rules(config, diffusers=True), "vae", config, "a diffusers-layout VAE"))
        elif name == "text":
            config = text_config(entries, TEXT_DIFFUSERS)
            parts[name] = Part("text", config, match(entries, TEXT_DIFFUSERS, "text", config, "a transformers-layout umT5 encoder"))
        else:
            config = denoiser_config_diffusers(fields, root / "config.json")
            parts[name] = Part("denoiser", config, match(entries, DENOISER_DIFFUSERS, "denoiser", config, "a diffusers-layout denoiser"))
    return assemble(folder, parts, tokenizer, index.get("boundary_ratio"))


# -------------------------------------------------------------------------------------------------------------------- writing

def write_safetensors(path, tensors, progress=lambda nbytes: None):
    """Write tensors one at a time, so that a file of any size needs the memory of its largest tensor.

    tensors  {name: Entry}; an entry's dtype is the one written
    """
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)      # keeps every tensor aligned in the file
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, entry in order:
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, entry in order:
            tensor = entry.read().to("cpu", entry.dtype).contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy())
            progress(entry.nbytes)


def cast(kind, tensors, dtype):
    """The same tensors, to be written in `dtype` where the network runs in it; what needs more precision keeps what it has."""
    def narrow(name, entry):
        wanted = stored_as(kind, name, dtype)
        return dataclasses.replace(entry, dtype=wanted) if wanted.itemsize < entry.dtype.itemsize else entry
    return {name: narrow(name, entry) for name, entry in tensors.items()} if kind in ("denoiser", "text") else tensors


def write_checkpoint(checkpoint, folder):
    """A Checkpoint -> our layout in an existing folder, which is opened again to check what was written."""
    fields = {"task": checkpoint.task, "boundary": checkpoint.boundary, "sampling": checkpoint.sampling, "note": checkpoint.note}
    fields |= {kind: dataclasses.asdict(config) for kind, config in checkpoint.configs.items()}
    (folder / "config.json").write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    if checkpoint.tokenizer != folder / "tokenizer.json":
        shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
    total = sum(part.nbytes for part in checkpoint.parts.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=total < 2**28) as bar:
        for name, part in checkpoint.parts.items():
            bar.set_description(name)
            write_safetensors(folder / f"{name}.safetensors", part.tensors, bar.update)
    for name, part in open_checkpoint(folder).parts.items():
        for key, entry in part.tensors.items():
            assert entry.dtype == checkpoint.parts[name].tensors[key].dtype, f"{name} {key} was written as {entry.dtype}"


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


def convert(source, target, dtype=None):
    """Write a checkpoint folder of any known layout in ours.

    dtype   torch.bfloat16 to store the large linear layers of denoiser and text encoder so; None keeps what the files have
    raises  ValueError for anything wrong with source or target; nothing is left behind then
    """
    checkpoint = open_checkpoint(source)
    if dtype is not None:
        parts = {name: dataclasses.replace(part, tensors=cast(part.kind, part.tensors, dtype)) for name, part in checkpoint.parts.items()}
        checkpoint = dataclasses.replace(checkpoint, parts=parts)
    nbytes = sum(part.nbytes for part in checkpoint.parts.values()) + checkpoint.tokenizer.stat().st_size
    new_folder(target, nbytes, partial(write_checkpoint, checkpoint))


def summary(checkpoint):
    """Key and parameter counts per component, as text."""
    lines = [f"{checkpoint.folder}: {checkpoint.task}" + ("" if checkpoint.boundary is None else f", boundary {checkpoint.boundary}")]
    for name, part in checkpoint.parts.items():
        dtypes = ", ".join(sorted({DTYPE_NAMES[entry.dtype] for entry in part.tensors.values()}))
        lines.append(f"{name:14s} {len(part.tensors):5d} tensors {part.parameters:15,d} parameters {part.nbytes / 2**30:7.3f} GiB {dtypes}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Convert a checkpoint folder to our layout.")
    parser.add_argument("source", help="folder in the official, diffusers or converted layout")
    parser.add_argument("target", nargs="?", help="new folder to write; it appears only when it is complete")
    parser.add_argument("--check", action="store_true", help="print what the source holds and write nothing")
    parser.add_argument("--dtype", choices=["keep", "bf16"], default="keep",
                        help="of the denoiser's and the text encoder's linear layers; bf16 halves float32 files (default: keep)")
    args = parser.parse_args(argv)
    if args.check == (args.target is not None):
        parser.error("give a target folder, or --check without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                        # so that half-written folders go then, too
    try:
        if args.check:
            print(summary(open_checkpoint(args.source)))
        else:
            convert(args.source, args.target, torch.bfloat16 if args.dtype == "bf16" else None)
            print(summary(open_checkpoint(args.target)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
