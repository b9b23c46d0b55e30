"""What guessed steps cost the lips: the same videos with every step computed and with some guessed, as one table.

    python -m tiny.evaluate --speed balanced draft gate=0.5 [--videos 24] [--steps 40] [--tempo 1.5] [--out out.speed]
    python -m tiny.evaluate --speed balanced draft --ckpt DIR --image a.png b.png --speech FOLDER             any S2V checkpoint

Frames and numbers are kept in --out as 003.balanced.npy and .json: what is there is not made again, so the table may grow over several runs. The
first row is `reference`. With --image there is no drawn mouth to read: PSNR, SSIM, seam and drift remain.

opening, width   correlation with what the sound asks for at lag 0: median and 10th percentile over videos; loss: reference minus this one
lag 0            share of videos in which the best lag is 0
PSNR, SSIM       against the frames of the reference, dB and 0 to 1: medians
obeyed           of the things that captions name
seam, drift      of videos of several clips: the jump at their joins in units of the median frame difference; of the last clip colour, contrast
                 and sharpness against the picture
"""
import json
import random
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from fast.probe import pick_device
from jobs.parts import safely
from media.ffmpeg import run
from media.sound import RATE, load_audio
from sample import open_folder
from tiny import faces, metrics
from tiny.evaluate import Case, check, judge_picture, make_cases, options, psnr, share, sound_files
from wan_s2v import WanS2VPipeline

REFERENCE = "reference"


def ssim(a, b):
    """Mean structural similarity of the luma of two videos (3, P, h, w) in [-1, 1]: Gaussian window of 11 pixels, sigma 1.5 (Wang 2004)."""
    x, y = (torch.einsum("cphw,c->phw", (v.float() + 1) / 2, metrics.LUMA)[:, None] for v in (a, b))
    g = torch.exp(-(torch.arange(11) - 5.0) ** 2 / (2 * 1.5 ** 2))
    g = (g / g.sum())[:, None] * (g / g.sum())[None]

    def mean(z):
        return F.conv2d(z, g[None, None])
    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return (((2 * mx * my + 1e-4) * (2 * xy + 9e-4)) / ((mx * mx + my * my + 1e-4) * (xx + yy + 9e-4))).mean().item()


def given_cases(args):
    """Cases of pictures that the user gives, with sounds of --speech."""
    rng, sounds = random.Random(args.seed), sound_files(args.speech, args.seconds)
    rng.shuffle(sounds)
    return [Case(f"{i:03d}", path, round(rng.uniform(0, length - args.seconds), 2), args.image[i % len(args.image)], 0)
            for i, (path, length) in zip(range(args.videos), cycle(sounds))]


def hurried(case, args, out):
    """The sound of a case as a file of its own, spoken faster: pitch stays -> Case"""
    path = out / f"{case.name}.wav"
    if not path.exists():
        wav = load_audio(case.audio, case.start)[:round(args.seconds * args.tempo * RATE)]
        soundfile.write(out / "slow.wav", wav.numpy(), RATE)
        run("-i", str(out / "slow.wav"), "-filter:a", f"atempo={args.tempo}", "-ar", str(RATE), str(path))
        (out / "slow.wav").unlink()
    return Case(case.name, str(path), 0.0, case.image, case.person, case.asked, case.prompt)


class Counted:
    """A Skips whose forwards are counted: EasyCache knows them afterwards only."""

    def __init__(self, skips):
        self.skips, self.velocities = skips, []

    def velocity(self):
        self.velocities.append(self.skips.velocity())
        return self.velocities[-1]

    @property
    def forwards(self):
        return sum(velocity.forwards for velocity in self.velocities)


def made(pipeline, case, args, speed, out):
    """-> frames (3, P, h, w) in [-1, 1], plan, forwards of a clip.  Made, or read from `out`

    speed  as --speed of sample.py
    """
    plan, path = pipeline.plan(**options(case, args) | dict(speed=speed)), out / f"{case.name}.{speed}.npy"
    if not path.exists():
        begin, counted = time.perf_counter(), plan
        if plan.config.speed and plan.config.speed.guesses:
            counted = replace(plan, config=replace(plan.config, speed=Counted(plan.config.speed)))
        frames = torch.cat(list(pipeline.generate(counted)), dim=1)
        if counted is not plan:
            path.with_suffix(".forwards").write_text(str(counted.config.speed.forwards))
        with safely(path) as temporary:
            np.save(temporary, ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
        print(f"{case.name}  {speed}  {time.perf_counter() - begin:.0f} s", flush=True)
    count = path.with_suffix(".forwards")
    return torch.from_numpy(np.load(path)).float() / 127.5 - 1, plan, (int(count.read_text()) if count.exists() else plan.forwards) / plan.clips


def judge(frames, reference, case, people, plan):
    """Numbers of one video -> dict.  people None: nobody drawn is seen"""
    n, picture = plan.config.clip_frames, metrics.fit_picture(metrics.load_image(case.image), frames.shape[2:])
    target, _ = metrics.target_of(None, frames.shape[1], plan.fps, case.audio, case.start)
    result, measured = dict(psnr=psnr(frames, reference), ssim=ssim(frames, reference)), None
    if people is not None:
        measured = metrics.measure(frames)
        lag, _, now = metrics.sync(measured[:, 0], target[:, 0])
        result |= dict(lag=lag, opening=now, width=metrics.width_correlation(measured, target))
        result |= dict(obeyed=judge_picture(frames, case, people, target)["obeyed"])
    clips, seam = metrics.drift(frames, picture, n, n - 3, measured, target)
    return result | dict(seam=seam, clips=len(clips), last={name: clips[-1][name] for name in ("colour", "contrast", "sharpness")})


def row(results, base):
    """Results of all videos of one speed, and the row of the reference or None -> row"""
    def middle(name):
        return float(np.median([r[name] for r in results]))
    forwards = sum(r["forwards"] for r in results) / len(results)
    made = dict(forwards=forwards, times=base["forwards"] / forwards if base else 1.0, videos=len(results), psnr=middle("psnr"), ssim=middle("ssim"))
    if "opening" in results[0]:
        for name in ("opening", "width"):
            made |= {name: middle(name), f"{name}_p10": float(np.percentile([r[name] for r in results], 10))}
        made |= dict(lag_zero=share([r["lag"] == 0 for r in results]), obeyed=share([ok for r in results for ok in r["obeyed"]]))
    if results[0]["clips"] > 1:
        made |= dict(seam=middle("seam")) | {name: float(np.median([r["last"][name] for r in results])) for name in results[0]["last"]}
    return made


COLUMNS = (("forwards", "forwards", "{:.0f}"), ("times", "times as fast", "{:.2f}"), ("psnr", "PSNR", "{:.1f}"), ("ssim", "SSIM", "{:.3f}"),
           ("opening", "opening r", "{:.3f}"), ("opening_p10", "p10", "{:.3f}"), ("width", "width r", "{:.3f}"), ("width_p10", "p10", "{:.3f}"),
           ("lag_zero", "lag 0", "{:.0%}"), ("obeyed", "obeyed", "{:.0%}"), ("seam", "seam", "{:.3f}"), ("colour", "colour", "{:.4f}"),
           ("contrast", "contrast", "{:.3f}"), ("sharpness", "sharpness", "{:.3f}"))


def table(rows):
    """{speed: row} -> markdown"""
    columns = [column for column in COLUMNS if any(column[0] in r for r in rows.values())]
    lines = ["| speed | " + " | ".join(title for _, title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for speed, r in rows.items():
        cells = ["-" if r.get(name) is None or speed == REFERENCE and name in ("psnr", "ssim") else form.format(r[name]) for name, _, form in columns]
        lines.append(f"| {speed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(args):
    """Options of tiny.evaluate -> {speed: row}; prints the table, writes it as table.json"""
    check(args)
    pipeline = WanS2VPipeline(open_folder(args.ckpt), device=pick_device(args.device), fp8=args.fp8)
    args.out.mkdir(parents=True, exist_ok=True)
    people = None if args.image else faces.held_out_identities(args.people, args.seed)
    long = vars(args) | dict(seconds=args.seconds * args.tempo, silent=0)          # of which the sound is made
    cases = given_cases(type(args)(**long)) if args.image else make_cases(type(args)(**long), people, args.out)
    cases = [hurried(case, args, args.out) for case in cases] if args.tempo != 1 else cases
    speeds, found = [REFERENCE, *(speed for speed in args.speed if speed != REFERENCE)], {}
    for speed in speeds:
        pipeline.plan(**options(cases[0], args) | dict(speed=speed))           # what cannot be used is refused before anything is made
    for case in cases:
        reference, *_ = made(pipeline, case, args, REFERENCE, args.out)
        for speed in speeds:
            path = args.out / f"{case.name}.{speed}.json"
            if not path.exists():
                frames, plan, forwards = made(pipeline, case, args, speed, args.out)
                numbers = judge(frames, reference, case, people, plan) | dict(forwards=forwards)
                with safely(path) as temporary:
                    temporary.write_text(json.dumps(numbers))
            found.setdefault(speed, []).append(json.loads(path.read_text()))
    rows = {}
    for speed, results in found.items():
        rows[speed] = row(results, rows.get(REFERENCE))
    Path(args.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return rows
