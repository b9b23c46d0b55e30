"""How fast, and in how much memory? Random weights at the released sizes, made on the device: no checkpoint is needed.

    python -m fast.bench                                                    S2V-14B, one denoiser forward at 832x480
    python -m fast.bench --size 1280x704 --fp8 --compile                    the fastest way through it with exact attention
    python -m fast.bench --size 1280x704 --fp8 --compile --attention8       the fastest way
    python -m fast.bench --size 1280x704 --fp8 --compile --vram 8           as on a card of 8 GB
    python -m fast.bench --stage vae-decode --size 1280x704                 also vae-encode, text, audio, all; vae-error, error: of lower precision
    python -m fast.bench --against REPO --size 832x480                      the official forward in the same process, same shapes
    python -m fast.bench --against REPO --preset tiny                       the same on a CPU, float32

A forward is one call of the denoiser for one guidance branch of a later clip (with motion tokens); a step with guidance is two. Times are
medians after a warm-up. Shares are of what this device reaches on plain matrix products and attention of the same shapes, measured first.
The last line is JSON.
"""
import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from fast import attention8
from tiny import random_weights as fake_checkpoint
from formats.checkpoints import Entry, materialise, parameter_shapes
from fast.plan import GIB, Machine, device_limit, fit, forward_flops, memory_used, pick_device, rates
from model import compile_blocks, use_attention8
from fast.offload import HostLayers
from sample import DTYPES, size
from vae import new_cache
from wan_s2v import decode_frames, token_counts


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run, device, repeats=3, warmup=1):
    """Median, least and most of `repeats` calls."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


def random_entries(kind, config, device, dtype):
    """{our name: Entry} of random numbers with sane statistics, made on the device when they are read."""
    def make(name, shape):
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        mean, deviation = fake_checkpoint.spread(name, shape)
        return (torch.randn(shape, device=device, generator=generator) * deviation + mean).to(dtype)
    return {name: Entry(Path("random"), shape, dtype, lambda name=name, shape=shape: make(name, shape))
            for name, shape in parameter_shapes(kind, config).items()}


# -------------------------------------------------------------------------------------------------------------------- stages

def bench_denoiser(args, configs, device, dtype, shape):
    cfg, (T, H, W) = configs["denoiser"], shape
    tokens, video = token_counts(shape)[1], T * H * W // 4
    matmul, attend = rates(cfg, Machine(device, dtype, quantize=args.fp8, attention8=args.attention8), min(tokens, 16384) if args.vram else tokens)
    net = materialise("denoiser", cfg, random_entries("denoiser", cfg, device, dtype), device, dtype, args.fp8, args.resident)
    if args.compile:
        compile_blocks(net)
    if args.attention8:
        use_attention8(net)

    def random(*size):
        return torch.randn(size, device=device, dtype=dtype)
    ref, motion = random(1, cfg.out_dim, 1, H, W), random(1, cfg.out_dim, 19, H, W)
    audio = random(1, cfg.audio_states, cfg.audio_dim, 4 * T)
    cond = net.prepare(shape, random(1, 60, cfg.text_dim), audio, ref, motion, chunk=args.chunk)
    if args.host_layers:
        cond = replace(cond, layers=HostLayers(cond.layers))
    conds = (cond, cond) if args.branches == 2 else (cond,)
    latents, t = random(1, cfg.out_dim, T, H, W), torch.full((1,), 500, device=device)

    def forward():
        net.velocities(latents, t, conds)
    start = time.perf_counter()
    forward()
    sync(device)
    first, (whole, _) = time.perf_counter() - start, memory_used(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    median, least, most = (s / len(conds) for s in seconds(forward, device, args.repeats))
    linear, attn = forward_flops(cfg, tokens, video)
    floor = linear / matmul + attn / attend
    steady, host = memory_used(device)
    gpu, live = max(whole, steady), torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    print(f"denoiser   {tokens:,} tokens, {median:.3f} s per forward ({least:.3f} to {most:.3f}; first call {first:.1f} s), "
          f"{(linear + attn) / median / 1e12:.0f} TFLOP/s")
    print(f"           floor {floor:.3f} s = {linear / 1e12:.0f} TFLOP linear at {matmul / 1e12:.0f} + {attn / 1e12:.0f} attention at "
          f"{attend / 1e12:.0f} TFLOP/s; reached {floor / median:.0%}")
    print(f"           peak {gpu:.2f} GiB reserved on the GPU ({steady:.2f} after the first call, {live:.2f} of it tensors), {host:.1f} GiB of "
          f"host memory")
    if args.profile:
        profile(forward)
    return dict(tokens=tokens, s_per_forward=median, first_call_s=first, tflops=(linear + attn) / median / 1e12, floor_s=floor,
                matmul_tflops=matmul / 1e12, attention_tflops=attend / 1e12, peak_gpu_gib=gpu, steady_gpu_gib=steady, tensors_gpu_gib=live,
                peak_host_gib=host)


def bench_error(args, configs, device, shape):
    """One forward in float32, in bfloat16, in float8 and with 8-bit attention, same weights and inputs: relative L2 differences."""
    cfg, (T, H, W) = configs["denoiser"], shape

    def forward(dtype, quantize=False, eight_bit_attention=False):
        torch.manual_seed(0)
        net = materialise("denoiser", cfg, random_entries("denoiser", cfg, device, torch.bfloat16), device, dtype, quantize)
        if eight_bit_attention:
            use_attention8(net)
        sizes = ((1, 60, cfg.text_dim), (1, cfg.audio_states, cfg.audio_dim, 4 * T), (1, cfg.out_dim, 1, H, W), (1, cfg.out_dim, 19, H, W))
        cond = net.prepare(shape, *(torch.randn(size, device=device) for size in sizes), chunk=8192)
        v = net(torch.randn(1, cfg.out_dim, T, H, W, device=device), torch.full((1,), 500, device=device), cond)
        del net, cond
        gc.collect()
        return v.double()
    full, half, eight = forward(torch.float32), forward(torch.bfloat16), forward(torch.bfloat16, True)
    half8, eight8 = (forward(torch.bfloat16, quantize, True) for quantize in (False, True))

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


def bench_vae(args, configs, device, shape, decode):
    vae, (T, H, W) = random_network("vae", configs, device, DTYPES[args.vae_dtype]), shape
    vae.tiles = args.tiles
    st, sh, sw = vae.stride
    if decode:
        x = torch.randn(1, vae.config.z_dim, T + 19, H, W, device=device)
        run, what = (lambda: decode_frames(vae, [x], 4 * T)), f"decode of {T + 19} latents, {4 * T} frames to the host"
    else:
        x = torch.rand(1, 3, 73, H * sh, W * sw, device=device) * 2 - 1
        run, what = (lambda: vae.encode(x)), "encode of 73 frames"
    median, least, most = seconds(run, device, args.repeats)
    gpu, host = memory_used(device)
    print(f"vae        {what} at {W * sw}x{H * sh} in {args.vae_dtype}, {args.tiles} tile{'s' * (args.tiles > 1)}: {median:.2f} s "
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
        pixels, past = [], new_cache(vae.decoder)
        for i in range(z.shape[2]):
            pixels.append(vae.decoder(z[:, :, i:i + 1].to(dtype), past).float().cpu())
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


def bench_text(args, configs, device, dtype):
    net = materialise("text", configs["text"], random_entries("text", configs["text"], device, dtype), device, dtype, resident=args.text_resident)
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
    """The options as the plan for a card of --vram GB would have them; what the command line says goes first. raises ValueError if nothing fits"""
    dtypes = {kind: torch.float32 if kind in ("vae", "audio") else dtype for kind in configs}
    checkpoint = fake_checkpoint.random_checkpoint("s2v-14B", configs, dtypes, Path("tokenizer.json"), boundary=None)
    machine = Machine(device, dtype, DTYPES[args.vae_dtype], args.fp8, args.compile, args.attention8, resident=args.resident)
    plan = fit(checkpoint, shape, token_counts(shape)[1], machine, device_limit(device, args.vram))
    print(plan)
    m = plan.machine
    return argparse.Namespace(**vars(args) | dict(resident=m.resident, text_resident=m.text_resident, chunk=args.chunk or m.span,
                                                  host_layers=m.host_layers, tiles=max(args.tiles, m.tiles)))


def afresh(run, device):
    """run() with the memory of what ran before given back and forgotten."""
    gc.collect()                                                     # compiled blocks refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return run()


def compared(args, configs, device, dtype, shape, result):
    """The official forward beside ours, or why it could not be run."""
    try:
        from tests.parity_official import time_official
        o = time_official(args.against, configs["denoiser"], shape, device, dtype, args.repeats)
    except (ImportError, OSError) as error:
        print(f"official   skipped: {error}")
        return dict(skipped=str(error))
    faster = f"; the run above is {o['s_per_forward'] / result['dit']['s_per_forward']:.2f} times as fast as the official" if "dit" in result else ""
    print(f"official   {o['s_per_forward']:.3f} s per forward, ours in turns with it, eager {dtype}: {o['ours_s_per_forward']:.3f} s "
          f"(ratio {o['ratio']:.2f}, relative L2 {o['rel_l2']:.1e}){faster}")
    return o


def commit():
    run = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=("s2v-14B", "tiny"), default="s2v-14B")
    p.add_argument("--stage", choices=("dit", "vae-decode", "vae-encode", "vae-error", "text", "audio", "error", "all"), default="dit")
    p.add_argument("--size", type=size, default=(832, 480), metavar="WxH", help="of the video (default 832x480)")
    p.add_argument("--frames", type=int, default=80, help="of a clip (default 80)")
    p.add_argument("--fp8", action="store_true", help="float8 weights and activations in the blocks")
    p.add_argument("--attention8", action="store_true", help="self-attention in 8 bits, off by 3.5%% of each attention output on random inputs")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks' per-token parts")
    p.add_argument("--resident", type=int, help="blocks that stay on the GPU, the others are streamed (default: all)")
    p.add_argument("--vram", type=float, help="GiB of a card to rehearse: run as the plan for it says; this process cannot take more")
    p.add_argument("--chunk", type=int, help="longest span of tokens worked on at once (default: none)")
    p.add_argument("--branches", type=int, choices=(1, 2), default=1, help="guidance branches in one loop over the blocks (default 1)")
    p.add_argument("--vae-dtype", choices=DTYPES, default="float16")
    p.add_argument("--tiles", type=int, default=1, help="spatial tiles of the VAE (default 1)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--profile", action="store_true", help="list the kernels of one forward")
    p.add_argument("--against", type=Path, metavar="REPO", help="checkout of Wan-Video/Wan2.2: time its forward too")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return p


def main(args):
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    configs = fake_checkpoint.released("s2v-14B") if args.preset == "s2v-14B" else fake_checkpoint.tiny("s2v-14B")
    stride = configs["vae"].stride
    for name, ok, want in (("repeats", args.repeats >= 1, "1 or more"), ("frames", args.frames >= 4 and args.frames % 4 == 0, "a multiple of 4"),
                           ("size", all(n % (2 * stride[1]) == 0 for n in args.size), f"multiples of {2 * stride[1]}"),
                           ("profile", not args.profile or device.type == "cuda", "a GPU")):
        if not ok:
            raise ValueError(f"--{name} wants {want}, got {getattr(args, name)}")
    shape = (args.frames // stride[0], args.size[1] // stride[1], args.size[0] // stride[2])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, commit {commit()}, {args.preset} at {args.size[0]}x{args.size[1]}, {args.frames} frames"
          f"{', fp8' * args.fp8}{', 8-bit attention' * args.attention8}{', compiled' * args.compile}")
    if args.attention8:
        attention8.check(device)
    args.host_layers, args.text_resident = args.resident is not None, None
    if args.vram:
        args = as_planned(args, configs, device, dtype, shape)
    runs = {"dit": lambda: bench_denoiser(args, configs, device, dtype, shape),
            "vae-decode": lambda: bench_vae(args, configs, device, shape, True),
            "vae-encode": lambda: bench_vae(args, configs, device, shape, False),
            "vae-error": lambda: bench_vae_error(configs, device, shape), "text": lambda: bench_text(args, configs, device, dtype),
            "audio": lambda: bench_audio(args, configs, device), "error": lambda: bench_error(args, configs, device, shape)}
    with torch.no_grad():
        result = {stage: afresh(run, device) for stage, run in runs.items() if args.stage == stage or (args.stage == "all" and "error" not in stage)}
        if args.against:
            result["official"] = afresh(lambda: compared(args, configs, device, dtype, shape, result), device)
    print(json.dumps(dict(gpu=name, torch=torch.__version__, commit=commit(), argv=sys.argv[1:], **result)))


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
