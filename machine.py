"""What fits where: from a checkpoint's headers, the sizes of a video and the memory there is -> what stays on the GPU, what is streamed to
it, what is worked on in pieces, and what all that will take. Arithmetic alone; nothing is loaded.

The denoiser's peak is during self-attention. It holds   x (4 bytes per token and channel, once per guidance branch in the same loop),
q, k, v and the attention output (8 bytes, one branch at a time),   its weights,   the text keys and values,   one span's intermediates.
Everything else gives way, in this order: both branches in one loop, whole spans, the text keys on the GPU, resident blocks.
"""
import math
import resource
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import fp8
import offload
from model import Denoiser, attention, attention_backend
from vae import peak_bytes

GIB = 2 ** 30
USABLE = 0.9                 # of a card's memory: the rest goes to the CUDA context and a desktop
OVERHEAD = 1.1 * GIB         # workspaces, compilation, what the allocator cannot use: an H200 had 0.65 in a step, 1.1 in the first one
SPAN = 8192                  # tokens worked on at once when memory is short: enough for full speed
TEXT_ACTIVATIONS = 0.5 * GIB


@dataclass(frozen=True)
class Machine:
    """Where and how the networks of one run work."""
    device: torch.device
    dtype: torch.dtype                   # of the large linear layers
    vae_dtype: torch.dtype = torch.float32
    quantize: bool = False               # cast the denoiser's large matrices to float8 while loading
    compiled: bool = False               # torch.compile the blocks
    one_loop: bool = True                # both guidance branches in one pass over the blocks
    span: int | None = None              # longest run of tokens worked on at once
    host_layers: bool = False            # text keys and values wait in host memory
    resident: int | None = None          # denoiser blocks that stay on the device; None: all
    text_resident: int | None = None     # the same for the text encoder
    tiles: int = 1                       # spatial tiles of the VAE

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
    text: int
    vae: int
    blocks: tuple[int, int]              # resident, all

    @property
    def peak(self):
        return max(self.denoiser, self.text, self.vae)

    def __str__(self):
        m = self.machine
        if self.limit is None:
            return "memory   CPU: everything in host memory, float32"
        how = [f"{self.blocks[0]} of {self.blocks[1]} blocks resident" if m.short else "all blocks resident"]
        how += ["both guidance branches in one loop"] * m.one_loop + [f"{m.span} tokens at once"] * bool(m.span)
        how += [f"VAE in {m.tiles} tiles"] * (m.tiles > 1) + ["float8 matrices"] * m.quantize + ["compiled"] * m.compiled
        gib = {name: f"{getattr(self, name) / GIB:.1f}" for name in ("peak", "limit", "denoiser", "weights", "text", "vae", "streamed")}
        return ("memory   {peak} of {limit} GiB on the GPU: denoiser {denoiser} (weights {weights}), text {text}, VAE {vae}; "
                "host {streamed} GiB pinned\n".format(**gib) +
                f"         {', '.join(how)}")


def kept_as(part, machine):
    """function (name, entry) -> dtype in which a parameter of this part will be on the device"""
    def dtype_of(name, entry):
        if entry.dtype == torch.float8_e4m3fn or name.endswith(".weight_scale"):
            return entry.dtype
        return Denoiser.storage_dtype(name, machine.dtype) if part.kind == "denoiser" else machine.dtype
    return dtype_of


def weight_bytes(part, machine, resident):
    """Bytes of a part's parameters -> (on the device, in pinned host memory, number of blocks)"""
    tensors = fp8.quantized(part.tensors) if machine.quantize and part.kind == "denoiser" else part.tensors
    dtype_of = kept_as(part, machine)
    layouts, _, rest = offload.split(tensors, dtype_of)
    on_device, pinned = offload.footprint(layouts, len(layouts) if resident is None else resident)
    return on_device + sum(math.prod(e.shape) * dtype_of(name, e).itemsize for name, e in rest.items()), pinned, len(layouts)


def activation_bytes(cfg, tokens, machine):
    """Of one denoiser step, at its peak."""
    C, span = cfg.dim, min(machine.span or tokens, tokens)
    keys = 0 if machine.host_layers else 2 * cfg.n_layer * 2 * cfg.text_len * C * 2
    return (2 if machine.one_loop else 1) * 4 * C * tokens + 8 * C * tokens + span * (2 * cfg.ffn_dim + 12 * C) + keys + OVERHEAD


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
    cfg, (T, H, W) = checkpoint.configs["denoiser"], latent_shape
    expert, text = checkpoint.parts[checkpoint.experts[0]], checkpoint.parts["text"]
    if limit is None:
        machine = replace(machine, resident=None)
        weights, _, n = weight_bytes(expert, machine, None)
        return Fit(machine, None, weights + activation_bytes(cfg, tokens, machine), weights, 0, 0, 0, (n, n))
    n = weight_bytes(expert, machine, None)[2]
    wanted = [machine.resident] if machine.resident is not None else [None, *range(n - 1, -1, -1)]
    ways = [dict(), dict(one_loop=False), dict(one_loop=False, span=SPAN), dict(one_loop=False, span=SPAN // 2, host_layers=True)]
    choices = [(way, None) for way in ways] if wanted[0] is None else []
    choices += [(ways[-1], resident) for resident in wanted if resident is not None]
    for way, resident in choices:
        chosen = replace(machine, resident=resident, **way)
        weights, pinned, _ = weight_bytes(expert, chosen, resident)
        denoiser = weights + activation_bytes(cfg, tokens, chosen)
        if denoiser <= limit:
            break
    else:
        in_fp8 = machine.quantize or any(entry.dtype == torch.float8_e4m3fn for entry in expert.tensors.values())
        raise ValueError(f"{denoiser / GIB:.1f} GiB of device memory are wanted, {limit / GIB:.1f} are there: choose a smaller --size, fewer "
                         f"--clip-frames{'' if in_fp8 else ', --fp8'} or a card with more")
    text_resident = None
    text_peak = weight_bytes(text, chosen, None)[0] + TEXT_ACTIVATIONS
    if text_peak > limit:
        text_resident = 0
        text_peak = weight_bytes(text, chosen, 0)[0] + TEXT_ACTIVATIONS
    tiles, vae_peak = vae_tiles(checkpoint.configs["vae"], H, W, chosen, limit - weights - OVERHEAD)
    chosen = replace(chosen, text_resident=text_resident, tiles=tiles)
    vae_peak = int(weights + vae_peak + OVERHEAD)
    return Fit(chosen, limit, int(denoiser), int(weights), pinned, int(text_peak), vae_peak, (n if resident is None else resident, n))


def vae_tiles(config, H, W, machine, room):
    """Fewest tiles with which the VAE fits into `room` bytes -> (tiles, its peak in bytes)"""
    for tiles in (1, 2, 3, 4, 6, 8, 12, 16):
        peak = peak_bytes(config, H, W, tiles=tiles, dtype=machine.vae_dtype)
        if peak <= room:
            break
    return tiles, peak


# ----------------------------------------------------------------------------------------------------------------- time and use

def forward_flops(cfg, tokens, video_tokens):
    """Operations of one forward -> (in linear layers and text attention, in self-attention); a multiply and an add are two."""
    C, S = cfg.dim, cfg.text_len
    linear = cfg.n_layer * 2 * tokens * (6 * C * C + 2 * C * cfg.ffn_dim) + len(cfg.audio_layers) * 2 * video_tokens * 2 * C * C
    return linear + cfg.n_layer * 4 * tokens * S * C, cfg.n_layer * 4 * tokens * tokens * C


def rates(cfg, machine, tokens):
    """FLOP/s of plain matrix products and of attention at this network's shapes: what a probe of a second can tell."""
    device, dtype, n, C = machine.device, machine.dtype, min(tokens, 8192), cfg.dim
    x, w = torch.randn(n, C, device=device, dtype=dtype), torch.randn(cfg.ffn_dim, C, device=device, dtype=dtype)
    q = torch.randn(1, n, cfg.n_head, C // cfg.n_head, device=device, dtype=dtype)

    def rate(run, operations):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return operations / min(times)
    with attention_backend(device):
        return rate(lambda: F.linear(x, w), 2 * n * C * cfg.ffn_dim), rate(lambda: attention(q, q, q), 4 * n * n * C)


def estimate_seconds(cfg, machine, tokens, video_tokens, forwards):
    """Of the denoising, from a probe: 85% of the rates it finds, float8 products twice as fast."""
    matmul, attend = rates(cfg, machine, tokens)
    linear, attn = forward_flops(cfg, tokens, video_tokens)
    faster = 1.9 if machine.quantize and fp8.multiplies_fp8(machine.device) else 1
    return forwards * (linear / matmul / faster + attn / attend) / 0.85


def memory_used(device):
    """Highest device memory reserved and host memory resident so far, GiB."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return (torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0), host
