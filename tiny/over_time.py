"""Does a long video drift? Lips against sound, colour, sharpness and person, every ten seconds, as a table and a plot.

    python -m tiny.over_time out.mp4 --image samples/face.png [--every 10]         writes out.over_time.png

Frames are read one window at a time, so that an hour takes no more memory than a minute. The mouth and the person are read from drawn faces only.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from fast.probe import any_terminal
from media.ffmpeg import probe
from media.frames import read_frames
from media.pictures import fit_picture, load_image
from media.sound import RATE, load_audio
from tiny.faces import articulation, held_out_identities, reference
from tiny.metrics import SEEN_OPEN, SHORTEST, at_size, correlation, identity_distance, measure, picture_statistics, sync

COLUMNS = {"r": "opening", "lag": "lag", "colour": "colour off by", "sharpness": "sharpness x", "own": "person off by", "others": "nearest stranger"}
RANGES = {"r": (0, 1), "colour": (0, 0.1), "sharpness": (0, 2), "own": (0, 0.5)}           # of the plot


def windows(path, size):
    """Yield the frames of a video `size` at a time: (3, P, h, w) float32 in [-1, 1]"""
    held = []
    for frame in read_frames(path):
        held.append(frame)
        if len(held) == size:
            yield as_tensor(held)
            held = []
    if len(held) >= SHORTEST:
        yield as_tensor(held)


def as_tensor(frames):
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1


def rows(path, image, every):
    """-> [one dict per window: its begin in seconds, and COLUMNS; r and lag are None in silence]"""
    fps, wav = probe(path, count=False).fps, load_audio(path)
    target = articulation(wav, torch.arange(round(len(wav) / RATE * fps)) / fps)             # (P, 2), of the whole sound
    strangers, out, first = reference(held_out_identities(20, seed=1000), torch.Generator().manual_seed(0)), [], 0
    for frames in windows(path, round(every * fps)):
        if not out:
            picture = fit_picture(load_image(image), frames.shape[2:])
            colour, _, sharpness = picture_statistics(picture[:, None])
            faces = torch.cat([at_size(picture[:, None]).transpose(0, 1), strangers])
        opening, asked = measure(frames)[:, 0], target[first:first + frames.shape[1], 0]
        opening = opening[:len(asked)]
        heard = len(asked) >= SHORTEST and asked.max() > SEEN_OPEN
        c, _, s = picture_statistics(frames)
        own, *others = identity_distance(frames, faces).tolist()
        out.append(dict(begin=first / fps, r=correlation(opening, asked) if heard else None, lag=sync(opening, asked)[0] if heard else None,
                        colour=(c - colour).abs().max().item(), sharpness=s / (sharpness + 1e-6), own=own, others=min(others)))
        first += frames.shape[1]
    if not out:
        raise ValueError(f"wanted a video of {SHORTEST} frames or more, got {path}")
    return out


def table(found):
    def cell(value):
        return f"{'-':>16}" if value is None else f"{value:>16.3f}" if isinstance(value, float) else f"{value:>16d}"
    lines = [f"{'seconds':>8}" + "".join(f"{title:>16}" for title in COLUMNS.values())]
    lines += [f"{row['begin']:8.0f}" + "".join(cell(row[name]) for name in COLUMNS) for row in found]
    return lines + [f"{'median':>8}" + "".join(cell(middle([row[name] for row in found])) for name in COLUMNS)]


def middle(values):
    values = [value for value in values if value is not None]
    return float(np.median(values)) if values else None


def plot(found, width=900, height=110):
    """PIL image: one curve under the other, each with its range."""
    image = Image.new("RGB", (width, len(RANGES) * height + 20), "white")
    pen = ImageDraw.Draw(image)
    for i, (name, (low, high)) in enumerate(RANGES.items()):
        top, bottom = i * height + 18, (i + 1) * height - 6
        pen.rectangle((50, top, width - 10, bottom), outline="#bbbbbb")
        points = [(50 + (k + 0.5) / len(found) * (width - 60), bottom - (min(max(row[name], low), high) - low) / (high - low) * (bottom - top))
                  for k, row in enumerate(found) if row[name] is not None]
        pen.line(points, fill="#7c0624", width=2)
        pen.text((54, top - 14), COLUMNS[name], "black")
        for value, y in ((high, top), (low, bottom - 10)):
            pen.text((8, y), f"{value:g}", "#666666")
    pen.text((50, len(RANGES) * height + 4), f"0 to {found[-1]['begin']:.0f} s", "#666666")
    return image


def main(argv=None):
    any_terminal()
    p = argparse.ArgumentParser(description="Measure a long video of a drawn face over time.")
    p.add_argument("video", help="mp4 with sound")
    p.add_argument("--image", required=True, help="reference picture")
    p.add_argument("--every", type=float, default=10.0, help="seconds (default: 10)")
    args = p.parse_args(argv)
    try:
        if not args.every >= 1:
            raise ValueError(f"--every wants 1 second or more, got {args.every:g}")
        found = rows(args.video, args.image, args.every)
        print("\n".join(table(found)))
        plot(found).save(target := str(Path(args.video).with_suffix(".over_time.png")))
        print(f"wrote {target}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
