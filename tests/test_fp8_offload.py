"""FP8 layers and streamed blocks.  python -m pytest -s test_fp8_offload.py

On a CPU in seconds: casting against a float64 reference, the dequantised matmul, the order of copies and uses under a simulated GPU that
runs its two streams in random order, streamed against resident networks bit for bit. On a GPU, under a minute, also the real thing:
8-bit matmul against the dequantised one, streams with artificial delays, memory, kernels of a compiled layer.
"""
import gc
import math
import random
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fast import fp8
from fast import offload
from formats.checkpoints import Entry, open_safetensors
from fast.fp8 import E4M3, FP8Linear, dequantize, is_cast, layer_error, quantize, quantize_weight, quantized, relative_error, report, to_fp8, uses_fp8
from model import GELU, Config, Denoiser, compile_blocks, fast, layer_norm, modulate, rotate
from fast.offload import HostLayers, Streamed, footprint, resident_blocks, split, stream
from safetensors.torch import save_file
from text import TextConfig, TextEncoder

TINY = Config(dim=96, ffn_dim=192, n_head=4, n_layer=5, text_dim=32, text_len=12, freq_dim=32, audio_dim=24, audio_states=3, audio_tokens=2,
              audio_layers=(0, 2))
CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def random_net(cfg, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        net = Denoiser(cfg)
    for name, p in net.named_parameters():
        if name.endswith(("modulation", "mix")):
            nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def clip(net, T=2, H=8, W=8, B=1, chunk=37, device="cpu"):
    """Noise and two conditions, the second with silence and another text."""
    g, cfg = torch.Generator().manual_seed(1), net.cfg
    def randn(*shape): return torch.randn(shape, generator=g).to(device)
    motion, ref, audio = randn(B, cfg.out_dim, 19, H, W), randn(B, cfg.out_dim, 1, H, W), randn(B, cfg.audio_states, cfg.audio_dim, 4 * T)
    conds = [net.prepare((T, H, W), randn(B, n, cfg.text_dim), audio * on, ref, motion, chunk=chunk) for n, on in ((5, 1), (9, 0))]
    return randn(B, cfg.out_dim, T, H, W), torch.full((B,), 700.0, device=device), conds


def as_entries(state):
    return {name: Entry(None, tuple(x.shape), x.dtype, lambda x=x: x) for name, x in state.items()}


def as_stored(name, entry):
    return entry.dtype


def empty(cfg, names=()):
    with torch.device("meta"):
        return to_fp8(Denoiser(cfg), names)


def streamed(module, tensors, resident, device=CPU, **options):
    """`stream` also for a CPU, where it would keep all blocks."""
    layouts, entries, rest = split(tensors, as_stored)
    blocks = Streamed(list(module.blocks), layouts, entries, device, resident, **options)
    del module.blocks
    module.blocks = blocks
    return stream(module, rest, device, as_stored)


# ---- casting


def decode(code):
    """The number that an e4m3 code stands for, from the format's definition."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0 ** -6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


VALUES = torch.tensor([decode(code) for code in range(127)], dtype=torch.float64)    # 0 .. 448, rising with the code


def nearest(x):
    """Reference cast: x float64 -> the nearest value, of two equally near the one with the even code, at most 448."""
    above = torch.searchsorted(VALUES, x.abs().clamp(max=448)).clamp(max=126)
    below = (above - 1).clamp(min=0)
    down, up = x.abs().clamp(max=448) - VALUES[below], VALUES[above] - x.abs().clamp(max=448)
    code = torch.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    return torch.copysign(VALUES[code], x)


def test_all_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    want = torch.tensor([decode(code) for code in range(256)], dtype=torch.float64)
    got = codes.view(E4M3).double()
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().sum() == 2
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])
    back = fp8.cast(got[~got.isnan()].float()).view(torch.uint8)
    assert torch.equal(back, codes[~got.isnan()])


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


def test_damaged_weight_is_refused():
    with pytest.raises(ValueError, match="1 of 4 rows"):
        quantize_weight(torch.tensor([1.0, 2.0, math.inf, 3.0])[:, None])
    with pytest.raises(ValueError, match="belongs to no linear layer"):
        empty(TINY, ["blocks.0.cross_norm.weight_scale"])


# ---- layers


def fp8_layer(n_in, n_out, device="cpu", dtype=torch.float32):
    """A Linear and its FP8Linear."""
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out).to(device)
    layer = FP8Linear(n_in, n_out)
    weight, scale = quantize_weight(linear.weight.detach())
    layer.load_state_dict({"weight": weight, "weight_scale": scale, "bias": linear.bias.detach().to(dtype)}, assign=True)
    return linear.requires_grad_(False), layer


def test_linear_without_8_bit_cores():
    linear, layer = fp8_layer(320, 200)
    x = torch.randn(2, 33, 320, generator=torch.Generator().manual_seed(0))
    y, want = layer(x), linear(x)
    assert torch.equal(y, F.linear(x, layer.weight.float() * layer.weight_scale, layer.bias))
    error = relative_error(y, want)
    print(f"float8 weights: output off by {error:.2%} (at most 5%)")
    assert y.dtype == torch.float32 and 0.01 < error < 0.05
    assert layer(x.bfloat16()).dtype == torch.float32 and layer(x[0, 0]).shape == (200,) and layer(x[:0]).shape == (0, 33, 200)


def test_what_is_quantised():
    net = random_net(TINY)
    names = [name for name in net.state_dict() if uses_fp8(name)]
    assert len(names) == 10 * TINY.n_layer + 5 * len(TINY.audio_layers)
    linears = {name + ".weight" for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")}
    assert set(names) == linears
    full = {name: p for name, p in empty(Config()).named_parameters()}
    share, cast = (sum(p.numel() for name, p in full.items() if which(name)) / sum(p.numel() for p in full.values()) for which in (uses_fp8, is_cast))
    print(f"{share:.1%} of the released model's parameters may be float8, {cast:.1%} are cast")
    assert share > 0.97 and 0.93 < cast < 0.95 and not any(is_cast(name) for name in full if "inject.v." in name or "inject.o." in name)


def test_report():
    errors = [layer_error(f"layer {i}", torch.randn(96, 128) * scale) for i, scale in enumerate((1, 1e-6, torch.logspace(0, 5, 128)))]
    for error in errors[:2]:                                         # rounding: 2.6%; of both factors: sqrt(2) times as much
        assert 0.02 < error.weight < 0.03 and 0.03 < error.output < 0.045
    text = report(errors, worst=2).splitlines()
    assert len(text) == 4 and "2 of 3" in text[0]
    given = layer_error("given", torch.randn(96, 128), torch.zeros(5, 128))
    assert given.output == 0


def test_denoiser_in_fp8():
    net = random_net(TINY)
    tensors = quantized(as_entries(net.state_dict()))
    small = stream(empty(TINY, tensors), tensors, "cpu", as_stored)
    latents, t, conds = clip(net)
    _, _, conds8 = clip(small)
    v, v8 = net.velocities(latents, t, conds), small.velocities(latents, t, conds8)
    errors = [relative_error(a, b) for a, b in zip(v8, v)]
    print(f"tiny denoiser: velocity off by {max(errors):.2%} with float8 weights")
    assert max(errors) < 0.05 and v8[0].dtype == torch.float32
    halves = {name: replace(entry, dtype=torch.bfloat16, read=lambda x=entry.read(): x.bfloat16()) if entry.dtype == torch.float32 and "scale"
              not in name and "norm" not in name and "modulation" not in name else entry for name, entry in tensors.items()}
    mixed = stream(empty(TINY, halves), halves, "cpu", as_stored)    # float8 layers give float32 on a CPU, their neighbours bfloat16
    half = mixed.velocities(latents, t, clip(mixed)[2])
    assert max(relative_error(a, b) for a, b in zip(half, v)) < 0.06
    again = quantized(tensors)                                       # what is float8 already stays as it is
    assert again.keys() == tensors.keys() and all(again[name] is tensors[name] for name in tensors)


# ---- streams: the real order of a GPU's work is not the order in which the host asks for it


class Simulated:
    """A GPU with two streams whose work is done later and in random order, as far as events allow."""

    def __init__(self):
        self.compute = self.now = self.Stream()
        self.streams = [self.compute]

    class Stream:
        def __init__(self, device=None):
            self.queue = deque()

        def wait_event(self, event):
            wanted = event.recorded
            self.queue.append(lambda: event.reached >= wanted)

    class Event:
        def __init__(self):
            self.recorded = self.reached = 0

        def record(self, stream):
            self.recorded += 1
            stream.queue.append(lambda n=self.recorded: self.reach(n))

        def reach(self, n):
            self.reached = n
            return True

    def current_stream(self, device=None):
        return self.now

    @contextmanager
    def stream(self, stream):
        if stream not in self.streams:
            self.streams.append(stream)
        before, self.now = self.now, stream
        yield
        self.now = before

    def later(self, work):
        self.now.queue.append(lambda: work() or True)

    def run(self, seed):
        choose = random.Random(seed)
        while waiting := [s for s in self.streams if s.queue]:
            choose.shuffle(waiting)
            waiting.sort(key=lambda s: choose.random() < 0.8 and s is not self.streams[seed % len(self.streams)])   # one stream hurries
            stream = next((s for s in waiting if s.queue[0]()), None)
            assert stream, "both streams wait for ever"
            stream.queue.popleft()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_every_use_sees_its_block(n, monkeypatch):
    monkeypatch.setattr(offload, "PIECE", 1024)
    copy_now = offload.HostRows.read
    for seed in range(30):
        backend, choose = Simulated(), random.Random(seed)
        monkeypatch.setattr(offload.HostRows, "read", lambda self, row, data: backend.later(lambda: copy_now(self, row, data)))
        state = {f"blocks.{i}.weight": torch.full((1, 100 + 400 * (i % 3 == 0)), float(i)) for i in range(n)}
        layouts, entries, _ = split(as_entries(state), as_stored)
        blocks = [nn.Linear(x.shape[1], 1, bias=False, device="meta") for x in state.values()]
        resident = choose.randrange(n)
        loop = Streamed(blocks, layouts, entries, CPU, resident, backend)
        seen, want = [], []
        for _ in range(6):                                           # passes, some of which break off
            stop = choose.choice([n, n, choose.randrange(n)])
            for i, block in enumerate(loop):
                backend.later(lambda block=block: seen.append(block.weight.unique().tolist()))
                want.append([float(i)])
                if i == stop:
                    break
        backend.run(seed)
        assert seen == want, f"seed {seed}, {resident} resident"


def test_a_missing_wait_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Simulated.Stream, "wait_event", lambda self, event: None)
    with pytest.raises(AssertionError):
        test_every_use_sees_its_block(4, monkeypatch)


def test_copies_per_pass():
    """Behind the first pass every streamed block is copied once a pass, two or fewer never again."""
    state = {f"blocks.{i}.weight": torch.zeros(1, 8) for i in range(5)}
    layouts, entries, _ = split(as_entries(state), as_stored)
    for resident, copies in ((0, 5), (1, 4), (2, 3), (3, 0), (4, 0), (5, 0)):
        loop = Streamed([nn.Linear(8, 1, bias=False, device="meta") for _ in range(5)], layouts, entries, CPU, resident)
        done, read = [], loop.host.read
        loop.host.read = lambda row, data: done.append(row) or read(row, data)
        counts = [(sum(1 for _ in loop), len(done)) for _ in range(4)]
        assert [c for c, _ in counts] == [5] * 4 and counts[3][1] - counts[2][1] == copies


def test_residents_are_spread():
    for n in range(1, 45):
        for resident in range(n + 1):
            stay = resident_blocks(n, resident)
            assert len(stay) == resident
            gaps = [sum(i not in stay for i in range(a, b)) for a, b in zip(sorted(stay), [*sorted(stay)[1:], n + min(stay, default=0)])]
            assert max(gaps, default=0) - min(gaps, default=0) <= n // max(1, resident)


# ---- networks


@pytest.mark.parametrize("eight_bit", [False, True])
def test_streamed_denoiser_is_bit_identical(eight_bit, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "PIECE", 2 ** 15)                   # smaller than a block: tensors lie across pieces
    tensors = as_entries(random_net(TINY).state_dict())
    tensors = quantized(tensors) if eight_bit else tensors
    save_file({name: entry.read().contiguous() for name, entry in tensors.items()}, tmp_path / "denoiser.safetensors")
    tensors = open_safetensors(tmp_path / "denoiser.safetensors")
    whole = stream(empty(TINY, tensors), tensors, "cpu", as_stored)
    latents, t, conds = clip(whole)
    want = whole.velocities(latents, t, conds)
    assert all(torch.equal(a, whole(latents, t, cond)) for a, cond in zip(want, conds))      # one loop for both branches or two
    for resident in (0, 2, 4):
        net = streamed(empty(TINY, tensors), tensors, resident)
        _, _, here = clip(net)
        for a, b in zip(conds, here):
            assert all(torch.equal(x, y) for p, q in zip(a.layers, b.layers) for x, y in zip(p, q) if x is not None)
        with pytest.raises(ZeroDivisionError):
            for i, block in enumerate(net.blocks):
                1 / (3 - i)
        next(iter(net.blocks))
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(want, net.velocities(latents, t, here)))
            assert all(torch.equal(a, net(latents, t, cond)) for a, cond in zip(want, here))


def test_streamed_text_encoder_is_bit_identical():
    config = TextConfig(vocab=50, dim=32, dim_attn=32, ffn=64, n_head=4, n_layer=5)
    torch.manual_seed(0)
    whole = TextEncoder(config).requires_grad_(False)
    for p in whole.parameters():
        nn.init.normal_(p, std=0.2)
    ids = torch.arange(12).view(2, 6)
    for resident in (0, 2):
        with torch.device("meta"):
            net = TextEncoder(config)
        net = streamed(net, as_entries(whole.state_dict()), resident)
        assert all(torch.equal(whole(ids), net(ids)) for _ in range(2))


def test_footprint():
    tensors = as_entries(random_net(TINY).state_dict())
    layouts, _, rest = split(tensors, as_stored)
    for resident in (0, 2, 4, 5):
        net = streamed(empty(TINY), tensors, resident)
        device, host = footprint(layouts, resident)
        held = sum(slot.data.nbytes for slot in net.blocks.slots) + sum(
            next(block.parameters()).untyped_storage().nbytes() for block in net.blocks.kept.values())
        assert (device, host) == (held, sum(piece.nbytes for piece in net.blocks.host.pieces))
    assert sum(entry.nbytes for entry in rest.values()) == sum(p.nbytes for p in net.parameters())


def test_full_size_footprint():
    """Bytes of the released S2V denoiser in fp8, from headers alone."""
    with torch.device("meta"):
        state = {name: p.bfloat16() for name, p in empty(Config()).state_dict().items()}
        tensors = {name: entry for name, entry in quantized(as_entries(state)).items()}
    layouts, _, rest = split(tensors, as_stored)
    device, host = footprint(layouts, 0)
    print(f"S2V-14B in fp8, all blocks streamed: {device / 2**30:.2f} GiB of GPU memory for slots, {host / 2**30:.2f} GiB of page-locked "
          f"host memory; {sum(entry.nbytes for entry in rest.values()) / 2**30:.2f} GiB of other parameters in bfloat16")
    assert 1.04 < device / 2**30 < 1.06 and host - sum(nbytes for _, nbytes in layouts) < offload.PIECE


def test_host_layers():
    net = random_net(TINY)
    latents, t, conds = clip(net)
    for cond in conds:
        layers = HostLayers(cond.layers)
        for i, layer in enumerate(cond.layers):
            assert type(layers[i]) is type(layer)
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(layers[i], layer))
        assert torch.equal(net(latents, t, replace(cond, layers=layers)), net(latents, t, cond))


def test_compiled_once_per_layout():
    """No recompilation between slots, passes and guidance branches: one graph with audio attention, one without."""
    torch._dynamo.reset()
    graphs = []
    tensors = quantized(as_entries(random_net(TINY).state_dict()))
    net = streamed(empty(TINY, tensors), tensors, resident=2)
    latents, t, conds = clip(net)
    want = net.velocities(latents, t, conds)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    for block in net.blocks.modules:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            got = net.velocities(latents, t, conds)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, want)) and len(graphs) == 2          # GELU is written otherwise there


def test_gelu_as_it_is_compiled():
    x = torch.linspace(-8, 8, 4001)
    compiled = torch.compile(GELU(), backend="eager", fullgraph=True)(x)
    gap = (compiled - F.gelu(x, approximate="tanh")).abs().max().item()
    print(f"\ncompiled GELU: largest difference {gap:.1e} (tolerance 2e-6: a rounding or two of numbers up to 8)")
    assert 0 < gap < 2e-6                                            # 0: the other formula was not used
    assert torch.compile(GELU(), backend="eager", fullgraph=True)(x.bfloat16()).dtype == torch.bfloat16


def test_rope_as_it_is_compiled():
    x, rope = torch.randn(2, 50, 3, 16), torch.randn(2, 50, 1, 8)
    assert torch.equal(torch.compile(rotate, backend="eager", fullgraph=True)(x, rope), rotate(x, rope))


def test_nothing_is_compiled_again_for_a_later_clip(monkeypatch):
    """As the sampler compiles: first clips without motion tokens, later ones with them, both guidance branches, streamed or not."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    fast.cache_clear()
    tensors = quantized(as_entries(random_net(TINY).state_dict()))
    counts = []
    for resident in (None, 2):
        net = empty(TINY, tensors)
        net = stream(net, tensors, CPU, as_stored) if resident is None else streamed(net, tensors, resident)
        compile_blocks(net)
        latents, t, later = clip(net)
        first = [net.prepare(latents.shape[2:], torch.randn(len(latents), 5, TINY.text_dim),
                             torch.randn(len(latents), TINY.audio_states, TINY.audio_dim, 4 * latents.shape[2]), latents[:, :, :1])] * 2
        with torch.no_grad():
            for conds in (first, later, first):
                net.velocities(latents, t, conds)
                counts.append(len(graphs))
    fast.cache_clear()
    print(f"graphs after each clip: {counts}")
    assert counts[0] <= 4 and counts == counts[:1] * 6


# ---- GPU


def timed(work, n=5):
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


@gpu
def test_gpu_matmul(monkeypatch):
    if not fp8.multiplies_fp8(torch.device("cuda")):
        pytest.skip("needs 8-bit tensor cores: compute capability 8.9")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    g = torch.Generator("cuda").manual_seed(0)
    for n_in, n_out, n in ((5120, 5120, 8197), (5120, 13824, 8192), (13824, 5120, 8192), (5120, 10240, 20), (96, 208, 1)):
        linear, layer = fp8_layer(n_in, n_out, "cuda", torch.bfloat16)
        x = torch.randn(1, n + 3, n_in, generator=g, device="cuda")[:, 3:]
        want = F.linear(x.double(), linear.weight.double(), layer.bias.double())
        both = F.linear(dequantize(*quantize(x)).double(), dequantize(layer.weight, layer.weight_scale).double(), layer.bias.double())
        line = []
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
        with monkeypatch.context() as patch:
            patch.setattr(fp8, "multiplies_fp8", lambda device: False)
            plain = layer(x)
        assert relative_error(plain, want) < 0.04
        print(f"({n}, {n_in}) -> {n_out}: {', '.join(line)}; off float64: 8-bit {relative_error(y, want):.2%}, "
              f"dequantised {relative_error(plain, want):.2%}")


BIG = Config(dim=1024, ffn_dim=2816, n_head=8, n_layer=9, text_dim=256, text_len=32, freq_dim=64, audio_dim=64, audio_states=3,
             audio_layers=(0, 2, 5))


def gpu_tensors(cfg):
    """Random fp8 weights in host memory, made on the GPU."""
    state = {name: p.to(Denoiser.storage_dtype(name, torch.bfloat16)) for name, p in random_net(cfg, "cuda").state_dict().items()}
    return as_entries({name: entry.read().cpu() for name, entry in quantized(as_entries(state), "cuda").items()})


@gpu
@pytest.mark.parametrize("slow", ["neither", "compute", "copy"])
def test_gpu_streamed_is_bit_identical(slow, monkeypatch):
    tensors = gpu_tensors(BIG)
    whole = stream(empty(BIG, tensors), tensors, "cuda", as_stored)
    latents, t, conds = clip(whole, T=4, H=32, W=32, chunk=1000, device="cuda")
    want = whole.velocities(latents, t, conds)
    read = offload.HostRows.read
    if slow == "copy":                                               # 2 ms, longer than a block
        monkeypatch.setattr(offload.HostRows, "read", lambda self, row, data: torch.cuda._sleep(4_000_000) or read(self, row, data))
    for resident in (0, 1, 4, 7, 8):
        net = stream(empty(BIG, tensors), tensors, "cuda", as_stored, resident)
        _, _, here = clip(net, T=4, H=32, W=32, chunk=1000, device="cuda")
        if slow == "compute":
            [module.register_forward_pre_hook(lambda *_: torch.cuda._sleep(4_000_000)) for module in net.blocks.modules]
        assert len(list(zip(range(4), (block.eps for block in net.blocks)))) == 4        # a loop that breaks off
        for _ in range(2):
            got = net.velocities(latents, t, here)
            two = [net(latents, t, cond) for cond in here]
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(want, got, two)), f"{resident} resident"
        assert torch.equal(net(latents, t, replace(here[0], layers=HostLayers(here[0].layers))), want[0])
        del net, here
        scratch = [torch.full((2 ** 24,), 255, dtype=torch.uint8, device="cuda") for _ in range(8)]      # a freed slot must be quiet
        torch.cuda.synchronize()
        assert all((x == 255).all() for x in scratch)


@gpu
def test_gpu_memory_and_bandwidth():
    tensors = gpu_tensors(BIG)
    layouts, _, rest = split(tensors, as_stored)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    net = stream(empty(BIG, tensors), tensors, "cuda", as_stored, resident=3)
    torch.cuda.synchronize()
    device, host = footprint(layouts, 3)
    held = torch.cuda.memory_allocated() - before
    planned = device + sum(entry.nbytes for entry in rest.values())
    print(f"\nheld {held / 2**20:.1f} MiB, planned {planned / 2**20:.1f} MiB, host {host / 2**20:.1f} MiB")
    assert abs(held - planned) < 2 ** 20
    assert all(piece.is_pinned() for piece in net.blocks.host.pieces)
    torch.cuda.reset_peak_memory_stats()
    clip(net, T=4, H=32, W=32, chunk=1000, device="cuda")
    nbytes = sum(layouts[i][1] for i in net.blocks.order)
    start = time.perf_counter()
    for _ in net.blocks:
        pass
    queued = time.perf_counter() - start
    seconds = timed(lambda: [None for _ in net.blocks])
    print(f"copies alone: {nbytes / seconds / 1e9:.1f} GB/s; the host was busy for {queued * 1e3:.2f} ms of {seconds * 1e3:.2f} ms")


@gpu
def test_gpu_compiled():
    """Norm, modulation and cast in front of a layer, and GELU and cast between two, are a kernel or two each."""
    from torch._inductor import metrics
    torch._dynamo.reset()
    first, second = fp8_layer(1024, 2816, "cuda", torch.bfloat16)[1], fp8_layer(2816, 1024, "cuda", torch.bfloat16)[1]
    x, shift, scale = (torch.randn(1, n, 1024, device="cuda") for n in (4096, 1, 1))

    def ffn(x):
        return second(F.gelu(first(modulate(layer_norm(x, 1e-6), shift, scale)), approximate="tanh"))
    metrics.reset()
    compiled = torch.compile(ffn, fullgraph=True)
    error = relative_error(compiled(x), ffn(x))
    print(f"\ncompiled: {metrics.generated_kernel_count} kernels beside the two matmuls, {timed(lambda: compiled(x), 20) * 1e3:.3f} ms, "
          f"eager {timed(lambda: ffn(x), 20) * 1e3:.3f} ms, apart by {error:.3%}")
    assert metrics.generated_kernel_count <= 4 and error < 0.02      # a rounding that tips over moves a value by 6%
    tensors = gpu_tensors(BIG)
    nets = [stream(empty(BIG, tensors), tensors, "cuda", as_stored, resident) for resident in (None, 3)]
    latents, t, conds = clip(nets[0], T=4, H=32, W=32, chunk=None, device="cuda")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for net in nets:
            for block in net.blocks.modules if isinstance(net.blocks, Streamed) else net.blocks:
                block.compile(dynamic=False)
        a, b, c = (net.velocities(latents, t, conds) for net in (nets[0], nets[1], nets[1]))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{graphs} graphs compiled for {BIG.n_layer} blocks, twice; streamed and resident bits equal: "
          f"{all(torch.equal(x, y) for x, y in zip(a, b))}")
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c)) and graphs == 2
