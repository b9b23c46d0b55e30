"""`python sample.py --live`: a picture speaks while the sound is heard. live_plan.py says what it will be and take."""
import math
import os
import queue
import stat
import sys
import threading
import time
from collections import deque

import numpy as np
import torch
from tqdm import tqdm

import live
from fast.probe import pick_device
from fast.listening import AHEAD, Listening
from fast.relay import Relay
from fast.stills import still
from jobs import stop
from jobs.live_plan import FRAMES, expected, make_plan, own_experts, ring_class
from media.given import default_float32, warn_unless_known
from media.pictures import fit_picture, load_image
from media.sound import RATE
from media.stream import WAITING, StreamWriter, named_format, pcm
from text import Tokenizer, encode_prompt

SAMPLES, PIPED = "wanted 16-bit 16 kHz mono samples on standard input", "pipe them in, as `ffmpeg -i a.wav -f s16le -ar 16000 -ac 1 - | ...`"
LONG = 1000      # frames: streams as long as that, and by many GPUs, have CUDA graphs, which take 3 s to make and help most where the host is busy


def open_live(checkpoint, plan, replace_ref=False):
    """Load the networks and make ready for the first block -> live.Live, of many processes a Relay"""
    o, line, vae = plan.config, plan.line, None
    if o.device.type == "cuda" and o.device.index is not None:
        torch.cuda.set_device(o.device)                              # whose streams and graphs are meant below

    def given():
        """What is made of prompt and picture: by one process for all."""
        encoder = checkpoint.load("text", o.device, o.dtype)
        text = encode_prompt(encoder, Tokenizer(checkpoint.tokenizer, checkpoint.configs["denoiser"].text_len), o.prompt)[None]
        del encoder
        picture = fit_picture(load_image(o.image), (plan.height, plan.width)).to(o.device)[None, :, None]
        if "picture_db" in checkpoint.sampling:                      # a checkpoint of drawn faces
            from tiny import faces
            faces.warn_unless_known(o.prompt)
            warn_unless_known(vae, picture, o.image, checkpoint.sampling["picture_db"])
        return text, *still(vae, picture)
    if line.last:
        vae = checkpoint.load("vae", o.device, o.vae_dtype)
        from fast.convolution import use_kernels
        use_kernels(vae)
    text, *latents = given() if line.size == 1 else [x.to(o.device) for x in line.once(given)]
    steps = own_experts(checkpoint, plan)
    nets = {name: load_denoiser(checkpoint, name, o) for name in sorted(set(steps))}
    prepared = live.prepare([nets[name] for name in steps], vae, text, None, latents)
    how = o.seed, plan.window, o.shift, replace_ref, ring_class(plan)
    video = live.Live(prepared, *how) if line.size == 1 else Relay(prepared, line, o.steps, *how)
    if o.device.type != "cpu" and (plan.frames >= LONG or line.size > 1):
        from fast.rings import BlockGraphs
        cfg = checkpoint.configs["denoiser"]
        silence = torch.zeros(1, cfg.audio_states, cfg.audio_dim, FRAMES, device=o.device)
        BlockGraphs(video.stream).get_ready(torch.zeros(video.shape, device=o.device), silence, capture=not replace_ref)
    if line.size > 1:
        video.greet()
    return video


def load_denoiser(checkpoint, name, o):
    net = checkpoint.load(name, o.device, o.dtype, o.fp8)
    if o.device.type == "cpu":
        return net
    from fast.blocks import FastDenoiser, verify
    from fast.rows import fuse_qkv
    verify(type(net), net.cfg)
    return FastDenoiser(fuse_qkv(net), compile=o.compile is not False)


# ----------------------------------------------------------------------------------------------------------------------------- sound

def from_file(speech, checkpoint, config, fps, frames):
    """Yield per block of a sound file its features (S, C, 12), how many frames there will be in all, and when it was asked for, until it ends."""
    from fast.hearing import Hearing
    hearing = Hearing(speech, checkpoint.configs["audio"], lambda: checkpoint.load("audio", config.device, torch.float32), config.device, fps, FRAMES)
    for first in range(0, frames + live.WARM_UP, FRAMES):
        asked = time.perf_counter()
        yield hearing(first, first + FRAMES), frames, asked


def from_pipe(file, checkpoint, config, fps, frames, heard):
    """The same of 16-bit samples from a pipe, each block as soon as it can be heard, and when that was: if samples waited, a block's time after the
    block before, as if they came at the speed of speech.  heard  takes what was read, for the sound under the picture"""
    listening, first, done, there = Listening(checkpoint.load("audio", config.device, torch.float32), fps), 0, False, math.inf
    while first < frames + live.WARM_UP:
        there = min(time.perf_counter(), there + FRAMES / fps)
        while not done and (missing := listening.wanted(first + FRAMES) - listening.heard) > 0:
            asked, samples, now = time.perf_counter(), pcm(file, missing), time.perf_counter()
            there = now if now - asked > 0.005 else there
            if not listening.heard and (name := named_format(samples)):
                raise ValueError(f"{SAMPLES}, got a {name} file: {PIPED}")
            done = len(samples) < missing
            listening.hear(samples, done)
            heard(samples)
        if not listening.heard:
            raise ValueError(f"{SAMPLES}, got none: {PIPED}")
        if done:                                                     # now it is known where the sound ends
            frames = min(frames, math.ceil(listening.heard / RATE * fps - 1e-6))
        if first < frames + live.WARM_UP:
            yield listening(first, first + FRAMES), frames, there
        first += FRAMES


def ahead(blocks, device):
    """The same blocks, each made in a thread of its own on a stream of its own: a GPU encodes the sound of the next while this one is decoded."""
    made = queue.Queue(1)
    stop.abrupt = True

    def work():
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
                for block in blocks:
                    made.put((block, None))
                made.put((None, None))
        except BaseException as error:
            made.put((None, error))
    threading.Thread(target=work, daemon=True).start()
    while True:
        block, error = made.get()
        if error is not None:
            raise error
        if block is None:
            return
        yield block


def at_least(samples, pieces, path):
    """The same pieces of a sound file.  raises ValueError if they are fewer samples: ffmpeg would wait for them"""
    for piece in pieces:
        samples -= len(piece)
        yield piece
    if samples > 0:
        raise ValueError(f"{path} has become shorter since it was examined: leave it as it is while a video is made")


class Under:
    """The sound under the picture: samples come in pieces of any length, leave as long as the frames they go with.

    shift  seconds by which it comes later, or earlier if negative
    """

    def __init__(self, rate, channels, fps, shift, pieces=()):
        self.rate, self.channels, self.fps, self.pieces, self.given, self.frames = rate, channels, fps, iter(pieces), 0, 0
        self.skip = max(0, round(-shift * rate))
        self.waiting = deque([np.zeros((max(0, round(shift * rate)), channels), np.float32)])

    def hear(self, samples):
        self.waiting.append(np.asarray(samples, np.float32).reshape(len(samples), self.channels))

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
    pipe, stop.kept = None, "nothing was written"
    from media.video import SUFFIXES, check_not_read, check_output, is_folder
    if args.out == "-":                                              # what is printed must not come between the bytes
        if 1 in stop.closed:
            raise ValueError("--out - wants standard output open, it is closed: name a file, or leave out >&-")
        if os.isatty(1):
            raise ValueError("--out - writes a video, and standard output is a terminal: pipe it into a player, or name a file")
        if stat.S_ISREG(os.fstat(1).st_mode):
            check_not_read(1, (args.audio, args.image, 0 if args.audio == "-" else None))
        pipe = os.dup(1)
        os.dup2(2, 1)
    else:
        if os.path.isdir(args.out):
            raise ValueError(f"--live wants a file for --out, got the folder {args.out}: name one in it, as {os.path.join(args.out, 'out.mp4')}")
        if (os.path.splitext(args.out)[1].lower() in SUFFIXES) == args.raw or is_folder(args.out):
            ends = f"a name that {'does not end' if args.raw else 'ends'} in {' or '.join(SUFFIXES)}"
            raise ValueError(f"--live {'--raw ' * args.raw}wants {ends} for --out, or - for a pipe, got {args.out}")
        check_not_read(args.out, (args.audio, args.image, 0 if args.audio == "-" else None))
        check_output(args.out, raw=args.raw)
    if args.fp8 is None and pick_device(args.device).type == "cpu":
        args.fp8 = False                                             # a CPU would multiply float8 weights out anew in every forward
    pipeline = sample.open_pipeline(args)
    with default_float32(), torch.inference_mode():
        plan, speech = make_plan(pipeline, args)
        print(plan, flush=True)
        if plan.line.last:
            rate = expected(plan, pipeline.checkpoint)
            print(f"speed    about {rate:.1f} frames/s expected, {rate / plan.fps:.2f} times real time", flush=True)
        if args.world:
            args.world.line_up(plan.config.device)
        stream(plan, speech, pipeline.checkpoint, args, pipe, sample.START)
    return 0


def stream(plan, speech, checkpoint, args, pipe, start):
    o, fps, shift = plan.config, plan.fps, args.av_offset / plan.fps
    video, alone = open_live(checkpoint, plan, args.replace_ref), plan.line.size == 1
    if speech is None:
        under = Under(RATE, 1, fps, shift)
        os.set_blocking(0, True)
        microphone = open(0, "rb", buffering=0, closefd=False)       # a thread that still reads a buffered one cannot be left behind
        sound = from_pipe(microphone, checkpoint, o, fps, plan.frames, under.hear if alone else video.samples.append)
    else:
        from media.sound import cut
        from media.video import full_scale
        kept, scale = speech.recording, full_scale(speech.path, speech.recording)
        enough = int((plan.seconds - 0.05) * kept.rate)              # rounding to 16 kHz moves a file's end by less
        pieces = at_least(enough, cut(speech.path, kept, speech.start, speech.duration), speech.path)
        pieces = (piece / scale for piece in pieces)
        under = Under(kept.rate, 1 if kept.channel is not None else kept.channels, fps, shift, pieces)
        sound = from_file(speech, checkpoint, o, fps, plan.frames)
    print(f"ready    {time.perf_counter() - start:.1f} s after the start", flush=True)
    if not alone:
        sound = video.blocks(sound, under.hear)
    elif o.device.type == "cuda":
        sound = ahead(sound, o.device)
    if not plan.line.last:
        for features, *_ in sound:
            video.latents(onto(features, o.device))
        return
    waits = (FRAMES + live.WARM_UP - plan.early) / fps + AHEAD if speech is None else None                # the first sound of a block, for its last
    clock = Clock(fps, None if math.isinf(plan.frames) else plan.frames, waits, alone)
    writer = StreamWriter(args.out if pipe is None else pipe, (plan.height, plan.width), fps, under.rate, under.channels, args.raw,
                          WAITING + max(0, -args.av_offset))        # the sound of a later frame may not have been heard
    try:
        with writer, clock:
            for frames, total in pictures(video, clock.waiting(sound), o.device, speech is not None):
                frames = frames[:, :int(min(total - writer.frames, frames.shape[1]))]
                if frames.shape[1]:
                    begins = writer.file is None
                    writer.write(frames, under.below(frames.shape[1]))
                    if begins and writer.file != writer.path and not args.raw:
                        clock.bar.write(f"meanwhile {writer.file} can be played; it is renamed to {args.out} at the end")
                    stop.kept = f"the frames so far are kept as {writer.file}" if pipe is None else "what was made so far has been written"
                clock.wrote(frames.shape[1], writer.waited if pipe is not None else 0.0)
    except (KeyboardInterrupt, Exception) as error:
        if writer.frames and pipe is None and writer.file not in (None, writer.path):          # of a disk that is full it does not hold all frames
            what = "what could be written is" if isinstance(error, OSError) else f"the {writer.frames} frames so far are"
            print(f"{what} kept as {writer.file}", file=sys.stderr)
        raise
    print(f"speed    {clock}")
    lost = 0.0 if plan.seconds is None or args.raw else plan.seconds + shift - writer.frames / fps
    print(f"wrote    {'the pipe' if pipe is not None else args.out}: {writer.frames} frames of {plan.width}x{plan.height}, "
          f"{writer.frames / fps:.3f} s at {fps:g} fps" + f"; the last {lost:.3f} s of the sound have no picture and were cut" * (lost > 1 / fps),
          flush=True)


def onto(features, device):
    """Of a block, from the host -> (1, S, C, 12)"""
    return features[None] if device.type == "cpu" else features[None].pin_memory().to(device, non_blocking=True)


def pictures(video, sound, device, all_there):
    """Yield frames (3, P, height, width), a block's or a part of it, and how many there will be in all.  all_there: the sound need not be waited for"""
    if device.type == "cpu":
        for features, total in sound:
            for latents in video.latents(onto(features, device)).split(live.BLOCK if all_there else 1, dim=2):      # seen as soon as it can be
                yield video.frames(latents)[0], total
        return
    from fast.rings import Beside
    beside, waiting = Beside(video), deque()
    for features, total in sound:
        waiting.append((beside(video.latents(onto(features, device))), total))
        if len(waiting) > all_there:                                 # the block before it, while this one is being made
            frames, total = waiting.popleft()
            yield frames()[0], total
    for frames, total in waiting:
        yield frames()[0], total


class Clock:
    """A bar that says frames per second and how the stream stands to real time: ahead of it, behind it; or, for live input, how late it is.

    waits  of live input, seconds between the first sound of a block and the last that it needs; None: a file
    alone  is one block made at a time, not many by many processes?
    """

    def __init__(self, fps, total, waits, alone=True):
        self.fps, self.waits, self.alone, self.frames, self.begin, self.late, self.seconds = fps, waits, alone, 0, None, [], 0.0
        self.heard = self.wrote_at = 0.0                             # when the sound of the block at hand was there, and when frames were last written
        self.shown, self.waited = 0, 0.0                             # frames of the block at hand that are written; of `wrote`, the last time
        self.bar = tqdm(total=total, unit="frame", bar_format="{n_fmt} frames [{elapsed}{postfix}]" if total is None else None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def waiting(self, sound):
        """The blocks of a sound, noting when each had been heard."""
        for features, total, self.heard in sound:
            self.begin, self.shown, self.late = self.begin or self.heard, 0, [*self.late[-99:], 0.0]
            yield features, total

    def wrote(self, frames, waited=0.0):
        """waited  seconds in all for which the reader of a pipe let writing wait: no work of ours"""
        now = time.perf_counter()
        self.late[-1] = max(self.late[-1], now - self.heard - self.shown / self.fps)             # by which a player must wait, for all of the block
        self.seconds = self.seconds + now - max(self.heard, self.wrote_at) - (waited - self.waited) if self.alone else now - self.begin - waited
        self.frames, self.shown, self.wrote_at, self.waited = self.frames + frames, self.shown + frames, now, waited
        said = f"{self.frames / self.seconds:.1f} frames/s while working, "
        ahead = self.frames / self.fps - (now - self.begin)
        away = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} real time"
        said += f"seen {self.waits + self.late[-1]:.2f} s after it was heard" if self.waits else away
        self.bar.set_postfix_str(said)
        self.bar.update(frames)

    def __str__(self):
        if not self.frames:
            return "nothing was made"
        rate = self.frames / max(self.seconds, 1e-9)
        said = f"{rate:.1f} frames/s while working, {rate / self.fps:.2f} times real time"
        return said if self.waits is None else \
            f"{said}; half of the last {len(self.late)} blocks were seen within {self.waits + sorted(self.late)[len(self.late) // 2]:.2f} s after " \
            "they were heard"
