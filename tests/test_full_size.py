"""Every task at its released size, without a GPU and without memory: the networks run on the meta device, which has shapes and strides only.

What is asked: does every attention qualify for a fused kernel, and does a forward take the memory that the plan counts?
"""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import model
from fast.bench import clip_arguments, count_tokens
from fast.blocks import FastDenoiser
from fast.plan import AUDIO, CHUNK, OVERHEAD, MemoryPlan, RunConfig, activation_bytes
from model import Denoiser
from tiny.random_weights import released

GIB = 2 ** 30
CLIPS = {"s2v-14B": (20, 88, 160), "t2v-A14B": (21, 90, 160), "i2v-A14B": (21, 90, 160), "ti2v-5B": (31, 44, 80)}   # 1280x704 or 1280x720


class Live(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are still held, weights apart; `peak` is the most."""

    def __init__(self, net):
        super().__init__()
        self.weights, self.held, self.peak = {p.untyped_storage()._cdata for p in net.parameters()}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.weights:
                    self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: (ref, n) for key, (ref, n) in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.held.values()))
        return out


def fused(q, k, v):
    """What cuDNN's and flash attention ask for: half precision, unit stride on the head axis, the others whole multiples of 16 bytes."""
    return all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 and x.shape[-1] in (64, 128) and all(s % 8 == 0 for s in x.stride()[:-1])
               for x in (q, k, v))


def run_forward(task, chunk, monkeypatch, layers=3):
    """One forward of so many of the layers -> attentions that do not qualify, number of all, peak bytes, tokens, config"""
    cfg = released(task)["denoiser"]
    cfg = replace(cfg, n_layer=layers, audio_layers=tuple(i for i in cfg.audio_layers if i < layers))
    seen = SimpleNamespace(slow=[], calls=0)

    def watched(q, k, v):
        seen.calls += 1
        if not fused(q, k, v):
            seen.slow.append([(tuple(x.shape), x.stride(), x.dtype) for x in (q, k, v)])
        return torch.empty_like(q)
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", watched)

    def attend(q, k, v, layer):
        watched(*(x.transpose(1, 2) for x in (q, k, v)))
        return q.flatten(2)
    with torch.device("meta"):
        net = Denoiser(cfg).to(torch.bfloat16).eval().requires_grad_(False)
        for name, p in net.named_parameters():
            if "norm" in name or name.endswith("modulation"):
                p.data = p.data.float()
    monkeypatch.setattr(model, "rope_table", lambda positions, head_dim: torch.empty(2, len(positions), 1, head_dim // 2, device="meta"))

    def random(*size):
        return torch.empty(size, device="meta", dtype=torch.bfloat16)
    fast = FastDenoiser(net, chunk=chunk, attend=attend)
    with Live(net) as live:
        conds = [fast.prepare(shape=CLIPS[task], **clip_arguments(cfg, CLIPS[task], random)) for _ in range(2)]      # of both guidance branches
        fast(random(1, cfg.out_dim, *CLIPS[task]), torch.full((1,), 500, device="meta"), conds[0])
    return seen, live.peak, count_tokens(cfg, CLIPS[task])[0], cfg


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize("task", CLIPS)
def test_a_forward_takes_what_is_planned_and_every_attention_is_fused(task, chunk, monkeypatch):
    seen, peak, tokens, cfg = run_forward(task, chunk, monkeypatch)
    config = RunConfig(device=torch.device("cuda"), dtype=torch.bfloat16, compile=False)
    planned = activation_bytes(config, cfg, tokens, MemoryPlan(chunk=chunk)) - OVERHEAD - AUDIO * bool(cfg.audio_dim)
    print(f"{task}, {tokens:,} tokens, chunks of {chunk}: {peak / GIB:.2f} GiB of activations, {planned / GIB:.2f} planned")
    assert seen.calls >= 2 * cfg.n_layer and not seen.slow, seen.slow[:1]
    assert 0.85 < planned / peak < 1.25


def test_strided_tokens_would_be_noticed(monkeypatch):
    """As they were once: a transposed view of the patch embedding's channels."""
    monkeypatch.setattr(Denoiser, "tokens", lambda self, conv, x: conv(x.to(conv.weight.dtype)).flatten(2).transpose(1, 2))
    assert run_forward("t2v-A14B", None, monkeypatch)[0].slow
