"""How fast is a stream, and does it stay in its memory? Random weights at full size, made on the device: no checkpoint is needed.

    python -m fast.bench_live --size 704x384                      frames per second of live.py, in several ways, and where the time goes
    python -m fast.bench_live --size 192x128 --flat 500           memory at block 20, where it changes, at the end; the same bytes by a seed
    python -m fast.bench_live --size 704x384 --ways plain,beside  these ways alone
    python -m fast.bench_live --size 704x384 --ranks 4            a stream by 4 GPUs, each of which makes some of the steps: fast/relay.py

A way is how blocks are made once rings are full; words joined by +:
    plain    denoiser, then VAE                     beside   the VAE decodes while the next block is denoised, for sound that is there already
    rings8   rings and attention in 8 bits          graphs   forwards as CUDA graphs
Every way begins a stream of its own, fills its rings (and captures its graphs) and is then timed over --blocks blocks, frames copied to the host.
First frames are timed from a process that has made a stream before: with a new picture, and with one that was prepared. The prompt is umT5's
output already. The last line is JSON.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import copy
import gc
import hashlib
import json
import math
import os
import sys
import time
import traceback
from collections import deque

import torch
import torch.distributed as dist

import live
from fast import bench_ranks, convolution
from fast.bench import commit, profile, random_entries, random_network, seconds
from fast.blocks import FastDenoiser, attention_backend
from fast.estimate import best_seconds, forward_flops
from fast.probe import GIB, memory_used, pick_device, synchronize
from fast.relay import Line, Relay
from fast.rings import Beside, BlockGraphs, GPURing
from fast.rings8 import Ring8
from fast.rows import fuse_qkv
from fast.stills import still
from formats.checkpoints import materialise
from jobs.live import onto, pictures
from model import PATCH
from sample import DTYPES, size
from tiny import random_weights

WORDS = ("plain", "beside", "rings8", "graphs")
WAYS = ("plain", "beside", "rings8+beside", "graphs+beside", "rings8+graphs+beside")
WAYS_OF_RANKS = ("beside", "rings8+beside", "graphs+beside", "rings8+graphs+beside")
FRAMES = 4 * live.BLOCK


class Bench:
    """Networks, a picture, and sound that goes round and round; of many ranks one has the VAE."""

    def __init__(self, args, device, line=Line()):
        self.args, self.device, gpu = args, device, device.type == "cuda"
        self.dtype, vae_dtype = torch.bfloat16 if gpu else torch.float32, DTYPES[args.vae_dtype or ("float16" if gpu else "float32")]
        self.configs = random_weights.released("s2v-14B") if gpu and not args.tiny else random_weights.tiny("s2v-14B")
        cfg = self.cfg = self.configs["denoiser"]
        net = materialise("denoiser", cfg, random_entries("denoiser", cfg, device, self.dtype), device, self.dtype, args.fp8)
        self.net = FastDenoiser(fuse_qkv(net), compile=args.compile)
        self.vae = convolution.use_kernels(random_network("vae", self.configs, device, vae_dtype)) if line.last else None
        (width, height), random = args.size, torch.Generator(device).manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, device=device, generator=random)
        self.pixels, self.text = randn(1, 3, 1, height, width).clamp(-1, 1), randn(1, min(60, cfg.text_len), cfg.text_dim)
        self.sound = randn(8, 1, cfg.audio_states, cfg.audio_dim, FRAMES)
        self.n = height * width // (self.configs["vae"].stride[1] * PATCH[1]) ** 2

    def prepare(self):
        return live.prepare([self.net] * self.args.steps, self.vae, self.text, None, still(self.vae, self.pixels))

    def begin(self, picture, ring=GPURing):
        return live.Live(picture, window=self.args.window, ring=ring)

    def audio(self, i):
        return self.sound[i % len(self.sound)]


def used(device):
    """GiB that tensors take, that are reserved, and of the process on the host, now."""
    gpu = (torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB) if device.type == "cuda" else (0.0, 0.0)
    with open("/proc/self/statm") as file:
        return *gpu, int(file.read().split()[1]) * 4096 / GIB


def make(bench, video, blocks, beside, seen=lambda frames: None):
    """So many blocks, their frames on the host, where `seen` is called with them -> seconds"""
    synchronize(bench.device)
    start, waiting = time.perf_counter(), deque()
    for i in range(blocks):
        latents = video.latents(bench.audio(i))
        waiting.append(beside(latents) if beside else video.frames(latents).cpu)
        if len(waiting) > bool(beside):
            seen(waiting.popleft()())
    for frames in waiting:
        seen(frames())
    synchronize(bench.device)
    return time.perf_counter() - start


def way(bench, picture, name):
    """-> dict of what was measured"""
    words = name.split("+")
    video = bench.begin(picture, Ring8 if "rings8" in words else GPURing)
    graphs, beside = BlockGraphs(video.stream) if "graphs" in words else None, Beside(video) if "beside" in words else None
    warm = bench.args.window // live.BLOCK * 2 + 2
    begun = make(bench, video, warm, beside)
    taken = make(bench, video, bench.args.blocks, beside)
    rate, memory = FRAMES * bench.args.blocks / taken, used(bench.device)
    print(f"{name:20} {rate:6.2f} frames/s, {taken / bench.args.blocks:.4f} s per block of {FRAMES} over {bench.args.blocks}; the first {warm} "
          f"took {begun:.1f} s; {memory[0]:.1f} GiB of tensors, {memory[1]:.1f} reserved"
          f"{'' if graphs is None else f', {len(graphs.graphs)} graphs'}", flush=True)
    return dict(frames_per_s=rate, s_per_block=taken / bench.args.blocks, tensors_gib=memory[0], reserved_gib=memory[1])


def measure(bench, picture, names, result):
    """All of these ways. Graphs come last: what cannot be captured may leave the device unusable."""
    for name in names:
        gc.collect()
        try:
            result[name] = way(bench, picture, name)
        except Exception as error:                                   # of many kinds: Triton's, CUDA's
            traceback.print_exc()
            result[name] = dict(failed=f"{type(error).__name__}: {error}"[:300])
            print(f"{name:20} failed: {result[name]['failed']}", flush=True)


def error8(bench, picture):
    """Relative L2 of the first forward's velocity with 8-bit rings from the one with bfloat16 rings."""
    def velocity(ring):
        stream = bench.begin(picture, ring).stream
        x = torch.randn(1, bench.vae.config.z_dim, live.BLOCK, *picture.motion.shape[3:], generator=torch.Generator().manual_seed(0)).to(bench.device)
        return stream.velocity(0, x, stream.conditions(bench.audio(0))[0], stream.moved(10))
    a, b = velocity(Ring8), velocity(GPURing)
    gap = ((a - b).norm() / b.norm()).item()
    print(f"error    of 8-bit rings: {gap:.2%} of a velocity (random weights)", flush=True)
    return gap


def parts(bench, picture, ring):
    """Seconds of a block's parts in the steady state, one after the other, and the floor of its forwards."""
    video, cfg, n, device = bench.begin(picture, ring), bench.cfg, bench.n, bench.device
    make(bench, video, bench.args.window // live.BLOCK + 1, None)
    stream, x = video.stream, torch.randn(video.shape, device=device)
    conds, moved = stream.conditions(bench.audio(0)), [stream.moved(10) for _ in stream.experts]
    latents = stream.steps(x, conds, moved)
    times = dict(sound=seconds(lambda: stream.conditions(bench.audio(0)), device)[0],
                 tables=seconds(lambda: [stream.moved(10) for _ in stream.experts], device)[0],
                 forwards=seconds(lambda: stream.steps(x, conds, moved), device, 5)[0],
                 vae=seconds(lambda: video.frames(latents), device, 5)[0],
                 to_host=seconds(lambda f=video.frames(latents): f.cpu(), device)[0])
    steps, rows = len(stream.experts), int((stream.window + 2.5) * n)
    q, k = (torch.randn(1, m, cfg.n_head, cfg.dim // cfg.n_head, device=device, dtype=bench.dtype) for m in (live.BLOCK * n, live.BLOCK * n))
    one = stream.rings[0]
    with torch.no_grad(), attention_backend(device):
        attention = best_seconds(lambda: one.attend(q, k, k, 0, 0, stream.window, moved[0]), device)
    linear, _ = forward_flops(cfg, live.BLOCK * n, live.BLOCK * n)
    floor, rate = 0.0, 0.0
    if device.type == "cuda":
        from fast import fp8
        a, w = (torch.randn(m, cfg.dim, device=device, dtype=bench.dtype) for m in (live.BLOCK * n, cfg.ffn_dim))
        (a8, a_scale), (w8, w_scale) = fp8.quantize(a), fp8.quantize_weight(w)
        product = best_seconds((lambda: torch._scaled_mm(a8, w8.t(), a_scale, w_scale.t(), out_dtype=bench.dtype, use_fast_accum=True))
                               if bench.args.fp8 else (lambda: a @ w.t()), device, 10)
        rate = 2 * len(a) * cfg.dim * cfg.ffn_dim / product
        floor = steps * (linear / rate + cfg.n_layer * attention)
    times |= dict(attention=steps * cfg.n_layer * attention, floor=floor)
    print(f"parts    {ring.__name__}, ms of a block: {', '.join(f'{name} {1000 * t:.1f}' for name, t in times.items())}")
    print(f"         {steps} forwards of {live.BLOCK * n:,} tokens to {rows:,} keys: {steps * linear / 1e12:.0f} TFLOP linear at {rate / 1e12:.0f} "
          f"TFLOP/s, attention at {4 * live.BLOCK * n * rows * cfg.dim / attention / 1e12:.0f}; "
          f"floor {1000 * floor:.0f} ms is {floor / times['forwards']:.0%} of them")
    if bench.args.profile:
        profile(lambda: stream.steps(x, conds, moved))
        profile(lambda: video.frames(latents))
    return times


def first_frames(bench):
    """Seconds from a picture, and from a prepared one, to the first frames on the host."""
    result, picture = {}, None
    for name in ("new_picture", "prepared_picture"):
        gc.collect()
        synchronize(bench.device)
        start = time.perf_counter()
        picture = picture or bench.prepare()
        ready = time.perf_counter()
        video = bench.begin(picture)
        video.block(bench.audio(0)).cpu()
        result[name] = time.perf_counter() - start
        print(f"first    frames {result[name]:.3f} s after a {name.replace('_', ' ')}, {ready - start:.3f} of it (as launched) to prepare it",
              flush=True)
        del video
    return result


def flat(bench, picture, blocks):
    """Memory at block 20 and at the last. Are blocks 21 to 40 the same bytes from a saved state, and the first 20 by the same seed?"""
    ring, gpu = Ring8 if bench.args.flat_rings8 else GPURing, bench.device.type == "cuda"
    video, at, digests = bench.begin(picture, ring), {}, []
    if gpu:                                                          # as sample.py makes a long stream
        BlockGraphs(video.stream).get_ready(torch.zeros(video.shape, device=bench.device), bench.audio(0))
    beside = Beside(video) if gpu else None

    def make_20(video, beside):
        digest = hashlib.sha256()
        make(bench, video, 20, beside, lambda frames: digest.update(frames.numpy().tobytes()))
        return digest.hexdigest()
    for first in range(0, blocks, 20):
        digests.append(make_20(video, beside))
        state = copy.deepcopy(video.state()) if first == 0 else state
        at[first + 20] = used(bench.device)
        if first % 500 == 0 or first + 20 >= blocks or at[first + 20][:2] != at[first][:2]:
            print("memory   block {}: {:.3f} GiB of tensors, {:.3f} reserved, {:.3f} on the host".format(first + 20, *at[first + 20]), flush=True)
    del video, beside
    again, later = bench.begin(picture, ring), bench.begin(picture, ring).restore(state)
    same = dict(seed=make_20(again, None) == digests[0], state=len(digests) < 2 or make_20(later, None) == digests[1])
    print(f"bytes    the first 20 blocks by the same seed: {'the same' if same['seed'] else 'OTHER'}; blocks 21 to 40 from a saved state: "
          f"{'the same' if same['state'] else 'OTHER'}", flush=True)
    return dict(blocks=max(at), first=at[20], last=at[max(at)], same=same)


def on_ranks(args, device, names, result):
    """These ways by all ranks, as sample.py has them make a file. Sound goes along with the latents, frames are copied to the host of rank 0."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    line = Line(dist.get_rank(), dist.get_world_size())
    own, bench = line.steps(args.steps), Bench(args, device, line)
    latents = line.once(lambda: still(bench.vae, bench.pixels))
    picture = live.prepare([bench.net] * len(own), bench.vae, bench.text, None, [x.to(device) for x in latents])
    warm, found = args.window // live.BLOCK * 2 + 2, [None] * line.size
    for name in names:
        video, times = Relay(picture, line, args.steps, window=args.window, ring=Ring8 if "rings8" in name else GPURing), []
        if "graphs" in name:
            BlockGraphs(video.stream).get_ready(torch.zeros(video.shape, device=device), bench.audio(0))
        video.greet()
        sound = video.blocks(((bench.audio(i)[0].cpu(), math.inf, 0.0) for i in range(warm + args.blocks)), None)
        if line.last:
            times = [time.perf_counter() for _ in pictures(video, (block[:2] for block in sound), device, True)]
        for features, *_ in sound:
            video.latents(onto(features, device))
        dist.all_gather_object(found, used(device)[:2])
        if line.last:
            rate, each = FRAMES * args.blocks / (times[-1] - times[warm - 1]), ", ".join(f"{tensors:.1f} ({kept:.1f})" for tensors, kept in
                                                                                         [*found[1:], found[0]])
            print(f"{name:20} {rate:6.2f} frames/s by {line.size} ranks over {args.blocks} blocks; GiB of tensors (reserved) on each, in line, the "
                  f"last with the VAE: {each}", flush=True)
            result[name] = dict(frames_per_s=rate, gib=found)
        del video, sound
        gc.collect()
    dist.destroy_process_group()


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=size, default=(704, 384), metavar="WxH", help="sides multiples of 64 (default: 704x384)")
    p.add_argument("--blocks", type=int, default=40, help="timed (default: 40)")
    p.add_argument("--steps", type=int, default=live.STEPS, help=f"(default: {live.STEPS})")
    p.add_argument("--window", type=int, default=live.WINDOW, help=f"latent frames in a ring (default: {live.WINDOW})")
    p.add_argument("--ways", type=lambda text: text.split(","), help=f"(default: {','.join(WAYS)}; with --ranks {','.join(WAYS_OF_RANKS)}, "
                   "no others)")
    p.add_argument("--ranks", type=int, metavar="N", help="start N processes, each on a GPU of its own")
    p.add_argument("--flat-rings8", action="store_true", help="with --flat: rings in 8 bits")
    p.add_argument("--flat", type=int, metavar="N", help="make so many blocks, in twenties, and compare memory and bytes, nothing else")
    p.add_argument("--fp8", action=argparse.BooleanOptionalAction, default=True, help="float8 matrices (default: on)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the blocks' per-token parts (default: on)")
    p.add_argument("--vae-dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    p.add_argument("--profile", action="store_true", help="list the kernels of a block's forwards and of its decoding")
    p.add_argument("--tiny", action="store_true", help="tiny networks (default: on a CPU)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return p


def main(args):
    ranks, given = bench_ranks.under_torchrun(), args.ways
    args.ways = args.ways or list(WAYS_OF_RANKS if args.ranks or ranks else WAYS)
    if (args.ranks or ranks) and (other := set(args.ways) - set(WAYS_OF_RANKS)):
        raise ValueError(f"--ways of --ranks are {', '.join(WAYS_OF_RANKS)}, got {min(other)}")
    if args.ranks and not ranks:
        if not 2 <= args.ranks <= args.steps:
            raise ValueError(f"--ranks wants 2 to {args.steps}, a step for each, got {args.ranks}")
        sys.exit(bench_ranks.launch(args, sys.argv[1:], "fast.bench_live"))
    device = bench_ranks.local_device(args.device) if ranks else pick_device(args.device)
    if ranks and device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks and int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")                           # rank 0 speaks for all
    live.check_window(args.window)
    for name, value, ok, want in (("size", args.size, not (args.size[0] % 64 or args.size[1] % 64), "multiples of 64"),
                                  ("ways", args.ways, all(set(name.split("+")) <= set(WORDS) for name in args.ways),
                                   f"words of {', '.join(WORDS)}"),
                                  ("blocks", args.blocks, args.blocks > 0, "1 or more")):
        if not ok:
            raise ValueError(f"--{name} wants {want}, got {value}")
    if device.type == "cpu":
        if given and given != ["plain"]:
            raise ValueError(f"--ways {','.join(given)} want a GPU: a CPU measures plain")
        args.ways, args.compile, args.fp8 = ["plain"], False, False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    tiny = args.tiny or device.type != "cuda"
    print(f"{name}, torch {torch.__version__}, commit {commit()}, {'tiny networks, ' * tiny}live at {args.size[0]}x{args.size[1]}, "
          f"{args.steps} steps, window {args.window}{', fp8' * args.fp8}{', compiled' * args.compile}", flush=True)
    result, start = {}, time.perf_counter()
    if ranks:
        with torch.no_grad():
            on_ranks(args, device, args.ways, result)
        return report(device, result)
    with torch.no_grad():
        bench = Bench(args, device)
        synchronize(device)
        print(f"weights  {time.perf_counter() - start:.1f} s, {used(device)[0]:.1f} GiB; a viewer's rings take "
              f"{live.ring_bytes(bench.cfg, bench.n, args.steps, args.window, bench.dtype.itemsize) / GIB:.1f} GiB", flush=True)
        picture, start = bench.prepare(), time.perf_counter()
        bench.begin(picture).block(bench.audio(0)).cpu()
        print(f"compiled {time.perf_counter() - start:.1f} s for the first block", flush=True)
        if args.flat:
            result["flat"] = flat(bench, picture, args.flat)
        else:
            measure(bench, picture, [name for name in args.ways if "graphs" not in name], result)
            result["parts"] = parts(bench, picture, GPURing)
            if any("rings8" in name and "failed" not in found for name, found in result.items()):
                result["parts8"], result["error8"] = parts(bench, picture, Ring8), error8(bench, picture)
            del picture
            result["first"] = first_frames(bench)
            measure(bench, bench.prepare(), [name for name in args.ways if "graphs" in name], result)
    report(device, result)


def report(device, result):
    result["peak_gib"] = memory_used(device)[0]
    print(json.dumps(dict(gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", torch=torch.__version__, commit=commit(),
                          argv=sys.argv[1:], **result)))


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
