"""Folders and files that others publish of S2V-14B: FastVideo's folder, GGUF files.  Run: python -m pytest tests/test_published.py

The tests of GGUF need the package gguf; they are skipped where it is not installed.
"""
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import convert_weights as convert
from formats import checkpoints, foreign, names
from tiny import random_weights as fake
from test_convert import INDEX, SHARD, bits, official, refusal, same   # noqa: F401 (official is a fixture)

VAE, TEXT, PART = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "diffusion_pytorch_model.safetensors"


# ---- FastVideo ----

@pytest.fixture(params=["safetensors", "bin"])
def fastvideo(request, official, tmp_path):
    """Official names and config in transformer, VAE and umT5 as diffusers and transformers have them, wav2vec2 in audio_encoder."""
    source, folder = official["s2v-14B"], tmp_path / "Wan2.2-S2V-14B-Diffusers"
    checkpoint = checkpoints.open_checkpoint(source)
    (folder / "transformer").mkdir(parents=True)
    for name in (SHARD, INDEX, "config.json"):
        shutil.copy(source / name, folder / "transformer")
    for kind, root, file in (("vae", "vae", PART), ("text", "text_encoder", "model.safetensors")):
        part = checkpoint.parts[kind]
        convert.write_safetensors(folder / root / file, convert.renamed(part, names.diffusers_rules(kind, part.config)))
        convert.write_json(folder / root / "config.json", convert.diffusers_fields(kind, part.config))
    shutil.copytree(source / foreign.WAV2VEC, folder / "audio_encoder")
    if request.param == "bin":
        whole = folder / "audio_encoder" / "model.safetensors"
        torch.save(load_file(whole), whole.with_name("pytorch_model.bin"))
        whole.unlink()
    convert.write_json(folder / "audio_processor" / "preprocessor_config.json", {"sampling_rate": 16000})
    convert.write_json(folder / "scheduler" / "scheduler_config.json", {"flow_shift": 3.0})
    convert.write_json(folder / "model_index.json", {"_class_name": "WanSpeechToVideoPipeline"})
    (folder / "tokenizer").mkdir()
    shutil.copy(checkpoint.tokenizer, folder / "tokenizer")
    return folder


def test_fastvideo(fastvideo, official, tmp_path):
    """The same weights as in the official folder, opened and converted; without its audio encoder it is not complete."""
    wanted, opened = (checkpoints.open_checkpoint(folder) for folder in (official["s2v-14B"], fastvideo))
    assert convert.main([str(fastvideo), str(tmp_path / "ours")]) == 0
    for checkpoint in (opened, checkpoints.open_checkpoint(tmp_path / "ours")):
        assert (checkpoint.task, checkpoint.sampling, checkpoint.configs) == ("s2v-14B", wanted.sampling, wanted.configs)
        for name in wanted.parts:
            same(bits(checkpoint.load(name)), bits(wanted.load(name)))
    shutil.rmtree(fastvideo / "audio_encoder")
    refusal(fastvideo, "audio_encoder/model.safetensors (audio)", "audio_encoder/config.json")


# ---- GGUF ----

def write_gguf(path, arch, tensors, kind_of, reshape=(), collapse=False):
    """{name: Tensor} -> a GGUF file, and {name: Tensor} that must come out of it.

    kind_of  function (name, tensor) -> name of the quantisation        reshape  names of tensors kept in rows of 256, as ComfyUI's tools do
    collapse  four axes at most, leading ones of length 1 dropped, as stable-diffusion.cpp does
    """
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer, wanted = gguf.GGUFWriter(path, arch), {}
    for name, tensor in tensors.items():
        kind, data = gguf.GGMLQuantizationType[kind_of(name, tensor)], tensor.float().numpy()
        if collapse:
            leading = next((i for i, n in enumerate(data.shape) if n > 1), 0)
            data = data.reshape(-1, *data.shape[2:]) if data.ndim == 5 else data.reshape(data.shape[leading:])
        if name in reshape:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
            data = data.reshape(-1, 256)
        stored = gguf.quants.quantize(data, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind.name, torch.bfloat16)
        wanted[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind).copy()).to(dtype).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def denoiser_kind(name, tensor):
    """As the published files: small tensors and modulation float32, convolutions float16, matrices quantised."""
    if tensor.ndim == 1 or "modulation" in name or tensor.numel() < 1024 or tensor.shape[-1] % 32:
        return "F32" if tensor.ndim < 5 else "F16"
    return "Q4_0" if ".ffn." in name else "BF16" if "self_attn.v" in name else "Q8_0"


def written(part, rules, path, arch, kind_of, prefix="", **options):
    """A Part -> a GGUF file -> {our name: Tensor} that must come out"""
    theirs = {names.rename(ours, names.inverse(rules)): ours for ours in part.tensors}
    wanted = write_gguf(path, arch, {prefix + name: part.tensors[ours].read() for name, ours in theirs.items()}, kind_of, **options)
    return {ours: wanted[prefix + name] for name, ours in theirs.items()}


def holds(part, wanted):
    """A Part has exactly these tensors, in these dtypes."""
    assert part.tensors.keys() == wanted.keys()
    for name, entry in part.tensors.items():
        tensor = entry.read()
        assert tensor.dtype == entry.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


COMFY = dict(reshape=["blocks.0.ffn.0.weight", "blocks.1.self_attn.q.weight"])


@pytest.mark.parametrize("prefix, options", [("", COMFY), ("model.diffusion_model.", dict(collapse=True))], ids=["comfy", "sd.cpp"])
def test_gguf(official, tmp_path, prefix, options):
    """Denoiser and umT5 in GGUF: as files for the converter, in place of the folder's own files, and the file itself as checkpoint."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    folder = shutil.copytree(official["s2v-14B"], tmp_path / "s2v")
    straight = checkpoints.open_checkpoint(official["s2v-14B"])
    denoiser, text, files = straight.parts["denoiser"], straight.parts["text"], [folder / "S2V-14B-Q4_0.gguf", folder / "umt5-xxl-Q8_0.gguf"]
    wanted = {"denoiser": written(denoiser, names.official_rules("denoiser", denoiser.config), files[0], "wan", denoiser_kind, prefix, **options),
              "text": written(text, names.TEXT_GGUF, files[1], "t5encoder", lambda name, x: "F32" if x.ndim == 1 or "rel_b" in name else "Q8_0")}
    for name in (SHARD, INDEX, TEXT):
        (folder / name).unlink()
    for source in (folder, files[0]):
        opened = checkpoints.open_checkpoint(source)
        assert opened.configs == straight.configs and opened.task == "s2v-14B"
        for kind, tensors in wanted.items():
            holds(opened.parts[kind], tensors)
    assert convert.main([str(folder), *map(str, files), str(tmp_path / "ours")]) == 0
    ours = checkpoints.open_checkpoint(tmp_path / "ours")
    holds(ours.parts["denoiser"], wanted["denoiser"])
    ours.load("denoiser")
    shutil.copy(files[0], folder / "S2V-14B-Q8_0.gguf")
    refusal(folder, "wants 1 file in place of its denoiser; got 2")
    holds(checkpoints.open_checkpoint(files[0]).parts["denoiser"], wanted["denoiser"])


def test_gguf_strict(official, tmp_path):
    """A key too few, half a file, and the other component's file are refused by name."""
    base, file = official["s2v-14B"], tmp_path / "x.gguf"
    tensors = load_file(base / SHARD)
    write_gguf(file, "wan", {name: x for name, x in tensors.items() if name != "head.head.bias"}, denoiser_kind)
    with pytest.raises(ValueError, match="x.gguf: head.head.bias is missing"):
        checkpoints.open_checkpoint(base, [file])
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a whole GGUF file"):
        checkpoints.open_checkpoint(base, [file])


def test_gguf_without_the_package(official, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(ValueError, match="is a GGUF file, .* pip install gguf"):
        checkpoints.open_checkpoint(official["s2v-14B"], [tmp_path / "x.gguf"])
