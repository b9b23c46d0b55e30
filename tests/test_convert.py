"""Checkpoint folders: name tables, strictness, the converter, tiny random checkpoints.  Run: python -m pytest tests/test_convert.py"""
import json
import math
import os
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import as_program, forget
from safetensors.torch import load_file, save_file

import convert_weights as convert
from formats import checkpoints, foreign, lora, names
from tiny import random_weights as fake

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {"s2v-14B": "s2v-14B", "t2v-A14B": "t2v-A14B", "i2v-A14B": "i2v-A14B", "ti2v-5B": "ti2v-5B", "vae2_1": "s2v-14B", "vae2_2": "ti2v-5B",
          "umt5-xxl-encoder": "s2v-14B", "wav2vec2-large-xlsr-53": "s2v-14B"}                   # manifest: a task that has this network
SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def small(task):
    return fake.changed(fake.tiny(task), ["denoiser.n_layer=4", "vae.dim=8", "vae.dec_dim=8", "text.n_layer=1"])


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """{task: official-layout folder of tiny random weights}"""
    root = tmp_path_factory.mktemp("official")
    for task in checkpoints.SAMPLING:
        fake.official(task, root / task, small(task))
    return {task: root / task for task in checkpoints.SAMPLING}


@pytest.fixture
def s2v(official, tmp_path):
    """A copy of the S2V folder to be spoilt."""
    return Path(shutil.copytree(official["s2v-14B"], tmp_path / "s2v"))


def refusal(folder, *parts):
    """The one-line message with which a folder is refused; it must contain all parts."""
    with pytest.raises(ValueError) as error:
        checkpoints.open_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    for part in parts:
        assert str(part) in message, message
    return message


def edit(file, change):
    """Rewrite a file with change(its tensors)."""
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    change(tensors)
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)


def bits(module):
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in module.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- name tables at full size ----

@pytest.mark.parametrize("name, task", MODELS.items())
def test_manifest(name, task):
    """Every published key and shape has one place, every place is filled, the table reads backwards, the config is the released one."""
    meta = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    entries = {key: checkpoints.Entry(Path(name), tuple(shape), torch.float32, None) for key, shape in meta["state_dict"].items()}
    kind, config, rules = names.identify(name, meta["constructor"], entries)
    found = checkpoints.match(entries, rules, kind, config)
    dropped = {key for key in entries if names.rename(key, rules) is None}
    assert config == fake.released(task)[kind]
    assert len(found) + len(dropped) == len(entries)
    assert dropped == ({"lm_head.weight", "lm_head.bias", "wav2vec2.masked_spec_embed"} if kind == "audio" else set())
    assert sum(math.prod(entry.shape) for entry in entries.values()) == meta["parameters"]
    back = {names.rename(ours, names.inverse(rules)) for ours in found}
    assert {key.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1")
            for key in back} == entries.keys() - dropped


# ---- folders that are right ----

@pytest.mark.parametrize("task", checkpoints.SAMPLING)
def test_official_folder(official, tmp_path, task):
    """Found out from its files; read in memory it equals its converted copy bit for bit, and both equal what was written."""
    straight = checkpoints.open_checkpoint(official[task])
    convert.convert(official[task], tmp_path / "ours")
    copy = checkpoints.open_checkpoint(tmp_path / "ours")
    assert straight.task == copy.task == task
    assert straight.experts == (["denoiser_high", "denoiser_low"] if "A14B" in task else ["denoiser"])
    assert straight.boundary == {"t2v-A14B": 0.875, "i2v-A14B": 0.9}.get(task) == copy.boundary
    assert straight.sampling == copy.sampling == checkpoints.SAMPLING[task]
    assert straight.configs == copy.configs == small(task)
    for name, part in straight.parts.items():
        same(bits(straight.load(name)), bits(copy.load(name)))
        published = fake.official_names(part.kind, part.config)
        for ours, entry in part.tensors.items():
            assert torch.equal(entry.read(), fake.random_tensor(published[ours], entry.shape, entry.dtype, name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_parameter_dtype(official, tmp_path):
    """What is loaded has the dtypes of `parameter_dtype`, which the planner reckons with: float8 as stored, norms and modulation float32."""
    assert convert.main([str(official["s2v-14B"]), str(tmp_path / "ours"), "--fp8"]) == 0
    checkpoint = checkpoints.open_checkpoint(tmp_path / "ours")
    for component, part in checkpoint.parts.items():
        for dtype in (None, torch.bfloat16, torch.float32):
            net = checkpoint.load(component, dtype=dtype)
            dtypes = {name: p.dtype for name, p in net.state_dict().items()}
            assert dtypes == {name: checkpoints.parameter_dtype(part.kind, name, entry, dtype) for name, entry in part.tensors.items()}
            assert not net.training and not any(p.requires_grad for p in net.parameters())
    dtypes = {name: p.dtype for name, p in checkpoint.load("denoiser", dtype=torch.bfloat16).state_dict().items()}
    for name, dtype in {"text.0.weight": torch.bfloat16, "blocks.0.modulation": torch.float32, "blocks.0.cross_norm.weight": torch.float32,
                        "blocks.0.ffn.0.weight": torch.float8_e4m3fn, "blocks.0.ffn.0.weight_scale": torch.float32}.items():
        assert dtypes[name] == dtype, name
    assert set(p.dtype for p in checkpoint.load("vae", dtype=torch.float16).parameters()) == {torch.float16}


def test_shards(tmp_path, monkeypatch):
    """Several shards with their index, as published."""
    monkeypatch.setattr(fake, "SHARD_BYTES", 10**6)
    fake.official("s2v-14B", tmp_path / "s2v", fake.tiny("s2v-14B"))
    files = sorted((tmp_path / "s2v").glob("*.safetensors"))
    assert len(files) > 4 and all(file.stat().st_size < 2 * 10**6 for file in files)
    assert checkpoints.open_checkpoint(tmp_path / "s2v").parts["denoiser"].parameters == 2_444_453
    whole = files[1].read_bytes()
    files[1].write_bytes(files[0].read_bytes())
    refusal(tmp_path / "s2v", "stands in both", files[0], files[1])
    files[1].write_bytes(whole)
    files[0].unlink()
    refusal(tmp_path / "s2v", files[0].name)


def test_wav2vec_names(s2v, official):
    """Both spellings of weight norm, with and without the CTC model's prefix."""
    wanted = bits(checkpoints.open_checkpoint(official["s2v-14B"]).load("audio"))
    file = s2v / foreign.WAV2VEC / "model.safetensors"
    tensors = {name.removeprefix("wav2vec2.").replace("weight_g", "parametrizations.weight.original0")
               .replace("weight_v", "parametrizations.weight.original1"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    same(bits(checkpoints.open_checkpoint(s2v).load("audio")), wanted)


def test_bf16(tmp_path):
    """--dtype bf16 halves a float32 denoiser and keeps in float32 what runs in it."""
    fake.official("ti2v-5B", tmp_path / "official", fake.tiny("ti2v-5B"), dtype=torch.float32)
    assert convert.main([str(tmp_path / "official"), str(tmp_path / "ours"), "--dtype", "bf16"]) == 0
    tensors = checkpoints.open_checkpoint(tmp_path / "ours").parts["denoiser"].tensors
    assert tensors["blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    assert tensors["blocks.0.modulation"].dtype == torch.float32
    net = checkpoints.open_checkpoint(tmp_path / "ours").load("denoiser", dtype=torch.bfloat16)
    same(bits(net), bits(checkpoints.open_checkpoint(tmp_path / "official").load("denoiser", dtype=torch.bfloat16)))


def test_few_files():
    """A checkpoint in our layout is loaded without the code of the others, of the converter and of streaming."""
    def load():
        forget()
        sys.path.insert(0, str(GOLDEN.parent))
        from formats.checkpoints import open_checkpoint
        open_checkpoint(GOLDEN.parent / "weights" / "tiny").load("denoiser_high")
        print(*sorted(name for name in sys.modules if name.startswith(("formats.", "convert", "tiny", "fast.offload"))))
    _, said, errors = as_program(load)
    assert said.split() == ["formats.checkpoints", "formats.checks"], errors


# ---- folders that are wrong ----

@pytest.mark.parametrize("file, key, shape", [
    (SHARD, "casual_audio_encoder.encoder.conv2.conv.weight", "(64, 32, 3)"), ("Wan2.1_VAE.pth", "decoder.conv1.bias", "(32,)"),
    ("models_t5_umt5-xxl-enc-bf16.pth", "norm.weight", "(64,)"),
    (f"{foreign.WAV2VEC}/model.safetensors", "wav2vec2.encoder.layer_norm.bias", "(64,)")])
def test_strict(s2v, file, key, shape):
    """A missing key, another shape and a surplus key are refused in every component, by file and name; the message counts the problems."""
    whole = (s2v / file).read_bytes()
    for change, *parts in ((lambda t: t.pop(key), "is missing", shape), (lambda t: t.update({key: torch.zeros(5)}), "(5,)", shape),
                           (lambda t: t.update({key + ".more": torch.zeros(5), key + ".most": torch.zeros(5)}), "no parameter", "(and 1 more)")):
        edit(s2v / file, change)
        refusal(s2v, s2v / file, key, *parts)
        (s2v / file).write_bytes(whole)


def test_our_names_are_not_theirs(s2v):
    """A foreign file with one of our names in it is refused: no name is taken for what it is elsewhere."""
    edit(s2v / SHARD, lambda t: t.update({"text.0.weight": t.pop("text_embedding.0.weight")}))
    refusal(s2v, SHARD, "text.0.weight belongs to no parameter", "(and 1 more)")


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_pickle(s2v, tmp_path):
    """A pickle that calls something is refused, and nothing of it runs: as torch.save writes it, and bare."""
    content, file = {"conv1.weight": Payload(tmp_path / "executed")}, s2v / "Wan2.1_VAE.pth"
    torch.save(content, file)
    refusal(s2v, file, "refused, nothing in it was executed")
    file.write_bytes(pickle.dumps(content))
    refusal(s2v, file, "refused, nothing in it was executed")
    assert not (tmp_path / "executed").exists()
    pickle.loads(file.read_bytes())                                      # the payload does work
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", [SHARD, "Wan2.1_VAE.pth", "config.json", INDEX])
def test_damaged_files(s2v, file):
    whole = (s2v / file).read_bytes()
    for content in (whole[:len(whole) // 2], whole[:-2], b"", b"<!DOCTYPE html>\n" * 20):
        (s2v / file).write_bytes(content)
        refusal(s2v, s2v / file)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 9999999\n"
GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(4096)


@pytest.mark.parametrize("content, parts", [(POINTER, ["is a Git LFS pointer", "git lfs pull"]), (GGUF, ["is a GGUF file"]),
                                            (b"<!DOCTYPE html>\n" * 20, ["is a web page"])], ids=["lfs", "gguf", "html"])
def test_files_of_another_kind(official, tmp_path, content, parts):
    """What is no file of tensors is named, whatever its ending, alone and in a folder, with what to do."""
    for name in ("x.safetensors", "x.pth", "x.bin", "x.gguf"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            checkpoints.open_checkpoint(official["s2v-14B"], [tmp_path / name])
        assert all(part in str(error.value) for part in [str(tmp_path / name), *parts]), error.value
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=parts[0]):
        lora.read_lora(tmp_path / "x.safetensors", small("s2v-14B")["denoiser"])


def test_folder_of_pointers(s2v):
    """A clone without Git LFS: all pointers in one message, the tokenizer among them."""
    files = [SHARD, "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"]
    for name in files:
        (s2v / name).write_bytes(POINTER)
    refusal(s2v, "without Git LFS", "git lfs pull", *files)
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the file itself: run git lfs pull"):
        checkpoints.open_checkpoint(s2v / files[0])                  # given itself in place of its folder


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_state_dict(s2v, key):
    """A training checkpoint is named, with the line that takes its tensors out; that line works."""
    file = s2v / "Wan2.1_VAE.pth"
    tensors = torch.load(file, weights_only=True)
    torch.save({key: tensors, "epoch": 3}, file)
    assert f"torch.save(torch.load(FILE, weights_only=True)['{key}'], NEW)" in refusal(s2v, file, "training checkpoint", repr(key))
    torch.save(torch.load(file, weights_only=True)[key], file)
    checkpoints.open_checkpoint(s2v)


def test_missing_files(s2v, official, tmp_path):
    """All of them in one message."""
    for file in ("Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json", f"{foreign.WAV2VEC}/model.safetensors", SHARD):
        (s2v / file).unlink()
    refusal(s2v, "Wan2.1_VAE.pth (vae)", "tokenizer.json (tokenizer)", "model.safetensors (audio)", SHARD)
    refusal(official["t2v-A14B"] / "high_noise_model", "Wan2.1_VAE.pth")
    refusal(tmp_path, "no checkpoint")
    refusal(tmp_path / "nowhere", "not there")
    refusal(s2v / "config.json", "a file")


def test_another_models_file(s2v, official, tmp_path):
    """One clear line for a file in the wrong place, in the official and in our layout."""
    def replaced(folder, file, by, *parts):
        whole = (folder / file).read_bytes()
        shutil.copy(by, folder / file)
        refusal(folder, *parts)
        (folder / file).write_bytes(whole)
    t5, vae = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
    replaced(s2v, SHARD, official["t2v-A14B"] / "high_noise_model" / SHARD, SHARD, "audio_injector.injector.0.q.weight is missing")
    replaced(s2v, SHARD, s2v / foreign.WAV2VEC / "model.safetensors", "holds the component audio, wanted denoiser")
    replaced(s2v, vae, official["ti2v-5B"] / "Wan2.2_VAE.pth", "latent channels", "wants 16, got 48")
    replaced(s2v, vae, s2v / t5, "Wan2.1_VAE.pth holds the component text, wanted vae")
    ti2v = Path(shutil.copytree(official["ti2v-5B"], tmp_path / "ti2v"))
    replaced(ti2v, "Wan2.2_VAE.pth", s2v / vae, "single denoiser with the Wan2.1 VAE")
    convert.convert(s2v, tmp_path / "ours")
    convert.convert(official["t2v-A14B"], tmp_path / "t2v")
    replaced(tmp_path / "ours", "denoiser.safetensors", tmp_path / "t2v" / "denoiser_low.safetensors", "denoiser.safetensors", "is missing")
    replaced(tmp_path / "ours", "denoiser.safetensors", tmp_path / "t2v" / "vae.safetensors", "denoiser.safetensors", "belongs to no parameter")


@pytest.mark.parametrize("change, parts", [
    ({"dim": None}, ["lacks the field dim"]), ({"enable_framepack": None}, ["lacks the field enable_framepack"]),
    ({"enable_framepack": False}, ["enable_framepack = True", "got False"]), ({"adain_mode": "adain"}, ["adain_mode = attn_norm", "got adain"]),
    ({"patch_size": [1, 4, 4]}, ["patch_size = [1, 2, 2]", "got [1, 4, 4]"]), ({"num_heads": 3}, ["config.json", "n_head 3"]),
    ({"num_layers": 7}, ["blocks.4.modulation is missing"])], ids=str)
def test_config_fields(s2v, change, parts):
    """Missing fields, and settings that are not built, are refused by name."""
    fields = json.loads((s2v / "config.json").read_text()) | change
    (s2v / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    refusal(s2v, *parts)


# ---- writing ----

def test_nothing_left(official, tmp_path, monkeypatch, capsys):
    """Exit status 2 and one line, no folder and no temporary one: no room, a write that fails, a target that exists."""
    source, target = str(official["s2v-14B"]), tmp_path / "out" / "ours"

    def refused(*parts):
        assert convert.main([source, str(target)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and all(part in message for part in parts), message
        assert not target.parent.exists() or not any(target.parent.iterdir())

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
        refused("GiB free")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused("No space left")
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("keep")
    assert convert.main([source, str(target)]) == 2 and "exists" in capsys.readouterr().err
    assert [p.name for p in target.iterdir()] == ["mine.txt"]


def test_check_prints_counts(official, capsys):
    assert convert.main([str(official["i2v-A14B"]), "--check"]) == 0
    out = capsys.readouterr().out
    assert "i2v-A14B, boundary 0.9" in out and out.count("tensors") == 4


def test_writer_alignment(tmp_path):
    """Odd sizes, mixed dtypes and scalars read back equal through safetensors itself."""
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5, 1), "c": torch.tensor(2.5), "d": torch.randn(7).to(torch.float8_e4m3fn),
               "e": torch.arange(5, dtype=torch.uint8), "f": torch.randn(4, 6).t()}
    entries = {name: checkpoints.Entry(tmp_path, tuple(t.shape), t.dtype, partial(lambda t: t, t)) for name, t in tensors.items()}
    convert.write_safetensors(tmp_path / "x.safetensors", entries)
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor.float(), tensors[name].float())


# ---- tiny checkpoints ----

def test_ensure_tiny(tmp_path):
    """Made once, the same bytes each time, two experts for S2V; what somebody trained is left alone, an old recipe is made again."""
    first, again = (fake.ensure_tiny(tmp_path / name / "tiny") for name in "ab")
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())
    checkpoint = checkpoints.open_checkpoint(first)
    assert checkpoint.boundary == 0.875 and checkpoint.note == fake.RECIPE
    assert fake.make_tokenizer(tmp_path / "t.json", [checkpoints.NEGATIVE]) <= checkpoint.configs["text"].vocab
    fields = json.loads((first / "config.json").read_text())
    for note, stays in ((fake.RECIPE, True), ("random numbers: older ones", False), (None, True), ("trained", True)):
        (first / "config.json").write_text(json.dumps(fields | {"note": note}))
        before = (first / "vae.safetensors").stat()
        assert ((fake.ensure_tiny(first) / "vae.safetensors").stat() == before) == stays
    with pytest.raises(ValueError, match="tiny-t2v"):
        fake.ensure_tiny(tmp_path / "huge")


def test_ensure_tiny_race(tmp_path, monkeypatch):
    """Another program finishes the same folder first: its folder is used."""
    write = fake.write_tiny

    def slow(task, folder):
        write(task, folder)
        if not (tmp_path / "tiny").exists():
            shutil.copytree(folder, tmp_path / "tiny")

    monkeypatch.setattr(fake, "write_tiny", slow)
    assert checkpoints.open_checkpoint(fake.ensure_tiny(tmp_path / "tiny")).task == "s2v-14B"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_settings(tmp_path, capsys):
    """--set makes other sizes."""
    assert fake.main(["s2v-14B", str(tmp_path / "x"), "--tiny", "--set", "denoiser.n_layer=2", "--set", "denoiser.ffn_dim=64"]) == 0
    config = checkpoints.open_checkpoint(tmp_path / "x").configs["denoiser"]
    assert (config.n_layer, config.ffn_dim, config.audio_layers) == (2, 64, (0,))
    assert fake.main(["s2v-14B", str(tmp_path / "y"), "--tiny", "--set", "denoiser.depth=2"]) == 2
    assert "denoiser.depth=2" in capsys.readouterr().err and not (tmp_path / "y").exists()
