"""What will be made, and how it fits: from the user's choices, a checkpoint's headers and the free memory. Arithmetic alone; it decodes
the sound, reads the size of the picture, loads no weights and touches no device.

The denoiser's peak is during self-attention, which holds, beside the weights,
    x                                            4 bytes per token and channel
    q, k, v                                      6 bytes; exact attention writes its result over q, 8-bit attention needs 1 byte for v
    what a clip's conditions keep at hand        both guidance branches: RoPE, reference and motion tokens, text keys and values
or, where many tokens are worked on at once, just before or behind it. If it does not fit: chunk the tokens; keep text keys and values on
the host; offload blocks. The VAE waits in host memory while the denoiser works; while the VAE works the denoiser stays on the device.
"""
import math
from dataclasses import dataclass, replace
from os import PathLike

import torch

from audio import audio_frame_indices
from fast.probe import GIB, Memory
from formats.checkpoints import parameter_dtype
from media.pictures import i2v_size, load_image, s2v_size, ti2v_size
from media.sound import RATE
from model import MOTION_BUCKETS, PATCH
from sampling import SOLVERS

FPS = 16                     # of S2V: audio frames are made at this rate
WARM_UP = 3                  # pixel frames dropped from the first clip, which has no motion frames before it (official L656)
MAX_CLIP_FRAMES = 120        # 30 latent frames have RoPE times 0..29; the reference picture has 30 and must not be met

OVERHEAD = 0.35 * GIB        # workspaces, compilation, what the allocator cannot use: of T2V-A14B an H200 reserved 0.1 to 0.3 more than is counted
AUDIO = 0.55 * GIB           # and of S2V-14B so much more than of T2V, at every size
HOST_OVERHEAD = 1.8 * GIB    # PyTorch, CUDA and Python: an H200 machine had 16.9 GiB in use with 15.2 pinned
CHUNK = 8192                 # tokens worked on at once when memory is short: enough for full speed
TEXT_ACTIVATIONS = 0.15 * GIB            # an H200 reserved 0.07
TILES = 4                    # of the VAE: more cost time
COMPILE_SECONDS = 17         # what compiling takes, once per run (H200: 9 s where an earlier run's kernels are kept, else 17 to 22)
COMPILE_GAIN = 8e-11         # seconds that it saves per token, channel and layer of a forward (H200: 0.58 s at 33,540 tokens, 5120 channels, 40)


@dataclass(frozen=True)
class RunConfig:
    """What the user chose, for one video of any task. None stands for the checkpoint's own value, or for the best one."""
    audio: str | PathLike | None = None
    image: str | PathLike | None = None
    prompt: str = ""
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None   # (width, height): with a picture, their product is a budget and the picture's shape is kept
    enlarge: bool = False                 # S2V: a picture of fewer pixels than that is scaled up to them
    steps: int | None = None
    shift: float | None = None
    guidance: float | tuple[float, ...] | None = None   # one value, or (low noise, high noise)
    solver: str | None = None
    seed: int = 42                        # of clip 0; clip r has seed + r
    frames: int | None = None             # of the whole video, at most
    clips: int | None = None              # at most; the audio may need fewer
    clip_frames: int | None = None        # pixel frames made at once: a multiple of 4, at most 120
    pose_video: str | PathLike | None = None
    start_from_ref: bool = False          # the first clip begins with the reference picture itself
    official: bool = False                # S2V: picture and pose placed, and frames counted, as the official code does, see `count_clips`
    start: float = 0.0                    # seconds into the audio
    duration: float | None = None         # seconds of audio to use
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None      # of the large linear layers: bfloat16 on a GPU, float32 on a CPU
    vae_dtype: torch.dtype | None = None  # float16 on a GPU, float32 on a CPU
    fp8: bool = False                     # cast the denoiser's large matrices to float8 while loading
    compile: bool | None = None           # the per-token parts of the blocks; None: where it saves more than it takes
    attention8: bool = False              # self-attention in 8 bits
    resident: int | None = None           # denoiser blocks that stay on the device; None: as many as fit
    speed: object = None                  # what is skipped, as --speed says it, see fast/caching.py; None: every step is computed
    split: tuple[int, int] = (1, 1)       # over several ranks: halves that share the branches of guidance, runs of tokens, see parallel.py

    def resolve(self, checkpoint):
        """Fill in the checkpoint's values and check all.  raises ValueError with the name, what is wanted and what came"""
        s, gpu, s2v = checkpoint.sampling, self.device.type == "cuda", bool(checkpoint.configs["denoiser"].audio_dim)
        defaults = {name: s[name] for name in ("steps", "shift", "guidance", "solver", "negative_prompt", "size")}
        defaults |= {"clip_frames" if s2v else "frames": s["frames"], "dtype": torch.bfloat16 if gpu else torch.float32,
                     "vae_dtype": torch.float16 if gpu else torch.float32}
        o = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        from media.given import on_cpu, whole_number                 # here, as below: importing `sample` does not need it
        o = o if gpu else on_cpu(o)
        whole = {name: whole_number(name, getattr(o, name)) for name in ("steps", "seed", "frames", "clips", "clip_frames", "resident")}
        o = replace(o, **whole, guidance=tuple(o.guidance) if isinstance(o.guidance, (tuple, list)) else (float(o.guidance),), size=tuple(o.size))
        for name, ok, want in (
                ("steps", 1 <= o.steps <= 1000, "1 to 1000"),
                ("shift", 0 < o.shift <= 100, "above 0, at most 100"),
                ("guidance", len(o.guidance) in (1, 2) and all(0 <= g <= 50 for g in o.guidance), "one or two of 0 to 50 (1 or less turns it off)"),
                ("solver", o.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
                ("seed", 0 <= o.seed < 2 ** 63, "0 to 2^63 - 1"),
                ("size", len(o.size) == 2 and min(o.size) >= 1, "two positive numbers, width and height"),
                ("frames", o.frames is None or o.frames >= 1, "1 or more"),
                ("clips", o.clips is None or o.clips >= 1, "1 or more"),
                ("start", 0 <= o.start < 1e9, "0 or more seconds, below 10^9"),
                ("duration", o.duration is None or 0 < o.duration < 1e9, "more than 0 seconds, below 10^9"),
                ("clip_frames", o.clip_frames is None or (o.clip_frames % 4 == 0 and 4 <= o.clip_frames <= MAX_CLIP_FRAMES),
                 f"a multiple of 4 (a latent frame is 4 frames) up to {MAX_CLIP_FRAMES} (more would meet the reference picture's position)")):
            if not ok:
                raise ValueError(f"{name} must be {want}, got {getattr(o, name)}")
        if o.speed is None:
            return o
        from fast.caching import resolve                             # here: the reference does without
        return resolve(o, checkpoint)


@dataclass(frozen=True)
class MemoryPlan:
    """How a run fits, and the bytes that it will take."""
    chunk: int | None = None     # most tokens worked on at once
    host_layers: bool = False    # text keys and values wait in host memory
    resident: int | None = None  # denoiser blocks that stay on the device; None: all
    text_resident: int | None = None     # the same for the text encoder
    tiles: int = 1               # spatial tiles of the VAE
    blocks: int = 0              # that there are
    fp8: bool = False            # are the denoiser's large matrices float8, by the checkpoint or by choice?
    denoiser: int = 0            # bytes of the device while it works
    weights: int = 0             # of them its weights
    text: int = 0
    vae: int = 0
    audio: int = 0               # while sound is encoded; from its second window on beside denoiser and VAE
    streamed: int = 0            # of the denoiser in pinned host memory
    host: int = 0                # of host memory, mapped files not counted

    @property
    def peak(self):
        return max(self.denoiser, self.text, self.vae, self.audio)


@dataclass(frozen=True)
class Plan:
    """What will be made, and what it takes."""
    config: RunConfig            # with every value filled in
    task: str
    fps: float
    height: int                  # of a frame in pixels
    width: int
    clips: int
    frames: int                  # of the whole video
    latent_shape: tuple[int, int, int]   # T, H, W of one clip
    tokens: tuple[int, ...]      # of the first clip, and of a later one where that has more
    sound: object                # a Speech, or None
    denoiser: object             # its Config
    sizes: dict[str, float]      # component -> GiB on disk
    memory: MemoryPlan
    free: Memory
    notes: tuple[str, ...] = ()  # what the user may not expect, and what to do

    @property
    def video_tokens(self):
        return math.prod(self.latent_shape) // math.prod(PATCH)

    @property
    def held(self):
        """How many frames the last one is shown longer."""
        return 0 if self.sound is None else max(0, self.frames - self.clips * self.config.clip_frames + warm_up(self.config))

    @property
    def forwards(self):
        return self.clips * clip_forwards(self.config)

    def __str__(self):
        from fast.plan_text import plan_text                         # here: importing `sample` does not need it
        return plan_text(self)


def clip_forwards(config):
    """Of one clip, at most."""
    return config.speed.forwards if config.speed else config.steps * (2 if max(config.guidance) > 1 else 1)


# ------------------------------------------------------------------------------------------------------------- what will be made

def make_plan(config, checkpoint, free):
    """RunConfig, Checkpoint (of which headers are read), Memory -> Plan.

    raises  ValueError for inputs that the task cannot use, and where it cannot fit, with the option that would make it fit
    """
    config, cfg, vae = config.resolve(checkpoint), checkpoint.configs["denoiser"], checkpoint.configs["vae"]
    kind = checkpoint.task.split("-")[0]
    from media.given import check_inputs
    check_inputs(config, checkpoint.task, kind, vae.stride[0])
    height, width, notes = frame_size(config, kind, vae.stride[1])
    H, W = height // vae.stride[1], width // vae.stride[2]
    fields = dict(task=checkpoint.task, height=height, width=width, notes=notes, denoiser=cfg, sizes=checkpoint.sizes(), free=free)
    if kind == "s2v":
        from media.speech import open_speech                         # here: importing `sample` does not need it
        shape, sound = (config.clip_frames // vae.stride[0], H, W), open_speech(config.audio, config.start, config.duration)
        clips, frames = count_clips(config, checkpoint.configs["audio"].frames(len(sound)), len(sound) / RATE)
        first, later = token_counts(shape)
        tokens = (later,) if config.start_from_ref else (first, later) if clips > 1 else (first,)
        fields |= dict(fps=FPS, clips=clips, frames=frames, sound=sound, tokens=tokens)
    else:
        shape = 1 + (config.frames - 1) // vae.stride[0], H, W
        tokens = (shape[0] * (H // PATCH[1]) * (W // PATCH[2]),)
        fields |= dict(fps=checkpoint.sampling["fps"], clips=1, frames=config.frames, sound=None, tokens=tokens)
    if config.compile is None:
        gain = fields["clips"] * clip_forwards(config) * tokens[-1] * cfg.n_layer * cfg.dim * COMPILE_GAIN
        config = replace(config, compile=config.device.type == "cuda" and gain > COMPILE_SECONDS)
    memory = plan_memory(config, checkpoint, shape, tokens[-1], free, len(fields["sound"] or ()))
    return Plan(config, latent_shape=shape, memory=memory, **fields)


def frame_size(o, kind, stride):
    """(height, width) of a frame: the picture's shape within the pixel budget, or without a picture exactly what was asked for; and notes."""
    width, height = o.size
    if o.image:
        rule, step = {"s2v": (s2v_size, 8), "i2v": (i2v_size, 2), "ti2v": (ti2v_size, 2)}[kind]
        picture, area = load_image(o.image), width * height
        own = rule(picture.height, picture.width, area, step=step * stride)
        if kind != "s2v" or picture.width * picture.height >= area:
            seen = min(1, picture.height / picture.width / own[0] * own[1]), min(1, picture.width / picture.height / own[1] * own[0])
            cut = kind != "i2v" and not o.official and min(seen) < 0.9
            return *own, (f"picture  {picture.width}x{picture.height}, of which the middle {picture.width * seen[0]:.0f}x{picture.height * seen[1]:.0f} "
                          "is seen",) * cut
        times = math.ceil(math.sqrt(area / (picture.width * picture.height)))             # at least the area, which the rule then cuts down to
        large = rule(picture.height * times, picture.width * times, area, step=step * stride)
        if o.enlarge or math.prod(large) <= math.prod(own):
            return *(large if o.enlarge else own), ()
        return *own, (f"size     of {width}x{height} the picture fills only its own {picture.width}x{picture.height}: --enlarge makes "
                      f"{large[1]}x{large[0]} of it",)
    if width % (2 * stride) or height % (2 * stride):
        raise ValueError(f"width and height must be multiples of {2 * stride}, got {width}x{height}: "
                         f"take {max(1, round(width / 2 / stride)) * 2 * stride}x{max(1, round(height / 2 / stride)) * 2 * stride}")
    return height, width, ()


def count_clips(o, states, seconds):
    """states: of wav2vec2 in time, 50 a second; seconds of sound -> clips, frames of the whole video

    A sound of exactly 5 s fills one clip, of which 77 frames are shown. The official video ends there and loses 0.19 s of the sound; here the
    last frame is held, unless the user asked for fewer clips or frames, or for the official way.
    """
    from media.given import check_length
    check_length(o, seconds)                                         # of a file that announced none, or less
    _, needed = audio_frame_indices(int(states / 50 * 30), FPS, o.clip_frames)
    clips = min(o.clips or needed, needed)
    if o.frames:
        clips = min(clips, -(-(o.frames + warm_up(o)) // o.clip_frames))
    total = clips * o.clip_frames - warm_up(o)
    if clips == needed and not o.official:
        total = max(total, math.ceil(seconds * FPS - 1e-6))
    return clips, min(total, o.frames or total)


def warm_up(o):
    """Frames of the first clip that are not shown."""
    return 0 if o.start_from_ref else WARM_UP


def token_counts(latent_shape):
    """Tokens of an S2V clip with (T, H, W) latents: (first clip, later clip with motion tokens)."""
    T, H, W = latent_shape
    first = (T + 1) * (H // PATCH[1]) * (W // PATCH[2])              # video and reference
    return first, first + sum(frames // t * (H // h) * (W // w) for _, frames, (t, h, w) in MOTION_BUCKETS)


# --------------------------------------------------------------------------------------------------------------------- how it fits

def plan_memory(config, checkpoint, latent_shape, tokens, free, samples=0):
    """Choose how to run so that it fits -> MemoryPlan.

    latent_shape  (T, H, W) of a clip        tokens  of its longest forward        config  `resident` is kept if given
    samples       of the sound
    raises        ValueError with the option that would make it fit
    """
    chosen = choose(config, checkpoint, latent_shape, tokens, free, samples)
    if not 0 <= (config.resident or 0) <= chosen.blocks:
        raise ValueError(f"of the denoiser's blocks 0 to {chosen.blocks} can be resident, got {config.resident}")
    if free.device is not None and chosen.peak > free.device:
        remedies = {"leave out --resident": replace(config, resident=None), "leave out --attention8": replace(config, attention8=False),
                    "add --vae-dtype float16": replace(config, vae_dtype=torch.float16)}
        if not chosen.fp8:
            remedies["add --fp8"] = replace(config, fp8=True)
        helps = [remedy for remedy, other in remedies.items()
                 if other != config and choose(other, checkpoint, latent_shape, tokens, free, samples).peak <= free.device]
        helps += ["add --duration 60"] * (chosen.audio == chosen.peak) + ["choose a smaller --size or fewer frames"]
        raise ValueError(f"{chosen.peak / GIB:.1f} GiB of device memory are wanted, {free.device / GIB:.1f} are there: {helps[0]}")
    if chosen.host > free.host_total:
        raise ValueError(f"{chosen.host / GIB:.1f} GiB of host memory are wanted, this machine has {free.host_total / GIB:.1f}: "
                         f"{'choose a smaller --size' if chosen.fp8 or free.device is None else 'add --fp8'}")
    return chosen


def choose(config, checkpoint, latent_shape, tokens, free, samples=0):
    """The first way to run that fits, or the smallest -> MemoryPlan.  Arguments as `plan_memory`"""
    cfg, vae_cfg, (T, H, W), limit = checkpoint.configs["denoiser"], checkpoint.configs["vae"], latent_shape, free.device
    text, expert = weigh(checkpoint.parts["text"], config), checkpoint.parts[checkpoint.experts[0]]
    weigh_expert = weigh(expert, config)
    fp8 = config.fp8 or any(entry.dtype == torch.float8_e4m3fn for entry in expert.tensors.values())
    vae = sum(math.prod(entry.shape) for entry in checkpoint.parts["vae"].tensors.values()) * config.vae_dtype.itemsize
    frame = 3 * H * vae_cfg.stride[1] * W * vae_cfg.stride[2]
    from fast.hearing import hearing_bytes                           # here, as below: importing `sample` does not need it
    hear, features, later = hearing_bytes(checkpoint, FPS, samples)
    video = 4 * frame * (3 * 4 * T + 73) + vae + features + HOST_OVERHEAD         # two clips of float32 frames, and one of them joined to its history
    weights, _, n = weigh_expert(None)
    if limit is None:
        peak = int(weights * len(checkpoint.experts) + activation_bytes(config, cfg, tokens, MemoryPlan(fp8=fp8)))
        hear += later * weights * len(checkpoint.experts)
        return MemoryPlan(blocks=n, fp8=fp8, denoiser=peak, weights=weights, audio=int(hear), host=int(max(peak, text(None)[0], hear) + video))
    from fast.vae_plan import vae_cuts                               # here: a CPU does without
    ranks = math.prod(config.split) if math.prod(config.split) <= max(H, W) else 1
    cuts = vae_cuts(vae_cfg, H, W, config.vae_dtype, ranks)
    ways = [dict(), dict(chunk=CHUNK), dict(chunk=CHUNK // 2, host_layers=True)]
    choices = [(way, config.resident) for way in ways]
    if config.resident is None:
        choices += [(way, resident) for resident in range(n - 1, -1, -1) for way in ways]
    for way, resident in choices:
        chosen = MemoryPlan(resident=resident, blocks=n, fp8=fp8, **way)
        weights, pinned, _ = weigh_expert(resident)
        denoiser = weights + activation_bytes(config, cfg, tokens, chosen)
        tiles, decode = next((cut for cut in cuts if weights + vae + cut[1] <= limit), cuts[-1])
        if max(denoiser, weights + vae + max(decode, later * hear)) <= limit and (tiles <= TILES * ranks or (way, resident) == choices[-1]):
            break                                                    # streaming costs less than tiles
    text_resident = None if text(None)[0] + TEXT_ACTIVATIONS <= limit else 0
    text_peak, text_pinned, _ = text(text_resident)
    host = max(text_pinned, pinned + 2 * layer_bytes(cfg, config) * chosen.host_layers) + video
    if tiles > 1:                                                    # all pieces of a decoding wait on the host: pixels, and what they are made from
        host += ((4 * T + 73) * frame + (T + 19) * H * W * vae_cfg.dec_dim * vae_cfg.dim_mult[-1]) * config.vae_dtype.itemsize
    return replace(chosen, text_resident=text_resident, tiles=tiles, denoiser=int(denoiser), weights=int(weights), streamed=pinned,
                   host=int(host), text=int(text_peak + TEXT_ACTIVATIONS), vae=int(weights + vae + decode), audio=int(hear + later * (weights + vae)))


def keepable(plan, checkpoint):
    """{names of components whose networks may stay after their stage}: for which there is room beside all that a plan takes, largest first."""
    config, m, free = plan.config, plan.memory, plan.free
    room, names = free.host - m.host if free.device is None else free.device - m.peak, set()
    for name, part in sorted(checkpoint.parts.items(), key=lambda item: -item[1].nbytes):
        streamed = dict(denoiser=m.resident, text=m.text_resident).get(part.kind) is not None
        size = weigh(part, config)(None)[0] if part.kind in ("denoiser", "text") else 4 * part.parameters
        if not streamed and size <= room:
            names.add(name)
            room -= size
    return names


def weigh(part, config):
    """function (number of resident blocks or None: all) -> bytes of a part's parameters on the device, in pinned host memory, number of blocks"""
    from fast import offload                                         # here: importing `sample` does not need it
    tensors = part.tensors
    if config.fp8 and part.kind == "denoiser":
        from fast import fp8                                         # here: planning without it does not need it
        tensors = fp8.quantized(tensors)

    def dtype_of(name, entry):
        return parameter_dtype(part.kind, name, entry, config.dtype)
    layouts, _, rest = offload.split(tensors, dtype_of)
    always = sum(math.prod(e.shape) * dtype_of(name, e).itemsize for name, e in rest.items())

    def weights(resident):
        on_device, pinned = offload.footprint(layouts, len(layouts) if resident is None else resident)
        return on_device + always, pinned, len(layouts)
    return weights


def activation_bytes(config, cfg, tokens, memory):
    """Of one denoiser step at its peak: in self-attention, or while q, k, v of a chunk are made, or in the rest of the block for one chunk.

    Bytes per token and channel below were counted from the operations and compared with what an H200 reserved.
    """
    halves, runs = config.split
    guesses = config.speed.nbytes(cfg, tokens) if config.speed else 0
    tokens = -(-tokens // runs)                                      # of a rank
    C, F, chunk, size = cfg.dim, cfg.ffn_dim, min(memory.chunk or tokens, tokens), config.dtype.itemsize
    attend = 7 * C * tokens if config.attention8 else 0              # q, k, v and float8 v; exact attention needs less than `project`
    attend = 7 * size * C * tokens if runs > 1 else attend           # own and exchanged q, k, v, and one on its way
    project = (6 * size if config.compile else 8 * size + 7) * C * chunk + 3 * size * C * tokens
    hidden = (3 if config.compile else 11) if memory.fp8 else 2 * size           # of the FFN
    finish = ((3 * size if config.compile else 3 * size + 8) * C + hidden * F) * chunk + size * C * tokens
    branches = 2 if max(config.guidance or (2,)) > 1 and halves == 1 else 1
    keys = 0 if memory.host_layers else branches * layer_bytes(cfg, config)
    conditions = branches * tokens * (4 * C // cfg.n_head + size * C // 8)       # RoPE; reference and motion: an eighth of the tokens
    return 4 * C * tokens + max(attend, project, finish) + keys + conditions + guesses + OVERHEAD + AUDIO * bool(cfg.audio_dim)


def layer_bytes(cfg, config):
    """The text keys and values of all blocks, for one guidance branch."""
    return cfg.n_layer * 2 * cfg.text_len * cfg.dim * config.dtype.itemsize
