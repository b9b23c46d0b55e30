"""What needs an NVIDIA GPU, under two minutes on an H200; skipped where there is none.  pytest -s tests/gpu

8-bit products against multiplied-out ones, streams with artificial delays, the fast denoiser against the plain one, memory, kernels, the
command line. Numbers are printed even when the test passes; errors are relative L2 distances.
"""
import gc
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import sample
from fast import attention8 as attention8_module
from fast import blocks, convolution, fp8, kernels, offload
from fast.attention8 import attention8
from fast.blocks import FastDenoiser, SigmoidGELU, attention_backend
from fast.fp8 import E4M3, FP8Linear, dequantize, quantize, quantize_weight, quantized, relative_error
from fast.offload import HostLayers, all_blocks, footprint, split, stream
from formats.checkpoints import materialise, parameter_dtype
from model import Config, attention, layer_norm, modulate
from tests.inputs import as_entries, as_stored, clip, empty, exact_attention, random_net
from tests.test_attention8 import CASES, inputs
from tests.test_kernels import check_attend_last, inputs as inputs_with_last_keys
from tiny.random_weights import VAE22, random_part
from vae import VAEConfig
from wan_s2v import decode_frames

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
THERE = torch.cuda.is_available()
eight_bit_cores = pytest.mark.skipif(not (THERE and kernels.triton and fp8.multiplies_fp8(torch.device("cuda"))),
                                     reason="needs Triton and a GPU of compute capability 8.9")
hopper = pytest.mark.skipif(not (THERE and kernels.triton and torch.cuda.get_device_capability()[0] == 9), reason="needs Triton and a Hopper GPU")
D = 128
BIG = Config(dim=1024, ffn_dim=2816, n_head=8, n_layer=9, text_dim=256, text_len=32, freq_dim=64, audio_dim=64, audio_states=3,
             audio_layers=(0, 2, 5))
TASKS = {"s2v": BIG, "t2v": replace(BIG, audio_dim=0), "i2v": replace(BIG, audio_dim=0, in_dim=36),
         "ti2v": replace(BIG, audio_dim=0, in_dim=48, out_dim=48)}
SHAPE = dict(T=4, H=32, W=48, device="cuda")                         # 1536 video tokens: a number of tokens that is no width
SAMPLES = Path(__file__).parents[2] / "samples"


def timed(work, n=5):
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


# ------------------------------------------------------------------------------------------------------------------- float8

def fp8_layer(n_in, n_out):
    """A Linear and its FP8Linear."""
    torch.manual_seed(0)
    linear, layer = nn.Linear(n_in, n_out, device="cuda").requires_grad_(False), FP8Linear(n_in, n_out)
    weight, scale = quantize_weight(linear.weight)
    layer.load_state_dict({"weight": weight, "weight_scale": scale, "bias": linear.bias.bfloat16()}, assign=True)
    return linear, layer


@eight_bit_cores
@pytest.mark.parametrize("n_in, n_out, n", [(5120, 5120, 8197), (5120, 13824, 8192), (13824, 5120, 8192), (5120, 10240, 20), (96, 208, 1)])
def test_matmul(n_in, n_out, n, monkeypatch):
    (linear, layer), line = fp8_layer(n_in, n_out), []
    x = torch.randn(1, n + 3, n_in, generator=torch.Generator("cuda").manual_seed(0), device="cuda")[:, 3:]
    want = F.linear(x.double(), linear.weight.double(), layer.bias.double())
    both = F.linear(dequantize(*quantize(x)).double(), dequantize(layer.weight, layer.weight_scale).double(), layer.bias.double())
    for short_sums in (True, False):
        monkeypatch.setattr(fp8, "FAST_ACCUM", short_sums)
        y = layer(x)
        assert y.shape == (1, n, n_out) and y.dtype == torch.bfloat16 and y.isfinite().all()
        tokens, scale = quantize(x.reshape(-1, n_in))
        seconds = timed(lambda: torch._scaled_mm(tokens, layer.weight.t(), scale, layer.weight_scale.t(), layer.bias.bfloat16(),
                                                 out_dtype=torch.bfloat16, use_fast_accum=short_sums))
        off, shrunk = relative_error(y, both), 1 - (y.double() * both).sum() / both.square().sum()
        line.append(f"fast_accum {short_sums}: {2e-12 * n * n_in * n_out / seconds:.0f} TFLOP/s, {off:.3%} off, {shrunk:.3%} too small")
        assert off < (0.02 if short_sums else 0.005) and relative_error(y, want) < 0.05    # bfloat16 output 0.2%, short sums; the casts 3.7%
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: False)
    plain = layer(x)
    assert relative_error(plain, want) < 0.04
    print(f"\n({n}, {n_in}) -> {n_out}: {', '.join(line)}; off float64: 8-bit {relative_error(y, want):.2%}, "
          f"multiplied out {relative_error(plain, want):.2%}")


@eight_bit_cores
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_rows(dtype):
    """One trip through memory gives what `quantize` gives, but for quotients that a rounding sends over the middle of two e4m3 numbers."""
    assert kernels.works(torch.device("cuda"))
    for n, C in ((1, 96), (1000, 5120), (33, 13824)):
        x = torch.randn(n, 2 * C, device="cuda").mul(torch.logspace(-4, 4, n, device="cuda")[:, None]).to(dtype)[:, ::2]
        x[n // 2] = 0
        (q, scale), (want, want_scale) = kernels.quantize_rows(x), quantize(x)
        assert q.shape == want.shape and q.dtype == E4M3 and scale.shape == want_scale.shape and scale.dtype == torch.float32
        assert torch.allclose(scale, want_scale, rtol=1e-6, atol=0) and (q[n // 2].float() == 0).all()
        other = (q.float() != want.float()).double().mean().item()
        print(f"\n{dtype}, ({n}, {C}): {other:.4%} of the values differ, by {relative_error(q.float(), want.float()):.1e} of all")
        assert other < 1e-3 and relative_error(q.float(), want.float()) < 1e-3
    x[0, 3], x[1, 5] = math.nan, math.inf
    y = dequantize(*kernels.quantize_rows(x))
    assert y[:2].isnan().any(1).all() and y[2:].isfinite().all()     # a fault stays visible


@eight_bit_cores
def test_compiled_layers_are_few_kernels():
    """Norm, modulation and cast in front of a layer, and GELU and cast between two, are a kernel or two each."""
    from torch._inductor import metrics
    torch._dynamo.reset()
    first, second, gelu = fp8_layer(1024, 2816)[1], fp8_layer(2816, 1024)[1], SigmoidGELU()
    x, shift, scale = (torch.randn(1, n, 1024, device="cuda") for n in (4096, 1, 1))

    def ffn(x):
        return second(gelu(first(modulate(layer_norm(x, 1e-6), shift, scale))))
    metrics.reset()
    compiled = torch.compile(ffn, fullgraph=True)
    error = relative_error(compiled(x), ffn(x))
    print(f"\ncompiled: {metrics.generated_kernel_count} kernels beside the two matmuls, {timed(lambda: compiled(x), 20) * 1e3:.3f} ms, "
          f"eager {timed(lambda: ffn(x), 20) * 1e3:.3f} ms, apart by {error:.3%}")
    assert metrics.generated_kernel_count <= 4 and error < 0.02      # a rounding that tips over moves a value by 6%


# ------------------------------------------------------------------------------------------------------------- the denoiser

def bfloat16_state(cfg):
    """Random parameters on the GPU, as a bfloat16 network has them."""
    entries = as_entries(random_net(cfg, "cuda").state_dict())
    return {name: entry.read().to(parameter_dtype("denoiser", name, entry, torch.bfloat16)) for name, entry in entries.items()}


def float8_tensors(cfg):
    """Random float8 weights in host memory, made on the GPU."""
    return as_entries({name: entry.read().cpu() for name, entry in quantized(as_entries(bfloat16_state(cfg)), "cuda").items()})


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(), dict(chunk=1000, host_layers=True), dict(compile=True)], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_the_fast_denoiser_is_the_plain_one(task, options):
    """In bfloat16 it is about as near to float32 as model.py's."""
    cfg = TASKS[task]
    tensors = as_entries(bfloat16_state(cfg))
    exact, plain = random_net(cfg, "cuda"), stream(empty(cfg), tensors, "cuda", as_stored)
    (latents, t, (cond, _)), (_, _, (rounded, _)) = clip(exact, cfg, **SHAPE), clip(plain, cfg, **SHAPE)
    want, off = exact(latents, t, cond), relative_error(plain(latents, t, rounded), exact(latents, t, cond))
    fast = FastDenoiser(plain, **options)                            # compiling changes its GELU and RoPE
    mine = relative_error(fast(latents, t, clip(fast, cfg, **SHAPE)[2][0]), want)
    print(f"\n{task} {options}: {mine:.3%} off float32, model.py in bfloat16 {off:.3%}")
    assert mine < 1.2 * off < 0.05


@eight_bit_cores
@pytest.mark.parametrize("attend", [blocks.attend, attention8], ids=["exact", "8-bit"])
@pytest.mark.parametrize("task", TASKS)
def test_float8_compiled_of_every_task(task, attend):
    """Compiled float8 layers, with exact and with 8-bit attention, are as far from the unrounded network as the same layers uncompiled."""
    cfg = TASKS[task]
    tensors = float8_tensors(cfg)
    exact, net = random_net(cfg, "cuda"), stream(empty(cfg, tensors), tensors, "cuda", as_stored)
    latents, t, (cond, _) = clip(exact, cfg, **SHAPE)
    want, off = exact(latents, t, cond), []
    for fast in (FastDenoiser(net), FastDenoiser(net, attend=attend, compile=True)):
        off.append(relative_error(fast(latents, t, clip(fast, cfg, **SHAPE)[2][0]), want))
    print(f"\n{task}: {off[1]:.3%} off float32, uncompiled with exact attention {off[0]:.3%}")
    assert 0 < off[1] < 1.3 * off[0] < 0.13


@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_float16_vae(name):
    """Frames and latents in float16, whole and in tiles, through page-locked memory, against float32; released widths, a small picture."""
    part = random_part("vae", VAE22 if name == "2.2" else VAEConfig(), torch.float32, "vae")
    slow, fast = (materialise("vae", part.config, part.tensors, torch.device("cuda"), dtype) for dtype in (torch.float32, torch.float16))
    convolution.use_kernels(fast)                                    # on Hopper
    latents = torch.randn(1, part.config.z_dim, 3, 6, 10, generator=torch.Generator().manual_seed(0)).cuda()
    video = decode_frames(slow, [latents], 9)                        # (1, 3, 9, height, width)
    for tiles in (1, 3):
        fast.tiles = tiles
        frames, coded = decode_frames(fast, [latents[:, :, :1], latents[:, :, 1:]], 9), fast.encode(video.cuda())
        off, apart = float((frames - video).abs().max()), relative_error(coded, slow.encode(video.cuda()))
        print(f"\nVAE {name}, {tiles} tiles: frames off by {off:.5f} at most of [-1, 1], latents by {apart:.2e}")
        assert fast.dtype == torch.float16 and 0 < off < 2 / 255 and apart < 0.01 and not frames.is_pinned()


@pytest.mark.parametrize("task, slow", [("s2v", "neither"), ("s2v", "compute"), ("s2v", "copy"), ("t2v", "copy"), ("i2v", "copy"), ("ti2v", "copy")])
def test_streamed_is_bit_identical(task, slow, monkeypatch):
    cfg = TASKS[task]
    tensors = float8_tensors(cfg)
    whole = FastDenoiser(stream(empty(cfg, tensors), tensors, "cuda", as_stored), chunk=1000)
    latents, t, conds = clip(whole, cfg, **SHAPE)
    want = [whole(latents, t, cond) for cond in conds]
    read = offload.HostRows.read
    if slow == "copy":                                               # 2 ms, longer than a block
        monkeypatch.setattr(offload.HostRows, "read", lambda self, row, data: torch.cuda._sleep(4_000_000) or read(self, row, data))
    for resident in (0, 1, 4, 7, 8):
        net = FastDenoiser(stream(empty(cfg, tensors), tensors, "cuda", as_stored, resident), chunk=1000)
        _, _, here = clip(net, cfg, **SHAPE)
        if slow == "compute":
            for block in all_blocks(net.net):
                block.ffn.register_forward_pre_hook(lambda *_: torch.cuda._sleep(4_000_000))
        for _, block in zip(range(4), net.net.blocks):               # a loop that breaks off
            assert block.modulation.isfinite().all()
        for _ in range(2):
            assert all(torch.equal(a, net(latents, t, cond)) for a, cond in zip(want, here)), f"{resident} resident"
        here[0] = clip(FastDenoiser(net.net, host_layers=True), cfg, **SHAPE)[2][0]
        assert isinstance(here[0].layers, HostLayers) and torch.equal(net(latents, t, here[0]), want[0])
        del net, here, block
        scratch = [torch.full((2 ** 24,), 255, dtype=torch.uint8, device="cuda") for _ in range(8)]      # a freed slot must be quiet
        torch.cuda.synchronize()
        assert all((x == 255).all() for x in scratch)


def test_streamed_memory_and_bandwidth():
    tensors = float8_tensors(BIG)
    layouts, _, rest = split(tensors, as_stored)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    net = stream(empty(BIG, tensors), tensors, "cuda", as_stored, resident=3)
    torch.cuda.synchronize()
    device, host = footprint(layouts, 3)
    held, planned = torch.cuda.memory_allocated() - before, device + sum(entry.nbytes for entry in rest.values())
    print(f"\nheld {held / 2**20:.1f} MiB, planned {planned / 2**20:.1f} MiB, host {host / 2**20:.1f} MiB")
    assert abs(held - planned) < 2 ** 20
    assert all(piece.is_pinned() for piece in net.blocks.host.pieces) and host == sum(piece.nbytes for piece in net.blocks.host.pieces)
    nbytes, seconds = sum(layouts[i][1] for i in net.blocks.order), timed(lambda: [None for _ in net.blocks])
    start = time.perf_counter()
    for _ in net.blocks:
        pass
    queued = time.perf_counter() - start
    print(f"copies alone: {nbytes / seconds / 1e9:.1f} GB/s; the host was busy for {queued * 1e3:.2f} ms of {seconds * 1e3:.2f} ms")


def test_compiled_once_for_all_blocks():
    """Streamed and resident blocks, first and later clips: the same bits. One graph, of audio layers; two more where rows.py does not serve."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks.compiled.cache_clear()
    tensors, results = float8_tensors(BIG), []
    for resident in (None, 3, 3):
        net = FastDenoiser(stream(empty(BIG, tensors), tensors, "cuda", as_stored, resident), compile=True)
        for motion in (False, True):
            latents, t, conds = clip(net, BIG, **SHAPE, motion=motion)
            results.append([net(latents, t, cond) for cond in conds])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    served = fp8.multiplies_fp8(torch.device("cuda")) and kernels.works(torch.device("cuda"))
    print(f"\n{graphs} graphs compiled for {BIG.n_layer} blocks, three times")
    assert all(torch.equal(a, b) for i in range(2) for later in results[2 + i::2] for a, b in zip(results[i], later))
    assert [cond.pads for cond in conds] == [BIG.text_len - 5, BIG.text_len - 9]         # whose prompts have 5 and 9 tokens, see clip
    assert graphs == (1 if served else 3)


# -------------------------------------------------------------------------------------------- attention, the last keys apart

@eight_bit_cores
@pytest.mark.parametrize("first", (128, 204, 254))
@pytest.mark.parametrize("factor", (1, 3))
def test_attend_last(first, factor):
    check_attend_last(first, factor, "cuda", torch.bfloat16, 0.005)           # bf16 rounds twice by 0.2%


@torch.no_grad()
@hopper
@pytest.mark.parametrize("last", (2, 96, 127))
@pytest.mark.parametrize("factor", (1, 3))
def test_last_keys(last, factor, monkeypatch):
    """Nearly as close to float64 as cuDNN's kernel alone, also where the last keys carry most of the weight; in three rounds."""
    monkeypatch.setattr(blocks, "QUERIES", 3000)
    q, k, v = inputs_with_last_keys(2, 8192 + last, 4, factor, "cuda", torch.bfloat16, last)
    want, _ = exact_attention(q, k, v)
    with attention_backend(q.device):
        assert blocks.takes_last_keys_apart(q)
        whole, two, alone = (relative_error(y, want) for y in (attention(q, k, v), blocks.attend(q.clone(), k, v),
                                                               attention(q, k[:, :8192], v[:, :8192])))
    print(f"\nfactor {factor}, 8192 keys and {last}: {two:.2%} in two parts, {whole:.2%} whole, {alone:.0%} without the last keys")
    assert two < 1.5 * whole and alone > 20 * two                    # bf16 rounds twice: seen are 1.0 to 1.33


@torch.no_grad()
@hopper
def test_attend_memory():
    """New memory is for QUERIES results and the sums of their exponentials."""
    q, k, v = (torch.randn(1, 79200, 40, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with attention_backend(q.device):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            blocks.attend(q, k, v)
            torch.cuda.synchronize()
            more = (torch.cuda.max_memory_allocated() - start) / (blocks.QUERIES * 40 * D)
    print(f"\n{more:.3f} bytes per number of {blocks.QUERIES} results")
    assert more < 2.2                                                # 2 for bf16, 4 / 128 for a sum


# ------------------------------------------------------------------------------------------------------- attention in 8 bits

def on_copies(q, k, v):
    """attention8 writes over q and k."""
    return attention8(q.clone(), k.clone(), v)


@eight_bit_cores
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 1037, 3, D), (2, 257, 2, D), (1, 5, 1, D), (1, 1280, 2, 64), (1, 79200, 2, D)])
def test_attention8(case, shape):
    (q, k, v), tolerance = inputs(case, shape, "cuda")
    rows = torch.randint(shape[1], (min(shape[1], 256),), device="cuda")
    want, _ = exact_attention(q[:, rows], k, v)
    y = on_copies(q, k, v)
    e = relative_error(y[:, rows], want)
    print(f"\n{case}: {shape}: {e:.4f} (tolerance {tolerance})")
    assert y.isfinite().all() and e < tolerance
    again = attention8(q, k, v)
    assert again.data_ptr() == q.data_ptr() and again.equal(y)       # in place, and the same every time


@eight_bit_cores
def test_attention8_memory():
    """New memory is for the values in float8, small scales, and little more. At full size: at small ones PyTorch's sums over the tokens
    take more (6.8 bytes per number at 20,000 x 1024)."""
    q, k, v = (torch.randn(1, 79200, 40, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attention8(q, k, v)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention8(q, k, v)
    more = (torch.cuda.max_memory_allocated() - start) / v.numel()
    print(f"\n{more:.3f} bytes per number of v")
    assert more < 1.15


@eight_bit_cores
def test_attention8_without_copy_engine(monkeypatch):
    """The kernel for other GPUs than Hopper reads its tiles by ordinary loads: the same numbers."""
    (q, k, v), _ = inputs("normal", (1, 1037, 2, D), "cuda")
    y = on_copies(q, k, v)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert relative_error(on_copies(q, k, v), y) < 1e-4


@eight_bit_cores
def test_attention8_of_large_and_small_values():
    (q, k, v), _ = inputs("normal", (1, 700, 2, D), "cuda")
    assert all(attention8(q * s, k * s, v * s).isfinite().all() for s in (1e-12, 1e4, 1e12))


@eight_bit_cores
def test_attention8_failure_is_one_line(monkeypatch):
    def broken(*args):
        raise RuntimeError("first\nsecond")
    monkeypatch.setattr(attention8_module, "attend_item", broken)
    with pytest.raises(ValueError, match=r"fails with Triton .*RuntimeError: first\): leave it out"):
        attention8(*[torch.zeros(1, 8, 1, D, device="cuda")] * 3)


# ---------------------------------------------------------------------------------------------------------- the command line

def test_command_line(tmp_path):
    """Streamed blocks give the frames of resident ones bit for bit; compiled float8 layers and 8-bit attention run, and are near."""
    def make(*options):
        out = tmp_path / "_".join(("out", *options))
        assert sample.cli(["--audio", str(SAMPLES / "voice.flac"), "--image", str(SAMPLES / "face.png"), "--device", "cuda", "--out", f"{out}/",
                           "--steps", "4", "--clip-frames", "16", "--clips", "2", *options]) == 0
        return np.stack([np.asarray(Image.open(path), dtype=np.float32) for path in sorted(out.glob("*.png"))])
    base = make()
    assert len(base) == 29 and base.std() > 1 and (make("--resident", "2") == base).all()
    if fp8.multiplies_fp8(torch.device("cuda")) and kernels.triton:
        near = make("--fp8", "--attention8", "--compile")
        assert near.shape == base.shape and 0 < np.abs(near - base).mean() < 0.5 * base.std()
