"""The drawn world: sound -> mouth, faces and their captions, motion, pictures.

    python -m pytest -s tests/test_faces.py        seconds on a CPU
"""
import itertools
import math
import shutil
import subprocess

import pytest
import soundfile
import soxr
import torch
from PIL import Image

from tiny import faces

RATE = 16000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def frames(seconds):
    return torch.arange(int(seconds * faces.FPS)) / faces.FPS


def burst(start, stop, seconds=3.0, pitch=300.0):
    """A tone of a few harmonics from start to stop, silence around it."""
    t = torch.arange(int(seconds * RATE)) / RATE
    return sum(torch.sin(2 * math.pi * pitch * k * t) / k for k in range(1, 6)) * ((t >= start) & (t < stop))


def inside(video):
    """(n, 3, P, h, w) -> (n, P, h, w): 1 where a pixel has the colour of the mouth's inside, falling to 0."""
    colour = torch.tensor(faces.INSIDE)[:, None, None, None] / 127.5 - 1
    return (1 - (video - colour).abs().amax(1) / 0.3).clamp(0, 1)


# ---- sound -> mouth --------------------------------------------------------------------------------------------------

def test_silence_keeps_the_mouth_closed():
    for wav in (torch.zeros(RATE), torch.full((RATE,), 0.3), torch.zeros(10)):
        mouth = faces.articulation(wav, frames(1))
        assert (mouth[:, 0] == 0).all() and (mouth[:, 1] == 0.5).all()
    with pytest.raises(ValueError, match="0 samples"):
        faces.articulation(torch.zeros(0), frames(1))


def test_mouth_opens_in_the_middle_of_a_sound_and_only_there():
    """The opening of a tone from a to b is symmetric about (a + b) / 2: no delay; 0.1 s away from it, and outside the file, closed."""
    times = torch.arange(-100, 700) / 200
    opening = faces.articulation(burst(1.0, 1.5), times)[:, 0]
    middle = (opening * times).sum() / opening.sum()
    half = times[opening > 0.5]
    print(f"tone 1.000-1.500 s: opening centred on {middle:.4f} s, half open from {half.min():.3f} to {half.max():.3f}")
    assert abs(middle - 1.25) < 0.003
    assert opening[(times > 1.1) & (times < 1.4)].min() > 0.8
    assert (opening[(times < 0.9) | (times > 1.6)] == 0).all()
    whole = faces.articulation(burst(0, 3), times)[:, 0]
    assert (whole[(times < 0) | (times > 3)] == 0).all() and whole[(times > 0.1) & (times < 2.9)].min() > 0.6


def test_level_does_not_matter_and_batches_agree():
    wav = torch.stack([burst(0.2, 0.9) + burst(1.3, 2.0, pitch=700), burst(0.5, 2.5)])
    one = torch.stack([faces.articulation(w, frames(3)) for w in wav])
    both = faces.articulation(wav[:, None], frames(3))
    assert both.shape == (2, 1, 48, 2)
    torch.testing.assert_close(both[:, 0], one, atol=1e-5, rtol=0)
    torch.testing.assert_close(faces.articulation(0.02 * wav + 0.1, frames(3)), one, atol=2e-3, rtol=0)     # 1e-7 beside a small variance


def test_dark_sounds_round_the_lips_and_bright_ones_spread_them():
    low, high = (faces.articulation(burst(0, 3, pitch=pitch), frames(3))[24, 1].item() for pitch in (160, 700))
    print(f"width of a dark tone {low:.2f}, of a bright one {high:.2f}")
    assert low < 0.25 and high > 0.75


@pytest.mark.parametrize("voice, text", [
    ("en-us", "Hello, this is a longer sentence about the weather. Tomorrow we will see blue moons, and the cheese is green. Who knew?"),
    ("en-us+f3", "Please bring me a map of the valley. I would like a cup of tea, and two small apples. Nobody believed the old man."),
    ("ja", "こんにちは。きょうはいいてんきですね。またあしたあいましょう。"),
    ("it+m3", "Buongiorno a tutti. Oggi andiamo al mercato a comprare il pane. Domani torneremo a casa.")])
def test_speech_uses_the_range(tmp_path, voice, text):
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    path = tmp_path / "a.wav"
    subprocess.run(["espeak-ng", "-v", voice, "-w", path, text], check=True)
    samples, rate = soundfile.read(path, dtype="float32")
    wav = torch.from_numpy(soxr.resample(samples, rate, RATE))
    opening, width = faces.articulation(wav, frames(len(wav) / RATE)).unbind(-1)
    low, high = opening.quantile(torch.tensor([0.1, 0.9])).tolist()
    print(f"{voice}: opening 10th percentile {low:.3f}, 90th {high:.2f}, closed {(opening == 0).float().mean():.2f} of the time; "
          f"width mean {width.mean():.2f}, std {width.std():.2f}")
    assert low < 0.05 and high > 0.7 and width.std() > 0.12


# ---- faces and captions ----------------------------------------------------------------------------------------------

def test_held_out_faces_are_never_drawn_for_training():
    seen, held = faces.identities(4000, generator()), faces.held_out_identities(1000)
    assert not faces.is_held_out(seen).any() and faces.is_held_out(held).all()
    assert torch.equal(held, faces.held_out_identities(1000)) and not torch.equal(held, faces.held_out_identities(1000, seed=1))
    assert torch.equal(seen, faces.identities(4000, generator()))
    for people in (seen, held):                                       # no style, tone or width is missing, nor any pair of them
        bins = torch.stack([people[:, faces.COLUMN[name]] for name in ("style", "tone", "wide")], dim=1)
        bins = (bins * torch.tensor([1, faces.BINS, faces.BINS])).long()
        for a, b in itertools.combinations(range(3), 2):
            assert len(bins[:, [a, b]].unique(dim=0)) == 25
    style = faces.COLUMN["style"]
    place = [faces.COLUMN["tone"], faces.COLUMN["wide"]]
    gap = min((held[i, place] - seen[seen[:, style] == held[i, style]][:, place]).abs().amax(1).min().item() for i in range(100))
    print(f"least distance from a held-out face to a training face of its style: {gap:.3f} of the range of tone or width")
    assert gap >= 0.05


def test_no_face_has_a_colour_near_the_mouth():
    people = faces.identities(3000, generator())
    part = {name: people[:, faces.columns(name + "_r")] for name in ("skin", "hair", "iris", "clothes", "background")}
    part |= {"brow": 0.55 * part["hair"], "neck": 0.86 * part["skin"], "nose": 0.84 * part["skin"], "ear": 0.93 * part["skin"]}
    for mouth, least in ((faces.LIPS, 0.14), (faces.INSIDE, 0.14)):
        near = {name: (colour - torch.tensor(mouth) / 255).abs().amax(1).min().item() for name, colour in part.items()}
        print(mouth, {name: round(value, 2) for name, value in near.items()})
        assert min(near.values()) > least


def test_captions_change_what_they_say_and_nothing_else():
    people = faces.identities(1500, generator())
    shown, captions = faces.captioned(people, generator(1))
    again = faces.captioned(people, generator(1))
    assert torch.equal(shown, again[0]) and captions == again[1]
    groups = {"hair": ["hair_name", "hair_r", "hair_g", "hair_b"], "mood": ["mood"],
              "background": ["background_name", "background_r", "background_g", "background_b"]}
    for before, after, text in zip(people, shown, captions):
        named = {"hair": "hair" in text, "background": "background" in text, "mood": "happy" in text or "sad" in text}
        changed = {faces.FIELDS[i] for i in (before != after).nonzero()[:, 0].tolist()}
        for group, fields in groups.items():
            assert (fields[0] in changed) == named[group], text
            changed -= set(fields) if named[group] else set()
        assert not changed
        for name, known in (("hair", faces.HAIR), ("background", faces.BACKGROUND)):
            assert not named[name] or f"{list(known)[int(after[faces.COLUMN[name + '_name']])]} {name}" in text
        assert not named["mood"] or faces.MOODS[int(after[faces.COLUMN["mood"]])] in text
    silent = sum(text == "" for text in captions) / len(captions)
    print(f"{len(set(captions))} different captions, {silent:.2f} are empty, e.g. {sorted(set(captions))[::40]}")
    assert 0.35 < silent < 0.45 and len(set(captions)) > 150


def test_apply():
    face = faces.identities(1, generator())
    assert torch.equal(faces.apply(face), face)
    assert faces.apply(face, hair="grey")[0, faces.COLUMN["hair_b"]] == faces.colours(faces.HAIR)[4, 2]


# ---- motion and pictures ---------------------------------------------------------------------------------------------

def test_motion_is_small_slow_and_stationary():
    motion = faces.motions(400, 320, generator())
    x, y, roll, blink = motion.unbind(-1)
    starts = ((blink[:, 1:] > 0.01) & (blink[:, :-1] <= 0.01)).sum().item()
    print(f"std x {x.std():.2f} y {y.std():.2f} px, roll {math.degrees(roll.std()):.2f} degrees, max {motion[..., :2].abs().max():.2f} px, "
          f"step {x.diff().abs().max():.2f} px, a blink every {400 * 20 / starts:.1f} s of {(blink > 0.01).sum() / starts:.1f} frames")
    assert abs(x.std() - 0.7) < 0.05 and abs(y.std() - 0.7) < 0.05 and abs(math.degrees(roll.std()) - 0.8) < 0.06
    assert motion[..., :2].abs().max() < 2.1 and x.diff().abs().max() < 0.3
    assert 2.5 < 400 * 20 / starts < 4.5 and 3 < (blink > 0.01).sum() / starts < 4.5 and blink.max() > 0.95
    assert abs(x[:, 0].std() - x[:, -1].std()) < 0.1


def test_a_window_is_a_cut_out_of_the_picture():
    people, motion, mouth = faces.identities(4, generator()), faces.motions(4, 5, generator()), torch.rand(4, 5, 2, generator=generator())
    top, left = torch.tensor([0, 10, 40, 64]), torch.tensor([5, 68, 30, 0])
    for painter in (faces.draw, faces.importance):
        whole, part = painter(people, motion, mouth), painter(people, motion, mouth, (top, left, 64, 60))
        for k in range(4):
            assert torch.equal(part[k], whole[k, :, :, top[k]:top[k] + 64, left[k]:left[k] + 60])
    assert whole.shape == (4, 1, 5, 128, 128) and (whole.mean((1, 2, 3, 4)) - 1).abs().max() < 0.01
    with pytest.raises(ValueError, match="a row per video"):
        faces.draw(people, motion[:, :3], mouth)


def test_the_mouth_shows_what_it_was_told():
    """Pixels of the inside colour: none when closed, growing in proportion; as wide as the width says; none elsewhere."""
    n = 8
    people, motion = faces.held_out_identities(n), torch.zeros(n, 11, 4)
    opening = torch.stack([torch.linspace(0, 1, 11), torch.full((11,), 0.5)], dim=1).expand(n, -1, -1)
    seen = inside(faces.draw(people, motion, opening))
    area = seen.sum((2, 3))                                                                   # (n, 11)
    correlation = torch.corrcoef(torch.stack([area.mean(0), opening[0, :, 0]]))[0, 1]
    height = seen[:, 10].sum(1).amax(1)                                                       # highest column, pixels
    print(f"inside of a wide open mouth {height.min():.1f}-{height.max():.1f} px high; area against opening r = {correlation:.4f}; "
          f"most when closed {area[:, 0].max():.2f} px")
    assert area[:, 0].max() < 0.5 and correlation > 0.995 and 11 < height.min() and height.max() < 15
    width = torch.stack([torch.full((11,), 0.8), torch.linspace(0, 1, 11)], dim=1).expand(n, -1, -1)
    across = inside(faces.draw(people, motion, width)).sum(2).gt(1).sum(2).float().mean(0)    # (11,) columns
    print("columns of the open mouth at width 0, 0.5, 1:", [round(across[i].item(), 1) for i in (0, 5, 10)])
    assert across[10] - across[0] > 9 and (across.diff() > 0).all()
    assert seen[:, :, :64].sum() == 0


def test_moods_blinks_and_references_can_be_seen():
    people = faces.identities(6, generator())
    still, closed = torch.zeros(6, 1, 4), torch.tensor([0, 0.5]).expand(6, 1, 2)
    calm, happy, sad = (faces.draw(faces.apply(people, mood=mood), still, closed) for mood in faces.MOODS)
    shut = still.clone()
    shut[..., 3] = 1
    for other in (happy, sad, faces.draw(people, shut, closed)):
        changed = ((calm - other).abs().amax(1) > 0.3).sum((1, 2, 3))
        assert changed.min() > 40                                                             # pixels
    pictures = faces.reference(faces.apply(people, mood="sad"), generator())
    assert pictures.shape == (6, 3, 128, 128) and pictures.abs().max() <= 1
    distance = (pictures[:, None] - calm[None, :, :, 0]).abs().mean((2, 3, 4))
    assert (distance.argmin(1) == torch.arange(6)).all()


def test_command_line(tmp_path, capsys):
    assert faces.main([str(tmp_path / "face.png")]) == 0 and Image.open(tmp_path / "face.png").size == (128, 128)
    assert faces.main([str(tmp_path / "sheet.png"), "--held-out", "--seed", "3", "--sheet", "2x3"]) == 0
    assert Image.open(tmp_path / "sheet.png").size == (384, 256)
    for bad in (["--sheet", "2by3"], ["--seed", "-1"]):
        assert faces.main([str(tmp_path / "bad.png"), *bad]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "wants" in message
