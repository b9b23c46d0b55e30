"""How late is a stream that hears by a pipe?  python tests/measure_pipe.py [--audio FILE] [--seconds 20] [--pause 3] [--stall 3] [any of sample.py]

A voice is fed at the speed at which it was spoken, frames are read as they come. A frame's delay is the time from its sound's being spoken to its being
there; a player that waits as long as the largest of them never stops. --pause: the voice stops for so many seconds in the midst of the second half;
--stall: the reader does, in the midst of the first. Delays during and for 2 s after either are left out.
"""
import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
from media.sound import RATE, load_audio  # noqa: E402

STEP = RATE // 50


def main(args, others):
    sound = np.tile(np.asarray(load_audio(args.audio)), 1 + int(args.seconds * RATE) // 16000)[:int(args.seconds * RATE)]
    samples, width, height = (sound * 32767).astype("<i2"), *args.size
    command = [sys.executable, "sample.py", "--live", "--audio", "-", "--image", args.image, "--raw", "--out", "-", "--fps", f"{args.fps:g}",
               "--size", f"{width}x{height}", *others]
    program = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    spoken, said = {}, []                                            # number of a sample -> when it was spoken

    def listen():
        for line in program.stderr:
            said.append(line.decode(errors="replace"))
            if line.startswith(b"ready"):
                threading.Thread(target=speak, daemon=True).start()

    def speak():
        begin = time.perf_counter()
        for first in range(0, len(samples), STEP):
            if first <= len(samples) * 3 // 4 < first + STEP:
                time.sleep(args.pause)
                begin += args.pause
            time.sleep(max(0, begin + (first + STEP) / RATE - time.perf_counter()))
            spoken[first] = begin + first / RATE
            program.stdin.write(samples[first:first + STEP].tobytes())
            program.stdin.flush()
        program.stdin.close()
    threading.Thread(target=listen, daemon=True).start()
    delays, i = [], 0
    while len(program.stdout.read(3 * width * height)) == 3 * width * height:
        at = int(i / args.fps * RATE)
        delays.append(time.perf_counter() - spoken[at // STEP * STEP] - at % STEP / RATE)
        i += 1
        if args.stall and i == int(args.seconds * args.fps / 4):
            time.sleep(args.stall)
    status, delays = program.wait(), np.array(delays)
    times, apart = np.arange(len(delays)) / args.fps, [(args.seconds / 4, args.stall), (args.seconds * 3 / 4, args.pause)]
    steady = np.all([(times < at - 1) | (times > at + 2 + seconds) for at, seconds in apart if seconds] or [times >= 0], axis=0)
    first, last = (np.abs(times - at) < 2.5 for at in (2.5, times[-1] - 2.5))
    print(f"status {status}, {len(delays)} frames for {args.seconds:g} s of sound")
    for name, those in (("all", times >= 0), ("first 5 s", first), ("last 5 s", last)):
        if (those & steady).any():
            print(f"{name}: delay at most {delays[those & steady].max():.2f} s, median {np.median(delays[those & steady]):.2f}")
    print("".join(line for line in said if line.startswith(("speed", "error"))), end="")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--audio", default=str(HERE / "samples" / "voice.flac"))
    p.add_argument("--image", default=str(HERE / "samples" / "face.png"))
    p.add_argument("--seconds", type=float, default=20)
    p.add_argument("--fps", type=float, default=25)
    p.add_argument("--size", type=lambda text: [int(side) for side in text.split("x")], default=[128, 128], help="of the frames that come")
    p.add_argument("--pause", type=float, default=0)
    p.add_argument("--stall", type=float, default=0)
    main(*p.parse_known_args())
