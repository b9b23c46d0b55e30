"""Meters for videos: does the mouth follow the sound, does the picture drift, who is it. From pixels and sound alone.

    python metrics.py out.mp4 [--audio a.wav] [--image ref.png]

prints a table and writes out.metrics.png: frames over the waveform, with the opening that was seen and the one that the sound asks for.
The mouth is read from drawn faces (faces.py) only; drift and seams of any video.

Axes    P pixel frames   h w picture size; videos are (3, P, h, w) float in [-1, 1]
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from audio import RATE, load_audio
from faces import INSIDE, LIP, LIPS, NARROW, OPEN, SIZE, WIDE, articulation
from pictures import fit_picture, load_image
from video import probe, read_frames

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])            # BT.709: sharp in an mp4, its colours have half the resolution
WHERE = slice(62, 104), slice(34, 94)                    # rows and columns of a 128-pixel picture in which the mouth is looked for
REDDER, BLUER = (0.30, 0.44), (-0.06, 0.02)              # lips and mouth have red - green and blue - green above, all else below
STRAY = 3.0                                              # pixels of inside that could be noise: they open no mouth
MOUTH_AREA = 30.0                                        # pixels of lips and inside: less is no drawn mouth; a closed one has 130
SEEN_OPEN = 0.15                                         # the width of a mouth is compared where it is open more than this
LAGS = range(-5, 6)                                      # frames


# ---- the mouth ------------------------------------------------------------------------------------------------------------------------

def mouth_masks(frames):
    """frames (3, P, 128, 128) -> two (P, rows, columns), 0 to 1: lips and inside; inside alone."""
    rgb = (frames[:, :, WHERE[0], WHERE[1]].permute(1, 2, 3, 0).float() + 1) / 2                  # (P, rows, columns, 3)
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
    lips, x = mouth.sum(1), torch.arange(mouth.shape[2], device=mouth.device)
    middle = (lips * x).sum(1) / (lips.sum(1) + 1e-6)
    deviation = ((lips * (x - middle[:, None]).square()).sum(1) / (lips.sum(1) + 1e-6)).sqrt()
    half_width = torch.lerp(2 * deviation - LIP, area / (torch.pi * half_height + 1e-6), (opening / 0.3).clamp(0, 1))
    return torch.stack([opening, (half_width - NARROW) / (WIDE - NARROW)], dim=1).cpu()


def has_mouth(frames):
    """Whether at least half of the frames show a mouth in the colours of a drawn one."""
    mouth, _ = mouth_masks(at_size(frames))
    return (mouth.sum((1, 2)) > MOUTH_AREA).float().mean().item() >= 0.5


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
    if measured.shape != target.shape or P < 16:
        raise ValueError(f"sync wants two curves of one length, 16 frames or more, got {len(measured)} and {P}: cut both alike")
    scores = {lag: correlation(measured[max(0, lag):P + min(0, lag)], target[max(0, -lag):P - max(0, lag)]) for lag in LAGS}
    lag = max(scores, key=lambda lag: (scores[lag], -abs(lag)))
    return lag, scores[lag], scores[0]


def width_correlation(measured, target):
    """Correlation of the widths, both (P, 2), over the frames in which the target is open: a closed mouth has none to speak of."""
    seen = target[:, 0] > SEEN_OPEN
    return correlation(measured[seen, 1], target[seen, 1]) if seen.sum() > 2 else 0.0


def target_of(path, frames, fps, audio=None):
    """What the mouth should do in a written video: the articulation of its own sound (or of another file) -> (frames, 2), and the sound."""
    wav = load_audio(audio or path)
    return articulation(wav, torch.arange(frames) / fps), wav


# ---- the picture ----------------------------------------------------------------------------------------------------------------------

def looks(frames):
    """frames (3, P, h, w) -> mean colour (3,), contrast (standard deviation of luma), sharpness (mean |Laplacian| of luma); 0 to 1 scale"""
    rgb = (frames.float() + 1) / 2
    luma = torch.einsum("cphw,c->phw", rgb, LUMA.to(rgb))
    laplacian = 4 * luma[:, 1:-1, 1:-1] - luma[:, :-2, 1:-1] - luma[:, 2:, 1:-1] - luma[:, 1:-1, :-2] - luma[:, 1:-1, 2:]
    return rgb.mean((1, 2, 3)), luma.std((1, 2)).mean().item(), laplacian.abs().mean().item()


def drift(frames, picture, clip_frames=80, first=77):
    """How each clip of a video differs from the reference picture, and how the clips join.

    frames   (3, P, h, w)        picture  (3, h, w), what the video was made from
    first    frames of the first clip, clip_frames of each other one
    returns  (clips, seam): a list of dicts, one per clip: colour (largest difference of the mean red, green or blue, 0 to 1), contrast and
             sharpness (ratios to the picture's); the mean picture jump at the joins / median difference of two frames, 1.0 for one clip
    """
    colour, contrast, sharpness = looks(picture[:, None])
    starts = [0, *range(first, frames.shape[1], clip_frames)]
    clips = []
    for start, end in zip(starts, [*starts[1:], frames.shape[1]]):
        c, k, s = looks(frames[:, start:end])
        clips.append({"colour": (c - colour).abs().max().item(), "contrast": k / (contrast + 1e-6), "sharpness": s / (sharpness + 1e-6)})
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

def read_video(path):
    """mp4 -> frames (3, P, h, w) float32 in [-1, 1], fps.  raises ValueError without a picture"""
    info = probe(path, count=False)
    if info.video_codec is None:
        raise ValueError(f"wanted a video, got {path} without a picture: give the file that sample.py wrote")
    frames = torch.from_numpy(np.stack(list(read_frames(path))))                                  # (P, h, w, 3) uint8
    return frames.permute(3, 0, 1, 2) / 127.5 - 1, info.fps


def to_picture(frame):
    """(3, h, w) in [-1, 1] -> PIL image"""
    return Image.fromarray(((frame.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


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
    """The rows of the table that are about the mouth."""
    lag, best, now = sync(measured[:, 0], target[:, 0])
    return (f"opening      r {now:.3f} at lag 0, best {best:.3f} at lag {lag:+d} frames; mean {measured[:, 0].mean():.2f}, "
            f"asked for {target[:, 0].mean():.2f}",
            f"width        r {width_correlation(measured, target):.3f} while open")


def report(path, audio=None, image=None, clip_frames=80):
    """Measure a written video -> (lines of a table, PIL plot or None if no drawn mouth is seen)"""
    frames, fps = read_video(path)
    target, wav = target_of(path, frames.shape[1], fps, audio)
    picture = frames[:, 0] if image is None else fit_picture(load_image(image), frames.shape[2:])
    clips, seam = drift(frames, picture, clip_frames, clip_frames - 3)
    lines = [f"video        {frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[2]} at {fps:g} fps, sound {len(wav) / RATE:.2f} s"]
    drawn = has_mouth(frames)
    if drawn:
        measured = measure(frames)
        lines += mouth_lines(measured, target)
    else:
        lines += ["mouth        none in the colours of the drawn faces: opening and width are not measured"]
    lines += [f"clip {i:<7} colour off by {c['colour']:.3f}, contrast x {c['contrast']:.2f}, sharpness x {c['sharpness']:.2f} "
              f"{'the first frame' if image is None else 'the picture'}'s" for i, c in enumerate(clips)]
    lines += [f"seam         {seam:.2f} times the median difference of two frames"] if len(clips) > 1 else []
    return lines, plot(frames, fps, wav, measured, target) if drawn else None


def main(argv=None):
    p = argparse.ArgumentParser(description="Measure a video: lips against sound, drift against the picture.")
    p.add_argument("video", help="mp4 that sample.py wrote")
    p.add_argument("--audio", help="sound to compare with (default: the video's own)")
    p.add_argument("--image", help="reference picture (default: the first frame)")
    p.add_argument("--clip-frames", type=int, default=80, help="frames made at once (default: 80)")
    args = p.parse_args(argv)
    try:
        lines, image = report(args.video, args.audio, args.image, args.clip_frames)
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
