"""Make videos of people, voices, sentences and a language that were never trained on, and measure the written files.

    python -m tiny.evaluate [--ckpt weights/tiny] [--speech data/speech/held_out] [--videos 40] [--out out.evaluate]

Every video is written as an mp4 and read again; its mouth is compared with the articulation of the sound in that file (metrics.py). Half
of the videos have a caption that changes hair, background or mood. Prints a line per video, a table, and one JSON line; writes the videos,
the reference pictures and sheet.png: per video the reference, its most closed, its middle and its most open frame.

shuffled  mouths against the sounds of other videos, all pairs: the median of |r| (chance alone gives about 0.1), and |mean of r|
silence   mean opening in videos made from a silent file / range (5th to 95th percentile) of the opening in all videos with speech
PSNR      against the drawing of the right person, as the caption asks, with the mouth that the sound asks for. Sway, roll and blinks are
          not known from the sound: once the head is drawn at rest, once as it is found in each frame (fit_motion)
person    the nearest of `people` held-out faces, all drawn at rest as the caption asks, is the right one
obeyed    per thing named in a caption: of drawings with each hair (or background, mood) the one asked for is nearest; kept: the same for
          what no caption names, where the reference's own is right
clip N    medians of all videos that have it; opening: r at lag 0 in that clip alone, none for clips of silence or under 16 frames

Axes    P pixel frames
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import io
import json
import random
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import sample
from media.sound import RATE
from media.video import open_writer
from fast.probe import any_terminal, pick_device
from sample import numbers, open_folder, size
from tiny import faces, metrics
from tiny.faces import BACKGROUND, COLUMN, HAIR, MOODS, SIZE
from wan_s2v import WanS2VPipeline

CHOICES = {"hair": list(HAIR), "background": list(BACKGROUND), "mood": list(MOODS)}       # what captions can name
PLACE = {"hair": COLUMN["hair_name"], "background": COLUMN["background_name"], "mood": COLUMN["mood"]}
TILE = 96                    # pixels of a frame on the sheet


# ---- what is made ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """One video to make."""
    name: str                    # of its files
    audio: str
    start: float                 # seconds into the audio
    image: str
    person: int
    asked: dict = field(default_factory=dict)      # {"hair": "red", ...}, what the caption names
    prompt: str = ""


def captioned(person, generator):
    """A caption that names something, for a face (D,) -> (caption, {"hair": name, ...})"""
    shown, captions = faces.captioned(person[None].repeat(32, 1), generator)
    for row, caption in zip(shown, captions):
        new = {what: CHOICES[what][int(row[i])] for what, i in PLACE.items() if row[i] != person[i]}
        if new:
            return caption, new
    raise AssertionError("32 captions, and none names anything")


def sound_files(folder, seconds):
    """[(path, its seconds)] of the files that are long enough. raises ValueError if there are none"""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix in (".ogg", ".wav", ".flac"))
    long = [(str(path), length) for path in paths if (length := soundfile.info(path).duration) >= seconds]
    if not long:
        raise ValueError(f"wanted speech of {seconds:g} s or more in {folder}, got {len(paths)} files, none that long: make some with "
                         "python -m tiny.speech data/speech, or ask for less with --seconds")
    return long


def make_cases(args, people, out):
    """The videos that the options ask for, each with a picture written into `out` -> [Case], the silent ones last."""
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    sounds = sound_files(args.speech, args.seconds)
    rng.shuffle(sounds)
    soundfile.write(out / "silence.wav", np.zeros(round(args.seconds * RATE), np.int16), RATE)
    cases = []
    for i in range(args.videos + args.silent):
        person, name = i % len(people), f"{i:03d}"
        metrics.to_picture(faces.reference(people[person][None], generator)[0]).save(out / f"{name}.png")
        path, length = sounds[i % len(sounds)]
        start = round(rng.uniform(0, length - args.seconds), 2)
        turn = i // len(people)                                       # every person with a caption in one turn and without in the next
        prompt, asked = captioned(people[person], generator) if (person + turn) % 2 else ("", {})
        if i >= args.videos:
            path, start = str(out / "silence.wav"), 0.0
        cases.append(Case(name, path, start, str(out / f"{name}.png"), person, asked, prompt))
    return cases


def options(case, args):
    return dict(audio=case.audio, image=case.image, prompt=case.prompt, size=args.size, steps=args.steps, shift=args.shift,
                guidance=args.guidance, solver=args.solver, seed=args.seed + int(case.name), clips=args.clips,
                clip_frames=args.clip_frames, start=case.start, duration=args.seconds)


def make_video(pipeline, case, args, out):
    """-> path of the mp4"""
    path = out / f"{case.name}.mp4"
    if args.live:
        return make_stream(pipeline, case, args, path)
    plan = pipeline.plan(**options(case, args))
    with open_writer(path, plan) as writer:
        for frames in pipeline.generate(plan):
            writer.write(frames)
    return path


def make_stream(pipeline, case, args, path):
    """The same by `sample.py --live`."""
    given = dict(ckpt=pipeline.checkpoint.folder, audio=case.audio, image=case.image, prompt=case.prompt, seed=args.seed + int(case.name), out=path,
                 start=case.start, duration=args.seconds, fps=args.fps, size=f"{SIZE}x{SIZE}", device=args.device, steps=args.steps, shift=args.shift)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        code = sample.cli(["--live", *(f"--{name}={value}" for name, value in given.items() if value is not None)])
    if code:
        raise ValueError(said.getvalue().strip().splitlines()[-1])
    return path


# ---- the picture against drawings -----------------------------------------------------------------------------------------------------

def still(P):
    """Motion (1, P, 4) of a head at rest with open eyes."""
    return torch.zeros(1, P, 4)


def at_rest(identity):
    """(n, D) -> pictures (n, 3, 128, 128), mouth closed"""
    return faces.draw(identity, still(1).repeat(len(identity), 1, 1), torch.tensor([0.0, 0.5]).expand(len(identity), 1, 2))[:, :, 0]


def psnr(frames, true):
    """dB, of values in [-1, 1]"""
    return (10 * torch.log10(4 / (frames - true).square().mean().clamp_min(1e-10))).item()


def fit_motion(frames, identity, mouth, true, rounds=2):
    """How the head of a video moves: the motion whose drawing is nearest in each frame, by Gauss-Newton.

    frames  (3, P, 128, 128)        identity (1, D), mouth (1, P, 2) who is seen        true  their drawing with the head at rest, as frames
    returns (1, P, 4) as faces.motions, and the drawing (3, P, 128, 128) with it
    """
    def coarse(pictures):
        return F.avg_pool2d(pictures.transpose(0, 1), 4).flatten(1)                               # (P, pixels)

    P, step = frames.shape[1], torch.tensor([2.0, 2.0, 0.04, 1.0])                                # pixels, pixels, radians, shut
    probes = torch.cat([step.diag(), -step.diag()[:3], torch.zeros(1, 4)])[None]                  # (1, 8, 4)
    drawn = coarse(faces.draw(identity, probes, torch.tensor([0.0, 0.5]).expand(1, 8, 2))[0])     # (8, pixels)
    slopes = torch.cat([(drawn[:3] - drawn[4:7]) / 2, drawn[3:4] - drawn[7:]])                    # (4, pixels) per step
    motion, least, most = still(P), torch.tensor([-1.5, -1.5, -1.5, 0.0]), torch.tensor([1.5, 1.5, 1.5, 1.0])     # in steps
    for _ in range(rounds):
        move = torch.linalg.solve(slopes @ slopes.T + 1e-3 * torch.eye(4), slopes @ coarse(frames - true).T).T    # (P, 4)
        motion = torch.maximum(torch.minimum(motion / step + move, most), least) * step
        true = faces.draw(identity, motion, mouth)[0]
    return motion, true


def nearest(frames, identities, motion, mouth):
    """Index of the identity (n, D) whose drawings are nearest to the frames (3, P, 128, 128), all with one motion and mouth (1, P, ...)."""
    n = len(identities)
    drawn = faces.draw(identities, motion.expand(n, -1, -1), mouth.expand(n, -1, -1))             # (n, 3, P, 128, 128)
    return (drawn - frames).square().flatten(1).mean(1).argmin().item()


def judge_picture(frames, case, people, target):
    """PSNR, person, captions of one video, by every second frame -> dict.  frames (3, P, 128, 128), target (P, 2)"""
    frames, target = frames[:, ::2], target[::2]
    identity, mouth = faces.apply(people[case.person][None], **case.asked), target[None]
    true = faces.draw(identity, still(len(target)), mouth)[0]
    motion, moved = fit_motion(frames, identity, mouth, true)
    some = torch.linspace(0, len(target) - 1, 6).long()[1:-1]                                     # 4 frames tell colours and moods
    right = {}
    for what, names in CHOICES.items():
        wanted = int(identity[0, PLACE[what]])
        alternatives = torch.cat([identity if i == wanted else faces.apply(identity, **{what: name}) for i, name in enumerate(names)])
        right[what] = nearest(frames[:, some], alternatives, motion[:, some], mouth[:, some]) == wanted
    distances = metrics.identity_distance(frames, at_rest(faces.apply(people, **case.asked)))
    return dict(psnr_still=psnr(frames, true), psnr_moved=psnr(frames, moved), person=distances.argmin().item() == case.person,
                obeyed=[right[what] for what in right if what in case.asked],
                kept=[right[what] for what in right if what not in case.asked])


def judge(path, case, people, clip_frames):
    """Everything about one written video -> dict, and 4 tiles for the sheet."""
    frames, fps = metrics.read_video(path)
    target, wav = metrics.target_of(path, frames.shape[1], fps)
    measured, picture = metrics.measure(frames), metrics.fit_picture(metrics.load_image(case.image), frames.shape[2:])
    lag, best, now = metrics.sync(measured[:, 0], target[:, 0])
    clips, seam = metrics.drift(frames, picture, clip_frames, clip_frames - 3, measured, target)
    result = dict(lag=lag, best=best, now=now, width=metrics.width_correlation(measured, target), clips=clips, seam=seam,
                  measured=measured[:, 0], target=target[:, 0], frames=frames.shape[1], wav=wav)
    result |= judge_picture(frames, case, people, target)
    middle = measured[:, 0].argsort()[len(measured) // 2]
    return result, [picture] + [frames[:, k] for k in (measured[:, 0].argmin(), middle, measured[:, 0].argmax())]


# ---- numbers of all videos ------------------------------------------------------------------------------------------------------------

def shuffled(results):
    """Mouths against the sounds of other videos of the same length -> (median of |r|, |mean of r|), 0 if there is but one video."""
    r = [metrics.correlation(a["measured"], b["target"]) for a in results for b in results if a is not b and a["frames"] == b["frames"]]
    return (float(np.median(np.abs(r))), abs(float(np.mean(r)))) if r else (0.0, 0.0)


def share(values):
    """Of True in a list; None for an empty one."""
    return sum(values) / len(values) if values else None


def median(values):
    """Median of those that are not None; None if none is left."""
    values = [value for value in values if value is not None]
    return round(float(np.median(values)), 4) if values else None


def summary(spoken, silent):
    """Results of the videos with speech and of the silent ones -> dict of numbers"""
    def spread(name):
        values = np.array([r[name] for r in spoken])
        return {name: float(np.median(values)), f"{name}_p10": float(np.percentile(values, 10))}

    openings = torch.cat([r["measured"] for r in spoken])
    low, high = openings.quantile(0.05).item(), openings.quantile(0.95).item()
    lags = [r["lag"] for r in spoken]
    absolute, mean = shuffled(spoken)
    n = spread("now") | spread("best") | spread("width")
    n |= dict(lag=float(np.median(lags)), lag_zero=share([lag == 0 for lag in lags]), shuffled=absolute, shuffled_mean=mean,
                    opening_range=[low, high])
    if silent:
        n["silence"] = torch.cat([r["measured"] for r in silent]).mean().item() / max(high - low, 1e-6)
    n |= spread("psnr_still") | spread("psnr_moved")
    n |= dict(person=share([r["person"] for r in spoken]), obeyed=share([ok for r in spoken for ok in r["obeyed"]]),
                    asked=sum(len(r["obeyed"]) for r in spoken), kept=share([ok for r in spoken for ok in r["kept"]]))
    seams = [r["seam"] for r in spoken if len(r["clips"]) > 1]
    n |= dict(seam=float(np.median(seams))) if seams else {}
    n["drift"] = [{name: median([r["clips"][i][name] for r in spoken if len(r["clips"]) > i])
                         for name in ("opening", "colour", "contrast", "sharpness")} for i in range(max(len(r["clips"]) for r in spoken))]
    return n


def table(n):
    """The numbers of `summary` as lines."""
    def percent(value):
        return "-" if value is None else f"{100 * value:.0f}%"

    lines = [f"opening      r {n['now']:.3f} at lag 0 in the median, {n['now_p10']:.3f} at the 10th percentile; best lag {n['lag']:+.0f}, "
             f"0 in {percent(n['lag_zero'])}",
             f"width        r {n['width']:.3f}, {n['width_p10']:.3f}",
             f"shuffled     |r| {n['shuffled']:.3f} in the median, mean r {n['shuffled_mean']:.3f}",
             f"silence      opening {percent(n.get('silence'))} of its range ({n['opening_range'][0]:.2f} to {n['opening_range'][1]:.2f})",
             f"PSNR         {n['psnr_still']:.1f} dB, {n['psnr_still_p10']:.1f} (head at rest); "
             f"{n['psnr_moved']:.1f} dB, {n['psnr_moved_p10']:.1f} (motion as found)",
             f"person       right in {percent(n['person'])}",
             f"caption      {percent(n['obeyed'])} of {n['asked']} things asked for; {percent(n['kept'])} of the others kept"]
    lines += [metrics.clip_line(i, c) for i, c in enumerate(n["drift"])]
    return lines + ([f"seam         {n['seam']:.2f} times the median frame difference"] if "seam" in n else [])


def contact_sheet(tiles, across=4):
    """[4 pictures per video] -> PIL image, `across` videos in a row, numbered"""
    per = max(len(row) for row in tiles)
    image = Image.new("RGB", (across * (per * TILE + 6), -(-len(tiles) // across) * (TILE + 4)), "white")
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(tiles):
        left, top = i % across * (per * TILE + 6), i // across * (TILE + 4)
        for k, picture in enumerate(row):
            image.paste(metrics.to_picture(picture).resize((TILE, TILE), Image.LANCZOS), (left + k * TILE, top))
        draw.text((left + 2, top + 1), str(i), fill="black")
    return image


# ---- command line ---------------------------------------------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(description="Measure a speech-to-video checkpoint on drawn faces that it never saw.")
    p.add_argument("--ckpt", help="checkpoint folder (default: weights/tiny)")
    p.add_argument("--speech", default="data/speech/held_out", help="folder with sound (default: data/speech/held_out)")
    p.add_argument("--out", type=Path, default=Path("out.evaluate"), help="folder for all that is written (default: out.evaluate)")
    p.add_argument("--videos", type=int, default=40, help="(default: 40)")
    p.add_argument("--silent", type=int, default=4, help="further videos made from silence (default: 4)")
    p.add_argument("--people", type=int, default=20, help="held-out faces that take turns (default: 20)")
    p.add_argument("--seconds", type=float, default=5.0, help="of sound per video (default: 5)")
    p.add_argument("--clips", type=int, help="at most (default: as many as the sound needs)")
    p.add_argument("--clip-frames", type=int, help="frames made at once (default: the checkpoint's)")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--shift", type=float, help="(default: the checkpoint's)")
    p.add_argument("--guidance", type=numbers, help="one value, or LOW,HIGH for the two experts (default: the checkpoint's)")
    p.add_argument("--speed", nargs="+", help="compare ways to skip steps with the reference, see tiny/speed.py (default: off)")
    p.add_argument("--tempo", type=float, default=1.0, help="with --speed: how much faster than it is the speech is made (default: 1)")
    p.add_argument("--image", nargs="+", help="with --speed: pictures in place of drawn faces (default: drawn ones)")
    p.add_argument("--size", type=size, default=(SIZE, SIZE), metavar="WxH", help=f"(default: {SIZE}x{SIZE}, which the measures of lips know)")
    p.add_argument("--solver", help="unipc, dpm++ or euler (default: the checkpoint's)")
    p.add_argument("--live", action="store_true", help="make them as streams (docs/live.md)")
    p.add_argument("--fps", type=float, default=25, help="of streams (default: 25)")
    p.add_argument("--seed", type=int, default=0, help="of people, sounds, captions and noise (default: 0)")
    p.add_argument("--fp8", action="store_true", help="cast the large matrices to float8 while loading")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return p


def check(args):
    """raises ValueError for options that cannot be used"""
    if min(args.videos, args.people) < 1 or args.silent < 0 or args.seconds < 1.5:
        raise ValueError(f"wanted 1 or more videos and people and 1.5 s or more, got {args.videos}, {args.people}, {args.seconds:g} s")
    if not 0.5 <= args.tempo <= 3:
        raise ValueError(f"--tempo must be 0.5 to 3, got {args.tempo:g}")
    if not args.speed and (args.image or args.tempo != 1):
        raise ValueError("--image and --tempo go with --speed")


def evaluate(args):
    """Options of `parser` -> dict of numbers. Prints as it goes.  raises ValueError for options that cannot be used"""
    begin = time.perf_counter()
    check(args)
    device = pick_device(args.device)
    pipeline = WanS2VPipeline(open_folder(args.ckpt), device=device, fp8=args.fp8)
    args.out.mkdir(parents=True, exist_ok=True)
    people = faces.held_out_identities(args.people, args.seed)
    results, tiles, seconds = [], [], 0.0
    for case in make_cases(args, people, args.out):
        start = time.perf_counter()
        path = make_video(pipeline, case, args, args.out)
        seconds += time.perf_counter() - start
        result, row = judge(path, case, people, args.clip_frames or pipeline.checkpoint.sampling["frames"])
        results.append(result)
        tiles.append(row)
        print(f"{case.name}  r {result['now']:.3f}  lag {result['lag']:+d}  width {result['width']:.2f}  PSNR {result['psnr_still']:.1f} / "
              f"{result['psnr_moved']:.1f} dB  {'right' if result['person'] else 'WRONG'} person  caption {sum(result['obeyed'])} of "
              f"{len(result['obeyed'])}  {time.perf_counter() - start:.1f} s  {Path(case.audio).stem}  {case.prompt}", flush=True)
    contact_sheet(tiles).save(args.out / "sheet.png")
    n = summary(results[:args.videos], results[args.videos:])
    n |= dict(seconds_per_video=seconds / len(results), seconds=time.perf_counter() - begin)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return dict(settings=settings, device=device.type, torch=torch.__version__) | n


def main(argv=None):
    any_terminal()
    p = parser()
    try:
        args = p.parse_args(argv)
        if args.speed:
            from tiny.speed import compare                           # here: it imports this file
            compare(args)
            return 0
        n = evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(n)))
    print(f"time         {n['seconds_per_video']:.1f} s to make a video, {n['seconds']:.0f} s in all; wrote {args.out}/sheet.png")
    print(json.dumps(n))
    return 0


if __name__ == "__main__":
    sys.exit(main())
