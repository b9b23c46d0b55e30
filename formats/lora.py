"""LoRA files -> the denoiser's weights with them merged: W + scale * alpha / rank * up @ down, in float32.

    diffusion_model.blocks.0.self_attn.q.lora_down.weight, .lora_up.weight, .alpha   official names, with or without the prefix (ComfyUI)
    base_model.model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight              the same in PEFT's spelling; also .lora_A.default.weight
    transformer.blocks.0.attn1.to_q.lora_A.weight                                    diffusers' names
    lora_unet_blocks_0_self_attn_q.lora_down.weight                                  every dot written _ (kohya, musubi)
    blocks.0.norm3.diff, .diff_b, head.diff_m                                        whole differences of weight, bias and modulation

Every key must find its parameter: nothing is skipped. Alpha stands in the tensors, in the header or in PEFT's adapter_config.json beside
the file; a rank-stabilised LoRA (use_rslora) has alpha / sqrt(rank) in place of alpha / rank.
The last part is about LoRAs in training: layers that have one, and the file that becomes of them.
"""
import dataclasses
import json
import math
import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fast import fp8
from formats import names
from formats.checkpoints import open_safetensors, parameter_shapes, read_json
from model import Linear

PREFIXES = re.compile(r"(?:diffusion_model\.|transformer\.|base_model\.model\.|lora_unet__?)*")
ENDINGS = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_A.weight": "down", "lora_B.weight": "up",
           "lora_A.default.weight": "down", "lora_B.default.weight": "up", "alpha": "alpha",
           "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}       # how a key ends: what the tensor then is
KINDS = {   # what else is shared as a LoRA: how its keys end
    "DoRA": r"dora_scale|lora_magnitude_vector", "LoHa": r"hada_(w|t)\d", "LoKr": r"lokr_(w|t)\d", "OFT": r"oft_(blocks|diag|r\b)",
    "LoCon with a third matrix": r"lora_mid", "GLoRA": r"\.[ab][12]\.weight$"}
IMAGE_ONLY = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder")   # Wan2.1-I2V's attention to the picture


@cache
def foreign_layers(config):
    """{a layer's official or diffusers name, also with _ for every dot: our name of the layer}; None for a name that means two layers."""
    out = {}
    for name in parameter_shapes("denoiser", config):
        ours = name.rpartition(".")[0]
        for rules in (names.official_rules("denoiser", config), names.DENOISER_DIFFUSERS):
            if theirs := names.rename(name, names.inverse(rules)):
                layer = theirs.rpartition(".")[0]
                for spelling in {layer, layer.replace(".", "_")} - {""}:
                    out[spelling] = ours if out.get(spelling, ours) == ours else None
    return out


def find(key, config):
    """A LoRA file's key -> our parameter, role: "down", "up", "alpha", or "weight", "bias", "modulation" for a whole difference

    raises  ValueError if it belongs to no parameter, or if other programs disagree to which
    """
    prefix, ending = PREFIXES.match(key)[0], next((ending for ending in ENDINGS if key.endswith(f".{ending}")), "")
    layer, role = key[len(prefix):].removesuffix(f".{ending}"), ENDINGS.get(ending)
    if re.search(r"[._]attn[12][._]", layer) and not prefix.endswith(("transformer.", "base_model.model.")):
        raise ValueError("is ambiguous: attn1 is the self-attention in diffusers and the cross-attention elsewhere; rename the keys to "
                         "transformer.* if diffusers wrote them, or to self_attn and cross_attn")
    ours = foreign_layers(config).get(layer, "")
    if ours is None:
        raise ValueError("is ambiguous: it may mean two layers")
    name = f"{ours}.{role if role in ('bias', 'modulation') else 'weight'}"
    if role is None or name not in parameter_shapes("denoiser", config):
        raise ValueError("belongs to no parameter")
    return name, role


def plain_lora(path, keys, without_image):
    """The keys of a file that are to be merged.  ValueError for another method than LoRA, or a LoRA of Wan2.1-I2V unless without_image"""
    for kind, ending in KINDS.items():
        if found := [key for key in keys if re.search(ending, key, re.IGNORECASE)]:
            raise ValueError(f"{path} is a {kind}, not a plain LoRA ({found[0]}), which cannot be merged here: merge it with the program that "
                             f"made it, or take a LoRA")
    image = [key for key in keys if IMAGE_ONLY.search(key)]
    if image and not without_image:
        raise ValueError(f"{path} is a LoRA of Wan2.1-I2V: {len(image)} of its keys ({image[0]}, ...) belong to an attention to the picture that "
                         f"Wan2.2 lacks; --without-image-keys merges the others")
    return [key for key in keys if key not in image]


def read_lora(path, config, scale=1.0, without_image=False):
    """One file, or the folder of a PEFT or diffusers LoRA -> what it changes, and its strength in words.

    without_image  leave out the keys of Wan2.1-I2V that only read the picture
    returns  {our parameter: function () -> what the LoRA of strength `scale` adds to it, float32}, read when called; a line that says the
             strength used; a warning if the file names none, else None
    raises   ValueError naming the first key that fits nowhere and how many more there are, or a pair that is not whole
    """
    path, found, changes, problems = lora_file(Path(path)), {}, {}, []    # found {our parameter: {role: Entry}}
    entries, layers = open_safetensors(path), {}                          # layers {our parameter: what the file calls the layer}
    wanted = plain_lora(path, entries, without_image)
    for key in wanted:
        try:
            entry = entries[key]
            name, role = find(key, config)
            if found.setdefault(name, {}).setdefault(role, entry) is not entry:
                raise ValueError(f"and another key both lead to {name}")
            layers[name] = key
        except ValueError as error:
            problems.append(f"{key} {error}")
    strengths, source = Strengths(path, found, config), {}               # source {our parameter: (alpha / rank or the like, in words)}
    for name, roles in found.items():
        try:
            check(parameter_shapes("denoiser", config)[name], roles)
            source[name] = strengths.of(layers[name], roles)
            changes[name] = change(parameter_shapes("denoiser", config)[name], scale * source[name][0], roles)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems or not changes:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{path}: {problems[0] if problems else 'wanted a LoRA, got no tensors'}{more}")
    line, warning = in_words(path, scale, source.values())
    left_out = len(entries) - len(wanted)
    return changes, line + (f", {left_out} keys of the attention to the picture left out" if left_out else ""), warning


def lora_file(path):
    """The file that is meant by a path: a folder as PEFT or diffusers saves it holds one."""
    inside = [path / name for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors") if (path / name).is_file()]
    if not path.is_file() and len(inside) != 1:
        raise ValueError(f"wanted a LoRA file, got {path}, which is {'a folder' if path.is_dir() else 'not there'}")
    return path if path.is_file() else inside[0]


def check(shape, roles):
    """ValueError if {role: Entry} of one parameter is neither a whole difference nor a whole pair that makes its shape."""
    if len(roles) == 1 and roles.keys() <= {"weight", "bias", "modulation"}:
        diff, = roles.values()
        if math.prod(diff.shape) != math.prod(shape) or diff.shape[:1] != shape[:1]:
            raise ValueError(f"the difference has shape {diff.shape}, wanted {shape}")
        return
    if not {"down", "up"} <= roles.keys() <= {"down", "up", "alpha"}:
        raise ValueError(f"wanted down and up or one difference, got {', '.join(sorted(roles))}")
    down, up = roles["down"], roles["up"]                            # (rank, in, ...), (out, rank, ...)
    if up.shape[:2] != (shape[0], *down.shape[:1]) or math.prod(up.shape[2:]) != 1 or math.prod(down.shape[1:]) != math.prod(shape[1:]):
        raise ValueError(f"up {up.shape} @ down {down.shape} does not make {shape}")
    if not down.shape[0] or math.prod(roles["alpha"].shape if "alpha" in roles else ()) != 1:
        raise ValueError(f"wanted a rank of 1 or more and one number as alpha, got down {down.shape} and alpha {roles.get('alpha', down).shape}")


def change(shape, strength, roles):
    """{role: Entry} of one parameter, which `check` let through -> function () -> the difference, float32; ValueError for a NaN in it"""
    def difference():
        first, *down = (roles[role].read().float() for role in (("up", "down") if "down" in roles else roles))
        x = (strength * (first.flatten(1) @ down[0].flatten(1) if down else first)).view(shape)
        if not x.isfinite().all():
            file = next(iter(roles.values())).file
            raise ValueError(f"{file} makes numbers that are NaN or infinite: the training went wrong, take an earlier file")
        return x
    return difference


# ----------------------------------------------------------------------------------------------------------------------- strength

ALPHA_FIELDS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")      # what programs call it in a header
PEFT_FIELDS = ("lora_alpha", "alpha_pattern", "use_rslora")
LIVE_AVATAR = 64.0                                                               # its alpha, for rank 128, is in the program alone


def header_fields(path):
    """What the header of a LoRA file, or PEFT's adapter_config.json beside it, says of the training -> fields, where they were found."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    fields = dict(header)
    for value in header.values():                                    # lora_adapter_metadata of diffusers and the like: JSON in a string
        try:
            inner = json.loads(value)
        except ValueError:
            continue
        if isinstance(inner, dict):
            inner = {name.rpartition(".")[2]: inner[name] for name in sorted(inner, key=lambda name: name.startswith("transformer."))}
            fields = {name: inner[name] for name in PEFT_FIELDS if name in inner} | fields
    beside, files = path.with_name("adapter_config.json"), list(path.parent.glob("*.safetensors"))
    if not fields.keys() & {*ALPHA_FIELDS} and beside.is_file() and (path.name.startswith("adapter_model") or len(files) == 1):
        return read_json(beside), f"from {beside.name}"
    return fields, "from its header"


def is_live_avatar(found, config):
    """Is this the LoRA of LiveAvatar? Rank 128 on the linear layers of all blocks and the attention of all audio layers, 896 tensors."""
    layers = [f"blocks.{i}.{layer}.{x}.weight" for i in range(config.n_layer) for layer in ("self_attn", "cross_attn") for x in "qkvo"]
    layers += [f"blocks.{i}.ffn.{x}.weight" for i in range(config.n_layer) for x in (0, 2)]
    layers += [f"blocks.{i}.inject.{x}.weight" for i in config.audio_layers for x in "qkvo"]
    return len(layers) == 448 and found.keys() == {*layers} and all(
        roles.keys() == {"down", "up"} and roles["down"].shape[0] == 128 for roles in found.values())


def compiles(pattern):
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return None


class Strengths:
    """Where a file keeps the strength of its layers: in tensors, in its header, in adapter_config.json, or nowhere."""

    def __init__(self, path, found, config):
        self.fields, self.place = header_fields(path)
        self.alpha = next((self.fields[name] for name in ALPHA_FIELDS if self.fields.get(name) not in (None, "None", "")), None)
        patterns = self.fields.get("alpha_pattern")
        self.patterns = patterns if isinstance(patterns, dict) else {}   # PEFT: {ends of layer names, as regular expressions: alpha}
        for end in self.patterns:                                        # repetitions of repetitions take for ever
            if len(end) > 200 or len(re.findall(r"[*+{]", end)) > 3 or re.search(r"\)[*+?{]", end) or not compiles(end):
                raise ValueError(f"{path}: wanted ends of layer names in alpha_pattern, got {end[:60]!r} {self.place}")
        self.stabilised = self.fields.get("use_rslora") in (True, "True", "true")
        if self.alpha is None and is_live_avatar(found, config):
            self.alpha, self.place = LIVE_AVATAR, "as LiveAvatar's program has it, whose LoRA this is by its 896 tensors"

    def of(self, key, roles):
        """One parameter's key and {role: Entry} -> what its difference is multiplied by, in words; no words if nothing says it"""
        if "down" not in roles:
            return 1.0, "whole differences"
        rank, place, root = roles["down"].shape[0], self.place, "sqrt(rank)" if self.stabilised else "rank"
        layer = key.removesuffix(".weight").rpartition(".lora_")[0]
        alpha = next((value for end, value in self.patterns.items() if re.fullmatch(rf"(.*\.)?({end})", layer)), self.alpha)
        if "alpha" in roles:
            alpha, place, root = roles["alpha"].read().float().item(), "from its tensors", "rank"
        elif alpha is None:
            return 1.0, None
        named = alpha
        try:
            alpha = float(alpha)
        except (TypeError, ValueError, OverflowError):
            alpha = math.nan
        if not abs(alpha) < 1e6:
            raise ValueError(f"wanted a number as alpha, got {named!r} {place}")
        return alpha / (rank if root == "rank" else math.sqrt(rank)), f"alpha {alpha:g} / {root.replace('rank', f'rank {rank}')}, {place}"


def in_words(path, scale, source):
    """The strengths of a file's layers [(number, words or None), ...] -> a line for the user, a warning or None"""
    source = list(source)
    used, words = sorted({number for number, _ in source}), list(dict.fromkeys(why for _, why in source if why))
    nothing = sum(why is None for _, why in source)
    span = f"{scale * used[0]:g}" if len(used) == 1 else f"{scale * used[0]:g} to {scale * used[-1]:g}"
    why = f"{words[0]}{f' and {len(words) - 1} others' if len(words) > 1 else ''}" if words else "no alpha given"
    line = f"{path}: strength {span} (scale {scale:g} x {why})" if words else f"{path}: strength {span} (scale {scale:g}, {why})"
    return line, f"{path} names no strength for {nothing} of {len(source)} layers: alpha = rank is taken; give FILE:SCALE for another" \
        if nothing else None


def merged(tensors, changes, device="cpu"):
    """A denoiser's tensors with LoRAs added. Float8 weights are multiplied out, changed and cast anew.

    tensors  {our name: Entry}        changes  [the first of what `read_lora` returns, ...], in the order of adding        device  where to compute
    returns  {our name: Entry} with the same names and dtypes, computed in float32 when they are read
    """
    changed, float8 = {}, {name for name in tensors if f"{name}_scale" in tensors}
    for name in dict.fromkeys(name for file in changes for name in file):
        def read(name=name, entry=tensors[name], scale=tensors.get(f"{name}_scale")):
            x = entry.read().to(device).float()
            x = x if scale is None else x * scale.read().to(device)
            for file in changes:
                x = x + file[name]().to(device) if name in file else x
            return x
        changed[name] = dataclasses.replace(tensors[name], dtype=torch.bfloat16 if name in float8 else tensors[name].dtype, read=read)
    again = fp8.quantized({name: entry for name, entry in changed.items() if name in float8}, device, fp8.uses_fp8)
    return tensors | changed | again


# ------------------------------------------------------------------------------------------------------------------------- training

class LoRA(nn.Module):
    """A linear layer and a learned difference of low rank, kept in float32: y = layer(x) + up(down(x))."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, device=layer.weight.device) * layer.in_features ** -0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x):
        x = x.to(self.layer.weight.dtype)                            # saved once for the backward pass of both
        return self.layer(x) + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def add(net, rank, targets):
    """Give every target layer of the blocks a LoRA; all else is frozen.  ValueError for a target that no block has"""
    layers = {name: name.split(".", 2)[2] for name, layer in net.named_modules() if name.startswith("blocks.") and isinstance(layer, Linear)}
    if unknown := sorted(set(targets) - set(layers.values())):
        raise ValueError(f"no block has a linear layer {unknown[0]}: wanted some of {', '.join(sorted(set(layers.values())))}")
    for name, inner in layers.items():
        if inner in targets:
            net.set_submodule(name, LoRA(net.get_submodule(name), rank))
    return net


def write(experts, config, target, dtype=torch.float32):
    """One file, or NAME.high and NAME.low for two experts, with the names of the official layers, which most programs read."""
    theirs = names.inverse(names.official_rules("denoiser", config))
    for expert, net in experts.items():
        tensors, rank = {}, 0
        for name, layer in net.named_modules():
            if isinstance(layer, LoRA):
                rank, stem = len(layer.down), "diffusion_model." + names.rename(f"{name}.weight", theirs).removesuffix(".weight")
                tensors |= {f"{stem}.lora_{letter}.weight": value.detach().to("cpu", dtype).contiguous()
                            for letter, value in (("A", layer.down), ("B", layer.up))}
        side = expert.partition("_")[2]
        path = Path(target).with_suffix(f".{side}.safetensors" if side else ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt", "lora_alpha": str(rank)})
        print(f"wrote {path}, for convert_weights.py --lora {side + '=' if side else ''}{path}")
