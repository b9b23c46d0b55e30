"""Other layouts than official folders: float8 and single files, LoRA, diffusers, and the way back.  Run: python -m pytest tests/test_layouts.py

The last tests compare with the model classes of diffusers and transformers; they are skipped where those are not installed.
"""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_weights as convert
from fast import fp8
from formats import checkpoints, foreign, lora, names
from tiny import random_weights as fake
from test_convert import INDEX, SHARD, bits, official, refusal, same, small   # noqa: F401 (official is a fixture)


# ---- float8 and single files ----

def equal(got, wanted):
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: tensor.dtype for name, tensor in wanted.items()}
    assert all(torch.equal(tensor.float(), wanted[name].float()) for name, tensor in got.items())


def test_fp8_folder(official, tmp_path, capsys):
    """--fp8 writes what `quantize` makes when loading; our layout is then strict about scales; a copy is the same bytes."""
    source, target = str(official["s2v-14B"]), tmp_path / "ours"
    assert convert.main([source, str(target), "--fp8", "--report"]) == 0
    assert "worst 10 of 46 float8 layers" in capsys.readouterr().out
    file = target / "denoiser.safetensors"
    same(bits(checkpoints.open_checkpoint(target).load("denoiser")), bits(checkpoints.open_checkpoint(source).load("denoiser", quantize=True)))
    convert.convert(target, tmp_path / "copy", torch.bfloat16)
    assert (tmp_path / "copy" / "denoiser.safetensors").read_bytes() == file.read_bytes()
    assert convert.main([str(target), str(tmp_path / "more"), "--report"]) == 2 and "float8 already" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    whole, key = load_file(file), "blocks.0.ffn.0.weight"
    for change, *parts in (
            ({key + "_scale": None}, f"{key}_scale is missing", "(384, 1)"),
            ({key + "_scale": whole[key + "_scale"].view(-1)}, f"{key}_scale", "(384,)", "wanted (384, 1)"),
            ({key + "_scale": whole[key + "_scale"].bfloat16()}, f"{key}_scale", "bfloat16", "wanted torch.float32"),
            ({"patch.weight_scale": torch.ones(128, 1)}, "patch.weight_scale belongs to no parameter"),
            ({"text.0.weight": whole["text.0.weight"].to(fp8.E4M3)}, "text.0.weight is float8", "only the denoiser's large matrices")):
        save_file({name: tensor for name, tensor in (whole | change).items() if tensor is not None}, file)
        refusal(target, file, *parts)


def float8_file(tensors, layout):
    """An official denoiser's tensors as another program publishes them in float8."""
    out, number = {}, torch.tensor(0.0123)
    for name, tensor in tensors.items():
        out[name] = tensor
        if tensor.ndim == 1 or "modulation" in name or layout == "rows" and not re.match(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.", name):
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().amax(1, keepdim=True) / 448 if layout == "rows" else number.clone()
        scaled = name.endswith(".weight") and layout != "unscaled"
        out[name] = fp8.cast(tensor.float() / (scale.view(-1, *[1] * (tensor.ndim - 1)) if scaled else 1))
        if scaled:
            out[layer + (".weight_scale" if layout in ("comfy", "rows") else ".scale_weight")] = scale
        if scaled and layout == "comfy":
            out[layer + ".comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            out[layer + ".input_scale"] = torch.tensor(1.0)
        if scaled and layout == "comfy-old":
            out[layer + ".scale_input"] = torch.tensor(1.0)
    if layout == "comfy-old":
        out["scaled_fp8"] = torch.zeros(2, dtype=fp8.E4M3)
    return out


def test_float8_is_multiplied_out_in_pieces():
    weight, scale = torch.randn(10, 6).to(fp8.E4M3), torch.rand(10)
    entries = checkpoints.Entry(None, (10, 6), fp8.E4M3, lambda: weight), checkpoints.Entry(None, (10,), torch.float32, lambda: scale)
    assert torch.equal(foreign.multiplied(*entries, rows=3), (weight.float() * scale[:, None]).bfloat16())


@pytest.mark.parametrize("prefix, layout", [("model.diffusion_model.", "comfy"), ("diffusion_model.", "comfy-old"), ("", "rows"), ("", "unscaled")])
def test_float8_files(official, tmp_path, prefix, layout):
    """Bytes and scales are kept where our layers multiply in float8, everything else is multiplied out; the base lacks the denoiser."""
    file, base = tmp_path / "single.safetensors", Path(shutil.copytree(official["s2v-14B"], tmp_path / "base"))
    theirs = float8_file(load_file(base / SHARD), layout)
    save_file({prefix + name: tensor for name, tensor in theirs.items()}, file)
    for name in (SHARD, INDEX):
        (base / name).unlink()
    config = small("s2v-14B")["denoiser"]
    wanted = {}
    for ours, name in fake.official_names("denoiser", config).items():
        tensor, layer = theirs[name], name.removesuffix(".weight")
        scale = theirs.get(layer + ".scale_weight", theirs.get(layer + ".weight_scale", torch.tensor(1.0)))
        wanted[ours] = tensor
        if tensor.dtype == fp8.E4M3 and fp8.uses_fp8(ours):
            wanted[ours + "_scale"] = scale.reshape(-1, 1).expand(len(tensor), 1)
        elif tensor.dtype == fp8.E4M3:
            wanted[ours] = (tensor.float() * scale).bfloat16()
    assert any(tensor.dtype == fp8.E4M3 for tensor in wanted.values())
    assert convert.main([str(base), str(file), str(tmp_path / "ours")]) == 0
    ours = checkpoints.open_checkpoint(tmp_path / "ours")
    equal({name: entry.read() for name, entry in ours.parts["denoiser"].tensors.items()}, wanted)
    ours.load("denoiser")


def test_wrong_single_files(official, tmp_path):
    base, file, layer = official["s2v-14B"], tmp_path / "single.safetensors", "blocks.0.ffn.0"
    tensors = load_file(base / SHARD)
    float8 = {layer + ".weight": tensors[layer + ".weight"].to(fp8.E4M3)}
    for changes, *parts in (
            ({layer + ".comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, layer, "nvfp4", "wanted float8_e4m3fn"),
            ({layer + ".scale_weight": torch.ones(())}, "has a scale, wanted float8, got torch.bfloat16"),
            ({"gone.scale_weight": torch.ones(())}, "gone.weight has a scale", "got nothing"),
            (float8 | {layer + ".weight_scale": torch.ones(7)}, "shape (7,)", "384, one a row"),
            (float8 | {layer + ".weight_scale": torch.ones(()), layer + ".scale_weight": torch.ones(())}, "two scales"),
            ({layer + ".weight": tensors[layer + ".weight"].to(torch.int8)}, layer, "I8"),
            ({"extra.weight": torch.zeros(3)}, "extra.weight belongs to no parameter"),
            ({"diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.zeros(3, 3)}, "--lora")):
        save_file(tensors | changes, file)
        with pytest.raises(ValueError) as error:
            checkpoints.open_checkpoint(base, [file])
        assert all(part in str(error.value) for part in (str(file), *parts)), error.value
    save_file({"some.weight": torch.zeros(3)}, file)
    for source, files, part in (
            ("s2v-14B", [file], "unknown model"), ("s2v-14B", [tmp_path / "no"], "not there"), ("s2v-14B", [base / SHARD] * 2, "got 2"),
            ("t2v-A14B", [base / SHARD], "wants 2 files in place of its denoiser, the high-noise expert first; got 1")):
        with pytest.raises(ValueError, match=part):
            checkpoints.open_checkpoint(official[source], files)


def test_single_files_of_other_components(official, tmp_path):
    """Two experts in order, a VAE, and umT5 with transformers' names in float8, which is multiplied out."""
    base, straight = official["t2v-A14B"], checkpoints.open_checkpoint(official["t2v-A14B"])
    part = straight.parts["text"]
    tensors = {names.rename(ours, names.inverse(names.TEXT_DIFFUSERS)): entry.read() for ours, entry in part.tensors.items()}
    key = "encoder.block.0.layer.0.SelfAttention.q"
    tensors |= {key + ".weight": fp8.cast(tensors[key + ".weight"].float() * 100), key + ".scale_weight": torch.tensor(0.01),
                "scaled_fp8": torch.zeros(0, dtype=fp8.E4M3), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "umt5.safetensors")
    files = [base / f"{noise}_noise_model" / SHARD for noise in ("low", "high")] + [tmp_path / "umt5.safetensors", base / "Wan2.1_VAE.pth"]
    assert convert.main([str(base), *map(str, files), str(tmp_path / "ours")]) == 0
    ours = checkpoints.open_checkpoint(tmp_path / "ours")
    same(bits(ours.load("denoiser_high")), bits(straight.load("denoiser_low")))
    same(bits(ours.load("denoiser_low")), bits(straight.load("denoiser_high")))
    same(bits(ours.load("vae")), bits(straight.load("vae")))
    q = ours.parts["text"].tensors["blocks.0.attn.q.weight"]
    assert torch.equal(q.read(), (tensors[key + ".weight"].float() * 0.01).bfloat16())


# ---- LoRA ----

LAYERS = {   # our name of a layer: theirs, diffusers'
    "blocks.1.self_attn.q": ("blocks.1.self_attn.q", "blocks.1.attn1.to_q"),
    "blocks.0.self_attn.o": ("blocks.0.self_attn.o", "blocks.0.attn1.to_out.0"),
    "blocks.2.cross_attn.v": ("blocks.2.cross_attn.v", "blocks.2.attn2.to_v"),
    "blocks.0.ffn.0": ("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"),
    "blocks.1.ffn.2": ("blocks.1.ffn.2", "blocks.1.ffn.net.2"),
    "patch": ("patch_embedding", "patch_embedding"),
    "blocks.0.inject.k": ("audio_injector.injector.0.k", None),
    "text.0": ("text_embedding.0", "condition_embedder.text_embedder.linear_1")}
LORAS = [    # prefix, naming, how dots are written, ending with {} for down or up, alpha
    ("diffusion_model.", 0, ".", ".lora_{}.weight", 8.0),
    ("", 0, ".", ".lora_{AB}.default.weight", None),
    ("base_model.model.", 0, ".", ".lora_{AB}.weight", None),
    ("transformer.", 1, ".", ".lora_{AB}.weight", None),
    ("lora_unet_", 0, "_", ".lora_{}.weight", 2.0),
    ("lora_unet__", 0, "_", ".lora_{}.weight", 2.0)]


def lora_pairs(shapes, rank=4):
    """{our layer: down, up} for all layers of LAYERS"""
    random, pairs = torch.Generator().manual_seed(3), {}
    for ours in LAYERS:
        n_out, *n_in = shapes[ours + ".weight"]
        pairs[ours] = torch.randn(rank, *n_in, generator=random) * 0.1, torch.randn(n_out, rank, *[1] * (len(n_in) - 1), generator=random)
    return pairs


@pytest.mark.parametrize("prefix, naming, dot, ending, alpha", LORAS)
def test_lora_layouts(prefix, naming, dot, ending, alpha, tmp_path):
    """Every layout leads to the same sum, bit for bit: W + alpha / rank * up @ down in float32."""
    config = small("s2v-14B")["denoiser"]
    part = fake.random_part("denoiser", config, torch.bfloat16, "denoiser")
    pairs, tensors, wanted = lora_pairs(checkpoints.parameter_shapes("denoiser", config)), {}, {}
    for ours, (down, up) in pairs.items():
        if theirs := LAYERS[ours][naming]:
            layer, weight = prefix + theirs.replace(".", dot), part.tensors[ours + ".weight"].read().float()
            for matrix, words in ((down, dict(AB="A")), (up, dict(AB="B"))):
                tensors[layer + ending.format("down" if matrix is down else "up", **words)] = matrix
            tensors |= {layer + ".alpha": torch.tensor(alpha)} if alpha else {}
            delta = (0.5 * (alpha / 4 if alpha else 1)) * (up.flatten(1) @ down.flatten(1))
            wanted[ours + ".weight"] = (weight + delta.view(weight.shape)).bfloat16()
    save_file(tensors, tmp_path / "lora.safetensors")
    merged = lora.merged(part.tensors, [lora.read_lora(tmp_path / "lora.safetensors", config, 0.5)[0]])
    assert merged.keys() == part.tensors.keys()
    for name, entry in merged.items():
        assert torch.equal(entry.read().to(entry.dtype), wanted.get(name, part.tensors[name].read())), name


def test_lora_differences(tmp_path):
    """Whole differences of weight, bias, modulation and norms; two files add up; float8 weights are changed and cast anew."""
    config, random = small("s2v-14B")["denoiser"], torch.Generator().manual_seed(5)
    part = fake.random_part("denoiser", config, torch.bfloat16, "denoiser")
    theirs = {"blocks.0.ffn.0.diff": "blocks.0.ffn.0.weight", "blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
              "blocks.1.diff_m": "blocks.1.modulation", "head.diff_m": "head.modulation", "head.head.diff": "head.linear.weight",
              "blocks.1.norm3.diff": "blocks.1.cross_norm.weight", "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight"}
    tensors = {f"diffusion_model.{key}": torch.randn(part.tensors[ours].shape, generator=random) for key, ours in theirs.items()}
    save_file(tensors, tmp_path / "diff.safetensors")
    files = [lora.read_lora(tmp_path / "diff.safetensors", config, scale)[0] for scale in (0.25, 1.0)]
    sums = {ours: part.tensors[ours].read().float() + 0.25 * tensors[f"diffusion_model.{key}"] + tensors[f"diffusion_model.{key}"]
            for key, ours in theirs.items()}
    for name, entry in lora.merged(part.tensors, files).items():
        assert torch.equal(entry.read().to(entry.dtype), sums[name].bfloat16() if name in sums else part.tensors[name].read())
    float8, key = fp8.quantized(part.tensors), "blocks.0.ffn.0.weight"
    merged = lora.merged(float8, files)
    assert {name: entry.dtype for name, entry in merged.items()} == {name: entry.dtype for name, entry in float8.items()}
    exact = fp8.dequantize(float8[key].read(), float8[key + "_scale"].read()) + 1.25 * tensors["diffusion_model.blocks.0.ffn.0.diff"]
    assert fp8.relative_error(fp8.dequantize(merged[key].read(), merged[key + "_scale"].read()), exact) < 0.03
    assert merged["blocks.1.ffn.0.weight"] is float8["blocks.1.ffn.0.weight"]


DOWN, UP = torch.full((4, 128), 0.1), torch.ones(128, 4)
METADATA = [   # header, adapter_config.json, tensors besides the pair, strength, a word of what is said
    ({}, None, {}, 1.0, "no alpha given"),
    ({"lora_alpha": "16"}, None, {}, 4.0, "alpha 16 / rank 4, from its header"),
    ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, None, {}, 0.5, "alpha 2 / rank 4"),
    ({"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})}, None, {}, 4.0, "alpha 16 / rank 4"),
    ({"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.use_rslora": True})}, None, {}, 8.0,
     "alpha 16 / sqrt(rank 4)"),
    ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16, "text_encoder.lora_alpha": 2})}, None, {}, 4.0, "alpha 16 / rank 4"),
    ({}, {"r": 4, "lora_alpha": 16}, {}, 4.0, "from adapter_config.json"),
    ({}, {"r": 4, "lora_alpha": 16, "use_rslora": True}, {}, 8.0, "sqrt(rank 4)"),
    ({}, {"r": 4, "lora_alpha": 16, "alpha_pattern": {"self_attn.q": 2}}, {}, 0.5, "alpha 2 / rank 4"),
    ({}, {"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn.q": 2}}, {}, 4.0, "alpha 16 / rank 4"),
    ({"lora_alpha": "16"}, {"lora_alpha": 2}, {"alpha": torch.tensor(8.0)}, 2.0, "alpha 8 / rank 4, from its tensors")]


@pytest.mark.parametrize("header, beside, more, strength, word", METADATA)
def test_lora_strength(tmp_path, header, beside, more, strength, word):
    """The strength that a file names anywhere is the one used, and it is said; a file or a folder as PEFT saves it is given."""
    config, stem = small("s2v-14B")["denoiser"], "base_model.model.blocks.0.self_attn.q"
    tensors = {f"{stem}.lora_A.weight": DOWN, f"{stem}.lora_B.weight": UP} | {f"{stem}.{name}": value for name, value in more.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata=header)
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | beside))
    for scale, path in ((1.0, tmp_path), (0.5, tmp_path / "adapter_model.safetensors")):
        changes, said, warning = lora.read_lora(path, config, scale)
        torch.testing.assert_close(changes["blocks.0.self_attn.q.weight"](), scale * strength * UP @ DOWN)
        assert f"strength {scale * strength:g} (scale {scale:g}" in said and word in said, said
        assert (warning is None) == (word != "no alpha given")


def test_lora_strength_is_said(official, tmp_path, capsys):
    """The converter says the strength, warns where none is given, and refuses an alpha that is no number."""
    file = tmp_path / "lora.safetensors"
    tensors = {"blocks.0.self_attn.q.lora_A.weight": DOWN, "blocks.0.self_attn.q.lora_B.weight": UP}
    for header, said, warned in (({}, "strength 0.5 ", True), ({"lora_alpha": "16"}, "strength 2 ", False)):
        save_file(tensors, file, metadata=header)
        assert convert.main([str(official["s2v-14B"]), "--check", "--lora", f"{file}:0.5"]) == 0
        out, err = capsys.readouterr()
        assert said in out and err.startswith("warning: ") == warned and ("names no strength for 1 of 1 layers" in err) == warned
    save_file(tensors, file, metadata={"lora_alpha": "much"})
    with pytest.raises(ValueError, match="wanted a number as alpha, got 'much' from its header"):
        lora.read_lora(file, small("s2v-14B")["denoiser"])


def test_live_avatar_lora(tmp_path):
    """896 tensors of rank 128 without alpha on the released S2V are LiveAvatar's, whose program takes 0.5; with one layer less they are not."""
    config, file = fake.released("s2v-14B")["denoiser"], tmp_path / "liveavatar.safetensors"
    layers = [f"blocks.{i}.{name}" for i in range(40) for name in (*(f"{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo"), "ffn.0", "ffn.2")]
    layers += [f"audio_injector.injector.{i}.{x}" for i in range(12) for x in "qkvo"]
    wide = {"ffn.0": (5120, 13824), "ffn.2": (13824, 5120)}

    def written(layers):
        header, offset = {}, 0
        for layer in layers:
            n_in, n_out = wide.get(layer.split(".", 2)[2], (5120, 5120))
            for letter, shape in (("A", (128, n_in)), ("B", (n_out, 128))):
                end = offset + 2 * shape[0] * shape[1]
                header[f"{layer}.lora_{letter}.default.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
        head = json.dumps(header).encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head)
        with open(file, "r+b") as out:
            out.truncate(8 + len(head) + offset)                         # zeros that take no room
        assert len(header) == 2 * len(layers)
        return lora.read_lora(file, config)

    changes, said, warning = written(layers)
    assert len(changes) == 448 and "strength 0.5 " in said and "LiveAvatar" in said and "896" in said and warning is None
    changes, said, warning = written(layers[1:])
    assert "strength 1 " in said and "LiveAvatar" not in said and "447 of 447" in warning


def test_wrong_lora(tmp_path):
    config, file = small("s2v-14B")["denoiser"], tmp_path / "lora.safetensors"
    pair = {"blocks.0.self_attn.q.lora_down.weight": torch.zeros(4, 128), "blocks.0.self_attn.q.lora_up.weight": torch.zeros(128, 4)}

    def refused(changes, *parts):
        save_file({name: tensor.clone() for name, tensor in (pair | changes).items() if tensor is not None}, file)
        with pytest.raises(ValueError) as error:
            lora.read_lora(file, config)
        assert all(part in str(error.value) for part in (str(file), *parts)), error.value

    z = torch.zeros(4, 128)
    refused({"blocks.0.norm9.lora_down.weight": z, "blocks.99.ffn.0.lora_up.weight": z, "vace.diff": z},
            "blocks.0.norm9.lora_down.weight belongs to no parameter", "(and 2 more)")
    for kind, *endings in (("DoRA", "dora_scale", "lora_magnitude_vector.weight"), ("LoHa", "hada_w1_a"), ("LoKr", "lokr_w1", "lokr_w2_b"),
                           ("LoCon", "lora_mid.weight")):
        for ending in endings:
            refused({f"blocks.0.self_attn.q.{ending}": z}, f"is a {kind}", "take a LoRA", f"q.{ending}")
    refused({"blocks.0.self_attn.q.lora_up.weight": None}, "blocks.0.self_attn.q.weight", "wanted down and up", "got down")
    refused({"blocks.0.self_attn.q.lora_up.weight": torch.zeros(128, 8)}, "(128, 8)", "does not make (128, 128)")
    refused({"blocks.0.self_attn.q.lora_A.weight": z}, "and another key both lead to blocks.0.self_attn.q.weight")
    refused({"blocks.0.self_attn.q.diff": z}, "wanted down and up or one difference")
    refused({"blocks.0.ffn.0.diff_b": torch.zeros(5)}, "blocks.0.ffn.0.bias", "(5,)", "(384,)")
    refused({"diffusion_model.blocks.0.attn1.to_q.lora_A.weight": z}, "attn1.to_q.lora_A.weight is ambiguous")
    refused({"lora_unet_blocks_0_attn2_to_q.lora_down.weight": z}, "ambiguous")
    save_file({}, file)
    with pytest.raises(ValueError, match="no tensors"):
        lora.read_lora(file, config)


def test_lora_of_wan21_i2v(official, tmp_path, capsys):
    """It is refused by its name; the option leaves out what reads the picture, in both spellings, and nothing else."""
    file, target = tmp_path / "i2v21.safetensors", tmp_path / "ours"
    stem = "diffusion_model.blocks.0."
    tensors = {f"{stem}{layer}.lora_{letter}.weight": x for layer in ("self_attn.q", "cross_attn.k_img", "cross_attn.v_img")
               for letter, x in (("A", DOWN.clone()), ("B", UP.clone()))} | {"diffusion_model.img_emb.proj.0.diff": torch.zeros(9),
                                                                            f"{stem}cross_attn.norm_k_img.diff": torch.zeros(128)}
    save_file(tensors, file)
    arguments = [str(official["s2v-14B"]), str(target), "--lora", str(file)]
    assert convert.main(arguments) == 2 and not target.exists()
    message = capsys.readouterr().err
    assert "is a LoRA of Wan2.1-I2V: 6 of its keys" in message and "--without-image-keys" in message and message.count("\n") == 1
    assert convert.main([*arguments, "--without-image-keys"]) == 0
    assert "6 keys of the attention to the picture left out" in capsys.readouterr().out
    straight, ours = (checkpoints.open_checkpoint(folder).parts["denoiser"].tensors for folder in (official["s2v-14B"], target))
    changed = [name for name in straight if not torch.equal(straight[name].read(), ours[name].read())]
    assert changed == ["blocks.0.self_attn.q.weight"]
    save_file(tensors | {"vace.diff": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="vace.diff belongs to no parameter"):
        lora.read_lora(file, small("s2v-14B")["denoiser"], without_image=True)


def test_lora_command(official, tmp_path, capsys):
    """One of two experts is changed; --fp8 casts the exact sum; refusals end with status 2 and leave nothing."""
    file, base, target = tmp_path / "lora.safetensors", official["t2v-A14B"], tmp_path / "ours"
    delta, key = torch.randn(384, 128, generator=torch.Generator().manual_seed(1)), "blocks.0.ffn.0.weight"
    save_file({"blocks.0.ffn.0.diff": delta}, file)
    assert convert.main([str(base), str(target), "--fp8", "--lora", f"low={file}:-0.5"]) == 0
    straight, ours = checkpoints.open_checkpoint(base).parts, checkpoints.open_checkpoint(target).parts
    for expert, factor in (("denoiser_high", 0), ("denoiser_low", -0.5)):
        wanted, scale = fp8.quantize_weight(straight[expert].tensors[key].read().float() + factor * delta)
        tensors = ours[expert].tensors
        equal({"weight": tensors[key].read(), "scale": tensors[key + "_scale"].read()}, {"weight": wanted, "scale": scale})
    capsys.readouterr()
    for source, given, part in ((official["s2v-14B"], f"high={file}", "has one denoiser"), (base, f"{file}.no:2", "not there")):
        assert convert.main([str(source), str(tmp_path / "other"), "--lora", given]) == 2
        assert part in (message := capsys.readouterr().err) and message.count("\n") == 1 and not (tmp_path / "other").exists()


# ---- writing other layouts ----

@pytest.mark.parametrize("task", ["i2v-A14B", "ti2v-5B"])
def test_to_diffusers(official, tmp_path, task):
    """Ours -> diffusers -> ours: the same bytes in every file."""
    ours, there, back = (tmp_path / name for name in ("ours", "there", "back"))
    convert.convert(official[task], ours)
    assert convert.main([str(ours), str(there), "--to", "diffusers"]) == 0
    convert.convert(there, back)
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in ours.iterdir())
    assert all((back / path.name).read_bytes() == path.read_bytes() for path in ours.iterdir())


@pytest.mark.parametrize("task", ["s2v-14B", "t2v-A14B"])
def test_to_comfy(official, tmp_path, task):
    """Ours -> single files -> ours: the same bytes."""
    ours, there, back = (tmp_path / name for name in ("ours", "there", "back"))
    convert.convert(official[task], ours)
    assert convert.main([str(ours), str(there), "--to", "comfy"]) == 0
    files = sorted((there / "diffusion_models").iterdir()) + [there / "vae" / "vae.safetensors"]
    assert "patch_embedding.weight" in load_file(files[0]) and len(files) == (3 if "A14B" in task else 2)
    assert convert.main([str(ours), *map(str, files), str(back)]) == 0
    assert all((back / path.name).read_bytes() == path.read_bytes() for path in ours.iterdir())


@pytest.mark.parametrize("first", [[], ["--fp8"]], ids=["from bf16", "from float8 rows"])
def test_to_comfy_in_float8(official, tmp_path, first):
    """One scale per matrix, a single number, whatever it is made from; the file is read back as the product that ComfyUI computes."""
    ours, there = tmp_path / "ours", tmp_path / "there"
    assert convert.main([str(official["s2v-14B"]), str(ours), *first]) == 0
    assert convert.main([str(ours), str(there), "--to", "comfy", *([] if first else ["--fp8"])]) == 0
    file, straight = there / "diffusion_models" / "denoiser.safetensors", checkpoints.open_checkpoint(official["s2v-14B"]).parts["denoiser"].tensors
    theirs, again = load_file(file), fp8.multiplied_out(checkpoints.open_checkpoint(ours, [file]).parts["denoiser"].tensors)
    float8 = [name for name, tensor in theirs.items() if tensor.dtype == fp8.E4M3]
    assert len(float8) == 46 and "blocks.3.ffn.2.weight" in float8
    for name in float8:
        scale, key = theirs[name + "_scale"], names.rename(name, names.official_rules("denoiser", small("s2v-14B")["denoiser"]))
        assert scale.shape == () and scale.dtype == torch.float32 and json.loads(bytes(theirs[name.removesuffix("weight") + "comfy_quant"].tolist()))
        product = theirs[name].float() * scale
        assert fp8.relative_error(again[key].read(), product) < 3e-6
        assert fp8.relative_error(product, straight[key].read()) < (0.04 if first else 0.03)


def as_variant(folder, stem, variant):
    """Rename the plain safetensors file of a component."""
    (folder / f"{stem}.safetensors").rename(folder / f"{stem}.{variant}.safetensors")


def as_shards(folder, stem, ending, write):
    """Split a component into two shards with an index, as variants bf16 or .bin files are published."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    start = stem.replace("model", "pytorch_model") if ending == "bin" and stem == "model" else stem
    index = f"{start}.safetensors.index.bf16.json" if ending == "safetensors" else f"{start}.bin.index.json"
    files = [f"{start}{'.bf16' * (ending == 'safetensors')}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for file, half in zip(files, halves):
        write(half, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": {name: file for file, half in zip(files, halves) for name in half}}))


def test_diffusers_variants_and_bin(official, tmp_path):
    """Variants and .bin files, single and in shards, hold the same weights; of two variants one must be chosen; plain files come first."""
    folder = tmp_path / "there"
    assert convert.main([str(official["ti2v-5B"]), str(folder), "--to", "diffusers"]) == 0
    straight = checkpoints.open_checkpoint(folder)
    as_shards(folder / "transformer", "diffusion_pytorch_model", "safetensors", save_file)
    as_variant(folder / "vae", "diffusion_pytorch_model", "fp16")
    as_shards(folder / "text_encoder", "model", "bin", torch.save)
    for again in ("variants", "bin"):
        opened = checkpoints.open_checkpoint(folder)
        for name in straight.parts:
            same(bits(opened.load(name)), bits(checkpoints.open_checkpoint(official["ti2v-5B"]).load(name)))
        if again == "variants":
            file = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
            torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin"))
            whole = file.read_bytes()
            file.unlink()
    for variant in ("fp16", "bf16"):
        (folder / "vae" / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(whole)
    refusal(folder, folder / "vae", "several variants of diffusion_pytorch_model: bf16, fp16", "keep the files of one")


def test_tokenizer_class(official, tmp_path):
    """The tokenizer of a written diffusers folder is read as tokenizer.json has it, bytes of rare letters included."""
    assert convert.main([str(official["ti2v-5B"]), str(tmp_path / "there"), "--to", "diffusers"]) == 0
    read = lambda name: json.loads((tmp_path / "there" / name).read_text())
    assert read("model_index.json")["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert read("tokenizer/tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_no_such_layout(official, tmp_path, capsys):
    assert convert.main([str(official["s2v-14B"]), str(tmp_path / "x"), "--to", "diffusers"]) == 2
    assert "no class for S2V" in capsys.readouterr().err
    assert convert.main([str(official["ti2v-5B"]), str(tmp_path / "x"), "--to", "diffusers", "--fp8"]) == 2
    assert "no layout" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_strict_diffusers(official, tmp_path):
    """Strict like the official layout: a missing file, a missing key, an unsupported setting."""
    folder = tmp_path / "there"
    assert convert.main([str(official["ti2v-5B"]), str(folder), "--to", "diffusers"]) == 0
    file, config = folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "transformer" / "config.json"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "decoder.conv_in.bias"}, file)
    refusal(folder, "decoder.conv_in.bias is missing")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_dim": 1280}))
    refusal(folder, "transformer/config.json", "image_dim = None", "got 1280")
    file.unlink()
    refusal(folder, "vae/diffusion_pytorch_model.safetensors (vae)")


# ---- diffusers ----

SIZES = dict(num_attention_heads=2, attention_head_dim=32, ffn_dim=96, num_layers=2, text_dim=48, freq_dim=32)
TASKS = {"t2v-A14B": dict(), "i2v-A14B": dict(in_channels=36), "ti2v-5B": dict(in_channels=48, out_channels=48)}


@pytest.fixture(scope="module", params=TASKS)
def diffusers_folder(request, tmp_path_factory):
    """A folder written by diffusers and transformers themselves, and the modules that are in it: {folder: module}"""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its model classes are compared where it is")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    diffusers.utils.logging.disable_progress_bar()
    task, folder, vae = request.param, tmp_path_factory.mktemp("diffusers"), dict(base_dim=8, num_res_blocks=1)
    if task == "ti2v-5B":
        vae |= dict(decoder_base_dim=12, z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16,
                    latents_mean=list(fake.VAE22.mean), latents_std=list(fake.VAE22.std))
    text = transformers.UMT5Config(vocab_size=200, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3)
    modules = {"transformer": diffusers.WanTransformer3DModel(**SIZES, **TASKS[task]), "vae": diffusers.AutoencoderKLWan(**vae),
               "text_encoder": transformers.UMT5EncoderModel(text)}
    if task != "ti2v-5B":
        modules["transformer_2"] = diffusers.WanTransformer3DModel(**SIZES, **TASKS[task])
    for root, module in modules.items():
        for name, parameter in module.named_parameters():                # so that no norm or modulation is a plain 1 or 0
            parameter.data = fake.random_tensor(name.replace("scale_shift_table", "modulation"), parameter.shape, torch.float32, seed=root)
        module.eval().requires_grad_(False).save_pretrained(folder / root, max_shard_size="100KB" if "transformer" in root else "1GB")
    (folder / "tokenizer").mkdir()
    fake.make_tokenizer(folder / "tokenizer" / "tokenizer.json")
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.8 if "transformer_2" in modules else None}))
    return task, folder, modules


def close(ours, theirs):
    """Float32 sums in another order."""
    return ours.shape == theirs.shape and float((ours - theirs).norm() / theirs.norm()) < 1e-5


@torch.inference_mode()
def test_diffusers(diffusers_folder, tmp_path):
    """The same weights through their classes and ours; what --to diffusers writes, their classes read with every value in place."""
    task, folder, modules = diffusers_folder
    checkpoint = checkpoints.open_checkpoint(folder)
    assert (checkpoint.task, checkpoint.boundary) == (task, None if task == "ti2v-5B" else 0.8)
    random, cfg = torch.Generator().manual_seed(1), checkpoint.configs["denoiser"]
    latents = torch.randn(1, cfg.in_dim, 3, 8, 6, generator=random)
    text, t = torch.randn(1, 512, cfg.text_dim, generator=random), torch.tensor([612.0])
    for theirs, name in zip(("transformer", "transformer_2"), checkpoint.experts):
        net = checkpoint.load(name)
        image = latents[:, cfg.out_dim:] if cfg.in_dim > cfg.out_dim else None
        assert close(net(latents[:, :cfg.out_dim], t, net.prepare((3, 8, 6), text, image=image)), modules[theirs](latents, t, text).sample)
    vae, cfg = checkpoint.load("vae"), checkpoint.configs["vae"]
    video = torch.rand(1, 3, 9, 64, 96, generator=random) * 2 - 1
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (cfg.mean, cfg.std))
    encoded = (modules["vae"].encode(video).latent_dist.mode() - mean) / std
    assert close(vae.encode(video), encoded) and close(vae.decode(encoded), modules["vae"].decode(encoded * std + mean).sample)
    ids = torch.randint(3, 200, (1, 37), generator=random)
    assert close(checkpoint.load("text")(ids), modules["text_encoder"](ids).last_hidden_state)

    assert convert.main([str(folder), str(tmp_path / "there"), "--to", "diffusers"]) == 0
    for name, module in modules.items():
        loaded = type(module).from_pretrained(tmp_path / "there" / name)
        for field in [field for field in module.config if not field.startswith("_")] if name != "text_encoder" else []:
            assert json.dumps(loaded.config[field]) == json.dumps(module.config[field]), field
        same(bits(loaded), bits(module))
