"""What this machine is and can do: devices and memory. Everything that plan.py's arithmetic is told."""
import os
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

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


def free_memory(device, vram=None, held=0):
    """-> Memory.  vram: GiB of a card to plan for, of which USABLE is taken        held: bytes on the device that can be had back"""
    host, total = host_memory()
    if device.type != "cuda":
        return Memory(None, host + held, total)
    held += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)         # what the allocator has and nobody uses
    free = int(0.97 * (torch.cuda.mem_get_info(cuda_index(device))[0] + held))
    return Memory(free if vram is None else min(free, int(vram * USABLE * GIB)), host, total)


def cap_memory(device, vram):
    """From now on this process cannot take more of the device than a card of so many GiB has to give."""
    if device.type == "cuda" and vram is not None:
        device = cuda_index(device)
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram * USABLE * GIB / total), device)
    elif vram is not None:
        print("warning: vram does nothing on a CPU: it is the memory of a GPU", file=sys.stderr)


def any_terminal(ours=True):
    """From now on whatever is printed does no harm.  ours=False: in someone else's program; both in media/terminal.py"""
    from media.terminal import any_letters, take_over                # here: who only computes does not need it
    (take_over if ours else any_letters)()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
