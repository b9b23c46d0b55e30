"""The meters on true drawings, where the answer is known; a checkpoint of random numbers through evaluate.py.

    python -m pytest -s tests/test_metrics.py        half a minute on a CPU
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from media.sound import RATE
from media.video import VideoWriter
from tests.kill_runs import quick
from tiny import evaluate, faces, metrics
from tiny.faces import FPS

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
    for grain in (1, 4, 8):                                              # noise has the colours of lips too, but everywhere
        noise = torch.randn(40, 3, 128 // grain, 128 // grain, generator=torch.Generator().manual_seed(grain))
        noise = F.interpolate(0.7 * noise, (128, 128), mode="bilinear").clamp(-1, 1).transpose(0, 1)
        assert metrics.mouth_masks(noise)[0].sum((1, 2)).median() > metrics.MOUTH_AREA and not metrics.has_mouth(noise)
    larger = F.interpolate(videos[0].transpose(0, 1), scale_factor=2.0, mode="bilinear").transpose(0, 1)
    assert metrics.correlation(metrics.measure(larger)[:, 0], mouth[0, :, 0]) > 0.99


def test_every_identity_mood_and_caption_is_read():
    g = torch.Generator().manual_seed(2)
    people, _ = faces.captioned(torch.cat([faces.identities(24, g), faces.held_out_identities(8)]), g)
    opening = torch.linspace(0, 1, 9)
    mouth = torch.stack([opening, torch.full((9,), 0.5)], dim=1).expand(32, -1, -1)
    for video in faces.draw(people, faces.motions(32, 9, g), mouth):
        seen = metrics.measure(video)[:, 0]
        assert metrics.has_mouth(video)
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


def test_opening_of_each_clip(world):
    """The second clip has another person's mouth, the third is silent, the fourth too short to say."""
    _, mouth, people, _, references = world
    asked, made = torch.cat([mouth[0], mouth[2]])[:112], torch.cat([mouth[0], mouth[2]])[:112]
    made[29:61], asked[61:93] = mouth[1, 29:61], 0
    video = faces.draw(people[:1], faces.motions(1, 112, torch.Generator().manual_seed(4)), made[None])[0]
    seen = metrics.measure(video)
    first, second, third, last = [clip["opening"] for clip in metrics.drift(video[:, :100], references[0], 32, 29, seen, asked)[0]]
    print(f"opening r of the clips: {first:.3f}, {second:.3f}, {third}, {last}")
    assert first > 0.98 and abs(second) < 0.5 and third is last is None
    assert second == metrics.correlation(seen[29:61, 0], asked[29:61, 0])
    assert metrics.drift(video, references[0], 32, 29, seen, torch.cat([mouth[0], mouth[2]])[:112])[0][2]["opening"] > 0.98
    assert [clip["opening"] for clip in metrics.drift(video, references[0])[0]] == [None, None]
    with pytest.raises(ValueError, match="4 frames or more"):
        metrics.drift(video, references[0], 0, -3)


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
    case = evaluate.Case("a", str(wav), 0.0, str(png), 0, asked, f"a person with {asked['hair']} hair, sad")
    result, tiles = evaluate.judge(mp4, case, people, 80)
    assert result["lag"] == 0 and result["now"] > 0.97 and result["width"] > 0.9 and len(tiles) == 4
    assert result["person"] and result["obeyed"] == [True, True] and result["kept"] == [True]
    assert result["psnr_moved"] > 32 and result["psnr_moved"] > result["psnr_still"] + 3
    assert not all(evaluate.judge_picture(metrics.read_video(mp4)[0], evaluate.Case("a", "", 0, "", 0, {"mood": "happy"}), people,
                                          result["target"][:, None].repeat(1, 2))["obeyed"])
    assert metrics.main([str(mp4), "--audio", str(wav), "--image", str(png)]) == 0
    text = capsys.readouterr().out
    assert "at lag 0" in text and f"clip 0       opening r {result['now']:.2f}" in text and "person " in text
    plotted = np.asarray(Image.open(tmp_path / "a.metrics.png")).astype(int)[200:351]               # the rows of the curves
    line = np.abs(plotted - [124, 6, 36]).sum(-1) < 30
    drawn, at = line.any(0), np.interp(np.arange(1200) / 1200 * P, np.arange(P), result["measured"])
    height = 1.1 * (1 - (line * np.arange(151)[:, None]).sum(0) / np.maximum(line.sum(0), 1) / 150)
    assert drawn[:1180].mean() > 0.95 and np.corrcoef(height[drawn], at[drawn])[0, 1] > 0.98
    assert np.abs(height[drawn] - at[drawn]).mean() < 0.03 and np.abs(height[drawn] - at[drawn][::-1]).mean() > 0.1


def test_every_kind_of_output(world, tmp_path, capsys):
    """Without sound, a folder of PNGs, the later part of a sound, few frames."""
    sound, _, _, videos, references = world
    wav, png = tmp_path / "late.wav", tmp_path / "a.png"
    soundfile.write(wav, torch.cat([speech(1, 9)[0, :RATE], sound[0]]).numpy(), RATE)
    metrics.to_picture(references[0]).save(png)
    long = torch.cat([videos[0], videos[1]], dim=1)[:, :81]
    noise = torch.randn(3, 81, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, video in (("t2v.mp4", noise), ("mute.mp4", long), ("few.mp4", videos[0][:, :10]), ("one.mp4", long[:, :1]), ("png/", videos[0])):
        with VideoWriter(str(tmp_path / name) + "/" * name.endswith("/"), video.shape[2:], FPS) as out:
            out.write(video)

    def table(name, *options):
        assert metrics.main([str(tmp_path / name), "--image", str(png), *map(str, options)]) == 0
        return {line[:13].strip(): line[13:] for line in capsys.readouterr().out.splitlines()}

    for name in ("t2v.mp4", "mute.mp4", "few.mp4", "one.mp4", "png"):
        rows = table(name)
        assert "no sound" in rows["video"] and "colour off" in rows["clip 0"] and "clip 1" not in rows and "wrote" not in rows
        assert "none in" in rows["mouth"] if name == "t2v.mp4" else "no sound" in rows["opening"] and "person" in rows
    assert {"clip 0", "clip 1", "seam"} <= set(table("mute.mp4", "--clip-frames", 80)) and "clip 1" in table("mute.mp4", "--audio", wav)
    assert "compared from 16" in table("few.mp4", "--audio", wav, "--start", 1)["opening"] and (tmp_path / "few.metrics.png").exists()
    late, early = (float(table("png", "--audio", wav, "--start", start)["clip 0"].split()[2].strip(",")) for start in (1, 0))
    assert late > 0.98 and early < 0.5, (late, early)
    assert "at 8 fps, sound 5.00 s" in table("png", "--audio", wav, "--fps", 8)["video"]
    own, stranger = (float(number) for number in table("png")["person"].split() if number.startswith("0."))
    assert own < 0.12 and stranger > 0.2, (own, stranger)                # the mouth and the sway make up what is left
    for bad in (["mute.mp4", "--clip-frames", "0"], ["mute.mp4", "--start", "1"], ["png", "--fps", "0"], ["."]):      # of two sizes
        assert metrics.main([str(tmp_path / bad[0]), *bad[1:]]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_captions_are_shared_out(tmp_path):
    """Every person is captioned in every other turn, whatever their number."""
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "a.wav", speech(1)[0].numpy(), RATE)
    for n in (3, 4):
        args = evaluate.parser().parse_args(["--speech", str(tmp_path / "speech"), "--seconds", "2", "--videos", str(4 * n), "--silent", "0"])
        cases = evaluate.make_cases(args, faces.held_out_identities(n), tmp_path)
        assert [sum(bool(case.asked) for case in cases if case.person == person) for person in range(n)] == [2] * n
        assert all(bool(case.asked) == bool(case.prompt) for case in cases)


def test_numbers_of_all_videos():
    """`summary` of curves whose answers are known: sin and cos over whole turns have r 0, own sounds would add 1."""
    turn = 2 * math.pi * torch.arange(96) / 96

    def result(measured, target, *openings):
        clip = dict(colour=0.1, contrast=1.0, sharpness=1.0)
        return dict(measured=measured, target=target, frames=len(target), now=0.9, best=0.9, width=0.5, lag=0, psnr_still=20.0, psnr_moved=25.0,
                    person=True, obeyed=[True], kept=[], seam=1.5, clips=[clip | dict(opening=r) for r in openings])

    pair = [result(turn.sin(), turn.sin(), 0.9, 0.8), result(turn.cos(), turn.cos(), 0.7, None)]
    assert np.allclose(evaluate.shuffled(pair), (0, 0), atol=1e-6) and evaluate.shuffled(pair[:1]) == (0.0, 0.0)
    assert np.allclose(evaluate.shuffled([pair[0], result(-turn.sin(), -turn.sin())]), (1, 1))
    longer = result(torch.cat([turn, turn]).sin(), torch.cat([turn, turn]).sin())
    assert evaluate.shuffled([pair[0], longer]) == (0.0, 0.0)            # of another length
    ramp, silent = torch.linspace(0, 1, 101), result(torch.full((50,), 0.09), torch.zeros(50))
    n = evaluate.summary([result(ramp, ramp, 0.9, 0.8), result(ramp, ramp, 0.7, None), result(ramp, ramp, 0.8, None, None)], [silent])
    assert np.allclose([n["silence"], *n["opening_range"]], [0.1, 0.05, 0.95])
    assert [clip["opening"] for clip in n["drift"]] == [0.8, 0.8, None]
    lines = evaluate.table(n)
    assert "silence      opening 10% of its range (0.05 to 0.95)" in lines
    assert any(line.startswith("clip 1       opening r 0.800") for line in lines)
    assert "silence" not in evaluate.summary([result(ramp, ramp, 0.9)], [])


def test_bad_input(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", speech(1)[0].numpy(), RATE)
    assert metrics.main([str(tmp_path / "a.wav")]) == 2 and metrics.main([str(tmp_path / "none.mp4")]) == 2
    assert evaluate.main(["--speech", str(tmp_path), "--seconds", "9", "--out", str(tmp_path / "out")]) == 2
    assert evaluate.main(["--videos", "0"]) == 2
    assert evaluate.main(["--device", "bogus"]) == 2 and evaluate.main(["--device", "cuda:99"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(line.startswith(("error: wanted", "error: file not found", "error: device must")) for line in lines), lines


def test_evaluate_on_random_numbers(tmp_path, capsys):
    """A checkpoint of random numbers: everything runs, and nothing is taken for right."""
    (tmp_path / "speech").mkdir()
    for i, wav in enumerate(speech(2)):
        soundfile.write(tmp_path / "speech" / f"{i}.wav", wav.numpy(), RATE)
    out = tmp_path / "out"
    assert evaluate.main([*quick(), "--speech", str(tmp_path / "speech"), "--videos", "2", "--silent", "1", "--people", "3",
                          "--seconds", "2", "--clips", "1", "--clip-frames", "24", "--steps", "1", "--guidance", "1",
                          "--out", str(out)]) == 0
    n = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert n["now"] < 0.7 and n["psnr_moved"] < 20 and n["person"] < 1 and n["asked"] >= 1 and len(n["drift"]) == 1
    assert abs(n["drift"][0]["opening"]) < 0.7
    assert {path.name for path in Path(out).iterdir()} >= {"000.mp4", "001.png", "002.mp4", "sheet.png", "silence.wav"}
