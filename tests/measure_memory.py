"""Peak memory of whole runs on the tiny model: 40 clips beside 4, an hour of sound of which two clips are made, a batch.

    python -m tests.measure_memory        some 15 minutes on 2 CPU cores
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile

HERE = Path(__file__).parents[1]
FACE, VOICE = str(HERE / "samples" / "face.png"), HERE / "samples" / "voice.flac"
RUN = ("import resource, sys, sample; status = sample.cli(sys.argv[1:]); "
       "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr); sys.exit(status)")


def peak(*arguments):
    """-> MiB resident at most, mapped files included; seconds"""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, "--image", FACE, "--steps", "1", *arguments], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stderr.splitlines()[-1]), time.perf_counter() - begin


def lengthen(path, seconds):
    voice, rate = soundfile.read(VOICE, dtype="float32")
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for _ in range(int(seconds * rate / len(voice))):
            file.write(voice)
    return str(path)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        out, sound, hour = str(folder / "out.mp4"), lengthen(folder / "a.wav", 205), lengthen(folder / "hour.flac", 3600)
        for count in (1, 12):
            jobs = [{"audio": str(VOICE), "out": f"{count}-{n}.mp4"} for n in range(count)]
            (folder / f"{count}.jsonl").write_text("\n".join(map(json.dumps, jobs)))
        for words, arguments in (("4 clips of 80 frames", ["--audio", sound, "--clips", "4", "--out", out]),
                                 ("40 clips of 80 frames", ["--audio", sound, "--clips", "40", "--out", out]),
                                 ("2 clips of an hour", ["--audio", hour, "--clips", "2", "--out", out]),
                                 ("a batch of one, 1 clip", ["--batch", str(folder / "1.jsonl")]),
                                 ("a batch of twelve", ["--batch", str(folder / "12.jsonl")])):
            print("{:<24} {:7.1f} MiB {:7.1f} s".format(words, *peak(*arguments)), flush=True)


if __name__ == "__main__":
    main()
