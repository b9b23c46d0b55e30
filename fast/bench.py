"""How fast, and in how much memory? Random weights at the released sizes, made on the device: no checkpoint is needed.

    python -m fast.bench                                                    S2V-14B, one denoiser forward at 832x480 (on a CPU: tiny, 128x128)
    python -m fast.bench --size 1280x704 --fp8 --compile                    the fastest way through it with exact attention
    python -m fast.bench --size 1280x704 --fp8 --compile --attention8       the fastest way
    python -m fast.bench --size 1280x704 --fp8 --compile --vram 8           as on a card of 8 GB
    python -m fast.bench --preset t2v-A14B --size 1280x720                  also i2v-A14B, ti2v-5B
    python -m fast.bench --stage vae-decode --size 1280x704                 also vae-encode, text, audio, all; vae-error, error: of lower precision
    python -m fast.bench --against REPO --size 832x480                      official, diffusers and ours in turns, same weights (fast/against.py)
    python -m fast.bench --ranks 4                                          a step and the VAE by 4 ranks, each with a GPU of its own
    python -m fast.bench --ranks 4 --stage error                            how far that step is from one GPU's
    python -m fast.bench --simulate 2,4,8 --fp8 --compile                   what 2, 4, 8 GPUs may take, from this one (fast/bench_ranks.py)
    python -m fast.bench --against REPO --preset tiny                       the same on a CPU, float32

A forward is one call of the denoiser for one guidance branch (S2V: of a later clip, with motion tokens; TI2V: with a clean first frame); a
step with guidance is two. Times are medians after a warm-up. Shares are of what this device reaches on plain matrix products and attention
of the same shapes, measured first. The last line is JSON.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch

from fast import attention8, blocks
from fast.convolution import use_kernels
from fast.plan import MAX_CLIP_FRAMES, MemoryPlan, RunConfig, plan_memory, token_counts
from fast.estimate import forward_flops, rates
from fast.probe import GIB, cap_memory, free_memory, memory_used, pick_device, synchronize
from formats.checkpoints import Entry, materialise, parameter_shapes
from sample import DTYPES, size
from tiny import random_weights
from vae import new_cache
from wan_s2v import decode_frames

PRESETS = ("s2v-14B", "t2v-A14B", "i2v-A14B", "ti2v-5B", "tiny")
FRAMES = {"s2v-14B": 80, "tiny": 80, "t2v-A14B": 81, "i2v-A14B": 81, "ti2v-5B": 121}


def seconds(run, device, repeats=3, warmup=1):
    """Median, least and most of `repeats` calls."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


def random_entries(kind, config, device, dtype):
    """{our name: Entry} of random numbers with sane statistics, made on the device when they are read."""
    def make(name, shape):
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        mean, deviation = random_weights.spread(name, shape)
        return (torch.randn(shape, device=device, generator=generator) * deviation + mean).to(dtype)
    return {name: Entry(Path("random"), shape, dtype, lambda name=name, shape=shape: make(name, shape))
            for name, shape in parameter_shapes(kind, config).items()}


# -------------------------------------------------------------------------------------------------------------------- stages

def clip_arguments(cfg, shape, random, text=60):
    """Arguments of `prepare` beside the shape: a later clip of S2V, a picture for I2V, a clean first frame for TI2V.  random: sizes -> tensor"""
    (T, H, W), arguments = shape, dict(text=random(1, min(text, cfg.text_len), cfg.text_dim))
    if cfg.audio_dim:
        return arguments | dict(audio=random(1, cfg.audio_states, cfg.audio_dim, 4 * T), ref=random(1, cfg.out_dim, 1, H, W),
                                motion=random(1, cfg.out_dim, cfg.motion_latents, H, W))
    if cfg.in_dim > cfg.out_dim:
        return arguments | dict(image=random(1, cfg.in_dim - cfg.out_dim, T, H, W))
    return arguments | dict(clean_frames=1 if cfg.out_dim == 48 else 0)


def count_tokens(cfg, shape):
    """Tokens of a forward, and of those of the video."""
    video = shape[0] * shape[1] * shape[2] // 4
    return token_counts(shape)[1] if cfg.audio_dim else video, video


def random_denoiser(cfg, device, dtype, args, memory):
    net = materialise("denoiser", cfg, random_entries("denoiser", cfg, device, dtype), device, dtype, args.fp8, memory.resident)
    return blocks.FastDenoiser(net, args.chunk or memory.chunk, attention8.attention8 if args.attention8 else blocks.attend, args.compile,
                               memory.host_layers)


def bench_denoiser(args, configs, device, dtype, shape, memory):
    cfg = configs["denoiser"]
    tokens, video = count_tokens(cfg, shape)
    config = RunConfig(device=device, dtype=dtype, attention8=args.attention8)
    matmul, attend = rates(cfg, config, args.fp8, min(tokens, 16384) if args.vram else tokens)
    net = random_denoiser(cfg, device, dtype, args, memory)

    def random(*size):
        return torch.randn(size, device=device, dtype=dtype)
    cond = net.prepare(shape=shape, **clip_arguments(cfg, shape, random))
    latents, t = random(1, cfg.out_dim, *shape), torch.full((1,), 500, device=device)

    def forward():
        return net(latents, t, cond)
    start = time.perf_counter()
    forward()
    synchronize(device)
    first, (whole, _) = time.perf_counter() - start, memory_used(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    median, least, most = seconds(forward, device, args.repeats)
    linear, attn = forward_flops(cfg, tokens, video)
    floor = linear / matmul + attn / attend
    steady, host = memory_used(device)
    gpu, live = max(whole, steady), torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    print(f"denoiser   {tokens:,} tokens, {median:.3f} s per forward ({least:.3f} to {most:.3f}; first call {first:.1f} s), "
          f"{(linear + attn) / median / 1e12:.3g} TFLOP/s")
    print(f"           floor {floor:.3f} s = {linear / 1e12:.3g} TFLOP linear at {matmul / 1e12:.3g} + {attn / 1e12:.3g} attention at "
          f"{attend / 1e12:.3g} TFLOP/s; reached {floor / median:.0%}")
    print(f"           peak {gpu:.2f} GiB reserved on the GPU ({steady:.2f} after the first call, {live:.2f} of it tensors), {host:.1f} GiB of "
          f"host memory")
    if args.profile:
        profile(forward)
    return dict(tokens=tokens, s_per_forward=median, first_call_s=first, tflops=(linear + attn) / median / 1e12, floor_s=floor,
                matmul_tflops=matmul / 1e12, attention_tflops=attend / 1e12, peak_gpu_gib=gpu, steady_gpu_gib=steady, tensors_gpu_gib=live,
                peak_host_gib=host)


def bench_error(args, configs, device, shape):
    """One forward in float32, in bfloat16, in float8 and with 8-bit attention, same weights and inputs: relative L2 differences."""
    cfg = configs["denoiser"]

    def forward(dtype, fp8=False, eight_bit_attention=False):
        torch.manual_seed(0)
        entries = random_entries("denoiser", cfg, device, torch.bfloat16)
        net = blocks.FastDenoiser(materialise("denoiser", cfg, entries, device, dtype, fp8), 8192,
                                  attention8.attention8 if eight_bit_attention else blocks.attend)
        cond = net.prepare(shape=shape, **clip_arguments(cfg, shape, lambda *size: torch.randn(size, device=device)))
        v = net(torch.randn(1, cfg.out_dim, *shape, device=device), torch.full((1,), 500, device=device), cond)
        del net, cond
        gc.collect()
        return v.double()
    full, half, eight = forward(torch.float32), forward(torch.bfloat16), forward(torch.bfloat16, True)
    half8, eight8 = (forward(torch.bfloat16, fp8, True) for fp8 in (False, True))

    def gap(a, b):
        return float((a - b).norm() / b.norm())
    result = dict(bf16_against_float32=gap(half, full), fp8_against_bf16=gap(eight, half), fp8_against_float32=gap(eight, full),
                  attention8_against_bf16=gap(half8, half), fp8_and_attention8_against_bf16=gap(eight8, half))
    print("error      relative L2 of the velocity")
    for name, value in result.items():
        print(f"           {value:8.3%}  {name.replace('_', ' ')}")
    return result


def profile(run):
    """Where the time goes, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        run()
        torch.cuda.synchronize()
    rows = sorted(p.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    for row in rows[:18]:
        spent = row.self_device_time_total
        print(f"           {spent / total:6.1%} {spent / 1e3:9.1f} ms {row.count:6d}x  {row.key[:100]}")


def random_network(kind, configs, device, dtype):
    config = configs[kind]
    return materialise(kind, config, random_entries(kind, config, device, dtype), device, dtype)


def bench_vae(args, configs, device, shape, memory, decode):
    """S2V decodes behind 19 motion latents and encodes 73 frames; the others decode one clip and encode one picture."""
    vae, (T, H, W) = use_kernels(random_network("vae", configs, device, DTYPES[args.vae_dtype])), shape
    vae.tiles, s2v = args.tiles or memory.tiles, bool(configs["denoiser"].audio_dim)
    st, sh, sw = vae.stride
    if decode:
        latents, frames = (T + 19, st * T) if s2v else (T, 1 + st * (T - 1))
        x = torch.randn(1, vae.config.z_dim, latents, H, W, device=device)
        run, what = (lambda: decode_frames(vae, [x], frames)), f"decode of {latents} latents, {frames} frames to the host"
    else:
        x = torch.rand(1, 3, 73 if s2v else 1, H * sh, W * sw, device=device) * 2 - 1
        run, what = (lambda: vae.encode(x)), f"encode of {x.shape[2]} frame{'s' * s2v}"
    median, least, most = seconds(run, device, args.repeats)
    gpu, host = memory_used(device)
    print(f"vae        {what} at {W * sw}x{H * sh} in {args.vae_dtype}, {vae.tiles} tile{'s' * (vae.tiles > 1)}: {median:.2f} s "
          f"({least:.2f} to {most:.2f}), peak {gpu:.1f} GiB reserved")
    return dict(s=median, peak_gpu_gib=gpu, peak_host_gib=host)


def bench_vae_error(configs, device, shape):
    """Decoding and encoding in other dtypes than float32: differences on outputs scaled to [-1, 1], largest and mean."""
    (_, H, W), z_dim, result = shape, configs["vae"].z_dim, {}
    z, video = torch.randn(1, z_dim, 5, H, W, device=device), torch.rand(1, 3, 17, H * configs["vae"].stride[1], W * configs["vae"].stride[2],
                                                                         device=device) * 2 - 1
    tf32, exact = torch.backends.cudnn.allow_tf32, None
    for name, dtype, allowed in (("float32", torch.float32, False), ("TF32", torch.float32, True), ("float16", torch.float16, True),
                                 ("bfloat16", torch.bfloat16, True)):
        torch.backends.cudnn.allow_tf32 = allowed
        vae = random_network("vae", configs, device, dtype)
        pixels, cache = [], new_cache(vae.decoder)
        for i in range(z.shape[2]):
            pixels.append(vae.decoder(z[:, :, i:i + 1].to(dtype), cache).float().cpu())
        both = torch.cat(pixels, dim=2), vae.encode(video).cpu()
        exact = exact or both
        result[name] = [x for y, e in zip(both, exact) for x in ((y - e).abs().max().item() / e.abs().max().item(),
                                                                 (y - e).abs().mean().item() / e.abs().max().item())]
    torch.backends.cudnn.allow_tf32 = tf32
    del result["float32"]
    for name, values in result.items():
        print("vae        {}: decode off by {:.4f} at most, {:.6f} on average, encode by {:.4f}, {:.6f} (1/255 of the range is 0.0078)".format(
            name, *values))
    return result


def bench_text(args, configs, device, dtype, memory):
    net = materialise("text", configs["text"], random_entries("text", configs["text"], device, dtype), device, dtype, resident=memory.text_resident)
    ids = torch.randint(0, configs["text"].vocab, (1, 512), device=device)
    median, *_ = seconds(lambda: net(ids), device, args.repeats)
    gpu, host = memory_used(device)
    print(f"text       512 tokens: {median:.3f} s, peak {gpu:.1f} GiB reserved")
    return dict(s=median, peak_gpu_gib=gpu, peak_host_gib=host)


def bench_audio(args, configs, device):
    net = random_network("audio", configs, device, torch.float32)
    wav = torch.randn(1, 16000 * 10, device=device)
    median, *_ = seconds(lambda: net(wav), device, args.repeats)
    gpu, host = memory_used(device)
    print(f"audio      10 s of sound: {median:.3f} s, peak {gpu:.1f} GiB reserved")
    return dict(s=median, peak_gpu_gib=gpu, peak_host_gib=host)


def as_planned(args, configs, device, dtype, shape):
    """How a run on a card of --vram GB would be planned -> MemoryPlan. raises ValueError if nothing fits"""
    dtypes = {kind: torch.float32 if kind in ("vae", "audio") else dtype for kind in configs}
    task = "s2v-14B" if args.preset == "tiny" else args.preset
    checkpoint = random_weights.random_checkpoint(task, configs, dtypes, Path("tokenizer.json"))
    config = RunConfig(device=device, dtype=dtype, vae_dtype=DTYPES[args.vae_dtype], fp8=args.fp8, compile=args.compile,
                       attention8=args.attention8, resident=args.resident)
    memory = plan_memory(config, checkpoint, shape, count_tokens(configs["denoiser"], shape)[0], free_memory(device, args.vram))
    print(f"plan       denoiser {memory.denoiser / GIB:.2f} GiB, VAE {memory.vae / GIB:.2f}, text {memory.text / GIB:.2f}; {memory}")
    return memory


def afresh(run, device):
    """run() with the memory of what ran before given back and forgotten."""
    gc.collect()                                                     # compiled blocks refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return run()


def compared(args, configs, device, dtype, shape):
    """Others beside ours, or why they could not be run."""
    try:
        from fast import against                                     # here: it wants packages that the project does not
        if args.stage in ("vae-decode", "vae-encode"):
            return against.compare_vaes(args.against, configs["vae"], shape, device, args.stage == "vae-decode", (args.tiles or 4,), args.repeats)
        return against.compare_denoisers(args.against, "s2v-14B" if args.preset == "tiny" else args.preset, configs["denoiser"], shape, device, dtype,
                                         args.repeats)
    except (ImportError, OSError) as error:
        print(f"skipped: {error}")
        return dict(skipped=str(error))


def commit():
    run = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="sizes of the networks (default: s2v-14B, on a CPU tiny)")
    p.add_argument("--stage", choices=("dit", "vae-decode", "vae-encode", "vae-error", "text", "audio", "error", "all"), default="dit")
    p.add_argument("--size", type=size, metavar="WxH", help="of the video (default: 832x480, tiny 128x128)")
    p.add_argument("--frames", type=int, help="of a clip (default: the task's own)")
    p.add_argument("--fp8", action="store_true", help="float8 weights and activations in the blocks")
    p.add_argument("--attention8", action="store_true", help="self-attention in 8 bits, off by 3.6%% of each attention output on random inputs")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks' per-token parts")
    p.add_argument("--resident", type=int, help="blocks that stay on the GPU, the others are streamed (default: all)")
    p.add_argument("--vram", type=float, help="GiB of a card to rehearse: run as the plan for it says; this process cannot take more")
    p.add_argument("--chunk", type=int, help="longest span of tokens worked on at once (default: none)")
    p.add_argument("--vae-dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    p.add_argument("--tiles", type=int, help="spatial tiles of the VAE (default: 1, or as planned)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--profile", action="store_true", help="list the kernels of one forward")
    p.add_argument("--against", type=Path, metavar="REPO", help="checkout of Wan-Video/Wan2.2: time its forward, diffusers' and all of ours, or with "
                   "--stage vae-decode or vae-encode its VAE and ours")
    p.add_argument("--ranks", type=int, metavar="N", help="start N processes, each on a GPU of its own, and measure a step on all of them")
    p.add_argument("--parallel", choices=("auto", "guidance", "sequence"), default="auto", help="with --ranks: as in sample.py (default: auto)")
    p.add_argument("--simulate", type=lambda text: [int(n) for n in text.split(",")], metavar="N,N", help="expected times of so many GPUs")
    p.add_argument("--link", type=float, default=200.0, metavar="GB/s", help="what a GPU sends to the others of its machine together (default 200: "
                   "measured on 4 H200s, waiting included)")
    p.add_argument("--network", type=float, default=40.0, metavar="GB/s", help="what a GPU sends to other machines (default 40: 400 Gbit/s each)")
    p.add_argument("--per-machine", type=int, default=8, metavar="N", help="GPUs of a machine (default 8)")
    p.add_argument("--steps", type=int, default=40, help="of a simulated clip (default 40)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return p


def main(args):
    from fast import bench_ranks                                     # here: it takes its measures from this file
    if args.ranks and not bench_ranks.under_torchrun():
        sys.exit(bench_ranks.launch(args, sys.argv[1:]))
    device = bench_ranks.local_device(args.device) if bench_ranks.under_torchrun() else pick_device(args.device)
    if bench_ranks.under_torchrun() and int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")                           # rank 0 speaks for all
    args.preset = args.preset or ("s2v-14B" if device.type == "cuda" else "tiny")
    args.size = args.size or ((128, 128) if args.preset == "tiny" else (832, 480))
    if device.type == "cpu" and args.preset != "tiny":
        raise ValueError(f"--preset {args.preset} wants a GPU, full size takes hours on a CPU: leave it out for tiny")
    if args.against and (given := [name for name in ("fp8", "compile", "attention8", "resident", "vram", "chunk", "profile") if getattr(args, name)]):
        raise ValueError(f"--against runs all ways there are, got --{given[0]}: leave it out")
    if device.type == "cpu" and args.stage == "error" and not bench_ranks.under_torchrun():
        raise ValueError("--stage error wants a GPU: float8 and 8-bit attention are not computed on a CPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    configs = random_weights.tiny("s2v-14B") if args.preset == "tiny" else random_weights.released(args.preset)
    (st, sh, sw), s2v, frames = configs["vae"].stride, bool(configs["denoiser"].audio_dim), args.frames or FRAMES[args.preset]
    for name, value, ok, want in (
            ("repeats", args.repeats, args.repeats >= 1, "1 or more"),
            ("frames", frames, frames >= st and frames % st == (0 if s2v else 1) and frames <= (MAX_CLIP_FRAMES if s2v else 1000),
             f"a multiple of {st}, at most {MAX_CLIP_FRAMES}" if s2v else f"1 + a multiple of {st}"),
            ("size", args.size, args.size[0] % (2 * sw) == 0 and args.size[1] % (2 * sh) == 0, f"multiples of {2 * sh}"),
            ("profile", args.profile, not args.profile or device.type == "cuda", "a GPU")):
        if not ok:
            raise ValueError(f"--{name} wants {want}, got {value}")
    shape = ((frames - (not s2v)) // st + (not s2v), args.size[1] // sh, args.size[0] // sw)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, commit {commit()}, {args.preset} at {args.size[0]}x{args.size[1]}, {frames} frames"
          f"{', fp8' * args.fp8}{', 8-bit attention' * args.attention8}{', compiled' * args.compile}")
    args.vae_dtype = args.vae_dtype or ("float16" if device.type == "cuda" else "float32")
    if args.attention8:
        attention8.check(device)
    cap_memory(device, args.vram)
    memory = as_planned(args, configs, device, dtype, shape) if args.vram else \
        MemoryPlan(resident=args.resident, host_layers=args.resident is not None)
    runs = {"dit": lambda: bench_denoiser(args, configs, device, dtype, shape, memory),
            "vae-decode": lambda: bench_vae(args, configs, device, shape, memory, True),
            "vae-encode": lambda: bench_vae(args, configs, device, shape, memory, False),
            "vae-error": lambda: bench_vae_error(configs, device, shape), "text": lambda: bench_text(args, configs, device, dtype, memory),
            "audio": lambda: bench_audio(args, configs, device), "error": lambda: bench_error(args, configs, device, shape)}
    wanted = [stage for stage in runs if args.stage == stage or (args.stage == "all" and "error" not in stage and (stage != "audio" or s2v))]
    with torch.no_grad():
        if args.simulate or bench_ranks.under_torchrun():
            what, run = ("simulated", bench_ranks.simulated) if args.simulate else ("ranks", bench_ranks.measured)
            result = {what: run(args, configs, device, dtype, shape, memory)}
        else:
            result = dict(against=compared(args, configs, device, dtype, shape)) if args.against else \
                {stage: afresh(runs[stage], device) for stage in wanted}
    print(json.dumps(dict(gpu=name, torch=torch.__version__, commit=commit(), argv=sys.argv[1:], **result)))


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
