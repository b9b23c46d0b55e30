"""Audio front end on files made here: formats, bad input, alignment, windows.  Run: python -m pytest -s test_audio.py  (seconds, CPU)"""
import math
import struct
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import soxr
import torch
import torch.nn.functional as F

import audio

TINY = audio.AudioConfig(dim=32, ffn_dim=64, n_head=4, n_layer=3, conv_dim=(16, 16, 16, 24, 24, 24, 24), pos_kernel=16, pos_groups=4)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speech(rate, seconds=2.0, channels=1):
    """(n, channels): a gliding voiced tone in syllables, each channel a little quieter than the one before."""
    t = np.arange(int(rate * seconds)) / rate
    x = 0.4 * np.sin(2 * np.pi * (180 + 40 * np.sin(3 * t)) * t) * np.clip(np.sin(2 * np.pi * 2.5 * t), 0, 1)
    return np.stack([x * 0.9 ** c for c in range(channels)], 1)


def ffmpeg(*args):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, args)], check=True)


def encoder(cfg=TINY, seed=0):
    """Random weights at the scale that keeps every layer's output near 1."""
    g = torch.Generator().manual_seed(seed)
    model = audio.AudioEncoder(cfg).eval()
    for name, p in model.named_parameters():
        n = torch.randn(p.shape, generator=g)
        p.data = 0.05 * n + float("norm" in name and name.endswith("weight")) if p.ndim == 1 else n / math.prod(p.shape[1:]) ** 0.5
    return model


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ext, rate, channels, subtype", [
    ("wav", 16000, 1, "PCM_16"), ("wav", 44100, 2, "PCM_16"), ("wav", 8000, 1, "PCM_U8"), ("wav", 48000, 2, "PCM_24"),
    ("wav", 48000, 8, "FLOAT"), ("wav", 192000, 1, "FLOAT"), ("wav", 11025, 3, "DOUBLE"), ("flac", 22050, 2, "PCM_16"),
    ("aiff", 44100, 1, "PCM_16"), ("ogg", 44100, 2, "VORBIS"), ("ogg", 48000, 1, "OPUS"), ("mp3", 44100, 2, "MPEG_LAYER_III")])
def test_soundfile_formats(tmp_path, capfd, ext, rate, channels, subtype):
    path = tmp_path / f"a.{ext}"
    soundfile.write(path, speech(rate, 2.003, channels), rate, subtype=subtype)
    stored = soundfile.read(path, dtype="float32", always_2d=True)[0].T.mean(axis=0)
    want = soxr.resample(stored, rate, 16000, quality="HQ") if rate != 16000 else stored   # what librosa.load does
    want = np.pad(want, (0, math.ceil(len(stored) * (16000 / rate)) - len(want)))
    got = audio.load_audio(path)
    exact = 2e-7 if ext == "mp3" else 0  # libmpg123 rounds differently from one opening of a file to the next
    assert got.dtype == torch.float32 and got.shape == want.shape and np.abs(got.numpy() - want).max() <= exact
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name, options", [
    ("a.m4a", ["-c:a", "aac"]), ("a.aac", ["-c:a", "aac"]), ("a.opus", ["-c:a", "libopus"]), ("a.webm", ["-c:a", "libopus"]),
    ("a.mkv", ["-c:a", "pcm_s16le"]), ("-odd: %d é.m4a", ["-c:a", "aac"]),
    ("film.mp4", ["-f", "lavfi", "-i", "testsrc=s=64x64:d=2", "-c:a", "aac", "-pix_fmt", "yuv420p"])])
def test_ffmpeg_formats(tmp_path, name, options):
    soundfile.write(tmp_path / "a.wav", speech(44100, 2.0, 2), 44100)
    ffmpeg("-i", tmp_path / "a.wav", *options, tmp_path / name)
    want, got = audio.load_audio(tmp_path / "a.wav"), audio.load_audio(tmp_path / name)
    assert abs(len(got) - len(want)) < 0.11 * 16000  # .aac keeps the codec's delay and padding
    n = min(len(got), len(want))
    spectrum = torch.fft.rfft(got[:n], 2 * n).conj() * torch.fft.rfft(want[:n], 2 * n)
    match = torch.fft.irfft(spectrum).max() / (got[:n].norm() * want[:n].norm())
    assert match > 0.99, f"{name}: best correlation with the original {match:.4f}"


def test_mp3_in_blocks_equals_one_read(tmp_path):
    path, noise = tmp_path / "a.mp3", np.random.RandomState(0).standard_normal(66150) * 0.1   # noise fills the bit reservoir
    soundfile.write(path, noise, 22050)
    got = np.concatenate([block for _, block in audio.decode_soundfile(path)])[:, 0]
    assert np.abs(got - soundfile.read(path, dtype="float32")[0]).max() < 2e-7                # with seeks between blocks: 0.12


def test_start_and_duration(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", speech(16000), 16000, subtype="FLOAT")
    ffmpeg("-i", tmp_path / "a.wav", "-c:a", "pcm_f32le", tmp_path / "a.mkv")
    whole = audio.load_audio(tmp_path / "a.wav")
    for path in (tmp_path / "a.wav", tmp_path / "a.mkv"):
        assert torch.equal(audio.load_audio(path, start=0.5, duration=1.0), whole[8000:24000])
        assert torch.equal(audio.load_audio(path, start=1.25), whole[20000:])
        assert capsys.readouterr().err == ""
        assert torch.equal(audio.load_audio(path, start=1.5, duration=9), whole[24000:])
        assert "has 0.50 s from 1.5 s on, not the 9 s" in capsys.readouterr().err
        with pytest.raises(ValueError, match="wanted start at 2 s, got .* of 2.00 s"):
            audio.load_audio(path, start=2.0)
    for bad in ({"start": -1}, {"start": math.nan}, {"duration": 0}, {"duration": math.inf}):
        with pytest.raises(ValueError, match="wanted start >= 0 s and duration > 0 s"):
            audio.load_audio(tmp_path / "a.wav", **bad)


def bad_files(folder):
    """(file, part of the message it must give), one after another."""
    x = speech(16000)
    nan, inf = x.copy(), np.concatenate([x, x], 1)
    nan[20000], inf[24000, 1] = np.nan, -np.inf
    (folder / "folder.wav").mkdir()
    for name, data in (("zero.wav", b""), ("text.wav", b"hello, this is not sound\n" * 99), ("text.mp3", b"hello\n" * 999),
                       ("random.mp3", np.random.RandomState(0).bytes(20000)), ("list.m3u8", b"#EXTM3U\n#EXTINF:3,\nhttp://0.0.0.0:1/a\n")):
        (folder / name).write_bytes(data)
    for name, samples, subtype in (("empty.wav", x[:0], None), ("short.wav", x[:160], None), ("almost.wav", x[:719], None),
                                   ("nan.wav", nan, "FLOAT"), ("inf.wav", inf, "FLOAT"), ("huge.wav", x * 1e300, "DOUBLE")):
        soundfile.write(folder / name, samples, 16000, subtype=subtype)
    soundfile.write(folder / "slow.wav", x, 100)
    data = (folder / "almost.wav").read_bytes()
    for size in (20, 44, 300):
        (folder / f"cut{size}.wav").write_bytes(data[:size])
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=1", folder / "mute.mp4")
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64", "-frames:v", 1, folder / "picture.png")
    unknown, mute, short = "cannot read", "without an audio stream", "at least 45 ms of sound, got "
    return [("missing.wav", "cannot read .*No such file"), ("folder.wav", "got the folder"), ("zero.wav", "0 bytes"), ("text.wav", unknown),
            ("text.mp3", unknown), ("random.mp3", unknown), ("list.m3u8", unknown), ("cut20.wav", unknown), ("cut44.wav", "0.00 s"),
            ("cut300.wav", short + "8.0 ms"), ("empty.wav", "0.00 s"), ("short.wav", short + "10.0 ms"), ("almost.wav", short + "44.9 ms"),
            ("nan.wav", r"NaN or infinite .*1\.250 s"), ("inf.wav", r"NaN or infinite .*1\.500 s"), ("huge.wav", "NaN or infinite"),
            ("slow.wav", "says 100 Hz"), ("mute.mp4", mute), ("picture.png", mute)]


def test_bad_files_give_one_line(tmp_path, capfd):
    for name, message in bad_files(tmp_path):
        with pytest.raises(ValueError, match=message) as e:
            audio.load_audio(tmp_path / name)
        assert "\n" not in str(e.value) and ":" in str(e.value) and str(tmp_path / name) in str(e.value)
        assert capfd.readouterr().err == "", name


def test_damaged_files_are_used_with_a_warning(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", speech(16000, 4.0), 16000)
    whole = audio.load_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.flac", whole.numpy(), 16000)
    ffmpeg("-i", tmp_path / "a.wav", "-c:a", "aac", "-movflags", "faststart", tmp_path / "a.m4a")
    for name, words in (("a.wav", "4.00 s but breaks off after 2.40 s"), ("a.flac", "4.00 s but breaks off"), ("a.m4a", "with errors")):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:44 + (len(data) - 44) * 6 // 10])
        got = audio.load_audio(tmp_path / name)
        error = capsys.readouterr().err
        assert error.startswith("warning: ") and error.count("\n") == 1 and words in error
        assert 16000 < len(got) < 45000 and (name == "a.m4a" or torch.equal(got, whole[:len(got)]))


def test_sizes_left_open_by_pipes_are_normal(tmp_path, capfd):
    soundfile.write(tmp_path / "a.wav", speech(16000), 16000)
    whole = audio.load_audio(tmp_path / "a.wav")
    data = (tmp_path / "a.wav").read_bytes()
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        (tmp_path / "pipe.wav").write_bytes(data[:40] + struct.pack("<I", size) + data[44:])
        assert torch.equal(audio.load_audio(tmp_path / "pipe.wav"), whole)
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    flac = subprocess.run([exe, "-v", "error", "-i", tmp_path / "a.wav", "-f", "flac", "-"], capture_output=True, check=True).stdout
    (tmp_path / "pipe.flac").write_bytes(flac)
    assert torch.equal(audio.load_audio(tmp_path / "pipe.flac"), whole)
    assert capfd.readouterr().err == ""


def test_silence_is_allowed(tmp_path, capsys):
    x = speech(16000)
    for name, samples in (("silent.wav", x * 0), ("cancels.wav", np.concatenate([x, -x], 1))):
        soundfile.write(tmp_path / name, samples, 16000, subtype="FLOAT")
        features, clips = audio.audio_features(encoder(), audio.load_audio(tmp_path / name))
        assert capsys.readouterr().err.count("is silent") == 1 and clips == 1 and features.isfinite().all()


# ---- alignment -------------------------------------------------------------------------------------------------------

def test_interpolation_is_align_corners():
    for T in (2, 3, 49, 50, 133, 2999):
        x = torch.randn(2, T, 3, generator=torch.Generator().manual_seed(T))
        want = F.interpolate(x.transpose(1, 2), size=int(T / 50 * 30), mode="linear", align_corners=True).transpose(1, 2)
        got = audio.resample_50_to_30(x)
        assert got.shape == want.shape and (got - want).abs().max() < 1e-6  # float32 rounding of values up to 4


def test_columns_follow_time():
    columns, clips = audio.frame_columns(149, 16, 48)
    assert clips == 2 and len(columns) == 96
    assert columns[:10].tolist() == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17]        # 7.5 -> 8: ties go to the even column
    for fps in (12, 16, 24, 25, 30):
        columns, clips = audio.frame_columns(200, fps, 80)
        assert ((columns / 30 - torch.arange(len(columns)) / fps).abs() <= 0.5 / 30 + 1e-6).all()
    seconds = {5.0: 1, 5.005: 2, 10.0: 2, 10.02: 3, 0.05: 1}                   # clips of 80 frames at 16 fps are 5 s
    for s, clips in seconds.items():
        T = TINY.columns(round(s * 16000))
        assert audio.frame_columns(int(T / 50 * 30), 16, 80)[1] == clips, s


def test_frames_after_the_sound_are_zero_and_neighbours_clamp():
    states = torch.arange(1.0, 41.0).reshape(1, 40, 1)                         # column j holds j + 1
    features, clips = audio.align_to_fps(states, 16, 20)
    assert clips == 2 and features.shape == (1, 1, 40)
    columns = audio.frame_columns(40, 16, 20)[0]
    assert torch.equal(features[0, 0], torch.where(columns < 40, columns + 1.0, 0.0))
    wide, _ = audio.align_to_fps(states, 16, 20, neighbours=2)
    assert wide.shape == (1, 5, 40) and wide[0, :, 0].tolist() == [1, 1, 1, 2, 3] and torch.equal(wide[:, 2], features[:, 0])
    assert wide[0, :, 21].tolist() == [38, 39, 40, 40, 40]                     # frame 21 takes column 39, the last


# ---- network and windows ---------------------------------------------------------------------------------------------

def test_columns_match_the_convolutions():
    assert (TINY.hop, TINY.field) == (320, 400)
    for samples in (720, 721, 1039, 1040, 16000):
        states = audio.hidden_states(encoder(), torch.randn(samples))
        assert states.shape == (4, TINY.columns(samples), 32)


def test_only_the_last_state_is_normalised():
    model = encoder()
    wav = torch.from_numpy(speech(16000)[:, 0]).float()
    before = audio.hidden_states(model, wav)
    model.norm.weight.data.mul_(2), model.norm.bias.data.zero_()
    after = audio.hidden_states(model, wav)
    assert torch.equal(before[:-1], after[:-1]) and not torch.allclose(before[-1], after[-1])
    assert torch.allclose(audio.hidden_states(model, 0.1 * wav + 0.2), after, atol=1e-2)  # loudness and offset do not matter (eps 1e-7)


def test_windows_cover_every_column_once():
    for T, size in ((100, 100), (101, 100), (1000, 100), (3001, 3000), (5123, 600), (260, 50)):
        spans = audio.windows(T, size)
        assert spans[0][2] == 0 and spans[-1][3] == T and all(a[3] == b[2] for a, b in zip(spans, spans[1:]))
        for first, end, keep_from, keep_to in spans:
            assert 0 <= first <= keep_from < keep_to <= end <= T and end - first <= size
            assert keep_to == T or end > keep_to  # interpolation reads one column past what is kept


def test_windowed_against_whole():
    """Everything local agrees; attention sees less far, and with random weights it ranges over the whole sound."""
    model = encoder(TINY)
    g = torch.Generator().manual_seed(1)
    wav = torch.from_numpy(speech(16000, 20.0)[:, 0]).float() + 0.02 * torch.randn(320000, generator=g)
    whole, clips = audio.audio_features(model, wav, window=None)
    for seconds in (60, 20):  # no longer than the window: the same bits
        assert torch.equal(audio.audio_features(model, wav, window=seconds)[0], whole)
    for seconds in (15, 6):
        windowed, n = audio.audio_features(model, wav, window=seconds)
        error = [((a - b).norm() / a.norm()).item() for a, b in zip(whole, windowed)]
        print(f"\nwindows of {seconds} s on 20 s, relative L2 per state:", " ".join(f"{e:.1e}" for e in error))
        assert n == clips and error[0] < 1e-6 and max(error) < 0.2
    for block in model.blocks:  # without attention the windows must agree everywhere
        block.o.weight.data.zero_()
    whole, windowed = (audio.audio_features(model, wav, window=seconds)[0] for seconds in (None, 6))
    assert (whole - windowed).abs().max() < 1e-4 * whole.abs().max()


def test_audio_features_errors_and_shape():
    model = encoder()
    features, clips = audio.audio_features(model, torch.randn(16000 * 3), fps=16, clip_frames=20)
    assert clips == 3 and features.shape == (4, 32, 60) and not features[:, :, 48:].any() and features[:, :, :47].any(dim=1).all()
    for wav in (torch.zeros(2, 16000), torch.zeros(719), torch.zeros(0)):
        with pytest.raises(ValueError, match="at least 720 samples, got"):
            audio.audio_features(model, wav)
    with pytest.raises(ValueError, match="window of at least 1 s, got 0.5"):
        audio.audio_features(model, torch.randn(16000), window=0.5)


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-s", "-q", __file__]))
