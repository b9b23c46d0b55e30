"""What is asked of a stream is what it does, at any size, rate and number of ranks.  pytest tests/test_live_options.py"""
import math
import os
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from test_live import FACE, HERE, VOICE

import live
import sample
from fast.relay import Line
from formats import checkpoints
from jobs import live as program
from jobs import live_plan
from media import stream as out
from media.ffmpeg import ffmpeg_command, probe
from media.sound import load_audio

GIVEN = ["--live", "--image", FACE, "--device", "cpu"]


def planned(*given, world=None):
    """-> args, checkpoint, plan, speech"""
    args = sample.parser().parse_args([*GIVEN, "--audio", VOICE, *given])
    args.world, pipeline = world, sample.open_pipeline(args)
    return args, pipeline.checkpoint, *live_plan.make_plan(pipeline, args)


def test_what_is_asked_for_is_what_a_stream_has(monkeypatch, tmp_path):
    """Seed, window, shift, reference, prompt, and a picture that is no square."""
    prompts, encode, shapes, fit = [], program.encode_prompt, [], program.fit_picture
    monkeypatch.setattr(program, "encode_prompt", lambda *given: prompts.append(given[2]) or encode(*given))
    monkeypatch.setattr(program, "fit_picture", lambda picture, size: shapes.append(size) or fit(picture, size))
    Image.new("RGB", (256, 128)).save(tmp_path / "a.png")
    args, checkpoint, plan, _ = planned("--image", str(tmp_path / "a.png"), "--seed", "7", "--window", "6", "--shift", "5", "--replace-ref",
                                        "--prompt", "a nod", "--size", "64x128")
    with torch.inference_mode():
        video = program.open_live(checkpoint, plan, args.replace_ref)
    assert (video.generator.initial_seed(), video.stream.window, video.stream.shift, video.replace_ref) == (7, 6, 5, True)
    assert prompts == ["a nod"] and shapes == [(plan.height, plan.width)] and plan.height != plan.width
    assert tuple(8 * n for n in video.shape[3:]) == shapes[0]


def test_the_sound_of_a_file_is_under_its_frames(tmp_path, monkeypatch):
    """Both channels, from --start, 3 frames later, at 20 fps: 24 frames are two blocks and the 3 frames that the first does not show."""
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)        # a probe of two seconds
    samples = soundfile.read(VOICE, dtype="float32")[0]
    both, path = np.stack([samples, samples[::-1]], 1), tmp_path / "a.mp4"
    soundfile.write(tmp_path / "a.wav", both, 16000, "FLOAT")
    assert sample.cli([*GIVEN, "--audio", str(tmp_path / "a.wav"), "--size", "64x64", "--fps", "20", "--start", "0.5", "--duration", "1.2",
                       "--av-offset", "3", "--out", str(path)]) == 0
    media = probe(str(path))
    heard = subprocess.run(ffmpeg_command("-v", "error", "-i", str(path), "-ac", "2", "-f", "f32le", "-"), capture_output=True).stdout
    heard, wanted = np.frombuffer(heard, np.float32).reshape(-1, 2)[2400:19200], both[8000:]
    assert (media.frames, media.fps) == (24, 20)
    assert all(np.corrcoef(heard[:, i], wanted[:len(heard), i])[0, 1] > 0.9 for i in (0, 1))


def test_the_plan_of_a_part_at_another_rate():
    *_, plan, speech = planned("--start", "0.5", "--duration", "1", "--fps", "20")
    assert torch.equal(speech.samples, load_audio(VOICE, 0.5, 1)) and plan.frames == 20 and "20 frames = 1.00 s, at 20 fps" in str(plan)


def test_a_file_of_another_rate_has_not_become_shorter(tmp_path, monkeypatch):
    """At 16 kHz it has three samples more than it announced."""
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)
    soundfile.write(tmp_path / "a.wav", np.random.RandomState(0).uniform(-0.1, 0.1, 44101), 44100)
    assert sample.cli([*GIVEN, "--audio", str(tmp_path / "a.wav"), "--size", "64x64", "--out", str(tmp_path / "a.mp4")]) == 0


def test_loras_that_are_given_come_before_its_own(monkeypatch):
    monkeypatch.setattr("convert_weights.merge", lambda checkpoint, given, device: given)
    tiny = checkpoints.open_checkpoint(HERE / "weights" / "tiny")
    assert live_plan.with_loras(tiny, ["a"]) == ["a"] and [path[:4] for path in live_plan.with_loras(tiny, [])] == ["high", "low="]


def test_mouths_lead_but_of_drawn_faces():
    args = sample.parser().parse_args([*GIVEN, "--audio", VOICE])
    pipeline = sample.open_pipeline(args)
    early = [live_plan.make_plan(pipeline, args)[0].early]
    pipeline.checkpoint = replace(pipeline.checkpoint, sampling={k: v for k, v in pipeline.checkpoint.sampling.items() if k != "picture_db"})
    assert [*early, live_plan.make_plan(pipeline, args)[0].early] == [0, live.WARM_UP]


@pytest.mark.parametrize("given", ["--negative-prompt a", "--pose-video a", "--guidance 2", "--solver euler", "--clips 2", "--clip-frames 8",
                                   "--start-from-ref", "--official", "--restart", "--keep-parts", "--save-every 3"])
def test_what_a_stream_has_not(given):
    with pytest.raises(ValueError, match=f"--live has no {given.split()[0]}: leave it out"):
        planned(*given.split())


@pytest.mark.parametrize("shift, names", [("3", "high high low low"), ("5", "high high high low")])
def test_which_expert_makes_a_step_follows_the_shift(shift, names):
    _, checkpoint, plan, _ = planned("--shift", shift)
    assert live_plan.own_experts(checkpoint, plan) == [f"denoiser_{name}" for name in names.split()]


def test_the_rate_of_many_is_that_of_the_slowest(monkeypatch):
    """A forward of a second a layer: steps 2, 1, 1 of three ranks are as slow as 2, 2 of two; and decoding takes its time."""
    _, checkpoint, plan, _ = planned()
    monkeypatch.setattr(live_plan, "ring_seconds", lambda *_: 1.0)
    layers = checkpoint.configs["denoiser"].n_layer
    rates = [live_plan.expected(replace(plan, line=Line(0, size)), checkpoint) for size in (1, 3, 4)]
    assert rates == pytest.approx([12 / (n * layers) for n in (4, 2, 1)], rel=0.2)
    monkeypatch.setattr("fast.estimate.vae_rate", lambda *_: 1.0)    # flops a second
    assert live_plan.expected(plan, checkpoint) < 1e-3


def test_memory_is_named_in_the_order_of_the_line():
    _, checkpoint, plan, _ = planned(world=SimpleNamespace(rank=1, size=3))
    taken = [sum(live_plan.memory_of(replace(plan, line=Line(rank, 3)), checkpoint).values()) for rank in (1, 2, 0)]
    assert [*plan.each] == taken and len({*taken}) == 3 and sum(plan.memory.values()) == taken[0]


@pytest.mark.parametrize("early, waits", [(0, 0.76), (3, 0.64)])
def test_what_a_player_waits_for(early, waits, monkeypatch):
    """From the first sound of a block to the last that it hears; and frames wait for a sound that comes 30 frames later."""
    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough
    args, checkpoint, plan, _ = planned("--av-offset", "-30")
    caught, under = {}, program.Under

    def catch(name, result=None):
        return lambda *given: caught.update({name: given}) or result and result(*given)
    for name, stand_in in dict(open_live=lambda *_: None, from_pipe=lambda *_: iter(()), Under=catch("under", under), Clock=catch("clock"),
                               StreamWriter=catch("writer", enough)).items():
        monkeypatch.setattr(program, name, stand_in)
    monkeypatch.setattr(os, "set_blocking", lambda *_: None)
    with pytest.raises(Enough):
        program.stream(replace(plan, seconds=None, frames=math.inf, early=early), None, checkpoint, args, None, 0.0)
    assert caught["under"] == (16000, 1, 25, -1.2) and caught["clock"][2] == pytest.approx(waits) and caught["writer"][-1] == out.WAITING + 30


def test_a_bar_says_ahead_or_behind(monkeypatch):
    now = iter([11.0, 11.1])
    clock = program.Clock(25, 100, None)
    monkeypatch.setattr(program.time, "perf_counter", lambda: next(now))
    for _, (frames, said) in zip(clock.waiting([(None, None, 10)] * 2), ((12, "0.5 s behind real time"), (50, "1.4 s ahead of real time"))):
        clock.wrote(frames)
        assert said in clock.bar.postfix


def test_the_reader_of_a_pipe_is_no_work(monkeypatch):
    """A file's is: it is the disk."""
    args, checkpoint, plan, speech = planned("--duration", "1")
    wrote = []

    class Writer:
        frames, file, path, waited = 0, None, None, 3.5

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, frames, samples):
            self.frames += frames.shape[1]
    monkeypatch.setattr(program, "open_live", lambda *_: None)
    monkeypatch.setattr(program, "pictures", lambda *_: [(torch.zeros(3, 9, 64, 64), 25)])
    monkeypatch.setattr(program, "StreamWriter", Writer)
    monkeypatch.setattr(program.Clock, "wrote", lambda self, frames, waited=0.0: wrote.append((frames, waited)))
    for pipe in (1, None):
        program.stream(plan, speech, checkpoint, args, pipe, 0.0)
    assert wrote == [(9, 3.5), (9, 0.0)]
