"""What is around the Triton kernels, and self-attention in parts.  pytest -s tests/test_kernels.py

The kernels themselves run on an NVIDIA GPU, see tests/gpu. That of attention also runs in Triton's interpreter, where Triton is installed, in
float32 (not the cast: the interpreter of Triton 3.6 makes 64 of 127 there):
    TRITON_INTERPRET=1 python -m pytest -q -s tests/test_kernels.py tests/test_rows.py        # Triton 3.6 wants numpy below 2.4 for it
Errors are relative L2 distances, and printed even when the test passes.
"""
import os
from contextlib import nullcontext

import pytest
import torch

from fast import blocks, convolution, fp8, kernels
from fast.convolution import FastResBlock
from fast.fp8 import quantize, relative_error
from tests.inputs import exact_attention
from vae import VAE, ResBlock, RMSNorm, VAEConfig, pointwise

D = 128
INTERPRETED = kernels.triton and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1"


def inputs(B, N, K, factor=1, device="cpu", dtype=torch.float32, last=0):
    """q, k, v (B, N, K, D); the last keys, if any, carry a good part of every query's weight."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, N, K, D, generator=g, device=device) for _ in range(3))
    if last:
        k[:, -last:] += q.mean(1, keepdim=True) * 2
        q = q + k[:, -last:].mean(1, keepdim=True)
    return [x.to(dtype) for x in (q * factor, k * factor, v)]


def test_quantize_tokens_is_quantize(monkeypatch, capsys):
    """Where Triton is missing or broken too, which is said once; torch.compile sees the shapes, dtypes and strides that will come."""
    class Broken:
        __version__ = "3.0"
    x = torch.randn(40, 64).t()
    for given in (None, Broken):
        monkeypatch.setattr(kernels, "triton", given)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(fp8.quantize_tokens(x), quantize(x)))
    torch.library.opcheck(fp8.quantize_tokens, (x,), test_utils=("test_schema", "test_faketensor"))
    monkeypatch.setattr(kernels, "quantize_rows", lambda x: 1 / 0)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    kernels.works.cache_clear()
    assert not kernels.works(torch.device("cuda")) and not kernels.works(torch.device("cuda"))
    assert capsys.readouterr().err == "Triton 3.0 does not work here (ZeroDivisionError: division by zero): some steps are slower\n"
    kernels.works.cache_clear()


def joined(q, k, v, y, sums, first):
    """What `attend_last` computes."""
    rest, rest_sums = exact_attention(q, k[:, first:], v[:, first:])
    weight = torch.sigmoid(rest_sums - sums).transpose(1, 2)         # (B, n, K, 1)
    q.copy_(torch.lerp(y.double(), rest.view(y.shape), weight))


@pytest.mark.parametrize("tokens, parts", [(300, 2), (256, 1), (100, 1)])
def test_last_keys_are_apart(tokens, parts, monkeypatch):
    """As on a Hopper GPU, with its two kernels in PyTorch; some queries after the others."""
    def cudnn(q, k, v, bias, want_sums):                             # (B, K, n, D)
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return y, sums[..., None]
    calls = []
    monkeypatch.setattr(blocks, "QUERIES", 3)                        # with 40 heads, 60 with 2
    monkeypatch.setattr(blocks, "LONG", 128)
    monkeypatch.setattr(blocks, "takes_last_keys_apart", lambda q: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    monkeypatch.setattr(kernels, "attend_last", lambda *args: calls.append(args[-1]) or joined(*args))
    q, k, v = inputs(2, tokens, 2, last=10)
    want, _ = exact_attention(q, k, v)
    e = relative_error(blocks.attend(q, k, v), want)
    print(f"\n{tokens} tokens: {e:.1e} (tolerance 3e-6, float32)")
    assert e < 3e-6 and calls == [256] * (5 if parts == 2 else 0)


def check_attend_last(first, factor, device, dtype, tolerance):
    """From exact attention to the first keys to exact attention to all, for some of the queries."""
    q, k, v = inputs(2, 256 if first == 128 else 255, 3, factor, device, dtype, last=20)
    rows = slice(40, 139)
    want, (y, sums) = exact_attention(q[:, rows], k, v)[0], exact_attention(q[:, rows], k[:, :first], v[:, :first])
    before, kept = relative_error(y, want), q.clone()
    kernels.attend_last(q[:, rows], k, v, y.view(2, 99, 3, D).to(q.dtype), sums.float(), first)
    e = relative_error(q[:, rows].flatten(2), want)
    print(f"\nfactor {factor}, {first} keys and {k.shape[1] - first}: {e:.1e} (tolerance {tolerance}), {before:.1%} before")
    assert e < tolerance < before / 5
    assert torch.equal(q[:, :40], kept[:, :40]) and torch.equal(q[:, 139:], kept[:, 139:])


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, TRITON_INTERPRET=1 and no GPU")
@pytest.mark.parametrize("first", (128, 204, 254))
@pytest.mark.parametrize("factor", (1, 3))
def test_attend_last(first, factor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    check_attend_last(first, factor, "cpu", torch.float32, 3e-6)


# ------------------------------------------------------------------------------------------------------------ the VAE's convolutions

def test_a_vae_on_a_cpu_stays_as_it_is():
    net = VAE(VAEConfig(dim=32, dec_dim=32))
    kinds = [type(module) for module in net.modules()]
    assert convolution.use_kernels(net) is net and [type(module) for module in net.modules()] == kinds


@pytest.mark.parametrize("channels", (3, 12, 96, 160, 192, 256, 320, 384, 512, 640, 1024))
def test_few_channels_are_computed_in_vain(channels):
    """All of both VAEs' but those of a picture: none."""
    width = sum(convolution.widths(channels))
    assert channels % width == 0 if channels > 12 else width == 16


@pytest.fixture
def interpreted(monkeypatch):
    """The VAE's kernels in Triton's interpreter, in float32."""
    if not INTERPRETED:
        pytest.skip("needs Triton, TRITON_INTERPRET=1 and no GPU")

    def suits(x, *convs):
        return x.dtype == torch.float32 and all(conv.kernel_size == (3, 3, 3) and conv.in_channels % 32 == 0 for conv in convs)
    monkeypatch.setattr(convolution, "suits", suits)
    monkeypatch.setitem(convolution.LIMITS, torch.float32, 1e-4)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def test_a_vae_of_kernels_is_vae_pys(interpreted):
    """Two videos at once; kernels run a block only if they can run both of its convolutions: of 48 channels they cannot."""
    vae, g = VAE(VAEConfig(dim=32, dec_dim=32, dim_mult=(1, 1, 3, 3), num_res_blocks=1)), torch.Generator().manual_seed(0)
    video, z = torch.rand(2, 3, 5, 8, 16, generator=g) * 2 - 1, torch.randn(2, 16, 2, 1, 2, generator=g)
    want = vae.encode(video), vae.decode(z)
    kinds = {type(block) for block in convolution.use_kernels(vae).modules() if isinstance(block, ResBlock)}
    e = [relative_error(x, y) for x, y in zip((vae.encode(video), vae.decode(z)), want)]
    print(f"\na VAE by the kernels, encoded and decoded: {e[0]:.1e}, {e[1]:.1e} (tolerance 1e-5, float32)")
    assert kinds == {ResBlock, FastResBlock} and 0 < min(e) and max(e) < 1e-5


class Root(RMSNorm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * self.gamma.flatten()


def less(self, x, cache):
    y = self.conv1(torch.nn.functional.silu(self.norm1(x)), cache)
    return 0.95 * self.conv2(torch.nn.functional.silu(self.norm2(y)), cache) + (pointwise(x, self.shortcut) if self.shortcut else x)


@pytest.mark.parametrize("fork", ("less", "root", "renamed"))
def test_a_forks_other_block_is_noticed(interpreted, monkeypatch, fork):
    vae = VAE(VAEConfig(dim=32, dec_dim=32, dim_mult=(1, 1), temporal_downsample=(False,), num_res_blocks=1))
    if fork == "less":
        monkeypatch.setattr(ResBlock, "forward", less)
    elif fork == "root":
        monkeypatch.setattr(RMSNorm, "forward", Root.forward)
    else:
        monkeypatch.setattr(FastResBlock, "__init__", lambda self, block: (torch.nn.Module.__init__(self), None)[1])
    with pytest.raises(ValueError, match="does not compute what vae.py computes"):
        convolution.use_kernels(vae)


def test_not_a_number_is_the_largest_distance():
    def times(factor):
        def run(x, cache):
            cache[0] = x
            return torch.cat([x, x * factor], dim=-1)
        return run
    conv = VAE(VAEConfig(dim=8, dec_dim=8)).decoder.middle.block1.conv1
    assert convolution.distance(times(1.1), times(1), [conv]) < 0.1
    assert not convolution.distance(times(float("nan")), times(1), [conv]) < 0.1
