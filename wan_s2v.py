"""WanS2VPipeline: one picture and one sound become one video, clip by clip.

Stages  plan -> text (umT5) -> audio (wav2vec2) -> picture (VAE) -> per clip: denoise, decode, encode the last frames for the next clip.
Each network is loaded when its stage begins and released when it ends; frames leave as soon as their clip is done.

A clip of 80 frames is 20 latent frames. It is decoded behind other latents, so that its first frame is no still: behind the 19 latents
of the 73 frames before it, or, for the first clip, behind the reference picture's latent; then 3 more frames are dropped, in which the
decoder warms up. So the first clip shows 77 frames of the 80 it heard (see `av_offset` in video.py).

Axes    B batch (1)   T latent frames   P pixel frames   H W latent size
Source  Wan-Video/Wan2.2@42bf4cf wan/speech2video.py
"""
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from audio import audio_features, audio_frame_indices
from formats.checkpoints import open_checkpoint
from fast.plan import Fit, Machine, device_limit, estimate_seconds, fit, memory_used, private_memory, synchronize
from model import MOTION_BUCKETS, PATCH, compile_blocks, use_attention8
from media.pictures import fit_picture, load_image, s2v_size
from sampling import Experts, denoise
from solver import SOLVERS, make_solver
from text import Tokenizer, encode_prompt
from media.ffmpeg import probe
from media.sound import RATE, load_audio
from media.video import VideoWriter, load_pose

FPS = 16
WARM_UP = 3                  # pixel frames dropped from the first clip, which has no motion frames before it (official L656)
REF_MOTION_FRAMES = 6        # start_from_ref: how many of the motion frames are the reference picture (official L506)
MAX_CLIP_FRAMES = 120        # 30 latent frames have RoPE times 0..29; the reference picture has 30 and must not be met


@dataclass(frozen=True)
class Options:
    """Everything a user may choose about one video, of any task. None stands for the checkpoint's own value."""
    audio: str | None = None
    image: str | None = None
    prompt: str = ""
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None   # (width, height): with a picture, their product is a budget and the picture's shape is kept
    steps: int | None = None
    shift: float | None = None
    guidance: float | tuple[float, ...] | None = None   # one value, or (low noise, high noise)
    solver: str | None = None
    seed: int = 42                        # of clip 0; clip r has seed + r
    frames: int | None = None             # of the whole video, at most
    clips: int | None = None              # at most; the audio may need fewer
    clip_frames: int | None = None        # pixel frames made at once: a multiple of 4, at most 120
    pose_video: str | None = None
    start_from_ref: bool = False          # the first clip begins with the reference picture itself
    start: float = 0.0                    # seconds into the audio
    duration: float | None = None         # seconds of audio to use

    def resolve(self, sampling, **defaults):
        """Fill in the checkpoint's values and check all.  raises ValueError with the name, what is wanted and what came"""
        defaults = {name: sampling[name] for name in ("steps", "shift", "guidance", "solver", "negative_prompt", "size")} | defaults
        o = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        o = replace(o, guidance=tuple(o.guidance) if isinstance(o.guidance, (tuple, list)) else (float(o.guidance),), size=tuple(o.size))
        for name, ok, want in (
                ("steps", 1 <= o.steps <= 1000, "1 to 1000"),
                ("shift", 0 < o.shift <= 100, "above 0, at most 100"),
                ("guidance", all(0 <= g <= 50 for g in o.guidance), "0 to 50 (1 or less turns guidance off)"),
                ("solver", o.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
                ("seed", 0 <= o.seed < 2 ** 63, "0 to 2^63 - 1"),
                ("size", len(o.size) == 2 and min(o.size) >= 1, "two positive numbers, width and height"),
                ("frames", o.frames is None or o.frames >= 1, "1 or more"),
                ("clips", o.clips is None or o.clips >= 1, "1 or more"),
                ("start", o.start >= 0, "0 or more seconds"),
                ("duration", o.duration is None or o.duration > 0, "more than 0 seconds"),
                ("clip_frames", o.clip_frames is None or (o.clip_frames % 4 == 0 and 4 <= o.clip_frames <= MAX_CLIP_FRAMES),
                 f"a multiple of 4 (a latent frame is 4 frames) up to {MAX_CLIP_FRAMES} (more would meet the reference picture's position)")):
            if not ok:
                raise ValueError(f"{name} must be {want}, got {getattr(o, name)}")
        return o


@dataclass(frozen=True)
class Plan:
    """What will be made, and what it takes; made from file headers, before anything is loaded."""
    options: Options
    sound: torch.Tensor          # (samples,) 16 kHz mono
    height: int                  # of a frame in pixels
    width: int
    clips: int
    latent_shape: tuple[int, int, int]   # T, H, W of one clip
    tokens: tuple[int, int]      # of the first clip, of a later one
    weights: dict[str, float]    # component -> GiB
    fit: Fit                     # how it will be run
    seconds: float               # of denoising, by a probe
    fps: float = FPS

    @property
    def frames(self):
        """Of the whole video."""
        total = self.clips * self.options.clip_frames - (0 if self.options.start_from_ref else WARM_UP)
        return min(total, self.options.frames or total)

    def __str__(self):
        o, seconds = self.options, len(self.sound) / RATE
        end = min(seconds, self.frames / FPS)
        cut = "" if abs(seconds - self.frames / FPS) < 1 / FPS else \
            f"; {'sound' if seconds > end else 'picture'} cut to {end:.2f} s, the shorter of the two"
        return "\n".join((
            f"sound    {seconds:.2f} s of {Path(o.audio).name}",
            f"video    {self.width}x{self.height}, {self.clips} clip{'s' * (self.clips > 1)} of {o.clip_frames} frames -> {self.frames} frames "
            f"at {FPS} fps = {self.frames / FPS:.2f} s{cut}",
            f"sampler  {o.solver}, {o.steps} steps, shift {o.shift:g}, guidance {', '.join(f'{g:g}' for g in o.guidance)}, seed {o.seed}",
            f"tokens   {self.tokens[0]:,} in the first clip, {self.tokens[1]:,} in a later one",
            f"weights  {size_table(self.weights)}",
            str(self.fit),
            f"time     about {timedelta(seconds=round(self.seconds))} of denoising",
        ))


class Stages:
    """Seconds spent per stage, and on a GPU the most memory that was reserved: `with stages("text"): ...`"""

    def __init__(self, device=torch.device("cpu")):
        self.device, self.seconds, self.gib, self.private = device, {}, {}, 0.0

    @contextmanager
    def __call__(self, name):
        start, gpu = time.perf_counter(), self.device.type == "cuda"
        if gpu:
            torch.cuda.empty_cache()                                 # what the last stage left is not this one's
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self.private = max(self.private, private_memory())
            if gpu:
                self.gib[name] = max(self.gib.get(name, 0.0), memory_used(self.device)[0])
        if gpu:
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self):
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())

    def memory(self):
        """Of all stages, those that failed too, and of the process on the host."""
        stages = [f"{name} {gib:.2f}" for name, gib in self.gib.items()]
        return f"GiB reserved on the GPU: {', '.join(stages) or 'none'}; host {memory_used(self.device)[1]:.1f} GiB at most, " \
            f"{self.private:.1f} without mapped files"


@dataclass(frozen=True)
class Video:
    """A finished video.  frames (3, P, height, width) float32 in [-1, 1], plan as it was made from"""
    frames: torch.Tensor
    plan: object

    def save(self, path, av_offset=0):
        """Write an mp4 with the sound, or PNG frames if path ends in "/"."""
        with open_writer(path, self.plan, av_offset) as writer:
            writer.write(self.frames)
        return path


def open_writer(path, plan, av_offset=0):
    """A VideoWriter for what a plan will make, with the sound if there is any."""
    o = plan.options
    return VideoWriter(path, (plan.height, plan.width), plan.fps, audio=o.audio, start=o.start, duration=o.duration, av_offset=av_offset)


def token_counts(latent_shape):
    """Tokens of a clip with (T, H, W) latents: (first clip, later clip with motion tokens)."""
    T, H, W = latent_shape
    first = (T + 1) * (H // PATCH[1]) * (W // PATCH[2])              # video and reference
    return first, first + sum(frames // t * (H // h) * (W // w) for _, frames, (t, h, w) in MOTION_BUCKETS)


class WanS2VPipeline:
    """Picture + sound -> video. See `__call__`; `generate` gives the frames clip by clip."""

    def __init__(self, checkpoint, machine, vram=None):
        if not checkpoint.configs["denoiser"].audio_dim:
            raise ValueError(f"a speech-to-video checkpoint is wanted, got {checkpoint.task}, which has no audio layers")
        self.checkpoint, self.machine, self.limit = checkpoint, machine, device_limit(machine.device, vram)

    @classmethod
    def from_pretrained(cls, path, torch_dtype=None, device_map="auto", vram=None, **choices):
        """path        folder in the official or converted layout, or a hub id that huggingface_hub can find
        torch_dtype    of the large linear layers on a GPU: bfloat16 (default) or float32; float16 runs as bfloat16; a CPU runs float32
        device_map     "auto" (a GPU if there is one), or a device; what stays on it and what is streamed follows from its free memory
        vram           GB of a card to plan for        choices  fields of machine.Machine: compiled, quantize, attention8, resident, vae_dtype
        raises         ValueError naming what is missing or wrong
        """
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device_map in (None, "auto") else device_map)
        return cls(open_checkpoint(local_folder(path)), Machine(device, run_dtype(torch_dtype, device), **choices), vram)

    # ------------------------------------------------------------------------------------------------------------- stages

    def plan(self, options):
        """Options -> Plan. Reads the sound and the picture's size, no weights."""
        sampling, vae = self.checkpoint.sampling, self.checkpoint.configs["vae"]
        options = options.resolve(sampling, clip_frames=sampling["frames"])
        for name in ("audio", "image"):
            if getattr(options, name) is None:
                raise ValueError(f"{self.checkpoint.task} needs an {name}: give a file")
        sound, picture = load_audio(options.audio, options.start, options.duration), load_image(options.image)
        if options.pose_video and probe(options.pose_video, count=False).video_codec is None:
            raise ValueError(f"{options.pose_video} holds no picture: wanted a pose video")
        stride = vae.stride
        height, width = s2v_size(picture.height, picture.width, options.size[0] * options.size[1], step=8 * stride[1])
        columns = self.checkpoint.configs["audio"].frames(len(sound))                       # 50 a second
        _, needed = audio_frame_indices(int(columns / 50 * 30), FPS, options.clip_frames)
        shape = (options.clip_frames // stride[0], height // stride[1], width // stride[2])
        clips = min(options.clips or needed, needed)
        if options.frames:
            clips = min(clips, -(-(options.frames + (0 if options.start_from_ref else WARM_UP)) // options.clip_frames))
        tokens, cfg, video = token_counts(shape), self.checkpoint.configs["denoiser"], shape[0] * shape[1] * shape[2] // 4
        room = fit(self.checkpoint, shape, tokens[clips > 1 or options.start_from_ref], self.machine, self.limit)
        forwards = clips * options.steps * (2 if max(options.guidance) > 1 else 1)
        seconds = estimate_seconds(cfg, replace(room.machine, quantize=room.fp8), tokens[clips > 1], video, forwards)
        return Plan(options, sound, height, width, clips, shape, tokens, self.checkpoint.sizes(), room, seconds)

    def encode_audio(self, plan):
        """The plan's sound -> wav2vec2 states (1, states, audio_dim, columns) on the CPU, one column per pixel frame of all clips"""
        encoder = self.checkpoint.load("audio", self.machine.device, torch.float32)
        features, _ = audio_features(encoder, plan.sound.to(self.machine.device), FPS, plan.options.clip_frames)
        return features[None].cpu()                                  # 100 MB a minute: the device gets one clip of it at a time

    def encode_pose(self, vae, plan, clip):
        """Pose latents of a clip (1, z, T, H, W), or None without a pose video (which is not the same as a black one)."""
        if plan.options.pose_video is None:
            return None
        n = plan.options.clip_frames
        pose = load_pose(plan.options.pose_video, n, (plan.height, plan.width), FPS, first=clip * n).to(self.machine.device)[None]
        return vae.encode(torch.cat([pose[:, :, :1], pose], dim=2))[:, :, 1:]                # frame 0 twice, its latent dropped

    # --------------------------------------------------------------------------------------------------------------- clips

    @torch.no_grad()
    def generate(self, plan, stage=None, progress=lambda clip, steps: steps):
        """Make a video clip by clip.

        plan      from `plan`                   stage     a Stages, to collect times
        progress  wraps the list of steps of clip number `clip`
        yields    (3, P, height, width) float32 in [-1, 1] on the CPU
        """
        stage, o, machine = stage or Stages(), plan.options, plan.fit.machine
        with stage("text"):
            text, negative = encode_text(self.checkpoint, (o.prompt, o.negative_prompt), machine)
        with stage("audio"):
            audio = self.encode_audio(plan)
        with stage("picture"):
            vae = load_vae(self.checkpoint, machine)
            picture = fit_picture(load_image(o.image), (plan.height, plan.width)).to(machine.device)[None, :, None]
            warn_unless_known(vae, picture, plan.options.image, self.checkpoint.sampling.get("picture_db"))
        shape, experts = (1, vae.config.z_dim, *plan.latent_shape), load_experts(self.checkpoint, machine)
        inputs = ClipInputs(text, negative, audio, picture, pose=lambda clip: self.encode_pose(vae, plan, clip),
                            noise=lambda clip: draw_noise(shape, o.seed + clip, machine.device, machine.dtype),  # bf16 as official L571
                            motion_frames=self.checkpoint.configs["denoiser"].motion_frames)
        left = plan.frames
        for frames in make_clips(inputs, vae, experts, o, plan.clips, stage, progress):
            yield frames[0, :, :left].float().cpu()
            left -= frames.shape[2]

    def __call__(self, audio_path, image_path, prompt="", negative_prompt=None, num_frames=None, height=None, width=None,
                 guidance_scale=None, num_inference_steps=None, generator=None, enable_cpu_offload=None, use_fp16=False, **options):
        """One video from a sound and a picture.

        audio_path, image_path   files of any common format
        num_frames               length of the video at 16 fps, at most; default: as long as the sound
        height, width            a pixel budget: the picture's own shape is kept, scaled down to height * width pixels at most
        guidance_scale, num_inference_steps    default: the checkpoint's
        generator                a torch.Generator: its seed is used
        enable_cpu_offload       no effect: every network leaves the device when its stage ends
        use_fp16                 runs as bfloat16, with a warning: float16 overflows in this model family
        options                  any other field of Options: shift, solver, seed, clips, clip_frames, pose_video, start_from_ref, ...
        returns                  Video, with .frames and .save(path)
        raises                   ValueError for files or values that cannot be used
        """
        if use_fp16:
            run_dtype(torch.float16, self.machine.device)
        if (height is None) != (width is None):
            raise ValueError(f"height and width go together, got height {height} and width {width}")
        if generator is not None:
            options["seed"] = generator.initial_seed()
        size = None if height is None else (width, height)
        plan = self.plan(Options(audio_path, image_path, prompt, negative_prompt, size, num_inference_steps, guidance=guidance_scale,
                                 frames=num_frames, **options))
        return Video(torch.cat(list(self.generate(plan)), dim=1), plan)


# ------------------------------------------------------------------------------------------------------------- the clip loop

@dataclass(frozen=True)
class ClipInputs:
    """What the clips of one video are made from."""
    text: torch.Tensor           # umT5 rows of the prompt (1, S, text_dim)
    negative: torch.Tensor       # of the negative prompt
    audio: torch.Tensor          # (1, states, audio_dim, columns): one column per pixel frame of all clips
    picture: torch.Tensor        # (1, 3, 1, height, width) in [-1, 1], on the device
    noise: Callable              # clip number -> (1, z, T, H, W)
    pose: Callable = lambda clip: None   # clip number -> pose latents (1, z, T, H, W) or None
    motion_frames: int = 73      # pixel frames of the past that a clip sees: 19 latents


def decode_frames(vae, pieces, n):
    """Decode one video and keep its last n frames, on the CPU.  pieces [(1, z, any T, H, W), ...] -> (1, 3, n, height, width)

    The frames of a piece travel while the next ones are computed; frame after frame in memory, as a video file takes them.
    """
    latents, gpu = sum(piece.shape[2] for piece in pieces), pieces[0].is_cuda

    def run():
        skip, kept, done = 1 + vae.stride[0] * (latents - 1) - n, None, 0
        for frames in vae.decode_stream(pieces):
            wanted = frames[0, :, skip:].transpose(0, 1).contiguous()                        # (any, 3, height, width)
            skip = max(0, skip - frames.shape[2])
            kept = torch.empty(n, *wanted.shape[1:], pin_memory=gpu) if kept is None else kept
            kept[done:done + len(wanted)].copy_(wanted, non_blocking=True)
            done += len(wanted)
        synchronize(pieces[0].device)
        return kept.transpose(0, 1)[None]
    return vae.with_fp32_fallback(run)


def make_clips(inputs, vae, experts, options, clips, stage, progress):
    """The clip loop: yields the frames of each clip (1, 3, P, height, width), P = clip_frames, or 3 less for the first."""
    o, n, picture = options, options.clip_frames, inputs.picture
    with stage("picture"):
        ref = vae.encode(picture)                                    # (1, z, 1, H, W)
        history = torch.zeros_like(picture, device="cpu").repeat(1, 1, inputs.motion_frames, 1, 1)           # mid grey before the first clip
        if o.start_from_ref:
            history[:, :, -REF_MOTION_FRAMES:] = picture
        motion = vae.encode(history)                                 # (1, z, 19, H, W)
    for clip in range(clips):
        first = clip == 0 and not o.start_from_ref                   # nothing came before: no motion tokens, decode behind the picture
        pose, noise = inputs.pose(clip), inputs.noise(clip)
        audio = inputs.audio[..., clip * n:(clip + 1) * n].to(noise.device)
        solver = make_solver(o.solver, o.steps, o.shift)

        def arguments(positive):
            text, heard = (inputs.text, audio) if positive else (inputs.negative, 0 * audio)
            return dict(shape=noise.shape[2:], text=text, audio=heard, ref=ref, motion=None if first else motion, pose=pose)

        with stage("load"):
            vae.to("cpu")                                            # leaves its room to the denoiser
            experts.net(experts.index(solver.timesteps[0].item()))
        with stage("denoise"):
            latents = denoise(experts, solver, noise, arguments, o.guidance, progress=lambda steps: progress(clip, steps))
        with stage("decode"):
            vae.to(picture.device)
            frames = decode_frames(vae, [ref if first else motion, latents], n)[:, :, WARM_UP if first else 0:]
        yield frames
        if clip + 1 < clips:
            with stage("motion"):                                    # as floats: 8 bits in between are seen as decay
                history = torch.cat([history, frames], dim=2)[:, :, -inputs.motion_frames:]
                motion = vae.encode(history)


# -------------------------------------------------------------------------------------------- what every task's pipeline does

def size_table(sizes):
    """{component: GiB} -> one line"""
    return ", ".join(f"{name} {gib:.1f} GiB" if gib >= 1 else f"{name} {1024 * gib:.1f} MiB" for name, gib in sizes.items())


def encode_text(checkpoint, prompts, machine):
    """Prompts -> umT5 rows, each (1, S, text_dim); the encoder is released again."""
    encoder = checkpoint.load("text", machine.device, machine.dtype, resident=machine.text_resident)
    tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.configs["denoiser"].text_len)
    return [encode_prompt(encoder, tokenizer, prompt)[None] for prompt in prompts]


def warn_unless_known(vae, picture, path, least):
    """A checkpoint for one kind of picture says how well (dB) its VAE gives back those; what comes back worse is something else.

    picture  (1, 3, 1, height, width) in [-1, 1]        least  in dB, or None for a checkpoint that knows all pictures
    """
    if least is None:
        return
    db = -10 * ((vae.decode(vae.encode(picture)) - picture) / 2).square().mean().log10().item()
    if db < least:
        print(f"warning: {path} is unlike the pictures this checkpoint was trained on (its VAE gives it back at {db:.1f} dB, those at {least:g} or "
              f"more): expect a poor face. `python -m tiny.faces face.png` draws one that it knows", file=sys.stderr)


def load_experts(checkpoint, machine):
    """The denoisers, each loaded when its steps come."""
    def load(name):
        net = checkpoint.load(name, machine.device, machine.dtype, machine.quantize, machine.resident)
        if machine.compiled:
            compile_blocks(net)
        if machine.attention8:
            use_attention8(net)
        return net
    return Experts(checkpoint.experts, checkpoint.boundary, load, machine.device.type == "cpu", machine.span, machine.one_loop, machine.host_layers)


def load_vae(checkpoint, machine):
    vae = checkpoint.load("vae", machine.device, machine.vae_dtype)
    vae.tiles = machine.tiles
    return vae


def draw_noise(shape, seed, device, dtype):
    """From a fresh generator on the run's device, so that a seed gives what it gives in the official code."""
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))


def run_dtype(wanted, device):
    """The dtype of the linear layers: float32 on a CPU, bfloat16 on a GPU unless float32 is asked for."""
    if wanted == torch.float16:
        print("warning: float16 overflows in this model family; running in bfloat16, on a CPU in float32", file=sys.stderr)
    if device.type == "cpu" or wanted == torch.float32:
        return torch.float32
    return torch.bfloat16


def local_folder(path):
    """A checkpoint folder on this machine, fetched by huggingface_hub if path is a hub id and that package is installed."""
    if Path(path).is_dir():
        return Path(path)
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(path)))
    except ImportError:
        raise ValueError(f"no checkpoint folder {path}: give a folder, or install huggingface_hub to use a hub id") from None
    except Exception as error:
        raise ValueError(f"no checkpoint folder {path}, and the hub did not give it ({type(error).__name__}): give a local folder") from None
