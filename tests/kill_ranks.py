"""Rank 1 of two is killed at a random moment of a run of 4 clips on a tiny checkpoint, again and again.

    python tests/kill_ranks.py --runs 10            about 15 s a run on 2 CPU cores

Of every run is asked, and a line printed if it is not so: all end within 60 s, with a status that is not 0 and one line that names rank 1, of
torchrun itself if the ranks did not know each other yet; no process is left; no clip is lost that was finished, and each is that of the unbroken run.
"""
import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from kill_runs import finished
from test_parallel import TWO, processes, torchrun

CLIPS = 4


def start(folder):
    return torchrun(folder, 2, *TWO, "--clips", str(CLIPS), "--keep-parts", "--out", str(folder / "out.mp4"))


def one_run(folder, pause, wanted):
    """-> what was wrong; seconds from the kill to the end; clips finished; the line"""
    running, wrong = start(folder), []
    time.sleep(pause)
    while not (ranks := processes(running.pid)).get(1) and running.poll() is None:
        time.sleep(0.02)
    begin = time.monotonic()
    if running.poll() is None:
        os.kill(ranks[1], signal.SIGKILL)
    try:
        status = running.wait(60)
    except subprocess.TimeoutExpired:
        status, wrong = running.kill(), ["it goes on"]
    took, errors = time.monotonic() - begin, (folder / "errors").read_text()
    lines = [line for line in re.split("[\r\n]", errors) if line.startswith("error")]
    seen, clips = max([0, *(int(bar) - 1 for bar in re.findall(r"clip (\d+)/", errors))]), finished(folder / "out.mp4")
    if "wrote  " in (folder / "said").read_text():
        return wrong, took, clips, "the video was written before"
    if not lines and "video  " not in (folder / "said").read_text():             # while PyTorch is imported: they do not know each other
        lines = re.findall(r"failed \(exitcode: -9\) local_rank: 1 .*", errors)
    elif len(lines) != 1 or not lines[0].startswith("error: rank 1: "):
        wrong += [f"said {lines}"]
    wrong += [f"status {status}"] * (not status) + ["no one is named"] * (not lines)
    wrong += [f"left {pid}" for pid in ranks.values() if Path(f"/proc/{pid}").exists()]
    wrong += [f"{seen} clips were seen, {clips} are kept"] * (clips < seen)
    parts = sorted(path for path in (folder / "out.mp4.parts").glob("[0-9]*.mp4"))[:clips]
    wrong += [f"{path.name} is another" for path in parts if path.read_bytes() != wanted[path.name]]
    return wrong, took, clips, lines[0] if lines else "no line"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    chance, bad, longest = random.Random(args.seed), 0, 0.0
    with tempfile.TemporaryDirectory() as base:
        (whole := Path(base) / "unbroken").mkdir()
        begin = time.monotonic()
        assert start(whole).wait(300) == 0, (whole / "errors").read_text()
        length = time.monotonic() - begin
        wanted = {path.name: path.read_bytes() for path in (whole / "out.mp4.parts").glob("[0-9]*.mp4")}
        assert len(wanted) == CLIPS
        for n in range(args.runs):
            (folder := Path(base) / f"{n}").mkdir()
            pause = chance.random() * length
            wrong, took, clips, line = one_run(folder, pause, wanted)
            bad, longest = bad + bool(wrong), max(longest, took)
            print(f"{n + 1:3} after {pause:4.1f} of {length:.1f} s: ended {took:.1f} s later, {clips} clips kept; {line} {'; '.join(wrong)}", flush=True)
            if wrong:
                print((folder / "errors").read_text()[-3000:], flush=True)
    print(f"{args.runs} runs: {bad} bad; it took at most {longest:.1f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
