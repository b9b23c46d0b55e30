"""Training sound: what is held out, and what augmentation does.

    python -m pytest -s tests/test_speech.py        seconds on a CPU
"""
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch

from tiny import speech
from media.sound import RATE

ESPEAK = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason=speech.INSTALL)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def voices(n, seconds=3.0):
    """(n, samples) like speech: buzzing syllables, 4 a second, of many pitches."""
    t = torch.arange(round(seconds * RATE)) / RATE
    pitch = torch.linspace(90, 220, n)[:, None]
    return 0.3 * torch.sin(2 * torch.pi * 4 * t).clamp(0, 1) * sum(torch.sin(2 * torch.pi * k * pitch * t) / k for k in range(1, 15))


def test_nothing_held_out_is_spoken_in_train(tmp_path, monkeypatch):
    """An hour as `make` would have it made, by a speaker who takes a second for each sentence."""
    said, spoken = [], []

    def speak(text, language, voice, speed, pitch):
        if text != "hello":                                              # a trial before the first file
            said.append((text, language, voice))
        return np.random.default_rng(len(said)).normal(size=RATE).astype(np.float32)

    def write(path, wav):                                                # what was said since the file before is in this one
        assert all(path.name.startswith(f"{language}_{voice}_") for _, language, voice in said)
        spoken.extend((path.parent.name, *words) for words in said)
        said.clear()
        path.touch()
    monkeypatch.setattr(speech, "speak", speak)
    monkeypatch.setattr(speech, "write_ogg", write)
    speech.make(tmp_path, hours=1)

    def heard(column, folder):
        return {row[column] for row in spoken if row[0] == folder}
    train, held_out = ({" ".join(re.findall(r"\w+", text.lower())) for text in heard(1, folder)} for folder in ("train", "held_out"))
    assert not train & held_out and len(train) > 500 and len(held_out) > 100
    assert not any(f" {slot} " in text for text in heard(1, "train") for slot in "BCDN")        # of the templates, every slot was filled
    assert speech.HELD_OUT_LANGUAGE in heard(2, "held_out") and speech.HELD_OUT_LANGUAGE not in heard(2, "train")
    assert heard(2, "train") | {speech.HELD_OUT_LANGUAGE} == set(speech.TEXTS)
    assert not heard(3, "train") & heard(3, "held_out") and heard(3, "held_out") == set(speech.HELD_OUT_VOICES)
    assert len(set(speech.VOICES)) == len(speech.VOICES)
    for folder in ("train", "held_out"):                                 # and the folders hold nothing else
        assert {path.name.split("_")[1] for path in tmp_path.glob(f"{folder}/*.ogg")} == heard(3, folder)


@ESPEAK
def test_make_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "HELD_OUT_FILES", 2)
    monkeypatch.setattr(speech, "LONG_FILES", 0)
    train, held_out = speech.make(tmp_path, hours=0.02)
    names = [path.stem.split("_") for path in sorted(tmp_path.glob("train/*"))]
    assert train >= 72 and held_out >= 40 and all(voice in speech.VOICES for _, voice, _ in names)
    assert sorted(path.stem.split("_")[0] for path in tmp_path.glob("held_out/*")) == ["en-us", "it"]
    sound = speech.load_folder(tmp_path / "train")
    assert sound.samples.dtype == torch.int16 and len(sound.starts) == len(names) + 1
    assert abs(len(sound.samples) / RATE - train) < 0.1
    assert soundfile.info(tmp_path / "train" / ("_".join(names[0]) + ".ogg")).samplerate == RATE
    with pytest.raises(ValueError, match="holds sound already"):
        speech.make(tmp_path)


def test_espeak_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert speech.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {speech.INSTALL}\n" and not (tmp_path / "out").exists()


def test_crops():
    lengths = torch.tensor([0, 20, 7, 30])                               # samples; pieces of 10: 11 places in file 0, none in 1, 21 in 2
    file = torch.repeat_interleave(torch.arange(3), lengths[1:])
    sound = speech.Speech((100 * file + torch.arange(57)).to(torch.int16), lengths.cumsum(0))
    pieces = speech.crops(sound, 2000, 10 / RATE, seeded()) * 32768
    assert pieces.shape == (2000, 10) and torch.equal(pieces.diff(dim=1), torch.ones(2000, 9))      # no file end is crossed
    first = pieces[:, 0].long()
    assert sorted(set(first.tolist())) == list(range(11)) + list(range(227, 248))
    assert abs((first < 11).float().mean() - 11 / 32) < 0.05
    assert torch.equal(pieces, speech.crops(sound, 2000, 10 / RATE, seeded()) * 32768)
    with pytest.raises(ValueError, match="longest file has 0.0 s"):
        speech.crops(sound, 1, 1.0, seeded())


def test_augment():
    wav = voices(64)
    out = speech.augment(wav, seeded(3))
    assert out.shape == wav.shape and out.dtype == torch.float32 and torch.isfinite(out).all() and out.abs().max() <= 1
    assert torch.equal(out, speech.augment(wav, seeded(3)))
    loud = out.abs().amax(dim=1)
    assert (loud == 0).sum() <= 5 and loud[loud > 0].min() > 0.005
    many = torch.cat([speech.augment(voices(64), seeded(k)) for k in range(2)])
    assert 0 < (many.abs().amax(dim=1) == 0).float().mean() < 0.06       # replaced by silence
    assert torch.isfinite(speech.augment(torch.zeros(4, 16000), seeded())).all()


def test_resample_changes_pitch():
    t = torch.arange(RATE) / RATE
    wav = torch.sin(2 * torch.pi * 400 * t)[None].repeat(2, 1)
    out = speech.resample(wav, torch.tensor([0.85, 1.2]), torch.tensor([0.0, 5000.0]))
    assert torch.fft.rfft(out).abs().argmax(dim=1).tolist() == [340, 480]
    assert (out[0] - torch.sin(2 * torch.pi * 340 * t)).abs()[10:-10].max() < 0.01      # cubic interpolation


def test_tones_and_gaps():
    chords = speech.tones(3, 2 * RATE, seeded(), "cpu")
    spectrum = torch.fft.rfft(chords).abs().square()
    assert torch.isfinite(chords).all() and (spectrum[:, 200:].sum(1) / spectrum.sum(1) > 0.8).all()     # from 100 Hz
    keep = speech.gaps(50, RATE, seeded(), "cpu")
    assert 0.1 < (keep == 0).float().mean() < 0.6 and keep.max() == 1
