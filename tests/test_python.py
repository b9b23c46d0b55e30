"""The pipeline as a program calls it: what it prints, keeps, takes and refuses.

    pytest tests/test_python.py
"""
import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from ranks import as_program

import sample
import wan_s2v
from fast.plan import keepable
from fast.probe import Memory
from formats.checkpoints import Checkpoint
from media.ffmpeg import probe, run
from media.given import check_names
from tests.kill_runs import quick
from tiny import faces
from wan_s2v import WanS2VPipeline, draw_noise

HERE = Path(__file__).parents[1]
VOICE, FACE = str(HERE / "samples" / "voice.flac"), str(HERE / "samples" / "face.png")
QUICK = dict(height=64, width=64, num_inference_steps=1, clip_frames=8, clips=1)
CKPT = quick()[-1]


def make(pipeline=None, **changes):
    pipeline = pipeline or WanS2VPipeline.from_pretrained(CKPT, device_map="cpu")
    return pipeline(**dict(audio_path=VOICE, image_path=FACE) | QUICK | changes)


def test_plan_and_bar_unless_quiet_and_a_result_of_one_line(capsys):
    result = make()
    said = capsys.readouterr()
    assert "video    s2v-14B: 64x64" in said.out and "clip 1/1: 100%" in said.err
    print(result)
    assert capsys.readouterr().out == "Video: 5 frames of 64x64, 0.31 s at 16 fps; .save('out.mp4') writes it\n"
    make(quiet=True)
    said = capsys.readouterr()
    assert said.out == "" and "clip" not in said.err                 # warnings remain


def test_a_fork_that_fast_does_not_follow_is_refused(monkeypatch):
    """In the thread that checks it while text and VAE are loaded; nothing is denoised then."""
    def verify(network, cfg): raise ValueError(f"{network.__name__} of {cfg.n_layer} layers differs")
    monkeypatch.setattr("fast.blocks.verify", verify)
    monkeypatch.setattr("fast.blocks.FastDenoiser.__call__", lambda *_: pytest.fail("denoised"))
    with pytest.raises(ValueError, match=r"Denoiser of \d layers differs"):
        make(WanS2VPipeline.from_pretrained(CKPT, device_map="cpu", attention8=True))


def test_networks_are_loaded_once(monkeypatch):
    """Every network, for two videos; the second is as one of a pipeline of its own."""
    loaded, load = [], Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, name, *how: loaded.append(name) or load(self, name, *how))
    pipeline = WanS2VPipeline.from_pretrained(CKPT, device_map="cpu")
    make(pipeline, seed=1)
    second = make(pipeline, seed=2)
    assert sorted(loaded) == ["audio", "denoiser_high", "text", "vae"]          # one step: one expert
    assert torch.equal(second.frames, make(seed=2).frames)


def test_networks_are_kept_as_far_as_memory_allows():
    pipeline = WanS2VPipeline.from_pretrained(device_map="cpu")
    plan = pipeline.plan(audio=VOICE, image=FACE, size=(64, 64))
    sizes = {name: part.nbytes for name, part in pipeline.checkpoint.parts.items()}
    for room, names in ((2**30, set(sizes)), (0, set()), (2**20, {"audio", "text"})):
        kept = keepable(dataclasses.replace(plan, free=Memory(None, plan.memory.host + room, 2**40)), pipeline.checkpoint)
        assert kept <= names if room == 2**20 else kept == names, (room, kept, sizes)
    make(pipeline)
    assert pipeline.networks.nbytes(torch.device("cpu")) > 0
    pipeline.networks.begin(dataclasses.replace(plan, free=Memory(None, 0, 2**40)))
    assert pipeline.networks.nbytes(torch.device("cpu")) == 0


def test_pictures_and_sound_from_memory(tmp_path):
    """The same video as from files, and its sound in the file."""
    wav, rate = soundfile.read(VOICE, dtype="float32")
    from_files = make()
    for sound in ((wav, rate), (torch.from_numpy(wav), rate), (np.stack([wav, wav]), rate)):
        given = make(audio_path=sound, image_path=Image.open(FACE))
        assert torch.equal(given.frames, from_files.frames)
    given.save(tmp_path / "out.mp4")
    assert probe(tmp_path / "out.mp4").has_audio


@pytest.mark.parametrize("changes, kind, words", [
    (dict(step=3), TypeError, "unknown option step: did you mean steps?"), (dict(audio_path=np.zeros(9)), TypeError, "got ndarray: give (samples"),
    (dict(image_path=np.zeros((9, 9, 3))), TypeError, "PIL.Image.fromarray"), (dict(steps=3), ValueError, "steps is given twice"),
    (dict(audio_path=(np.zeros((2, 2, 2)), 16000)), TypeError, "(2, 2, 2) at 16000"), (dict(out="out.gif"), ValueError, "wanted a name that ends in .mp4")])
def test_refused_in_one_line_before_the_work(monkeypatch, changes, kind, words):
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a network was loaded"))
    with pytest.raises(kind) as error:
        make(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unknown_choices_are_refused_before_a_checkpoint_is_used():
    with pytest.raises(TypeError, match="unknown option atention8: did you mean attention8"):
        WanS2VPipeline.from_pretrained(atention8=True)


def test_missing_folders_are_made(tmp_path):
    make(out=tmp_path / "a" / "b" / "one.mp4").save(tmp_path / "c" / "two.mp4")
    assert sample.cli(["--audio", VOICE, "--image", FACE, "--out", f"{tmp_path}/d/e/", "--steps", "1", "--size", "64x64", "--clip-frames", "8",
                       "--clips", "1", *quick()]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*.mp4")) == ["a/b/one.mp4", "c/two.mp4"]
    assert len(list((tmp_path / "d" / "e").iterdir())) == 5


# ------------------------------------------------------------------------------------------ what a program's surroundings must not change

def test_another_default_dtype_changes_nothing():
    usual = make()
    torch.set_default_dtype(torch.float64)
    try:
        other = make()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.frames.dtype == torch.float32 and torch.equal(usual.frames, other.frames)


def test_seeds_of_any_kind_and_size():
    """numpy's integers; beyond 32 bits on a CPU, too, another seed is another video. Below, noise is torch's own."""
    usual = make(seed=3)
    assert torch.equal(usual.frames, make(seed=np.int64(3)).frames)
    assert not torch.equal(usual.frames, make(seed=2 ** 33 + 3).frames)
    cpu = torch.device("cpu")
    for seed in (0, 42, 2 ** 32 - 1):
        assert torch.equal(draw_noise((9,), seed, cpu, torch.float32), torch.randn(9, generator=torch.Generator().manual_seed(seed)))
    noise = [draw_noise((9,), 3 + 2 ** bits, cpu, torch.float32).tolist() for bits in range(33, 63)]
    assert len(set(map(tuple, noise))) == len(noise)
    with pytest.raises(ValueError, match="seed must be a whole number, got 3.5"):
        make(seed=3.5)


@pytest.mark.parametrize("given, says", [
    (dict(prompt=None), "prompt must be a text, got None"), (dict(prompt=Path("a face")), "prompt must be a text, got "),
    (dict(guidance_scale=(1, 2, 3)), "guidance must be one or two of 0 to 50"),
    (dict(guidance_scale=()), "guidance must be one or two of 0 to 50"), (dict(guidance_scale="2"), "guidance must be a number or numbers or None, got '2'"),
    (dict(start_from_ref="no"), "start_from_ref must be True or False, got 'no'"), (dict(seed=True), "seed must be a whole number, got True"),
    (dict(seed=None), "seed must be a whole number, got None"), (dict(num_inference_steps="3"), "steps must be a whole number or None, got '3'"),
    (dict(height="64", width="64"), "size must be numbers or None"), (dict(duration="1"), "duration must be a number or None, got '1'"),
    (dict(shift="x"), "shift must be"), (dict(device="cpu"), "device must be a torch.device, got 'cpu'")])
def test_values_of_another_kind_are_named(given, says):
    with pytest.raises(ValueError, match=says):
        make(**given)


def test_values_of_like_kinds_are_taken():
    """As numpy and torch have them, and flags that are 0, 1 or None."""
    check_names(dict(size=np.array([64, 64]), guidance=torch.tensor([1.0, 2.0]), steps=np.int64(3), seed=torch.tensor(4), shift=np.float32(2), fp8=None,
                     official=1, enlarge=np.True_, duration=3, split=[1, 1]))
    for dtype in ("bfloat16", "float32", "auto"):
        WanS2VPipeline.from_pretrained(device_map="cpu", torch_dtype=dtype)
    with pytest.raises(ValueError, match="shift must be a number or None, got tensor"):
        check_names(dict(shift=torch.tensor([3.0, 3.0])))


def test_a_dtype_that_no_network_runs_in():
    with pytest.raises(ValueError, match="wanted float32 or bfloat16, got torch.int8"):
        WanS2VPipeline.from_pretrained(device_map="cpu", torch_dtype=torch.int8)


def test_a_terminal_without_the_letters_of_a_name(tmp_path):
    """Chinese, Greek and an emoji: printed with escapes, and the video is made; an error about such a file is one line, too."""
    for source, name in ((VOICE, "声λ🙂.flac"), (FACE, "面λ🙂.png")):
        (tmp_path / name).write_bytes(Path(source).read_bytes())
    command = ["--audio", str(tmp_path / "声λ🙂.flac"), "--out", str(tmp_path / "出λ🙂.mp4"), "--steps", "1", "--size", "64x64", "--clip-frames", "16",
               "--clips", "1", *quick(), "--image"]

    def program():
        sys.stdout, sys.stderr = (open(number, "w", encoding="ascii", errors=errors, closefd=False)          # as PYTHONIOENCODING=ascii has them
                                  for number, errors in ((1, "strict"), (2, "backslashreplace")))
        print([sample.cli(command + [str(tmp_path / image)]) for image in ("面λ🙂.png", "无.png")])
    _, said, errors = as_program(program)
    assert said.endswith("[0, 2]\n") and "Traceback" not in errors and "codec" not in errors, errors
    assert "picture not found" in errors and (tmp_path / "出λ🙂.mp4").is_file()


def test_no_ffmpeg_is_said(tmp_path, monkeypatch, capsys):
    """For sound that needs it, and for mp4; wav and PNG frames do without."""
    run("-i", VOICE, str(tmp_path / "a.m4a"))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    arguments = ["--image", FACE, "--steps", "1", "--size", "64x64", "--clip-frames", "16", "--clips", "1"]
    for sound, out in ((str(tmp_path / "a.m4a"), "frames/"), (VOICE, "out.mp4")):
        capsys.readouterr()
        assert sample.cli([*arguments, "--audio", sound, "--out", f"{tmp_path}/{out}"]) == 2
        assert capsys.readouterr().err.startswith("error: no ffmpeg program found: pip install imageio-ffmpeg; without it sound must be")


@pytest.mark.parametrize("prompt, unknown", [("女人微笑", "女人微笑"), ("glasses", "glasses"), ("a woman is singing", "woman, is, singing"),
                                             ("a person with Red hair, happy", None), ("", None), ("portrait with blue background, sad", None)])
def test_words_that_the_tiny_checkpoint_does_not_know(capsys, monkeypatch, prompt, unknown):
    """Said before the work."""
    class Begun(Exception):
        pass

    def encode_text(*_): raise Begun
    monkeypatch.setattr(wan_s2v, "encode_text", encode_text)
    with pytest.raises(Begun):
        make(WanS2VPipeline.from_pretrained(device_map="cpu"), prompt=prompt, quiet=True)
    err = capsys.readouterr().err
    assert ("not trained on the words" in err) == (unknown is not None)
    assert unknown is None or f"words {unknown}: expect" in err and "happy, sad" in err


def test_help_lists_the_words():
    text = " ".join(sample.parser().format_help().split())
    for words in (f"{', '.join(faces.HAIR)} hair", f"{', '.join(faces.BACKGROUND)} background", ", ".join(faces.MOODS[1:])):
        assert words in text


def test_a_stage_inside_another_is_counted_apart(monkeypatch):
    """So that the switch of experts shows beside the denoising in which it happens."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(wan_s2v.time, "perf_counter", lambda: clock.now)
    stages = wan_s2v.Stages()
    with stages("outer"):
        clock.now += 1
        with stages("inner"):
            clock.now += 10
        clock.now += 2
    clock.now += 1000
    with stages("outer"):
        clock.now += 4
    assert stages.seconds == {"outer": 7, "inner": 10}
