"""Measure videos from pixels and sound alone: does the mouth follow the sound, does the picture drift, who is it.

    python -m tiny.metrics out.mp4 [--audio a.wav] [--image ref.png]          or frames/, the PNG frames of sample.py --out frames/

prints a table and writes out.metrics.png: frames over the waveform, with the opening that was seen and the one that the sound asks for.
The mouth and the person are read from drawn faces (faces.py) only; drift and seams of any video, with sound or without.

Axes    P pixel frames   h w picture size; videos are (3, P, h, w) float in [-1, 1]
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from fast.probe import any_terminal
from media.sound import RATE, load_audio
from tiny.faces import FPS, INSIDE, LIP, LIPS, NARROW, OPEN, SIZE, WIDE, articulation, held_out_identities, reference, to_picture
from media.pictures import fit_picture, load_image
from media.ffmpeg import probe
from media.frames import read_frames

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])            # BT.709: sharp in an mp4, its colours have half the resolution
SEARCHED = slice(62, 104), slice(34, 94)                 # rows and columns of a 128-pixel picture in which the mouth lies
REDDER, BLUER = (0.30, 0.44), (-0.06, 0.02)              # lips and mouth have red - green and blue - green above, all else below
STRAY = 3.0                                              # pixels of inside that may be noise: added to the area, so that they open no mouth
MOUTH_AREA = 30.0                                        # pixels of lips and inside: less is no drawn mouth; a closed one has 130
COMPACT = 7, 11                                          # largest standard deviation of its rows and columns: drawn 5, 9; noise 12, 17
SHORTEST = 16                                            # frames: shorter curves correlate by chance
SEEN_OPEN = 0.15                                         # the width of a mouth is compared where it is open more than this
LAGS = range(-5, 6)                                      # frames
CLIP = 80                                                # frames that S2V makes at once unless told otherwise


# ---- the mouth ------------------------------------------------------------------------------------------------------------------------

def mouth_masks(frames):
    """frames (3, P, 128, 128) -> two (P, rows, columns), 0 to 1: lips and inside; inside alone."""
    rgb = (frames[:, :, SEARCHED[0], SEARCHED[1]].permute(1, 2, 3, 0).float() + 1) / 2                  # (P, rows, columns, 3)
    red, green, blue = rgb.unbind(-1)
    mouth = ((red - green - REDDER[0]) / (REDDER[1] - REDDER[0])).clamp(0, 1)
    mouth = mouth * ((blue - green - BLUER[0]) / (BLUER[1] - BLUER[0])).clamp(0, 1)
    luma = LUMA.to(rgb)
    bright, dark = (torch.tensor(colour).to(rgb) @ luma / 255 for colour in (LIPS, INSIDE))
    return mouth, mouth * ((bright - rgb @ luma) / (bright - dark)).clamp(0, 1)


def at_size(frames):
    """Any frames (3, P, h, w) -> (3, P, 128, 128)"""
    if frames.ndim != 4 or frames.shape[0] != 3:
        raise ValueError(f"wanted frames (3, P, h, w), got {tuple(frames.shape)}: one video at a time")
    if frames.shape[2:] == (SIZE, SIZE):
        return frames
    return F.interpolate(frames.transpose(0, 1).float(), (SIZE, SIZE), mode="area").transpose(0, 1)


def deviation(weights):
    """weights (P, n) of n places in a row -> (P,), standard deviation of the place in pixels"""
    x, share = torch.arange(weights.shape[1], device=weights.device), weights / (weights.sum(1, keepdim=True) + 1e-6)
    return (share * (x - (share * x).sum(1, keepdim=True)).square()).sum(1).sqrt()


@torch.no_grad()
def measure(frames):
    """Opening and width of a drawn mouth, from its pixels.

    frames   (3, P, 128, 128) in [-1, 1]; other sizes are scaled to it
    returns  (P, 2) float32: opening and width in the units of faces.articulation
    The inside of an open mouth is an ellipse. With its column heights c(x), area A = sum c and Q = sum c^2, half its height is
    3 pi / 16 Q / A (an average over the columns, so nothing hangs on one pixel) and half its width A / (pi * half height). When it is
    nearly closed, the width is that of the lips: twice the standard deviation of x.
    """
    mouth, inside = mouth_masks(at_size(frames))
    columns = inside.sum(1)                                                                       # (P, columns) heights in pixels
    area = columns.sum(1)
    half_height = 3 * torch.pi / 16 * columns.square().sum(1) / (area + STRAY)
    opening = half_height / OPEN
    half_width = torch.lerp(2 * deviation(mouth.sum(1)) - LIP, area / (torch.pi * half_height + 1e-6), (opening / 0.3).clamp(0, 1))
    return torch.stack([opening, (half_width - NARROW) / (WIDE - NARROW)], dim=1).cpu()


def has_mouth(frames):
    """Whether at least half of the frames show a mouth: the colours of a drawn one, enough of them, in one place."""
    mouth, _ = mouth_masks(at_size(frames))
    rows, columns = deviation(mouth.sum(2)), deviation(mouth.sum(1))
    seen = (mouth.sum((1, 2)) > MOUTH_AREA) & (rows < COMPACT[0]) & (columns < COMPACT[1])
    return seen.float().mean().item() >= 0.5


def correlation(a, b):
    """Of two (P,) tensors, -1 to 1; 0 where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = a.norm() * b.norm()
    return (a @ b / size).item() if size > 1e-9 else 0.0


def sync(measured, target):
    """How well and when one curve follows another.

    measured, target  (P,), one number per frame
    returns           (lag, best, now): the lag in frames, -5 to 5, with the highest correlation (above 0: the picture comes late),
                      the correlation there and the one at lag 0, over the frames that both have
    raises            ValueError for different lengths or fewer than 16 frames
    """
    P = len(target)
    if measured.shape != target.shape or P < SHORTEST:
        raise ValueError(f"sync wants two curves of one length, 16 frames or more, got {len(measured)} and {P}: cut both alike")
    scores = {lag: correlation(measured[max(0, lag):P + min(0, lag)], target[max(0, -lag):P - max(0, lag)]) for lag in LAGS}
    lag = max(scores, key=lambda lag: (scores[lag], -abs(lag)))
    return lag, scores[lag], scores[0]


def width_correlation(measured, target):
    """Correlation of the widths, both (P, 2), over the frames in which the target is open."""
    seen = target[:, 0] > SEEN_OPEN
    return correlation(measured[seen, 1], target[seen, 1]) if seen.sum() > 2 else 0.0


def target_of(path, frames, fps, audio=None, start=0.0):
    """What the mouth should do in a written video -> (frames, 2), and the sound: its own, or that of another file from `start` seconds on."""
    wav = load_audio(audio or path, start)[:round(frames / fps * RATE)]       # cut as in the mp4, for levels are relative to the whole sound
    return articulation(wav, torch.arange(frames) / fps), wav


# ---- the picture ----------------------------------------------------------------------------------------------------------------------

def picture_statistics(frames):
    """frames (3, P, h, w) -> mean colour (3,), contrast (standard deviation of luma), sharpness (mean |Laplacian| of luma); 0 to 1 scale"""
    rgb = (frames.float() + 1) / 2
    luma = torch.einsum("cphw,c->phw", rgb, LUMA.to(rgb))
    laplacian = 4 * luma[:, 1:-1, 1:-1] - luma[:, :-2, 1:-1] - luma[:, 2:, 1:-1] - luma[:, 1:-1, :-2] - luma[:, 1:-1, 2:]
    return rgb.mean((1, 2, 3)), luma.std((1, 2)).mean().item(), laplacian.abs().mean().item()


def drift(frames, picture, clip_frames=80, first=77, measured=None, target=None):
    """How each clip of a video differs from the reference picture, how its mouth follows the sound, and how the clips join.

    frames   (3, P, h, w)        picture  (3, h, w), what the video was made from
    first    frames of the first clip, clip_frames of each other one        measured, target  (P, 2) mouths, if known
    returns  (clips, seam): a list of dicts, one per clip: opening (correlation at lag 0; None if a mouth is not known, the sound silent or
             the clip shorter than 16 frames), colour (largest difference of the mean red, green or blue, 0 to 1), contrast and
             sharpness (ratios to the picture's); the mean picture jump at the joins / median difference of two frames, 1.0 for one clip
    """
    if min(clip_frames, first) < 1:
        raise ValueError(f"wanted clips of 4 frames or more (the first is 3 shorter), got {clip_frames}: change --clip-frames")
    colour, contrast, sharpness = picture_statistics(picture[:, None])
    starts = [0, *range(first, frames.shape[1], clip_frames)]
    clips = []
    for start, end in zip(starts, [*starts[1:], frames.shape[1]]):
        c, k, s = picture_statistics(frames[:, start:end])
        known = target is not None and measured is not None and end - start >= SHORTEST and target[start:end, 0].max() > SEEN_OPEN
        clips.append({"opening": correlation(measured[start:end, 0], target[start:end, 0]) if known else None,
                      "colour": (c - colour).abs().max().item(), "contrast": k / (contrast + 1e-6), "sharpness": s / (sharpness + 1e-6)})
    steps = frames.diff(dim=1).abs().mean((0, 2, 3))                                              # (P - 1,)
    seam = steps[[start - 1 for start in starts[1:]]].mean() / (steps.median() + 1e-6) if len(starts) > 1 else torch.tensor(1.0)
    return clips, seam.item()


def identity_distance(frames, pictures):
    """How far a video is from each of n people, of whom it shows the nearest.

    frames (3, P, 128, 128), pictures (n, 3, 128, 128) in [-1, 1] -> (n,), 0 to 2
    The mean frame is compared in squares of 4 pixels, where sway and speech leave little.
    """
    mean = F.avg_pool2d(at_size(frames).float().mean(1)[None], 4)                                 # (1, 3, 32, 32)
    return (mean - F.avg_pool2d(pictures.to(mean), 4)).square().mean((1, 2, 3)).sqrt()


# ---- table and plot -------------------------------------------------------------------------------------------------------------------

def read_video(path, fps=FPS):
    """mp4, or a folder of PNG frames at `fps` -> frames (3, P, h, w) float32 in [-1, 1], fps.  raises ValueError without a picture"""
    if Path(path).is_dir():
        frames = [np.asarray(Image.open(name).convert("RGB")) for name in sorted(Path(path).glob("*.png"))]
    else:
        info = probe(path, count=False)
        frames, fps = list(read_frames(path)) if info.video_codec else [], info.fps
    if len({frame.shape for frame in frames}) != 1 or not fps > 0:
        raise ValueError(f"wanted a video, got {path} without frames of one size or a frame rate: give the mp4 or folder that sample.py wrote")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1, fps                # from (P, h, w, 3) uint8


def plot(frames, fps, wav, measured, target, seconds=None, width=1200):
    """PIL image: a strip of frames, the waveform under it, the opening asked for (filled) and seen (line).  measured, target (P, 2)"""
    seconds = seconds or frames.shape[1] / fps
    tile, wave, curve, gap = 120, 60, 150, 10
    image = Image.new("RGB", (width, tile + wave + curve + 5 * gap), "white")
    draw = ImageDraw.Draw(image)
    count = width // tile
    for i in range(count):
        k = min(int((i + 0.5) / count * seconds * fps), frames.shape[1] - 1)
        image.paste(to_picture(frames[:, k]).resize((tile - 2, tile - 2), Image.LANCZOS), (i * tile + 1, gap // 2))
    peak, middle = max(wav.abs().max().item(), 1e-6), tile + gap + wave / 2
    for x in range(width):
        part = wav[int(x / width * seconds * RATE):int((x + 1) / width * seconds * RATE)]
        high = wave / 2 * (part.abs().max().item() / peak if len(part) else 0)
        draw.line([x, middle - high, x, middle + high], fill=(120, 130, 150))
    top, bottom = tile + wave + 2 * gap, tile + wave + curve + 2 * gap

    def points(values):
        return [(k / fps / seconds * width, bottom - curve * min(max(v, 0), 1.1) / 1.1) for k, v in enumerate(values.tolist())]

    asked, seen = points(target[:, 0]), points(measured[:, 0])
    draw.polygon([(asked[0][0], bottom), *asked, (asked[-1][0], bottom)], fill=(250, 214, 190))
    draw.line(seen, fill=(124, 6, 36), width=2)
    for second in range(int(seconds) + 1):
        draw.line([second / seconds * width, top, second / seconds * width, bottom], fill=(225, 225, 225))
        draw.text((second / seconds * width + 3, bottom), f"{second} s", fill=(90, 90, 90))
    draw.text((gap, bottom + 14), "mouth opening: asked for by the sound (filled), seen (line)", fill=(90, 90, 90))
    return image


def mouth_lines(measured, target):
    """The rows of the table that are about the mouth.  measured None: not a drawn one; target None: no sound"""
    if measured is None:
        return ["mouth        none in the colours of the drawn faces: opening and width are not measured"]
    means = f"mean {measured[:, 0].mean():.2f}" + (f", asked for {target[:, 0].mean():.2f}" if target is not None else "")
    if target is None or len(target) < SHORTEST:
        return [f"opening      {means}; " + ("no sound to compare it with" if target is None else f"compared from {SHORTEST} frames on")]
    lag, best, now = sync(measured[:, 0], target[:, 0])
    return [f"opening      r {now:.3f} at lag 0, best {best:.3f} at lag {lag:+d} frames; {means}",
            f"width        r {width_correlation(measured, target):.3f} while open"]


def person_line(frames, picture):
    """The row about who is seen, for the picture (3, h, w) of a drawn face; strangers are the scale."""
    strangers = reference(held_out_identities(20, seed=1000), torch.Generator().manual_seed(0))     # a seed of its own: not evaluate.py's people
    own, *others = identity_distance(frames, torch.cat([at_size(picture[:, None]).transpose(0, 1), strangers])).tolist()
    return f"person       {own:.3f} from the picture, the nearest of 20 strangers {min(others):.3f} (0: the same; what a caption changes counts)"


def clip_line(i, clip):
    """The row about clip i, an entry of `drift`."""
    opening = "" if clip["opening"] is None else f"opening r {clip['opening']:.3f}, "
    return f"clip {i:<7} {opening}colour off by {clip['colour']:.3f}, contrast x {clip['contrast']:.2f}, sharpness x {clip['sharpness']:.2f}"


def report(path, audio=None, image=None, clip_frames=None, start=0.0, fps=FPS):
    """Measure a written video -> (lines of a table, PIL plot or None without sound or a drawn mouth)"""
    if start and not audio:
        raise ValueError(f"--start {start:g} is about the file of --audio: give both, or neither for the video's own sound")
    frames, fps = read_video(path, fps)
    P, (height, width) = frames.shape[1], frames.shape[2:]
    heard = audio or not Path(path).is_dir() and probe(path, count=False).has_audio
    target, wav = target_of(path, P, fps, audio, start) if heard else (None, None)
    measured = measure(frames) if has_mouth(frames) else None
    picture = frames[:, 0] if image is None else fit_picture(load_image(image), (height, width))
    if clip_frames is None:
        clip_frames = CLIP if heard else P + 3                                # without sound it is not S2V: one clip
    clips, seam = drift(frames, picture, clip_frames, clip_frames - 3, measured, target)
    lines = [f"video        {P} frames of {width}x{height} at {fps:g} fps, {f'sound {len(wav) / RATE:.2f} s' if heard else 'no sound'}"]
    lines += mouth_lines(measured, target)
    if image is not None and measured is not None and has_mouth(picture[:, None]):
        lines.append(person_line(frames, picture))
    lines += [f"{clip_line(i, c)} {'the first frame' if image is None else 'the picture'}'s" for i, c in enumerate(clips)]
    lines += [f"seam         {seam:.2f} times the median difference of two frames"] if len(clips) > 1 else []
    return lines, plot(frames, fps, wav, measured, target) if heard and measured is not None else None


def main(argv=None):
    any_terminal()
    p = argparse.ArgumentParser(description="Measure a video: lips against sound, drift against the picture.")
    p.add_argument("video", help="mp4, or folder of PNG frames, that sample.py wrote")
    p.add_argument("--audio", help="sound to compare with (default: the video's own; a folder has none)")
    p.add_argument("--start", type=float, default=0.0, help="seconds to skip in --audio, as given to sample.py (default: 0)")
    p.add_argument("--image", help="reference picture (default: the first frame)")
    p.add_argument("--fps", type=float, default=FPS, help=f"of a folder of PNG frames (default: {FPS})")
    p.add_argument("--clip-frames", type=int, help="frames made at once, as given to sample.py; the first clip is 3 shorter, the last may end "
                   f"early (default: {CLIP} with sound, for only S2V makes clips; without sound the video is one clip)")
    args = p.parse_args(argv)
    try:
        lines, image = report(args.video, args.audio, args.image, args.clip_frames, args.start, args.fps)
        print("\n".join(lines))
        if image:
            image.save(target := str(Path(args.video).with_suffix(".metrics.png")))
            print(f"wrote        {target}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
