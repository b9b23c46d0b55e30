"""A stream: what stays the same, what does not grow, what goes in and out. Its numbers are compared in test_parity.py.

    pytest tests/test_live.py
"""
import copy
import gc
import io
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

import live
import train
from audio import AudioConfig, Wav2Vec2, audio_features
from fast import fp8
from fast.listening import Listening
from formats import checkpoints, lora, names
from jobs import live as program
from jobs import live_plan
from media import stream as out
from fast.blocks import FastDenoiser
from fast.fp8 import relative_error
from fast.rings import BlockGraphs, GPURing
from fast.rings8 import value_scales
from fast.stills import still
from model import Config, Denoiser, rope_table
from test_parity import GOLDEN, entries
from tiny import streams
from vae import VAE, VAE22, VAEConfig

HERE = Path(__file__).parents[1]
VOICE, ITALIAN, FACE = (str(HERE / "samples" / name) for name in ("voice.flac", "italian.flac", "face.png"))


@pytest.fixture(scope="module")
def parts():
    """A small denoiser and VAE, text, a picture, and sound for eight blocks."""
    g = torch.Generator().manual_seed(1)
    cfg = Config(dim=24, ffn_dim=32, n_head=2, n_layer=3, text_dim=8, text_len=6, freq_dim=16, audio_dim=8, audio_states=2, audio_layers=(0, 2))
    net, coder = Denoiser(cfg).eval(), VAE(VAEConfig(dim=4, dec_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)).eval()
    for p in (*net.parameters(), *coder.parameters()):
        p.data = torch.randn(p.shape, generator=g) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5
    text, picture = torch.randn(1, 5, cfg.text_dim, generator=g), torch.rand(1, 3, 1, 64, 64, generator=g) * 2 - 1
    return SimpleNamespace(net=net, vae=coder, text=text, picture=picture, pictures={},
                           sound=torch.randn(8, 1, cfg.audio_states, cfg.audio_dim, 12, generator=g))


@pytest.mark.parametrize("config", (VAEConfig(), VAE22), ids=("2.1", "2.2"))
def test_a_still_picture_in_three_passes(config):
    """The reference has the same bits, the still latent is that of 113 frames."""
    vae, g = VAE(replace(config, dim=8, dec_dim=8)), torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 1, 2 * vae.stride[1], 4 * vae.stride[1], generator=g) * 2 - 1
    (ref, last), (want, steady) = still(vae, picture), live.still(vae, picture)
    e = relative_error(last, steady)
    print(f"still latent: relative L2 {e:.1e} (tolerance 1e-5)")
    assert torch.equal(ref, want) and e < 1e-5 < relative_error(last, ref)


def test_a_still_picture_that_is_too_much_for_float16_is_encoded_in_float32():
    vae, called = VAE(replace(VAEConfig(), dim=8, dec_dim=8)), []
    fallback, vae.with_fp32_fallback = vae.with_fp32_fallback, lambda run: called.append(run) or fallback(run)
    still(vae, torch.zeros(1, 3, 1, 16, 16))
    assert len(called) == 1


def begin(parts, seed=42, steps=2, window=6, **options):
    if steps not in parts.pictures:
        parts.pictures[steps] = live.prepare([parts.net] * steps, parts.vae, parts.text, parts.picture)
    return live.Live(parts.pictures[steps], seed, window, **options)


def test_a_seed_gives_its_bytes_and_viewers_do_not_meet(parts):
    """Two viewers of the same network, block by block in turn, see what each sees alone; so does who goes on from a saved state."""
    alone, first, other = (begin(parts, seed) for seed in (1, 1, 2))
    wanted = [alone.block(sound) for sound in parts.sound]
    assert wanted[0].shape == (1, 3, 9, 64, 64) and all(frames.shape[2] == 12 for frames in wanted[1:])
    got, file = [], io.BytesIO()
    for i, sound in enumerate(parts.sound):
        got.append(first.block(sound))
        assert not torch.equal(other.block(sound), got[-1])
        if i == 4:                                                   # the ring has wrapped
            torch.save(first.state(), file)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got))
    file.seek(0)
    later = begin(parts, seed=7).restore(torch.load(file, weights_only=True))
    assert all(torch.equal(later.block(sound), frames) for sound, frames in zip(parts.sound[5:], wanted[5:]))
    with pytest.raises(ValueError, match="wanted the state of 2 steps"):
        begin(parts, window=9).restore(first.state())


def test_what_a_seed_means(parts):
    """Noise of a block, then for each step how far the reference stands ahead, 4 to 30 latent frames: all from one generator, on and on."""
    viewer, g = begin(parts, seed=3), torch.Generator().manual_seed(3)
    steps, draw, noise, ahead = viewer.stream.steps, viewer.draw, [], []
    viewer.stream.steps = lambda x, conds, moved: noise.append(x) or steps(x, conds, moved)
    viewer.draw = lambda: ahead.append(draw()) or ahead[-1]
    for sound in parts.sound:
        viewer.latents(sound)
        assert torch.equal(noise.pop(), torch.randn(1, 16, 3, 8, 8, generator=g))
        assert [ahead.pop(0) for _ in range(2)] == torch.stack([torch.randint(4, 31, (), generator=g) for _ in range(2)]).tolist()
    assert {draw() for _ in range(1000)} == set(range(4, 31))


def test_constants_are_those_of_the_lora(parts):
    assert (live.FPS, live.STEPS, live.SHIFT, live.BLOCK, live.WINDOW, live.LEAD_LATENTS, live.WARM_UP) == (25, 4, 3, 3, 12, 7, 3)
    assert live.Live(begin(parts).picture).stream.window == 12


def test_each_step_has_its_own_network(parts):
    """Of two networks, one a step: its layers, sink pass, text and sound, and ring."""
    other, g = copy.deepcopy(parts.net), torch.Generator().manual_seed(5)
    for p in other.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=g)
    both, *alone = (live.Live(live.prepare(nets, parts.vae, parts.text, parts.picture), 42, 6).stream
                    for nets in ([parts.net, other], [parts.net] * 2, [other] * 2))
    for sound in parts.sound[:4]:
        x = noise = torch.randn(1, 16, 3, 8, 8, generator=g)
        with torch.no_grad():
            for step, stream in enumerate(alone):
                change = stream.sigmas.diff()[step].item()
                x = x + change * stream.velocity(step, x, stream.conditions(sound)[step], stream.moved(7))
        assert torch.equal(both.block(noise, sound, lambda: 7), x)
        for stream in alone:
            stream.frame += 3


def test_the_reference_is_turned_from_where_it_was_first(parts):
    """Its keys are kept as the sink pass made them, and turned from there in every forward: bit for bit, so that nothing adds up in bfloat16."""
    stream, ahead = begin(parts).stream, iter(range(30, 4, -1))
    with torch.no_grad():
        for expert in stream.experts:
            first = live.rotate(expert.ref_keys[1], stream.rope([live.REF_TIME]))
            assert torch.equal(first, expert.rows[1][0, :, :stream.n])
        for sound in parts.sound[:6]:
            moved = [stream.moved(next(ahead)) for _ in stream.experts]
            stream.steps(torch.zeros(1, 16, 3, 8, 8), stream.conditions(sound), moved)
            for expert, ring, table in zip(stream.experts, stream.rings, moved):
                assert torch.equal(ring.layers[1][0, :, :stream.n], live.rotate(expert.ref_keys[1], table))
            stream.frame += 3
    assert not torch.equal(table, stream.rope([live.REF_TIME]))      # it has moved


def test_a_replaced_reference_is_remembered(parts):
    """It changes what comes once a ring is full, and a state taken before or after goes on alike."""
    plain, replaced, saved = begin(parts), begin(parts, replace_ref=True), {}
    for i, sound in enumerate(parts.sound[:5]):
        a, b = plain.block(sound), replaced.block(sound)
        assert torch.equal(a, b) == (i < 2)
        if i in (0, 3):
            saved[i] = begin(parts, replace_ref=True).restore(replaced.state())
    for i, again in saved.items():
        assert torch.equal([again.block(sound) for sound in parts.sound[i + 1:5]][-1], b)


@pytest.mark.parametrize("ahead", (True, False))
def test_graphs_follow_another_reference_and_another_state(parts, monkeypatch, ahead):
    """A CUDA graph is imitated: it computes with the tensors that were there when it was captured, and writes to one place."""
    def capture(graphs):
        stream, keys = graphs.stream, [ring.ref_keys for ring in graphs.stream.rings]

        def replay():
            now = [ring.ref_keys for ring in stream.rings]
            for ring, at_capture in zip(stream.rings, keys):
                ring.ref_keys = at_capture
            out.copy_(graphs.plain(graphs.x, graphs.conds, graphs.moved))
            for ring, mine in zip(stream.rings, now):
                ring.ref_keys = mine
        out = torch.empty(first.shape)
        made.append(replay)
        return SimpleNamespace(replay=replay), out
    made, plain, first = [], begin(parts, replace_ref=True), begin(parts, replace_ref=True)
    monkeypatch.setattr(BlockGraphs, "capture", capture)
    BlockGraphs(first.stream).get_ready(torch.ones(first.shape), torch.ones_like(parts.sound[0]), capture=ahead)
    assert len(made) == 2 * ahead and first.stream.frame == 0        # a window of 6 frames has two places for a block
    for i, sound in enumerate(parts.sound[:5]):
        assert torch.equal(first.block(sound), plain.block(sound))
    assert len(made) == 2 * ahead + 2
    first.restore(plain.state())
    assert torch.equal(first.block(parts.sound[5]), plain.block(parts.sound[5])) and len(made) == 2 * ahead + 3


def test_what_graphs_gave_stays(parts, monkeypatch):
    """A graph writes each block to one place; the block before may still be being decoded."""
    def capture(graphs):
        place = torch.zeros_like(graphs.x)
        return SimpleNamespace(replay=lambda: place.copy_(graphs.plain(graphs.x, graphs.conds, graphs.moved))), place
    monkeypatch.setattr(BlockGraphs, "capture", capture)
    video, again = begin(parts, window=3), begin(parts, window=3)
    BlockGraphs(video.stream)
    made = [video.latents(sound) for sound in parts.sound[:4]]
    assert all(torch.equal(x, again.latents(sound)) for x, sound in zip(made, parts.sound))


def test_8_bit_values_have_room():
    """As exact if they are 60 times as large as the condition tokens', and in a head whose condition tokens are nearly zero."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(1, 512, 3, 32, generator=g) * torch.tensor([1, 0.1, 1e-6])[:, None]
    scales = value_scales(values)

    def error(head, factor):
        later = values[0, :, head] * factor
        return relative_error(fp8.cast(later / scales[head]).float() * scales[head], later)
    assert max(error(0, 1), error(0, 60), error(1, 60), error(2, 1e6)) < 0.03 < 0.3 < error(0, 300)


def test_blocks_are_those_of_the_whole_video(parts):
    """The decoder's stream has no seams: the same as decoding all latents at once behind those of the still picture."""
    viewer, latents = begin(parts), []
    block = viewer.stream.block
    viewer.stream.block = lambda *args: latents.append(block(*args)) or latents[-1]
    frames = torch.cat([viewer.block(sound) for sound in parts.sound[:3]], dim=2)
    lead = live.still(parts.vae, parts.picture)[1].expand(-1, -1, live.LEAD_LATENTS, -1, -1)
    whole = parts.vae.decode(torch.cat([lead, *latents], dim=2))[:, :, -36 + live.WARM_UP:]
    assert frames.shape == whole.shape and (frames - whole).abs().max() < 2e-5


def test_nothing_grows(parts):
    """Bytes of all tensors that are alive, once the ring is full."""
    def alive():
        gc.collect()
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
        return sum(storages.values())
    viewer, seen = begin(parts, steps=1, window=3), []
    for _ in range(3):
        for sound in parts.sound[:4]:
            viewer.block(sound)
        seen.append(alive())
    assert seen[0] == seen[1] == seen[2], seen


def test_there_is_no_longest_video(parts):
    """Far beyond the 45000 latent frames at which the original ends, angles are still those of the frame's number in float64."""
    viewer, f = begin(parts, steps=1, window=3), 3 * 10 ** 7
    viewer.stream.frame = f
    assert viewer.block(parts.sound[0]).isfinite().all() and viewer.stream.frame == f + 3
    table = rope_table(torch.tensor([[f + 1.0, 0, 0]], dtype=torch.float64), 12)
    assert torch.equal(viewer.stream.rope([f + 1])[:, :1, :, :2], live.rounded(table[..., :2]))
    wide = rope_table(torch.tensor([[f + 1.0, 0, 0]], dtype=torch.float64), 128)[:, 0, 0, :22]
    angles = (f + 1) * 10000.0 ** (-np.arange(22) / 22)              # the 44 numbers of a head of 128 that stand for time, two an angle
    assert np.abs(wide.numpy() - [np.cos(angles), np.sin(angles)]).max() < 1e-6


def test_the_ring_of_a_gpu_gives_the_same_numbers(parts):
    """fast/blocks.py and fast/rings.py, here on a CPU."""
    viewers = begin(parts), live.Live(live.prepare([FastDenoiser(parts.net)] * 2, parts.vae, parts.text, parts.picture), 42, 6, ring=GPURing)
    for sound in parts.sound[:4]:
        a, b = (viewer.latents(sound) for viewer in viewers)
        assert (a - b).norm() < 1e-5 * a.norm()


def test_the_ring_of_a_gpu_copies_what_was_made_elsewhere(parts):
    picture, g = begin(parts).picture, torch.Generator().manual_seed(4)
    mine, theirs = (live.Live(picture, 42, 6, ring=kind).stream.rings[0] for kind in (GPURing, live.Ring))
    q, k, v = (torch.randn(1, live.BLOCK * mine.n, *mine.layers[0].shape[3:], generator=g) for _ in range(3))
    moved = torch.stack([torch.ones(mine.n, 1, q.shape[3] // 2), torch.zeros(mine.n, 1, q.shape[3] // 2)])
    a, b = (ring.attend(q.clone(), k, v, 1, 3, 6, moved) for ring in (mine, theirs))
    assert (a - b).norm() < 1e-6 * b.norm() and torch.equal(mine.layers[1], theirs.layers[1])


def test_teacher_forcing_is_the_ring(parts):
    """What a denoiser is trained on, a whole stretch in one forward, is what a stream computes block by block from the same noisy latents."""
    g, net, blocks, window = torch.Generator().manual_seed(2), parts.net, 5, 6
    picture = begin(parts, steps=1, window=window).picture
    noisy, ahead = torch.randn(1, 16, 3 * blocks, 8, 8, generator=g), [30, 4, 20, 30, 11]
    ref, still = torch.randn(1, 16, 1, 8, 8, generator=g), picture.motion[:, :, :1]
    sound = torch.cat(list(parts.sound[:blocks]), dim=-1)
    stretch = streams.Stretches(noisy, ref, still, sound, None, None)
    stream, wanted = live.Stream(live.sinks([net], parts.text, ref, picture.motion), window), []
    with torch.no_grad():
        tables = streams.tables(net.cfg, (3 * blocks, 4, 4), 0, ahead)
        got = streams.velocities(net, noisy, stream.timesteps[:1], parts.text, stretch, *tables, window)
        for b in range(blocks):
            cond, = stream.conditions(parts.sound[b])
            wanted.append(stream.velocity(0, noisy[:, :, 3 * b:3 * b + 3], cond, stream.moved(ahead[b])))
            stream.frame += 3
    gaps = [((got[:, :, 3 * b:3 * b + 3] - wanted[b]).norm() / wanted[b].norm()).item() for b in range(blocks)]
    print(gaps)
    assert max(gaps) < 1e-5


def test_training_by_it_writes_loras(tmp_path, monkeypatch):
    """`train.py live` on made-up stretches: two steps, one per expert, and files that merge."""
    def drawn(nets, sound, tokens, n, g):
        T = 3 * streams.BLOCKS
        latents, ref, still = (torch.randn(n, 16, frames, 8, 8, generator=g) for frames in (T, 1, 1))
        return streams.Stretches(latents, ref, still, torch.randn(n, 5, 64, 4 * T, generator=g), torch.ones(n, 1, T, 8, 8), tokens([""] * n))
    monkeypatch.setattr(streams, "drawn_stretches", drawn)
    soundfile.write(tmp_path / "a.wav", np.zeros(16000, np.int16), 16000)
    assert train.main(["live", *f"--speech {tmp_path} --out {tmp_path} --to {tmp_path}/live --steps 2 --batch 1 --pool 2 --fresh 1 --lora 2 "
                       "--warmup 1 --device cpu".split()]) == 0
    source = checkpoints.open_checkpoint(HERE / "weights" / "tiny")
    merged = live_plan.with_loras(source, [f"{side}={tmp_path}/live.{side}.safetensors" for side in ("high", "low")])
    name = "blocks.0.self_attn.q.weight_scale"                       # float8 is cast anew
    assert all(not torch.equal(*(c.parts[expert].tensors[name].read() for c in (source, merged))) for expert in source.experts)


def test_lora_keys(tmp_path):
    """Without `.default`, or behind base_model.model., they mean the same; one that fits nowhere is refused by its name."""
    meta = json.loads((GOLDEN / "live_lora.json").read_text())
    model, tensors = meta["modules"]["model"], {name: entry.read() for name, entry in entries(meta["modules"]["lora"]).items()}
    _, config, _ = names.identify(model["class"], model["constructor"], entries(model))
    spellings = [lambda key: key, lambda key: key.replace(".default", ""), lambda key: "base_model.model." + key]
    changes = []
    for i, spelling in enumerate(spellings):
        save_file({spelling(name): tensor for name, tensor in tensors.items()}, tmp_path / f"{i}.safetensors")
        changes.append(lora.read_lora(tmp_path / f"{i}.safetensors", config, 0.5)[0])
        assert len(changes[-1]) == 28 and all(torch.equal(change(), changes[0][name]()) for name, change in changes[-1].items())
    save_file(tensors | {"blocks.9.self_attn.q.lora_A.default.weight": torch.zeros(8, 48)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.9\.self_attn\.q\.lora_A\.default\.weight belongs to no parameter"):
        lora.read_lora(tmp_path / "wrong.safetensors", config)


# ---------------------------------------------------------------------------------------------------------------- sound that comes

@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    net = Wav2Vec2(AudioConfig(dim=32, ffn_dim=32, n_head=2, n_layer=2, conv_dim=(16,) * 7, pos_kernel=8, pos_groups=2)).eval()
    for p in net.pos_conv.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize("fps", [16, 25])
def test_what_is_heard_live_is_what_the_file_says(encoder, fps):
    """State 0 has no attention: with all of the past it differs from the file's only where audio frames at 30 a second stand, by up to 13 ms."""
    wav = torch.from_numpy(soundfile.read(VOICE, dtype="float32")[0])
    n = int(len(wav) / 16000 * fps) // 12 * 12
    whole, _ = audio_features(encoder, wav, fps=fps, clip_frames=12)
    listening, read, blocks = Listening(encoder, fps, behind=60, ahead=0.3), 0, []
    for first in range(0, n, 12):
        piece = wav[read:listening.wanted(first + 12)]
        read += len(piece)
        listening.hear(piece, last=read == len(wav))
        blocks.append(listening(first, first + 12))
    ours, theirs = torch.cat(blocks, dim=2)[0], whole[0, :, :n]
    corr = torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]
    shifted = torch.corrcoef(torch.stack([ours[:, 1:].flatten(), theirs[:, :-1].flatten()]))[0, 1]
    print(fps, float(corr), float(shifted))
    assert corr > 0.97 and corr > shifted + 0.05


def test_listening_survives_silence_and_the_end(encoder):
    """Digital silence gives numbers; frames after the end of the sound are zeros, as in a file; the window does not grow."""
    listening = Listening(encoder, 25, behind=1.0)
    for first in range(0, 120, 12):
        listening.hear(torch.zeros(listening.wanted(first + 12) - listening.heard))
        assert listening(first, first + 12).isfinite().all()
        assert len(listening.window) < 16000 * 2
    listening.hear(torch.rand(3200), last=True)                      # 0.2 s more
    tail = listening(120, 132)
    seconds = listening.heard / 16000
    assert tail[..., :int(seconds * 25) - 121].abs().sum(dim=(0, 1)).min() > 0 and not tail[..., int(seconds * 25) + 1 - 120:].any()


def test_sound_under_the_picture():
    """As many samples as frames last, whatever pieces they come in; later or earlier as asked."""
    samples = np.arange(16000, dtype=np.float32)[:, None]
    for shift, wanted in ((0, samples), (0.1, np.concatenate([np.zeros((1600, 1), np.float32), samples])), (-0.1, samples[1600:])):
        under = program.Under(16000, 1, 25, shift, np.array_split(samples, 7))
        under.hear(torch.zeros(0))                                   # what a pipe gives that ends where a block does
        got = [under.below(frames) for frames in (9, 12, 1, 12, 12)]
        assert np.array_equal(np.concatenate([part for part in got if part is not None]), wanted[:46 * 640])


def test_live_frames_leave_as_they_are_decoded(parts):
    """A latent at a time; of a file a block. They are the same."""
    sound = [(features[0], 100) for features in parts.sound[:2]]
    whole, split = ([frames for frames, _ in program.pictures(begin(parts), sound, torch.device("cpu"), there)] for there in (True, False))
    assert [x.shape[1] for x in whole] == [9, 12] and [x.shape[1] for x in split] == [1, 4, 4, 4, 4, 4]
    assert (torch.cat(whole, 1) - torch.cat(split, 1)).abs().max() < 1e-5


def test_a_player_waits_for_the_latest_part_of_a_block(monkeypatch):
    """Parts of 4 frames last 0.16 s at 25 fps: 0.2, 0.14 and 0.08 s late in the first block, 0.1, 0.3 and 0.14 in the second, the same in the third."""
    now, sound = iter([10.2, 10.3, 10.4, 10.58, 10.94, 10.94, 11.06, 11.42, 11.42]), [(None, None, there) for there in (10, 10.48, 10.96)]
    clock = program.Clock(25, None, 0.76)
    monkeypatch.setattr(program.time, "perf_counter", lambda: next(now))
    for _ in clock.waiting(sound):
        for _ in range(3):
            clock.wrote(4)
    assert str(clock) == f"{36 / 1.32:.1f} frames/s while working, {36 / 1.32 / 25:.2f} times real time; " \
                         "half of the last 3 blocks were seen within 1.06 s after they were heard"


@pytest.mark.parametrize("alone", [True, False])
def test_a_reader_that_stalls_is_no_work(monkeypatch, alone):
    """Three blocks of a file in a second each; of the second the reader takes nothing for 5 s more."""
    now = iter([11, 17, 18])
    clock = program.Clock(25, None, None, alone)
    monkeypatch.setattr(program.time, "perf_counter", lambda: next(now))
    for _, waited in zip(clock.waiting([(None, None, 10)] * 3), (0, 5, 5)):
        clock.wrote(12, waited)
    assert str(clock) == "12.0 frames/s while working, 0.48 times real time"


def test_sound_is_encoded_while_a_block_is_made(monkeypatch):
    """In a thread, one block ahead; what fails there fails here, behind the blocks before it."""
    def sound():
        for block in range(3):
            threads.append(threading.current_thread())
            yield block
        raise OSError("the reader has gone")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(program.stop, "abrupt", False)
    threads, blocks = [], program.ahead(sound(), torch.device("cpu"))
    assert next(blocks) == 0
    for _ in range(5000):                                            # the third waits for room
        time.sleep(0.001 if len(threads) < 3 else 0)
    assert [next(blocks), next(blocks)] == [1, 2] and {*threads} == {threads[0]} != {threading.current_thread()}
    with pytest.raises(OSError, match="the reader has gone"):
        next(blocks)
    assert [*program.ahead(iter(range(5)), torch.device("cpu"))] == [*range(5)]


def test_a_thread_that_computes_does_not_abort_the_end():
    """Python's end takes a thread down inside of PyTorch: std::terminate, status 134."""
    text = """
import torch
from jobs import live, stop
torch.cuda.Stream = lambda device: None
def blocks():
    net, x = torch.nn.Conv1d(64, 64, 9), torch.randn(1, 64, 16000)
    yield 0
    while True:
        net(x)
assert next(live.ahead(blocks(), None)) == 0
stop.end(2)
raise SystemExit(2)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, ""), done


def test_a_pipe_may_come_in_pieces():
    class Pieces(io.BytesIO):
        def read(self, n):
            return super().read(min(n, 5))
    samples, file = np.arange(7, dtype="<i2"), Pieces(np.arange(7, dtype="<i2").tobytes())
    assert torch.equal(out.pcm(file, 4), torch.from_numpy(samples[:4] / np.float32(32768)))
    assert len(out.pcm(file, 4)) == 3 and len(out.pcm(file, 4)) == 0
