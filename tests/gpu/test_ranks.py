"""What needs two NVIDIA GPUs: NCCL in place of gloo.  pytest -s tests/gpu/test_ranks.py; CPUS=1 before it runs the same on CPUs"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from media.frames import read_frames

CPUS = "CPUS" in os.environ
pytestmark = pytest.mark.skipif(not CPUS and torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
HERE = Path(__file__).parents[2]
DEVICE = "cpu" if CPUS else "cuda"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
GIVEN = ["--audio", "samples/voice.flac", "--image", "samples/face.png", "--device", DEVICE]


def run(*command):
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("split", ("guidance", "sequence"))
def test_a_step_by_two_is_that_of_one(split):
    """Off by no more than 1.2 times what another order of sums does."""
    said = run(sys.executable, "-m", "fast.bench", "--preset", "tiny", "--ranks", "2", "--parallel", split, "--stage", "error", "--device", DEVICE)
    found = json.loads(said.splitlines()[-1])["ranks"]
    print(f"\n{split}: {found['ranks']:.1e}, another order {found['other_order']:.1e}")
    assert 0 < found["other_order"] < 0.02 and found["ranks"] <= 1.2 * found["other_order"]


@pytest.mark.parametrize("options", (["--steps", "2", "--clip-frames", "20"], ["--live", "--duration", "2"]), ids=("clips", "live"))
def test_a_video_by_two_is_that_of_one(options, tmp_path):
    """Within what another rounding does, of 255."""
    for name, start in (("one", [sys.executable]), ("two", TORCHRUN)):
        run(*start, "sample.py", *GIVEN, *options, "--out", str(tmp_path / f"{name}.mp4"))
    one, two = (np.stack(list(read_frames(tmp_path / f"{name}.mp4"))).astype(float) for name in ("one", "two"))
    apart = np.abs(one - two).mean()
    print(f"\n{len(one)} frames, {apart:.3f} of 255 apart (tolerance 1)")
    assert one.shape == two.shape and len(one) > 30 and apart < 1 and one.std() > 20
