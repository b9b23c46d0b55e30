"""Make a video.

    python sample.py --audio voice.wav --image face.png                            S2V: picture + sound
    python sample.py --ckpt Wan2.2-T2V-A14B --prompt "..."                         T2V, and likewise I2V and TI2V

The task is written in the checkpoint; what must be given follows from it.

Prints the plan before any weight is loaded, writes frames as clips are finished. Exit status 2 and one line on stderr for anything wrong
with the input; no half-written file is left. What is finished when a run ends early is kept, and the same command goes on.
"""
from jobs import stop

if __name__ == "__main__":                                           # before the long imports: a signal in them is no traceback
    stop.watch()
import argparse
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import fields

START = time.perf_counter()
if __name__ == "__main__":      # before torch: else freed memory is lost to larger tensors, and threads that wait keep the cores from other programs
    os.environ |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "GOMP_SPINCOUNT": "1000"} | os.environ
import torch
from tqdm import tqdm

from fast.plan import COMPILE_SECONDS, MAX_CLIP_FRAMES, RunConfig
from fast.probe import any_terminal, cap_memory, pick_device
from formats.checkpoints import SAMPLING, change_denoisers, open_checkpoint
from wan_s2v import Progress, Stages, WanS2VPipeline, run_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXAMPLES = """examples
  python sample.py --audio voice.wav --image face.png                      tiny checkpoint: a drawn face, any laptop, no downloads
  python sample.py --audio voice.m4a --image face.jpg --ckpt Wan2.2-S2V-14B --prompt "a woman is singing"
  python sample.py --audio talk.mp3 --start 12.5 --duration 10 --image face.png --seed 7 --out talk.mp4
  python sample.py --audio voice.wav --image face.png --ckpt Wan2.2-S2V-14B --size 1280x704 --pose-video dance.mp4
  python sample.py --batch talks/ --image face.png --out videos/           every sound of a folder; or --batch jobs.jsonl
  python sample.py --ckpt weights/tiny-t2v --prompt "a cat on a roof"      (also weights/tiny-i2v, weights/tiny-ti2v)
"""


def size(text):
    """"832x480" -> (832, 480)"""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"wanted WIDTHxHEIGHT such as 832x480, got {text!r}")
    return int(found[1]), int(found[2])


def numbers(text):
    """"4.5" -> (4.5,), "3,4" -> (3.0, 4.0)"""
    try:
        values = tuple(float(n) for n in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(f"wanted a number, or two with a comma between, got {text!r}")
    return values


def own(name, but=None):
    """What the checkpoints of each task have as default, for the help."""
    def text(value):
        return "x".join(map(str, value)) if name == "size" else ",".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value:g}"
    return "the checkpoint's: " + ", ".join(f"{task} {text(values[name])}" for task, values in SAMPLING.items() if task != but)


def parser():
    """The command line. A default of None is the checkpoint's own value, named in the help."""
    p = argparse.ArgumentParser(description="One picture and one sound become one video; with other checkpoints a prompt, or a picture.", epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = one_line
    g = p.add_argument_group("what goes in")
    g.add_argument("--audio", metavar="FILE", help="speech or song: wav, flac, ogg, mp3, m4a, aac, opus, webm or a video's sound (S2V: required)")
    g.add_argument("--image", metavar="FILE", help="reference picture: who or what is seen (S2V, I2V: required; TI2V: may be given)")
    g.add_argument("--prompt", default="", help="what happens in the scene (T2V: required; default: empty); weights/tiny knows black, brown, yellow, "
                   "red, grey hair; blue, green, purple, yellow, white background; happy, sad: 'a person with red hair, happy'")
    g.add_argument("--negative-prompt", help="what must not be seen (default: the checkpoint's)")
    g.add_argument("--pose-video", metavar="FILE", help="video whose motion is followed, sampled at 16 fps (default: none)")
    g.add_argument("--start", type=float, default=0.0, help="seconds to skip in the audio (default: 0)")
    g.add_argument("--duration", type=float, help="seconds of the audio to use (default: to its end)")
    g.add_argument("--batch", metavar="FILE", help="make many videos. FILE has a job a line, as JSON: options under their long names, which "
                   "override those given here: {\"audio\": \"a.wav\", \"image\": \"b.png\", \"out\": \"x.mp4\", \"seed\": 3}, names of files as seen "
                   "from the folder of FILE. Or a folder, for a job per sound in it; --image is then a picture, or a folder with a picture of "
                   "the same name for each. --out is a folder, ending in / (default: that of FILE). A bad job gets its line, the others go on; "
                   "FILE.summary.json, or batch.json in the folder, says how all stand; the same command again makes what is missing. Exit "
                   "status 0 if all are done")
    g = p.add_argument_group("what comes out")
    g.add_argument("--out", default="out.mp4", help="mp4 file, or a folder ending in / for PNG frames (default: out.mp4)")
    g.add_argument("--restart", action="store_true", help="begin anew whatever an earlier run has left in OUT.parts (default: go on there); "
                   "in a batch also make again what was made from something else, or not by this batch (default: refused)")
    g.add_argument("--keep-parts", action="store_true", help="keep that folder when all is done (default: off)")
    g.add_argument("--save-every", type=int, metavar="STEPS", help="steps of the sampler after which a run that ends early can "
                   "go on, beside every clip (default: 10, or more where saving would take over 1%% of the time)")
    g.add_argument("--size", type=size, metavar="WxH", help="with a picture a budget of pixels, in the picture's shape; without one the exact "
                   f"size (default: {own('size')})")
    g.add_argument("--enlarge", action="store_true", help="scale a picture of fewer pixels up to that size (S2V; default: off, as official)")
    g.add_argument("--frames", type=int, help="of the video (S2V: at most, default as long as the audio; others 4n + 1, default "
                   f"{own('frames', but='s2v-14B')})")
    g.add_argument("--clips", type=int, help="clips to make, at most (default: as many as the audio needs)")
    g.add_argument("--clip-frames", type=int, help=f"frames made at once, a multiple of 4, at most {MAX_CLIP_FRAMES} (default: "
                   f"{SAMPLING['s2v-14B']['frames']})")
    g.add_argument("--start-from-ref", action="store_true", help="begin with the reference picture itself (default: off; weights/tiny then "
                   "speaks 3 frames late: add --av-offset 3)")
    g.add_argument("--official", action="store_true", help="place picture and pose as the official code does, with bars where they fall short, "
                   "and end as it does, up to 0.25 s before the sound (S2V; default: they cover the frame, the last frame is held)")
    g.add_argument("--av-offset", type=int, default=0, metavar="FRAMES",
                   help="play the sound this many frames later, or earlier if negative: -3 undoes the official lead of the mouth over the "
                        "sound, 187.5 ms (default: 0, as official)")
    g = p.add_argument_group("sampler")
    g.add_argument("--steps", type=int, help=f"denoising steps (default: {own('steps')})")
    g.add_argument("--shift", type=float, help=f"schedule shift towards high noise (default: {own('shift')})")
    g.add_argument("--guidance", type=numbers, help="classifier-free guidance, 1 turns it off; two values LOW,HIGH for the low- and high-noise "
                   f"experts (default: {own('guidance')})")
    g.add_argument("--solver", help="unipc, dpm++ or euler (default: unipc)")
    g.add_argument("--speed", metavar="HOW", help="reference (every step is computed), balanced, draft: steps that are guessed from earlier ones; or "
                   "single tricks such as gate=0.5,forecast=0.75, see docs/speed.md (default: reference)")
    g.add_argument("--seed", type=int, default=42, help="seed of clip 0; clip r uses seed + r (default: 42)")
    g = p.add_argument_group("machine")
    g.add_argument("--ckpt", help="folder in the official or converted layout (default: weights/tiny, trained on drawn faces)")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    g.add_argument("--dtype", choices=DTYPES, help="of the large linear layers (default: bfloat16 on a GPU, float32 on a CPU)")
    g.add_argument("--vae-dtype", choices=DTYPES, help="of the VAE; float16 is within 1/255 of the official float32 and twice as fast "
                   "(default: float16 on a GPU, float32 on a CPU)")
    g.add_argument("--vram", type=float, metavar="GB", help="plan for a card of this size and take no more (default: what is free)")
    g.add_argument("--fp8", action=argparse.BooleanOptionalAction,
                   help="cast the large matrices to float8 while loading, or with --no-fp8 back to bfloat16 (default: as the checkpoint has them)")
    g.add_argument("--resident", type=int, metavar="N", help="blocks that stay on the GPU, the others are streamed (default: as many as fit)")
    g.add_argument("--attention8", action=argparse.BooleanOptionalAction, default=False,
                   help="self-attention in 8 bits: faster on GPUs with 8-bit tensor cores, off by 3.6%% of each attention output on "
                        "random inputs (default: off)")
    g.add_argument("--parallel", choices=("auto", "guidance", "sequence", "batch"), default="auto", help="under torchrun --nproc-per-node N: what is "
                   "spread over N GPUs, the two branches of guidance, then tokens; tokens alone; or the jobs of --batch (default: by N, see "
                   "docs/parallel.md)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks (default: on a GPU, where it saves more "
                   f"than the {COMPILE_SECONDS} s that it takes)")
    p.set_defaults(world=None)                                       # of many processes, see jobs/ranks.py
    from jobs.live_plan import options                                   # here: importing `sample` does not need it
    options(p)
    return p


def one_line(message):
    """In place of argparse's error: no usage, one line (see cli)."""
    raise ValueError(f"{message} (see --help)")


def open_folder(ckpt):
    """The checkpoint of a folder (see `local_folder`), saying where its numbers come from if from no published model."""
    from formats.find import local_folder                            # here, as below: importing `sample` does not need it
    folder = local_folder(ckpt)
    checkpoint = open_checkpoint(folder)
    if checkpoint.note:
        print(f"using {folder.parent.name}/{folder.name}, {checkpoint.note}")
    return checkpoint


def choices(args):
    """Where and how to run, as fields of RunConfig."""
    device = pick_device(args.device)
    if args.attention8:
        from fast import attention8
        attention8.check(device)
    return dict(device=device, dtype=run_dtype(DTYPES.get(args.dtype), device), vae_dtype=DTYPES.get(args.vae_dtype), fp8=bool(args.fp8),
                compile=args.compile, attention8=args.attention8, resident=args.resident)


def open_pipeline(args):
    """The pipeline of a command line, or of all jobs of a batch."""
    if args.vram is not None and not args.vram > 0:
        raise ValueError(f"--vram wants the size of a card in GB, got {args.vram:g}")
    checkpoint = open_folder(args.ckpt)
    if args.fp8 is False:
        from fast import fp8
        checkpoint = change_denoisers(checkpoint, lambda _, part: fp8.multiplied_out(part.tensors))
    if args.live:
        from jobs.live_plan import with_loras
        checkpoint = with_loras(checkpoint, args.lora)
    ranks = args.world.arrange(args, checkpoint) if args.world and args.batch is None and not args.live else None
    pipeline = WanS2VPipeline(checkpoint, args.vram, keep=args.batch is not None, ranks=ranks, **choices(args))
    cap_memory(pipeline.device, args.vram)
    return pipeline


def plan_of(pipeline, args):
    return pipeline.plan(**{field.name: getattr(args, field.name) for field in fields(RunConfig) if field.name not in pipeline.choices})


def make_video(pipeline, args):
    """Plan, make and write one video, saying so."""
    plan = plan_of(pipeline, args)
    print(plan)
    from fast.estimate import estimate_seconds, other_seconds        # here: importing `sample` does not need it
    from media.video import is_folder, open_writer
    denoising, other = estimate_seconds(plan), other_seconds(plan, pipeline.checkpoint.configs["vae"], is_folder(args.out))
    print(f"time     about {tqdm.format_interval(round(denoising + other))} in all from here, {tqdm.format_interval(round(denoising))} of it denoising")
    stages, progress = Stages(pipeline.device), Progress(plan.clips, pipeline.device, START)
    writer = open_writer(args.out, plan, args.av_offset, pipeline.checkpoint, every=args.save_every, keep=args.keep_parts, restart=args.restart)
    try:
        with writer:
            if went := writer.parts.progress():
                print(f"going on after {went}")
            if ranks := pipeline.networks.ranks:                     # the others go on with it
                ranks.once(lambda: (writer.parts.done, {name: writer.parts.load(name) for name in writer.parts.states}))
            for frames in pipeline.generate(plan, stages, progress, writer.parts):
                with stages("write"):
                    writer.write(frames)
                with stages("save"):
                    writer.renew_partial()
    except BaseException:
        for line in (writer.kept, stages.gib and f"memory   {stages.memory()}"):
            if line:
                tell(line)
        raise
    print(f"steps    {progress}")
    print(f"times    {stages}")
    print(f"memory   {stages.memory()}")
    print(f"wrote    {writer.summary}")


def main(args):
    """-> exit status"""
    if args.parallel != "auto" and args.world is None:
        raise ValueError(f"--parallel {args.parallel} wants several processes: torchrun --nproc-per-node 4 sample.py ...")
    from jobs.live_plan import check_stream                          # here, as below: importing `sample` does not need it
    if check_stream(args):
        from jobs.live import run_live
        return run_live(args, sys.modules[__name__])
    if args.batch is not None:
        from jobs.batch import run_batch
        return run_batch(args, sys.modules[__name__])
    from media.video import check_output
    check_output(args.out, inputs=(args.audio, args.image, args.pose_video))
    make_video(open_pipeline(args), args)
    return 0


def tell(line):
    """On stderr, if there still is a terminal."""
    with suppress(OSError):
        print(line, file=sys.stderr)


def cli(argv=None):
    """Run the command line -> exit status: 0, 2 for anything wrong with the input or the machine, 130, 143, 129 for Ctrl-C, SIGTERM, SIGHUP."""
    any_terminal()
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:          # torchrun
        from jobs.ranks import run_rank
        return run_rank(argv, sys.modules[__name__])
    stop.working = True
    try:
        code = run(argv)
        if not (code and stop.number):                               # a signal may show itself as an error of what it has ended
            return code
    except BaseException as error:
        if not (stop.number or isinstance(error, KeyboardInterrupt)):
            raise
    tell("stopped")
    return stop.status()


def run(argv):
    """-> exit status; errors of the input and of the machine are a line"""
    args = None
    try:
        return main(args := parser().parse_args(argv))
    except Exception as error:
        from jobs.explain import explain
        if (line := explain(error, args)) is None:
            raise
        tell(f"error: {line}")
    return 2


if __name__ == "__main__":
    code = cli()
    stop.end(code)
    sys.exit(code)
