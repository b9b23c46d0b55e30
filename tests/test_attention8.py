"""Self-attention in 8 bits: what its rounding costs, imitated on a CPU. On a GPU see tests/gpu.  pytest -s tests/test_attention8.py

Errors are relative L2 distances from exact attention in float64 of the same inputs, and printed even when the test passes.
"""
import pytest
import torch

from fast import attention8 as module
from fast.attention8 import attention8
from fast.fp8 import relative_error
from tests.inputs import exact_attention

D = 128
CASES = {               # factor of q and k, offset of k, offset of v, tolerance
    "normal": (1, 0, 0, 0.045),           # 1.2% q and k, 2.1% v, 2.8% p; e4m3 for q and k would make it 5.3%
    "peaky": (3, 0, 0, 0.06),             # a few keys take all the weight; e4m3 for q and k would make it 13%
    "offset": (1, 8, 4, 0.01),            # what keys and values have in common costs nothing
}


def inputs(case, shape, device="cpu", dtype=torch.bfloat16):
    factor, k_offset, v_offset, tolerance = CASES[case]
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=g, device=device) for _ in range(3))
    return [x.to(dtype) for x in (q * factor, k * factor + k_offset, v + v_offset)], tolerance


@pytest.mark.parametrize("case", CASES)
def test_rounding(case):
    (q, k, v), tolerance = inputs(case, (2, 300, 2, D), dtype=torch.float32)
    e = relative_error(attention8(q, k, v), exact_attention(q, k, v)[0])
    print(f"\n{case}: CPU, 300 tokens: {e:.4f} (tolerance {tolerance})")
    assert e < tolerance


def test_constant_shifts():
    """A vector added to all keys changes nothing, one added to all values is added to the result."""
    (q, k, v), _ = inputs("normal", (1, 200, 1, D), dtype=torch.float32)
    shift = torch.randn(D)
    want = attention8(q, k, v)
    assert relative_error(attention8(q, k + 100 * shift, v), want) < 1e-3    # float32 sums, and roundings that fall the other way
    assert relative_error(attention8(q, k, v + shift), want + shift) < 1e-3


def test_zeros():
    x = torch.zeros(1, 10, 1, D)
    assert attention8(x, x, x).eq(0).all()


def test_no_tensor_cores(monkeypatch):
    monkeypatch.setattr(module, "multiplies_fp8", lambda device: False)
    with pytest.raises(ValueError, match="leave it out"):
        attention8(*[torch.zeros(1, 8, 1, D, device="meta")] * 3)
