"""Other implementations beside ours: one process, the same random weights and inputs, in turns, so that a busy or throttled device slows all alike.

Used by `python -m fast.bench --against REPO`. The official code is imported from a checkout of Wan-Video/Wan2.2; diffusers' transformer and the
official code need diffusers and accelerate, which this project does not otherwise use. The official weights are bfloat16 here on a GPU; as
published its T2V, I2V and TI2V keep float32 and cast at every forward, which is slower.
"""
import contextlib
import gc
import importlib.util
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial

import torch

from fast import attention8, blocks
from fast.convolution import use_kernels
from fast.bench import clip_arguments, count_tokens
from fast.estimate import forward_seconds
from fast.plan import RunConfig
from fast.probe import GIB, memory_used, synchronize
from formats.checkpoints import materialise
from tests import parity_official
from tiny import random_weights
from wan_s2v import decode_frames


@dataclass
class Way:
    """One way to compute a forward."""
    net: object                  # whose parameters count as its memory
    run: object                  # function () -> velocity
    precision: object = contextlib.nullcontext           # function () -> context in which it runs
    expected: float = 0.0        # seconds that the plan would say


def official_way(repo, task, cfg, tensors, x, arguments, dtype):
    from accelerate import init_empty_weights           # what diffusers loads with: tables stay on the CPU, parameters come later
    parity_official.add_checkout(repo)
    keep_flash = dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None
    fields = {name: value for name, value in random_weights.denoiser_json(task, cfg).items() if name[0] != "_"}
    theirs = random_weights.official_names("denoiser", cfg)
    with parity_official.official_denoiser(cfg, keep_flash) as (kind, _), init_empty_weights():
        net = kind(**fields)
    net.load_state_dict({theirs[name]: tensor for name, tensor in tensors.items()}, strict=True, assign=True)
    return Way(net.eval(), partial(parity_official.call_official, net, cfg, x, 500, **arguments),
               partial(parity_official.official_precision, x.device, dtype))


def diffusers_way(cfg, part, tensors, x, text, image=None, clean_frames=0):
    """Its WanTransformer3DModel, called as its pipelines do: text padded with zeros, TI2V with a time per token."""
    from accelerate import init_empty_weights
    from convert_weights import diffusers_fields, renamed
    from diffusers import WanTransformer3DModel
    from formats.names import diffusers_rules
    with init_empty_weights():
        net = WanTransformer3DModel.from_config(diffusers_fields("denoiser", cfg))
    wide = tuple(net._keep_in_fp32_modules or ())                        # parts of names, as from_pretrained reads them
    state = {name: tensors[entry] for name, entry in renamed(replace(part, tensors={n: n for n in tensors}), diffusers_rules("denoiser", cfg)).items()}
    net.load_state_dict({name: value.float() if any(piece in name for piece in wide) else value for name, value in state.items()}, strict=True, assign=True)
    dtype = next(iter(tensors.values())).dtype
    tokens, spatial = x[0, 0].numel() // 4, x[0, 0, 0].numel() // 4
    t = torch.full((1, tokens) if cfg.out_dim == 48 else (1,), 500, device=x.device)
    if clean_frames:
        t[:, :clean_frames * spatial] = 0
    padded = torch.zeros(1, cfg.text_len, cfg.text_dim, device=x.device, dtype=dtype)
    padded[:, :text.shape[1]] = text
    latents = (x if image is None else torch.cat([x, image], dim=1)).to(dtype)
    net.to(x.device)                                     # its RoPE table, which is no parameter
    return Way(net.eval().requires_grad_(False), lambda: net(latents, t, padded, return_dict=False)[0])


def our_ways(cfg, part, tensors, x, arguments, dtype):
    """{name: Way}: eager; on a GPU compiled, float8, with 8-bit attention too."""
    shared = {name: replace(entry, read=partial(tensors.get, name)) for name, entry in part.tensors.items()}
    tokens, video, t = *count_tokens(cfg, tuple(x.shape[2:])), torch.tensor([500], device=x.device)
    variants = {"ours": (False, False, False)}
    if x.is_cuda:
        variants |= {"ours, compiled": (True, False, False), "ours, float8 compiled": (True, True, False),
                     "ours, float8 compiled, 8-bit attention": (True, True, True)}
    ways, nets = {}, {}
    for name, (compile, eight, attend8) in variants.items():
        config = RunConfig(device=x.device, dtype=dtype, compile=compile, attention8=attend8)
        net = nets[compile, eight] = nets.get((compile, eight)) or materialise("denoiser", cfg, shared, x.device, dtype, eight)
        fast = blocks.FastDenoiser(net, attend=attention8.attention8 if attend8 else blocks.attend, compile=compile)
        cond = fast.prepare(shape=x.shape[2:], **arguments)
        ways[name] = Way(net, partial(fast, x, t, cond), expected=forward_seconds(cfg, config, eight, tokens, video))
    return ways


@torch.no_grad()
def compare_denoisers(repo, task, cfg, shape, device, dtype, repeats=3):
    """One forward (S2V: of a later clip) in every way, in turns behind a warm-up; prints a table.

    task     of the released ones        cfg  model.Config        shape  (T, H, W) of the latents        dtype  float32, or bfloat16 on a GPU
    returns  {way: dict of s_per_forward (median), times_official (median over the turns), rel_l2 to the official, gib of its weights and of what it
             holds at most beside them, expected_s by the plan}
    """
    part, seeds = random_weights.random_part("denoiser", cfg, dtype, "denoiser"), iter(range(2, 9))
    tensors = {name: entry.read().to(device) for name, entry in part.tensors.items()}
    x = parity_official.noise(1, 1, cfg.out_dim, *shape).to(device)
    arguments = parity_official.to_device(clip_arguments(cfg, shape, lambda *size: parity_official.noise(next(seeds), *size)), device)
    ways = {"official": official_way(repo, task, cfg, tensors, x, arguments, dtype)}
    if not cfg.audio_dim:                                # diffusers has no S2V
        ways["diffusers"] = diffusers_way(cfg, part, tensors, x, **arguments)
    ways |= our_ways(cfg, part, tensors, x, arguments, dtype)
    times, peak, gap, wanted = {name: [] for name in ways}, {}, {}, None
    for turn in range(repeats + 1):                      # the first is a warm-up
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            with way.precision(), blocks.attention_backend(device):
                synchronize(device)
                start = time.perf_counter()
                y = way.run()
                synchronize(device)
                times[name] += [time.perf_counter() - start] * (turn > 0)
            wanted = y.float() if wanted is None else wanted
            gap[name] = float((y.float() - wanted).norm() / wanted.norm())
            peak[name] = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
            del y
    result = {}
    for name, way in ways.items():
        weights = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in way.net.state_dict().values()}.values())
        row = dict(s_per_forward=statistics.median(times[name]), rel_l2=gap[name], gib=(peak[name] + weights) / GIB, expected_s=way.expected,
                   times_official=statistics.median(o / t for o, t in zip(times["official"], times[name])))
        result[name] = row
        print("{:40s} {s_per_forward:7.3f} s   {times_official:.2f} times as fast as the official   relative L2 {rel_l2:.1e}   {gib:5.1f} GiB"
              "{}".format(name, f"   expected {way.expected:.2f} s" if way.expected else "", **row))
    return result


def timed(run, device, repeats):
    """-> the last result, median seconds behind a warm-up, GiB reserved at most"""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    times, y = [], None
    for _ in range(repeats + 1):
        y = None                                         # its host memory serves the next
        synchronize(device)
        start = time.perf_counter()
        y = run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return y.float().cpu(), statistics.median(times[1:]), memory_used(device)[0]


@torch.no_grad()
def compare_vaes(repo, cfg, shape, device, decode, tiles, repeats=1):
    """The official VAE in float32, then ours in float32 and in float16 whole and in tiles; prints seconds, GiB and the largest distance of an output.

    cfg  vae.VAEConfig        shape  (T, H, W) of the latents        decode  T latents to frames, or encode one picture        tiles  to try, (4, 8)
    """
    parity_official.add_checkout(repo)
    part = random_weights.random_part("vae", cfg, torch.float32, "vae")
    T, H, W = shape
    x = torch.randn(1, cfg.z_dim, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    if not decode:
        x = parity_official.moving_picture(1, H * cfg.stride[1], W * cfg.stride[2])[None].to(device)
    names, result, wanted = random_weights.official_names("vae", cfg), {}, None
    with tempfile.NamedTemporaryFile(suffix=".pth") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({names[name]: entry.read() for name, entry in part.tensors.items()}, file.name)
        theirs = parity_official.official_vae(cfg, file.name, device)
    ways = [("official float32", None, 1)] + [(f"ours {str(dtype)[6:]}", dtype, n) for dtype, n in (
        (torch.float32, 1), *((torch.float16, n) for n in (1, *tiles) if device.type == "cuda"))]
    for name, dtype, n in ways:
        if dtype is None:
            run = (lambda: theirs.decode([x[0]])[0][None]) if decode else (lambda: theirs.encode([x[0]])[0][None])
        else:
            vae = theirs = None                          # the last one's memory is free again
            vae = use_kernels(materialise("vae", cfg, part.tensors, device, dtype))
            vae.tiles = n
            run = (lambda: decode_frames(vae, [x], 1 + cfg.stride[0] * (T - 1))) if decode else (lambda: vae.encode(x))
        y, seconds, gib = timed(run, device, repeats)
        wanted = y if wanted is None else wanted
        off, scale = float((y - wanted).abs().max()), 1.0 if decode else float(wanted.abs().max())
        name += f", {n} tiles" * (n > 1)
        result[name] = dict(s=seconds, gib=gib, off=off / scale)
        print(f"{name:24s} {seconds:7.2f} s   {gib:5.2f} GiB reserved   off by {off / scale:.5f} of the {'range [-1, 1]' if decode else 'largest'} "
              f"at most (1/255 of the range is 0.0078)")
    return result
