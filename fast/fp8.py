"""FP8: the denoiser's large matrices in 8 bits, multiplied in 8 bits where the GPU can.

An e4m3 number has 4 exponent and 3 mantissa bits: 448 is the largest, 2^-9 the smallest step, there is no infinity. A tensor is kept as
e4m3 values times one float32 scale per row, chosen so that the row's largest value becomes 448:

    weights      a row is an output channel; cast once, stored as X.weight (out, in) float8 and X.weight_scale (out, 1) float32
    activations  a row is a token; cast on the way into every layer

Both scales then leave the sum over the inner dimension, y[n, o] = scale[n] * scale[o] * sum_i x[n, i] * w[o, i], and torch._scaled_mm
computes that on tensor cores. Rounding moves an operand by 2.6% of its norm, and so the output: off by 2.6% with float8 weights alone, by
3.7% with float8 activations too.

Cast are the linear layers of the blocks with their audio injection, 94% of the parameters. Embeddings, norms, modulation, time,
convolutions, audio encoder and head stay as they are, and so do two layers of each injection, whose result no gate makes small: they are 4%
of the parameters and a fifth of the error. In files that have them in float8 they are read so.
"""
import re
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from fast import kernels
from model import FloatLinear, Linear

E4M3 = torch.float8_e4m3fn
MAX = 448.0               # the largest e4m3 number
TINY = 2.0 ** -126        # the smallest normal float32: a row of zeros gets this scale and stays zero
FAST_ACCUM = True         # Hopper then keeps its sums in short registers; tests/gpu prints the gain and the price on this GPU
ALIGN = 16                # torch._scaled_mm takes inner and outer dimensions in multiples of this
QUANTISED = re.compile(r"blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.[qkvo]|inject\.(?:[qkvo]|adain)|ffn\.[02])\.weight")


EXEMPT = re.compile(r"blocks\.\d+\.inject\.[vo]\.weight")


def uses_fp8(name):
    """May this parameter of the denoiser be float8?"""
    return QUANTISED.fullmatch(name) is not None


def is_cast(name):
    """Does casting make it float8?"""
    return uses_fp8(name) and not EXEMPT.fullmatch(name)


# --------------------------------------------------------------------------------------------------------------- the number format

def cast(x):
    """Any float -> e4m3: nearest, ties to even, and what is too large becomes 448; left to the cast it would become NaN."""
    return x.clamp(-MAX, MAX).to(E4M3)


def quantize(x):
    """One scale per row.  x (..., n, C) any float -> e4m3 of the same shape, scale (..., n, 1) float32.  NaN or inf makes its row NaN"""
    scale = (x.abs().amax(-1, keepdim=True).float() / MAX).clamp(min=TINY)
    return cast(x / scale), scale


def dequantize(x, scale):
    return x.float() * scale


def quantize_weight(weight, rows=256):
    """`quantize` of a matrix, in pieces that stay in the processor's cache, which is three times faster.

    weight  (out, in) any float        returns  (out, in) e4m3, (out, 1) float32
    raises  ValueError if the weight holds NaN or infinity
    """
    weight, scale = (torch.cat(parts) for parts in zip(*(quantize(part) for part in weight.split(rows))))
    if not scale.isfinite().all():
        raise ValueError(f"{int((~scale.isfinite()).sum())} of {len(scale)} rows of a weight hold NaN or infinity: the file is damaged")
    return weight, scale


def quantize_whole(weight):
    """The same with one scale for the whole matrix, repeated for every row as ComfyUI wants it."""
    scale = (weight.abs().amax().float() / MAX).clamp(min=TINY)
    if not scale.isfinite():
        raise ValueError("a weight holds NaN or infinity: the file is damaged")
    return torch.cat([cast(part / scale) for part in weight.split(256)]), scale.expand(len(weight), 1).contiguous()


def quantized(tensors, device="cpu", choose=is_cast, quantize=quantize_weight):
    """A denoiser's tensors -> the same with float8 weights and their scales, which are made when they are read.

    tensors  {name: Entry} with fields shape, dtype and read (checkpoints.py)        device  where to compute        choose  which to cast
    quantize  `quantize_weight` or `quantize_whole`
    """
    pair = lru_cache(maxsize=1)(lambda name: quantize(tensors[name].read().to(device)))   # weight, then its scale: computed once
    out = {}
    for name, entry in tensors.items():
        if choose(name) and entry.dtype != E4M3:
            out[name] = replace(entry, dtype=E4M3, read=lambda name=name: pair(name)[0])
            out[name + "_scale"] = replace(entry, shape=(entry.shape[0], 1), dtype=torch.float32, read=lambda name=name: pair(name)[1])
        else:
            out[name] = entry
    return out


def multiplied_out(tensors):
    """The way back: a denoiser's tensors with float8 weights as bfloat16, for training and for comparison.  {name: Entry} -> the same"""
    def read(name):
        return dequantize(tensors[name].read(), tensors[f"{name}_scale"].read())
    return {name: replace(entry, dtype=torch.bfloat16, read=partial(read, name)) if f"{name}_scale" in tensors else entry
            for name, entry in tensors.items() if not name.endswith(".weight_scale")}


# ------------------------------------------------------------------------------------------------------------------------ the layer

def multiplies_fp8(device):
    """Has this device 8-bit tensor cores? NVIDIA from compute capability 8.9 on: Ada, Hopper, Blackwell."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


multiplies_fp8._dynamo_marked_constant = True        # all that torch.compiler.assume_constant_result does beside importing the compiler, for 2 s


@torch.library.custom_op("wan::quantize_tokens", mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)")
def quantize_tokens(x):
    """`quantize` of x (n, C) in one trip through memory, where that works; for torch.compile an operation like any other."""
    return kernels.quantize_rows(x) if kernels.works(x.device) else quantize(x.contiguous())


@quantize_tokens.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[0], 1, dtype=torch.float32)


class FP8Linear(nn.Module):
    """A linear layer with float8 weights. Without 8-bit tensor cores the weight is multiplied out and the activations stay as they are."""

    def __init__(self, n_in, n_out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=E4M3), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(n_out, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(n_out), requires_grad=False) if bias else None

    def forward(self, x):
        """x (..., in) any float -> (..., out) bfloat16 on a GPU, float32 on a CPU"""
        n_out, n_in = self.weight.shape
        dtype = torch.bfloat16 if x.is_cuda else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        if not multiplies_fp8(x.device) or n_in % ALIGN or n_out % ALIGN:
            return F.linear(x.to(dtype), dequantize(self.weight, self.weight_scale).to(dtype), bias)
        fuses = x.dtype == torch.float32 and torch.compiler.is_compiling()       # with the norm that x comes from
        tokens, scale = (quantize if fuses else quantize_tokens)(x.reshape(-1, n_in))                # (n, in), (n, 1)
        y = torch._scaled_mm(tokens.contiguous(), self.weight.t(), scale, self.weight_scale.t(), bias, out_dtype=dtype,
                             use_fast_accum=FAST_ACCUM)              # (n, out)
        return y.view(*x.shape[:-1], n_out)


def to_fp8(module, names):
    """Make every linear layer whose scale is among `names` an FP8Linear.

    module  on the meta device; changed in place and returned        names  of the tensors to be loaded: X.weight_scale marks layer X
    raises  ValueError for a scale that belongs to no linear layer, or to one of a fork that computes something else
    """
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for path in (name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")):
        if path not in linears:
            raise ValueError(f"{path}.weight_scale belongs to no linear layer: wanted scales of float8 weights only")
        old = linears[path]
        if type(old) not in (nn.Linear, Linear, FloatLinear):
            raise ValueError(f"{path} is a {type(old).__name__}, whose forward float8 weights would leave out: take weights in bfloat16, --no-fp8")
        with torch.device("meta"):
            module.set_submodule(path, FP8Linear(old.in_features, old.out_features, old.bias is not None))
    return module


# ----------------------------------------------------------------------------------------------------------------------- the report

class LayerError(NamedTuple):
    """Relative L2 errors that float8 brings into one layer: of its weight, and of its output with float8 weights and activations."""
    name: str
    weight: float
    output: float


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=TINY)).item()


def layer_error(name, weight, x=None):
    """weight (out, in) before the cast, x (n, in) activations or None for 64 normally distributed tokens -> LayerError"""
    weight = weight.float()
    if x is None:
        x = torch.randn(64, weight.shape[1], generator=torch.Generator(weight.device).manual_seed(0), device=weight.device)
    rounded = dequantize(*quantize_weight(weight))
    return LayerError(name, relative_error(rounded, weight), relative_error(dequantize(*quantize(x)) @ rounded.T, x.float() @ weight.T))


def report(errors, worst=10):
    """Text of a table: the layers with the largest errors of the output.  errors: list of LayerError"""
    ranked = sorted(errors, key=lambda e: -e.output)
    lines = [f"{'weight':>8} {'output':>8}  worst {min(worst, len(ranked))} of {len(ranked)} float8 layers (relative L2 error)"]
    lines += [f"{e.weight:8.3%} {e.output:8.3%}  {e.name}" for e in ranked[:worst]]
    mean = [sum(getattr(e, field) for e in errors) / max(1, len(errors)) for field in ("weight", "output")]
    return "\n".join([*lines, f"{mean[0]:8.3%} {mean[1]:8.3%}  mean"])
