"""The VAE without weights: python -m pytest tests/test_vae.py    (CPU, seconds; equality with the official numbers is in test_parity.py)"""
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fast.vae_plan import vae_bytes, vae_stream_bytes
from fast.vae_plan import cut_tiles
from vae import VAE, VAE22, VAEConfig, convolve, new_cache, regroup

TINY = {"wan2.1": VAEConfig(dim=8, dec_dim=8, num_res_blocks=1), "wan2.2": replace(VAE22, dim=8, dec_dim=8, num_res_blocks=1)}
TOLERANCE = 1e-5   # float32 rounding through some 40 convolutions of values around 1; where it is exactly 0 depends on the CPU


@pytest.fixture(params=TINY)
def vae(request):
    torch.manual_seed(0)
    return VAE(TINY[request.param]).eval()


def inputs(vae, P=17):
    """A video (2, 3, P, h, w) and latents (2, z_dim, T, 2, 3) of the same size."""
    t, s, _ = vae.stride
    rng = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, P, 2 * s, 3 * s, generator=rng) * 2 - 1, torch.randn(2, vae.config.z_dim, 1 + (P - 1) // t, 2, 3, generator=rng)


def gap(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return (a - b).abs().max().item()


def test_shapes(vae):
    video, z = inputs(vae)
    assert vae.encode(video).shape == z.shape and vae.decode(z).shape == video.shape
    assert vae.stride == ((4, 8, 8) if vae.config.patch == 1 else (4, 16, 16))
    assert vae.decode(z).abs().max() <= 1


def test_chunks_equal_one_pass(vae):
    video, z = inputs(vae)
    latents, pixels = vae.encode(video, chunk=99), vae.decode(z, chunk=99)
    for chunk in (1, 3):
        gaps = gap(vae.encode(video, chunk), latents), gap(vae.decode(z, chunk), pixels)
        print(f"chunk {chunk}: encode, decode max |difference| {gaps}, tolerance {TOLERANCE}")
        assert max(gaps) <= TOLERANCE


@pytest.mark.parametrize("H, W, tiles", [(2, 30, 2), (26, 1, 3)])
def test_tiles_equal_one(vae, H, W, tiles):
    """Longer than the halos, so that no tile sees all of the picture; cut across the longer side."""
    _, s, _ = vae.stride
    rng = torch.Generator().manual_seed(1)
    video, z = torch.rand(1, 3, 9, H * s, W * s, generator=rng) * 2 - 1, torch.randn(1, vae.config.z_dim, 3, H, W, generator=rng)
    latents, pixels = vae.encode(video), vae.decode(z)
    assert pixels.abs().lt(1).float().mean() > 0.9                                # clamping does not hide a difference
    vae.tiles = tiles
    frames = list(vae.decode_stream(iter(z.split([2, 1], dim=2)), 1))
    gaps = gap(vae.encode(video), latents), gap(torch.cat(frames, dim=2), pixels)
    print(f"{W} x {H} latents, {tiles} tiles: encode, decode max |difference| {gaps}, tolerance {TOLERANCE}")
    assert max(gaps) <= TOLERANCE and [x.shape[2] for x in frames] == [1, 4, 4]


def test_halos_are_what_the_layers_see(vae):
    """Wider halos would change nothing and narrower ones would: by the gradients of a tile in the middle."""
    W, cfg = 33, vae.config
    crop = replace(cut_tiles(1, W, 1)[0], start=16, stop=17).crop
    x = torch.randn(1, 1, 1, W, cfg.dec_dim * cfg.dim_mult[-1], requires_grad=True)
    vae.decoder.halos = [W * 2 ** i for i in range(len(cfg.dim_mult))]             # the whole picture
    vae.decoder.run_stages(x, new_cache(vae.decoder.stages, vae.decoder.conv_out), crop).sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1, 2, 4)).nonzero().flatten()
    assert (16 - seen[0], seen[-1] - 16) == (cfg.decoder_halos[0],) * 2
    s, halo = vae.stride[1], cfg.encoder_halo
    video, vae.encoder.halo = torch.randn(1, 1, s, W * s, 3, requires_grad=True), W
    vae.encoder.run_stages(video, new_cache(vae.encoder.stages, vae.encoder.conv_in), crop).sum().backward()
    seen = video.grad.abs().sum(dim=(0, 1, 2, 4)).nonzero().flatten()
    assert 16 * s - seen[0] <= halo * s and (halo - 1) * s < seen[-1] + 1 - 17 * s <= halo * s


def test_half_precision(vae):
    """Norms and softmax in float32, rounding to 8 or 11 bits in between: float32 out, and near the float32 result."""
    video, z = inputs(vae, P=5)
    latents, pixels = vae.encode(video), vae.decode(z)
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.08)):
        vae.to(dtype)
        gaps = gap(vae.encode(video), latents), gap(vae.decode(z), pixels)
        print(f"{dtype}: encode, decode max |difference| {gaps}, tolerance {tolerance}")
        assert max(gaps) < tolerance
        zeros = torch.zeros(1, 1, 2, 2, vae.config.dec_dim * 4, dtype=dtype)
        assert vae.decoder.middle.attention.norm(zeros).eq(0).all()


def test_overflow_in_float16_is_computed_again(vae, capsys):
    """Activations of 1e5 are too large for float16: the result is float32's, said once, and the VAE stays in float32."""
    video, z = inputs(vae, P=5)
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 4e5
        vae.encoder.conv_in.weight *= 4e5
    latents, pixels = vae.encode(video), vae.decode(z)
    for run, want in ((lambda: vae.encode(video), latents), (lambda: vae.decode(z), pixels)):
        vae.half().tiles = 1
        assert gap(run(), want) < 0.02 * want.abs().max()             # weights were rounded to float16
        assert vae.decoder.conv_in.weight.dtype == torch.float32 and vae.tiles == 2
        assert capsys.readouterr().err.count("too large for float16") == 1
        assert gap(run(), want) < 0.02 * want.abs().max() and capsys.readouterr().err == ""


@pytest.mark.parametrize("cuts", [[1] * 17, [2, 15]])
def test_encode_stream_takes_any_pieces(vae, cuts):
    video, _ = inputs(vae)
    pieces = list(vae.encode_stream(iter(video.split(cuts, dim=2)), chunk=2))
    assert [p.shape[2] for p in pieces] == [1, 2, 2]
    assert gap(torch.cat(pieces, dim=2), vae.encode(video, chunk=99)) <= TOLERANCE


@pytest.mark.parametrize("cuts", [[1] * 5, [2, 3]])
def test_decode_stream_takes_any_pieces(vae, cuts):
    _, z = inputs(vae)
    pieces = list(vae.decode_stream(iter(z.split(cuts, dim=2)), chunk=3))
    assert [p.shape[2] for p in pieces] == [1, 12, 4]
    assert gap(torch.cat(pieces, dim=2), vae.decode(z, chunk=99)) <= TOLERANCE


def test_streams_are_lazy(vae):
    """The first frame comes out before the second latent is asked for."""
    def latents():
        yield inputs(vae)[1][:, :, :1]
        raise RuntimeError("asked too early")
    assert next(vae.decode_stream(latents())).shape[2] == 1


def test_causal(vae):
    """What comes later changes nothing before it, so a picture is the first frame of every video that starts with it."""
    video, z = inputs(vae)
    assert gap(vae.encode(video)[:, :, :3], vae.encode(video[:, :, :9])) <= TOLERANCE
    assert gap(vae.decode(z)[:, :, :1], vae.decode(z[:, :, :1])) <= TOLERANCE


def test_calls_leave_nothing_behind(vae):
    video, z = inputs(vae)
    first = vae.encode(video), vae.decode(z)
    next(vae.decode_stream([z]))              # a stream given up half way
    assert gap(vae.encode(video), first[0]) == 0 and gap(vae.decode(z), first[1]) == 0


def test_batch_equals_single(vae):
    video, z = inputs(vae)
    assert gap(vae.encode(video)[1:], vae.encode(video[1:])) <= TOLERANCE and gap(vae.decode(z)[1:], vae.decode(z[1:])) <= TOLERANCE


def test_bad_input(vae):
    video, z = inputs(vae)
    for P, message in ((7, "got 7: trim to 5 or pad to 9"), (0, "got 0: trim to 1 or pad to 5")):
        with pytest.raises(ValueError, match=message):
            vae.encode(video[:, :, :P])
    with pytest.raises(ValueError, match="takes 1 [+] 4n frames, got 7"):
        list(vae.encode_stream(video[:, :, :7].split(2, dim=2)))
    with pytest.raises(ValueError, match=f"multiples of {vae.stride[1]}, got {video.shape[3] - 1} x"):
        vae.encode(video[:, :, :, 1:])
    vae.tiles = 4
    with pytest.raises(ValueError, match="3 x 2 latents can be cut into 1 to 3 tiles, got 4"):
        vae.decode(z)
    with pytest.raises(ValueError, match="wants 8 .z_dim. values"):
        VAEConfig(z_dim=8)
    with pytest.raises(AssertionError, match="a stream starts with 1 frame, got 2"):
        vae.decoder(z[:, :, :2], new_cache(vae.decoder))


def test_convolve_is_a_convolution():
    torch.manual_seed(0)
    for layer, x in ((torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 8, 6)),
                     (torch.nn.Conv3d(4, 6, 3), torch.randn(1, 4, 3, 8, 6))):
        assert gap(convolve(x.movedim(1, -1), layer).movedim(-1, 1), layer(x)) <= TOLERANCE


def test_one_pass_has_gradients(vae):
    """Training calls the networks directly: the first frame, then all others, with one feature cache."""
    video, _ = inputs(vae, P=9)
    cache = new_cache(vae.encoder)
    moments = torch.cat([vae.encoder(video[:, :, :1], cache), vae.encoder(video[:, :, 1:], cache)], dim=2)
    cache, z = new_cache(vae.decoder), moments[:, :vae.config.z_dim]
    torch.cat([vae.decoder(z[:, :, :1], cache), vae.decoder(z[:, :, 1:], cache)], dim=2).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it: .peak is the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.alive:
                self.alive.add(key)
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.free, key, tensor.untyped_storage().nbytes())
        return out

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size


def test_constant_memory(vae):
    t, s, _ = vae.stride
    streams = {"encode": lambda T: vae.encode_stream(torch.zeros(1, 3, t if i else 1, s * 2, s * 2) for i in range(T)),
               "decode": lambda T: vae.decode_stream(torch.zeros(1, vae.config.z_dim, 1, 2, 2) for _ in range(T))}
    for name, stream in streams.items():
        peaks = []
        for P in (17, 33):
            with Memory() as memory:
                for _ in stream(1 + (P - 1) // t):
                    pass
            peaks.append(memory.peak)
        print(f"{name} of 17, 33 frames: peak {peaks} bytes")
        assert max(peaks) <= 1.05 * min(peaks)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("H, W, chunk, tiles", [(2, 4, 2, 1), (1, 30, 1, 3)])
def test_peak_bytes(vae, decode, H, W, chunk, tiles):
    """Against a count of what is alive; with tiles, of the network on the tile with two halos."""
    cfg = replace(vae.config, dim=32, dec_dim=32)
    vae, (_, s, _), rng = VAE(cfg), vae.stride, torch.Generator().manual_seed(1)
    net = vae.decoder if decode else vae.encoder
    z, video = torch.randn(1, cfg.z_dim, 1 + 2 * chunk, H, W, generator=rng), torch.zeros(1, 3, 1 + 8 * chunk, H * s, W * s)
    with Memory() as memory, torch.no_grad():
        if tiles == 1:
            for _ in vae.decode_stream([z], chunk) if decode else vae.encode_stream([video], chunk):
                pass
        else:
            cache = new_cache(net) if decode else new_cache(net.conv_in, net.stages)
            for x in regroup([z if decode else video], chunk if decode else 4 * chunk):
                x = net.bottleneck(x, cache) if decode else x.movedim(1, -1)
                x = net.run_stages(x, cache, cut_tiles(H, W, tiles)[tiles // 2].crop)
    expected = vae_stream_bytes(cfg, H, W, tiles, torch.float32, chunk, decode)
    print(f"{W} x {H} latents, chunk {chunk}, {tiles} tiles: {memory.peak} bytes, expected {expected}: {expected / memory.peak:.2f}")
    assert 0.9 <= expected / memory.peak <= 1.2 and expected <= vae_bytes(cfg, H, W, tiles, torch.float32, chunk)
