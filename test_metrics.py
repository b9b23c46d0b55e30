"""pytest test_metrics.py    the meters on true drawings, where the answer is known; a checkpoint of random numbers through evaluate.py"""
import json
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F

import evaluate
import fake_checkpoint
import faces
import metrics
from audio import RATE
from faces import FPS
from test_speech import voices
from video import VideoWriter

P = 64                       # frames: 4 seconds


def speech(n, seed=0):
    """(n, samples): syllables of uneven pitch, length, loudness and brightness with pauses, different in every row."""
    g, t = torch.Generator().manual_seed(seed), torch.arange(P * RATE // FPS) / RATE

    def wander(rate, low, high):
        """(n, samples) from a random number to the next, `rate` a second"""
        points = low + (high - low) * torch.rand(n, 1, int(rate * P / FPS) + 2, generator=g)
        return F.interpolate(points, len(t), mode="linear", align_corners=True)[:, 0]

    turns = wander(2, 90, 220).double().cumsum(1) / RATE
    buzz = sum(torch.sin(2 * torch.pi * (k * turns % 1)).float() * torch.exp(-k / wander(4, 2, 12)) for k in range(1, 18))
    return 0.1 * buzz * (wander(8, -0.5, 1).clamp(min=0) ** 2)


@pytest.fixture(scope="module")
def world():
    """4 held-out people: sound (4, samples), mouth (4, P, 2), people (4, D), videos (4, 3, P, 128, 128), references (4, 3, 128, 128)"""
    g, sound, people = torch.Generator().manual_seed(1), speech(4), faces.held_out_identities(4)
    mouth = faces.articulation(sound, torch.arange(P) / FPS)
    return sound, mouth, people, faces.draw(people, faces.motions(4, P, g), mouth), faces.reference(people, g)


def test_meter_on_true_drawings(world):
    _, mouth, _, videos, _ = world
    for noise, least in ((0.0, (0.99, 0.95)), (0.1, (0.97, 0.85))):      # sharp, and with noise of 13/255
        seen = [metrics.measure(video + noise * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))) for video in videos]
        opening = torch.tensor([metrics.correlation(s[:, 0], m[:, 0]) for s, m in zip(seen, mouth)]).median().item()
        width = torch.tensor([metrics.width_correlation(s, m) for s, m in zip(seen, mouth)]).median().item()
        print(f"noise {noise}: opening r {opening:.4f}, width r {width:.4f}")
        assert opening > least[0] and width > least[1]
    assert metrics.has_mouth(videos[0]) and not metrics.has_mouth(torch.rand(3, 4, 96, 160) * 0.2)
    larger = F.interpolate(videos[0].transpose(0, 1), scale_factor=2.0, mode="bilinear").transpose(0, 1)
    assert metrics.correlation(metrics.measure(larger)[:, 0], mouth[0, :, 0]) > 0.99


def test_every_identity_mood_and_caption_is_read():
    g = torch.Generator().manual_seed(2)
    people, _ = faces.captioned(torch.cat([faces.identities(24, g), faces.held_out_identities(8)]), g)
    opening = torch.linspace(0, 1, 9)
    mouth = torch.stack([opening, torch.full((9,), 0.5)], dim=1).expand(32, -1, -1)
    for video in faces.draw(people, faces.motions(32, 9, g), mouth):
        seen = metrics.measure(video)[:, 0]
        assert seen[0] < 0.02 and (seen - opening).abs().max() < 0.12, seen                       # scale of the face is not known: 6%


def test_sync_finds_a_shift(world):
    _, mouth, _, videos, _ = world
    seen = metrics.measure(videos[0])[:, 0]
    assert metrics.sync(seen, mouth[0, :, 0])[0] == 0
    for shift in (-3, 2, 5):                                             # above 0: the picture is late
        lag, best, now = metrics.sync(seen.roll(shift), mouth[0, :, 0])
        assert lag == shift and best > 0.97 and now < 0.8
    others = [metrics.correlation(metrics.measure(videos[i])[:, 0], mouth[(i + 1) % 4, :, 0]) for i in range(4)]
    assert sum(map(abs, others)) / 4 < 0.35, others                      # chance, over 4 s
    assert metrics.sync(torch.zeros(P), mouth[0, :, 0]) == (0, 0.0, 0.0)
    with pytest.raises(ValueError, match="two curves of one length"):
        metrics.sync(seen[:20], mouth[0, :, 0])


def test_drift_seam_identity(world):
    _, _, people, videos, references = world
    video = videos[1]
    clips, seam = metrics.drift(video, references[1], clip_frames=20, first=17)
    assert len(clips) == 4 and all(c["colour"] < 0.02 and 0.8 < c["contrast"] < 1.2 for c in clips) and seam < 3
    broken = video.clone()
    broken[:, 37:57] = 0.5 * broken[:, 37:57] + 0.2
    clips, seam = metrics.drift(broken, references[1], clip_frames=20, first=17)
    assert clips[2]["colour"] > 0.05 and clips[2]["contrast"] < 0.6 and clips[2]["sharpness"] < 0.6 and seam > 5
    for i, video in enumerate(videos):
        assert metrics.identity_distance(video, references).argmin() == i
    pictures = evaluate.at_rest(faces.held_out_identities(20))
    assert metrics.identity_distance(videos[2], pictures).argmin() == 2


def test_written_file(world, tmp_path, capsys):
    """mp4 with its own AAC sound: the whole way that evaluate.py goes, on a video that is right."""
    sound, mouth, people, _, references = world
    g, asked = torch.Generator().manual_seed(3), {"hair": "red", "mood": "sad"}
    asked["hair"] = next(hair for i, hair in enumerate(faces.HAIR) if i != people[0, faces.COLUMN["hair_name"]])
    shown = faces.apply(people[:1], **asked)
    wav, mp4, png = tmp_path / "a.wav", tmp_path / "a.mp4", tmp_path / "a.png"
    soundfile.write(wav, sound[0].numpy(), RATE)
    metrics.to_picture(references[0]).save(png)
    with VideoWriter(mp4, (128, 128), FPS, audio=str(wav)) as out:
        out.write(faces.draw(shown, faces.motions(1, P, g), mouth[:1])[0])
    case = evaluate.Case("a", str(wav), 0.0, str(png), 0, asked, faces.caption(**asked))
    result, tiles = evaluate.judge(mp4, case, people, 80)
    assert result["lag"] == 0 and result["now"] > 0.97 and result["width"] > 0.9 and len(tiles) == 4
    assert result["person"] and result["obeyed"] == [True, True] and result["kept"] == [True]
    assert result["psnr_moved"] > 32 and result["psnr_moved"] > result["psnr_still"] + 3
    assert not all(evaluate.judge_picture(metrics.read_video(mp4)[0], evaluate.Case("a", "", 0, "", 0, {"mood": "happy"}), people,
                                          result["target"][:, None].repeat(1, 2))["obeyed"])
    assert metrics.main([str(mp4), "--audio", str(wav), "--image", str(png)]) == 0
    text = capsys.readouterr().out
    assert "at lag 0" in text and "clip 0" in text and (tmp_path / "a.metrics.png").stat().st_size > 5000


def test_bad_input(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", voices(1)[0].numpy(), RATE)
    assert metrics.main([str(tmp_path / "a.wav")]) == 2 and metrics.main([str(tmp_path / "none.mp4")]) == 2
    assert evaluate.main(["--speech", str(tmp_path), "--seconds", "9", "--out", str(tmp_path / "out")]) == 2
    assert evaluate.main(["--videos", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: wanted") or "not found" in line for line in lines), lines


def test_evaluate_on_random_numbers(tmp_path, capsys):
    """A checkpoint of random numbers: everything runs, and nothing is taken for right."""
    folder = tmp_path / "tiny"
    fake_checkpoint.ensure_tiny(folder)
    (tmp_path / "speech").mkdir()
    for i, wav in enumerate(speech(2)):
        soundfile.write(tmp_path / "speech" / f"{i}.wav", wav.numpy(), RATE)
    out = tmp_path / "out"
    assert evaluate.main(["--ckpt", str(folder), "--speech", str(tmp_path / "speech"), "--videos", "2", "--silent", "1", "--people", "3",
                          "--seconds", "2", "--clips", "1", "--clip-frames", "24", "--steps", "1", "--guidance", "1",
                          "--out", str(out)]) == 0
    n = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert n["now"] < 0.7 and n["psnr_moved"] < 20 and n["person"] < 1 and n["asked"] >= 1 and len(n["drift"]) == 1
    assert {path.name for path in Path(out).iterdir()} >= {"000.mp4", "001.png", "002.mp4", "sheet.png", "silence.wav"}
