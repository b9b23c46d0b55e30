"""How long a plan will take: operations by arithmetic, rates from probes. `estimate_seconds` is the denoising, `other_seconds` the rest."""
import math
import time
from collections import deque

import torch
import torch.nn.functional as F

from fast.convolution import suits
from fast.plan import COMPILE_SECONDS
from fast.probe import synchronize
from fast.vae_plan import network
from model import layer_norm, modulate
from vae import ResBlock, new_cache

REACHED = {False: 0.77, True: 0.9}        # of a probe's rates, by a forward eager and compiled (H200: 0.71 to 0.80, 0.85 to 1.0)
WRITTEN = 1.7e-8, 1.9e-7     # seconds per pixel of an mp4, of PNG files (one core of a server: 1.2 and 19 s for 70 and 100 megapixels)
LOADED = 2.2                 # GiB of files per second, with the text encoded meanwhile (H200, files in memory: 64 GiB in 24 to 33 s)
KERNELS = 1.6                # times as fast as vae.py is a VAE by fast/convolution.py (H200: 123 to 77 ms, 87 to 53)
TILE_COST = 0.13             # of the VAE's time, for each tile after the first (H200, 4 tiles: 1.26 to 1.9 times as long)


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


def forward_seconds(cfg, config, fp8_matrices, tokens, video_tokens, attention=None):
    """Of one forward, from a probe of a second.  config: RunConfig; attention: seconds of a layer's self-attention, if it is another than of all to all

    A GPU reaches REACHED of the rates it finds. On a CPU norms and RoPE, which no kernel joins to the products, take as long as 30 modulated norms
    per layer (measured for widths of 128 to 1280).
    """
    device = config.device
    some = min(tokens, 16384 if device.type == "cuda" else 1024)
    matmul, attend = rates(cfg, config, fp8_matrices, some)
    linear, attn = forward_flops(cfg, tokens, video_tokens)
    products, attention = linear / matmul, attn / attend if attention is None else cfg.n_layer * attention
    if device.type == "cuda":
        return (products + attention) / REACHED[bool(config.compile)]
    x, shift, scale = torch.randn(3, some, cfg.dim)
    norms = best_seconds(lambda: modulate(layer_norm(x, cfg.eps), shift, scale), device)
    return products + attention + 30 * cfg.n_layer * norms * tokens / some


def estimate_seconds(plan):
    """Of the denoising of a whole video."""
    (halves, runs), forwards = plan.config.split, plan.forwards
    if halves == 2:                                                  # both branches at once; one alone takes as long
        forwards = plan.clips * len(plan.config.speed.most if plan.config.speed else range(plan.config.steps))
    return forwards * forward_seconds(plan.denoiser, plan.config, plan.memory.fp8, plan.tokens[-1], plan.video_tokens) / runs


# -------------------------------------------------------------------------------------------------- VAE, loading, compiling

def vae_flops(config, H, W):
    """Operations of the VAE per latent frame of H x W -> (encoding, decoding). Not counted: norms, and attention in the bottleneck, about 1%."""
    net, full, frames = network(config), 2 ** len(config.temporal_downsample), config.stride[0]

    def flops(n, scale, *layers):
        """Of convolutions that make n frames of H x W times scale."""
        return 2 * n * scale ** 2 * H * W * sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
    encoding, n, scale = flops(frames, full, net.encoder.conv_in), frames, full
    for stage in net.encoder.stages:
        encoding += flops(n, scale, stage.blocks)
        if stage.resample:
            scale //= 2
            encoding += flops(n, scale, stage.resample.space)
            if stage.resample.time:
                n //= 2
                encoding += flops(n, scale, stage.resample.time)
    encoding += flops(1, 1, net.encoder.middle, net.encoder.conv_out)
    decoding, n, scale = flops(1, 1, net.decoder.conv_in, net.decoder.middle), 1, 1
    for stage in net.decoder.stages:
        decoding += flops(n, scale, stage.blocks)
        if stage.resample:
            if stage.resample.time:
                decoding += flops(n, scale, stage.resample.time)
                n *= 2
            scale *= 2
            decoding += flops(n, scale, stage.resample.space)
    return encoding, decoding + flops(n, scale, net.decoder.conv_out)


def vae_latents(plan):
    """Latent frames that a whole video encodes and decodes (see `make_clips` and `generate_video`)."""
    o, T = plan.config, plan.latent_shape[0]
    if plan.sound is None:
        return (T if plan.task.startswith("i2v") else 1 if o.image else 0), T
    motion = 1 + (plan.denoiser.motion_frames - 1) // 4
    decoded = plan.clips * (motion + T) - (0 if o.start_from_ref else motion - 1)            # behind the past; the first clip behind the picture
    return 1 + (plan.clips - (not o.start_from_ref)) * motion + plan.clips * (T + 1 if o.pose_video else 0), decoded


def vae_rate(config, plan):
    """FLOP/s of the VAE: 1.15 times those of a residual block of the decoder's last stage, the narrowest (CPU: 0.96 to 1.21 times)."""
    o, C = plan.config, config.dec_dim * config.dim_mult[0]
    n = config.stride[0] * (1 if o.device.type == "cuda" else 2)                             # frames at once, see VAE.chunk
    most = 2 ** 18 if o.device.type == "cuda" else 2 ** 14                                   # pixels: enough for full speed
    width = min(plan.width, 512)
    block = ResBlock(C, C).to(o.device, o.vae_dtype)
    x = torch.randn(1, n, max(1, min(plan.height, most // width)), width, C, device=o.device, dtype=o.vae_dtype)
    with torch.no_grad():
        block(x[:, :1], cache := new_cache(block))
        seconds = best_seconds(lambda: block(x, deque(cache)), o.device) / (KERNELS if suits(x, block.conv1) else 1)
    return 1.15 * 2 * x.numel() / C * sum(p.numel() for p in block.parameters() if p.ndim == 5) / seconds


def other_seconds(plan, vae, as_frames=False):
    """Of all but the denoising: loading, compiling, encoding, decoding and writing.  vae: its VAEConfig; as_frames: as PNG files

    Text and sound are left out, less than 1% of a full-size video."""
    _, H, W = plan.latent_shape
    work = sum(n * flops for n, flops in zip(vae_latents(plan), vae_flops(vae, H, W)))
    ranks = math.prod(plan.config.split)
    tiles = (1 + TILE_COST * (max(plan.memory.tiles, ranks) - 1)) / ranks
    writing = plan.frames * plan.height * plan.width * WRITTEN[as_frames]
    return sum(plan.sizes.values()) / LOADED + COMPILE_SECONDS * plan.config.compile + tiles * work / vae_rate(vae, plan) + writing
