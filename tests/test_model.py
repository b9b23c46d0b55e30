"""The denoiser, for every task of the family at small sizes on a CPU."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from ranks import as_program, forget
from torch.nn.attention import SDPBackend

import model
from fast.blocks import FastDenoiser
from model import Config, Denoiser

SMALL = dict(dim=96, ffn_dim=192, n_head=4, n_layer=3, text_dim=32, text_len=12, freq_dim=32)
TASKS = {"t2v": dict(audio_dim=0), "i2v": dict(audio_dim=0, in_dim=36), "ti2v": dict(audio_dim=0, in_dim=48, out_dim=48),
         "s2v": dict(audio_dim=24, audio_states=3, audio_tokens=2, audio_layers=(0, 2))}
VARIANTS = [("t2v", {}), ("i2v", {}), ("ti2v", {}), ("ti2v", dict(clean_frames=1)), ("s2v", {}), ("s2v", dict(motion=True))]


def small_net(task):
    torch.manual_seed(0)
    net = Denoiser(Config(**SMALL, **TASKS[task]))
    for name, p in net.named_parameters():
        if name.endswith(("modulation", "mix")):
            torch.nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def small_clip(net, T=2, H=8, W=8, motion=False, clean_frames=0):
    """latents (1, out_dim, T, H, W), t (1,), arguments of `prepare`"""
    g, cfg = torch.Generator().manual_seed(1), net.cfg
    def randn(*shape): return torch.randn(1, *shape, generator=g)
    arguments = dict(text=randn(5, cfg.text_dim), clean_frames=clean_frames)
    if cfg.in_dim > cfg.out_dim:
        arguments["image"] = randn(cfg.in_dim - cfg.out_dim, T, H, W)
    if cfg.audio_dim:
        arguments |= dict(audio=randn(cfg.audio_states, cfg.audio_dim, 4 * T), ref=randn(cfg.out_dim, 1, H, W),
                          motion=randn(cfg.out_dim, 19, H, W) if motion else None)
    return randn(cfg.out_dim, T, H, W), torch.tensor([700.0]), dict(arguments, shape=(T, H, W))


@pytest.mark.parametrize("task, extra", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_every_attention_qualifies_for_a_fused_kernel(task, extra, dtype, grad, monkeypatch):
    """The slow path keeps all scores: at full size 82 GiB instead of 0."""
    net = small_net(task).to(dtype)
    latents, t, arguments = small_clip(net, **extra)
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v):
        seen.append((q.shape[2], SDPBackend(torch._fused_sdp_choice(q, k, v)), [x.stride(-1) for x in (q, k, v)]))
        return attend(q, k, v)
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", watched)
    with torch.set_grad_enabled(grad):
        net(latents, t, net.prepare(**arguments))
    assert len(seen) == 2 * net.cfg.n_layer + len(net.cfg.audio_layers)
    assert all(kind != SDPBackend.MATH and strides == [1, 1, 1] for _, kind, strides in seen), seen


# ---- purity

def test_model_imports_nothing_of_ours(tmp_path):
    """Alone in a folder it works; and it has no branch on gradients, compilation or device, no cache and no in-place write."""
    source = Path(model.__file__).read_text()
    for word in ("is_grad_enabled", "is_compiling", "is_cuda", "lru_cache", "@cache", "copy_(", "add_(", "mul_(", "torch.cuda", "no_grad"):
        assert word not in source, word
    (tmp_path / "model.py").write_text(source)

    def alone():
        forget()
        sys.path.insert(0, str(tmp_path))
        import model
        net = model.Denoiser(model.Config(dim=48, ffn_dim=96, n_head=2, n_layer=1, audio_dim=0))
        print(len(net.blocks), Path(model.__file__).parent)
    _, said, errors = as_program(alone)
    assert said == f"1 {tmp_path}\n", errors


def block_inputs(net, motion=True):
    latents, t, arguments = small_clip(net, motion=motion)
    cond, (_, mod) = net.prepare(**arguments), net.modulations(t)
    return net.embed(latents, cond), mod, cond


@pytest.mark.parametrize("grad", [False, True])
def test_a_block_called_twice_gives_the_same_bits_and_leaves_its_inputs(grad):
    net = small_net("s2v")
    x, mod, cond = block_inputs(net)
    kept = x.clone(), mod.clone(), cond.rope.clone(), [tuple(part.clone() for part in layer if part is not None) for layer in cond.layers]
    with torch.set_grad_enabled(grad):
        for layer, block in enumerate(net.blocks):
            assert torch.equal(block(x, mod, cond, layer), block(x, mod, cond, layer))
    assert torch.equal(x, kept[0]) and torch.equal(mod, kept[1]) and torch.equal(cond.rope, kept[2])
    assert all(torch.equal(a, b) for layer, old in zip(cond.layers, kept[3]) for a, b in zip([p for p in layer if p is not None], old))


def test_inference_mode_then_gradients_in_one_process():
    net = small_net("s2v").requires_grad_(True)
    latents, t, arguments = small_clip(net, motion=True)
    with torch.inference_mode():
        want = net(latents, t, net.prepare(**arguments))
    got = net(latents, t, net.prepare(**arguments))
    got.square().mean().backward()
    assert torch.equal(got, want) and all(p.grad is not None and p.grad.isfinite().all() for n, p in net.named_parameters() if "pose.weight" not in n)


STATEMENTS = {               # statements of model.py in the form that stands there -> the other natural form of a fork
    "x = x + gate1 * self.self_attn.o(y).float()": "x += gate1 * self.self_attn.o(y).float()",
    "x = x + self.cross_attn(self.cross_norm(x), text)": "x += self.cross_attn(self.cross_norm(x), text)",
    "return x + gate2 * self.ffn(modulate(layer_norm(x, self.eps), shift2, scale2)).float()":
        "x += gate2 * self.ffn(modulate(layer_norm(x, self.eps), shift2, scale2)).float(); return x",
    "return x + self.inject(x, audio, adain)": "y = self.inject(x, audio, adain); x = x.clone(); x += y; return x",
    "return x * (1 + scale) + shift": "x = x * (1 + scale); x += shift; return x",
}


REFUSED = [statement for statement in STATEMENTS if STATEMENTS[statement].startswith("x += ")]     # a norm keeps this x for the backward pass


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements_of_a_block_in_place_train_and_sample_alike(statement, tmp_path):
    """Training, sampling and fast/ give the same numbers whichever way a fork writes a statement, or PyTorch refuses to train."""
    source = Path(model.__file__).read_text()
    assert source.count(statement) == 1
    (tmp_path / "changed.py").write_text(source.replace(statement, STATEMENTS[statement]))
    spec = importlib.util.spec_from_file_location("changed_model", tmp_path / "changed.py")
    changed = importlib.util.module_from_spec(spec)
    sys.modules["changed_model"] = changed
    spec.loader.exec_module(changed)
    net, fork = small_net("s2v"), changed.Denoiser(changed.Config(**SMALL, **TASKS["s2v"]))
    fork.load_state_dict(net.state_dict())
    latents, t, arguments = small_clip(net, motion=True)
    want = net(latents, t, net.prepare(**arguments))
    with torch.no_grad():
        sampled = fork(latents, t, fork.prepare(**arguments))
        fast = FastDenoiser(fork, chunk=37)(latents, t, fork.prepare(**arguments))
    fork.requires_grad_(True)
    trained = fork(latents, t, fork.prepare(**arguments))
    assert torch.equal(sampled, trained.detach()) and torch.equal(sampled, want)
    assert float((fast - want).norm() / want.norm()) < 2e-6
    if statement in REFUSED:                                         # loudly, by PyTorch: never another network
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            trained.square().mean().backward()
        return
    trained.square().mean().backward()
    net.requires_grad_(True)
    net(latents, t, net.prepare(**arguments)).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(fork.parameters(), net.parameters()) if a.grad is not None)


def test_only_attend_mixes_tokens():
    """With attention to itself alone a token's result depends on that token, the text and its frame's audio."""
    net = small_net("s2v")
    x, mod, cond = block_inputs(net)
    other = x.clone()
    other[:, 5] += 1
    alone = [net.blocks[0](tokens, mod, cond, 0, lambda q, k, v, layer: v.flatten(2)) for tokens in (x, other)]
    differs = (alone[0] - alone[1]).abs().amax(-1)[0] > 0
    assert differs[5] and differs.sum() == 1
