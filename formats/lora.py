"""LoRA files -> the denoiser's weights with them merged: W + scale * alpha / rank * up @ down, in float32.

    diffusion_model.blocks.0.self_attn.q.lora_down.weight, .lora_up.weight, .alpha   official names, with or without the prefix (ComfyUI)
    base_model.model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight              the same in PEFT's spelling; also .lora_A.default.weight
    transformer.blocks.0.attn1.to_q.lora_A.weight                                    diffusers' names
    lora_unet_blocks_0_self_attn_q.lora_down.weight                                  every dot written _ (kohya, musubi)
    blocks.0.norm3.diff, .diff_b, head.diff_m                                        whole differences of weight, bias and modulation

Every key must find its parameter: nothing is skipped. A rank-stabilised LoRA whose alpha is not rank^1.5 needs scale sqrt(rank).
The last part is about LoRAs in training: layers that have one, and the file that becomes of them.
"""
import dataclasses
import math
import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fast import fp8
from formats import names
from formats.checkpoints import open_safetensors, parameter_shapes
from model import Linear

PREFIXES = re.compile(r"(?:diffusion_model\.|transformer\.|base_model\.model\.|lora_unet__?)*")
ENDINGS = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_A.weight": "down", "lora_B.weight": "up",
           "lora_A.default.weight": "down", "lora_B.default.weight": "up", "alpha": "alpha",
           "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}       # how a key ends: what the tensor then is


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


def read_lora(path, config, scale=1.0):
    """One file -> {our parameter: function () -> what the LoRA of strength `scale` adds to it, float32}, read when called.

    raises  ValueError naming the first key that fits nowhere and how many more there are, or a pair that is not whole
    """
    path, found, changes, problems = Path(path), {}, {}, []              # found {our parameter: {role: Entry}}
    if not path.is_file():
        raise ValueError(f"wanted a LoRA file, got {path}, which is {'a folder' if path.is_dir() else 'not there'}")
    for key, entry in open_safetensors(path).items():
        try:
            name, role = find(key, config)
            if found.setdefault(name, {}).setdefault(role, entry) is not entry:
                raise ValueError(f"and another key both lead to {name}")
        except ValueError as error:
            problems.append(f"{key} {error}")
    for name, roles in found.items():
        try:
            changes[name] = change(parameter_shapes("denoiser", config)[name], scale, roles)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems or not changes:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{path}: {problems[0] if problems else 'wanted a LoRA, got no tensors'}{more}")
    return changes


def change(shape, scale, roles):
    """{role: Entry} of one parameter, and its shape -> function () -> the difference, float32.  ValueError if shapes do not fit"""
    if len(roles) == 1 and roles.keys() <= {"weight", "bias", "modulation"}:
        diff, = roles.values()
        if math.prod(diff.shape) != math.prod(shape) or diff.shape[0] != shape[0]:
            raise ValueError(f"the difference has shape {diff.shape}, wanted {shape}")
        return lambda: (scale * diff.read().float()).view(shape)
    if not {"down", "up"} <= roles.keys() <= {"down", "up", "alpha"}:
        raise ValueError(f"wanted down and up or one difference, got {', '.join(sorted(roles))}")
    down, up = roles["down"], roles["up"]                            # (rank, in, ...), (out, rank, ...)
    rank = down.shape[0]
    if up.shape[:2] != (shape[0], rank) or math.prod(up.shape[2:]) != 1 or math.prod(down.shape[1:]) != math.prod(shape[1:]):
        raise ValueError(f"up {up.shape} @ down {down.shape} does not make {shape}")
    strength = scale * (roles["alpha"].read().float().item() if "alpha" in roles else rank) / rank
    return lambda: (strength * (up.read().float().flatten(1) @ down.read().float().flatten(1))).view(shape)


def merged(tensors, changes, device="cpu"):
    """A denoiser's tensors with LoRAs added. Float8 weights are multiplied out, changed and cast anew.

    tensors  {our name: Entry}        changes  [from `read_lora`, ...], in the order of adding        device  where to compute
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


def write(experts, config, target):
    """One file, or NAME.high and NAME.low for two experts, with the names of the official layers, which most programs read."""
    theirs = names.inverse(names.official_rules("denoiser", config))
    for expert, net in experts.items():
        tensors = {}
        for name, layer in net.named_modules():
            if isinstance(layer, LoRA):
                stem = "diffusion_model." + names.rename(f"{name}.weight", theirs).removesuffix(".weight")
                tensors |= {f"{stem}.lora_{letter}.weight": value.detach().cpu().contiguous()
                            for letter, value in (("A", layer.down), ("B", layer.up))}
        side = expert.partition("_")[2]
        path = Path(target).with_suffix(f".{side}.safetensors" if side else ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        print(f"wrote {path}, for convert_weights.py --lora {side + '=' if side else ''}{path}")
