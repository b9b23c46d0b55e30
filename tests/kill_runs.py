"""Runs of 6 clips on the tiny checkpoint, each ended at a random moment and run again until done.

    python tests/kill_runs.py --runs 100            the six ways to end a process in turn; about 20 s a run on 2 CPU cores
    python tests/kill_runs.py --runs 20 --full-disk     as root: the disk (a small tmpfs) is filled at a random moment, then there is room again

Of every run is asked, and a line printed if it is not so: no clip lost that was finished when the end came; the same bytes as the unbroken
run; nothing beside the mp4; no process left 10 s after the end; the exit status. tests/test_parts.py runs a short form.
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
CLIPS, LIMIT = 6, 300
COMMAND = [sys.executable, "sample.py", "--audio", "samples/voice.flac", "--image", "samples/face.png", "--size", "64x64", "--clip-frames", "4",
           "--steps", "2", "--save-every", "1"]
WAYS = {"kill -9": None, "kill -9 of the group": None, "SIGTERM": 143, "SIGHUP": 129, "Ctrl-C": 130, "Ctrl-C twice": 130}      # and the exit status


def quick():
    """-> options: random numbers with a small VAE, as what takes time is not what is tested"""
    from tiny import random_weights
    return ["--ckpt", str(random_weights.ensure_tiny(HERE / "weights" / "tiny-quick"))]


def as_from_a_shell():
    """Signals that nohup or a background job ignores are not, whoever runs this."""
    for which in (signal.SIGINT, signal.SIGHUP):
        signal.signal(which, signal.SIG_DFL)


def start(out):
    """In a process group of its own, as a shell does it."""
    log = open(out.with_suffix(".log"), "ab")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, "--clips", str(CLIPS), "--out", out], cwd=HERE, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                            start_new_session=True, preexec_fn=as_from_a_shell)


def end(process, way, pause):
    """Ctrl-C is a signal to all of the group, as the terminal sends it."""
    one = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}.get(way)
    if one:
        os.kill(process.pid, one)
    elif way == "kill -9 of the group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGINT)
        if way == "Ctrl-C twice":
            time.sleep(pause)
            os.killpg(process.pid, signal.SIGINT)


def living(folder):
    """Processes that name a folder in their command line, or stand in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes() or os.readlink(entry / "cwd").startswith(str(folder)):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            pass
    return found


def finished(out):
    """Clips that the manifest names."""
    try:
        return len(json.loads((Path(f"{out}.parts") / "manifest.json").read_text())["clips"])
    except OSError:
        return 0


def seen(out):
    """Clips that were finished for someone who looks on: all before the last bar that appeared since the last command began."""
    bars = re.findall(rb"clip (\d+)/", out.with_suffix(".log").read_bytes())
    return int(bars[-1]) - 1 if bars else 0


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def started(out, chance, length):
    """A process at a random moment: one in three before its first clip is finished, the others some time after a clip."""
    while True:
        process, begin = start(out), time.monotonic()
        wanted, pause = (0, chance.random() * length / 3) if chance.random() < 1 / 3 else (chance.randrange(CLIPS), chance.random() * length / CLIPS)
        while process.poll() is None and finished(out) < wanted:
            time.sleep(0.01)
        try:
            process.wait(pause)
        except subprocess.TimeoutExpired:
            return process
        length = time.monotonic() - begin                            # it was faster: once more
        out.unlink()


def one_run(folder, way, process, pause, wanted):
    """-> what was wrong, in lines; seconds from the signal to the end; clips that were finished then"""
    out, wrong = folder / "out.mp4", []
    begin = time.monotonic()
    end(process, way, pause)
    status = process.wait(LIMIT)
    took = time.monotonic() - begin
    while (left := living(folder)) and time.monotonic() < begin + 10:
        time.sleep(0.02)
    if left or took > 10:
        wrong.append(f"{took:.1f} s after {way} there is {left}")
    too_early = status < 0 and not out.with_suffix(".log").stat().st_size          # before the interpreter itself was there
    if WAYS[way] and status != WAYS[way] and not (status == 0 and out.exists()) and not too_early:
        wrong.append(f"{way} gave status {status}")
    clips, whole = finished(out), out.exists()
    if not whole and clips < seen(out):
        wrong.append(f"{seen(out)} clips were finished, {clips} are kept")
    if b"Traceback" in out.with_suffix(".log").read_bytes():
        wrong.append("a traceback")
    again(out, clips, whole, wrong)
    check(folder, out, wanted, wrong)
    return wrong, took, clips


def again(out, clips, whole, wrong):
    """The same command until it is done, at most three times; it goes on where the first was."""
    for _ in range(3):
        before = out.with_suffix(".log").stat().st_size
        if (status := start(out).wait(LIMIT)) == 0:
            break
        wrong.append(f"run again: status {status}")
    said = out.with_suffix(".log").read_bytes()[before:]
    if clips and not whole and f"going on after clip {clips} of {CLIPS}".encode() not in said:
        wrong.append(f"did not go on after clip {clips}")


def check(folder, out, wanted, wrong):
    if not out.exists() or digest(out) != wanted:
        wrong.append("another video")
    shutil.move(out.with_suffix(".log"), folder.parent / f"{folder.name}.log")
    if rest := sorted(path.name for path in folder.iterdir() if path != out):
        wrong.append(f"left over: {rest}")


def full_disk(folder, chance, length, wanted):
    """A tmpfs of 48 MB that a file fills up at a moment; as one_run."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=True)
    try:
        out, wrong = folder / "out.mp4", []
        process = started(out, chance, length)
        filler = folder / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**12))
            except OSError:
                pass
        status, clips = process.wait(LIMIT), finished(out)
        log = out.with_suffix(".log")
        filler.unlink()
        if status not in (0, 2):
            wrong.append(f"status {status}")
        if not out.exists() and clips < seen(out):
            wrong.append(f"{seen(out)} clips were finished, {clips} are kept")
        if b"Traceback" in log.read_bytes():
            wrong.append("a traceback")
        again(out, clips, out.exists(), wrong)
        check(folder, out, wanted, wrong)
        return wrong, 0.0, clips
    finally:
        subprocess.run(["umount", folder], check=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--full-disk", action="store_true")
    p.add_argument("--fast", action="store_true", help="a checkpoint of random numbers with a small VAE: a third of the time")
    args = p.parse_args()
    chance, bad, took, counts = random.Random(args.seed), 0, [], []
    with tempfile.TemporaryDirectory() as base:
        if args.fast:
            COMMAND.extend(quick())
        begin = time.monotonic()
        (reference := Path(base) / "unbroken").mkdir()
        assert start(reference / "out.mp4").wait(LIMIT) == 0, (reference / "out.log").read_text()
        length, wanted = time.monotonic() - begin, digest(reference / "out.mp4")
        print(f"unbroken: {length:.1f} s")
        for n in range(args.runs):
            (folder := Path(base) / f"run{n:03d}").mkdir()
            way, pause = list(WAYS)[n % len(WAYS)], chance.choice((0.01, 0.1, 0.5, 1.5))
            if args.full_disk:
                way, (wrong, seconds, clips) = "full disk", full_disk(folder, chance, length, wanted)
            else:
                process = started(folder / "out.mp4", chance, length)
                wrong, seconds, clips = one_run(folder, way, process, pause, wanted)
            bad, took, counts = bad + bool(wrong), [*took, seconds], [*counts, clips]
            print(f"{n + 1:3} {way:20}: {clips} clips finished, ended after {seconds:.2f} s {'; '.join(wrong)}",
                  flush=True)
            if wrong:
                print((Path(base) / f"{folder.name}.log").read_text(errors="replace")[-3000:], flush=True)
    print(f"{args.runs} runs: {bad} bad; {sum(counts)} clips were finished when the end came; it took at most {max(took):.2f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
