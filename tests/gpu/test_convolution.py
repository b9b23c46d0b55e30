"""The VAE's convolutions on a Hopper GPU against vae.py's.  pytest -s tests/gpu/test_convolution.py"""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fast import convolution
from fast.convolution import FastDecoder, FastResBlock
from fast.fp8 import relative_error
from formats.checkpoints import materialise, open_checkpoint
from tiny import random_weights
from tiny.random_weights import random_part
from vae import VAE22, ResBlock, VAEConfig, pointwise

WEIGHTS = Path(__file__).parents[2] / "weights" / "tiny"
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and convolution.triton and torch.cuda.get_device_capability()[0] == 9),
                                reason="needs Triton and a Hopper GPU")
CONFIGS = dict(vae21=replace(VAEConfig(), dim=32, dec_dim=96), vae22=replace(VAE22, dim=32, dec_dim=64))
TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


def network(name, dtype):
    part = random_part("vae", CONFIGS[name], dtype, "vae")
    return materialise("vae", part.config, part.tensors, torch.device("cuda"), dtype)


def video(vae, frames=9):
    g, (_, s, _) = torch.Generator("cuda").manual_seed(1), vae.stride
    return torch.rand(1, 3, frames, 5 * s, 7 * s, generator=g, device="cuda") * 2 - 1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_vae_is_the_same(name, dtype):
    """Encoded and decoded, in pieces of any length, whole and in tiles."""
    vae = network(name, dtype)
    x = video(vae)
    latents = vae.encode(x)
    frames = vae.decode(latents)
    assert convolution.use_kernels(vae) is vae and {FastResBlock, FastDecoder} <= {type(module) for module in vae.modules()}
    errors = [relative_error(vae.encode(x), latents)]
    for chunk, tiles in ((1, 1), (2, 1), (1, 2)):
        vae.tiles = tiles
        errors.append(relative_error(vae.decode(latents, chunk), frames))
    print(f"\n{name} {dtype}: encoded {errors[0]:.1e}, decoded {', '.join(f'{e:.1e}' for e in errors[1:])} (tolerance {TOLERANCES[dtype]:.0e})")
    assert 0 < max(errors) < TOLERANCES[dtype]


@pytest.mark.parametrize("folder", ("tiny", "tiny-ti2v"))
def test_tiny_checkpoints_decode(folder, tmp_path):
    """Their blocks have widths of which the kernels take some and some not."""
    if folder != "tiny":
        random_weights.ensure_tiny(tmp_path / folder)
    vae = open_checkpoint(WEIGHTS if folder == "tiny" else tmp_path / folder).load("vae", torch.device("cuda"), torch.float16)
    z = torch.randn(1, vae.config.z_dim, 3, 6, 6, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    want = vae.decode(z)
    e = relative_error(convolution.use_kernels(vae).decode(z), want)
    print(f"\n{folder}: decoded {e:.1e} (tolerance 1e-2)")
    assert e < 1e-2


def test_other_numbers_go_the_ordinary_way():
    """float32, after `widen` too: the same bits as without."""
    vae, other = network("vae21", torch.float16), network("vae21", torch.float16)
    convolution.use_kernels(vae).widen()
    other.widen()
    x = video(vae, 5)
    assert torch.equal(vae.encode(x), other.encode(x))


def test_a_forks_other_activation_is_noticed(monkeypatch):
    def forward(self, x, cache):
        y = self.norm2(self.conv1(F.relu(self.norm1(x)), cache))
        return self.conv2(F.silu(y), cache) + (pointwise(x, self.shortcut) if self.shortcut else x)
    monkeypatch.setattr(ResBlock, "forward", forward)
    with pytest.raises(ValueError, match="does not compute what vae.py computes"):
        convolution.use_kernels(network("vae21", torch.float16))


def test_a_broken_triton_is_said(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(convolution, "product", broken)
    vae = convolution.use_kernels(network("vae21", torch.float16))
    assert "no compiler" in capsys.readouterr().err and FastResBlock not in map(type, vae.modules())
