"""What this machine is and can do: devices, free memory, rates. Everything that plan.py's arithmetic is told, and the estimate of time."""
import os
import re
import resource
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

GIB = 2 ** 30
USABLE = 0.9                 # of a card's memory: the rest goes to the CUDA context and a desktop


class Memory(NamedTuple):
    """Bytes there are to plan with."""
    device: int | None           # of the device, free; None on a CPU
    host: int                    # of the host, free
    host_total: int


def pick_device(name, rank=None):
    """auto, cpu, cuda:1, or cuda: of several the one with number `rank` -> torch.device.  raises ValueError if it is not there"""
    there = torch.cuda.device_count()
    name = ("cuda" if there else "cpu") if name == "auto" else name
    name = f"cuda:{rank}" if name == "cuda" and rank is not None else name
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found or name != "cpu" and int(found[1] or 0) >= there:
        raise ValueError(f"device must be cpu, cuda, cuda:1 or auto, got {name}: PyTorch {torch.__version__} sees {there} CUDA GPUs")
    return torch.device(name)


def cuda_index(device):
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def free_memory(device, vram=None):
    """-> Memory.  vram: GiB of a card to plan for, of which USABLE is taken"""
    host, total = host_memory()
    if device.type != "cuda":
        return Memory(None, host, total)
    free = int(0.97 * torch.cuda.mem_get_info(cuda_index(device))[0])
    return Memory(free if vram is None else min(free, int(vram * USABLE * GIB)), host, total)


def cap_memory(device, vram):
    """From now on this process cannot take more of the device than a card of so many GiB has to give."""
    if device.type == "cuda" and vram is not None:
        device = cuda_index(device)
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram * USABLE * GIB / total), device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------------------------------------------- rates and time

def forward_flops(cfg, tokens, video_tokens):
    """Operations of one forward -> (in linear layers and text attention, in self-attention); a multiply and an add are two."""
    C, S = cfg.dim, cfg.text_len
    linear = cfg.n_layer * 2 * tokens * (6 * C * C + 2 * C * cfg.ffn_dim) + len(cfg.audio_layers) * 2 * video_tokens * 2 * C * C
    return linear + cfg.n_layer * 4 * tokens * S * C, cfg.n_layer * 4 * tokens * tokens * C


def best_seconds(run, device, repeats=3):
    """The least of some calls, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(cfg, config, fp8_matrices, tokens):
    """FLOP/s of plain matrix products and of self-attention at this network's shapes, both as the run will do them.  config: RunConfig"""
    from fast import fp8                                             # here, as below: a CPU that plans needs neither
    from fast.attention8 import attention8
    from fast.blocks import attend, attention_backend
    device, dtype, C = config.device, config.dtype, cfg.dim
    x, w, q, k, v = (torch.randn(size, device=device, dtype=dtype) for size in (
        (min(tokens, 32768), C), (cfg.ffn_dim, C), *[(1, tokens, cfg.n_head, C // cfg.n_head)] * 3))
    if fp8_matrices and fp8.multiplies_fp8(device):
        (a, a_scale), (b, b_scale) = fp8.quantize(x), fp8.quantize_weight(w)

        def product():
            return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=dtype, use_fast_accum=fp8.FAST_ACCUM)
    else:
        def product():
            return F.linear(x, w)
    with attention_backend(device):
        matmul = best_seconds(product, device)
        attention = best_seconds(lambda: (attention8 if config.attention8 else attend)(q.clone(), k.clone(), v.clone()), device)
    return 2 * len(x) * C * cfg.ffn_dim / matmul, 4 * tokens * tokens * C / attention


def estimate_seconds(plan):
    """Of the denoising of a whole video, from a probe of a second: 85% of the rates it finds."""
    cfg, tokens = plan.denoiser, plan.tokens[-1]
    some = min(tokens, 8192 if plan.config.device.type == "cuda" else 1024)
    matmul, attend = rates(cfg, plan.config, plan.memory.fp8, some)
    linear, attn = forward_flops(cfg, tokens, plan.video_tokens)
    return plan.forwards * (linear / matmul + attn / attend) / 0.85


# -------------------------------------------------------------------------------------------------------------------- memory used

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
