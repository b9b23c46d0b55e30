"""The command line and the pipelines end to end, on tiny checkpoints: what comes out, that it depends on what goes in, and bad input.

    pytest tests/test_sample.py
"""
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import convert_weights as convert
import model
import sample
import wan_s2v
from fast import blocks
from media import frames as frame_reader
from media.ffmpeg import probe, run
from sampling import Experts
from tests.kill_runs import quick
from tiny import random_weights
from vae import VAE22
from wan_s2v import WanS2VPipeline

HERE = Path(__file__).parents[1]
VOICE, FACE = str(HERE / "samples" / "voice.flac"), str(HERE / "samples" / "face.png")
QUICK = ["--steps", "2", "--size", "64x64", "--clip-frames", "16", *quick()]


@pytest.fixture(scope="session")
def tiny():
    """{folder name: Path} of the tiny checkpoints."""
    return {name: random_weights.ensure_tiny(HERE / "weights" / name) for name in random_weights.TINY}


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
    few = ["--clip-frames", "8", "--clips"]
    one = make(tmp_path, "one", *few, "1")
    two = make(tmp_path, "two", *few, "2")
    again = make(tmp_path, "again", *few, "2")
    assert len(one) == 5 and len(two) == 13
    assert (two == again).all() and (two[:5] == one).all()
    assert (make(tmp_path, "other", *few, "1", "--seed", "7") != one).any()


def test_everything_that_goes_in_is_seen(tmp_path):
    few = ["--clips", "1", "--clip-frames", "4"]
    base = make(tmp_path, "base", *few).astype(int)
    Image.new("RGB", (256, 256), (200, 30, 30)).save(tmp_path / "red.png")
    soundfile.write(tmp_path / "noise.wav", np.random.RandomState(0).uniform(-1, 1, 40000).astype(np.float32), 16000)
    pose = tmp_path / "pose.mp4"
    assert sample.cli(["--audio", VOICE, "--image", str(tmp_path / "red.png"), "--out", str(pose), *QUICK, *few]) == 0
    for name, arguments in {"image": ["--image", str(tmp_path / "red.png")], "audio": ["--audio", str(tmp_path / "noise.wav")],
                            "start": ["--start", "1"], "prompt": ["--prompt", "a woman is singing"],
                            "negative": ["--negative-prompt", "hands"],
                            "pose": ["--pose-video", str(pose)], "ref": ["--start-from-ref"], "guidance": ["--guidance", "1"],
                            "shift": ["--shift", "8"], "solver": ["--solver", "euler"]}.items():
        changed = make(tmp_path, name, *few, *arguments).astype(int)
        n = min(len(base), len(changed))
        assert np.abs(base[:n] - changed[:n]).max() > 0, f"{name} changes nothing"
        assert len(changed) == (4 if name == "ref" else 1)


def test_the_last_frame_is_held_until_the_sound_ends(tmp_path, capsys):
    """Sound that fills its clip exactly: 16 frames, the last 3 still, for 1 s; the official count shows 13."""
    soundfile.write(tmp_path / "a.wav", soundfile.read(VOICE)[0][:16000], 16000)
    ours, theirs = make(tmp_path, "ours", "--audio", str(tmp_path / "a.wav")), make(tmp_path, "theirs", "--audio", str(tmp_path / "a.wav"), "--official")
    assert len(ours) == 16 and (ours[:13] == theirs).all() and len(theirs) == 13 and (ours[13:] == ours[12]).all()
    assert sample.cli(["--audio", str(tmp_path / "a.wav"), "--image", FACE, "--out", str(tmp_path / "a.mp4"), *QUICK]) == 0
    media = probe(tmp_path / "a.mp4")
    assert media.frames == 16 and abs(media.audio_duration - 1) < 0.03
    assert "were cut" not in capsys.readouterr().out


def test_official_places_picture_and_pose_with_bars(tmp_path, monkeypatch):
    """Where a picture falls short of the frame it is made to cover it; officially black bars stay, and grey ones beside a pose."""
    seen = {}
    for module, name in ((wan_s2v, "fit_picture"), (frame_reader, "load_pose")):
        monkeypatch.setattr(module, name, lambda *a, f=getattr(module, name), name=name: seen.setdefault(name, f(*a)))
    Image.new("RGB", (130, 64), "white").save(tmp_path / "wide.png")
    arguments = ["--audio", VOICE, "--image", str(tmp_path / "wide.png"), *QUICK, "--clips", "1", "--size", "256x256"]
    pose = tmp_path / "pose.mp4"
    run("-f", "lavfi", "-i", "color=white:size=130x64:rate=16", "-frames:v", "16", str(pose))
    for option, bar in (([], None), (["--official"], (-1, 0))):
        seen.clear()
        assert sample.cli([*arguments, "--out", f"{tmp_path}/{len(option)}/", "--pose-video", str(pose), *option]) == 0
        edges = [x.reshape(3, -1, 64, 192)[:, 0, :, 0].mean().item() for x in (seen["fit_picture"], seen["load_pose"])]
        assert edges == pytest.approx(bar or (1, 1), abs=0.05)


def test_published_interface(tmp_path, tiny, capsys):
    pipeline = WanS2VPipeline.from_pretrained(str(tiny["tiny-quick"]), torch_dtype=torch.float16, device_map="auto")
    assert "float16 overflows" in capsys.readouterr().err
    result = pipeline(audio_path=VOICE, image_path=FACE, num_frames=20, height=64, width=64, guidance_scale=2.0, num_inference_steps=2,
                      generator=torch.Generator().manual_seed(42), enable_cpu_offload=True, use_fp16=False, clip_frames=16)
    assert result.frames.shape == (3, 20, 64, 64) and result.frames.abs().max() <= 1
    result.save(str(tmp_path / "video.mp4"))
    assert probe(tmp_path / "video.mp4").frames == 20


def test_settings_for_short_memory_change_no_number(tiny, monkeypatch):
    """The denoiser by fast/, as a GPU runs it, in chunks of tokens with text keys in host memory, and the VAE in tiles: within rounding."""
    monkeypatch.setattr("fast.attention8.attention8", blocks.attend)                         # this option is what brings fast/ to a CPU
    options = dict(audio=VOICE, image=FACE, size=(64, 64), steps=2, clip_frames=16, clips=2)
    pipeline = WanS2VPipeline.from_pretrained(str(tiny["tiny-quick"]), device_map="cpu")
    whole = torch.cat(list(pipeline.generate(pipeline.plan(**options))), dim=1)
    plan = pipeline.plan(**options, attention8=True)
    plan = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, chunk=37, host_layers=True, tiles=2))
    gap = (torch.cat(list(pipeline.generate(plan)), dim=1) - whole).abs().max()
    print(f"chunks of 37 tokens and 2 tiles: max |difference| {gap:.1e} of a range of 2, tolerance 1e-4")
    assert gap < 1e-4                                                # two clips: the second starts from the first's frames


def checkpoint(task, configs, folder, **sampling):
    """A random checkpoint of any sizes, in our layout."""
    folder.mkdir()
    random_weights.make_tokenizer(folder / "tokenizer.json")
    dtypes = dict.fromkeys(configs, torch.bfloat16)
    parts = random_weights.random_checkpoint(task, configs, dtypes, folder / "tokenizer.json", steps=2, **sampling)
    convert.write_checkpoint(parts, folder)
    return str(folder)


def test_other_sizes_and_one_expert_from_config_alone(tmp_path):
    configs = random_weights.tiny("s2v-14B")
    denoiser = dataclasses.replace(configs["denoiser"], dim=48, n_head=2, n_layer=3, audio_layers=(1, 2), audio_tokens=2, audio_states=3)
    configs |= {"denoiser": denoiser, "audio": dataclasses.replace(configs["audio"], n_layer=2)}
    folder = checkpoint("s2v-14B", configs, tmp_path / "one", guidance=[2.0])
    assert convert.open_checkpoint(folder).experts == ["denoiser"]
    assert make(tmp_path, "out", "--clips", "2", "--ckpt", folder).std() > 1


@pytest.mark.parametrize("vae", ["8x8x4", "16x16x4"])
def test_two_experts_switch_once_on_either_vae(tmp_path, monkeypatch, vae):
    configs = random_weights.tiny("s2v-14B")
    size = "64x64"
    if vae == "16x16x4":
        coder = dataclasses.replace(VAE22, dim=16, dec_dim=16, num_res_blocks=1)
        configs |= {"vae": coder, "denoiser": dataclasses.replace(configs["denoiser"], in_dim=48, out_dim=48, pose_dim=48)}
        size = "128x128"
    folder = checkpoint("s2v-14B", configs, tmp_path / "two", boundary=0.875, guidance=[1.5, 2.0])
    loaded, net = [], Experts.net
    monkeypatch.setattr(Experts, "net", lambda self, index: loaded.append(index) or net(self, index))
    out = make(tmp_path, "out", "--clips", "1", "--ckpt", folder, "--size", size, "--steps", "4")
    assert loaded == [0, 1] and len(out) == 13 and out.std() > 1


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


S2V, T2V, I2V, TI2V = {"--audio": VOICE, "--image": FACE}, *({"--ckpt": f"tiny-{task}", "--prompt": "a"} for task in ("t2v", "i2v", "ti2v"))


@pytest.mark.parametrize("arguments, words", [*((S2V | changes, words) for changes, words in (
    ({"--audio": None}, ("audio",)), ({"--image": None}, ("image",)), ({"--audio": "no.wav"}, ("no.wav",)), ({"--image": "no.png"}, ("no.png",)),
    ({"--audio": __file__}, ("test_sample.py",)), ({"--image": VOICE}, ("picture",)), ({"--audio": FACE}, ("sound",)),
    ({"--clip-frames": "81"}, ("multiple of 4", "81")), ({"--clip-frames": "124"}, ("120", "124")), ({"--clips": "0"}, ("clips",)),
    ({"--steps": "0"}, ("steps", "0")), ({"--guidance": "nan"}, ("guidance", "nan")), ({"--shift": "0"}, ("shift",)),
    ({"--solver": "rk4"}, ("solver", "unipc", "rk4")), ({"--seed": "-1"}, ("seed",)), ({"--start": "99"}, ("start",)),
    ({"--duration": "0.01"}, ("ms",)), ({"--duration": "-1"}, ("duration",)), ({"--pose-video": "no.mp4"}, ("no.mp4",)),
    ({"--pose-video": VOICE}, ("picture",)), ({"--out": f"{__file__}/out.mp4"}, ("test_sample.py is a file",)), ({"--out": "out.gif"}, (".mp4",)),
    ({"--ckpt": "no-such-folder"}, ("no-such-folder",)), ({"--size": "8x8"}, ("size",)), ({"--size": "axb"}, ("--size", "axb")),
    ({"--size": "0x100"}, ("--size", "0x100")), ({"--device": "gpu"}, ("device must be cpu, cuda",)),
    ({"--vram": "0"}, ("--vram wants the size of a card",)))),
    (T2V | {"--prompt": ""}, ("t2v-A14B", "prompt")), (T2V | {"--image": FACE}, ("t2v-A14B", "picture")), (I2V, ("i2v-A14B", "picture")),
    (TI2V | {"--audio": VOICE}, ("ti2v-5B", "audio")), (T2V | {"--frames": "10"}, ("10", "9")), (T2V | {"--size": "50x64"}, ("50x64", "16")),
], ids=str)
def test_bad_arguments(tmp_path, capsys, monkeypatch, tiny, arguments, words):
    """One line on stderr that holds all words, exit status 2, nothing left behind, and no model was loaded."""
    monkeypatch.setattr(wan_s2v, "encode_text", lambda *_: pytest.fail("a model was loaded before the input was checked"))
    arguments = {"--out": str(tmp_path / "out.mp4")} | arguments
    arguments |= {"--ckpt": str(tiny.get(arguments.get("--ckpt", "tiny"), arguments.get("--ckpt")))}
    assert sample.cli([part for name, value in arguments.items() if value is not None for part in (name, value)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 500 and all(word in lines[0] for word in words), lines
    assert not list(tmp_path.iterdir())


def fail_after_one_clip(monkeypatch, failure):
    make_clips = wan_s2v.make_clips

    def one_then_fail(*arguments):
        yield next(make_clips(*arguments))
        raise failure
    monkeypatch.setattr(wan_s2v, "make_clips", one_then_fail)


@pytest.mark.parametrize("failure, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), "error: the device is out of memory for 2.50 GiB more: choose a"),
    (KeyboardInterrupt(), "stopped"), (ValueError("a frame holds NaN"), "error: a frame holds NaN"),
    (torch.AcceleratorError("CUDA error: unknown\nand more"), "error: PyTorch fails on auto: CUDA error: unknown; try --no-compile, or a sma"),
], ids=["memory", "ctrl-c", "frames", "cuda"])
def test_finished_clips_are_kept(tmp_path, monkeypatch, capsys, failure, said):
    fail_after_one_clip(monkeypatch, failure)
    code = sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "out.mp4"), "--clips", "2", *QUICK])
    assert code == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4.parts", "out.partial.mp4"]
    media = probe(tmp_path / "out.partial.mp4")
    assert media.frames == 13 and abs(media.audio_duration - 13 / 16) < 0.01
    err = capsys.readouterr().err
    assert "out.mp4.parts up to clip 1 of 2" in err and "out.partial.mp4" in err and err.splitlines()[-1].startswith(said) and "and more" not in err


def test_mistakes_of_the_code_show_themselves(tmp_path, monkeypatch):
    """A RuntimeError that no GPU and no compiler raised is a traceback, not advice to choose a smaller size."""
    fail_after_one_clip(monkeypatch, RuntimeError("shape '[2]' is invalid for input of size 3"))
    with pytest.raises(RuntimeError, match="shape"):
        sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "out.mp4"), "--clips", "2", *QUICK])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4.parts", "out.partial.mp4"]


def test_a_mistake_in_a_block_shows_itself(tmp_path, monkeypatch):
    """A fork that unpacks three of four: Python's ValueError is no error of the input."""
    def finish(self, x, y, mod, text):
        gate1, shift2, scale2 = mod[2:]
    monkeypatch.setattr(model.Block, "finish", finish)
    with pytest.raises(RuntimeError, match="in the network: too many values to unpack"):
        sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "out.mp4"), *QUICK])
    assert not list(tmp_path.iterdir())


def test_no_fp8_multiplies_out(tmp_path, capsys):
    """The tiny checkpoint's float8 matrices as bfloat16: the same numbers on a CPU, so the same video, from larger weights."""
    for name, option in (("a", []), ("b", ["--no-fp8"])):
        assert sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / f"{name}.mp4"), "--duration", "1", *QUICK, *option,
                           "--ckpt", str(HERE / "weights" / "tiny")]) == 0
    sizes = [float(size) for size in re.findall(r"denoiser_high ([\d.]+) MiB", capsys.readouterr().out)]
    assert len(sizes) == 2 and sizes[1] > 1.3 * sizes[0], sizes
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_importing_sample_loads_what_sampling_needs():
    """And changes nothing: the allocator's setting belongs to the program. A run that compiles nothing does not import the compiler, for 2 s."""
    program = ("import os, sys, sample; here = os.getcwd(); "
               "files = [m.__file__ for m in list(sys.modules.values()) if (getattr(m, '__file__', None) or '').startswith(here + os.sep) "
               "and 'site-packages' not in m.__file__]; "
               "print(len(files), sum(open(f).read().count(chr(10)) for f in files), 'PYTORCH_CUDA_ALLOC_CONF' in os.environ); "
               "sample.cli(['--audio', 'none.wav']); import fast.blocks, fast.fp8, fast.attention8; print('torch._dynamo' in sys.modules)")
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_CUDA_ALLOC_CONF"}
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, env=env, capture_output=True, text=True)
    files, lines, setting, *_, compiler = done.stdout.split()
    assert int(files) <= 14 and int(lines) < 4000 and setting == compiler == "False", done.stdout + done.stderr
