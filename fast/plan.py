"""What fits where: from a checkpoint's headers, the sizes of a video and the memory there is -> what stays on the GPU, what is streamed to
it, what is worked on in pieces, and what all that will take. Arithmetic alone; nothing is loaded.

The denoiser's peak is during self-attention, which holds, beside the weights,
    x                                            4 bytes per token and channel, once per guidance branch in the same loop
    q, k, v                                      6 bytes, one branch at a time
    the result                                   2 bytes; in 8 bits it takes the place of q, and v in float8 is 1 byte
    what a clip's conditions keep at hand        both branches: RoPE, reference and motion tokens, text keys and values
or, where many tokens are worked on at once, just before or behind it. All else gives way, in this order: both branches in one loop, whole
spans, the text keys on the GPU, resident blocks. The VAE waits in host memory while the denoiser works; the denoiser stays when the VAE does.
"""
import math
import os
import re
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from fast import fp8
from fast import offload
from fast.attention8 import attention8
from model import Denoiser, attention_backend, self_attention
from fast.vae_memory import peak_bytes

GIB = 2 ** 30
USABLE = 0.9                 # of a card's memory: the rest goes to the CUDA context and a desktop
OVERHEAD = 0.9 * GIB         # workspaces, compilation, what the allocator cannot use: an H200 without a limit reserved 0.7 to 1.1 more
VAE_OVERHEAD = 0.3 * GIB
HOST_OVERHEAD = 1.8 * GIB    # PyTorch, CUDA and Python: an H200 machine had 16.9 GiB in use with 15.2 pinned
VAE_WORKSPACE = 1.65         # of convolution kernels and the allocator: an H200 reserved 1.5 to 1.6 times the bytes counted
SPAN = 8192                  # tokens worked on at once when memory is short: enough for full speed
TEXT_ACTIVATIONS = 0.5 * GIB
TILES = 4                    # of the VAE: more cost time


@dataclass(frozen=True)
class Machine:
    """Where and how the networks of one run work."""
    device: torch.device
    dtype: torch.dtype                   # of the large linear layers
    vae_dtype: torch.dtype | None = None # None: float16 on a GPU, float32 on a CPU
    quantize: bool = False               # cast the denoiser's large matrices to float8 while loading
    compiled: bool = False               # torch.compile the blocks
    attention8: bool = False             # self-attention in 8 bits
    one_loop: bool = True                # both guidance branches in one pass over the blocks
    span: int | None = None              # longest run of tokens worked on at once
    host_layers: bool = False            # text keys and values wait in host memory
    resident: int | None = None          # denoiser blocks that stay on the device; None: all
    text_resident: int | None = None     # the same for the text encoder
    tiles: int = 1                       # spatial tiles of the VAE

    def __post_init__(self):
        object.__setattr__(self, "vae_dtype", self.vae_dtype or (torch.float16 if self.device.type == "cuda" else torch.float32))

    @property
    def short(self):
        return self.resident is not None


@dataclass(frozen=True)
class Fit:
    """A machine and what it will take, in bytes."""
    machine: Machine
    limit: int | None                    # of device memory; None on a CPU
    denoiser: int
    weights: int                         # of the denoiser on the device
    streamed: int                        # of the denoiser in pinned host memory
    host: int                            # of host memory, mapped files not counted
    text: int
    vae: int
    blocks: tuple[int, int]              # resident, all
    fp8: bool = False                    # are the denoiser's large matrices float8, by the checkpoint or by choice?

    @property
    def peak(self):
        return max(self.denoiser, self.text, self.vae)

    def __str__(self):
        m, (free, _) = self.machine, host_memory()
        host = f"host {self.host / GIB:.1f} of {free / GIB:.1f} GiB free" + "; expect swapping" * (self.host > free)
        if self.limit is None:
            return f"memory   CPU, float32: {host}"
        how = [f"{self.blocks[0]} of {self.blocks[1]} blocks resident" if m.short else "all blocks resident"]
        how += ["both guidance branches in one loop"] * m.one_loop + [f"{m.span} tokens at once"] * bool(m.span)
        how += [f"VAE in {m.tiles} tiles"] * (m.tiles > 1) + ["float8 matrices"] * self.fp8 + ["8-bit attention"] * m.attention8
        how += ["compiled"] * m.compiled
        gib = {name: f"{getattr(self, name) / GIB:.1f}" for name in ("peak", "limit", "denoiser", "weights", "text", "vae", "streamed")}
        return ("memory   {peak} of {limit} GiB on the GPU: denoiser {denoiser} (weights {weights}), text {text}, VAE {vae}; "
                "{streamed} pinned on the host\n".format(**gib) +
                f"         {host}\n         {', '.join(how)}")


def kept_as(part, machine):
    """function (name, entry) -> dtype in which a parameter of this part will be on the device"""
    def dtype_of(name, entry):
        if entry.dtype == torch.float8_e4m3fn or name.endswith(".weight_scale"):
            return entry.dtype
        return Denoiser.storage_dtype(name, machine.dtype) if part.kind == "denoiser" else machine.dtype
    return dtype_of


def weigh(part, machine):
    """function (number of resident blocks or None: all) -> bytes of a part's parameters on the device, in pinned host memory, number of blocks"""
    tensors = fp8.quantized(part.tensors) if machine.quantize and part.kind == "denoiser" else part.tensors
    dtype_of = kept_as(part, machine)
    layouts, _, rest = offload.split(tensors, dtype_of)
    always = sum(math.prod(e.shape) * dtype_of(name, e).itemsize for name, e in rest.items())

    def weights(resident):
        on_device, pinned = offload.footprint(layouts, len(layouts) if resident is None else resident)
        return on_device + always, pinned, len(layouts)
    return weights


def activation_bytes(cfg, tokens, machine):
    """Of one denoiser step, at its peak: in self-attention, or while a span's q, k, v are made, or in the rest of the block for one span."""
    C, F, span, two = cfg.dim, cfg.ffn_dim, min(machine.span or tokens, tokens), machine.dtype.itemsize
    attend = 7 * C * tokens if machine.attention8 else 0             # exact attention writes in place, QUERIES at a time: less than `project`
    project = (6 * two if machine.compiled else 8 * two + 7) * C * span + 3 * two * C * tokens
    hidden = (3 if machine.compiled else 11) if machine.quantize else 2 * two                # bytes per token and channel of the FFN
    finish = (3 * two * C + hidden * F) * span + two * C * tokens
    keys = 0 if machine.host_layers else 2 * layer_bytes(cfg, machine)
    conditions = 2 * tokens * (4 * C // cfg.n_head + two * C // 8)   # RoPE; reference and motion: an eighth of the tokens
    return (2 if machine.one_loop else 1) * 4 * C * tokens + max(attend, project, finish) + keys + conditions + OVERHEAD


def layer_bytes(cfg, machine):
    """The text keys and values of all blocks, for one guidance branch."""
    return cfg.n_layer * 2 * cfg.text_len * cfg.dim * machine.dtype.itemsize


def pick_device(name, rank=None):
    """auto, cpu, cuda:1, or cuda: of several the one with number `rank` -> torch.device.  raises ValueError if it is not there"""
    there = torch.cuda.device_count()
    name = ("cuda" if there else "cpu") if name == "auto" else name
    name = f"cuda:{rank}" if name == "cuda" and rank is not None else name
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found or name != "cpu" and int(found[1] or 0) >= there:
        raise ValueError(f"device must be cpu, cuda, cuda:1 or auto, got {name}: PyTorch {torch.__version__} sees {there} CUDA GPUs")
    return torch.device(name)


def device_limit(device, vram=None):
    """Bytes of device memory that a run may take. vram: GiB of a card to rehearse, made binding for this process. None on a CPU."""
    if device.type != "cuda":
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    free, total = torch.cuda.mem_get_info(device)
    limit = int(0.97 * free)
    if vram is not None:
        limit = min(limit, int(vram * USABLE * GIB))
        torch.cuda.set_per_process_memory_fraction(limit / total, device)
    return limit


def fit(checkpoint, latent_shape, tokens, machine, limit):
    """Choose how to run so that it fits.

    latent_shape  (T, H, W) of a clip        tokens  of its longest forward        machine  the user's choices; `resident` is kept if given
    limit         bytes of device memory, None on a CPU
    returns       Fit                        raises  ValueError with the option that would make it fit
    """
    chosen = choose(checkpoint, latent_shape, tokens, machine, limit)
    if not 0 <= (machine.resident or 0) <= chosen.blocks[1]:
        raise ValueError(f"of the denoiser's blocks 0 to {chosen.blocks[1]} can be resident, got {machine.resident}")
    if limit is not None and chosen.peak > limit:
        remedies = {"leave out --resident": replace(machine, resident=None), "leave out --attention8": replace(machine, attention8=False),
                    "add --vae-dtype float16": replace(machine, vae_dtype=torch.float16)}
        if not chosen.fp8:
            remedies["add --fp8"] = replace(machine, quantize=True)
        helps = [remedy for remedy, other in remedies.items()
                 if other != machine and choose(checkpoint, latent_shape, tokens, other, limit).peak <= limit]
        raise ValueError(f"{chosen.peak / GIB:.1f} GiB of device memory are wanted, {limit / GIB:.1f} are there: "
                         f"{helps[0] if helps else 'choose a smaller --size or fewer frames'}")
    if chosen.host > host_memory()[1]:
        raise ValueError(f"{chosen.host / GIB:.1f} GiB of host memory are wanted, this machine has {host_memory()[1] / GIB:.1f}: "
                         f"{'choose a smaller --size' if chosen.fp8 or limit is None else 'add --fp8'}")
    return chosen


def choose(checkpoint, latent_shape, tokens, machine, limit):
    """The first way to run that fits, or the smallest -> Fit.  Arguments as `fit`"""
    cfg, (T, H, W) = checkpoint.configs["denoiser"], latent_shape
    expert, text = checkpoint.parts[checkpoint.experts[0]], weigh(checkpoint.parts["text"], machine)
    weigh_expert = weigh(expert, machine)
    in_fp8 = machine.quantize or any(entry.dtype == torch.float8_e4m3fn for entry in expert.tensors.values())
    vae = sum(math.prod(entry.shape) for entry in checkpoint.parts["vae"].tensors.values()) * machine.vae_dtype.itemsize
    _, rows, columns = checkpoint.configs["vae"].stride
    frame = 3 * H * rows * W * columns
    video = 4 * frame * (3 * 4 * T + 73) + vae + HOST_OVERHEAD       # two clips of float32 frames, and one of them joined to its history
    weights, _, n = weigh_expert(None)
    if limit is None:
        machine = replace(machine, resident=None)
        peak = weights * len(checkpoint.experts) + activation_bytes(cfg, tokens, machine)
        return Fit(machine, None, peak, weights, 0, max(peak, text(None)[0]) + video, 0, 0, (n, n), in_fp8)
    cuts = vae_cuts(checkpoint.configs["vae"], H, W, machine.vae_dtype)
    ways = [dict(), dict(one_loop=False), dict(one_loop=False, span=SPAN), dict(one_loop=False, span=SPAN // 2, host_layers=True)]
    choices = [(way, machine.resident) for way in ways]
    if machine.resident is None:
        choices += [(ways[-1], resident) for resident in range(n - 1, -1, -1)]
    for way, resident in choices:
        chosen = replace(machine, resident=resident, **way)
        weights, pinned, _ = weigh_expert(resident)
        denoiser = weights + activation_bytes(cfg, tokens, replace(chosen, quantize=in_fp8))
        tiles, decode = next((cut for cut in cuts if weights + vae + cut[1] <= limit), cuts[-1])
        if max(denoiser, weights + vae + decode) <= limit and (tiles <= TILES or (way, resident) == choices[-1]):
            break                                                    # streaming costs less than tiles
    text_resident = None if text(None)[0] + TEXT_ACTIVATIONS <= limit else 0
    text_peak, text_pinned, _ = text(text_resident)
    host = max(text_pinned, pinned + 2 * layer_bytes(cfg, chosen) * chosen.host_layers) + video
    if tiles > 1:                                                    # all pieces of a decoding wait on the host: pixels, and what they are made from
        wide = checkpoint.configs["vae"].dec_dim * checkpoint.configs["vae"].dim_mult[-1]
        host += ((4 * T + 73) * frame + (T + 19) * H * W * wide) * machine.vae_dtype.itemsize
    chosen, blocks = replace(chosen, text_resident=text_resident, tiles=tiles), (n if resident is None else resident, n)
    return Fit(chosen, limit, int(denoiser), int(weights), pinned, int(host), int(text_peak + TEXT_ACTIVATIONS), int(weights + vae + decode),
               blocks, in_fp8)


def vae_cuts(config, H, W, dtype):
    """[(tiles, bytes that the VAE then takes beside its weights)], from one tile to as many as help"""
    return [(tiles, VAE_WORKSPACE * peak_bytes(config, H, W, tiles=tiles, dtype=dtype) + VAE_OVERHEAD)
            for tiles in (1, 2, 3, 4, 6, 8, 12, 16) if tiles <= max(H, W)]


# ----------------------------------------------------------------------------------------------------------------- time and use

def forward_flops(cfg, tokens, video_tokens):
    """Operations of one forward -> (in linear layers and text attention, in self-attention); a multiply and an add are two."""
    C, S = cfg.dim, cfg.text_len
    linear = cfg.n_layer * 2 * tokens * (6 * C * C + 2 * C * cfg.ffn_dim) + len(cfg.audio_layers) * 2 * video_tokens * 2 * C * C
    return linear + cfg.n_layer * 4 * tokens * S * C, cfg.n_layer * 4 * tokens * tokens * C


def rates(cfg, machine, tokens, repeats=3):
    """FLOP/s of plain matrix products and of attention at this network's shapes, both as the machine will do them: the best of some calls."""
    device, dtype, C = machine.device, machine.dtype, cfg.dim
    x, w, q, k, v = (torch.randn(size, device=device, dtype=dtype) for size in (
        (min(tokens, 32768), C), (cfg.ffn_dim, C), *[(1, tokens, cfg.n_head, C // cfg.n_head)] * 3))
    attend = attention8 if machine.attention8 else self_attention

    def product():
        return F.linear(x, w)
    if machine.quantize and fp8.multiplies_fp8(device):
        (a, a_scale), (b, b_scale) = fp8.quantize(x), fp8.quantize_weight(w)

        def product():
            return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=dtype, use_fast_accum=fp8.FAST_ACCUM)

    def seconds(run, *arguments):
        times = []
        for _ in range(repeats + 1):                                 # the first call is a warm-up
            fresh = [x.clone() for x in arguments]                   # 8-bit attention writes over them
            synchronize(device)
            start = time.perf_counter()
            run(*fresh)
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])
    with attention_backend(device):
        return 2 * len(x) * C * cfg.ffn_dim / seconds(product), 4 * tokens * tokens * C / seconds(attend, q, k, v)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def estimate_seconds(cfg, machine, tokens, video_tokens, forwards):
    """Of the denoising, from a probe of a second: 85% of the rates it finds."""
    some = min(tokens, 8192 if machine.device.type == "cuda" else 1024)
    (matmul, attend), (linear, attn) = rates(cfg, machine, some), forward_flops(cfg, tokens, video_tokens)
    return forwards * (linear / matmul + attn / attend) / 0.85


def memory_used(device):
    """Highest device memory reserved and host memory resident so far, mapped files included, GiB."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return (torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0), host


def fields(path):
    """{name: bytes} of a file such as /proc/meminfo; {} where there is none."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def host_memory():
    """Bytes of host memory that are free, and that there are."""
    known, total = fields("/proc/meminfo"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return known.get("MemAvailable", total), known.get("MemTotal", total) + known.get("SwapTotal", 0)


def private_memory():
    """Host memory of this process without mapped files, which the system takes back when it is short, GiB; 0 where it is not told."""
    known = fields("/proc/self/status")
    return (known.get("RssAnon", 0) + known.get("RssShmem", 0)) / GIB
