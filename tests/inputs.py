"""Small random networks, clips and inputs of attention that several tests share."""
import torch
import torch.nn as nn

from fast.fp8 import to_fp8
from formats.checkpoints import Entry
from model import Config, Denoiser

TINY = Config(dim=96, ffn_dim=192, n_head=4, n_layer=5, text_dim=32, text_len=12, freq_dim=32, audio_dim=24, audio_states=3, audio_tokens=2,
              audio_layers=(0, 2))


def random_net(cfg, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        net = Denoiser(cfg)
    for name, p in net.named_parameters():
        if name.endswith(("modulation", "mix")):
            nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def clip(net, cfg, T=2, H=8, W=8, device="cpu", motion=True):
    """-> latents, t, two conditions of which the second has silence and another text.  net: anything with `prepare`

    Of the task that the config says: S2V a later clip, or a first one (motion=False); I2V a picture; TI2V (48 channels) a clean first frame.
    """
    g = torch.Generator().manual_seed(1)
    def randn(*shape): return torch.randn(1, *shape, generator=g).to(device)
    given = dict(shape=(T, H, W))
    if cfg.audio_dim:
        past, ref, audio = randn(cfg.out_dim, 19, H, W), randn(cfg.out_dim, 1, H, W), randn(cfg.audio_states, cfg.audio_dim, 4 * T)
        given |= dict(ref=ref, motion=past if motion else None)
    elif cfg.in_dim > cfg.out_dim:
        given |= dict(image=randn(cfg.in_dim - cfg.out_dim, T, H, W))
    elif cfg.out_dim == 48:
        given |= dict(clean_frames=1)
    conds = [net.prepare(**given, text=randn(n, cfg.text_dim), **(dict(audio=audio * on) if cfg.audio_dim else {})) for n, on in ((5, 1), (9, 0))]
    return randn(cfg.out_dim, T, H, W), torch.full((1,), 700.0, device=device), conds


def as_entries(state):
    return {name: Entry(None, tuple(x.shape), x.dtype, lambda x=x: x) for name, x in state.items()}


def as_stored(name, entry):
    return entry.dtype


def empty(cfg, names=()):
    """A Denoiser without memory, its layers float8 where `names` holds their scales."""
    with torch.device("meta"):
        return to_fp8(Denoiser(cfg), names)


def exact_attention(q, k, v):
    """Head by head.  q (B, n, K, D), k v (B, N, K, D) -> (B, n, K*D) float64, logarithms of the sums of exponentials (B, K, n, 1)"""
    heads = []
    for q, k, v in zip(*(x.double().unbind(2) for x in (q, k, v))):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        heads.append((scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)))
    return torch.cat([y for y, _ in heads], dim=-1), torch.stack([sums for _, sums in heads], dim=1)
