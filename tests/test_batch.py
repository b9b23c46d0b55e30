"""Batches: what a file or a folder asks for, bad jobs among good ones, runs that are killed and go on, and the same from Python.

    pytest tests/test_batch.py
"""
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
from ranks import stoppable

import sample
from formats.checkpoints import Checkpoint
from jobs import lock, stop
from jobs.batch import Summary, looks_like, make_many, run_batch
from jobs.explain import explain
from media.ffmpeg import probe, run
from tests import kill_runs
from wan_s2v import WanS2VPipeline

HERE = Path(__file__).parents[1]
VOICE, FACE = str(HERE / "samples" / "voice.flac"), str(HERE / "samples" / "face.png")
QUICK = ["--steps", "1", "--size", "64x64", "--clip-frames", "8", "--clips", "1", *kill_runs.quick()]


def sounds(folder, *names):
    """Half seconds of a voice, all different."""
    folder.mkdir(exist_ok=True)
    voice, rate = soundfile.read(VOICE)
    for n, name in enumerate(names):
        soundfile.write(folder / name, voice[12000 + 4000 * n:20000 + 4000 * n], rate)


def write_jobs(path, jobs):
    path.write_text("\n".join(job if isinstance(job, str) else json.dumps(job) for job in jobs) + "\n")
    return ["--batch", str(path), "--image", FACE, *QUICK]


def summary(path):
    return json.loads(path.read_text())


def states(path):
    return [job["state"] for job in summary(path)["jobs"]]


@pytest.fixture
def made(monkeypatch):
    """Videos are stubs that name what they were made from; the list of their outputs in order."""
    outs = []

    def make_video(pipeline, args):
        outs.append(os.path.basename(args.out))
        Path(args.out).parent.mkdir(exist_ok=True)
        Path(args.out).write_text(f"{args.audio} {args.image} seed {args.seed} guidance {args.guidance} {args.start_from_ref}")
    monkeypatch.setattr(sample, "make_video", make_video)
    return outs


@pytest.mark.parametrize("killed", [False, True])
def test_jobs_spread_over_ranks(tmp_path, made, killed):
    """Rank 1 keeps a summary of what it makes; rank 0 makes one of both, or finds it after a run that was killed."""
    sounds(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav", "e.wav")
    command, log = write_jobs(tmp_path / "jobs", [dict(audio=f"{name}.wav") for name in "abcde"]), tmp_path / "jobs.summary.json"
    for rank in (1, 0):
        args = sample.parser().parse_args(command)
        args.world = SimpleNamespace(rank=rank, takes=lambda job: killed and rank == 0 or job.number % 2 == rank, all_have=lambda what: None)
        if rank or not killed:
            assert run_batch(args, sample) == 0
            assert len(made) == (3 if rank else 5) and log.with_suffix(".1.json").exists() == bool(rank)
        else:
            assert sample.cli(command) == 0 and states(log).count("done before") == 3 and not log.with_suffix(".1.json").exists()
    assert sorted(made) == [f"{name}.mp4" for name in "abcde"] and all(state.startswith("done") for state in states(log))


@pytest.mark.parametrize("killed", [False, True])
def test_a_rank_speaks_of_its_own_jobs(tmp_path, made, killed):
    """All made anew by two ranks: what rank 1 knows of the others is of the run before."""
    sounds(tmp_path, "a.wav", "b.wav", "c.wav")
    command = write_jobs(tmp_path / "jobs", [dict(audio=f"{name}.wav") for name in "abc"])
    assert sample.cli(command) == 0
    for rank in (1, 0):
        args = sample.parser().parse_args([*command, "--seed", "5", "--restart"])
        args.world = SimpleNamespace(rank=rank, takes=lambda job: job.number % 2 == rank, all_have=lambda what: None)
        if rank or not killed:
            assert run_batch(args, sample) == 0
        else:                                                        # rank 0 was killed before it made its own
            assert sample.cli([*command, "--seed", "5", "--restart"]) == 0
    before = made.copy()
    assert sample.cli([*command, "--seed", "5"]) == 0 and made == before and len(made) == 6


# ------------------------------------------------------------------------------------------------------------- killed and run again

def run_until(command, before, log, how):
    """Start a batch of which so many jobs are done, and send a signal while the second of the others is made -> exit status."""
    process = stoppable(command)
    wanted = {"done before": before, "done": 1, "running": 1}
    while process.poll() is None and not (log.exists() and {name: states(log).count(name) for name in wanted} == wanted):
        time.sleep(0.02)
    os.kill(process.pid, how)
    return process.wait(60)


def test_killed_twice_and_run_again(tmp_path, capsys):
    """8 jobs, 3 of them bad; kill -9, then Ctrl-C, then the same once more: 5 videos, each made once, as alone; the summary names the three."""
    sounds(tmp_path, *(f"{n}.wav" for n in range(5)))
    jobs = [{"audio": f"{n}.wav", "seed": n} for n in range(5)]
    (tmp_path / "text.wav").write_text("no sound\n" * 99)
    for at, bad in ((2, {"audio": "text.wav"}), (5, {"audio": "missing.wav"}), (7, {"audio": "1.wav", "out": "wrong.mp4", "solver": "rk4"})):
        jobs.insert(at, bad)
    command, log = write_jobs(tmp_path / "jobs.jsonl", jobs), tmp_path / "jobs.jsonl.summary.json"
    seen = {}
    for before, how, status in ((0, signal.SIGKILL, -signal.SIGKILL), (1, signal.SIGINT, 130)):
        assert run_until(command, before, log, how) == status
        seen |= {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("?.mp4")}
    assert states(log).count("stopped") == 1 and states(log).count("waiting") == 2 and len(seen) == 2
    capsys.readouterr()
    assert sample.cli(command) == 2
    text, found = capsys.readouterr(), summary(log)
    assert (found["done"], found["failed"], found["left"]) == (5, 3, 0)
    assert [job["job"] for job in found["jobs"] if job["error"]] == [3, 6, 8]
    for words in ("job 3, text.wav: ", "job 6, missing.wav: ", "job 8, 1.wav: "):
        assert text.err.count(f"error: {words}") == 1
    assert "batch    5 of 8 done, 3 failed" in text.out and text.out.count(" failed      ") == 3
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == [f"{n}.mp4" for n in range(5)]
    assert all((path.stat().st_mtime_ns, path.read_bytes()) == before for path, before in seen.items())
    assert all(probe(path, count=False).has_audio for path in tmp_path.glob("*.mp4"))
    last = next(path for path in sorted(tmp_path.glob("*.mp4"), reverse=True))
    for path in (min(seen), last):                                   # made before the kill, and after it
        alone = ["--audio", str(path.with_suffix(".wav")), "--seed", path.stem, "--image", FACE, *QUICK]
        assert sample.cli([*alone, "--out", str(tmp_path / "alone.mp4")]) == 0
        assert (tmp_path / "alone.mp4").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("size, frames, same", [("64x64", 4, True), ("32x64", 4, False), ("64x64", 200, False), (None, 0, False)])
def test_killed_before_it_was_noted(tmp_path, made, size, frames, same, capsys):
    """The video has its name, the summary does not know yet: it is finished, and not made again. Something else that lies there is not taken for it."""
    sounds(tmp_path, "a.wav")
    command, log, out = write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}]), tmp_path / "jobs.summary.json", tmp_path / "a.mp4"
    assert sample.cli(command) == 0
    record = summary(log)
    del record["made"]["a.mp4"]["after"]
    log.write_text(json.dumps(record))
    if size:
        run("-f", "lavfi", "-i", f"color=size={size}:rate=16", "-frames:v", str(frames), "-y", str(out))
    assert sample.cli(command) == (0 if same else 2) and made == ["a.mp4"] and states(log) == ["done before" if same else "failed"]
    assert same or f"{out} was changed since" in capsys.readouterr().err
    os.remove(out)
    assert sample.cli(command) == 0 and made == ["a.mp4"] * 2


@pytest.mark.parametrize("ends", [KeyboardInterrupt, OSError("no room")])
def test_a_job_that_was_not_made_owns_nothing(tmp_path, made, monkeypatch, capsys, ends):
    """Stopped or failed; then somebody else's file lies there."""
    sounds(tmp_path, "a.wav", "b.wav")
    command, out = write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}, {"audio": "b.wav"}]), tmp_path / "a.mp4"
    make = sample.make_video

    def fail(pipeline, args):
        raise ends
    for job in ("first", "again"):                                   # again: what an earlier run has made is not forgotten
        monkeypatch.setattr(sample, "make_video", fail)
        assert sample.cli([*command, *(["--seed", "7"] if job == "again" else []), "--restart"]) in (130, 2)
        if job == "first":
            out.write_text("somebody else's")
            monkeypatch.setattr(sample, "make_video", make)
            assert sample.cli(command) == 2 and made == ["b.mp4"] and out.read_text() == "somebody else's"
            assert f"{out} is there already and not made by this batch" in capsys.readouterr().err
            assert sample.cli([*command, "--restart"]) == 0 and sorted(made) == ["a.mp4", "b.mp4", "b.mp4"][:len(made)]
        else:
            before = made.copy()
            monkeypatch.setattr(sample, "make_video", make)
            assert sample.cli(command) == 0 and made == before


def test_a_disk_that_is_full_is_named(tmp_path, made, monkeypatch, capsys):
    """What became of each job is printed all the same."""
    sounds(tmp_path, "a.wav", "b.wav")
    command = write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}, {"audio": "b.wav"}])
    write_text = Path.write_text

    def write(path, *text, **how):
        if made:
            raise OSError(28, "No space left on device")
        return write_text(path, *text, **how)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        patch.setattr(sample, "make_video", lambda pipeline, args: made.append(args.out))
        assert sample.cli(command) == 2
    said = capsys.readouterr()
    assert f"error: cannot write {tmp_path}/jobs.summary.json, which says what is done (No space left on device): once it can" in said.err
    assert "batch    1 of 2 done" in said.out and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("names, same", [(["000000.png", "000001.png"], True), (["notes.txt"], False), (["000000.png", "notes.txt"], False),
                                         ([f"{n:06d}.png" for n in range(9)], False)])
def test_a_folder_of_frames_is_known_by_their_names(tmp_path, names, same):
    for name in names:
        (tmp_path / name).touch()
    assert looks_like(tmp_path, SimpleNamespace(frames=5)) is same


def test_a_video_that_has_its_name_when_the_signal_comes_is_kept(tmp_path, made, monkeypatch):
    """It is finished: the next run finds it."""
    def make_and_stop(pipeline, args):
        run("-f", "lavfi", "-i", "color=size=64x64:rate=16", "-frames:v", "4", "-y", args.out)
        raise KeyboardInterrupt
    sounds(tmp_path, "a.wav")
    command = write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}])
    with monkeypatch.context() as patch:
        patch.setattr(sample, "make_video", make_and_stop)
        assert sample.cli(command) == 130 and states(tmp_path / "jobs.summary.json") == ["stopped"]
    assert sample.cli(command) == 0 and made == [] and states(tmp_path / "jobs.summary.json") == ["done before"]


def test_what_two_sounds_of_a_folder_can_do(tmp_path, made, capsys):
    sounds(tmp_path / "in", "a.wav", "a.flac")
    assert sample.cli(["--batch", str(tmp_path / "in"), "--image", FACE, *QUICK]) == 2
    assert "is written by job 1 already: rename one of the sounds" in capsys.readouterr().err and made == ["a.mp4"]


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        lock.take(tmp_path / "lock")
    assert not os.listdir(tmp_path)


def test_a_picture_that_may_not_be_read(monkeypatch, capsys, tmp_path):
    """Saving it again as PNG would not help."""
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr("PIL.Image.open", refuse)
    assert sample.cli(["--audio", VOICE, "--image", FACE, "--out", str(tmp_path / "a.mp4"), *QUICK]) == 2
    assert f"error: cannot read or write {FACE}: Permission denied" in capsys.readouterr().err


def test_a_signal_ends_a_batch_from_python(monkeypatch):
    """It may show itself as an error of what it has ended."""
    def pipeline(**_):
        monkeypatch.setattr(stop, "number", 2)
        raise OSError("ffmpeg has gone")
    with pytest.raises(OSError, match="ffmpeg has gone"):
        make_many(pipeline, [dict(out="a.mp4"), dict(out="b.mp4")])


def test_errors_of_the_system_name_their_file():
    assert explain(PermissionError(13, "Permission denied", "/x/y"), None) == "cannot read or write /x/y: Permission denied"
    assert "Connection refused" in explain(ConnectionRefusedError(111, "Connection refused"), None)
    assert explain(OSError("cannot write a: make room"), None) == "cannot write a: make room"


@pytest.mark.parametrize("data", [b"fLaC\0\0\0\x22" * 9, '{"audio": "a.wav"}'.encode("utf16")])
def test_a_batch_that_is_no_text(tmp_path, data, capsys):
    (tmp_path / "jobs").write_bytes(data)
    assert sample.cli(["--batch", str(tmp_path / "jobs"), "--image", FACE, *QUICK]) == 2
    assert "error: wanted a text file with a job a line, in UTF-8, got" in capsys.readouterr().err and os.listdir(tmp_path) == ["jobs"]


def test_ctrl_c_while_the_summary_is_written(tmp_path, made, monkeypatch):
    """The job that has just been noted as running is stopped; one that is finished stays done."""
    sounds(tmp_path, "a.wav", "b.wav")
    command, log = write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}, {"audio": "b.wav"}]), tmp_path / "jobs.summary.json"
    write = Summary.write
    for wanted, after in ((["running", "waiting"], ["stopped", "waiting"]), (["done", "waiting"],) * 2):
        def write_and_stop(self):
            write(self)
            if [job.state for job in self.jobs] == wanted and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt
        stopped = []
        monkeypatch.setattr(Summary, "write", write_and_stop)
        assert sample.cli(command) == 130 and states(log) == after
    monkeypatch.setattr(Summary, "write", write)
    assert sample.cli(command) == 0 and made == ["a.mp4", "b.mp4"] and states(log) == ["done before", "done"]


# ------------------------------------------------------------------------------------------------------------- what is asked for

def test_options_of_jobs_come_before_those_of_the_command(tmp_path, monkeypatch, made):
    sounds(tmp_path / "jobs", "a.wav", "b.wav")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copy(FACE, tmp_path / "jobs" / "other.png")
    command = write_jobs(tmp_path / "jobs" / "list", [{"audio": "a.wav", "seed": 3, "guidance": "2,3", "start-from-ref": False}, "",
                                                      {"audio": "b.wav", "image": "other.png", "out": "sub/c.mp4", "start_from_ref": None}])
    assert sample.cli([*command, "--seed", "5", "--start-from-ref"]) == 0
    assert (tmp_path / "jobs" / "a.mp4").read_text() == f"{tmp_path}/jobs/a.wav {FACE} seed 3 guidance (2.0, 3.0) False"
    assert (tmp_path / "jobs" / "sub" / "c.mp4").read_text() == f"{tmp_path}/jobs/b.wav {tmp_path}/jobs/other.png seed 5 guidance None True"


def test_a_folder_of_sounds_and_one_of_pictures(tmp_path, made, capsys):
    sounds(tmp_path / "in", "a.wav", "b.flac", "c.wav")
    (tmp_path / "faces").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(FACE, tmp_path / "faces" / name)
    command = ["--batch", str(tmp_path / "in"), "--out", f"{tmp_path}/out/", *QUICK]
    assert sample.cli([*command, "--image", str(tmp_path / "faces")]) == 2
    assert made == ["a.mp4", "b.mp4"] and states(tmp_path / "in" / "batch.json") == ["done", "done", "failed"]
    assert (tmp_path / "out" / "b.mp4").read_text().startswith(f"{tmp_path}/in/b.flac {tmp_path}/faces/b.png ")
    assert f"error: job 3, c.wav: wanted one picture c.* in {tmp_path}/faces, there are 0" in capsys.readouterr().err
    shutil.copy(FACE, tmp_path / "faces" / "c.png")
    assert sample.cli([*command, "--image", str(tmp_path / "faces")]) == 0 and made == ["a.mp4", "b.mp4", "c.mp4"]


BAD = [
    ("{", "no JSON"), ("[3]", "no object in braces"), ("[" * 9999, "no JSON"), ({"audio": "a.wav", "sede": 3}, 'did you mean "seed"?'),
    ({"audio": "a.wav", "seed": True}, '"seed" wants a number or a text'), ({"audio": "a.wav", "seed": "x"}, "argument --seed: invalid int value"),
    ({"audio": "a.wav", "official": 1}, '"official" wants true or false, got 1'), ({"audio": "a.wav", "batch": "x"}, "is no option of a job"),
    ({"audio": "a.wav", "live": True}, '"live" is no option of a job: a batch makes no streams'), ({"audio": "a.wav", "fps": 20}, "--fps goes with --live"),
    ({"audio": ["a.wav"]}, "a number or a text"), ({"audio": "a.wav", "size": [64, 64]}, '"size" wants a number or a text'),
    ({"audio": "b.wav", "ckpt": "nowhere"}, "no checkpoint folder nowhere"), ({"audio": "b.wav", "out": "b.gif"}, "wanted a name that ends in"),
    ({"audio": "b.wav", "out": "./a.mp4"}, "is written by job 1 already"), ({"audio": "b.wav", "out": "b.wav"}, "is read by job "),
    ({"audio": "b.wav", "out": "film.mp4"}, "is there already and not made by this batch"), ({"audio": "a\0.wav"}, "null")]


def test_a_bad_job_has_one_line_and_the_others_go_on(tmp_path, made, capsys):
    sounds(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "film.mp4").write_text("precious")
    assert sample.cli(write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}, *(job for job, _ in BAD), {"audio": "c.wav"}])) == 2
    lines = sorted(capsys.readouterr().err.splitlines(), key=lambda line: int(re.match(r"error: job (\d+), ", line)[1]))
    for n, ((job, words), line) in enumerate(zip(BAD, lines, strict=True), 2):
        assert line.startswith(f"error: job {n}, ") and words in line, (job, line)
    assert made == ["a.mp4", "c.mp4"] and states(tmp_path / "jobs.summary.json") == ["done", *["failed"] * len(BAD), "done"]
    assert (tmp_path / "film.mp4").read_text() == "precious"


def test_a_batch_that_is_none(tmp_path, made, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text("\n\n")
    sounds(tmp_path, "a.wav")
    command = write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}])
    for arguments, words in ((["--batch", "nowhere"], "which is neither"), (["--batch", str(tmp_path / "empty")], "holds no job: wanted sounds"),
                             (["--batch", str(tmp_path / "blank")], "holds no job"), ([*command, "--out", "a.mp4"], "end it in /")):
        assert sample.cli(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0], lines
    (tmp_path / "jobs.summary.json").write_text('{"made": 3}')
    assert sample.cli(command) == 2 and "is no summary of a batch" in capsys.readouterr().err and not made


def test_what_was_made_from_something_else_is_not_written_over(tmp_path, made, capsys):
    """Another seed, another sound under the same name: refused with what differs; --restart makes those again and only those."""
    sounds(tmp_path, "a.wav", "b.wav", "c.wav")
    jobs = [{"audio": "a.wav"}, {"audio": "b.wav"}, {"audio": "c.wav"}]
    assert sample.cli(write_jobs(tmp_path / "jobs", jobs)) == 0
    shutil.copy(tmp_path / "c.wav", tmp_path / "b.wav")
    command = write_jobs(tmp_path / "jobs", [{"audio": "a.wav", "seed": 7}, *jobs[1:]])
    capsys.readouterr()
    assert sample.cli(command) == 2 and len(made) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert "seed 42, now 7" in first and "another audio" in second and "--restart" in first
    for _ in range(2):
        assert sample.cli([*command, "--restart"]) == 0 and made[3:] == ["a.mp4", "b.mp4"]
    assert sample.cli(command) == 0 and len(made) == 5


def test_jobs_of_a_checkpoint_are_made_together(tmp_path, made, monkeypatch):
    """And the networks of the one leave before the other's come."""
    sounds(tmp_path, *(f"{n}.wav" for n in range(4)))
    (tmp_path / "other").symlink_to(HERE / "weights" / "tiny")
    kept, make_video = {}, sample.make_video

    def watch(pipeline, args):
        kept[id(pipeline)] = pipeline.networks.kept
        assert all(networks is pipeline.networks.kept or not networks for networks in kept.values())
        pipeline.networks.kept["text"] = None
        make_video(pipeline, args)
    monkeypatch.setattr(sample, "make_video", watch)
    jobs = [{"audio": f"{n}.wav"} | ({"ckpt": "other"} if n % 2 else {}) for n in range(4)]
    assert sample.cli(write_jobs(tmp_path / "jobs", jobs)) == 0
    assert made == ["0.mp4", "2.mp4", "1.mp4", "3.mp4"] and len(kept) == 2


def test_networks_of_a_batch_are_loaded_once(tmp_path, monkeypatch, capsys):
    """And every job says what it is and how long all of them will take."""
    loaded, load = [], Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, name, *how: loaded.append(name) or load(self, name, *how))
    sounds(tmp_path, "a.wav", "b.wav")
    assert sample.cli(write_jobs(tmp_path / "jobs", [{"audio": "a.wav"}, {"audio": "b.wav"}])) == 0
    assert sorted(loaded) == ["audio", "denoiser_high", "text", "vae"]          # one step: one expert
    lines = re.findall(r"^job .*", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 2 and re.fullmatch(r"job 2/2  b\.wav -> \S+/b\.mp4, about \d\d:\d\d left for all", lines[1]), lines


# ------------------------------------------------------------------------------------------------------------- from Python

def test_batch_from_python(tmp_path):
    """Per job its file or its error; a name is free again if its job has failed."""
    pipeline = WanS2VPipeline.from_pretrained(device_map="cpu")
    job = dict(audio_path=VOICE, image_path=FACE, height=64, width=64, num_inference_steps=1, clip_frames=16, clips=1, quiet=True)
    one, two = str(tmp_path / "one.mp4"), str(tmp_path / "two.mp4")
    results = pipeline.batch([job | dict(out=one), job | dict(out=two, audio_path="no.wav"), job | dict(out=f"{tmp_path}/./one.mp4"), job,
                              job | dict(out=two, sede=3), job | dict(out=two, prompt=None), "two.mp4", job | dict(out=two)])
    assert results[0] == one and [type(result) for result in results[1:7]] == [ValueError, ValueError, ValueError, TypeError, ValueError, ValueError]
    for result, words in zip(results[1:7], ("no.wav", "an out of its own", "an out of its own", "did you mean seed", "prompt", "a dict of arguments")):
        assert words in str(result) and result.__traceback__ is None
    assert probe(one).frames == 13 and os.path.isfile(results[7])
