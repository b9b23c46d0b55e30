"""`python sample.py --live`: a picture speaks while the sound is heard. Options, plan and loop."""
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import live
from fast.plan import RunConfig, frame_size, size_table
from fast.probe import GIB, free_memory, synchronize
from fast.listening import AHEAD, Listening
from media.given import default_float32
from media.pictures import fit_picture, load_image
from media.sound import RATE
from media.stream import StreamWriter, pcm
from model import PATCH, expert_index
from text import Tokenizer, encode_prompt

FRAMES = 4 * live.BLOCK      # pixel frames of a block
UNUSED = ("negative_prompt", "pose_video", "guidance", "solver", "clips", "clip_frames", "start_from_ref", "official", "batch", "restart")


def options(parser):
    """The command line's part about streams."""
    g = parser.add_argument_group("live", "blocks of 12 frames that are written while they are made; --audio - takes 16-bit 16 kHz mono from "
                                          "standard input, --out - writes to standard output; see docs/live.md")
    g.add_argument("--live", action="store_true", help="make a stream (S2V, with the LoRA of Live Avatar)")
    g.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merged into the denoiser while it is loaded (with "
                   "--live); a strength that the file does not name is said (default: none)")
    g.add_argument("--fps", type=float, default=live.FPS, help=f"of a stream: {live.FPS}, as the LoRA was trained, or 16 (default: {live.FPS})")
    g.add_argument("--window", type=int, default=live.WINDOW, help="latent frames that a block sees, itself included: a multiple of 3 (default: "
                   f"{live.WINDOW})")
    g.add_argument("--replace-ref", action="store_true", help="the first latent made takes the picture's place as reference after "
                   f"{live.WINDOW} latent frames, as the original does on several GPUs (default: off, as on one)")
    g.add_argument("--raw", action="store_true", help="write rgb24 frames without sound in place of an mp4 (default: off)")


@dataclass(frozen=True)
class LivePlan:
    """What a stream will be and take."""
    config: RunConfig
    height: int
    width: int
    fps: float
    seconds: float | None        # of sound; None: as long as it comes
    frames: float                # inf: as long as sound comes
    weights: int                 # bytes of the denoiser, or of both experts
    rings: int                   # bytes
    sizes: dict
    free: object

    def __str__(self):
        o = self.config
        sound = "standard input" if self.seconds is None else f"{self.seconds:.2f} s of {os.path.basename(o.audio)}"
        length = "as long as sound comes" if math.isinf(self.frames) else f"{self.frames} frames = {self.frames / self.fps:.2f} s"
        room = self.free.host if self.free.device is None else self.free.device
        return "\n".join((
            f"sound    {sound}",
            f"video    live: {self.width}x{self.height}, {length}, at {self.fps:g} fps, in blocks of {FRAMES}; the mouth leads the sound by "
            f"{live.WARM_UP} frames, {1000 * live.WARM_UP / self.fps:.0f} ms (--av-offset -{live.WARM_UP} undoes it)",
            f"sampler  Euler, {o.steps} steps, shift {o.shift:g} twice, no guidance, seed {o.seed}",
            f"weights  {size_table(self.sizes)}",
            f"memory   {(self.weights + self.rings) / GIB:.2f} of {room / GIB:.1f} GiB: denoiser {self.weights / GIB:.2f}, "
            f"rings {self.rings / GIB:.2f}; the same however long the stream is"))


def make_plan(pipeline, args):
    """-> LivePlan, and a Speech or None.  raises ValueError for what a stream cannot use, and where its rings cannot fit"""
    checkpoint, fps = pipeline.checkpoint, args.fps
    if given := [name for name in UNUSED if getattr(args, name)]:
        raise ValueError(f"--live has no --{given[0].replace('_', '-')}: leave it out")
    if not checkpoint.configs["denoiser"].audio_dim:
        raise ValueError(f"--live wants an S2V checkpoint, got {checkpoint.task}: give --ckpt Wan2.2-S2V-14B")
    for name, value in (("--audio", args.audio), ("--image", args.image)):
        if not value:
            raise ValueError(f"--live wants {name}: {'a sound file, or - for standard input' if name == '--audio' else 'a picture of who speaks'}")
    if not 1 <= fps <= 60:
        raise ValueError(f"--fps must be 1 to 60, got {fps:g}: {live.FPS} is what the LoRA was trained for, 16 what base S2V was")
    live.check_window(args.window)
    names = ("image", "prompt", "size", "enlarge", "seed", "frames", "start", "duration")
    config = RunConfig(**pipeline.choices, audio=args.audio, steps=args.steps or live.STEPS, shift=args.shift or live.SHIFT,
                       **{name: getattr(args, name) for name in names}).resolve(checkpoint)
    height, width, _ = frame_size(config, "s2v", checkpoint.configs["vae"].stride[1])
    speech, frames = None, math.inf
    if args.audio == "-":
        if args.start:
            raise ValueError(f"--start {args.start:g} goes with a sound file, not with standard input: leave it out")
        frames = math.inf if args.duration is None else math.ceil(args.duration * fps - 1e-6)
    else:
        from media.speech import open_speech
        speech = open_speech(args.audio, args.start, args.duration)
        frames = math.ceil(len(speech) / RATE * fps - 1e-6)
    cfg, free = checkpoint.configs["denoiser"], free_memory(pipeline.device, pipeline.vram)
    n = math.prod((height, width)) // math.prod((checkpoint.configs["vae"].stride[1] * PATCH[1],) * 2)
    from fast.plan import weigh
    weights = sum(weigh(checkpoint.parts[name], config)(None)[0] for name in used_experts(checkpoint, config))
    rings = live.ring_bytes(cfg, n, config.steps, args.window, config.dtype.itemsize)
    room = free.host if free.device is None else free.device
    if weights + rings > room:
        raise ValueError(f"{(weights + rings) / GIB:.1f} GiB of memory are wanted, {rings / GIB:.1f} of them for rings, {room / GIB:.1f} are there: "
                         f"choose a smaller --size{'' if config.fp8 else ', or add --fp8'}")
    seconds = None if speech is None else len(speech) / RATE
    return LivePlan(config, height, width, fps, seconds, min(frames, args.frames or math.inf), weights, rings, checkpoint.sizes(), free), speech


def experts_of_steps(checkpoint, config):
    """The name of the denoiser that serves each step."""
    return [checkpoint.experts[expert_index(t, checkpoint.boundary)] for t in live.schedule(config.steps, config.shift)[1].tolist()]


def used_experts(checkpoint, config):
    return sorted(set(experts_of_steps(checkpoint, config)))


def open_live(checkpoint, config, size, window=live.WINDOW, replace_ref=False):
    """Load the networks and make ready for the first block -> live.Live"""
    o = config
    encoder = checkpoint.load("text", o.device, o.dtype)
    text = encode_prompt(encoder, Tokenizer(checkpoint.tokenizer, checkpoint.configs["denoiser"].text_len), o.prompt)[None]
    del encoder
    vae = checkpoint.load("vae", o.device, o.vae_dtype)
    picture = fit_picture(load_image(o.image), size).to(o.device)[None, :, None]
    nets = {name: load_denoiser(checkpoint, name, o) for name in used_experts(checkpoint, o)}
    prepared = live.prepare([nets[name] for name in experts_of_steps(checkpoint, o)], vae, text, picture)
    return live.Live(prepared, o.seed, window, o.shift, replace_ref)


def load_denoiser(checkpoint, name, o):
    net = checkpoint.load(name, o.device, o.dtype, o.fp8)
    if o.device.type == "cpu":
        return net
    from fast.blocks import FastDenoiser
    return FastDenoiser(net, compile=o.compile is not False)


# ----------------------------------------------------------------------------------------------------------------------------- sound

def from_file(speech, checkpoint, config, fps, frames):
    """Yield per block the features (S, C, 12) of a sound file and how many frames there will be in all, until it ends."""
    from fast.hearing import Hearing
    hearing = Hearing(speech, checkpoint.configs["audio"], lambda: checkpoint.load("audio", config.device, torch.float32), config.device, fps, FRAMES)
    for first in range(0, frames + live.WARM_UP, FRAMES):
        yield hearing(first, first + FRAMES), frames


def from_pipe(file, checkpoint, config, fps, frames, heard):
    """The same of 16-bit samples from a pipe, each block as soon as it can be heard.  heard  takes what was read, for the sound under the picture"""
    listening, first, done = Listening(checkpoint.load("audio", config.device, torch.float32), fps), 0, False
    while first < frames + live.WARM_UP:
        while not done and (missing := listening.wanted(first + FRAMES) - listening.heard) > 0:
            samples = pcm(file, missing)
            done = len(samples) < missing
            listening.hear(samples, done)
            heard(samples)
        if not listening.heard:
            raise ValueError("wanted 16-bit 16 kHz mono samples on standard input, got none: pipe them in, as "
                             "`ffmpeg -i a.wav -f s16le -ar 16000 -ac 1 -`")
        if done:                                                     # now it is known where the sound ends
            frames = min(frames, math.ceil(listening.heard / RATE * fps - 1e-6))
        if first < frames + live.WARM_UP:
            yield listening(first, first + FRAMES), frames
        first += FRAMES


class Under:
    """The sound under the picture: samples come in pieces of any length, leave as long as the frames they go with.

    shift  seconds by which it comes later, or earlier if negative
    """

    def __init__(self, rate, channels, fps, shift, pieces=()):
        self.rate, self.channels, self.fps, self.pieces, self.given, self.frames = rate, channels, fps, iter(pieces), 0, 0
        self.skip = max(0, round(-shift * rate))
        self.waiting = deque([np.zeros((max(0, round(shift * rate)), channels), np.float32)])

    def hear(self, samples):
        self.waiting.append(np.asarray(samples, np.float32).reshape(len(samples), -1))

    def below(self, frames):
        """The samples under the next so many frames; fewer where there are no more."""
        self.frames += frames
        end, out = round(self.frames / self.fps * self.rate), []
        while self.given < end:
            if not self.waiting:
                if (piece := next(self.pieces, None)) is None:
                    break
                self.waiting.append(piece)
            piece = self.waiting.popleft()
            piece, self.skip = piece[self.skip:], max(0, self.skip - len(piece))
            taken, rest = piece[:end - self.given], piece[end - self.given:]
            if len(rest):
                self.waiting.appendleft(rest)
            self.given += len(taken)
            out.append(taken)
        return np.concatenate(out) if out else None


# ------------------------------------------------------------------------------------------------------------------------- the program

def run_live(args, sample):
    """-> exit status"""
    pipe = None
    if args.out == "-":                                              # what is printed must not come between the bytes
        pipe = os.dup(1)
        os.dup2(2, 1)
    elif not args.raw:
        from media.video import check_output, is_folder
        check_output(args.out)
        if is_folder(args.out):
            raise ValueError(f"--live writes a file or, with --out -, a pipe, got the folder {args.out}: name a file in it")
    pipeline = sample.open_pipeline(args)
    with default_float32(), torch.inference_mode():
        plan, speech = make_plan(pipeline, args)
        print(plan, flush=True)
        stream(plan, speech, pipeline.checkpoint, args, pipe, sample.START)
    return 0


def stream(plan, speech, checkpoint, args, pipe, start):
    o, fps, shift = plan.config, plan.fps, args.av_offset / plan.fps
    video = open_live(checkpoint, o, (plan.height, plan.width), args.window, args.replace_ref)
    if speech is None:
        under = Under(RATE, 1, fps, shift)
        sound = from_pipe(sys.stdin.buffer, checkpoint, o, fps, plan.frames, under.hear)
    else:
        from media.sound import cut
        kept = speech.recording
        under = Under(kept.rate, 1 if kept.channel is not None else kept.channels, fps, shift, cut(speech.path, kept, speech.start, speech.duration))
        sound = from_file(speech, checkpoint, o, fps, plan.frames)
    print(f"ready    {time.perf_counter() - start:.1f} s after the start", flush=True)
    clock = Clock(fps, None if math.isinf(plan.frames) else plan.frames, speech is None)
    writer = StreamWriter(args.out if pipe is None else pipe, (plan.height, plan.width), fps, under.rate, under.channels, args.raw)
    if writer.file != writer.path:
        print(f"meanwhile {writer.file} can be played; it is renamed to {args.out} at the end", flush=True)
    try:
        with writer, clock:
            for features, total in clock.waiting(sound):
                frames = video.block(features[None].to(o.device))[0]
                frames = frames[:, :int(min(total - writer.frames, frames.shape[1]))]
                synchronize(o.device)
                if frames.shape[1]:
                    writer.write(frames, under.below(frames.shape[1]))
                clock.wrote(frames.shape[1])
    except (KeyboardInterrupt, Exception):
        if writer.frames and pipe is None:
            print(f"the {writer.frames} frames so far are kept as {writer.file}", file=sys.stderr)
        raise
    print(f"speed    {clock}")
    print(f"wrote    {'the pipe' if pipe is not None else args.out}: {writer.frames} frames of {plan.width}x{plan.height}, "
          f"{writer.frames / fps:.3f} s at {fps:g} fps", flush=True)


class Clock:
    """A bar that says frames per second and how the stream stands to real time: ahead of it, behind it; or, for live input, how late it is."""

    def __init__(self, fps, total, live_input):
        self.fps, self.live_input, self.frames, self.begin, self.heard, self.late, self.seconds = fps, live_input, 0, None, 0.0, [], 0.0
        self.bar = tqdm(total=total, unit="frame", bar_format="{desc}: {n_fmt} frames [{elapsed}{postfix}]" if total is None else None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def waiting(self, sound):
        """The blocks of a sound, noting when each had been heard."""
        for block in sound:
            self.heard = time.perf_counter()
            self.begin = self.begin or self.heard
            yield block

    def wrote(self, frames):
        now = time.perf_counter()
        self.frames, self.late = self.frames + frames, [*self.late[-99:], now - self.heard]
        self.seconds += now - self.heard
        said = f"{self.frames / self.seconds:.1f} frames/s while working, "
        ahead = self.frames / self.fps - (now - self.begin)
        away = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} real time"
        said += f"{1000 * self.late[-1]:.0f} ms after it was heard" if self.live_input else away
        self.bar.set_postfix_str(said)
        self.bar.update(frames)

    def __str__(self):
        if not self.late:
            return "nothing was made"
        rate = self.frames / max(self.seconds, 1e-9)
        said = f"{rate:.1f} frames/s while working, {rate / self.fps:.2f} times real time"
        latency = FRAMES / self.fps + AHEAD + sorted(self.late)[len(self.late) // 2]
        return said + f"; a sound is seen at most {latency:.2f} s after it was heard, in the median block" * self.live_input
