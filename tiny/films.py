"""Videos of angry people, a mood that the tiny model was not trained on, to try `train.py tune` with.

    python -m tiny.films data/angry --speech data/speech/train

writes NAME.mp4 with sound, NAME.txt with its caption and NAME.png with its reference picture, on which everybody is calm. Two of three are
angry, and their caption says so. The others stay calm and have no caption, so that the model learns the word and not that all are angry.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import sys
from pathlib import Path

import soundfile
import torch

from fast.probe import any_terminal
from media.sound import RATE, load_audio
from media.video import VideoWriter
from tiny import faces


def angry(people):
    """The same people with low, slanting brows and the corners of the mouth down."""
    shown = people.clone()
    shown[:, faces.COLUMN["mood"]] = faces.ANGRY
    return shown


def make_films(out, speech, videos, seconds, seed):
    """Write them into the folder `out`.  raises ValueError if there is no sound that is long enough"""
    out.mkdir(parents=True, exist_ok=True)
    sounds = [path for path in sorted(Path(speech).glob("*.ogg")) if soundfile.info(path).duration >= seconds]
    if not sounds:
        raise ValueError(f"wanted speech of {seconds:g} s or more in {speech}, got none: python -m tiny.speech data/speech makes some")
    g = torch.Generator().manual_seed(seed)
    people, frames = faces.identities(videos, g), round(seconds * faces.FPS)
    pictures, motion = faces.reference(people, g), faces.motions(videos, frames, g)
    for i, person in enumerate(people[:, None].unbind(0)):
        sound, is_angry = sounds[torch.randint(len(sounds), (), generator=g).item()], i % 3 < 2
        wav = load_audio(sound, duration=seconds)
        mouth = faces.articulation(wav, torch.arange(frames) / faces.FPS)[None]
        stem = out / f"{i:02d}"
        faces.to_picture(pictures[i]).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text("angry" * is_angry)
        soundfile.write(stem.with_suffix(".wav"), wav.numpy(), RATE)
        with VideoWriter(stem.with_suffix(".mp4"), (faces.SIZE, faces.SIZE), faces.FPS, audio=stem.with_suffix(".wav")) as film:
            film.write(faces.draw(angry(person) if is_angry else person, motion[i:i + 1], mouth)[0])
        stem.with_suffix(".wav").unlink()


def main(argv=None):
    any_terminal()
    parser = argparse.ArgumentParser(description="Make videos of a new mood, for train.py tune.")
    parser.add_argument("out", type=Path, help="folder for the videos")
    parser.add_argument("--speech", default="data/speech/train", help="folder with sound (default: data/speech/train)")
    parser.add_argument("--videos", type=int, default=18, help="(default: 18)")
    parser.add_argument("--seconds", type=float, default=5.25, help="of each; from 10 on they hold later clips, too (default: 5.25)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args(argv)
    try:
        make_films(args.out, args.speech, args.videos, args.seconds, args.seed)
        print(f"wrote {args.out}: {args.videos} videos")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
