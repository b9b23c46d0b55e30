"""Runs that end early and go on: the same bits as an unbroken one, what differs is refused, what is damaged is said, one writer at a time.

    pytest tests/test_parts.py            `python tests/kill_runs.py` has the long form of the killed runs
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import stoppable

import sample
import wan_s2v
from fast import fp8
from formats.checkpoints import change_denoisers
from jobs import lock
from jobs.parts import Parts, made_from, safely
from media.ffmpeg import ffmpeg_command, probe
from media.frames import read_frames
from media.video import VideoWriter, check_output
from tests import kill_runs
from tiny import random_weights
from wan_s2v import WanS2VPipeline

HERE = Path(__file__).parents[1]
VOICE, FACE = str(HERE / "samples" / "voice.flac"), str(HERE / "samples" / "face.png")
QUICK = ["--audio", VOICE, "--image", FACE, "--size", "64x64", "--clip-frames", "8", "--steps", "2", "--clips", "2", "--save-every", "1",
         *kill_runs.quick()]


class Ended(KeyboardInterrupt):
    """In place of a signal."""


def end_at(clip, step):
    """A progress that ends the run before a step of a clip."""
    def steps_of(number, steps):
        for i, t in steps:
            if (number, i) == (clip, step):
                raise Ended
            yield i, t
    return steps_of


def broken_run(pipeline, plan, folder, places, every=1):
    """Frames (3, P, H, W) of a run that ends at each of some places (clip, step) and goes on, as every clip left the pipeline."""
    clips, made = {}, made_from(plan, pipeline.checkpoint)
    for place in [*places, (-1, -1)]:
        parts = Parts(folder / "out.mp4", made, plan.clips, every).open()
        assert place in (places[0], (0, 2)) or parts.clips or parts.states, "nothing is kept"
        try:
            for frames in pipeline.generate(plan, progress=end_at(*place), keep=parts):
                clips[parts.done] = frames
                parts.add(frames.shape[1])
        except Ended:
            pass
        parts.close()
    return torch.cat([clips[n] for n in range(plan.clips)], dim=1)


@pytest.mark.parametrize("changes, places", [
    (dict(), [(0, 0), (0, 2), (1, 1), (2, 0)]), (dict(start_from_ref=True, solver="euler", clips=2), [(1, 1)]),
    (dict(clip_frames=76, clips=2, solver="dpm++", steps=1), [(1, 0)])], ids=str)
def test_clips_and_steps_go_on_with_the_same_bits(tmp_path, changes, places):
    """Short clips look back at more than one; of 76 frames, at none; a run that ended at (0, 0) had nothing to keep."""
    pipeline = WanS2VPipeline.from_pretrained(QUICK[-1], device_map="cpu")
    plan = pipeline.plan(**dict(audio=VOICE, image=FACE, size=(64, 64), steps=3, clip_frames=8, clips=3) | changes)
    unbroken = torch.cat(list(pipeline.generate(plan)), dim=1)
    assert torch.equal(broken_run(pipeline, plan, tmp_path, places), unbroken)


@pytest.mark.parametrize("name, solver, given", [("tiny-t2v", "unipc", dict(prompt="a cat")), ("tiny-i2v", "dpm++", dict(image=FACE)),
                                                 ("tiny-ti2v", "euler", dict(prompt="a", image=FACE))])
def test_steps_of_the_family_go_on_with_the_same_bits(tmp_path, name, solver, given):
    """Before and after the experts change, and once all steps are done."""
    pipeline = WanS2VPipeline.from_pretrained(random_weights.ensure_tiny(HERE / "weights" / name), device_map="cpu")
    plan = pipeline.plan(**given, size=(64, 64), frames=9, steps=6, solver=solver)
    unbroken = torch.cat(list(pipeline.generate(plan)), dim=1)
    assert torch.equal(broken_run(pipeline, plan, tmp_path, [(0, 3), (0, 5)], every=2), unbroken)


def test_a_vae_that_went_on_in_float32_stays_so():
    """Its float16 overflowed in a clip before: so it does after that clip in an unbroken run."""
    pipeline = WanS2VPipeline.from_pretrained(device_map="cpu")
    plan = pipeline.plan(audio=VOICE, image=FACE, size=(64, 64), steps=1, clip_frames=8, clips=2)
    vae = wan_s2v.load_vae(pipeline.networks, plan).half()

    class Saved(wan_s2v.Nothing):
        done = 1

        def load(self, name, **shapes):
            return {key: torch.tensor(True) if key == "vae_float32" else torch.zeros(shape) for key, shape in shapes.items()}
    inputs = wan_s2v.ClipInputs(None, None, None, torch.zeros(1, 3, 1, 64, 64), [None] * 2, [None] * 2)
    motion, past = wan_s2v.begin_motion(inputs, vae, plan.config, Saved())
    assert vae.dtype == torch.float32 and vae.tiles == 2 and motion.shape[2] == 19 and past.shape[2] == 65


# ---------------------------------------------------------------------------------------------------------------- the command line

def run(out, *arguments):
    return sample.cli([*QUICK, "--out", str(out), *arguments])


def end_after(monkeypatch, clips):
    """The next run ends after so many clips, and the one after it goes on."""
    make_clips = wan_s2v.make_clips

    def some(*arguments):
        for n, frames in enumerate(make_clips(*arguments), 1):
            yield frames
            if n == clips:
                monkeypatch.setattr(wan_s2v, "make_clips", make_clips)
                raise Ended
    monkeypatch.setattr(wan_s2v, "make_clips", some)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out.mp4"
    assert run(out) == 0
    return out.read_bytes()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_same_command_goes_on(tmp_path, monkeypatch, capsys, unbroken):
    out = tmp_path / "out.mp4"
    end_after(monkeypatch, 1)
    assert run(out) == 130 and left(tmp_path) == ["out.mp4.parts", "out.partial.mp4"]
    assert f"kept in {out}.parts up to clip 1 of 2, to be watched as {tmp_path}/out.partial.mp4: the same command goes on" in capsys.readouterr().err
    media = probe(tmp_path / "out.partial.mp4")
    assert media.frames == 5 and abs(media.audio_duration - 5 / 16) < 0.01
    assert run(out) == 0 and "going on after clip 1 of 2" in capsys.readouterr().out
    assert left(tmp_path) == ["out.mp4"] and out.read_bytes() == unbroken


@pytest.mark.parametrize("changes, words", [
    (["--seed", "7"], "seed 42, now 7"), (["--start", "1"], "start 0.0, now 1.0"), (["--prompt", "sad"], 'prompt "", now "sad"'),
    (["--image", str(HERE / "docs" / "strip.png")], "another image"), (["--audio", str(HERE / "samples" / "italian.flac")], "another audio"),
    (["--av-offset", "-3"], "av_offset 0, now -3"), (["--ckpt", str(HERE / "weights" / "tiny")], "another checkpoint")], ids=str)
def test_another_command_does_not(broken, tmp_path, capsys, changes, words):
    shutil.copytree(broken, tmp_path, dirs_exist_ok=True)
    before = left(tmp_path / "out.mp4.parts")
    assert run(tmp_path / "out.mp4", *changes) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert words in line and "holds finished parts of another video" in line and "--restart" in line, line
    assert left(tmp_path) == ["out.mp4.parts", "out.partial.mp4"] and left(tmp_path / "out.mp4.parts") == before


def test_float8_multiplied_out_is_another_checkpoint():
    """As --no-fp8 has it."""
    pipeline = WanS2VPipeline.from_pretrained(device_map="cpu")
    plan = pipeline.plan(audio=VOICE, image=FACE, size=(64, 64))
    other = change_denoisers(pipeline.checkpoint, lambda _, part: fp8.multiplied_out(part.tensors))
    first, second = made_from(plan, pipeline.checkpoint), made_from(plan, other)
    assert first == made_from(plan, pipeline.checkpoint) and [name for name in first if first[name] != second[name]] == ["checkpoint"]


def test_speed_and_names_do_not_matter(broken, tmp_path, capsys):
    """A copy of the sound under another name, and --no-compile."""
    shutil.copytree(broken, tmp_path, dirs_exist_ok=True)
    shutil.copy(VOICE, tmp_path / "copy.flac")
    assert run(tmp_path / "out.mp4", "--audio", str(tmp_path / "copy.flac"), "--no-compile") == 0
    assert "going on after clip 1 of 2" in capsys.readouterr().out


def test_restart_and_keep_parts(tmp_path, monkeypatch, capsys, unbroken):
    out = tmp_path / "out.mp4"
    end_after(monkeypatch, 1)
    assert run(out, "--seed", "7") == 130
    assert run(out, "--restart", "--keep-parts") == 0 and "going on" not in capsys.readouterr().out
    assert out.read_bytes() == unbroken and left(tmp_path) == ["out.mp4", "out.mp4.parts"]
    out.unlink()
    monkeypatch.setattr(wan_s2v, "make_clips", lambda *_: pytest.fail("made again"))
    assert run(out) == 0 and "going on after clip 2 of 2" in capsys.readouterr().out                     # as after an end while they are joined
    assert out.read_bytes() == unbroken and left(tmp_path) == ["out.mp4"]


def test_png_frames_go_on(tmp_path, monkeypatch):
    for name in ("broken/", "whole/"):
        if name == "broken/":
            end_after(monkeypatch, 1)
            assert run(f"{tmp_path}/{name}") == 130 and left(tmp_path) == ["broken.parts"]
        assert run(f"{tmp_path}/{name}") == 0
    assert left(tmp_path) == ["broken", "whole"]
    names = left(tmp_path / "whole")
    assert len(names) == 13 and left(tmp_path / "broken") == names
    assert all((tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_from_python(tmp_path, monkeypatch, unbroken):
    """The same file, and the frames of the clips before read from it."""
    options = dict(audio_path=VOICE, image_path=FACE, height=64, width=64, clip_frames=8, num_inference_steps=2, clips=2,
                   out=tmp_path / "out.mp4", quiet=True)
    pipeline = WanS2VPipeline.from_pretrained(QUICK[-1], device_map="cpu")
    end_after(monkeypatch, 1)
    with pytest.raises(Ended):
        pipeline(**options)
    assert left(tmp_path) == ["out.mp4.parts", "out.partial.mp4"]
    with pytest.raises(ValueError, match="seed 42, now 7"):
        pipeline(**options, seed=7)
    video = pipeline(**options)
    assert (tmp_path / "out.mp4").read_bytes() == unbroken and video.frames.shape == (3, 13, 64, 64)
    first = next(read_frames(tmp_path / "out.mp4"))
    assert torch.equal(video.frames[:, 0].permute(1, 2, 0), torch.from_numpy(first) / 127.5 - 1)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder where a run has ended after the first of two clips."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as monkeypatch:
        end_after(monkeypatch, 1)
        assert run(folder / "out.mp4") == 130
    return folder


@pytest.mark.parametrize("file, damage", [
    ("manifest.json", lambda data: data[:len(data) // 2]), ("manifest.json", lambda data: b"[]"), ("manifest.json", lambda data: b"{}"),
    ("manifest.json", lambda data: data.replace(b"0000.mp4", b"../../a")),
    ("manifest.json", lambda data: data.replace(b'"frames": 5', b'"frames": "5"')),
    ("0000.mp4", lambda data: data[:-1]), ("0000.mp4", None), ("clip", lambda data: data[:-1] + b"x"), ("clip", None)])
def test_damage_is_said(tmp_path, capsys, broken, file, damage):
    """One line; nothing is removed unless it is asked for."""
    shutil.copytree(broken, tmp_path, dirs_exist_ok=True)
    path = next(path for path in (tmp_path / "out.mp4.parts").iterdir() if path.name.startswith(file))
    changed = damage and damage(path.read_bytes())
    path.unlink() if damage is None else path.write_bytes(changed)
    before = left(tmp_path / "out.mp4.parts")
    assert run(tmp_path / "out.mp4") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "is damaged" in err[0] and "--restart" in err[0], err
    assert left(tmp_path / "out.mp4.parts") == before
    parts = Parts(tmp_path / "out.mp4", {}, 2, restart=True).open()
    assert left(tmp_path / "out.mp4.parts") == ["lock"] and parts.done == 0
    parts.close()


def test_states_take_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """A clock by hand: saving takes 0.5 s, so none is due in the 49.5 s after it, unless a number of steps was asked for."""
    clock = [1000.0]
    monkeypatch.setattr("jobs.parts.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("jobs.parts.digest", lambda path: clock.__setitem__(0, clock[0] + 0.5) or "0" * 64)
    parts, often = Parts(tmp_path / "a.mp4", dict(steps=40), 1), Parts(tmp_path / "b.mp4", dict(steps=40), 1, every=3)
    for p in (parts, often):
        p.open()
    assert parts.due(10) and often.due(3) and not parts.due(3) and not often.due(10)
    for p in (parts, often):
        p.save("steps", dict(step=torch.tensor(10)))
    assert not parts.due(20) and often.due(21)
    clock[0] += 49.6
    assert parts.due(20)
    for p in (parts, often):
        p.close()


def test_what_is_safe_has_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(Ended), safely(tmp_path / "a.bin") as path:
        path.write_bytes(b"half")
        raise Ended
    assert left(tmp_path) == []
    with safely(tmp_path / "a.bin") as path:
        path.write_bytes(b"whole")
        assert left(tmp_path) == [path.name] != ["a.bin"]
    assert left(tmp_path) == ["a.bin"]


# ---------------------------------------------------------------------------------------------------------------- one writer, the disk

def test_one_writer(tmp_path):
    """Another process is named; a killed one is not in the way."""
    program = "import sys, time; from jobs import lock; lock.take(sys.argv[1]); print('has it', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path / "lock"], cwd=HERE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match=f"is in use by process {other.pid} on .* since 20..-..-.. ..:..:..: wait for it"):
        lock.take(tmp_path / "lock")
    other.kill()
    other.communicate()
    file = lock.take(tmp_path / "lock")
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):                # the same process, too
        lock.take(tmp_path / "lock")
    lock.give(file)
    lock.give(lock.take(tmp_path / "lock"))


def test_a_disk_without_locks_goes_by_the_text(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    host = lock.socket.gethostname()
    for text, free in (("", True), (f"process {os.getpid()} on {host} since then", False), (f"process 99999999 on {host} since then", True),
                       ("process 1 on another since then", False), ("\x1b[2Jnonsense", True)):
        (tmp_path / "lock").write_text(text)
        if free:
            lock.give(lock.take(tmp_path / "lock"))
            continue
        with pytest.raises(ValueError, match="is in use by process"):
            lock.take(tmp_path / "lock")


def test_two_first_uses_of_a_tiny_checkpoint_give_one(tmp_path, monkeypatch):
    written, write = [], random_weights.write_tiny
    monkeypatch.setattr(random_weights, "write_tiny", lambda *a: written.append(a) or write(*a))
    (tmp_path / ".tiny-t2v.killed").mkdir()
    threads = [threading.Thread(target=random_weights.ensure_tiny, args=(tmp_path / "tiny-t2v",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left(tmp_path) == ["tiny-t2v"] and len(written) == 1


@pytest.mark.parametrize("name, says", [("a" * 251 + ".mp4", "at most 246 bytes is wanted, this has 255"), ("ä" * 130 + ".mp4", "this has 264"),
                                        ("b" * 300 + "/", "this has 300")])
def test_names_that_are_too_long(tmp_path, name, says):
    with pytest.raises(ValueError, match=says):
        check_output(f"{tmp_path}/{name}")
    check_output(tmp_path / ("c" * 242 + ".mp4"))


def test_the_longest_name_is_long_enough(tmp_path):
    out = tmp_path / ("c" * 242 + ".mp4")
    with VideoWriter(out, (64, 64), parts=Parts(out, {}, 2)) as writer:
        writer.write(torch.zeros(3, 2, 64, 64))
        writer.renew_partial()
        assert left(tmp_path) == [f"{out.name}.parts", "c" * 242 + ".partial.mp4"]
    assert left(tmp_path) == [out.name]


def test_a_temporary_folder_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert run(tmp_path / "out.mp4") == 2
    assert f"cannot write into {tmp_path}/nowhere (No such file or directory): set TMPDIR to another folder" in capsys.readouterr().err


def test_room_is_asked_for_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wan_s2v, "encode_text", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**34, 2**34, 2**24 + 2**10))
    assert run(tmp_path / "out.mp4") == 2
    assert "MiB are free: make room" in capsys.readouterr().err and left(tmp_path) == []


@pytest.mark.parametrize("when", ["before", "meanwhile", "between"])
def test_what_can_be_watched_takes_nobody_elses_name(tmp_path, when):
    """A stream's frames that lie under it stay, whenever they came."""
    other, out = tmp_path / "a.partial.mp4", str(tmp_path / "a.mp4")

    def writer():
        return VideoWriter(out, (64, 64), parts=Parts(out, {}, total=3))
    def comes(now):
        if now == when:
            other.write_text("a stream's")
    comes("before")
    first = writer().__enter__()
    comes("meanwhile")
    first.write(torch.zeros(3, 4, 64, 64))
    if when == "between":                                            # killed before there was anything to watch
        first.parts.close()
        comes("between")
    else:
        first.renew_partial()
        first.leave()
        assert left(tmp_path) == ["a.mp4.parts", "a.partial.mp4", "a.partial1.mp4"]
    with writer() as again:
        assert again.parts.done == 1
        again.write(torch.zeros(3, 4, 64, 64))
        again.renew_partial()
        assert other.read_text() == "a stream's" and probe(tmp_path / "a.partial1.mp4").frames == 8
    assert left(tmp_path) == ["a.mp4", "a.partial.mp4"] and other.read_text() == "a stream's"


def test_an_output_that_is_no_plain_file_is_replaced(tmp_path):
    """As a named pipe: what can be watched before has a name of its own, and the video stays."""
    out = tmp_path / "a.mp4"
    os.mkfifo(out)
    with VideoWriter(str(out), (64, 64), parts=Parts(str(out), {}, total=3)) as writer:
        writer.write(torch.zeros(3, 4, 64, 64))
        writer.renew_partial()
        assert left(tmp_path) == ["a.mp4", "a.mp4.parts", "a.partial.mp4"]
    assert left(tmp_path) == ["a.mp4"] and probe(out).frames == 4


def test_nothing_to_watch_is_left_where_it_cannot_be_noted(tmp_path, monkeypatch):
    out = str(tmp_path / "a.mp4")
    writer = VideoWriter(out, (64, 64), parts=Parts(out, {}, total=3)).__enter__()
    writer.write(torch.zeros(3, 4, 64, 64))
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "commit", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            writer.renew_partial()
    assert left(tmp_path) == ["a.mp4.parts"]
    writer.leave()
    assert left(tmp_path) == ["a.mp4.parts", "a.partial.mp4"]


def test_a_folder_that_goes_away_meanwhile(tmp_path, monkeypatch, capsys, unbroken):
    """Renamed after the first clip: one line; in its new place the same goes on."""
    (tmp_path / "a").mkdir()
    make_clips = wan_s2v.make_clips

    def rename_after_one(*arguments):
        for n, frames in enumerate(make_clips(*arguments)):
            if n == 1:
                (tmp_path / "a").rename(tmp_path / "b")
            yield frames
    monkeypatch.setattr(wan_s2v, "make_clips", rename_after_one)
    assert run(tmp_path / "a" / "out.mp4") == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].endswith(f"out.mp4: {tmp_path}/a/out.mp4.parts has gone: put it back, then the same command goes on"), err
    monkeypatch.setattr(wan_s2v, "make_clips", make_clips)
    assert run(tmp_path / "b" / "out.mp4") == 0 and "going on after clip 1 of 2" in capsys.readouterr().out
    assert (tmp_path / "b" / "out.mp4").read_bytes() == unbroken


# ---------------------------------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_during_the_imports_is_no_traceback(number, status):
    for after in (0, 0.5):
        process = subprocess.Popen([sys.executable, "sample.py", "--audio", VOICE, "--image", FACE, "--out", "/nowhere/out.mp4"], cwd=HERE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=kill_runs.as_from_a_shell)
        while not int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16) & 1:
            time.sleep(0.01)                                         # the interpreter itself is not there yet
        time.sleep(after)
        process.send_signal(number)
        err = process.communicate(timeout=30)[1]
        assert process.returncode == status and err == b"stopped\n", (process.returncode, err)


def test_a_signal_that_is_ignored_stays_so():
    """As nohup wants it."""
    program = ("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from jobs import stop; stop.watch(); "
               "signal.raise_signal(signal.SIGHUP); print('goes on')")
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True).stdout == "goes on\n"


@pytest.mark.parametrize("signals, grace, status, inside", [(1, 60, 0, "finish_first"), (2, 60, 130, "finish_first"), (1, 0.3, 130, "finish_first"),
                                                            (1, 60, 0, "begin")])
def test_a_call_that_cannot_be_interrupted(signals, grace, status, inside):
    """A second signal, or time, ends the process from another thread, though it sees the first before Python does; a block worth finishing is
    finished after one, another block is not."""
    program = f"""
import contextlib, hashlib, os, signal, sys, threading, time
from jobs import stop
stop.GRACE = {grace}
stop.watch()
stop.working = True
def send():
    for _ in range({signals}):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=send, daemon=True).start()
try:
    with (stop.finish_first if "{inside}" == "finish_first" else contextlib.nullcontext)():
        end = time.monotonic() + 1
        while time.monotonic() < end:
            hashlib.pbkdf2_hmac("sha256", b"a", b"a", 500000)          # C, without Python's lock, which no signal ends
        print("finished", flush=True)
except stop.Stopped:
    os._exit(0)
os._exit(7)                                                          # the signal is forgotten
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, timeout=30)
    finished = status == 0 and inside == "finish_first"
    assert done.returncode == status and (done.stdout == "finished\n") == finished and "Traceback" not in done.stderr, done


def test_ffmpeg_ends_with_its_parent():
    """Killed alone, in the middle of a coding that would take minutes."""
    program = ("import os, subprocess; from media.ffmpeg import ffmpeg_command; "
               "p = subprocess.Popen(ffmpeg_command('-v', 'error', '-f', 'lavfi', '-i', 'testsrc=s=1280x720:d=3600', '-f', 'null', '-')); "
               "print(p.pid, flush=True); os.kill(os.getpid(), 9)")            # before it has begun, or after
    child = int(subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True).stdout)
    for _ in range(100):
        try:
            if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
                break
        except OSError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("it goes on")
    assert ffmpeg_command("-x")[-2:] == ["-nostdin", "-x"]


def test_killed_runs(tmp_path, monkeypatch):
    """The short form of kill_runs.py, but for the start of Python: its group killed. Ctrl-C has tests of its own above."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(kill_runs, "CLIPS", 3)
    monkeypatch.setattr(kill_runs, "COMMAND", kill_runs.COMMAND + kill_runs.quick())
    monkeypatch.setattr(kill_runs, "start", lambda out: stoppable([*kill_runs.COMMAND[2:], "--clips", "3", "--out", str(out)],
                                                                  [out.with_suffix(".log")] * 2))
    (tmp_path / "unbroken").mkdir()
    begin = time.monotonic()
    assert sample.cli([*kill_runs.COMMAND[2:], "--clips", "3", "--out", str(tmp_path / "unbroken" / "out.mp4")]) == 0
    length, wanted = time.monotonic() - begin, kill_runs.digest(tmp_path / "unbroken" / "out.mp4")
    (folder := tmp_path / "run").mkdir()
    process = kill_runs.started(folder / "out.mp4", random.Random(0), length)
    wrong, _, _ = kill_runs.one_run(folder, "kill -9 of the group", process, 0.1, wanted)
    assert not wrong, wrong
