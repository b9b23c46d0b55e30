"""How long a plan will take: operations by arithmetic, rates from a probe of a second."""
import time

import torch
import torch.nn.functional as F

from fast.probe import synchronize


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
