"""Small files that would unpack to gigabytes, options beyond reason, standard streams that are gone: each has its one line.

    python -m pytest tests/test_damage.py
"""
import base64
import copy
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import soundfile
import tokenizers
import torch
from safetensors.torch import save_file

import convert_weights
import sample
from fast.plan import RunConfig
from formats import foreign, gguf_file, lora, tokenizer_file
from formats.checkpoints import open_checkpoint, open_safetensors, read_json
from media.ffmpeg import run
from media.frames import load_pose
from media.given import check_length
from media.lengths import announced
from media.terminal import Printed, shown
from media.video import open_writer
from kill_runs import quick
from test_published import denoiser_kind, write_gguf

HERE = Path(__file__).parents[1]
TINY, VOICE, FACE = HERE / "weights" / "tiny", str(HERE / "samples" / "voice.flac"), str(HERE / "samples" / "face.png")
QUICK = ["--audio", VOICE, "--image", FACE, "--steps", "1", "--size", "64x64", "--clip-frames", "16", "--clips", "1", *quick()]


def refused(call, *parts):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


# ---- configs and indexes ----

@pytest.mark.parametrize("place, value, said", [
    (("denoiser", "n_layer"), 10**9, "wanted n_layer of 1 to 1024"), (("denoiser", "n_layer"), 900, "more layers than its"),
    (("vae", "num_res_blocks"), 1000, "more layers than its"), (("denoiser", "dim"), "160", "wanted a whole number as dim, got '160'"),
    (("denoiser", "dim"), True, "wanted a whole number as dim, got True"), (("text", "eps"), float("nan"), "wanted a number as eps, got nan"),
    (("audio", "conv_kernel"), 3, "wanted a list, each a whole number, as conv_kernel"), (("denoiser", "n_head"), 0, "wanted n_head of 1"),
    (("denoiser", "text_len"), 10**6, "wanted text_len of 1 to 1024"), (("audio", "pos_groups"), 5, "pos_conv.v has shape"),
    (("boundary",), "x", "wanted a boundary between 0 and 1"), (("task",), ["s2v-14B"], "wanted a task of s2v-14B"),
    (("sampling", "steps"), 10**9, "steps must be 1 to 1000"), (("sampling", "fps"), None, "wanted a number as fps")])
def test_configs_are_bounded_by_their_tensors(tmp_path, place, value, said):
    for path in TINY.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((TINY / "config.json").read_text())
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: open_checkpoint(tmp_path), str(tmp_path), said)


def test_json_files_are_small_and_shallow(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 10**6)
    refused(lambda: read_json(tmp_path / "deep.json"), "cannot read", "deep.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**30)
    refused(lambda: read_json(tmp_path / "large.json"), "has 1024.0 MiB", "at most 16")
    for weights in ([], {}, {"a": 1}, {"a": ".."}, None):
        (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        refused(lambda: foreign.shards(tmp_path, "m"), "wanted weight_map")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(1000)}}))
    refused(lambda: foreign.require(tmp_path, [(file, "denoiser") for file in foreign.shards(tmp_path, "m")]), "and 980 more")


# ---- what unpacks to more than it holds ----

class Zeros:
    """Unpickled, a gigabyte of them."""

    def __reduce__(self):
        return bytearray, (2**30,)


def test_pickles_hold_what_they_unpack_to(tmp_path):
    file, few = tmp_path / "a.pth", torch.zeros(4, 4)
    torch.save({"a": few, "tied": few, "b": few.half()}, file)
    assert {name: entry.shape for name, entry in foreign.open_pickle(file).items()} == {"a": (4, 4), "tied": (4, 4), "b": (4, 4)}
    torch.save({"a": torch.zeros(1).expand(2**15, 2**15)}, file)
    refused(lambda: foreign.open_pickle(file), "would unpack to 4.0 GiB, it has 0.0 MiB")
    torch.save({"a": few.to_sparse()}, file)
    refused(lambda: foreign.open_pickle(file), "it calls ", "nothing in it was executed")
    torch.save({"a": few.to("meta")}, file)
    refused(lambda: foreign.open_pickle(file), "it calls ")
    torch.save({"a": Zeros()}, file)
    refused(lambda: foreign.open_pickle(file), "it calls __builtin__ bytearray", "nothing in it was executed")
    torch.save({"a": torch.zeros(2**22)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.infolist():
            packed.writestr(member.filename, whole.read(member))
    assert (tmp_path / "packed.pth").stat().st_size < 2**15
    refused(lambda: foreign.open_pickle(tmp_path / "packed.pth"), "would unpack to more than its 0.0 MiB")


def test_safetensors_headers_are_small(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((2**26).to_bytes(8, "little") + b"{")
        file.truncate(2**27)
    refused(lambda: open_safetensors(tmp_path / "a.safetensors"), "has a header of 64 MiB, wanted at most 16")


def test_lists_in_gguf_end_with_their_file(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    file, key = tmp_path / "a.gguf", b"orig_shape.a.weight"
    write_gguf(file, "wan", {"a.weight": torch.randn(64, 64)}, denoiser_kind, reshape=("a.weight",))
    data = bytearray(file.read_bytes())
    at = data.index(key) + len(key) + 4                              # behind it the kind of its values, and how many there are
    data[at:at + 12] = bytes(4) + (2**60).to_bytes(8, "little")
    file.write_bytes(data)
    refused(lambda: gguf_file.open_gguf(file), "a.gguf is not a whole GGUF file (it ends early)")


def test_large_pose_frames_are_not_decoded(tmp_path):
    run("-f", "lavfi", "-i", "color=size=5000x5000", "-frames:v", "1", "-c:v", "libx264", "-preset", "ultrafast", tmp_path / "pose.mp4")
    assert (tmp_path / "pose.mp4").stat().st_size < 2**17
    refused(lambda: load_pose(str(tmp_path / "pose.mp4"), 4, (64, 64)), "pose.mp4 has frames of 5000x5000, wanted at most 4096x4096")
    (tmp_path / "pose.mp4").write_bytes(b"x")
    refused(lambda: load_pose(str(tmp_path / "pose.mp4"), 4, (64, 64)), "pose.mp4 holds no video or sound that can be read")


def test_a_day_of_sound_is_refused_by_its_header(tmp_path):
    data, seconds = bytearray(Path(VOICE).read_bytes()), 24 * 3600
    at = data.index(b"fLaC") + 8 + 13                                # of STREAMINFO: 4 bits and 4 bytes, the number of samples
    samples = seconds * soundfile.info(VOICE).samplerate
    data[at] = data[at] & 0xF0 | samples >> 32
    data[at + 1:at + 5] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    (tmp_path / "day.flac").write_bytes(data)
    day = RunConfig(audio=str(tmp_path / "day.flac"))
    assert announced(day.audio) == (seconds, True)
    refused(lambda: check_length(day), "has 24.0 h of sound, wanted at most 12")
    for bounded in (dict(duration=60.0), dict(clips=2), dict(frames=80), dict(start=13 * 3600.0)):
        check_length(RunConfig(audio=day.audio, **bounded))
    refused(lambda: check_length(RunConfig(audio=VOICE), 13 * 3600), "has 13.0 h of sound")     # of a file that announces less


# ---- tokenizer.json ----

def test_tokenizers_of_umt5s_shape_alone(tmp_path):
    good, path = json.loads((TINY / "tokenizer.json").read_text()), tmp_path / "tokenizer.json"

    def read(**change):
        path.write_text(json.dumps({**copy.deepcopy(good), **change}))
        return tokenizer_file.read_tokenizer(path)
    plain = read().encode("a person  with red hair", add_special_tokens=False).ids
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    umt5 = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": charsmap()},
                                                {"type": "Strip", "strip_left": False, "strip_right": True}, spaces]}
    steps = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, good["pre_tokenizer"]]}
    assert read(normalizer=umt5, pre_tokenizer=steps).encode("a perso\ufb01 with red hair ", add_special_tokens=False).ids != plain
    assert read(normalizer=umt5, pre_tokenizer=steps).encode("a person with red hair ", add_special_tokens=False).ids == read().encode(
        "a person with red hair", add_special_tokens=False).ids
    def charsmap_rule(text): return {"type": "Precompiled", "precompiled_charsmap": text}
    for normalizer, said in (
            (spaces | {"pattern": {"Regex": "(a+)+$"}}, "runs of spaces"), (spaces | {"content": "x" * 10**6}, "runs of spaces"),
            ({"type": "NFKD"}, "a rule of Precompiled"), ({"type": "Sequence", "normalizers": [umt5]}, "a rule of Precompiled"),
            (charsmap_rule(""), "charsmap with a whole trie"), (charsmap_rule(charsmap(leave=1)), "trie stays within itself"),
            (charsmap_rule(charsmap(text=99)), "leaves point at its texts")):
        refused(lambda: read(normalizer=normalizer), said)
    for change, said in (
            (dict(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(x*)*"}}), "a rule of Metaspace"), (dict(model={"type": "BPE"}), "Unigram"),
            (dict(model=good["model"] | {"vocab": [["\u00e9" * 2**21, 0.0], ["b", 0.0]]}), "pieces of at most 4 MiB"),
            (dict(model=good["model"] | {"vocab": [["a", float("nan")]]}), "a piece and its score"),
            (dict(added_tokens=[1]), "a list of added_tokens")):
        refused(lambda: read(**change), said)


def charsmap(leave=0, text=0):
    """The smallest charsmap: \ufb01 becomes fi.  leave: its trie points beyond its end; text: its leaf behind the texts"""
    units, node = [0] * 1024, 0
    units[0] = 256 << 10                                             # the root: letters stand from 256 on
    base = 256
    for letter, follow in zip("\ufb01".encode(), (512, 768, 0)):
        node = base ^ letter
        units[node] = letter | (node ^ (follow or 1023)) << 10 | (0 if follow else 1 << 8)
        base = follow
    units[1023] = 1 << 31 | text                                     # the value of the leaf
    units[5] = leave << 30
    data = b"".join(unit.to_bytes(4, "little") for unit in units)
    return base64.b64encode(len(data).to_bytes(4, "little") + data + b"fi\0").decode()


def test_the_smallest_charsmap_is_one():
    rule = json.dumps({"type": "Precompiled", "precompiled_charsmap": charsmap()})
    whole = json.loads((TINY / "tokenizer.json").read_text()) | {"normalizer": json.loads(rule)}
    assert tokenizers.Tokenizer.from_str(json.dumps(whole)).normalizer.normalize_str("a\ufb01b") == "afib"


# ---- LoRA ----

def test_lora_of_numbers_that_are_none(tmp_path, capsys):
    config, key = open_checkpoint(TINY).configs["denoiser"], "diffusion_model.blocks.0.ffn.0."
    down, up = torch.randn(2, config.dim), torch.randn(config.ffn_dim, 2)

    def read(metadata=None, **tensors):
        pair = {"lora_down.weight": down, "lora_up.weight": up} | tensors
        save_file({key + name: t for name, t in pair.items() if t is not None}, tmp_path / "a.safetensors", metadata=metadata)
        changes, *_ = lora.read_lora(tmp_path / "a.safetensors", config)
        return [change() for change in changes.values()]
    assert len(read()) == len(read({"alpha_pattern": '{"blocks.*.ffn": 1}'})) == 1
    spoilt = down.clone()
    spoilt[1, 3] = float("nan")
    for tensors, said in (
            ({"lora_down.weight": spoilt}, "NaN or infinite"), ({"lora_up.weight": up / 0}, "NaN or infinite"),
            ({"lora_down.weight": down[:0], "lora_up.weight": up[:, :0]}, "rank of 1"),
            ({"alpha": torch.ones(2)}, "one number as alpha"), ({"alpha": torch.tensor(float("inf"))}, "a number as alpha"),
            ({"lora_down.weight": torch.tensor(1.0)}, "does not make"),
            ({"lora_down.weight": torch.tensor(1.0), "lora_up.weight": torch.tensor(1.0)}, "does not make"),
            ({"lora_down.weight": down * 1e30, "lora_up.weight": up * 1e30}, "NaN or infinite"),
            ({"lora_down.weight": None, "lora_up.weight": None, "diff_b": torch.full((config.ffn_dim,), float("nan"))}, "NaN or infinite")):
        refused(lambda: read(**tensors), "a.safetensors", said)
    assert convert_weights.main([str(TINY), str(tmp_path / "new"), "--lora", f"low={tmp_path / 'a.safetensors'}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"] and capsys.readouterr().err.count("\n") == 1
    for metadata, said in (({"lora_alpha": "nan"}, "wanted a number as alpha, got 'nan'"), ({"lora_alpha": "1e308"}, "wanted a number as alpha"),
                           ({"lora_adapter_metadata": '{"lora_alpha": 2, "alpha_pattern": {"(a+)+": 1}}'}, "ends of layer names in alpha_pattern"),
                           ({"lora_adapter_metadata": '{"lora_alpha": 2, "alpha_pattern": {"(a": 1}}'}, "ends of layer names in alpha_pattern")):
        refused(lambda: read(metadata), "a.safetensors", said)


# ---- options ----

@pytest.mark.parametrize("options, said", [
    (["--start", "1e308"], "start must be 0 or more seconds, below 10^9"), (["--duration", "1e308"], "duration must be more than 0 seconds, below"),
    (["--av-offset", "13"], "wanted av_offset within the 13 frames"), (["--av-offset", "-" + "9" * 400], "wanted av_offset within the 13 frames")])
def test_options_beyond_reason(options, said, tmp_path, capsys):
    assert sample.cli([*QUICK, *options, "--out", str(tmp_path / "out.mp4")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0] and not list(tmp_path.iterdir())


def test_an_offset_within_the_video_is_taken(tmp_path):
    plan = sample.open_pipeline(sample.parser().parse_args(QUICK)).plan(audio=VOICE, image=FACE, steps=1, size=(64, 64), clip_frames=16, clips=1)
    for offset in (12, -12):
        with open_writer(tmp_path / "out.mp4", plan, offset) as writer:
            writer.write(torch.zeros(3, plan.frames, 64, 64))


def test_what_does_nothing_on_a_cpu_is_said(capsys):
    checkpoint = open_checkpoint(TINY)
    got = RunConfig(vae_dtype=torch.float16, resident=3).resolve(checkpoint)
    said = capsys.readouterr().err
    assert (got.vae_dtype, got.resident) == (torch.float32, None) and said.count("\n") == 2 and "VAE in float32, not in float16" in said
    assert "resident does nothing on a CPU" in said
    sample.open_pipeline(sample.parser().parse_args(["--device", "cpu", "--vram", "8"]))
    assert capsys.readouterr().err == "warning: vram does nothing on a CPU: it is the memory of a GPU\n"
    RunConfig().resolve(checkpoint)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error, code", [
    (MemoryError(), 2), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2), (RuntimeError("a mistake of the code"), None)])
def test_a_full_memory_has_its_line(error, code, monkeypatch, capsys):
    def main(args): raise error
    monkeypatch.setattr(sample, "main", main)
    if code is None:
        with pytest.raises(RuntimeError):
            sample.cli([])
    else:
        assert sample.cli([]) == code and capsys.readouterr().err.startswith("error: the memory of this machine is full: ")


# ---- standard streams ----

def test_what_is_printed_is_harmless():
    assert shown("a\x1b[2J\x07\rb\x9b1m\u202ec\u00e9\n\t") == "a\\x1b[2J\\x07\\rb\\x9b1m\\u202ec\u00e9\n\t"
    assert shown("\rclip 1/1: 50%") == "\rclip 1/1: 50%"             # tqdm's bar
    assert shown("error: a\nb") == "error: a\\nb" and shown("plan\nof lines") == "plan\nof lines"
    assert len(shown("warning: " + "x" * 10**6)) < 2100


def test_a_stream_whose_reader_is_gone():
    read, write = os.pipe()
    with os.fdopen(write, "w") as pipe:
        os.close(read)
        stream = Printed(pipe)
        for _ in range(3):
            stream.write("x" * 2**17)
            stream.flush()


@pytest.mark.parametrize("redirection", ["2>&- | head -1", ">&- 2> /dev/full"])
def test_a_run_does_not_need_its_streams(redirection, tmp_path):
    command = " ".join([sys.executable, "sample.py", *QUICK, "--out", str(tmp_path / "out.mp4")])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {redirection}"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 1000 and done.stderr == ""
    if "head" in redirection:
        assert done.stdout.count("\n") == 1


def test_names_of_files_do_not_command_the_terminal(tmp_path, capsys):
    name = tmp_path / "a\x1b[31m\nwrote\r.flac"
    assert sample.cli([*QUICK, "--audio", str(name), "--out", str(tmp_path / "out.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and r"a\x1b[31m\nwrote\r.flac" in error
    shutil.copy(VOICE, name)
    assert sample.cli([*QUICK, "--audio", str(name), "--out", str(tmp_path / "out.mp4")]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and r"a\x1b[31m" in said.out
