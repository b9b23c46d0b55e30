"""The command line and the pipelines end to end, on tiny checkpoints: what comes out, that it depends on what goes in, and bad input.

    pytest test_sample.py
"""
import dataclasses
import json
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import convert_weights as convert
from tiny import random_weights as fake_checkpoint
import sample
import wan_s2v
from formats.checkpoints import SAMPLING
from sampling import Experts
from vae import VAE22
from media.ffmpeg import probe
from wan_s2v import Options, WanS2VPipeline

HERE = Path(__file__).parents[1]
VOICE, FACE = str(HERE / "samples" / "voice.flac"), str(HERE / "samples" / "face.png")
QUICK = ["--steps", "2", "--size", "64x64", "--clip-frames", "16"]


@pytest.fixture(scope="session")
def tiny():
    """{folder name: Path} of the tiny checkpoints."""
    return {name: fake_checkpoint.ensure_tiny(HERE / "weights" / name) for name in fake_checkpoint.TINY}


def frames(folder):
    """PNG frames of a folder -> (P, height, width, 3) uint8"""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def make(tmp_path, name, *arguments):
    out = tmp_path / name
    assert sample.cli(["--audio", VOICE, "--image", FACE, "--out", f"{out}/", *QUICK, *arguments]) == 0
    return frames(out)


# ------------------------------------------------------------------------------------------------------------------ S2V

def test_s2v_writes_a_video_of_the_planned_length(tmp_path, capsys):
    out = tmp_path / "out.mp4"
    assert sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(out), "--duration", "2.5", *QUICK]) == 0
    text, media = capsys.readouterr().out, probe(out)
    assert "3 clips of 16 frames -> 45 frames" in text               # 2.5 s: two clips and a rest; the first clip loses 3 frames
    assert (media.frames, media.fps, media.width, media.height) == (40, 16, 64, 64)          # ends with the sound
    assert media.video_codec == "h264" and media.has_audio and abs(media.audio_duration - 2.5) < 1 / 16
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_same_seed_same_bytes_and_clips_agree(tmp_path):
    one = make(tmp_path, "one", "--clips", "1")
    two = make(tmp_path, "two", "--clips", "2")
    again = make(tmp_path, "again", "--clips", "2")
    assert len(one) == 13 and len(two) == 29
    assert (two == again).all() and (two[:13] == one).all()
    assert (make(tmp_path, "other", "--clips", "1", "--seed", "7") != one).any()


def test_everything_that_goes_in_is_seen(tmp_path):
    base = make(tmp_path, "base", "--clips", "1").astype(int)
    Image.new("RGB", (256, 256), (200, 30, 30)).save(tmp_path / "red.png")
    soundfile.write(tmp_path / "noise.wav", np.random.RandomState(0).uniform(-1, 1, 40000).astype(np.float32), 16000)
    pose = tmp_path / "pose.mp4"
    assert sample.cli(["--audio", VOICE, "--image", str(tmp_path / "red.png"), "--out", str(pose), "--clips", "1", *QUICK]) == 0
    for name, arguments in {"image": ["--image", str(tmp_path / "red.png")], "audio": ["--audio", str(tmp_path / "noise.wav")],
                            "start": ["--start", "1"], "prompt": ["--prompt", "a woman is singing"],
                            "negative": ["--negative-prompt", "hands"],
                            "pose": ["--pose-video", str(pose)], "ref": ["--start-from-ref"], "guidance": ["--guidance", "1"],
                            "shift": ["--shift", "8"], "solver": ["--solver", "euler"]}.items():
        changed = make(tmp_path, name, "--clips", "1", *arguments).astype(int)
        n = min(len(base), len(changed))
        assert np.abs(base[:n] - changed[:n]).max() > 0, f"{name} changes nothing"
        assert len(changed) == (16 if name == "ref" else 13)


def test_published_interface(tmp_path, tiny, capsys):
    pipeline = WanS2VPipeline.from_pretrained(str(tiny["tiny"]), torch_dtype=torch.float16, device_map="auto")
    assert "float16 overflows" in capsys.readouterr().err
    result = pipeline(audio_path=VOICE, image_path=FACE, num_frames=20, height=64, width=64, guidance_scale=2.0, num_inference_steps=2,
                      generator=torch.Generator().manual_seed(42), enable_cpu_offload=True, use_fp16=False, clip_frames=16)
    assert result.frames.shape == (3, 20, 64, 64) and result.frames.abs().max() <= 1
    result.save(str(tmp_path / "video.mp4"))
    assert probe(tmp_path / "video.mp4").frames == 20


def test_settings_for_short_memory_change_no_number(tiny):
    """Two passes and text keys in host memory give the same frames bit for bit, spans of tokens and tiles of the VAE within rounding."""
    pipeline = WanS2VPipeline.from_pretrained(str(tiny["tiny"]), device_map="cpu")
    plan = pipeline.plan(Options(VOICE, FACE, size=(64, 64), steps=2, clip_frames=16, clips=2))

    def frames(**settings):
        machine = dataclasses.replace(plan.fit.machine, **settings)
        return torch.cat(list(pipeline.generate(dataclasses.replace(plan, fit=dataclasses.replace(plan.fit, machine=machine)))), dim=1)
    whole = frames()
    assert torch.equal(frames(one_loop=False, host_layers=True), whole)
    gap = (frames(one_loop=False, host_layers=True, span=37, tiles=2) - whole).abs().max()
    print(f"spans of 37 tokens and 2 tiles: max |difference| {gap:.1e} of a range of 2, tolerance 1e-4")
    assert gap < 1e-4                                                # two clips: the second starts from the first's frames


def checkpoint(task, configs, folder, **sampling):
    """A random checkpoint of any sizes, in our layout."""
    folder.mkdir()
    fake_checkpoint.make_tokenizer(folder / "tokenizer.json")
    dtypes = dict.fromkeys(configs, torch.bfloat16)
    parts = fake_checkpoint.random_checkpoint(task, configs, dtypes, folder / "tokenizer.json", steps=2, **sampling)
    convert.write_checkpoint(parts, folder)
    return str(folder)


def test_other_sizes_and_one_expert_from_config_alone(tmp_path):
    configs = fake_checkpoint.tiny("s2v-14B")
    denoiser = dataclasses.replace(configs["denoiser"], dim=48, n_head=2, n_layer=3, audio_layers=(1, 2), audio_tokens=2, audio_states=3)
    configs |= {"denoiser": denoiser, "audio": dataclasses.replace(configs["audio"], n_layer=2)}
    folder = checkpoint("s2v-14B", configs, tmp_path / "one", guidance=[2.0])
    assert convert.open_checkpoint(folder).experts == ["denoiser"]
    assert make(tmp_path, "out", "--clips", "2", "--ckpt", folder).std() > 1


@pytest.mark.parametrize("vae", ["8x8x4", "16x16x4"])
def test_two_experts_switch_once_on_either_vae(tmp_path, monkeypatch, vae):
    configs = fake_checkpoint.tiny("s2v-14B")
    size = "64x64"
    if vae == "16x16x4":
        coder = dataclasses.replace(VAE22, dim=16, dec_dim=16, num_res_blocks=1)
        configs |= {"vae": coder, "denoiser": dataclasses.replace(configs["denoiser"], in_dim=48, out_dim=48, pose_dim=48)}
        size = "128x128"
    folder = checkpoint("s2v-14B", configs, tmp_path / "two", boundary=0.875, guidance=[1.5, 2.0])
    served = []
    net = Experts.net
    monkeypatch.setattr(Experts, "net", lambda self, index: served.append(index) or net(self, index))
    out = make(tmp_path, "out", "--clips", "1", "--ckpt", folder, "--size", size, "--steps", "4")
    assert [index for index, _ in groupby(served)] == [0, 1] and len(out) == 13 and out.std() > 1


# -------------------------------------------------------------------------------------------------------------- the family

@pytest.mark.parametrize("name, arguments, size", [
    ("tiny-t2v", ["--prompt", "a cat", "--size", "48x64"], (48, 64)), ("tiny-i2v", ["--image", FACE, "--size", "64x64"], (64, 64)),
    ("tiny-ti2v", ["--prompt", "a cat", "--image", FACE, "--size", "64x64"], (64, 64)),
    ("tiny-ti2v", ["--prompt", "a cat", "--size", "64x96"], (64, 96))])
def test_family(tmp_path, tiny, name, arguments, size):
    out = tmp_path / "out.mp4"
    assert sample.cli(["--ckpt", str(tiny[name]), "--out", str(out), "--frames", "9", "--steps", "2", *arguments]) == 0
    media = probe(out)
    assert (media.frames, media.width, media.height, media.has_audio) == (9, *size, False)
    assert media.fps == (24 if "ti2v" in name else 16)


# --------------------------------------------------------------------------------------------------------------- bad input

def refused(tmp_path, capsys, arguments, *words):
    """The command exits with 2, one line on stderr that holds all words, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert sample.cli(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 500, lines
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert sorted(tmp_path.rglob("*")) == before


GOOD = {"--audio": VOICE, "--image": FACE}


@pytest.mark.parametrize("changes, words", [
    ({"--audio": None}, ("audio",)), ({"--image": None}, ("image",)),
    ({"--audio": "no.wav"}, ("no.wav",)), ({"--image": "no.png"}, ("no.png",)),
    ({"--audio": __file__}, ("test_sample.py",)), ({"--image": __file__}, ("picture",)), ({"--image": VOICE}, ("picture",)),
    ({"--audio": FACE}, ("sound",)),
    ({"--clip-frames": "81"}, ("multiple of 4", "81")), ({"--clip-frames": "124"}, ("120", "124")),
    ({"--clip-frames": "0"}, ("multiple of 4",)),
    ({"--steps": "0"}, ("steps", "0")), ({"--guidance": "-1"}, ("guidance", "-1")), ({"--guidance": "nan"}, ("guidance", "nan")),
    ({"--shift": "0"}, ("shift",)), ({"--solver": "rk4"}, ("solver", "unipc", "rk4")), ({"--clips": "0"}, ("clips",)),
    ({"--duration": "0.01"}, ("ms",)), ({"--start": "99"}, ("start",)), ({"--duration": "-1"}, ("duration",)),
    ({"--seed": "-1"}, ("seed",)),
    ({"--out": "nowhere/out.mp4"}, ("nowhere",)), ({"--out": "out.gif"}, (".mp4",)), ({"--out": "/proc/out.mp4"}, ("/proc",)),
    ({"--ckpt": "no-such-folder"}, ("no-such-folder",)), ({"--pose-video": "no.mp4"}, ("no.mp4",)), ({"--pose-video": VOICE}, ("picture",)),
    ({"--size": "8x8"}, ("size",)),
], ids=str)
def test_bad_arguments(tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.setattr(wan_s2v, "encode_text", lambda *_: pytest.fail("a model was loaded before the input was checked"))
    arguments = GOOD | {"--out": str(tmp_path / "out.mp4")} | changes
    refused(tmp_path, capsys, [part for name, value in arguments.items() if value is not None for part in (name, value)], *words)


@pytest.mark.parametrize("text", ["0x100", "axb", "100", "-5x5"])
def test_bad_size(tmp_path, capsys, text):
    refused(tmp_path, capsys, ["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "out.mp4"), f"--size={text}"], "--size", text)


def test_bad_combinations(tmp_path, capsys, tiny):
    out = ["--out", str(tmp_path / "out.mp4")]
    refused(tmp_path, capsys, [*out, "--ckpt", str(tiny["tiny-t2v"])], "t2v-A14B", "prompt")
    refused(tmp_path, capsys, [*out, "--ckpt", str(tiny["tiny-t2v"]), "--prompt", "a", "--image", FACE], "t2v-A14B", "picture")
    refused(tmp_path, capsys, [*out, "--ckpt", str(tiny["tiny-i2v"]), "--prompt", "a"], "i2v-A14B", "picture")
    refused(tmp_path, capsys, [*out, "--ckpt", str(tiny["tiny-ti2v"]), "--prompt", "a", "--audio", VOICE], "ti2v-5B", "audio")
    refused(tmp_path, capsys, [*out, "--ckpt", str(tiny["tiny-t2v"]), "--prompt", "a", "--frames", "10"], "10", "9")
    refused(tmp_path, capsys, [*out, "--ckpt", str(tiny["tiny-t2v"]), "--prompt", "a", "--size", "50x64"], "50x64", "16")


def test_damaged_checkpoint(tmp_path, capsys, tiny):
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for path in tiny["tiny"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    run = ["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "out.mp4"), "--ckpt", str(folder)]
    whole = (folder / "vae.safetensors").read_bytes()
    (folder / "vae.safetensors").write_bytes(whole[:len(whole) // 2])
    refused(tmp_path, capsys, run, "vae.safetensors")
    (folder / "vae.safetensors").unlink()
    refused(tmp_path, capsys, run, "vae.safetensors")
    (folder / "vae.safetensors").write_bytes((folder / "text.safetensors").read_bytes())
    refused(tmp_path, capsys, run, "vae.safetensors")
    (folder / "vae.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["denoiser"]["dimm"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    refused(tmp_path, capsys, run, "config.json", "dimm")


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt(), ValueError("a frame holds NaN"),
                                     RuntimeError("CUDA error: unknown\nand more")], ids=["memory", "ctrl-c", "frames", "cuda"])
def test_finished_clips_are_kept(tmp_path, monkeypatch, capsys, failure):
    make_clips = wan_s2v.make_clips

    def one_then_fail(*arguments):
        yield next(make_clips(*arguments))
        raise failure
    monkeypatch.setattr(wan_s2v, "make_clips", one_then_fail)
    code = sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "out.mp4"), "--clips", "2", *QUICK])
    assert code == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial.mp4"]
    assert probe(tmp_path / "out.partial.mp4").frames == 13
    err = capsys.readouterr().err
    assert "out.partial.mp4" in err and "and more" not in err


@pytest.mark.parametrize("option, message", [(["--device", "gpu"], "device must be cpu, cuda"), (["--vram", "0"], "--vram wants the size of a card")])
def test_machine_options_are_checked(tmp_path, capsys, option, message):
    assert sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "out.mp4"), *QUICK, *option]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_fp8_multiplies_out(tmp_path, capsys):
    """The tiny checkpoint's float8 matrices as bfloat16: the same numbers on a CPU, so the same video, from larger weights."""
    for name, option in (("a", []), ("b", ["--no-fp8"])):
        assert sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / f"{name}.mp4"), "--duration", "1", *QUICK, *option]) == 0
    sizes = [float(size) for size in re.findall(r"denoiser_high ([\d.]+) MiB", capsys.readouterr().out)]
    assert len(sizes) == 2 and sizes[1] > 1.3 * sizes[0], sizes
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_options_are_checked_without_files():
    sampling = SAMPLING["s2v-14B"]
    assert Options().resolve(sampling).guidance == (4.5,)
    with pytest.raises(ValueError, match="multiple of 4"):
        Options(clip_frames=6).resolve(sampling)
