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
import resource
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import fp8
import offload
from attention8 import attention8
from model import Denoiser, attention, attention_backend
from vae import peak_bytes

GIB = 2 ** 30
USABLE = 0.9                 # of a card's memory: the rest goes to the CUDA context and a desktop
OVERHEAD = 0.9 * GIB         # workspaces, compilation, what the allocator cannot use: an H200 without a limit reserved 0.7 to 1.1 more
VAE_OVERHEAD = 0.3 * GIB
VAE_WORKSPACE = 1.65         # of convolution kernels and the allocator: an H200 reserved 1.5 to 1.6 times the bytes counted
SPAN = 8192                  # tokens worked on at once when memory is short: enough for full speed
TEXT_ACTIVATIONS = 0.5 * GIB
TILES = 4                    # of the VAE: more cost time


@dataclass(frozen=True)
class Machine:
    """Where and how the networks of one run work."""
    device: torch.device
    dtype: torch.dtype                   # of the large linear layers
    vae_dtype: torch.dtype = torch.float32
    quantize: bool = False               # cast the denoiser's large matrices to float8 while loading
    compiled: bool = False               # torch.compile the blocks
    attention8: bool = False             # self-attention in 8 bits
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
    fp8: bool = False                    # are the denoiser's large matrices float8, by the checkpoint or by choice?

    @property
    def peak(self):
        return max(self.denoiser, self.text, self.vae)

    def __str__(self):
        m = self.machine
        if self.limit is None:
            return "memory   CPU: everything in host memory, float32"
        how = [f"{self.blocks[0]} of {self.blocks[1]} blocks resident" if m.short else "all blocks resident"]
        how += ["both guidance branches in one loop"] * m.one_loop + [f"{m.span} tokens at once"] * bool(m.span)
        how += [f"VAE in {m.tiles} tiles"] * (m.tiles > 1) + ["float8 matrices"] * self.fp8 + ["8-bit attention"] * m.attention8
        how += ["compiled"] * m.compiled
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
    C, F, span = cfg.dim, cfg.ffn_dim, min(machine.span or tokens, tokens)
    attend = (7 if machine.attention8 else 8) * C * tokens
    project = (12 if machine.compiled else 23) * C * span + (6 * C * tokens if span < tokens else 0)
    hidden = (3 if machine.compiled else 11) if machine.quantize else 4                      # bytes per token and channel of the FFN
    finish = ((6 if machine.compiled else 12) * C + hidden * F) * span + 2 * C * tokens
    keys = 0 if machine.host_layers else 2 * cfg.n_layer * 2 * cfg.text_len * C * 2
    conditions = 2 * tokens * (4 * C // cfg.n_head + C // 4)         # reference and motion: an eighth of the tokens, 2 bytes per channel
    return (2 if machine.one_loop else 1) * 4 * C * tokens + max(attend, project, finish) + keys + conditions + OVERHEAD


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
    expert, text = checkpoint.parts[checkpoint.experts[0]], weigh(checkpoint.parts["text"], machine)
    weigh_expert = weigh(expert, machine)
    in_fp8 = machine.quantize or any(entry.dtype == torch.float8_e4m3fn for entry in expert.tensors.values())
    if limit is None:
        machine = replace(machine, resident=None)
        weights, _, n = weigh_expert(None)
        return Fit(machine, None, weights + activation_bytes(cfg, tokens, machine), weights, 0, 0, 0, (n, n), in_fp8)
    n = weigh_expert(None)[2]
    vae = sum(math.prod(entry.shape) for entry in checkpoint.parts["vae"].tensors.values()) * machine.vae_dtype.itemsize
    cuts = vae_cuts(checkpoint.configs["vae"], H, W, machine.vae_dtype)
    wanted = [machine.resident] if machine.resident is not None else [None, *range(n - 1, -1, -1)]
    ways = [dict(), dict(one_loop=False), dict(one_loop=False, span=SPAN), dict(one_loop=False, span=SPAN // 2, host_layers=True)]
    choices = [(way, None) for way in ways] if wanted[0] is None else []
    choices += [(ways[-1], resident) for resident in wanted if resident is not None]
    for way, resident in choices:
        chosen = replace(machine, resident=resident, **way)
        weights, pinned, _ = weigh_expert(resident)
        denoiser = weights + activation_bytes(cfg, tokens, replace(chosen, quantize=in_fp8))
        tiles, decode = next((cut for cut in cuts if weights + vae + cut[1] <= limit), cuts[-1])
        peak = max(denoiser, weights + vae + decode)
        if peak <= limit and (tiles <= TILES or resident in (None, wanted[-1])):             # streaming costs less than tiles
            break
    else:
        others = ", --fp8" * (not in_fp8) + ", --attention8" * (not machine.attention8)
        if peak > denoiser:                                          # the VAE is in the way
            others = ", --vae-dtype bfloat16" * (machine.vae_dtype == torch.float32)
        raise ValueError(f"{peak / GIB:.1f} GiB of device memory are wanted, {limit / GIB:.1f} are there: choose a smaller --size, fewer "
                         f"--clip-frames{others} or a card with more")
    text_resident = None if text(None)[0] + TEXT_ACTIVATIONS <= limit else 0
    text_peak = text(text_resident)[0] + TEXT_ACTIVATIONS
    chosen, blocks = replace(chosen, text_resident=text_resident, tiles=tiles), (n if resident is None else resident, n)
    return Fit(chosen, limit, int(denoiser), int(weights), pinned, int(text_peak), int(weights + vae + decode), blocks, in_fp8)


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
    attend = attention8 if machine.attention8 else attention

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
    (matmul, attend), (linear, attn) = rates(cfg, machine, min(tokens, 8192)), forward_flops(cfg, tokens, video_tokens)
    return forwards * (linear / matmul + attn / attend) / 0.85


def memory_used(device):
    """Highest device memory reserved and host memory resident so far, GiB."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return (torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0), host
