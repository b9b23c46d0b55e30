"""The committed tiny checkpoint, end to end: lips follow the sound in the written file.

    python -m pytest -s tests/test_tiny.py        half a minute on a CPU

One frame off, the sound of another clip, a later clip that is not decoded behind the one before it, and motion tokens that are left out fail here.
"""
import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import soundfile
import torch

import sample
from audio import audio_features
from media.sound import load_audio
from formats.checkpoints import open_checkpoint
from sampling import denoise, make_solver
from tiny import faces, metrics
from wan_s2v import Networks, Stages, WanS2VPipeline, encode_text, load_experts

HERE = Path(__file__).parents[1]
VOICE, ITALIAN, FACE, WEIGHTS = (HERE / name for name in ("samples/voice.flac", "samples/italian.flac", "samples/face.png", "weights/tiny"))


def make(out, *arguments):
    """A video of the committed checkpoint -> frames, measured and target mouths."""
    assert sample.cli(["--image", str(FACE), "--ckpt", str(WEIGHTS), "--out", str(out), "--device", "cpu", *map(str, arguments)]) == 0
    frames, fps = metrics.read_video(out)
    return frames, metrics.measure(frames)[:, 0], metrics.target_of(out, frames.shape[1], fps)[0][:, 0]


def test_is_small():
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 16e6
    checkpoint = open_checkpoint(WEIGHTS)
    assert checkpoint.experts == ["denoiser_high", "denoiser_low"] and checkpoint.boundary and "drawn faces" in checkpoint.note


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Two clips: the first hears the committed voice, the second another one -> frames, measured and target mouths, what was printed on stderr"""
    folder, said = tmp_path_factory.mktemp("spoken"), io.StringIO()
    soundfile.write(folder / "long.wav", torch.cat([load_audio(VOICE)[:16000 * 29 // 16], load_audio(ITALIAN)]).numpy(), 16000)
    with redirect_stderr(said):
        made = make(folder / "a.mp4", "--audio", folder / "long.wav", "--duration", 3.8, "--clip-frames", 32, "--clips", 2, "--steps", 3)
    return *made, said.getvalue()


def test_the_first_video_speaks_at_once(spoken):
    """The committed voice begins within 0.1 s, and the mouth of the committed face is open in the fifth frame."""
    wav, seen = load_audio(VOICE), spoken[1]
    loud = (wav.abs() > 0.05 * wav.abs().max()).nonzero()[0].item() / 16000
    assert 0.05 < loud < 0.15 and seen[:5].max() > 0.5, (loud, seen[:5])


def test_lips_follow_the_sound(spoken):
    frames, seen, wanted, said = spoken
    lag, best, now = metrics.sync(seen[:29], wanted[:29])
    other = metrics.correlation(seen[:29], faces.articulation(load_audio(ITALIAN, 0, 1.9), torch.arange(29) / 16)[:, 0])
    print(f"opening: r {now:.3f} at lag 0, best at {lag:+d}; with another sound {other:.3f}")
    assert frames.shape[1] == 61 and lag == 0 and now >= 0.7 and other < 0.5
    assert "unlike the pictures" not in said


def test_later_clip_goes_on(spoken):
    """The second clip hears its own sound and joins the first: mouth in time, same colours, no large jump."""
    frames, seen, wanted, _ = spoken
    first, later = ((seen[part], wanted[part]) for part in (slice(0, 29), slice(29, 60)))
    picture = metrics.fit_picture(metrics.load_image(str(FACE)), frames.shape[2:])
    clips, seam = metrics.drift(frames[:, :60], picture, clip_frames=32, first=29)
    print(f"opening: r {metrics.correlation(*first):.3f}, then {metrics.correlation(*later):.3f}; seam {seam:.2f} frame differences; {clips}")
    assert metrics.correlation(*first) >= 0.7 and metrics.sync(*later)[0] == 0 and metrics.correlation(*later) >= 0.7
    assert seam < 4 and all(clip["colour"] < 0.06 for clip in clips)


def test_later_clip_remembers_the_past():
    """The reference picture is green, the 73 frames before the clip are yellow: with motion tokens the clip stays yellow, without it turns green."""
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    checkpoint, wav = Networks(open_checkpoint(WEIGHTS), keep=False), load_audio(VOICE)
    plan = WanS2VPipeline(checkpoint).plan(audio=VOICE, image=FACE)
    vae, experts = checkpoint.load("vae", cpu, torch.float32), load_experts(checkpoint, plan, Stages())
    (text, *_), (states, _) = encode_text(checkpoint, [""], plan), audio_features(checkpoint.load("audio", cpu, torch.float32), wav, 16, 40)
    green, yellow = (faces.apply(faces.held_out_identities(1), background=colour) for colour in ("green", "yellow"))
    past = faces.draw(yellow, torch.zeros(1, 73, 4), faces.articulation(wav, torch.arange(73) / 16)[None])
    with torch.no_grad():
        ref, motion = vae.encode(faces.reference(green, generator)[:, :, None]), vae.encode(past)
        seen = []
        for tokens in (motion, None):
            arguments = dict(shape=(10, 16, 16), text=text, audio=states[None, ..., :40], ref=ref, motion=tokens)
            noise = torch.randn(1, 16, 10, 16, 16, generator=torch.Generator().manual_seed(1))
            latents = denoise(experts.begin(arguments, arguments, (1.0,)), make_solver("unipc", 4, 3.0), noise)
            frame = vae.decode(latents[:, :, -2:])[0, :, -1]             # alone: nothing of the past but what was denoised
            stills = [faces.reference(face, torch.Generator().manual_seed(0))[0] for face in (yellow, green)]
            seen.append([(frame - still).square().mean().sqrt().item() for still in stills])
    (kept, _), (_, forgotten) = seen
    print("distances to the past and to the picture, with motion tokens, then without:", seen)
    assert kept < 0.6 * seen[0][1] and forgotten < 0.6 * seen[1][0]


def test_unknown_picture_is_said(tmp_path, capsys):
    metrics.to_picture(torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1).save(tmp_path / "noise.png")
    assert sample.cli(["--image", str(tmp_path / "noise.png"), "--audio", str(VOICE), "--clips", "1", "--clip-frames", "4", "--steps", "1",
                       "--out", str(tmp_path / "c.mp4"), "--device", "cpu"]) == 0
    assert "unlike the pictures" in capsys.readouterr().err
