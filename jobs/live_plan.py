"""What a stream will be and take, from its options, the checkpoint's headers and the free memory; and how fast it may be, from a probe."""
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import live
from fast.hearing import hearing_bytes
from fast.plan import MemoryPlan, RunConfig, activation_bytes, frame_size, weigh
from fast.plan_text import size_table
from fast.probe import GIB, free_memory
from fast.relay import Line
from media.sound import RATE
from model import PATCH, expert_index

FRAMES = 4 * live.BLOCK      # pixel frames of a block
LORAS = {"": "live.safetensors", "high=": "live.high.safetensors", "low=": "live.low.safetensors"}
UNUSED = ("negative_prompt", "pose_video", "guidance", "solver", "clips", "clip_frames", "start_from_ref", "official", "batch", "restart", "speed",
          "keep_parts", "save_every", "attention8")
STREAM = ("lora", "rings8", "fps", "window", "replace_ref", "raw")                        # what goes with --live alone


def options(parser):
    """The command line's part about streams."""
    g = parser.add_argument_group("live", "with --live: blocks of 12 frames that are written while they are made, 4 steps, shift 3, no guidance; "
                                          "--audio - takes 16-bit 16 kHz mono from standard input, --out is a .mp4 or .mov file or, as -, "
                                          "standard output; see docs/live.md")
    g.add_argument("--live", action="store_true", help="make a stream (S2V, with the LoRA of Live Avatar); under torchrun several GPUs "
                   "share its steps")
    g.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merged into the denoiser while it is loaded (with "
                   "--live); a strength that the file does not name is said (default: live.safetensors in the checkpoint's folder or in that of the "
                   "same name and -live, if there is one)")
    g.add_argument("--rings8", action="store_true", help="remember keys and values in 8 bits: half the memory, 9%% faster, off by 3.9%% of each "
                   "attention output on random inputs (GPUs with 8-bit tensor cores; default: off)")
    g.add_argument("--fps", type=float, help=f"of a stream, 1 to 60: the LoRA was trained for {live.FPS} (default: {live.FPS})")
    g.add_argument("--window", type=int, help="latent frames that a block sees, itself included: a multiple of 3 (default: "
                   f"{live.WINDOW})")
    g.add_argument("--replace-ref", action="store_true", help="the first latent made takes the picture's place as reference after "
                   f"{live.WINDOW} latent frames, as the original does on several GPUs (default: off, as on one)")
    g.add_argument("--raw", action="store_true", help="write rgb24 frames without sound in place of an mp4 (default: off)")


def check_stream(args):
    """-> is it one?  raises ValueError for its options without --live"""
    if args.live:
        return True
    given = [f"--{name.replace('_', '-')}" for name in STREAM if str(getattr(args, name)) not in ("None", "False", "[]")]
    given += [f"--{name} -" for name in ("audio", "out") if getattr(args, name) == "-"]
    if "--lora" in given:
        raise ValueError("--lora goes with --live; for other videos merge it: python convert_weights.py SRC DST --lora FILE")
    if given:
        raise ValueError(f"{given[0]} goes with --live: add that, or leave it out")
    return False


def with_loras(checkpoint, given):
    """The checkpoint with the LoRAs of --lora merged, or else with its own: live.safetensors, or live.high and live.low for two experts, in its
    folder or in the one beside it whose name ends in -live."""
    folder = Path(checkpoint.folder).resolve()
    own = [f"{side}{path}" for place in (folder, folder.with_name(f"{folder.name}-live")) for side, name in LORAS.items()
           if (path := place / name).is_file()]
    if not (given or own):
        return checkpoint
    from convert_weights import merge
    return merge(checkpoint, given or own, "cpu")


@dataclass(frozen=True)
class LivePlan:
    """What a stream will be and take."""
    config: RunConfig
    height: int
    width: int
    fps: float
    window: int
    rings8: bool
    seconds: float | None        # of sound; None: as long as it comes
    frames: float                # inf: as long as sound comes
    memory: dict                 # bytes by what takes them
    sizes: dict
    free: object
    fp8: bool                    # are the denoiser's large matrices float8?
    early: int                   # frames by which mouths lead the sound
    notes: tuple = ()            # what is to be known about the picture
    line: Line = Line()          # the place of this process among those that make the stream
    each: tuple = ()             # bytes of memory of all of them, in line

    @property
    def room(self):
        return self.free.host if self.free.device is None else self.free.device

    def __str__(self):
        o = self.config
        sound = "standard input" if self.seconds is None else f"{self.seconds:.2f} s of {os.path.basename(o.audio)}"
        length = "as long as sound comes" if math.isinf(self.frames) else f"{self.frames} frames = {self.frames / self.fps:.2f} s"
        leads = f"; the mouth leads the sound by {self.early} frames, {1000 * self.early / self.fps:.0f} ms (--av-offset -{self.early} undoes it)"
        return "\n".join((
            f"sound    {sound}",
            *self.notes,
            f"video    live: {self.width}x{self.height}, {length}, at {self.fps:g} fps, in blocks of {FRAMES}{leads * bool(self.early)}",
            f"sampler  Euler, {o.steps} steps, shift {o.shift:g} twice, no guidance, seed {o.seed}",
            f"weights  {size_table(self.sizes)}",
            *self.ranks(),
            f"memory   {sum(self.memory.values()) / GIB:.2f} of {self.room / GIB:.1f} GiB: "
            f"{', '.join(f'{name} {size / GIB:.2f}' for name, size in self.memory.items())}; the same however long the stream is"))

    def ranks(self):
        """Yield a line about the other processes, if there are any."""
        if (size := self.line.size) > 1:
            steps, each = (", ".join(words) for words in zip(*((str(len(Line(rank, size).steps(self.config.steps))), f"{taken / GIB:.2f}")
                                                               for rank, taken in zip((*range(1, size), 0), self.each))))
            yield (f"ranks    {size} in line, the last is rank 0, which decodes: {steps} steps of every block; {each} GiB of memory; "
                   "below is that of rank 0")


def make_plan(pipeline, args):
    """-> LivePlan, and a Speech or None.  raises ValueError for what a stream cannot use, and where it cannot fit"""
    def chosen(given, default):
        return default if given is None else given
    checkpoint, fps, window = pipeline.checkpoint, chosen(args.fps, live.FPS), chosen(args.window, live.WINDOW)
    steps, shift = chosen(args.steps, live.STEPS), chosen(args.shift, live.SHIFT)
    if given := [name for name in UNUSED if getattr(args, name)]:
        raise ValueError(f"--live has no --{given[0].replace('_', '-')}: leave it out")
    if not checkpoint.configs["denoiser"].audio_dim:
        raise ValueError(f"--live wants an S2V checkpoint, got {checkpoint.task}: give --ckpt Wan2.2-S2V-14B")
    for name, value in (("--audio", args.audio), ("--image", args.image)):
        if not value:
            raise ValueError(f"--live wants {name}: {'a sound file, or - for standard input' if name == '--audio' else 'a picture of who speaks'}")
    if not 1 <= fps <= 60:
        raise ValueError(f"--fps must be 1 to 60, got {fps:g}: {live.FPS} is what the LoRA was trained for, 16 what base S2V was")
    live.check_window(window)
    live.schedule(steps)                                             # a wrong number of steps is refused
    if args.rings8:
        from fast import attention8
        if pipeline.device.type == "cpu":
            raise ValueError("--rings8 wants a GPU with 8-bit tensor cores: leave it out on a CPU")
        attention8.check(pipeline.device)
    names = ("image", "prompt", "size", "enlarge", "seed", "frames", "start", "duration")
    config = RunConfig(**pipeline.choices, audio=args.audio, steps=steps, shift=shift,
                       **{name: getattr(args, name) for name in names}).resolve(checkpoint)
    line = Line(args.world.rank, args.world.size) if args.world else Line()
    line.steps(config.steps)                                         # more processes than steps are refused
    height, width, notes = frame_size(config, "s2v", checkpoint.configs["vae"].stride[1])
    speech, frames = None, math.inf
    if args.audio == "-":
        if args.start:
            raise ValueError(f"--start {args.start:g} goes with a sound file, not with standard input: leave it out")
        frames = math.inf if args.duration is None else math.ceil(args.duration * fps - 1e-6)
    else:
        from media.speech import open_speech
        speech = open_speech(args.audio, args.start, args.duration)
        frames = math.ceil(len(speech) / RATE * fps - 1e-6)
    seconds = None if speech is None else len(speech) / RATE
    shown = min(frames, args.frames or math.inf)
    if abs(args.av_offset) >= (most := min(3600 * fps, shown if args.av_offset > 0 else frames)):          # < 0: of the sound something must be left
        raise ValueError(f"--av-offset {args.av_offset} moves the sound by {abs(args.av_offset) / fps:.1f} s: choose less than "
                         f"{math.ceil(most)} frames")
    fp8 = config.fp8 or any(entry.dtype == torch.float8_e4m3fn for entry in checkpoint.parts[checkpoint.experts[0]].tensors.values())
    plan = LivePlan(config, height, width, fps, window, args.rings8, seconds, shown, {}, checkpoint.sizes(),
                    free_memory(pipeline.device, pipeline.vram), fp8,
                    0 if "picture_db" in checkpoint.sampling else live.WARM_UP, notes, line)        # of drawn faces: trained to be on time
    plan = replace(plan, each=tuple(sum(memory_of(replace(plan, line=Line(rank, line.size)), checkpoint).values())
                                    for rank in (*range(1, line.size), 0)))
    return fitting(replace(plan, memory=memory_of(plan, checkpoint)), checkpoint), speech


def memory_of(plan, checkpoint):
    """Bytes on the device of this process while a stream runs, by what takes them."""
    config, height, width, window = plan.config, plan.height, plan.width, plan.window
    from fast.rings8 import ring8_bytes
    from fast.vae_plan import vae_cuts
    cfg, vae = checkpoint.configs["denoiser"], checkpoint.configs["vae"]
    H, W = height // vae.stride[1], width // vae.stride[1]
    steps = own_experts(checkpoint, plan)
    n, experts, count, size = H * W // math.prod(PATCH), sorted(set(steps)), len(steps), config.dtype.itemsize
    dtype, parts = config.vae_dtype or torch.float32, checkpoint.parts
    coder = plan.line.last * (parts["vae"].parameters * dtype.itemsize + vae_cuts(vae, H, W, dtype)[0][1])
    encoder = 4 * parts["audio"].parameters
    if plan.seconds is not None:                                     # of a file: beside a block, see live.ahead, or between blocks
        encoder = (config.device.type == "cuda") * hearing_bytes(checkpoint, plan.fps, int(plan.seconds * RATE))[0]
    return {"denoiser": sum(weigh(parts[name], config)(None)[0] for name in experts),
            "rings": ring8_bytes(cfg, n, count, window) if plan.rings8 else live.ring_bytes(cfg, n, count, window, size),
            "picture": len(experts) * cfg.n_layer * 6 * n * cfg.dim * size,
            "activations": int(activation_bytes(replace(config, guidance=(1.0,)), cfg, live.BLOCK * n, MemoryPlan(fp8=plan.fp8))),
            "VAE": int(coder + plan.line.first * encoder)}


def fitting(plan, checkpoint):
    """The plan.  raises ValueError, naming what would help, if it does not fit"""
    if (takes := sum(plan.memory.values())) <= plan.room:
        return plan
    less = max(live.BLOCK, plan.window - live.BLOCK)
    others = {"add --fp8": replace(plan, config=replace(plan.config, fp8=True), fp8=True), f"add --window {less}": replace(plan, window=less)}
    if plan.config.device.type == "cuda":
        others = {"add --rings8": replace(plan, rings8=True), **others}
    helps = [option for option, other in others.items() if other != plan and sum(memory_of(other, checkpoint).values()) <= plan.room]
    raise ValueError(f"{takes / GIB:.1f} GiB of memory are wanted, {plan.memory['rings'] / GIB:.1f} of them for rings, {plan.room / GIB:.1f} are there: "
                     f"{[*helps, 'choose a smaller --size'][0]}")


def experts_of_steps(checkpoint, config):
    """The name of the denoiser that serves each step."""
    return [checkpoint.experts[expert_index(t, checkpoint.boundary)] for t in live.schedule(config.steps, config.shift)[1].tolist()]


def own_experts(checkpoint, plan):
    """The same of the steps of this process."""
    own = plan.line.steps(plan.config.steps)
    return experts_of_steps(checkpoint, plan.config)[own.start:own.stop]


def ring_class(plan):
    if plan.config.device.type == "cpu":
        return live.Ring
    from fast import rings, rings8
    return rings8.Ring8 if plan.rings8 else rings.GPURing


def ring_seconds(plan, cfg, n):
    """Of a layer's attention of a block to a full ring, with what is written there."""
    from fast.blocks import attention_backend
    from fast.estimate import best_seconds
    K, D, device = cfg.n_head, cfg.dim // cfg.n_head, plan.config.device

    def rows(*shape):
        return torch.randn(*shape, K, D, device=device, dtype=plan.config.dtype)
    ring = ring_class(plan)(SimpleNamespace(rows=[rows(2, 1, int(2.5 * n))], ref_keys=[rows(1, n)]), n, plan.window)
    (q, k, v), moved = (rows(1, live.BLOCK * n) for _ in range(3)), torch.ones(2, n, 1, D // 2, device=device)
    with torch.no_grad(), attention_backend(device):
        return best_seconds(lambda: ring.attend(q, k, v, 0, 0, plan.window, moved), device)


def expected(plan, checkpoint):
    """Frames per second, from a probe of some seconds: the forwards and the VAE, one after the other; on many GPUs those of the slowest."""
    from fast.estimate import forward_seconds, vae_flops, vae_rate
    cfg, vae = checkpoint.configs["denoiser"], checkpoint.configs["vae"]
    o = replace(plan.config, compile=plan.config.compile is not False)
    H, W = plan.height // vae.stride[1], plan.width // vae.stride[1]
    n = H * W // math.prod(PATCH)
    forward = forward_seconds(cfg, o, plan.fp8, live.BLOCK * n, live.BLOCK * n, ring_seconds(plan, cfg, n))
    decoding, line = live.BLOCK * vae_flops(vae, H, W)[1] / vae_rate(vae, plan), (Line(rank, plan.line.size) for rank in range(plan.line.size))
    return FRAMES / max(len(place.steps(o.steps)) * forward + place.last * decoding for place in line)
