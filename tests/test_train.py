"""Training on a small scale: every stage lowers its loss, resume is exact, what is exported runs, LoRAs merge as they were trained.

    python -m pytest -s tests/test_train.py        half a minute on a CPU
"""
import os
import shutil
import socket
import types
from functools import cache

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from ranks import forked

import convert_weights
import sample
import sampling
import train
from audio import AudioConfig
from media.sound import RATE
from fast import fp8
from formats import checkpoints, lora
from media.video import VideoWriter
from model import Config
from text import TextConfig
from tiny import clips as tiny_clips
from tiny import faces, networks, optimise, speech, stages
from tiny.clips import Clips
from vae import VAEConfig

STAGES = {"audio": ["audio"], "vae": ["vae"], "dit_both": ["dit"]} | {f"dit_{e}": ["dit", "--expert", e] for e in ("high", "low")}
STEPS = {"audio": 16, "vae": 12}                 # of the others 8
CLIP, PAST = 16, 9                               # pixel frames, instead of 80 and 73
SMALL = {
    train: dict(CLIP=CLIP, PAST=PAST, load_audio=cache(train.load_audio), frames_at=cache(train.frames_at)),    # the same files again and again
    speech: dict(load_folder=cache(speech.load_folder)),
    tiny_clips: dict(CLIP=CLIP, PAST=PAST),
    stages: dict(LONG=5, PHASES=((0.5, 1, 32, 2), (0.5, 5, 32, 1))),
    networks: dict(AUDIO_CONFIG=AudioConfig(dim=16, ffn_dim=16, n_head=2, n_layer=1, conv_dim=(8,) * 7, pos_kernel=4, pos_groups=2),
                   TEXT_CONFIG=TextConfig(vocab=1024, dim=16, dim_attn=16, ffn=16, n_head=2, n_layer=1),
                   VAE_CONFIG=VAEConfig(dim=4, dec_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1),
                   DENOISER_CONFIG=Config(dim=32, ffn_dim=32, n_head=2, n_layer=2, text_dim=16, text_len=32, freq_dim=16, audio_dim=16,
                                          audio_states=2, audio_layers=(0,)))}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small():
    """The same code with small networks and short clips, files read once."""
    with pytest.MonkeyPatch.context() as patch:
        for module, values in SMALL.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        yield


def program(argv):
    """The module whose command line this is."""
    return train if argv[0] in ("dit", "tune") else stages


def main(argv):
    return program(argv).main(argv)


def parse(*argv):
    return program(argv).parse(list(argv))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tone(seconds, seed=0):
    """Syllables of a kind: a buzz that swells four times a second."""
    t = np.arange(round(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * np.pi * f * t) for f in (150, 450, 900 + 300 * seed, 2100))
    return (0.1 * buzz * np.maximum(0, np.sin(2 * np.pi * 4 * t + seed))).astype(np.float32)


@pytest.fixture(scope="module", name="speech")
def speech_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    for i in range(2):
        soundfile.write(folder / f"{i}.wav", tone(7, i), RATE)
    return folder


def arguments(stage, speech, out):
    pool = ["--pool", "2", "--fresh", "1", "--every", "3"] if stage.startswith("dit") else []
    return [*STAGES[stage], "--speech", str(speech), "--out", str(out), "--steps", str(STEPS.get(stage, 8)), "--batch", "2", "--lr", "3e-3",
            "--warmup", "2", "--ema", "0.5", "--device", "cpu", *pool]


@pytest.fixture(scope="module")
def runs(speech, tmp_path_factory):
    """A folder in which all stages were trained."""
    out = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        assert main(arguments(stage, speech, out)) == 0
    return out


@pytest.fixture(scope="module")
def tiny(runs):
    """Two experts in bfloat16, exported from them."""
    assert main(["export", "--out", str(runs), "--to", str(runs / "tiny"), "--no-fp8"]) == 0
    return runs / "tiny"


def state(path):
    return torch.load(path, weights_only=True)


def alike(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------ what is trained on

@pytest.mark.parametrize("expert", ["both", "high", "low"])
@pytest.mark.parametrize("shift, boundary", [(3.0, 0.875), (5.0, 0.9), (1.0, 0.5)])
def test_noise_levels(expert, shift, boundary):
    """Shifted as the sampler's steps are, evenly distributed before that, and on the expert's side of the boundary."""
    sigma = train.noise_levels(4000, shift, boundary, expert, seeded()).sort().values
    least, most = {"both": (0, 1), "high": (boundary, 1), "low": (0, boundary)}[expert]
    assert least - 1e-6 <= sigma[0] and sigma[-1] <= most + 1e-6
    steps = torch.from_numpy(sampling.schedule(1000, shift, 1.0)[0].numpy()[::-1].copy())
    steps = steps[(steps >= least) & (steps <= most)]                # of a sampler with 1000 steps, those that are the expert's
    share = torch.linspace(0.01, 0.99, 99)
    assert (sigma.quantile(share) - steps.quantile(share)).abs().max() < 0.04 * (most - least)


class Recorder:
    """A denoiser that keeps what it is given and answers with `v`."""

    def __init__(self, v):
        self.v = v

    def prepare(self, *given):
        self.given = given
        return "cond"

    def __call__(self, *seen):
        self.seen = seen
        return self.v


def random_clips(n, later=True):
    g = seeded(1)
    size = dict(latents=(n, 3, 4, 2, 2), ref=(n, 3, 1, 2, 2), motion=(n, 3, 3, 2, 2), audio=(n, 2, 5, 16), weight=(n, 1, 4, 2, 2))
    clips = {name: torch.rand(shape, generator=g) + 1 for name, shape in size.items()} | {"ids": torch.arange(1, 6).repeat(n, 1)}
    return Clips(**clips if later else clips | {"motion": None})


@pytest.mark.parametrize("later", [False, True])
def test_velocity_loss(later):
    """The network gets all of a clip and a straight mixture of it with noise, and is to say where the noise is, seen from the clip."""
    clips, text, sigma = random_clips(3, later), torch.rand(3, 5, 4), torch.tensor([0.0, 0.25, 1.0])
    eps = torch.randn(clips.latents.shape, generator=seeded(2))
    error = torch.zeros_like(eps)
    error[1, :, 2] = 2                                               # one latent frame of one clip is off by 2
    net = Recorder(eps - clips.latents + error)
    loss = train.velocity_loss(net, clips, text, sigma, eps)
    size, *given = net.given
    assert tuple(size) == (4, 2, 2) and all(x is y for x, y in zip(given, (text, clips.audio, clips.ref, clips.motion), strict=True))
    x, t, cond = net.seen
    assert torch.equal(x[0], clips.latents[0]) and torch.equal(x[2], eps[2]) and cond == "cond" and t.tolist() == [0, 250, 1000]
    torch.testing.assert_close(x[1], 0.75 * clips.latents[1] + 0.25 * eps[1])
    torch.testing.assert_close(loss, 4 * clips.weight[1, :, 2].sum() / clips.weight.sum())


@pytest.mark.parametrize("drop, least, most", [(0.0, 0, 0), (0.25, 0.2, 0.3), (1.0, 1, 1)])
def test_sound_and_caption_are_dropped_together(drop, least, most):
    clips = random_clips(1000)
    left = train.drop_conditions(clips, drop, seeded(), 7)
    silent = (left.audio == 0).flatten(1).all(1)
    assert least <= silent.float().mean() <= most
    assert torch.equal(left.audio[~silent], clips.audio[~silent])
    assert torch.equal(left.ids, torch.where(silent[:, None], torch.tensor([7, 0, 0, 0, 0]), clips.ids))
    assert all(getattr(left, name) is getattr(clips, name) for name in ("latents", "ref", "motion", "weight"))


@pytest.mark.parametrize("later", [False, True])
def test_noise_is_drawn_for_latents_and_motion(later):
    before = random_clips(1000, later)
    clips, eps = train.draw_noise(before, 0.5, seeded())
    assert eps.shape == clips.latents.shape and abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert all(x is y for x, y, name in zip(clips, before, Clips._fields) if name != "motion")
    if not later:
        assert clips.motion is None
    else:                                                            # standard deviations from 0 to 0.5, evenly distributed
        amount = (clips.motion - before.motion).flatten(1).square().mean(dim=1).sqrt()
        assert amount.min() < 0.02 and 0.4 < amount.max() < 0.8 and abs(amount.mean() - 0.25) < 0.02


@pytest.fixture
def drawn(monkeypatch):
    """What faces.draw was asked for. The picture of frame k is k all over, so that of a later clip is known by its numbers."""
    calls = []

    def draw(identity, motion, mouth, window=None):
        calls.append((identity, motion, mouth))
        return torch.arange(mouth.shape[1]).view(1, 1, -1, 1, 1).expand(len(identity), 3, -1, faces.SIZE, faces.SIZE).float()
    monkeypatch.setattr(faces, "draw", draw)
    return calls


@pytest.mark.parametrize("later", [False, True])
def test_lips_sound_and_latents_of_drawn_clips(later, drawn, monkeypatch):
    """Frame k, which is shown 3 frames earlier, has the mouth of that time, and hears audio frame k of the clip's own."""
    n, frames, heard = 40, CLIP + PAST if later else CLIP, []

    def features(encoder, wav, frames):                              # audio frame c is the number c + 1
        heard.append(wav)
        return torch.arange(1.0, frames + 1).expand(len(wav), 1, 1, -1)
    monkeypatch.setattr(tiny_clips, "features", features)
    eyes = types.SimpleNamespace(encode=lambda video, chunk=None: video.mean((1, 3, 4), keepdim=True)[:, :, ::4])      # its last frame
    sound = tiny_clips.speech.Speech(torch.from_numpy((tone(9) * 32767).astype(np.int16)), torch.tensor([0, 9 * RATE]))
    clips = tiny_clips.drawn_clips({"vae": eyes, "audio": None}, sound, lambda captions: captions, later, n, seeded())
    mouth = [mouth for _, _, mouth in drawn if mouth.shape[1] > 1]
    assert len(mouth) == 1 and torch.equal(mouth[0], faces.articulation(heard[0], (torch.arange(frames) - 3) / 16))
    assert mouth[0][..., 0].std(dim=1).max() > 0.1                   # mouths that move
    assert not any(faces.is_held_out(who).any() for who, _, _ in drawn)
    flat = faces.importance(*drawn[-1])[:1, :, -CLIP:].unflatten(2, (-1, 4)).mean((0, 1, 3, 4, 5))
    share = clips.weight[:1].mean((0, 1, 3, 4)) / flat               # the frame where a later clip joins the one before weighs more
    torch.testing.assert_close(share, torch.tensor([3.0 if later else 1.0] + [1.0] * (CLIP // 4 - 1)))
    start = PAST if later else 0
    assert clips.latents.shape[2] == CLIP // 4
    assert clips.latents[0].flatten().tolist() == list(range(start + 3, start + CLIP, 4))
    assert clips.motion is None if not later else clips.motion[0].flatten().tolist() == list(range(0, PAST, 4))
    own = torch.arange(start + 1.0, start + CLIP + 1)
    assert clips.audio.shape == (n, 1, 1, CLIP) and (clips.audio == own).all(dim=3).any()
    assert ((clips.audio == own) | (clips.audio == 0)).all() and (clips.audio == 0).any()
    for wav, audio in zip(heard[0], clips.audio[:, 0, 0]):           # zeros: behind the end of the sound
        assert not wav[1000 * (start + int((audio != 0).sum())):1000 * frames].any()


def test_pool_slides_with_the_step():
    """Groups 0 to 3 at first, then one more every 3 steps; the kinds take turns, and a new pool draws the same at any step."""
    def make(number):
        return Clips(*(torch.full((2, 1), float(number)) for _ in Clips._fields))
    pool = tiny_clips.Pool(make, 4, 3)
    for step in range(20):
        drawn = pool.draw(step, 100, seeded(step))
        numbers = [number for number in range(step // 3, step // 3 + 4) if number % 2 == step % 2]
        assert sorted(set(drawn.latents.flatten().tolist())) == numbers and len(pool.held) <= 4
        assert alike(drawn, tiny_clips.Pool(make, 4, 3).draw(step, 100, seeded(step)))


def test_drawn_pictures_show_no_held_out_face(drawn, speech):
    for frames in (1, 5):
        stages.drawn_videos(64, frames, seeded(), tiny_clips.speech.load_folder(speech))
    assert len(drawn) == 3 and not any(faces.is_held_out(who).any() for who, _, _ in drawn)


# ---------------------------------------------------------------------------------------------------------- several processes

def averaged(rank, folder, env):
    """In a fork, of which it is the end."""
    status = 1
    try:
        os.environ |= env | dict(RANK=str(rank))
        optimise.start("cpu")
        a, unused, b = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 4, 3))
        a.grad, b.grad = torch.tensor([1.0, 2.0]) + rank, torch.full((3,), 10.0 * rank)
        optimise.average_gradients([a, unused, b])
        (folder / str(rank)).write_text(f"{a.grad.tolist()} {unused.grad} {b.grad.tolist()}")
        status = 0
    finally:
        os._exit(status)


def test_gradients_are_averaged_over_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")         # works without any network
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME=loopback)
    assert not forked(2, 60, averaged, tmp_path, env)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[1.5, 2.5] None [5.0, 5.0, 5.0]"] * 2


def test_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    names = [("cpu", "cpu"), ("cuda", "cuda:0"), ("auto", "cuda:0"), ("cuda:1", "cuda:1")]
    assert all(optimise.start(name) == torch.device(wanted) for name, wanted in names)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert optimise.start("cuda") == optimise.start("auto") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda", index) for index in (0, 0, 1, 1, 1)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert optimise.start("auto") == torch.device("cpu")
    for name, message in (("gpu", "device must be cpu, cuda, cuda:1 or auto, got gpu"), ("cuda", "got cuda:1: PyTorch .* sees 0 CUDA GPUs")):
        with pytest.raises(ValueError, match=message):
            optimise.start(name)


# --------------------------------------------------------------------------------------------------------------- the stages

@pytest.mark.parametrize("stage", STAGES)
def test_training_lowers_the_loss(stage, runs, speech):
    o = parse(*arguments(stage, speech, runs))
    make = {"audio": stages.audio_stage, "vae": stages.vae_stage}.get(stage, train.dit_stage)
    torch.manual_seed(0)
    made, losses = make(o, CPU), []
    steps = [0, o.steps - 1] if stage == "vae" else range(4)         # of both phases; of both kinds of clip
    for trained in (False, True):
        if trained:
            for kind, net in made.nets.items():
                net.load_state_dict(state(runs / f"{stage}.weights.pt")[kind])
        with torch.no_grad():
            losses.append(sum(made.loss(*made.batch(step)).item() for step in steps) / len(steps))
    print(f"{stage}: {losses[0]:.4f} -> {losses[1]:.4f}")
    assert losses[1] < 0.97 * losses[0]
    assert (runs / f"{stage}.png").is_file() and len((runs / f"{stage}.txt").read_text().splitlines()) == o.steps + 1


def test_noise_and_own_decodings_enter_the_loss(speech, runs):
    """Only long videos are replaced, the first half of them, by decodings of noisy latents: what the decoder then sees no longer is the drawing."""
    losses = {}
    for noise, own in ((0, 0), (0.5, 0), (0, 0.4), (0, 1e-6)):
        o = parse(*arguments("vae", speech, runs), "--latent-noise", str(noise), "--own", str(own))
        torch.manual_seed(0)
        made = stages.vae_stage(o, CPU)
        made.nets["vae"].load_state_dict(state(runs / "vae.weights.pt")["vae"])
        for step in (0, o.steps - 1):
            with torch.no_grad():
                losses[noise, own, step > 0] = made.loss(*made.batch(step)).item()
    print({key: round(value, 4) for key, value in losses.items()})
    for long in (False, True):
        assert losses[0.5, 0, long] != losses[0, 0, long]
        assert (losses[0, 1e-6, long] == losses[0, 0, long]) is not long
    assert losses[0, 1e-6, True] < losses[0, 0, True]                # it gives its own decodings back better than drawings
    assert losses[0, 0.4, True] != losses[0, 1e-6, True]


@pytest.mark.parametrize("stage", ["audio", "vae", "dit_both"])
def test_resume_is_exact(stage, runs, speech, tmp_path):
    for name in ("audio.weights.pt", "vae.weights.pt"):
        shutil.copy(runs / name, tmp_path)
    argv = arguments(stage, speech, tmp_path)
    for stop in (5, 0):
        assert main([*argv, "--stop", str(stop), "--save", "4"]) == 0
    once, twice = state(runs / f"{stage}.pt"), state(tmp_path / f"{stage}.pt")
    assert alike(once["weights"], twice["weights"]) and alike(once["average"], twice["average"])
    assert [row[:2] for row in once["log"]] == [row[:2] for row in twice["log"]]
    moments = [[x for p in s["optimiser"]["state"].values() for x in p.values()] for s in (once, twice)]
    assert alike(*moments)


def test_step_of_the_optimiser(tmp_path):
    """Six steps beside six written out: learning rate with warmup and cosine, clipped gradient, AdamW, averaged weights."""
    net, w = torch.nn.ModuleDict({"x": torch.nn.Linear(1, 1, bias=False)}), torch.nn.Parameter(torch.tensor([[2.0]]))
    with torch.no_grad():
        net["x"].weight.fill_(2)
    stage = optimise.Stage(net, lambda step: (None, torch.tensor(step + 1.0)), lambda _, factor: factor * net["x"].weight.square().sum())
    o = parse("dit", "--out", str(tmp_path), "--steps", "6", "--lr", "0.1", "--warmup", "3", "--decay", "0.2", "--clip", "5", "--ema", "0.3")
    train.train("a", stage, o, CPU)
    optimiser, average, losses = torch.optim.AdamW([w], betas=(0.9, 0.99), weight_decay=0.2), w.detach().clone(), []
    for step, (rate, keep) in enumerate(zip((1 / 3, 2 / 3, 1, 1, 1, 1), (0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3), strict=True)):
        optimiser.param_groups[0]["lr"] = 0.1 * rate * (1 + np.cos(np.pi * step / 6)) / 2
        losses.append((step + 1) * w.item() ** 2)
        w.grad = (2 * (step + 1) * w.detach()).clamp(-5, 5)
        optimiser.step()
        average = keep * average + (1 - keep) * w.detach()
    saved = state(tmp_path / "a.pt")
    torch.testing.assert_close(saved["weights"][0], w.detach())
    torch.testing.assert_close(net["x"].weight.detach(), average)    # is what is left in the network
    torch.testing.assert_close([row[1] for row in saved["log"]], losses, rtol=1e-5, atol=0)


def test_losses_between_two_lines_of_the_log_are_not_lost(tmp_path):
    """The log has a line for several steps; a stop in between changes no number."""
    logs = []
    for name, stops in (("a", [0]), ("b", [1, 4, 201, 0])):
        net = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2)})
        with torch.no_grad():
            net["x"].weight.fill_(1), net["x"].bias.fill_(1)
        stage = optimise.Stage(net, lambda step: (None, torch.tensor(step % 7)), lambda _, factor: (net["x"].weight * factor).square().mean())
        for stop in stops:
            argv = ["dit", "--out", str(tmp_path), "--steps", "400", "--lr", "1e-3", "--warmup", "1", "--stop", str(stop)]
            train.train(name, stage, parse(*argv), CPU)
        logs.append([row[:2] for row in state(tmp_path / f"{name}.pt")["log"]])
    assert len(logs[0]) == 200 and logs[0] == logs[1]


def test_state_of_other_options_is_refused(speech, tmp_path, capsys):
    """And the loss can be looked at before the end."""
    argv = arguments("audio", speech, tmp_path)
    assert main([*argv, "--stop", "4", "--save", "2"]) == 0
    assert len((tmp_path / "audio.txt").read_text().splitlines()) == 5 and (tmp_path / "audio.png").is_file()
    before = (tmp_path / "audio.pt").read_bytes()
    for flag, old, new in (("--seed", 0, 3), ("--lr", 0.003, 0.1), ("--batch", 2, 3), ("--steps", 16, 20), ("--warmup", 2, 3),
                           ("--ema", 0.5, 0.6), ("--decay", 0.01, 0.1), ("--clip", 1.0, 2.0)):
        capsys.readouterr()
        assert main([*argv, flag, str(new)]) == 2
        assert capsys.readouterr().err == (f"error: {tmp_path}/audio.pt was trained with {flag} {old}, got {flag} {new}: "
                                           "remove it, or give another --out\n")
    assert (tmp_path / "audio.pt").read_bytes() == before


@pytest.mark.parametrize("stage, options", [
    ("vae", {"--latent-noise": 0.1, "--own": 0.1}),
    ("dit_low", {"--boundary": 0.5, "--shift": 5.0, "--drop": 0.5, "--motion-noise": 0.5, "--pool": 4, "--fresh": 2, "--every": 9})])
def test_state_of_other_options_of_a_stage_is_refused(stage, options, runs, speech, capsys):
    for flag, new in options.items():
        assert main([*arguments(stage, speech, runs), flag, str(new)]) == 2
        err = capsys.readouterr().err
        assert f"{stage}.pt was trained with {flag} " in err and f"got {flag} {new}: remove it" in err


def test_export_runs(tiny, speech, tmp_path, capsys):
    opened = checkpoints.open_checkpoint(tiny)
    assert (opened.experts, opened.boundary, opened.note) == (["denoiser_high", "denoiser_low"], 0.65, stages.NOTE)
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(tmp_path / "face.png")
    assert sample.cli(["--ckpt", str(tiny), "--audio", str(speech / "0.wav"), "--duration", "1.5", "--image", str(tmp_path / "face.png"),
                       "--out", f"{tmp_path}/frames/", "--steps", "2", "--size", "64x64", "--clip-frames", "16", "--device", "cpu"]) == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) > 16
    alone = tmp_path / "runs"                                        # without the two experts, in float8
    alone.mkdir()
    for name in ("audio.weights.pt", "vae.weights.pt", "dit_both.weights.pt", "tokenizer.json"):
        shutil.copy(tiny.parent / name, alone)
    assert main(["export", "--out", str(alone), "--to", str(tmp_path / "one")]) == 0
    one = checkpoints.open_checkpoint(tmp_path / "one")
    assert one.experts == ["denoiser"] and one.boundary is None
    assert any(entry.dtype == fp8.E4M3 for entry in one.parts["denoiser"].tensors.values())


# -------------------------------------------------------------------------------------------------------------- fine-tuning

@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two videos with sound, of different shapes; one has a caption and a reference picture, the other neither."""
    folder, frames = tmp_path_factory.mktemp("films"), 28
    soundfile.write(folder / "sound.wav", tone(frames / 16), RATE)
    for name, size in (("a", (64, 64)), ("b", (64, 128))):
        with VideoWriter(folder / f"{name}.mp4", size, 16, audio=folder / "sound.wav") as film:
            film.write((torch.arange(frames) / frames * 2 - 1).view(1, -1, 1, 1).expand(3, -1, *size))
    (folder / "a.txt").write_text("a person with green hair")
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(folder / "a.png")
    return folder


def tune(tiny, films, out, *more):
    return main(["tune", "--ckpt", str(tiny), "--data", str(films), "--out", str(out / "state"), "--to", str(out / "new"),
                       "--steps", "4", "--lr", "1e-2", "--warmup", "1", "--device", "cpu", *more])


def test_lora_merges_as_it_was_trained(tiny, films, tmp_path):
    assert tune(tiny, films, tmp_path, "--lora", "2", "--recompute", "--stop", "2") == 0
    assert not list(tmp_path.glob("*.safetensors"))
    assert tune(tiny, films, tmp_path, "--lora", "2", "--recompute") == 0
    given = [f"{side}={tmp_path / 'new'}.{side}.safetensors" for side in ("high", "low")]
    o, source = parse("tune", "--data", str(films), "--lora", "2"), checkpoints.open_checkpoint(tiny)
    merged = convert_weights.prepare(source, loras=given)
    stage = train.tune_stage(o, source, CPU)
    with torch.no_grad():
        trained = [p for p in stage.nets.parameters() if p.requires_grad]
        for p, average in zip(trained, state(tmp_path / "state" / "tune_new_both.pt")["average"], strict=True):
            p.copy_(average)
    clips, rows = train.filmed_folder(source, o, CPU)
    for name, net in stage.nets.items():
        config, tensors = source.configs["denoiser"], merged.parts[name].tensors
        changed = {key: layer for key, layer in net.named_modules() if isinstance(layer, lora.LoRA)}
        assert len(changed) == 2 * 10 + 4                            # of 2 blocks, one with audio
        for key, layer in changed.items():
            assert layer.up.abs().max() > 0
            assert torch.equal(tensors[f"{key}.weight"].read(), layer.layer.weight + layer.up @ layer.down)
        whole = checkpoints.materialise("denoiser", config, tensors, dtype=torch.float32)
        for clip in (clips[0], clips[1]):
            inputs = clip.latents.shape[2:], rows[1][None], clip.audio, clip.ref, clip.motion
            with torch.no_grad():
                said = [each(clip.latents, torch.tensor([900.0]), each.prepare(*inputs)) for each in (net, whole)]
            torch.testing.assert_close(*said, rtol=1e-4, atol=1e-5)
    assert convert_weights.main([str(tiny), str(tmp_path / "merged"), "--lora", given[0], "--lora", given[1]]) == 0


def test_experts_and_kinds_of_clip_take_turns(tiny, films, runs, speech):
    """And every step has noise of its own, the same when it is drawn again."""
    o = parse("tune", "--data", str(films), "--lora", "1")
    tuned = train.tune_stage(o, checkpoints.open_checkpoint(tiny), CPU)
    turns = [tuned.batch(step) for step in range(4)]
    assert [expert for expert, *_ in turns] == ["denoiser_high", "denoiser_low"] * 2
    assert [motion is None for _, _, _, _, motion, *_ in turns] == [True, True, False, False]
    drawn = train.dit_stage(parse(*arguments("dit_both", speech, runs)), CPU)
    assert [drawn.batch(step)[3] is None for step in range(4)] == [True, False] * 2
    for stage in (tuned, drawn):
        noise = [stage.batch(step)[-1] for step in (0, 1, 0)]
        assert torch.equal(noise[0], noise[2]) and not (noise[0][:, :, 0, 0, 0] == noise[1][:, :, 0, 0, 0]).any()


def test_lora_file_has_official_names(tiny, films, tmp_path):
    assert tune(tiny, films, tmp_path, "--lora", "1", "--expert", "low", "--targets", "self_attn.q inject.o", "--steps", "1") == 0
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["new.low.safetensors"]
    keys = set(checkpoints.open_safetensors(tmp_path / "new.low.safetensors"))
    assert "diffusion_model.audio_injector.injector.0.o.lora_A.weight" in keys and len(keys) == 2 * 3
    changes, strength, warning = lora.read_lora(tmp_path / "new.low.safetensors", networks.DENOISER_CONFIG)
    assert len(changes) == 3 and "strength 1 " in strength and warning is None


def test_tuning_all_weights_writes_a_folder(tiny, films, tmp_path):
    """Float8 checkpoints are tuned in full precision and written in float8 again."""
    source = checkpoints.open_checkpoint(tiny)
    convert_weights.save(source, tmp_path / "old", quantize=True)
    assert tune(tmp_path / "old", films, tmp_path, "--lora", "0") == 0
    old, new = (checkpoints.open_checkpoint(folder) for folder in (tmp_path / "old", tmp_path / "new"))
    assert new.parts["denoiser_low"].tensors["blocks.0.ffn.0.weight"].dtype == fp8.E4M3
    for name in old.parts:
        same = [torch.equal(entry.read(), new.parts[name].tensors[key].read()) for key, entry in old.parts[name].tensors.items()]
        assert all(same) != name.startswith("denoiser"), name


def test_picture_and_sound_of_a_film_are_lead_frames_apart(films, monkeypatch):
    """A film gets brighter by one step a frame, and audio frame c is the number c."""
    class Eyes:
        stride = (4, 8, 8)

        def encode(self, video):                                     # the last frame of each latent: its number
            return ((video.mean((1, 3, 4), keepdim=True) + 1) / 2 * 28).round()[:, :, ::4]
    monkeypatch.setattr(train, "audio_features", lambda encoder, wav, fps, clip: (torch.arange(60.0).view(1, 1, -1), 1))
    for lead in (3, 0):
        first, later = train.filmed_clips(films / "b.mp4", Eyes(), None, 1, 128 * 128, lead, CPU)
        for clip, start in ((first, 0), (later, PAST)):
            assert clip.audio.flatten().tolist() == list(range(start + lead, start + lead + CLIP))
            assert clip.latents.flatten().tolist() == list(range(start + 3, start + CLIP, 4))
        assert first.motion is None and later.motion.flatten().tolist() == list(range(0, PAST, 4)) and first.ref.item() == 14


# ----------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv, message", [
    (["vae", "--speech", "EMPTY"], "wanted a folder with sound files"),
    (["dit", "--out", "EMPTY"], "vae.weights.pt is not there: run `python -m tiny.stages vae` first"),
    (["export", "--out", "EMPTY"], "is not there: run"),
    (["tune", "--ckpt", "EMPTY"], "is no checkpoint"),
    (["tune", "--ckpt", "TINY", "--data", "EMPTY"], "got 0 videos: add some"),
    (["tune", "--ckpt", "TINY", "--data", "FILMS", "--targets", "self_attn.x"], "no block has a linear layer self_attn.x: wanted some of"),
    (["tune", "--ckpt", "TINY", "--data", "FILMS", "--lora", "0", "--to", "TINY"], "exists: give a new folder with --to"),
    (["tune", "--ckpt", "TINY", "--data", "SILENT"], "without sound: take it out of the folder")])
def test_bad_input_is_one_line(argv, message, tiny, films, tmp_path, capsys):
    (tmp_path / "silent").mkdir()
    with VideoWriter(tmp_path / "silent" / "a.mp4", (64, 64), 16) as film:
        film.write(torch.zeros(3, 4, 64, 64))
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "TINY": tiny, "FILMS": films, "SILENT": tmp_path / "silent"}
    device = ["--device", "cpu"] if argv[0] != "export" else []
    assert main(argv[:1] + device + [str(places.get(word, word)) for word in argv[1:]]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("option, message", [
    ("--steps=0", "--steps: must be 1 or more, got 0"), ("--stop=-1", "--stop: must be 0 or more, got -1"),
    ("--lr=nan", "--lr: must be 0 or more, got nan"), ("--ema=1.1", "--ema: must be 0 to 1, got 1.1"),
    ("--shift=0", "--shift: must be 0.01 to 100, got 0"), ("--seed=9223372036854775808", "--seed: must be 0 to 9223372036854775807"),
    ("--batch=two", "--batch: invalid number value: 'two'")])
def test_options_have_ranges(option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["dit", option])
    assert message in capsys.readouterr().err


def test_state_of_other_networks_is_refused(tiny, films, tmp_path, capsys):
    for rank, status in (("1", 0), ("2", 2)):
        assert tune(tiny, films, tmp_path, "--lora", rank, "--stop", "1") == status
    assert "is the state of a run with other networks" in capsys.readouterr().err
    assert tune(tiny, films, tmp_path, "--lora", "1", "--lead", "0") == 2
    assert "tune_new_both.pt was trained with --lead 3, got --lead 0: remove it" in capsys.readouterr().err
