"""`sample.py --live`: what it refuses, writes, says and keeps.  pytest tests/test_live_program.py"""
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from ranks import as_program, forked

import sample
from fast.plan import RunConfig
from fast.probe import Memory
from jobs import live as program
from jobs import live_plan
from media import stream as out
from media.ffmpeg import ffmpeg_command, probe
from media.frames import read_frames
from media.sound import cut
from tiny import metrics, over_time, random_weights

HERE = Path(__file__).parents[1]
VOICE, ITALIAN, FACE = (str(HERE / "samples" / name) for name in ("voice.flac", "italian.flac", "face.png"))


@pytest.mark.parametrize("given, said", [
    ([], "--live wants --audio"), (["--audio", VOICE], "--live wants --image"),
    (["--audio", VOICE, "--image", FACE, "--guidance", "2"], "--live has no --guidance"),
    (["--audio", VOICE, "--image", FACE, "--window", "7"], "window must be a multiple of 3, got 7"),
    (["--audio", VOICE, "--image", FACE, "--fps", "0"], "--fps must be"),
    (["--audio", VOICE, "--image", FACE, "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
    (["--audio", VOICE, "--image", FACE, "--av-offset", "-96"], "--av-offset -96 moves the sound by 3.8 s: choose less than 96 frames"),
    (["--audio", VOICE, "--image", FACE, "--frames", "10", "--av-offset", "10"], "--av-offset 10 moves the sound by 0.4 s: choose less than 10 frames"),
    (["--audio", "-", "--image", FACE, "--duration", "1", "--av-offset", "-50"], "--av-offset -50 moves the sound by 2.0 s: choose less than 25 frames"),
    (["--audio", VOICE, "--image", FACE, "--save-every", "3"], "--live has no --save-every"),
    (["--out", "a.avi"], "--live wants a name that ends in .mp4 or .mov for --out, or - for a pipe, got a.avi"),
    (["--out", "a.mp4", "--raw"], "--live --raw wants a name that does not end in .mp4 or .mov"),
    (["--audio", "-", "--image", FACE, "--start", "3"], "--start 3 goes with a sound file")])
def test_what_a_stream_refuses(given, said, capsys, tmp_path):
    assert sample.cli(["--live", "--size", "64x64", "--out", str(tmp_path / "a.mp4"), *given]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ") and said in errors[-1] and not os.listdir(tmp_path)


@pytest.mark.parametrize("given, frames", [(["--frames", "10", "--av-offset", "-30"], 10), (["--duration", "1", "--av-offset", "-24"], 25)])
def test_sound_may_come_earlier_than_the_frames_are_long(given, frames):
    """As long as something of it is left."""
    args = sample.parser().parse_args(["--live", "--image", FACE, "--audio", VOICE, "--device", "cpu", "--no-fp8", *given])
    assert live_plan.make_plan(sample.open_pipeline(args), args)[0].frames == frames


@pytest.mark.parametrize("given", [["--live"], ["--live", "--raw"], []])
def test_what_is_read_is_not_written_over(given, tmp_path, capsys):
    place = tmp_path / ("a" if given[-1:] == ["--raw"] else "a.mp4")
    place.symlink_to(VOICE)
    assert sample.cli(["--image", FACE, "--audio", VOICE, "--out", str(place), *given]) == 2
    assert f"cannot write {place}: it is {VOICE}, which is read meanwhile" in capsys.readouterr().err and place.read_bytes() == Path(VOICE).read_bytes()


def test_a_pipe_is_no_terminal_and_not_what_is_heard(monkeypatch, capsys):
    """Standard input and output of one file would feed on one another."""
    def itself():
        os.dup2(1, 0)
        return sample.cli(["--live", "--image", FACE, "--audio", "-", "--out", "-"])
    assert "error: cannot write to standard output: it is standard input, which is read meanwhile" in as_program(itself)[2]
    monkeypatch.setattr(os, "isatty", lambda file: file == 1)
    assert sample.cli(["--live", "--image", FACE, "--audio", VOICE, "--out", "-"]) == 2
    assert "standard output is a terminal: pipe it into a player" in capsys.readouterr().err


def test_a_sound_that_becomes_shorter(tmp_path, monkeypatch):
    """ffmpeg would wait for what is missing for ever. The frames so far are kept."""
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)
    monkeypatch.setattr("media.sound.cut", lambda *given: (part[:len(part) // 2] for part in cut(*given)))
    _, _, said = as_program(sample.cli, ["--live", "--size", "64x64", "--image", FACE, "--audio", VOICE, "--out", str(tmp_path / "a.mp4")], limit=30)
    assert f"error: {VOICE} has become shorter since it was examined" in said and "frames so far are kept as" in said
    assert os.listdir(tmp_path) == ["a.partial.mp4"] and probe(str(tmp_path / "a.partial.mp4")).frames > 9


def test_a_stream_says_what_it_cuts_and_what_it_does_not_know(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)
    Image.effect_noise((128, 128), 90).convert("RGB").save(tmp_path / "noise.png")
    given = ["--live", "--audio", VOICE, "--duration", "1", "--out", str(tmp_path / "a.mp4")]
    assert sample.cli([*given, "--image", str(tmp_path / "noise.png"), "--prompt", "a volcano"]) == 0
    said = capsys.readouterr()
    assert "noise.png is unlike the pictures this checkpoint was trained on" in said.err and "not trained on the words volcano" in said.err
    assert "were cut" not in said.out
    assert sample.cli([*given, "--image", FACE, "--av-offset", "10"]) == 0
    said = capsys.readouterr()
    assert "1.000 s at 25 fps; the last 0.400 s of the sound have no picture and were cut" in said.out and "warning" not in said.err


def test_a_closed_stream_is_remembered():
    program = "import os; os.close(1); from jobs import stop; stop.fill_closed(); os.write(2, str(stop.closed).encode())"
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, stdin=subprocess.DEVNULL).stderr == b"[1]"


def test_an_output_that_is_none(tmp_path, capsys, monkeypatch):
    given = ["--live", "--image", FACE, "--audio", VOICE, "--out"]
    assert sample.cli([*given, str(tmp_path)]) == 2 and "--live wants a file for --out, got the folder" in capsys.readouterr().err
    monkeypatch.setattr(program.stop, "closed", [1])
    assert sample.cli([*given, "-"]) == 2 and "--out - wants standard output open" in capsys.readouterr().err


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """How many frames it took is not known."""
    def full(self, frames, samples=None):
        if self.frames:
            raise OSError(f"cannot write {self.path}: No space left on device")
        write(self, frames, samples)
    write = out.StreamWriter.write
    monkeypatch.setattr(out.StreamWriter, "write", full)
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)
    place = tmp_path / "a.mp4"
    assert sample.cli(["--live", "--size", "64x64", "--image", FACE, "--audio", VOICE, "--duration", "1", "--out", str(place)]) == 2
    errors = capsys.readouterr().err
    assert f"what could be written is kept as {tmp_path / 'a.partial.mp4'}" in errors and "frames so far" not in errors


def test_the_picture_is_spoken_of(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (2000, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(program, "stream", lambda *_: None)
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)
    assert sample.cli(["--live", "--image", str(tmp_path / "a.png"), "--audio", VOICE, "--out", str(tmp_path / "a.mp4")]) == 0
    assert "picture  2000x50, of which the middle 200x50 is seen" in capsys.readouterr().out


def test_sound_of_another_scale_is_written_quieter(tmp_path, capsys):
    """As of a clip: at such peaks the AAC encoder never ended. The mouth moves the same."""
    samples, rate = soundfile.read(VOICE, frames=16000)
    heard, seen = [], []
    for scale in (1, 2e7):
        audio, path = (str(tmp_path / f"{scale}.{kind}") for kind in ("wav", "mp4"))
        soundfile.write(audio, scale * samples, rate, "FLOAT")
        assert sample.cli(["--live", "--size", "64x64", "--image", FACE, "--audio", audio, "--out", path]) == 0
        assert (f"{audio} has samples up to" in capsys.readouterr().err) is (scale > 1)
        sound = subprocess.run(ffmpeg_command("-v", "error", "-i", path, "-f", "f32le", "-"), capture_output=True, timeout=60).stdout
        heard.append(np.frombuffer(sound, np.float32))
        seen.append(np.stack(list(read_frames(path))).astype(float))
    assert 0.9 < np.abs(heard[1]).max() < 1.1 and np.corrcoef(*heard)[0, 1] > 0.98
    assert seen[0].shape == seen[1].shape and np.abs(seen[0] - seen[1]).mean() < 0.5


@pytest.mark.parametrize("given", [["--fps", "16"], ["--raw"], ["--rings8"], ["--window", "6"], ["--replace-ref"], ["--lora", "a"], ["--audio", "-"], ["--out", "-"]])
def test_what_goes_with_a_stream_alone(given, capsys):
    assert sample.cli(["--image", FACE, *given]) == 2 and f"{given[0]}{' -' * (given[-1] == '-')} goes with --live" in capsys.readouterr().err


@pytest.mark.parametrize("place, said", [("nothing/../file/x.rgb", "is a file, not a folder: choose another name"),
                                         ("x" * 300, "choose a shorter one")])
def test_raw_frames_are_refused_before_anything_is_loaded(place, said, tmp_path, capsys):
    (tmp_path / "file").write_text(""), (tmp_path / "nothing").mkdir()
    assert sample.cli(["--live", "--raw", "--image", FACE, "--audio", VOICE, "--out", str(tmp_path / place)]) == 2
    assert said in capsys.readouterr().err


def test_the_program_of_the_documentation(tmp_path, monkeypatch):
    """The block of Python in docs/live.md, as it stands but for the name of its file."""
    monkeypatch.chdir(HERE)
    block, = re.findall(r"```python\n(.*?)```", (HERE / "docs" / "live.md").read_text(), re.DOTALL)
    exec(block.replace("out.mp4", str(tmp_path / "a.mp4")), {})
    assert probe(str(tmp_path / "a.mp4")).frames == 93


def test_what_cannot_fit_is_refused_with_what_helps():
    """The released network at 704x384, by arithmetic."""
    half = torch.bfloat16
    dtypes = dict.fromkeys(("denoiser", "text", "vae", "audio"), half)
    checkpoint = random_weights.random_checkpoint("s2v-14B", random_weights.released("s2v-14B"), dtypes, Path("tokenizer.json"))
    config = RunConfig(device=torch.device("cuda"), dtype=half, vae_dtype=torch.float16, steps=4, shift=3.0, fp8=True, compile=True)
    plan = live_plan.LivePlan(config, 384, 704, 25, 12, False, None, float("inf"), {}, checkpoint.sizes(), None, True, 3)

    def fits(gib, **changes):
        changed = replace(plan, free=Memory(gib * 2 ** 30, 2 ** 40, 2 ** 40), **changes)
        return live_plan.fitting(replace(changed, memory=live_plan.memory_of(changed, checkpoint)), checkpoint)
    memory = {name: size / 2 ** 30 for name, size in fits(140).memory.items()}
    print(memory, sum(memory.values()))
    assert "leads the sound by 3 frames, 120 ms (--av-offset -3 undoes it)" in str(fits(140)) and "leads" not in str(fits(140, early=0))
    assert memory["rings"] == pytest.approx(46.7, abs=0.1) and memory["denoiser"] == pytest.approx(15.8, abs=1) and 60 < sum(memory.values()) < 75
    assert sum(fits(140, rings8=True).memory.values()) < 60e9 and sum(fits(140, rings8=True, seconds=600.0).memory.values()) < 60e9
    encoders = [fits(140, seconds=seconds).memory["VAE"] / 2 ** 30 - memory["VAE"] for seconds in (None, 600.0)]         # of a file beside a block
    assert encoders[0] == 0 and 1 < encoders[1] < 2
    for gib, changes, helps in ((60, {}, "add --rings8"), (60, dict(config=replace(config, fp8=False), fp8=False, rings8=True), "add --fp8"),
                                (45, dict(rings8=True), "add --window 9"), (20, {}, "choose a smaller --size")):
        with pytest.raises(ValueError, match=helps):
            fits(gib, **changes)


def test_the_rate_is_that_of_the_rings_attention(monkeypatch):
    """Four steps of a layer's second each, and nothing else to speak of; and on this machine a rate that is one."""
    args = sample.parser().parse_args(["--live", "--image", FACE, "--audio", VOICE, "--device", "cpu", "--no-fp8"])
    pipeline = sample.open_pipeline(args)
    plan, _ = live_plan.make_plan(pipeline, args)
    assert 1 < live_plan.expected(plan, pipeline.checkpoint) < 1000
    monkeypatch.setattr(live_plan, "ring_seconds", lambda *_: 1.0)
    layers = pipeline.checkpoint.configs["denoiser"].n_layer
    assert live_plan.expected(plan, pipeline.checkpoint) == pytest.approx(12 / (4 * layers), rel=0.2)


def test_a_face_that_talks(tmp_path, capsys, monkeypatch):
    """The tiny checkpoint with its own LoRAs: an mp4 whose mouth follows its sound, of the right person."""
    path, folder = tmp_path / "a.mp4", HERE / "weights" / "tiny-live"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)        # a probe of two seconds
    assert sample.cli(["--live", "--image", FACE, "--audio", ITALIAN, "--duration", "1.8", "--out", str(path), "--device", "cpu"]) == 0
    said, media, (frames, fps) = capsys.readouterr().out, probe(str(path)), metrics.read_video(path)
    assert all(words in said for words in ("times real time", "a.partial.mp4 can be played", "live.high.safetensors"))
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert (media.width, media.height, media.frames, fps) == (128, 128, 45, 25) and abs(media.audio_duration - 1.8) < 0.1
    measured, target = metrics.measure(frames)[:, 0], metrics.target_of(path, 45, fps)[0][:, 0]
    lag, _, now = metrics.sync(measured, target)
    row, = over_time.rows(path, FACE, 10)
    print(f"r {now:.3f}, lag {lag}, {row}")
    assert lag == 0 and now > 0.9 and row["own"] < 0.5 * row["others"] and row["colour"] < 0.05 and abs(row["r"] - now) < 0.02


def program_on(arguments, *streams):
    """sample.py ARGUMENTS but for the start of Python, in a fork, of which it is the end: stdin, stdout and stderr are these paths."""
    status = 1
    try:
        for number, (path, how) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
            os.dup2(os.open(path, how | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = (open(number, "rw"[number > 0], closefd=False) for number in range(3))          # in place of pytest's
        status = sample.cli(arguments)
        sys.stdout.flush()
    finally:
        os._exit(status)


def test_a_pipe(tmp_path):
    """Raw frames to a pipe from sound on another, all printed words on stderr."""
    sound, picture, words = (tmp_path / name for name in ("sound", "picture", "words"))
    os.mkfifo(sound), os.mkfifo(picture)
    wav, raw = soundfile.read(VOICE, dtype="int16", frames=16000)[0].tobytes(), []
    ends = [threading.Thread(target=end, daemon=True) for end in (lambda: sound.write_bytes(wav), lambda: raw.append(picture.read_bytes()))]
    for end in ends:
        end.start()
    options = ["--live", "--image", FACE, "--size", "64x64", "--steps", "1", "--audio", "-", "--raw", "--out", "-"]
    failed = forked(1, 100, lambda _: program_on(options, sound, picture, words))
    for end in ends:
        end.join(10)
    assert not failed and len(raw[0]) == 25 * 64 * 64 * 3 and "after they were heard" in words.read_text(), words.read_text()
