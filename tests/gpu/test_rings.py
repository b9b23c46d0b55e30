"""A stream on an NVIDIA GPU: its rings, graphs and the VAE beside it, against live.Ring in one piece.  pytest -s tests/gpu/test_rings.py"""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import live
import sample
from fast import fp8, kernels
from fast.blocks import FastDenoiser
from fast.convolution import use_kernels
from fast.fp8 import relative_error
from fast.rings import Beside, BlockGraphs, GPURing
from model import Config
from tests.inputs import random_net
from tiny.random_weights import random_part
from formats.checkpoints import materialise
from jobs import live as program
from media.ffmpeg import probe
from media.sound import load_audio
from vae import VAEConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
eight_bit_cores = pytest.mark.skipif(not (torch.cuda.is_available() and kernels.triton and fp8.multiplies_fp8(torch.device("cuda"))),
                                     reason="needs Triton and a GPU of compute capability 8.9")
CFG = Config(dim=512, ffn_dim=1024, n_head=4, n_layer=4, text_dim=64, text_len=16, freq_dim=64, audio_dim=32, audio_states=3, audio_layers=(0, 2))
HERE = Path(__file__).parents[2]
GIVEN = ["--live", "--image", str(HERE / "samples" / "face.png"), "--device", "cuda"]
WINDOW, BLOCKS = 6, 6                                                # rings are full from the third block on


@pytest.fixture(scope="module")
def parts():
    """Networks in bfloat16 and float16, a picture of 192x128: 96 tokens a latent frame, 288 a block, no multiple of 128; sound."""
    net = random_net(CFG, "cuda").bfloat16()
    for name, p in net.named_parameters():
        p.data = p.data.float() if "norm" in name or name.endswith("modulation") else p.data
    part = random_part("vae", replace(VAEConfig(), dim=8, dec_dim=8), torch.float16, "vae")
    vae = use_kernels(materialise("vae", part.config, part.tensors, torch.device("cuda"), torch.float16))
    g = torch.Generator().manual_seed(3)
    text, pixels = torch.randn(1, 9, CFG.text_dim, generator=g).cuda(), (torch.rand(1, 3, 1, 128, 192, generator=g) * 2 - 1).cuda()
    picture = live.prepare([FastDenoiser(net)] * 2, vae, text, pixels)
    return SimpleNamespace(picture=picture, sound=torch.randn(BLOCKS, 1, CFG.audio_states, CFG.audio_dim, 12, generator=g).cuda())


def latents(parts, ring, change=lambda video: None):
    """Of every block, one after the other."""
    video = live.Live(parts.picture, 5, WINDOW, ring=ring)
    change(video)
    return torch.stack([video.latents(sound) for sound in parts.sound])


def test_a_ring_of_a_gpu_is_the_ring(parts):
    e = relative_error(latents(parts, GPURing), latents(parts, live.Ring))
    print(f"\nGPURing, {BLOCKS} blocks of latents: {e:.1e} (tolerance 5e-3, bfloat16)")
    assert e < 5e-3


def rings():
    from fast.rings8 import Ring8
    return pytest.param(GPURing, id="bf16"), pytest.param(Ring8, id="8 bits", marks=eight_bit_cores)


@pytest.mark.parametrize("ring", rings())
def test_graphs_have_the_same_bits(parts, ring):
    """Captured when their block comes, and ahead."""
    def when_it_comes(video):
        graphs.append(BlockGraphs(video.stream))

    def ahead(video):
        when_it_comes(video)
        graphs[-1].get_ready(torch.ones(video.shape, device="cuda"), torch.ones_like(parts.sound[0]))
    graphs, want = [], latents(parts, ring)
    for way in (when_it_comes, ahead):
        assert torch.equal(latents(parts, ring, way), want) and len(graphs[-1].graphs) == WINDOW // live.BLOCK


def test_decoding_beside_has_the_same_bits(parts):
    plain, other = (live.Live(parts.picture, 5, WINDOW, ring=GPURing) for _ in range(2))
    wanted, beside, waiting, got = [plain.block(sound).cpu() for sound in parts.sound], Beside(other), None, []
    for sound in parts.sound:
        following = beside(other.latents(sound))
        got += [waiting()] if waiting else []
        waiting = following
    assert all(torch.equal(a, b) for a, b in zip(wanted, [*got, waiting()], strict=True))


def error_of_8_bits(n, blocks):
    """Attention of the last of so many blocks to a ring of random rows -> error of Ring8"""
    from fast.rings8 import Ring8
    g = torch.Generator("cuda").manual_seed(n)
    K, D = 3, 128

    def rows(*shape):
        return torch.randn(*shape, K, D, generator=g, device="cuda").bfloat16()
    expert = SimpleNamespace(rows=[rows(2, 1, n + int(1.5 * n))], ref_keys=[rows(1, n).float()])
    expert.rows[0][0] += 3                                           # keys have a part in common
    exact, ring = live.Ring(expert, n, WINDOW), Ring8(expert, n, WINDOW)
    moved = torch.stack([torch.ones(n, 1, D // 2), torch.zeros(n, 1, D // 2)]).cuda()
    for block in range(blocks):
        q, k, v = rows(1, live.BLOCK * n), rows(1, live.BLOCK * n) + 3, rows(1, live.BLOCK * n)
        place = block * live.BLOCK % WINDOW, min((block + 1) * live.BLOCK, WINDOW), moved
        want = exact.attend(q.clone(), k, v, 0, *place)
        got = ring.attend(q.clone(), k, v, 0, *place)
    return relative_error(got, want)


@eight_bit_cores
@pytest.mark.parametrize("n", (96, 128, 264))
@pytest.mark.parametrize("blocks", (1, 2, 5))
def test_8_bit_attention_of_a_ring(n, blocks):
    e = error_of_8_bits(n, blocks)
    print(f"\n{n} tokens a frame, block {blocks}: {e:.2%} (tolerance 5%)")
    assert 1e-3 < e < 0.05


@eight_bit_cores
def test_a_stream_with_8_bit_rings(parts):
    from fast.rings8 import Ring8
    e = relative_error(latents(parts, Ring8), latents(parts, live.Ring))
    print(f"\nRing8, {BLOCKS} blocks of latents: {e:.2%} (tolerance 10%)")
    assert 1e-4 < e < 0.1


@eight_bit_cores
def test_8_bit_rings_go_on(parts):
    """From a saved state, the same bits."""
    from fast.rings8 import Ring8
    first = live.Live(parts.picture, 5, WINDOW, ring=Ring8)
    made = [first.block(sound) for sound in parts.sound[:3]]
    state = {name: [{key: [x.clone() for x in tensors] for key, tensors in ring.items()} for ring in value] if name == "rings" else value
             for name, value in first.state().items()}
    later = live.Live(parts.picture, 9, WINDOW, ring=Ring8).restore(state)
    made = [first.block(sound) for sound in parts.sound[3:]]
    assert all(torch.equal(a, later.block(sound)) for a, sound in zip(made, parts.sound[3:]))


def test_the_program_writes_a_file(tmp_path, monkeypatch):
    """The tiny checkpoint, with CUDA graphs: sound encoded beside, blocks decoded beside, an mp4."""
    monkeypatch.setattr(program, "LONG", 10)
    assert sample.cli([*GIVEN, "--audio", str(HERE / "samples" / "voice.flac"), "--out", str(tmp_path / "a.mp4")]) == 0
    assert probe(str(tmp_path / "a.mp4")).frames == 96


def test_the_program_hears_a_pipe():
    """The same by standard input, to standard output."""
    sound = (load_audio(str(HERE / "samples" / "voice.flac")) * 32767).to(torch.int16).numpy().tobytes()
    run = subprocess.run([sys.executable, "sample.py", *GIVEN, "--audio", "-", "--raw", "--out", "-"], cwd=HERE, input=sound, capture_output=True)
    assert run.returncode == 0 and len(run.stdout) == 96 * 128 * 128 * 3, run.stderr.decode()[-1000:]
