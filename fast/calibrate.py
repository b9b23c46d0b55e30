"""Measure once per checkpoint by what factors velocities grow from step to step: --speed list=0.04 then knows which steps to skip.

    python -m fast.calibrate --ckpt DIR [any option of sample.py that says what is made]

One clip is sampled with all steps, of the sound and picture in samples/ or of a prompt unless others are given. Per step the factor is the mean
over tokens and branches of |v_i| / |v_{i-1}| (MagCache, arXiv 2506.09045), 1 where an expert begins. They depend on the schedule far more than on
what is seen or heard. DIR/step_magnitudes.json gets their products over diffusion time, from which any number of steps and shift are interpolated.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import json
import sys
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch

import sample
from fast.caching import CALIBRATION, listed_steps
from fast.probe import any_terminal
from jobs.explain import explain
from jobs.parts import safely
from sampling import guided_velocity

SAMPLES = Path(__file__).parents[1] / "samples"


class Measured:
    """`guided_velocity` that notes factors; it stands where a Skips does in a RunConfig."""

    def __init__(self):
        self.t, self.factors, self.net, self.sizes = [], [], None, []

    def velocity(self):
        return self

    def state(self):
        return None

    def __call__(self, x, t, net, scale, cond, uncond):
        before, self.sizes = self.sizes if net is self.net else [], []

        def noted(x, t, cond):
            v = net(x, t, cond)
            self.sizes.append(v.norm(dim=1))                         # (B, T, H, W)
            return v
        v, self.net = guided_velocity(x, t, noted, scale, cond, uncond), net
        ratios = [(now / was.clamp_min(1e-12)).mean().item() for now, was in zip(self.sizes, before)]
        self.t.append(t)
        self.factors.append(sum(ratios) / len(ratios) if ratios else 1.0)
        return v


def measure(pipeline, args):
    """-> diffusion times, and the factor of each step.  args: of sample.py"""
    plan = sample.plan_of(pipeline, args)
    print(plan)
    measured = Measured()
    next(iter(pipeline.generate(replace(plan, config=replace(plan.config, speed=measured)))))
    return measured.t, measured.factors


def calibrate(argv):
    """-> the file written"""
    args = sample.parser().parse_args(argv)
    if args.batch is not None or args.live or args.speed:
        raise ValueError("a calibration is one plain clip: leave out --batch, --live and --speed")
    pipeline = sample.open_pipeline(args)
    task, path = pipeline.checkpoint.task, Path(pipeline.checkpoint.folder) / CALIBRATION
    args.clips = 1
    if task.startswith("s2v"):
        args.audio = args.audio or str(SAMPLES / "voice.flac")
    if task.startswith(("s2v", "i2v")):
        args.image = args.image or str(SAMPLES / "face.png")
    else:
        args.prompt = args.prompt or "a person walks along a street in the rain"
    t, factors = measure(pipeline, args)
    with safely(path) as temporary:
        temporary.write_text(json.dumps(dict(t=t, magnitudes=list(accumulate(factors, mul)))) + "\n", encoding="utf8")
    for allowed in (0.02, 0.04, 0.08):
        print(f"list={allowed:g} computes {len(listed_steps(factors, allowed))} of {len(factors)} steps")
    return path


def main(argv=None):
    any_terminal()
    try:
        print(f"wrote {calibrate(sys.argv[1:] if argv is None else argv)}")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {explain(error, None)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
