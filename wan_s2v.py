"""The pipelines: one picture and one sound become one video, clip by clip; a prompt or a picture become one clip.

Stages  plan -> text (umT5) -> audio (wav2vec2) -> picture (VAE) -> per clip: denoise, decode, encode the last frames for the next clip.
Each network is loaded when its stage begins; it stays for the next video where there is room, else is released; frames leave as soon as their clip is done.

    S2V     clips of 80 frames = 20 latent frames, see `make_clips`
    T2V     two experts; latents from noise alone
    I2V     two experts; mask and latents of the picture followed by grey frames enter beside the noise as 20 more channels
    TI2V    one expert, the 16x16x4 VAE; the picture's latent is the first latent frame, held clean at every step

Axes    B batch (1)   T latent frames   P pixel frames   H W latent size
Source  Wan-Video/Wan2.2@42bf4cf wan/{speech2video,text2video,image2video,textimage2video}.py
"""
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import numpy as np
import torch
from tqdm import tqdm

from fast.plan import FPS, WARM_UP, Plan, RunConfig, keepable, make_plan, warm_up
from fast.probe import any_terminal, cap_memory, free_memory, memory_used, pick_device, private_memory, synchronize
from formats.checkpoints import NETWORKS, open_checkpoint
from jobs import stop
from media.pictures import fit_i2v, fit_picture, fit_ti2v, load_image
from sampling import Experts, denoise, make_solver
from text import Tokenizer, encode_prompt

REF_MOTION_FRAMES = 6        # start_from_ref: how many of the motion frames are the reference picture (official L506)


class Stages:
    """Seconds spent per stage, and on a GPU the most memory that was reserved: `with stages("text"): ...`"""

    def __init__(self, device=torch.device("cpu")):
        self.device, self.seconds, self.gib, self.private, self.open, self.start = device, {}, {}, 0.0, [], 0.0

    @contextmanager
    def __call__(self, name):
        """What a stage inside another one takes is not counted for the outer one."""
        self.settle()
        self.open.append(name)
        try:
            yield
        finally:
            self.settle()
            self.open.pop()

    def settle(self):
        """Time and memory since the last call are those of the innermost stage."""
        synchronize(self.device)
        now, gpu = time.perf_counter(), self.device.type == "cuda"
        for name in self.open[-1:]:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.start
            self.private = max(self.private, private_memory())
            if gpu:
                self.gib[name] = max(self.gib.get(name, 0.0), memory_used(self.device)[0])
        if gpu:
            torch.cuda.empty_cache()                                 # what one stage left is not the next one's
            torch.cuda.reset_peak_memory_stats(self.device)
        self.start = time.perf_counter()

    def __str__(self):
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())

    def memory(self):
        """Of all stages, those that failed too, and of the process on the host."""
        stages = ", ".join(f"{name} {gib:.2f}" for name, gib in self.gib.items())
        return f"GiB reserved on the GPU: {stages or 'none'}; host {memory_used(self.device)[1]:.1f} GiB at most, " \
            f"{self.private:.1f} without mapped files"


class Progress:
    """A bar per clip, with the time that all clips together still need."""

    def __init__(self, clips, device, begin):
        self.clips, self.device, self.begin, self.start, self.seconds = clips, device, begin, time.perf_counter(), []

    def __call__(self, clip, steps):
        """steps [(number, t), ...] of a clip, to its end; a signal lets the running one end."""
        if not self.seconds:
            print(f"ready    {time.perf_counter() - self.begin:.1f} s after the start")
        total, last = (steps or [(-1, 0)])[-1][0] + 1, time.perf_counter()
        with tqdm(steps, desc=f"clip {clip + 1}/{self.clips}", unit="step", initial=total - len(steps), total=total) as bar:
            for step in bar:
                with stop.finish_first():
                    yield step
                    synchronize(self.device)                         # or the time of queueing would be shown
                self.seconds, last = [*self.seconds, time.perf_counter() - last], time.perf_counter()
                left = (last - self.start) / len(self.seconds) * ((self.clips - clip) * total - step[0] - 1)
                bar.set_postfix_str(f"all clips {tqdm.format_interval(left)} left")

    def __str__(self):
        if not self.seconds:
            return "none were left to make"
        return f"first {self.seconds[0]:.2f} s, later {statistics.median(self.seconds[1:] or self.seconds):.2f} s"


@dataclass(frozen=True, repr=False)
class Video:
    """A finished video.  frames (3, P, height, width) float32 in [-1, 1], plan as it was made from, files that only it needs"""
    frames: torch.Tensor
    plan: Plan
    files: object = None

    def __repr__(self):
        P, height, width = self.frames.shape[1:]
        return f"Video: {P} frames of {width}x{height}, {P / self.plan.fps:.2f} s at {self.plan.fps:g} fps; .save('out.mp4') writes it"

    def save(self, path, av_offset=0):
        """Write an mp4 with the sound, or PNG frames if path ends in "/"; missing folders are made."""
        from media.video import open_writer                          # here, as elsewhere: importing `sample` does not need it
        with open_writer(path, self.plan, av_offset) as writer:
            writer.write(self.frames)
        return path


class Networks:
    """A Checkpoint whose networks are kept between videos as far as memory allows (see `keepable`), on one process or on many (ranks)."""

    def __init__(self, checkpoint, keep, ranks=None):
        self.checkpoint, self.keep, self.ranks = checkpoint, keep, ranks
        self.names, self.kept = set(), {}                            # kept: name -> (how it was loaded, network)

    def __getattr__(self, name):
        return getattr(self.checkpoint, name)

    def begin(self, plan):
        """Let go of what a plan has no room for."""
        self.names = keepable(plan, self.checkpoint) if self.keep else set()
        self.kept = {name: kept for name, kept in self.kept.items() if name in self.names}
        return self

    def load(self, name, *how):
        """As Checkpoint.load, or the network of an earlier video."""
        if name in self.kept and self.kept[name][0] == how:
            return self.kept[name][1]
        self.kept.pop(name, None)                                    # first, or both would be there
        net = self.checkpoint.load(name, *how)
        if name in self.names:
            self.kept[name] = how, net
        return net

    def once(self, make):
        """make(), tensors on the CPU: of many processes one does it for all."""
        return make() if self.ranks is None else self.ranks.once(make)

    def nbytes(self, device):
        """Of what is kept on a device."""
        return sum(p.nbytes for _, net in self.kept.values() for p in net.parameters() if p.device.type == device.type)


class Nothing:
    """Nothing is saved and nothing was. jobs/parts.py has the same on disk."""
    done = 0

    def load(self, name, **shapes):
        return None

    def due(self, step):
        return False

    def save(self, name, tensors):
        pass


NOTHING = Nothing()


class WanS2VPipeline:
    """A checkpoint of any task of the family -> video. See `__call__`; or `plan`, then `generate`, which gives the frames clip by clip.

    checkpoint  from formats.checkpoints.open_checkpoint        vram     GiB of a card to plan for; None: what is free
    keep        the networks between videos, as far as memory allows
    ranks       a Ranks of fast/parallel.py: this process and others make every video together
    choices     fields of RunConfig that hold for every video: device, dtype, vae_dtype, fp8, compile, attention8, resident
    """

    def __init__(self, checkpoint, vram=None, keep=True, ranks=None, **choices):
        from media.given import check_names                          # here, as below: importing `sample` does not need it
        check_names(choices)
        self.checkpoint, self.vram, self.networks = checkpoint, vram, Networks(checkpoint, keep, ranks)
        self.choices = choices | dict(split=ranks.split if ranks else (1, 1))
        self.device = choices.get("device", torch.device("cpu"))

    @classmethod
    def from_pretrained(cls, path=None, torch_dtype=None, device_map="auto", vram=None, **choices):
        """path        folder in the official or converted layout, or a hub id that huggingface_hub can find; None: weights/tiny
        torch_dtype    of the large linear layers on a GPU: bfloat16 (default) or float32; float16 runs as bfloat16; a CPU runs float32
        device_map     "auto" (a GPU if there is one), or a device; what stays on it and what is streamed follows from its free memory
        vram           GB of a card to plan for, and the most that this process then takes
        choices        as in WanS2VPipeline
        raises         ValueError naming what is missing or wrong
        """
        from formats.find import local_folder
        device = pick_device("auto" if device_map is None else str(device_map))
        cap_memory(device, vram)
        return cls(open_checkpoint(local_folder(path)), vram, device=device, dtype=run_dtype(torch_dtype, device), **choices)

    def plan(self, **options):
        """Fields of RunConfig -> Plan. Decodes the sound, reads the picture's size, no weights.  raises ValueError for what cannot be used"""
        from media.given import check_names, default_float32
        check_names(options)
        free = free_memory(self.device, self.vram, self.networks.nbytes(self.device))
        free = self.networks.ranks.least(free) if self.networks.ranks else free
        with default_float32():
            return make_plan(RunConfig(**self.choices | options), self.checkpoint, free)

    @torch.no_grad()
    def generate(self, plan, stage=None, progress=lambda clip, steps: steps, keep=NOTHING):
        """Make a video clip by clip.

        plan      from `plan`                   stage     a Stages, to collect times
        progress  wraps the list of steps of clip number `clip`
        keep      a Parts, where what the next clip needs is saved; after `keep.done` clips of an earlier run, those to come are made
        yields    (3, P, height, width) float32 in [-1, 1] on the CPU, per clip
        """
        from media.given import in_float32
        if keep.done == plan.clips:
            return
        stage, make = stage or Stages(), generate_s2v if plan.sound is not None else generate_video
        left = plan.frames - keep.done * plan.config.clip_frames + warm_up(plan.config) if keep.done else plan.frames
        for clip, frames in enumerate(in_float32(make(self.networks.begin(plan), plan, stage, progress, keep)), keep.done + 1):
            frames = frames[0, :, :left].float().cpu()
            left -= frames.shape[1]
            if clip == plan.clips and left:                          # the sound goes on for a moment, see `count_clips`
                frames = torch.cat([frames, frames[:, -1:].expand(-1, left, -1, -1)], dim=1)
            yield frames

    def __call__(self, audio_path=None, image_path=None, prompt="", negative_prompt=None, num_frames=None, height=None, width=None,
                 guidance_scale=None, num_inference_steps=None, generator=None, enable_cpu_offload=None, use_fp16=False, out=None,
                 quiet=False, restart=False, keep_frames=True, **options):
        """One video. Prints the plan and a progress bar.

        audio_path               file of any common format, or (samples, rate): numpy or torch, (n,) or (n, channels), floats in [-1, 1] or int16
        image_path               file of any common format, or a PIL picture
        num_frames               of the video; S2V: at most, default as long as the sound; other tasks: the checkpoint's
        height, width            with a picture a budget of pixels, in the picture's own shape; without one the exact size
        guidance_scale, num_inference_steps    default: the checkpoint's
        generator                a torch.Generator: its seed is used
        enable_cpu_offload       no effect: networks for which there is no room leave the device when their stage ends
        use_fp16                 runs as bfloat16, with a warning: float16 overflows in this model family
        out                      file or folder as in `Video.save`, written clip by clip: if the program ends early, the same call goes on, see
                                 docs/reliability.md; frames of earlier clips are then read from that file
        restart                  begin anew whatever an earlier run has left beside `out`
        quiet                    print warnings only
        keep_frames              False: they go to `out` as they are made, which is returned
        options                  any other field of RunConfig: shift, solver, seed, clips, clip_frames, pose_video, start_from_ref, ...
        returns                  Video, with .frames and .save(path)
        raises                   ValueError for files or values that cannot be used, TypeError for unknown names and kinds
        """
        begin = time.perf_counter()
        if use_fp16:
            run_dtype(torch.float16, self.device)
        if (height is None) != (width is None):
            raise ValueError(f"height and width go together, got height {height} and width {width}")
        if out is not None:
            from media.video import check_output, open_writer        # here, as below: importing `sample` does not need it
            check_output(out, inputs=(audio_path, image_path))
        given = dict(audio=audio_path, image=image_path, frames=num_frames, size=None if height is None else (width, height),
                     guidance=guidance_scale, steps=num_inference_steps, seed=None if generator is None else generator.initial_seed())
        given = {name: value for name, value in given.items() if value is not None}
        if twice := given.keys() & options.keys():
            raise ValueError(f"{min(twice)} is given twice, under both of its names: leave one out")
        from media.given import as_files
        inputs, files = as_files(given | options)
        plan = self.plan(prompt=prompt, negative_prompt=negative_prompt, **inputs)
        if not quiet:
            any_terminal(ours=False)
            print(plan)
        stages, progress = Stages(self.device), {} if quiet else dict(progress=Progress(plan.clips, self.device, begin))
        if out is None:
            return Video(torch.cat(list(self.generate(plan, stages, **progress)), dim=1), plan, files)
        clips, writer = [], open_writer(out, plan, checkpoint=self.checkpoint, restart=restart)
        with writer:
            clips += writer.read_back() if keep_frames else []
            for frames in self.generate(plan, stages, keep=writer.parts, **progress):
                writer.write(frames)
                clips += [frames] if keep_frames else []
                writer.renew_partial()
        return Video(torch.cat(clips, dim=1), plan, files) if keep_frames else out

    def batch(self, jobs):
        """Many videos: networks stay loaded, no frames are kept, a bad job does not stop the others.

        jobs     dicts of arguments of `__call__`, each with its own `out`
        returns  per job its `out`, or the error (one line) that kept it from being made
        """
        from jobs.batch import make_many
        return make_many(self, jobs)


# ------------------------------------------------------------------------------------------------------ S2V: sound and picture

@dataclass(frozen=True)
class ClipInputs:
    """What the clips of one video are made from."""
    text: torch.Tensor           # umT5 rows of the prompt (1, S, text_dim)
    negative: torch.Tensor       # of the negative prompt
    audio: object                # function (first, end) -> (states, audio_dim, end - first): audio frames of those pixel frames
    picture: torch.Tensor        # (1, 3, 1, height, width) in [-1, 1], on the device
    noise: list                  # per clip (1, z, T, H, W), or a function that draws it
    pose: list                   # per clip (1, 3, P, height, width) in [-1, 1], or None; or a function that reads it
    motion_frames: int = 73      # pixel frames of the past that a clip sees: 19 latents


def generate_s2v(checkpoint, plan, stage, progress, keep=NOTHING):
    """The stages of an S2V video; yields the frames of each clip (1, 3, P, height, width)."""
    o, size, n = plan.config, (plan.height, plan.width), plan.config.clip_frames
    experts = load_experts(checkpoint, plan, stage)
    with stage("text"):
        if checkpoint.sampling.get("picture_db"):                    # a checkpoint of drawn faces, see `warn_unless_known`
            from tiny import faces
            faces.warn_unless_known(o.prompt)
        text, negative = encode_text(checkpoint, (o.prompt, o.negative_prompt), plan)
    with stage("audio"):
        from fast.hearing import Hearing                             # here: importing `sample` does not need it
        hear = Hearing(plan.sound, checkpoint.configs["audio"], lambda: checkpoint.load("audio", o.device, torch.float32), o.device, FPS, n)

        def audio(first, end):
            return checkpoint.once(lambda: hear(first, end))
        audio(keep.done * n, keep.done * n + n)                                                  # before other networks need the device
    with stage("picture"):
        vae = load_vae(checkpoint, plan)
        picture = fit_picture(load_image(o.image), size, o.official).to(o.device)[None, :, None]
        if "picture_db" in checkpoint.sampling:
            from media.given import warn_unless_known
            warn_unless_known(vae, picture, o.image, checkpoint.sampling["picture_db"])
    shape = (1, vae.config.z_dim, *plan.latent_shape)
    noise = [partial(draw_noise, shape, o.seed + clip, o.device, o.dtype) for clip in range(plan.clips)]       # on a GPU bf16, as official L571
    from media.frames import load_pose
    pose = [partial(load_pose, o.pose_video, n, size, FPS, clip * n, o.official) if o.pose_video else None for clip in range(plan.clips)]
    inputs = ClipInputs(text, negative, audio, picture, noise, pose, checkpoint.configs["denoiser"].motion_frames)
    yield from make_clips(inputs, vae, experts, o, stage, progress, keep)


def make_clips(inputs, vae, experts, config, stage, progress, keep=NOTHING):
    """The clip loop: yields the frames of each clip (1, 3, P, height, width), P = clip_frames, or 3 less for the first.

    A clip is decoded behind other latents, so that its first frame is no still: behind the 19 latents of the 73 frames before it, or, for
    the first clip, behind the reference picture's latent; then 3 more frames are dropped, in which the decoder warms up. So the first clip
    shows 77 frames of the 80 it heard (see `av_offset` in media/video.py).

    What a clip needs of those before it is `motion`, the latents of 73 frames, and `past`, those of the frames that will be among the next 73
    too: none, if a clip has as many. Both are saved before the clip leaves.
    """
    o, n, picture = config, config.clip_frames, inputs.picture
    with stage("picture"):
        ref = vae.encode(picture)                                    # (1, z, 1, H, W)
        motion, past = begin_motion(inputs, vae, o, keep)            # (1, z, 19, H, W) or None, (1, 3, any, height, width)
    for clip in range(keep.done, len(inputs.noise)):
        first = motion is None                                       # nothing came before: no motion tokens, decode behind the picture
        noise, pose = inputs.noise[clip](), encode_pose(vae, inputs.pose[clip], picture.device)
        with stage("audio"):
            audio = inputs.audio(clip * n, (clip + 1) * n)[None].to(noise.device)
        positive = dict(shape=noise.shape[2:], text=inputs.text, audio=audio, ref=ref, motion=motion, pose=pose)
        experts.begin(positive, dict(positive, text=inputs.negative, audio=0 * audio), o.guidance)
        vae.to("cpu")                                                # leaves its room to the denoiser
        latents = run_sampler(experts, o, noise, stage, partial(progress, clip), keep)
        with stage("decode"):
            vae.to(picture.device)
            frames = decode_frames(vae, [ref if first else motion, latents], n)[:, :, WARM_UP if first else 0:]
        if clip + 1 < len(inputs.noise):
            with stage("motion"):                                    # as floats: 8 bits in between are seen as decay
                past = torch.cat([past, frames], dim=2)[:, :, -inputs.motion_frames:]
                motion = vae.encode(past)
                past = past[:, :, n:].clone()
            with stage("save"):
                keep.save("clip", dict(motion=motion, past=past, vae_float32=torch.tensor(vae.dtype == torch.float32)))
        yield frames


def begin_motion(inputs, vae, config, keep):
    """-> motion, past (see make_clips) of the first clip to make: what was saved, or nothing came before, and motion is None.
    The official code encodes 73 grey frames then and uses the result nowhere.
    """
    shape, P = inputs.picture.shape[3:], inputs.motion_frames
    past = max(0, P - config.clip_frames) if keep.done else P
    if saved := keep.load("clip", motion=(1, vae.config.z_dim, 1 + P // 4, shape[0] // vae.stride[1], shape[1] // vae.stride[2]),
                          past=(1, 3, past, *shape), vae_float32=()):
        if saved["vae_float32"] and vae.dtype == torch.float16:
            vae.widen()
        return saved["motion"].to(inputs.picture.device), saved["past"]
    past = torch.zeros_like(inputs.picture, device="cpu").repeat(1, 1, P, 1, 1)              # mid grey before the first clip
    if not config.start_from_ref:
        return None, past
    past[:, :, -REF_MOTION_FRAMES:] = inputs.picture
    return vae.encode(past), past


def encode_pose(vae, read, device):
    """Pose latents of a clip (1, z, T, H, W), or None without a pose video (which is not the same as a black one)."""
    if read is None:
        return None
    pose = read().to(device)[None]                                   # (1, 3, P, height, width)
    return vae.encode(torch.cat([pose[:, :, :1], pose], dim=2))[:, :, 1:]                    # frame 0 twice, its latent dropped


# ------------------------------------------------------------------------------------------- T2V, I2V, TI2V: prompt, picture

def generate_video(checkpoint, plan, stage, progress, keep=NOTHING):
    """The stages of a video of one clip; yields its frames (1, 3, P, height, width)."""
    o, experts = plan.config, load_experts(checkpoint, plan, stage)
    with stage("text"):
        text, negative = encode_text(checkpoint, (o.prompt, o.negative_prompt), plan)
    image = clean = None
    with stage("picture"):
        vae = load_vae(checkpoint, plan)
        if o.image:
            fit = fit_i2v if plan.denoiser.in_dim > vae.config.z_dim else fit_ti2v
            picture = fit(load_image(o.image), (plan.height, plan.width)).to(o.device)[None, :, None]
            if fit is fit_i2v:
                image = image_condition(vae, picture, o.frames)
            else:
                clean = vae.encode(picture)
    positive = dict(shape=plan.latent_shape, text=text, image=image, clean_frames=0 if clean is None else 1)
    experts = experts.begin(positive, dict(positive, text=negative), o.guidance)
    noise = draw_noise((1, vae.config.z_dim, *plan.latent_shape), o.seed, o.device, torch.float32)
    vae.to("cpu")                                                    # leaves its room to the denoiser
    latents = run_sampler(experts, o, noise, stage, partial(progress, 0), keep, clean)
    with stage("decode"):
        vae.to(o.device)
        yield decode_frames(vae, [latents], o.frames)


def image_condition(vae, picture, frames):
    """I2V's extra channels: mask 4 and latents 16.  picture (1, 3, 1, height, width), frames P -> (1, 20, T, H, W)

    The frames after the picture are zeros, mid grey; the mask says that only the first frame is known (official L266-299).
    """
    rest = picture.new_zeros(1, 3, 4, *picture.shape[3:])
    latents = vae.with_fp32_fallback(lambda: torch.cat(list(vae.encode_stream([picture] + [rest] * ((frames - 1) // 4))), dim=2))
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


# ------------------------------------------------------------------------------------------------------- what every task does

def run_sampler(experts, config, noise, stage, progress, keep, clean=None):
    """The stages of one clip's denoising, from the step on at which an earlier run stopped -> latents.  Arguments as `denoise`"""
    o, solver = config, make_solver(config.solver, config.steps, config.shift)
    velocity = o.speed and o.speed.velocity()                        # None: every step is computed
    if saved := keep.load("steps", latents=noise.shape, x=noise.shape, step=()):
        saved = {name: value.to(noise.device) for name, value in saved.items()}
        noise, solver = saved["latents"], solver.restore(saved, int(saved["step"]))
        if velocity:
            velocity.restore(saved, solver.begin)

    def after_step(step, x):
        if keep.due(step) and (guesses := velocity.state() if velocity else {}) is not None:
            with stage("save"):
                keep.save("steps", solver.state() | guesses | dict(latents=x, step=torch.tensor(step)))
    with stage("load"):
        if solver.begin < o.steps:
            experts.at(solver.timesteps[solver.begin].item())
    with stage("denoise"):
        return denoise(experts, solver, noise, clean, progress, after_step, velocity)


def encode_text(checkpoint, prompts, plan):
    """Prompts -> umT5 rows, each (1, S, text_dim); the encoder is released again."""
    def encode():
        encoder = checkpoint.load("text", plan.config.device, plan.config.dtype, False, plan.memory.text_resident)
        tokenizer = Tokenizer(checkpoint.tokenizer, plan.denoiser.text_len)
        return [encode_prompt(encoder, tokenizer, prompt)[None].cpu() for prompt in prompts]
    return [rows.to(plan.config.device) for rows in checkpoint.once(encode)]


def load_experts(checkpoint, plan, stage):
    """The denoisers, each loaded when its steps come: as model.py has them on a CPU, by fast/ on a GPU. While the first works, the files of the
    second are read into the system's memory, where there is room: the switch then waits for no disk."""
    o, m = plan.config, plan.memory
    plain = o.device.type == "cpu" and not (o.compile or o.attention8 or checkpoint.ranks)
    if not plain:
        from fast import attention8, blocks, offload                 # here: a CPU does without
        wait = blocks.get_ready(NETWORKS["denoiser"], plan.denoiser, o.device, o.compile)

    def load(name):
        with stage("load" if name == checkpoint.experts[0] else "switch"):
            net = checkpoint.load(name, o.device, o.dtype, o.fp8, m.resident)
        if plain:
            return net
        wait()
        for other in checkpoint.experts[1:]:
            if name != other and m.host + checkpoint.parts[other].nbytes < plan.free.host:
                offload.read_ahead(checkpoint.parts[other].tensors)
        how = m.chunk, attention8.attention8 if o.attention8 else blocks.attend, o.compile, m.host_layers
        if checkpoint.ranks is None:
            return blocks.FastDenoiser(net, *how)
        from fast.parallel import ParallelDenoiser
        return ParallelDenoiser(net, *how, ranks=checkpoint.ranks)
    return Experts(checkpoint.experts, checkpoint.boundary, load, keep=o.device.type == "cpu")


def load_vae(checkpoint, plan):
    vae = checkpoint.load("vae", plan.config.device, plan.config.vae_dtype)
    vae.to(plan.config.device, plan.config.vae_dtype)                # one that was kept may wait in host memory, or have gone on in float32
    vae.tiles, vae.ranks = plan.memory.tiles, checkpoint.ranks
    from fast.convolution import use_kernels
    return use_kernels(vae)


def decode_frames(vae, pieces, n):
    """Decode one video and keep its last n frames, on the CPU.  pieces [(1, z, any T, H, W), ...] -> (1, 3, n, height, width)

    Frame after frame in memory, as a video file takes them.
    """
    def run():
        skip, video, done = 1 + vae.stride[0] * (sum(piece.shape[2] for piece in pieces) - 1) - n, None, 0
        for frames in on_host(piece[0].transpose(0, 1).contiguous() for piece in vae.decode_stream(pieces)):     # (any, 3, height, width)
            wanted, skip = frames[skip:], max(0, skip - len(frames))
            video = torch.empty(n, *wanted.shape[1:]) if video is None else video
            video[done:done + len(wanted)] = wanted
            done += len(wanted)
        return video.transpose(0, 1)[None]
    return vae.with_fp32_fallback(run)


def on_host(pieces):
    """Tensors -> the same on the CPU. A piece travels while the next is computed; page-locked memory is taken for two of them."""
    for arrived, _ in pairwise(chain(map(send, pieces), [None])):
        yield arrived()


def send(x):
    """-> function that waits until x is on the CPU and returns it"""
    if not x.is_cuda:
        return lambda: x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    event = torch.cuda.current_stream(x.device).record_event()
    return lambda: event.synchronize() or host


def draw_noise(shape, seed, device, dtype):
    """From a fresh generator on the run's device, so that a seed gives what it gives in the official code; but that on a CPU, whose generator
    reads 32 bits, larger seeds are mixed into as many: officially 3 and 2^33 + 3 are one."""
    if device.type == "cpu" and seed >= 2 ** 32:
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))


def run_dtype(wanted, device):
    """The dtype of the linear layers: float32 on a CPU, bfloat16 on a GPU unless float32 is asked for.  raises ValueError for none of these"""
    wanted = getattr(torch, wanted, None if wanted == "auto" else wanted) if isinstance(wanted, str) else wanted
    if wanted not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"wanted float32 or bfloat16, got {wanted}: leave the dtype out")
    if wanted == torch.float16:
        print("warning: float16 overflows in this model family; running in bfloat16, on a CPU in float32", file=sys.stderr)
    if device.type == "cpu" or wanted == torch.float32:
        return torch.float32
    return torch.bfloat16
