"""Sound files in: formats, parts, damaged and bad files, all made here.  python -m pytest tests/test_sound.py   (seconds, CPU)"""
import math
import struct
import subprocess

import numpy as np
import pytest
import soundfile
import soxr
import torch

from media.ffmpeg import ffmpeg_command, run
from media.sound import decode_soundfile, load_audio


def speech(rate, seconds=2.0, channels=1):
    """(n, channels): a gliding voiced tone in syllables, each channel a little quieter than the one before."""
    t = np.arange(int(rate * seconds)) / rate
    x = 0.4 * np.sin(2 * np.pi * (180 + 40 * np.sin(3 * t)) * t) * np.clip(np.sin(2 * np.pi * 2.5 * t), 0, 1)
    return np.stack([x * 0.9 ** c for c in range(channels)], 1)


@pytest.mark.parametrize("ext, rate, channels, subtype", [
    ("wav", 16000, 1, "PCM_16"), ("wav", 44100, 2, "PCM_16"), ("wav", 8000, 1, "PCM_U8"), ("wav", 48000, 2, "PCM_24"),
    ("wav", 48000, 8, "FLOAT"), ("flac", 22050, 2, "PCM_16"),
    ("aiff", 44100, 1, "PCM_16"), ("ogg", 44100, 2, "VORBIS"), ("ogg", 48000, 1, "OPUS"), ("mp3", 44100, 2, "MPEG_LAYER_III")])
def test_soundfile_formats(tmp_path, capfd, ext, rate, channels, subtype):
    path = tmp_path / f"a.{ext}"
    soundfile.write(path, speech(rate, 2.003, channels), rate, subtype=subtype)
    stored = soundfile.read(path, dtype="float32", always_2d=True)[0].T.mean(axis=0)
    want = soxr.resample(stored, rate, 16000, quality="HQ") if rate != 16000 else stored   # what librosa.load does
    want = np.pad(want, (0, math.ceil(len(stored) * (16000 / rate)) - len(want)))
    got = load_audio(path)
    exact = 2e-7 if ext == "mp3" else 0  # libmpg123 rounds differently from one opening of a file to the next
    assert got.dtype == torch.float32 and got.shape == want.shape and np.abs(got.numpy() - want).max() <= exact
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name, options", [
    ("a.m4a", ["-c:a", "aac"]), ("a.aac", ["-c:a", "aac"]), ("a.opus", ["-c:a", "libopus"]), ("a.webm", ["-c:a", "libopus"]),
    ("a.mkv", ["-c:a", "pcm_s16le"]), ("-odd: %d é.m4a", ["-c:a", "aac"]),
    ("film.mp4", ["-f", "lavfi", "-i", "testsrc=s=64x64:d=2", "-c:a", "aac", "-pix_fmt", "yuv420p"])])
def test_ffmpeg_formats(tmp_path, name, options):
    soundfile.write(tmp_path / "a.wav", speech(44100, 2.0, 2), 44100)
    run("-i", tmp_path / "a.wav", *options, tmp_path / name)
    want, got = load_audio(tmp_path / "a.wav"), load_audio(tmp_path / name)
    assert abs(len(got) - len(want)) < 0.11 * 16000  # .aac keeps the codec's delay and padding
    n = min(len(got), len(want))
    spectrum = torch.fft.rfft(got[:n], 2 * n).conj() * torch.fft.rfft(want[:n], 2 * n)
    match = torch.fft.irfft(spectrum).max() / (got[:n].norm() * want[:n].norm())
    assert match > 0.99, f"{name}: best correlation with the original {match:.4f}"


def test_mp3_in_blocks_equals_one_read(tmp_path):
    path, noise = tmp_path / "a.mp3", np.random.RandomState(0).standard_normal(66150) * 0.1   # noise fills the bit reservoir
    soundfile.write(path, noise, 22050)
    got = np.concatenate([block for _, block in decode_soundfile(path)])[:, 0]
    assert np.abs(got - soundfile.read(path, dtype="float32")[0]).max() < 2e-7                # with seeks between blocks: 0.12


def test_start_and_duration(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", speech(16000), 16000, subtype="FLOAT")
    run("-i", tmp_path / "a.wav", "-c:a", "pcm_f32le", tmp_path / "a.mkv")
    whole = load_audio(tmp_path / "a.wav")
    for path in (tmp_path / "a.wav", tmp_path / "a.mkv"):
        assert torch.equal(load_audio(path, start=0.5, duration=1.0), whole[8000:24000])
        assert torch.equal(load_audio(path, start=1.25), whole[20000:])
        assert capsys.readouterr().err == ""
        assert torch.equal(load_audio(path, start=1.5, duration=9), whole[24000:])
        assert "has 0.50 s from 1.5 s on, not the 9 s" in capsys.readouterr().err
        with pytest.raises(ValueError, match="wanted start at 2 s, got .* of 2.00 s"):
            load_audio(path, start=2.0)
    for bad in ({"start": -1}, {"start": math.nan}, {"duration": 0}, {"duration": math.inf}):
        with pytest.raises(ValueError, match="wanted start >= 0 s and duration > 0 s"):
            load_audio(tmp_path / "a.wav", **bad)


def bad_files(folder):
    """(file, part of the message it must give), one after another."""
    x = speech(16000)
    nan, inf = x.copy(), np.concatenate([x, x], 1)
    nan[20000], inf[24000, 1] = np.nan, -np.inf
    (folder / "folder.wav").mkdir()
    for name, data in (("zero.wav", b""), ("text.wav", b"hello, this is not sound\n" * 99), ("text.mp3", b"hello\n" * 999),
                       ("random.mp3", np.random.RandomState(0).bytes(20000)), ("list.m3u8", b"#EXTM3U\n#EXTINF:3,\nhttp://0.0.0.0:1/a\n")):
        (folder / name).write_bytes(data)
    for name, samples, subtype in (("empty.wav", x[:0], None), ("almost.wav", x[:719], None), ("nan.wav", nan, "FLOAT"), ("inf.wav", inf, "FLOAT")):
        soundfile.write(folder / name, samples, 16000, subtype=subtype)
    soundfile.write(folder / "slow.wav", x, 100)
    data = (folder / "almost.wav").read_bytes()
    for size in (20, 44, 300):
        (folder / f"cut{size}.wav").write_bytes(data[:size])
    run("-f", "lavfi", "-i", "testsrc=s=64x64:d=1", folder / "mute.mp4")
    run("-f", "lavfi", "-i", "testsrc=s=64x64", "-frames:v", "1", folder / "picture.png")
    unknown, mute, short = "cannot read", "without an audio stream", "at least 45 ms of sound, got "
    return [("missing.wav", "cannot read .*No such file"), ("folder.wav", "got the folder"), ("zero.wav", "0 bytes"), ("text.wav", unknown),
            ("text.mp3", unknown), ("random.mp3", unknown), ("list.m3u8", unknown), ("cut20.wav", unknown), ("cut44.wav", "0.00 s"),
            ("cut300.wav", short + "8.0 ms"), ("empty.wav", "0.00 s"), ("almost.wav", short + "44.9 ms"),
            ("nan.wav", r"NaN or infinite .*1\.250 s"), ("inf.wav", r"NaN or infinite .*1\.500 s"),
            ("slow.wav", "says 100 Hz"), ("mute.mp4", mute), ("picture.png", mute)]


def test_bad_files_give_one_line(tmp_path, capfd):
    for name, message in bad_files(tmp_path):
        with pytest.raises(ValueError, match=message) as e:
            load_audio(tmp_path / name)
        assert "\n" not in str(e.value) and ":" in str(e.value) and str(tmp_path / name) in str(e.value)
        assert capfd.readouterr().err == "", name


def test_damaged_files_are_used_with_a_warning(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", speech(16000, 4.0), 16000)
    whole = load_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.flac", whole.numpy(), 16000)
    run("-i", tmp_path / "a.wav", "-c:a", "aac", "-movflags", "faststart", tmp_path / "a.m4a")
    soundfile.write(tmp_path / "a.aiff", whole.numpy(), 16000)
    for name, words in (("a.wav", "4.00 s but breaks off after 2.40 s"), ("a.aiff", "4.00 s but breaks off after 2.40 s"),
                        ("a.flac", "4.00 s but breaks off"), ("a.m4a", "with errors")):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:44 + (len(data) - 44) * 6 // 10])
        got = load_audio(tmp_path / name)
        error = capsys.readouterr().err
        assert error.startswith("warning: ") and error.count("\n") == 1 and words in error
        assert 16000 < len(got) < 45000 and (name == "a.m4a" or torch.equal(got, whole[:len(got)]))


def test_sizes_left_open_by_pipes_are_normal(tmp_path, capfd):
    soundfile.write(tmp_path / "a.wav", speech(16000), 16000)
    whole = load_audio(tmp_path / "a.wav")
    data = (tmp_path / "a.wav").read_bytes()
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        (tmp_path / "pipe.wav").write_bytes(data[:40] + struct.pack("<I", size) + data[44:])
        assert torch.equal(load_audio(tmp_path / "pipe.wav"), whole)
    flac = subprocess.run(ffmpeg_command("-v", "error", "-i", tmp_path / "a.wav", "-f", "flac", "-"), capture_output=True, check=True).stdout
    (tmp_path / "pipe.flac").write_bytes(flac)
    assert torch.equal(load_audio(tmp_path / "pipe.flac"), whole)
    assert capfd.readouterr().err == ""


def test_silence_is_allowed(tmp_path, capsys):
    x = speech(16000)
    for name, samples in (("silent.wav", x * 0), ("cancels.wav", np.concatenate([x, -x], 1))):
        soundfile.write(tmp_path / name, samples, 16000, subtype="FLOAT")
        assert not load_audio(tmp_path / name).any() and capsys.readouterr().err.count("is silent") == 1
