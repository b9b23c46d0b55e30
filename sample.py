"""Make a video: python sample.py --audio voice.wav --image face.png

Reads the checkpoint's task from its config, prints the plan before any weight is loaded, writes frames as clips are finished.
Exit status 2 and one line on stderr for anything wrong with the input; no half-written file is left.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from convert_weights import open_checkpoint
from fake_checkpoint import ensure_tiny
from video import check_output
from wan_s2v import MAX_CLIP_FRAMES, Options, Stages, WanS2VPipeline, open_writer, run_dtype

TINY = Path(__file__).parent / "weights" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXAMPLES = """examples
  python sample.py --audio voice.wav --image face.png                      tiny checkpoint, any laptop, no downloads
  python sample.py --audio voice.m4a --image face.jpg --ckpt Wan2.2-S2V-14B --prompt "a woman is singing"
  python sample.py --audio talk.mp3 --start 12.5 --duration 10 --image face.png --seed 7 --out talk.mp4
  python sample.py --audio voice.wav --image face.png --ckpt Wan2.2-S2V-14B --size 1280x704 --pose-video dance.mp4
"""


def size(text):
    """"832x480" -> (832, 480)"""
    try:
        width, height = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted WIDTHxHEIGHT such as 832x480, got {text!r}") from None
    if width < 1 or height < 1:
        raise argparse.ArgumentTypeError(f"wanted two positive numbers, got {text!r}")
    return width, height


def parser():
    """The command line. A default of None is the checkpoint's own value, named in the help."""
    p = argparse.ArgumentParser(description="One picture and one sound become one video.", epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what goes in")
    g.add_argument("--audio", help="speech or song: wav, flac, ogg, mp3, m4a, aac, opus, webm or a video's sound (required)")
    g.add_argument("--image", help="reference picture: who or what is seen (required)")
    g.add_argument("--prompt", default="", help="what happens in the scene (default: empty)")
    g.add_argument("--negative-prompt", help="what must not be seen (default: the checkpoint's)")
    g.add_argument("--pose-video", help="video whose motion is followed, sampled at 16 fps (default: none)")
    g.add_argument("--start", type=float, default=0.0, help="seconds to skip in the audio (default: 0)")
    g.add_argument("--duration", type=float, help="seconds of the audio to use (default: to its end)")
    g = p.add_argument_group("what comes out")
    g.add_argument("--out", default="out.mp4", help="mp4 file, or a folder ending in / for PNG frames (default: out.mp4)")
    g.add_argument("--size", type=size, metavar="WxH", help="pixel budget; the picture keeps its shape (default: S2V-14B 1024x704, tiny 128x128)")
    g.add_argument("--clips", type=int, help="clips to make, at most (default: as many as the audio needs)")
    g.add_argument("--clip-frames", type=int, help=f"frames made at once, a multiple of 4, at most {MAX_CLIP_FRAMES} (default: 80)")
    g.add_argument("--start-from-ref", action="store_true", help="begin with the reference picture itself (default: off)")
    g.add_argument("--av-offset", type=int, default=0, metavar="FRAMES",
                   help="play the sound this many frames later, or earlier if negative: -3 undoes the official lead of the mouth over the "
                        "sound, 187.5 ms (default: 0, as official)")
    g = p.add_argument_group("sampler")
    g.add_argument("--steps", type=int, help="denoising steps per clip (default: S2V-14B 40, tiny 12)")
    g.add_argument("--shift", type=float, help="schedule shift towards high noise (default: S2V-14B 3)")
    g.add_argument("--guidance", type=float, help="classifier-free guidance, 1 turns it off (default: S2V-14B 4.5)")
    g.add_argument("--solver", help="unipc, dpm++ or euler (default: unipc)")
    g.add_argument("--seed", type=int, default=42, help="seed of clip 0; clip r uses seed + r (default: 42)")
    g = p.add_argument_group("machine")
    g.add_argument("--ckpt", help="folder in the official or converted layout (default: a tiny random one, made on first use)")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    g.add_argument("--dtype", choices=DTYPES, help="of the large linear layers (default: bfloat16 on a GPU, float32 on a CPU)")
    return p


class Progress:
    """A bar per clip, with the time that all clips together still need."""

    def __init__(self, clips):
        self.clips, self.start = clips, time.perf_counter()

    def __call__(self, clip, steps):
        with tqdm(steps, desc=f"clip {clip + 1}/{self.clips}", unit="step") as bar:
            for n, step in enumerate(bar, 1):
                yield step
                done = clip * len(steps) + n
                left = (time.perf_counter() - self.start) / done * (self.clips * len(steps) - done)
                bar.set_postfix_str(f"all clips {tqdm.format_interval(left)} left")


def checkpoint_folder(ckpt):
    if ckpt is not None:
        return Path(ckpt)
    print(f"no --ckpt: using the tiny checkpoint {TINY.relative_to(TINY.parent.parent)}; its weights are random, so the picture is noise: "
          "it shows that everything runs, not what the model can do")
    ensure_tiny(TINY)
    return TINY


def main(args):
    check_output(args.out)
    for name in ("audio", "image"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is required: give a file (see --help)")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    checkpoint = open_checkpoint(checkpoint_folder(args.ckpt))
    pipeline = WanS2VPipeline(checkpoint, device, run_dtype(DTYPES.get(args.dtype), device))
    options = Options(args.audio, args.image, args.prompt, args.negative_prompt, args.size and args.size[0] * args.size[1], args.steps,
                      args.shift, args.guidance, args.solver, args.seed, args.clips, args.clip_frames, None, args.pose_video,
                      args.start_from_ref, args.start, args.duration)
    plan = pipeline.plan(options)
    print(plan)
    stages = Stages()
    with open_writer(args.out, (plan.height, plan.width), plan.options, args.av_offset) as writer:
        try:
            for frames in pipeline.generate(plan, stages, Progress(plan.clips)):
                with stages("write"):
                    writer.write(frames)
        except (KeyboardInterrupt, RuntimeError):                    # RuntimeError: out of memory
            if kept := writer.finish_partial():
                print(f"the clips finished so far are kept as {kept}", file=sys.stderr)
            raise
    print(f"times    {stages}")
    print(f"wrote    {writer.summary}")


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the device is out of memory: choose a smaller --size or fewer --clip-frames", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
