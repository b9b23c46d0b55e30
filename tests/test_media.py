"""Pictures and videos in and out, on files made here.  python -m pytest tests/test_media.py   (seconds, CPU)

The arithmetic of sizes and preprocessing is compared with the official one in test_parity.py (case image_prep).
"""
import os
import resource
import struct
import subprocess
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageCms

from jobs.parts import Parts, digest
from media import ffmpeg, pictures, video
from media.ffmpeg import frame_rate, probe, run
from media.pictures import _cover_size, center_crop, fit_frame, fit_picture, fit_ti2v, i2v_size, load_image, s2v_size, ti2v_size
from media.frames import load_pose, read_frames
from media.sound import load_audio
from media.video import VideoWriter, check_output

FPS, SIZE, RATE = 16, (64, 96), 44100
PIXELS = np.random.RandomState(0).randint(0, 256, (40, 60, 3), np.uint8)
RGB = Image.fromarray(PIXELS)


# ---- pictures.py

def same_as_official(path):
    with Image.open(path) as picture:
        return np.array_equal(load_image(path), picture.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK"])
def test_opaque_pictures_are_what_the_official_code_reads(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    RGB.convert(mode).save(path)
    assert same_as_official(path) and load_image(path).mode == "RGB"


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.bmp", "a.gif", "a.tiff"])
def test_picture_formats(tmp_path, name):
    RGB.save(tmp_path / name)
    assert same_as_official(tmp_path / name)


def test_transparent_is_white(tmp_path):
    clear = RGB.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "a.png")
    assert (np.array(load_image(tmp_path / "a.png")) == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(np.array(load_image(tmp_path / "a.png"))[..., 1], np.rint(grey / 257))


def test_exif_rotation_and_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6      # turned by 90 degrees
    RGB.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png"), np.rot90(PIXELS, -1))
    RGB.save(tmp_path / "damaged.jpg", exif=b"Exif\0\0II*\0nonsense")
    assert load_image(tmp_path / "damaged.jpg").size == (60, 40)
    RGB.save(tmp_path / "moving.png", save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)])
    assert np.array_equal(load_image(tmp_path / "moving.png"), PIXELS)


def wide_profile():
    """An ICC profile with the primaries of Display P3 and gamma 2.2: that of sRGB, its primaries and curves exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    number = lambda *values: b"".join(struct.pack(">i", round(v * 65536)) for v in values)
    tags = [struct.unpack_from(">4sII", data, 132 + 12 * i) for i in range(struct.unpack_from(">I", data, 128)[0])]
    for name, at, size in tags:
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):      # adapted to D50
            data[at + 8:at + 20] = number(*{b"r": (0.5151, 0.2412, -0.0011), b"g": (0.2920, 0.6922, 0.0419), b"b": (0.1571, 0.0666, 0.7841)}[name[:1]])
        elif name == b"rTRC":      # shared by all three
            data[at:at + size] = (b"para" + struct.pack(">IHH", 0, 0, 0) + number(2.2)).ljust(size, b"\0")
    return bytes(data)


def shown(rgb):
    """What (..., 3) of that profile are in sRGB: linear light, matrix from P3 to sRGB, its curve."""
    matrix = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    light = np.clip((rgb / 255) ** 2.2 @ matrix.T, 0, 1)
    return 255 * np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_colour_profiles_are_converted_to_srgb(tmp_path, capsys):
    clear = RGB.copy()
    clear.putalpha(Image.fromarray(np.arange(2400).reshape(40, 60).astype(np.uint8)))
    wide, own = wide_profile(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, picture in (("a.png", RGB), ("a.tiff", RGB), ("a.webp", RGB), ("p.png", RGB.quantize()), ("clear.png", clear)):
        picture.save(tmp_path / name, icc_profile=wide, **{"lossless": True} if name == "a.webp" else {})
        want = shown(np.array(picture.convert("RGB")).astype(float))
        if name == "clear.png":
            want = 255 + (want - 255) * np.array(clear)[..., 3:] / 255
        assert np.abs(load_image(tmp_path / name) - want).max() < 3, name
    RGB.save(tmp_path / "a.jpg", icc_profile=own)
    assert same_as_official(tmp_path / "a.jpg") and capsys.readouterr().err == ""
    for profile in (b"nonsense", wide[:200]):
        RGB.save(tmp_path / "bad.png", icc_profile=profile)
        assert same_as_official(tmp_path / "bad.png") and "colour profile cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("brand, says", [("heic", "is a HEIC picture.*pillow-heif"), ("avif", "AVIF|damaged"), ("isom", "is not a picture")])
def test_pictures_of_phones_are_named(tmp_path, monkeypatch, brand, says):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + b"\0\0\0\0mif1" + brand.encode() + bytes(2000))
    with pytest.raises(ValueError, match=says) as error:
        load_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 999) + b"IDAT"


@pytest.mark.parametrize("content, says", [
    (b"no picture", "is not a picture"), (b"", "is not a picture"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    (png_header(60, 40), "damaged"), (png_header(20000, 20000), "too many pixels"), (png_header(9000, 9000), "too many pixels"),
    (png_header(1, 1), "1x1 pixels"), (None, "not found")], ids=["text", "empty", "eps", "half", "20000", "9000", "1x1", "none"])
def test_bad_pictures_get_one_line(tmp_path, recwarn, content, says):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load_image(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and not len(recwarn)


def test_half_a_picture(tmp_path):
    path = tmp_path / "a.jpg"
    RGB.save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_image(path)


def test_sizes():
    """Sizes of the official code; in the last four the step of its search decides, the usual quadratic formula gives others."""
    assert s2v_size(480, 832, 480 * 832) == (448, 832) and s2v_size(480, 832, 720 * 1280, step=128) == (512, 896)
    assert i2v_size(480, 832, 480 * 832) == (464, 832) and ti2v_size(720, 1280, 704 * 1280) == (704, 1248)
    for (height, width, area), wanted in {(627, 2927, 720896): (384, 1792), (1710, 853, 901120): (1280, 640), (595, 818, 399360): (512, 704),
                                          (1273, 2081, 901120): (768, 1152)}.items():
        assert s2v_size(height, width, area) == wanted
    for rule in (s2v_size, i2v_size, ti2v_size):
        with pytest.raises(ValueError, match="does not fit a budget"):
            rule(16, 30000, 4096)
        with pytest.raises(ValueError, match="does not fit a budget"):
            rule(480, 832, 100)


@pytest.mark.parametrize("size", [(480, 832), (100, 100), (65, 63), (333, 777), (150, 110), (60, 128)])
def test_picture_covers_the_frame(size):
    picture = Image.fromarray(np.random.RandomState(1).randint(1, 256, (*size, 3), np.uint8))
    H, W = s2v_size(*size, 8192)
    x, official = fit_picture(picture, (H, W)), fit_picture(picture, (H, W), official=True)
    bars = (official == -1).all(dim=0)
    assert x.shape == official.shape == (3, H, W) and not (x == -1).all(dim=0).any()
    assert bars.any() or torch.equal(x, official)      # the same bits wherever the official crop leaves no bars
    pose = fit_frame(np.array(picture), (H, W))
    assert (pose - x).abs().max() < 1.01 * 2 / 255      # pose frames lie where the picture lies; the picture is rounded to 8 bits


def test_scale_keeps_the_shape():
    assert _cover_size((167, 100), (64, 64), True) == (106, 64) and _cover_size((100, 167), (64, 64), True) == (64, 106)      # 106.88, cut
    for size in ((480, 832), (832, 480), (65, 63)):
        target = s2v_size(*size, 8192)
        h, w = _cover_size(size, target, False)
        assert h >= target[0] and w >= target[1] and abs(h / size[0] - w / size[1]) < 1 / min(size)


def test_which_way_halves_round():
    row = torch.arange(9)[None]
    assert center_crop(row, (1, 6)).tolist() == [[2, 3, 4, 5, 6, 7]] and center_crop(row, (1, 4))[0, 0] == 2      # 1.5 -> 2, 2.5 -> 2
    assert center_crop(row.T, (6, 1))[0, 0] == 2 and center_crop(row, (1, 12)).tolist() == [[0, *range(9), 0, 0]]
    middle = torch.from_numpy(PIXELS[:, 1:58]).permute(2, 0, 1) / 255      # 1.5 -> 1
    assert torch.equal(fit_ti2v(RGB, (40, 57)), (middle - 0.5) / 0.5)


# ---- video.py

def smooth(P, size=SIZE):
    """A clip that H.264 keeps well: colour ramps that move slowly.  (3, P, H, W)"""
    t, y, x = torch.meshgrid(torch.linspace(0, 0.5, P), torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
    return torch.stack([x, y, -x]) * 0.8 - 0.2 * t


def click_file(path, times, seconds=3.0):
    """Short 2 kHz bursts at `times`."""
    wav, t = np.zeros(int(seconds * RATE), np.float32), np.arange(180) / RATE
    for time in times:
        wav[round(time * RATE):][:180] = 0.9 * np.sin(2 * np.pi * 2000 * t)
    soundfile.write(path, wav, RATE)


def flashes(P, times):
    clip = torch.full((3, P, *SIZE), -0.8)
    clip[:, [round(t * FPS) for t in times]] = 1.0
    return clip


def seen_and_heard(path):
    """Seconds at which the picture flashes and at which the sound clicks, as a player shows them: both filled up from time 0 on."""
    def decode(*args):
        return subprocess.run(ffmpeg.ffmpeg_command("-v", "error", "-i", str(path), *args, "-"), capture_output=True).stdout

    light = np.frombuffer(decode("-vf", f"fps={FPS}:start_time=0,scale=1:1:flags=area", "-f", "rawvideo", "-pix_fmt", "gray"), np.uint8)
    sound = np.frombuffer(decode("-af", "aresample=async=1:first_pts=0", "-f", "f32le", "-ac", "1", "-ar", str(RATE)), np.float32)
    loud = np.flatnonzero(np.abs(sound) > 0.2)
    return np.flatnonzero(light > 200) / FPS, loud[np.diff(loud, prepend=-RATE) > RATE // 20] / RATE


def test_round_trip(tmp_path):
    clip = smooth(41)
    with VideoWriter(tmp_path / "a.mp4", SIZE, FPS) as out:
        for part in clip.split([7, 1, 33], dim=1):      # clips of any length
            out.write(part)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.fps, info.frames, info.video_codec, info.has_audio) == (96, 64, 16, 41, "h264", False)
    assert "41 frames of 96x64" in out.summary and "earlier file" not in out.summary
    with VideoWriter(tmp_path / "a.mp4", SIZE, FPS) as again:
        again.write(clip)
    assert "41 frames of 96x64" in again.summary and "it takes the place of an earlier file" in again.summary
    got = np.stack(list(read_frames(tmp_path / "a.mp4")))
    want = ((clip + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert np.abs(got.astype(int) - want).mean() < 3      # of 255: H.264 and half-resolution colour; a wrong colour matrix gives 6
    header = subprocess.run(ffmpeg.ffmpeg_command("-i", str(tmp_path / "a.mp4")), capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709" in header


@pytest.mark.parametrize("sound, options, P, frames, codec", [
    ("wav", {}, 48, 48, "aac"),                                      # 3.0 s = 48 frames
    ("wav", {}, 45, 45, "aac"),                                      # the sound is cut
    ("wav", {}, 60, 48, "aac"),                                      # the picture is cut
    ("m4a", {}, 60, 48, "aac"),                                      # copied
    ("mp3", {}, 48, 48, "aac"),
    ("mp3", {}, 45, 45, "aac"), ("mp3", {"av_offset": 3}, 60, 51, "aac"), ("opus", {}, 48, 48, "aac"),
    ("mp3", {"start": 0.75, "duration": 1.5}, 48, 24, "aac"),
    ("wav", {"av_offset": 3}, 48, 48, "aac"), ("wav", {"av_offset": -3}, 48, 45, "aac")])
def test_sound_stays_with_the_picture(tmp_path, sound, options, P, frames, codec):
    times = [0.5, 1.0, 1.5, 2.0, 2.5]
    source = tmp_path / "in.wav"
    click_file(source, times)
    if sound != "wav":
        run("-i", str(source), "-metadata", "title=private", str(tmp_path / f"in.{sound}"))
        source = tmp_path / f"in.{sound}"
    shift = options.get("av_offset", 0) / FPS - options.get("start", 0)
    times = [t + shift for t in times if 0 <= t + shift < frames / FPS]
    with VideoWriter(tmp_path / "a.mp4", SIZE, FPS, audio=source, **options) as out:
        out.write(flashes(P, times))
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.audio_codec) == (frames, codec) and abs(info.audio_duration - frames / FPS) < 0.01
    seen, heard = seen_and_heard(tmp_path / "a.mp4")
    assert seen.tolist() == times and len(heard) == len(times) and np.abs(heard - seen).max() < 0.002      # seconds; a frame is 0.0625
    assert b"private" not in (tmp_path / "a.mp4").read_bytes()


@pytest.mark.parametrize("name, options, copied", [
    ("a.m4a", ["-c:a", "aac"], True), ("a.m4a", ["-c:a", "aac", "-ac", "8"], False), ("a.m4a", ["-c:a", "alac"], False),
    ("a.mp3", [], False), ("a.ac3", [], False), ("a.eac3", ["-c:a", "eac3"], False), ("a.mp4", ["-c:a", "flac"], False)])
def test_written_sound_plays_everywhere(tmp_path, name, options, copied):
    """AAC of one or two channels, whatever came, behind the index of the file: others are silent in QuickTime, on iOS or in browsers."""
    run("-f", "lavfi", "-i", "anoisesrc=d=2:r=48000", *options, tmp_path / name)
    with VideoWriter(tmp_path / "out.mp4", SIZE, FPS, audio=tmp_path / name) as out:
        out.write(smooth(40))
    info, data = probe(tmp_path / "out.mp4"), (tmp_path / "out.mp4").read_bytes()
    assert out.sound.as_is == copied and info.audio_codec == "aac" and info.audio_layout in ("mono", "stereo")
    assert data.index(b"moov") < data.index(b"mdat") and abs(info.audio_duration - 2) < 0.05      # ac3 holds whole packets


def test_sound_of_a_video_starts_with_its_first_sample(tmp_path):
    """In a video file the sound may begin late; the audio encoder counts samples, so the sound written must too."""
    times = [0.5, 1.5, 2.75]
    click_file(tmp_path / "in.wav", times)
    with VideoWriter(tmp_path / "in.mp4", SIZE, FPS) as out:
        out.write(smooth(60))
    late = ["-itsoffset", "0.5", "-i", str(tmp_path / "in.wav"), "-c:v", "copy", "-c:a", "alac"]
    run("-i", str(tmp_path / "in.mp4"), *late, str(tmp_path / "late.mp4"))
    with VideoWriter(tmp_path / "a.mp4", SIZE, FPS, audio=tmp_path / "late.mp4") as out:
        out.write(flashes(60, times))
    assert probe(tmp_path / "a.mp4").frames == 48      # 3 s of samples
    seen, heard = seen_and_heard(tmp_path / "a.mp4")
    assert seen.tolist() == times and len(heard) == 3 and np.abs(heard - seen).max() < 0.002


@pytest.mark.parametrize("channels, rate, subtype", [(8, 192000, "PCM_24"), (16, 48000, "FLOAT")])
def test_unusual_sound(tmp_path, channels, rate, subtype):
    soundfile.write(tmp_path / "in.wav", np.random.RandomState(0).uniform(-0.1, 0.1, (rate, channels)), rate, subtype)
    with VideoWriter(tmp_path / "a.mp4", SIZE, FPS, audio=tmp_path / "in.wav") as out:
        out.write(smooth(20))
    info = probe(tmp_path / "a.mp4")
    assert info.frames == 16 and info.audio_codec == "aac" and abs(info.audio_duration - 1) < 0.001


def test_png_frames_are_exact(tmp_path):
    clip = torch.rand(3, 3, 33, 51) * 2.4 - 1.2      # odd sizes are fine, values outside [-1, 1] are clamped
    (tmp_path / "ready").mkdir()
    for name in ("new/", "ready"):
        with VideoWriter(f"{tmp_path}/{name}", (33, 51), FPS) as out:
            out.write(clip)
        assert sorted(os.listdir(tmp_path / name)) == ["000000.png", "000001.png", "000002.png"]
        got = np.array(Image.open(tmp_path / name / "000002.png"))
        assert np.array_equal(got, ((clip[:, 2].clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 0))


def kill_encoder(out):
    """While it is fed."""
    pictures = out._pictures

    def then_kill(clip):
        yield from pictures(clip)
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), 9)
    out._pictures = then_kill
    out.write(smooth(20))


def leave(error):
    def raise_it(out):
        raise error
    return raise_it


@pytest.mark.parametrize("accident, error, says", [
    (kill_encoder, OSError, "killed by SIGKILL"),
    (lambda out: out.write(torch.full((3, 1, *SIZE), torch.nan)), ValueError, "NaN"),
    (lambda out: out.write(smooth(2, (62, 96))), ValueError, "takes frames"),
    (leave(RuntimeError("out of memory")), RuntimeError, "memory"),
    (leave(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop")])
def test_failure_leaves_nothing(tmp_path, accident, error, says):
    (tmp_path / "a.mp4").write_bytes(b"an earlier video")
    with pytest.raises(error, match=says) as caught, VideoWriter(tmp_path / "a.mp4", SIZE, FPS) as out:
        out.write(smooth(20))
        accident(out)
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"an earlier video"
    assert "\n" not in str(caught.value)
    with pytest.raises(ChildProcessError):                           # no process left either
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("name", ["a.mp4", "frames/"])
def test_disk_full(tmp_path, name):
    """A file size limit stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, before[1]))
    try:
        with pytest.raises(OSError, match="cannot write") as error, VideoWriter(f"{tmp_path}/{name}", (256, 256)) as out:
            out.write(torch.rand(3, 8, 256, 256) * 2 - 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_the_picture_is_kept_where_its_sound_fails(tmp_path):
    """The clips of hours, though the sound file has gone meanwhile."""
    click_file(tmp_path / "in.wav", [1.0])
    with pytest.raises(OSError, match="cannot finish .*a.mp4 .*; the finished clips are kept in .*a.mp4.parts") as error:
        with VideoWriter(tmp_path / "a.mp4", SIZE, FPS, audio=tmp_path / "in.wav") as out:
            out.write(smooth(20))
            os.remove(tmp_path / "in.wav")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["a.mp4.parts"] and probe(tmp_path / "a.mp4.parts" / "0000.mp4").frames == 20


def test_sound_that_is_replaced_meanwhile(tmp_path):
    """What was made to one sound does not get another; the same bytes again will do."""
    other, sound = tmp_path / "other.wav", tmp_path / "in.wav"
    voice = np.sin(np.arange(2 * RATE) / 20)
    soundfile.write(sound, voice, RATE)
    soundfile.write(other, 0 * voice, RATE)
    out, made_from = str(tmp_path / "a.mp4"), digest(sound)

    def writer():
        return VideoWriter(out, SIZE, FPS, audio=sound, parts=Parts(out, dict(audio=made_from), total=2))
    with pytest.raises(OSError, match="cannot finish .*in.wav was changed while the video was made: put it back .*; the finished clips are kept"):
        with writer() as first:
            first.write(smooth(8))
            os.replace(other, sound)
    soundfile.write(sound, voice, RATE)
    with writer() as again:
        assert again.parts.done == 1
        again.write(smooth(8))
    assert probe(out).frames == 16 and not os.path.exists(f"{out}.parts")


def test_sound_that_is_only_touched_is_the_same(tmp_path):
    soundfile.write(tmp_path / "in.wav", np.sin(np.arange(RATE) / 20), RATE)
    out = str(tmp_path / "a.mp4")
    with VideoWriter(out, SIZE, FPS, audio=tmp_path / "in.wav", parts=Parts(out, dict(audio=digest(tmp_path / "in.wav")), total=1)) as writer:
        writer.write(smooth(8))
        os.utime(tmp_path / "in.wav")
    assert probe(out).frames == 8


@pytest.mark.parametrize("peak", [3.8e7, 1e8, 32768.0])
def test_sound_of_another_scale_is_written_quieter(tmp_path, capsys, peak):
    """At such peaks the AAC encoder never ended; below them it wrote noise."""
    soundfile.write(tmp_path / "in.wav", (peak * np.sin(np.arange(RATE) / 20)).astype(np.float32), RATE, "FLOAT")
    with VideoWriter(tmp_path / "a.mp4", SIZE, FPS, audio=tmp_path / "in.wav") as out:
        out.write(smooth(16))
    assert "where 1 is full scale" in capsys.readouterr().err
    got = subprocess.run(ffmpeg.ffmpeg_command("-v", "error", "-i", tmp_path / "a.mp4", "-f", "f32le", "-"), capture_output=True).stdout
    assert 0.9 < np.abs(np.frombuffer(got, np.float32)).max() < 1.1


def test_sound_beyond_any_scale_is_refused(tmp_path):
    soundfile.write(tmp_path / "in.wav", np.full(RATE, 1e30, np.float32), RATE, "FLOAT")
    with pytest.raises(ValueError, match="wanted audio in .-1, 1., .* has samples of 1e.30: export it again"):
        VideoWriter(tmp_path / "a.mp4", SIZE, audio=tmp_path / "in.wav")


@pytest.mark.parametrize("path, says", [
    ("a.avi", "ends in .mp4"), ("a", "ends in .mp4"), ("file/a.mp4", "is a file"),
    (".", "not empty"), ("full/", "not empty"), ("/proc/a.mp4", "cannot write into"), ("/proc/frames/", "cannot write into")])
def test_outputs_that_cannot_be(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").touch()
    with pytest.raises(ValueError, match=says) as error:
        check_output(path)
    assert "\n" not in str(error.value) and sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_space_and_encoder_are_checked(tmp_path, monkeypatch):
    check_output(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="make room"):
        check_output(tmp_path / "a.mp4", need=2**60)
    for program, says in (("/bin/false", "no H.264 encoder"), ("/nowhere/ffmpeg", "no ffmpeg program found")):
        monkeypatch.setattr(ffmpeg.imageio_ffmpeg, "get_ffmpeg_exe", lambda: program)
        with pytest.raises(ValueError, match=f"{says}.*ends in /"):
            check_output(tmp_path / "a.mp4")
        with VideoWriter(f"{tmp_path}/{program[1:4]}/", SIZE, audio="any.wav") as out:      # PNG frames need no ffmpeg
            out.write(smooth(1))


def test_pipes_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="wanted an audio file, got the pipe .*: save it first"):
        load_audio(tmp_path / "pipe")
    with pytest.raises(ValueError, match="wanted a picture file, got a pipe or a folder"):
        load_image(tmp_path / "pipe")


@pytest.mark.parametrize("content, says", [
    (None, "not found"), (b"no sound", "no video or sound"), ("silent", "holds no sound"), ("short", "nothing is left")])
def test_bad_sound(tmp_path, content, says):
    path = tmp_path / "in.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "short":
        click_file(path, [])
    elif content == "silent":
        path = tmp_path / "in.mp4"
        with VideoWriter(path, SIZE) as out:
            out.write(smooth(2))
    with pytest.raises(ValueError, match=says) as error:
        VideoWriter(tmp_path / "a.mp4", SIZE, audio=path, start=5.0)
    assert "\n" not in str(error.value)


# ---- pose videos

def numbered_video(path, P, fps):
    """Frame n shows n // 16 on its left half and n % 16 on its right, as grey levels far enough apart to survive H.264."""
    clip = torch.empty(3, P, *SIZE)
    for n in range(P):
        clip[:, n, :, :48], clip[:, n, :, 48:] = ((level * 16 + 8) / 127.5 - 1 for level in divmod(n, 16))
    with VideoWriter(path, SIZE, fps) as out:
        out.write(clip)


def numbers(clip):
    """Frame numbers of a (3, P, H, W) clip, None where it is all black."""
    left, right = (((clip[1, :, :, c].mean(1) + 1) * 127.5 // 16).int().tolist() for c in (24, 72))
    return [None if (clip[:, n] == -1).all() else left[n] * 16 + right[n] for n in range(clip.shape[1])]


@pytest.mark.parametrize("fps, step", [(12, 1), (24, 2), (60, 4)])
def test_official_pose_sampling(tmp_path, fps, step):
    numbered_video(tmp_path / "a.mp4", 40, fps)
    every = list(range(0, 40, step))[:10]
    assert numbers(load_pose(tmp_path / "a.mp4", 10, SIZE, official=True)) == every
    assert numbers(load_pose(tmp_path / "a.mp4", 4, SIZE, first=3, official=True)) == every[3:7]


@pytest.mark.parametrize("fps", [10, 16, 23.976, 24, 25, 30, 60])
def test_pose_keeps_its_speed(tmp_path, fps):
    """Pose frame i is the frame of the file nearest to i/16 s."""
    numbered_video(tmp_path / "a.mp4", 60, fps)
    got = np.array(numbers(load_pose(tmp_path / "a.mp4", 12, SIZE, first=4)))
    assert np.abs(got / fps - np.arange(4, 16) / FPS).max() <= 0.5001 / fps


def test_pose_keeps_its_speed_at_uneven_rates(tmp_path):
    """Of 60 frames a second two in three are kept, and none between 0.5 and 1 s, as screen recorders do where nothing moves."""
    numbered_video(tmp_path / "even.mp4", 120, 60)
    run("-i", tmp_path / "even.mp4", "-vf", r"select=mod(n+1\,3)*not(between(n\,30\,59))", "-fps_mode", "vfr", "-qp", "0", tmp_path / "a.mp4")
    kept = np.array([n for n in range(120) if n % 3 != 2 and not 30 <= n < 60])
    wanted = np.arange(24) / FPS * 60
    assert np.abs(np.array(numbers(load_pose(tmp_path / "a.mp4", 24, SIZE))) - wanted).tolist() == np.abs(kept[:, None] - wanted).min(0).tolist()


@pytest.mark.parametrize("name, rate", [("a.mp4", "24"), ("a.mkv", "24"), ("a.mkv", "30000/1001"), ("a.avi", "30000/1001"), ("a.webm", "25")])
def test_frame_rate(tmp_path, name, rate):
    """mkv and webm count in milliseconds, avi in frames; a wrong rate of 24 is a wrong step of 1."""
    run("-f", "lavfi", "-i", f"testsrc=s=64x64:d=2:r={rate}", str(tmp_path / name))
    assert frame_rate(tmp_path / name) == float(Fraction(rate))


def test_frame_rate_of_one_frame(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", SIZE, FPS) as out:
        out.write(smooth(1))
    assert frame_rate(tmp_path / "a.mp4") == FPS


def test_frame_rate_of_uneven_frames(tmp_path):
    """Screen and browser recordings leave frames out: what counts is their mean rate, 40 of each 60 here."""
    run("-f", "lavfi", "-i", "testsrc=s=64x64:d=4:r=60", "-vf", "select=mod(n\\,3)", "-fps_mode", "vfr", str(tmp_path / "a.webm"))
    assert abs(probe(tmp_path / "a.webm").fps - 40) < 0.2 and probe(tmp_path / "a.webm").frames == 160


def test_pose_that_ends_early(tmp_path, capsys):
    numbered_video(tmp_path / "a.mp4", 20, 16)
    assert numbers(load_pose(tmp_path / "a.mp4", 10, SIZE, first=10)) == list(range(10, 20)) and capsys.readouterr().err == ""
    for first, got, warnings in ((16, [16, 17, 18, 19, None], 1), (20, [None] * 5, 1), (25, [None] * 5, 0)):      # said once, where it ends
        assert numbers(load_pose(tmp_path / "a.mp4", 5, SIZE, first=first)) == got
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == warnings and all("ends after 20 frames" in line for line in lines)


def test_pose_is_a_video(tmp_path):
    click_file(tmp_path / "a.wav", [])
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for name, says in (("a.wav", "wanted a pose video"), ("a.mp4", "no video or sound"), ("b.mp4", "not found")):
        with pytest.raises(ValueError, match=says):
            load_pose(tmp_path / name, 4, SIZE)
