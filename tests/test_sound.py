"""Sound files in: formats, parts, damaged and bad files, all made here.  python -m pytest tests/test_sound.py   (seconds, CPU)"""
import math
import re
import struct
import subprocess

import numpy as np
import pytest
import soundfile
import soxr
import torch

from media.ffmpeg import ffmpeg_command, run
from media.lengths import announced, tagged
from media.mp3 import adts_frame
from media.sound import examine, load_audio
from media.video import VideoWriter


def speech(rate, seconds=2.0, channels=1):
    """(n, channels): a gliding voiced tone in syllables, each channel a little quieter than the one before."""
    t = np.arange(int(rate * seconds)) / rate
    x = 0.4 * np.sin(2 * np.pi * (180 + 40 * np.sin(3 * t)) * t) * np.clip(np.sin(2 * np.pi * 2.5 * t), 0, 1)
    return np.stack([x * 0.9 ** c for c in range(channels)], 1)


@pytest.mark.parametrize("ext, rate, channels, subtype", [
    ("wav", 16000, 1, "PCM_16"), ("wav", 44100, 2, "PCM_16"), ("wav", 8000, 1, "PCM_U8"), ("wav", 48000, 2, "PCM_24"),
    ("wav", 48000, 8, "FLOAT"), ("flac", 22050, 2, "PCM_16"),
    ("aiff", 44100, 1, "PCM_16"), ("mp3", 44100, 2, "MPEG_LAYER_III")])
def test_soundfile_formats(tmp_path, capfd, ext, rate, channels, subtype):
    path = tmp_path / f"a.{ext}"
    soundfile.write(path, speech(rate, 2.003, channels), rate, subtype=subtype)
    stored = soundfile.read(path, dtype="float32", always_2d=True)[0].T.mean(axis=0)
    want = soxr.resample(stored, rate, 16000, quality="HQ") if rate != 16000 else stored   # what librosa.load does
    want = np.pad(want, (0, math.ceil(len(stored) * (16000 / rate)) - len(want)))
    got = load_audio(path)
    exact = 5e-6 if ext == "mp3" else 0  # decoders of lossy formats round differently
    assert got.dtype == torch.float32 and got.shape == want.shape and np.abs(got.numpy() - want).max() <= exact
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name, options", [
    ("a.m4a", ["-c:a", "aac"]), ("a.aac", ["-c:a", "aac"]), ("a.opus", ["-c:a", "libopus"]), ("a.webm", ["-c:a", "libopus"]), ("a.ogg", ["-c:a", "libvorbis"]),
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


@pytest.mark.parametrize("options", [["-b:a", "96k"], ["-q:a", "3", "-ac", "2", "-metadata", "title=x"], ["-ar", "22050"], ["-ar", "11025"],
                                     ["-write_xing", "0"]])
def test_an_mp3_says_how_long_it_was(options, tmp_path, capfd):
    """By the tag in its first frame; without one nobody knows that it breaks off, and libsndfile guesses by its size."""
    soundfile.write(tmp_path / "a.wav", speech(16000, 4.0), 16000)
    run("-i", tmp_path / "a.wav", *options, tmp_path / "a.mp3")
    seconds, has_tag = examine(tmp_path / "a.mp3").seconds, "-write_xing" not in options
    assert abs(tagged(tmp_path / "a.mp3") - seconds * has_tag) < 1e-4 and announced(tmp_path / "a.mp3")[1] is has_tag
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(b"ID3\4\0\0\0\1\34\40" + bytes(20000) + data)            # 20,000 = 1 * 128^2 + 28 * 128 + 32, a cover say
    assert tagged(tmp_path / "b.mp3") == tagged(tmp_path / "a.mp3")
    (tmp_path / "c.mp3").write_bytes(data[:8000] + np.random.RandomState(0).bytes(3000) + data[16000:])
    (tmp_path / "a.mp3").write_bytes(data[:len(data) // 2])
    assert 1.7 < len(load_audio(tmp_path / "a.mp3")) / 16000 < 2.3
    said = capfd.readouterr().err                                    # of C libraries too
    assert re.fullmatch(r"warning: \S+a.mp3 announces 4.0\d s but breaks off after \d.\d\d s: using those\n", said) if has_tag else "breaks" not in said
    assert tagged(tmp_path / "a.wav") == 0
    load_audio(tmp_path / "c.mp3")
    assert "it is damaged" in (said := capfd.readouterr().err) and "breaks off" not in said


@pytest.mark.parametrize("rate, length", [(0, 7), (4, 255), (8, 3000), (12, 8191), (13, 0), (15, 0)])
def test_the_length_of_an_aac_frame(rate, length):
    """13 bits of it, over four bytes; 13 rates."""
    wanted = length or 500
    head = [0xFF, 0xF1, 0x40 | rate << 2, 0x80 | wanted >> 11, wanted >> 3 & 255, (wanted & 7) << 5 | 31, 0xFC]
    assert adts_frame(b"x" + bytes(head), 1) == length and adts_frame(bytes(head[:6]), 0) == adts_frame(bytes([0xFF, 0xF7, *head[2:]]), 0) == 0


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
    soundfile.write(tmp_path / "silent.wav", speech(16000) * 0, 16000, subtype="FLOAT")
    assert not load_audio(tmp_path / "silent.wav").any() and capsys.readouterr().err.count("is silent") == 1


def bursts(seconds=3.0, rate=48000):
    """Noise that comes and goes, so that every stretch of it can be found again."""
    x, t = np.random.RandomState(0).standard_normal(int(seconds * rate)), np.arange(int(seconds * rate)) / rate
    x = np.convolve(x, np.ones(6) / 6, "same") * 0.3 * (np.sin(2 * np.pi * 2.3 * t + 0.3) > 0)
    return x[:, None]


def heard_and_played(path, folder):
    """What the model hears, and what the written file plays with timestamps honoured; both (samples,) at 16 kHz."""
    heard = load_audio(path)
    with VideoWriter(folder / "out.mp4", (64, 64), 16, audio=path) as out:
        out.write(torch.zeros(3, math.ceil(len(heard) / 1000), 64, 64))
    shown = ffmpeg_command("-v", "error", "-i", folder / "out.mp4", "-af", "aresample=async=1:first_pts=0", "-f", "f32le", "-ac", "1", "-ar", "16000", "-")
    return heard.numpy(), np.frombuffer(subprocess.run(shown, capture_output=True, check=True).stdout, "<f4")


def shift(a, b, at, length=2400, most=3200):
    """By how many samples the stretch of `a` at `at` stands later in `b`; None if it is silent or not found within `most`."""
    part, region = a[at:at + length], b[max(0, at - most):at + length + most]
    if part.std() < 1e-3 or len(region) < length:
        return None
    size, lags = len(region) + length, len(region) - length + 1      # np.correlate and np.convolve take ten times as long
    match = np.fft.irfft(np.fft.rfft(region, size) * np.fft.rfft(part, size).conj(), size)[:lags]
    total = np.concatenate([[0], np.cumsum(region.astype(float) ** 2)])
    loud = (part ** 2).sum()
    energy = np.sqrt(np.maximum(total[length:] - total[:lags], 1e-4 * loud) * loud)          # of silence only rounding is left
    best = int((match / energy).argmax())
    return best - min(at, most) if (match / energy)[best] > 0.7 else None


def same_times(a, b):
    """How many stretches of `a` are found again in `b`, and the largest shift in samples."""
    shifts = [shift(a, b, at) for at in range(0, len(a) - 2400, 1600)]
    found = [abs(s) for s in shifts if s is not None]
    return len(found), max(found, default=0)


def damaged(path, target):
    data = bytearray(path.read_bytes())
    at = int(len(data) * 0.4)
    data[at:at + 3000] = bytes(3000)
    target.write_bytes(data)


@pytest.mark.parametrize("name, options, seconds", [
    ("a.mp3", ["-b:a", "96k"], 6), ("a.ogg", ["-c:a", "libvorbis"], 6), ("a.opus", ["-c:a", "libopus"], 6), ("a.flac", [], 6), ("a.aac", [], 6),
    ("vbr.mp3", ["-q:a", "3", "-write_xing", "0"], 3), ("a.m4a", ["-af", "aselect='not(between(t,1,1.8))'"], 3),
    ("a.mka", ["-c:a", "flac", "-af", "aselect='not(between(t,1,1.8))'"], 3), ("a.ac3", [], 3), ("a.m4a", ["-c:a", "alac"], 3)])
def test_heard_is_played(tmp_path, name, options, seconds):
    """Joined files (6 s) are one long sound, missing packets are silence: in the features and in the written file alike."""
    soundfile.write(tmp_path / "a.wav", bursts(), 48000)
    run("-i", tmp_path / "a.wav", *options, tmp_path / name)
    if seconds == 6:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() * 2)
    heard, played = heard_and_played(tmp_path / name, tmp_path)
    assert abs(len(heard) / 16000 - seconds) < (0.06 if name == "a.aac" else 0.03) and abs(len(heard) - len(played)) < 0.03 * 16000      # raw aac keeps 0.03 s of padding each
    found, most = same_times(heard, played)
    assert found > 4 * seconds and most < 0.01 * 16000
    truth = load_audio(tmp_path / "a.wav").numpy()
    if "-af" in options:
        assert not heard[17600:28000].any() and abs(shift(truth, heard, 35200)) < 160      # the burst at 2.2 s


@pytest.mark.parametrize("name, options", [("a.mp3", []), ("vbr.mp3", ["-q:a", "3"]), ("22kHz.mp3", ["-ar", "22050", "-b:a", "48k"]), ("a.flac", []), ("a.m4a", [])])
def test_damage_is_the_same_for_ear_and_eye(tmp_path, capsys, name, options):
    """3000 bytes of zeros: silence stands for what is lost, all the rest at its times. flac and m4a know them, the frames of an mp3 are counted."""
    soundfile.write(tmp_path / "a.wav", bursts(), 48000)
    run("-i", tmp_path / "a.wav", *options, tmp_path / name)
    damaged(tmp_path / name, tmp_path / f"hole_{name}")
    heard, played = heard_and_played(tmp_path / f"hole_{name}", tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(r"damaged, 0\.\d\d s of it are lost", error)
    assert 2.97 < len(heard) / 16000 < 3.03 and abs(len(heard) - len(played)) < 0.03 * 16000
    found, most = same_times(heard, played)
    assert found > 8 and most < 160
    assert same_times(heard, load_audio(tmp_path / "a.wav").numpy())[1] < 160


def test_joined_at_different_rates(tmp_path):
    soundfile.write(tmp_path / "a.wav", bursts(), 48000)
    run("-i", tmp_path / "a.wav", tmp_path / "a.mp3")
    run("-i", tmp_path / "a.wav", "-ar", "44100", "-ac", "2", tmp_path / "b.mp3")
    (tmp_path / "c.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes())
    heard, played = heard_and_played(tmp_path / "c.mp3", tmp_path)
    assert abs(len(heard) / 16000 - 6) < 0.06 and abs(len(heard) - len(played)) < 480 and same_times(heard, played)[1] < 160


@pytest.mark.parametrize("weights", [(1, -1), (0.5, -0.52), (1, -1, 0), (1, -0.5, -0.5)])
def test_channels_that_cancel(tmp_path, capsys, weights):
    """One of them is heard, and alone in the written file, as a phone plays the sum of both."""
    x = bursts()
    soundfile.write(tmp_path / "a.wav", np.concatenate([x * w for w in weights], 1), 48000, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", x * weights[0] if abs(weights[0]) > 0.51 else x * weights[1], 48000, subtype="FLOAT")
    heard, played = heard_and_played(tmp_path / "a.wav", tmp_path)
    assert capsys.readouterr().err.count("cancel each other: channel") == 1
    assert np.array_equal(heard, load_audio(tmp_path / "one.wav").numpy())
    found, most = same_times(heard, played)
    assert found > 12 and most < 160


def test_channels_that_do_not_cancel(tmp_path, capsys):
    x = bursts()
    for name, channels in (("one.wav", [x, *[x * 0] * 15]), ("two.wav", [x, -0.7 * x]), ("mono.wav", [x])):
        soundfile.write(tmp_path / name, np.concatenate(channels, 1), 48000)
        load_audio(tmp_path / name)
        assert capsys.readouterr().err == ""
