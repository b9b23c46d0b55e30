"""The float8 format and its layers on a CPU: casting against a float64 reference, the multiplied-out matmul.  pytest -s tests/test_fp8.py"""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fast import fp8
from fast.fp8 import E4M3, FP8Linear, dequantize, is_cast, layer_error, quantize, quantize_weight, quantized, relative_error, report, to_fp8, uses_fp8
from fast.offload import stream
from model import Config
from tests.inputs import TINY, as_entries, as_stored, clip, empty, random_net


def decode(code):
    """The number that a positive e4m3 code stands for, from the format's definition."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa / 8 * 2.0 ** -6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


VALUES = torch.tensor([decode(code) for code in range(127)], dtype=torch.float64)    # 0 .. 448, rising with the code


def nearest(x):
    """Reference cast: x float64 -> the nearest value, of two equally near the one with the even code, at most 448."""
    above = torch.searchsorted(VALUES, x.abs().clamp(max=448)).clamp(max=126)
    below = (above - 1).clamp(min=0)
    down, up = x.abs().clamp(max=448) - VALUES[below], VALUES[above] - x.abs().clamp(max=448)
    code = torch.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    return torch.copysign(VALUES[code], x)


def test_cast_is_nearest_even_and_saturates():
    middle = (VALUES[1:] + VALUES[:-1]) / 2
    x = torch.cat([VALUES, middle, torch.nextafter(middle.float(), torch.tensor(1e9)).double(),
                   torch.nextafter(middle.float(), torch.tensor(0.0)).double(),
                   torch.tensor([449, 463.9, 464, 465, 480, 1e9, math.inf, 1e-30])])
    g = torch.Generator().manual_seed(0)
    x = torch.cat([x, torch.randn(100_000, generator=g) * 2.0 ** torch.randint(-12, 10, (100_000,), generator=g)]).float().double()
    x = torch.cat([x, -x])
    got = fp8.cast(x.float()).double()
    assert torch.equal(got, nearest(x)) and got.isfinite().all()
    assert fp8.cast(torch.tensor(math.nan)).float().isnan()          # a fault stays visible
    assert torch.equal(fp8.cast(x.bfloat16()).double(), nearest(x.bfloat16().double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_rows(dtype):
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0)).mul(torch.logspace(-30, 30, 40)[:, None]).to(dtype)
    x[0, 0], x[1, 1], x[2, 2, 1:] = 0, 1e-44, 0
    q, scale = quantize(x)
    assert q.dtype == E4M3 and q.shape == x.shape and scale.shape == (3, 40, 1) and scale.dtype == torch.float32
    assert q.float().isfinite().all() and (scale > 0).all() and (q[0, 0].float() == 0).all()
    assert torch.equal(q.double(), nearest((x / scale).double()))    # one rounding, of the quotient in float32
    usual = torch.ones(3, 40, dtype=torch.bool)
    usual[0, 0] = usual[1, 1] = False                                # a row below the smallest scale may become zeros
    assert (q[usual].float().abs().amax(-1) == 448).all()
    assert relative_error(dequantize(q, scale)[usual], x[usual]) < 0.03
    pieces = quantize_weight(x[0], rows=7)
    assert torch.equal(pieces[0].view(torch.uint8), q[0].view(torch.uint8)) and torch.equal(pieces[1], scale[0])


def test_damaged_weights_are_refused():
    with pytest.raises(ValueError, match="1 of 4 rows"):
        quantize_weight(torch.tensor([1.0, 2.0, math.inf, 3.0])[:, None])
    with pytest.raises(ValueError, match="belongs to no linear layer"):
        empty(TINY, ["blocks.0.cross_norm.weight_scale"])


def test_a_layer_of_a_fork_does_not_become_a_plain_one():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    with pytest.raises(ValueError, match="0 is a Scaled, whose forward float8 weights would leave out"):
        to_fp8(nn.Sequential(Scaled(16, 16)), ["0.weight_scale"])


def test_linear_without_8_bit_cores():
    torch.manual_seed(0)
    linear, layer = nn.Linear(320, 200).requires_grad_(False), FP8Linear(320, 200)
    weight, scale = quantize_weight(linear.weight)
    layer.load_state_dict({"weight": weight, "weight_scale": scale, "bias": linear.bias}, assign=True)
    x = torch.randn(2, 33, 320)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight.float() * layer.weight_scale, layer.bias)) and y.dtype == torch.float32
    error = relative_error(y, linear(x))
    print(f"float8 weights: output off by {error:.2%} (at most 5%)")
    assert 0.01 < error < 0.05


def test_the_compiler_takes_the_device_for_a_constant():
    """As its public function would mark it."""
    def plain(device):
        return True
    assert fp8.multiplies_fp8.__dict__ == torch.compiler.assume_constant_result(plain).__dict__


def test_what_is_quantised():
    net = random_net(TINY)
    linears = {name + ".weight" for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")}
    assert {name for name in net.state_dict() if uses_fp8(name)} == linears
    full = dict(empty(Config()).named_parameters())
    share, cast = (sum(p.numel() for name, p in full.items() if which(name)) / sum(p.numel() for p in full.values()) for which in (uses_fp8, is_cast))
    print(f"{share:.1%} of the released model's parameters may be float8, {cast:.1%} are cast")
    assert share > 0.97 and 0.93 < cast < 0.95 and not any(is_cast(name) for name in full if "inject.v." in name or "inject.o." in name)


def test_report():
    errors = [layer_error(f"layer {i}", torch.randn(96, 128) * scale) for i, scale in enumerate((1, 1e-6, torch.logspace(0, 5, 128)))]
    for error in errors[:2]:                                         # rounding: 2.6%; of both factors: sqrt(2) times as much
        assert 0.02 < error.weight < 0.03 and 0.03 < error.output < 0.045
    text = report(errors, worst=2).splitlines()
    assert len(text) == 4 and "2 of 3" in text[0]


def test_denoiser_in_fp8():
    net = random_net(TINY)
    tensors = quantized(as_entries(net.state_dict()))
    small = stream(empty(TINY, tensors), tensors, "cpu", as_stored)
    (latents, t, conds), (_, _, conds8) = clip(net, TINY), clip(small, TINY)
    error = max(relative_error(small(latents, t, b), net(latents, t, a)) for a, b in zip(conds, conds8))
    print(f"tiny denoiser: velocity off by {error:.2%} with float8 weights (at most 5%)")
    assert 0 < error < 0.05
    again = quantized(tensors)                                       # what is float8 already stays as it is
    assert again.keys() == tensors.keys() and all(again[name] is tensors[name] for name in tensors)
