"""How much larger or smaller a checkpoint's velocity becomes from step to step: what a step list (fast/caching.py) is made from.

    python -m fast.calibrate --ckpt Wan2.2-S2V-14B --audio voice.wav --image face.png --prompt "a woman is singing"

Makes one clip with every step computed and writes step_magnitudes.json beside the checkpoint. The factors depend on the schedule far more than on
what is seen or heard, so one clip serves. Options are those of sample.py; MagCache's factor is the mean over the tokens of the length of what all
blocks add, relative to the step before; across a switch of experts it is 1.
"""
import json
import sys

import torch
from tqdm import tqdm

import sample
from fast.caching import CALIBRATION, plain, with_hidden
from sampling import guided_velocity


class Recorder:
    """guided_velocity, noting the factors of the branch with the prompt."""

    def __init__(self):
        self.factors, self.net, self.last = [], None, None

    def __call__(self, x, t, net, scale, cond, uncond):
        times = torch.full(x.shape[:1], t, device=x.device)
        with torch.no_grad():
            v, hidden = with_hidden(net, x, times, cond)
            added = (hidden.float() - plain(net).embed(x, cond)[:, :hidden.shape[1]]).norm(dim=-1)       # (B, L)
        same = net is self.net
        self.factors.append((added / self.last).mean().item() if same else 1.0)
        self.net, self.last = net, added
        if uncond is None:
            return v
        u = net(x, times, uncond)
        return u + scale * (v - u)


def main(argv=None):
    args = sample.parser().parse_args(argv)
    args.clips = 1
    pipeline, recorder = sample.open_pipeline(args), Recorder()
    plan = sample.planned(pipeline, args)
    print(plan)
    for _ in pipeline.generate(plan, velocity=lambda *_: recorder):
        pass
    path = pipeline.checkpoint.folder / CALIBRATION
    path.write_text(json.dumps({"factors": [round(factor, 6) for factor in recorder.factors]}, indent=1) + "\n", encoding="utf8")
    print(f"wrote {path}: {len(recorder.factors)} factors, {min(recorder.factors):.3f} to {max(recorder.factors):.3f}")
