"""Frames and their sound written while they are made, in a file or a pipe; and what a pipe of sound may be.  python -m pytest tests/test_stream.py"""
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from media import stream as out
from media import video
from media.ffmpeg import ffmpeg_command, probe, run
from media.frames import read_frames

VOICE = str(Path(__file__).parents[1] / "samples" / "voice.flac")


def test_the_encoder_reads_nothing_ahead(monkeypatch):
    """ffmpeg 7 wants megabytes of raw sound to find out what it is, and waits for them, as we for it: of no input may it read more than is there."""
    def popen(command, **options):
        commands.append(command)
        return started(command, **options)
    commands, started = [], out.subprocess.Popen
    monkeypatch.setattr(out.subprocess, "Popen", popen)
    with open(os.devnull, "wb") as file, out.StreamWriter(file.fileno(), (32, 48), 25, rate=16000) as writer:
        writer.write(torch.zeros(3, 12, 32, 48), np.zeros((7680, 1), np.float32))
    inputs = " ".join(commands[-1]).split(" -i ")[:-1]
    assert len(inputs) == 2 and all("-probesize 32 -analyzeduration 0" in words for words in inputs)


def rescued(seconds, work):
    """A timer that has begun."""
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def test_frames_wait_while_ffmpeg_takes_none(tmp_path):
    """It takes none while their sound is 0.1 to 0.3 s behind: with 8 kHz sound, aac frames of 128 ms, ever so often. That sound comes with later frames:
    whoever writes must not wait."""
    with out.StreamWriter(str(tmp_path / "a.mp4"), (320, 320), 25, rate=8000) as writer:
        writer.write(torch.zeros(3, 1, 320, 320), np.zeros((320, 1), np.float32))
        os.kill(writer.encoder.pid, signal.SIGSTOP)
        rescue, start = rescued(10, lambda: os.kill(writer.encoder.pid, signal.SIGCONT)), time.monotonic()
        for _ in range(2):
            writer.write(torch.zeros(3, 12, 320, 320), np.zeros((3840, 1), np.float32))
        taken = time.monotonic() - start
        os.kill(writer.encoder.pid, signal.SIGCONT)
        rescue.cancel()
    assert taken < 5 and probe(str(tmp_path / "a.mp4")).frames == 25


def test_sound_may_come_after_its_frames(tmp_path):
    """With --av-offset -30 the sound of a live frame is that of 30 frames later."""
    with out.StreamWriter(str(tmp_path / "a.mp4"), (160, 160), 25, rate=8000, waiting=out.WAITING + 30) as writer:
        rescue = rescued(20, lambda: writer.encoder.kill())
        for block in range(6):
            writer.write(torch.zeros(3, 12, 160, 160), np.zeros((3840 if block >= 3 else 0, 1), np.float32))
            time.sleep(0.1)                                          # the encoder is done with all that it takes
    rescue.cancel()
    assert probe(str(tmp_path / "a.mp4")).frames == 72


def test_a_reader_that_stalls_is_not_waited_for_after_an_error(monkeypatch):
    monkeypatch.setattr(out, "PATIENCE", 0.1)
    reader, writer = os.pipe()
    for raw in (True, False):
        with pytest.raises(KeyboardInterrupt):
            with out.StreamWriter(writer, (256, 256), 25, raw=raw) as stream:
                stream.write(torch.rand(3, 20, 256, 256))
                raise KeyboardInterrupt
    os.close(reader), os.close(writer)


def test_a_player_can_open_it_meanwhile(tmp_path):
    """What was written so far is a valid mp4 before the end, beside the file of that name that was there before; in the end it takes its place."""
    path, other, frames = tmp_path / "a.mp4", tmp_path / "a.partial.mp4", torch.rand(3, 12, 32, 48)
    path.write_text("made before"), other.write_text("of another run")
    with out.StreamWriter(str(path), (32, 48), 25, rate=16000) as writer:
        meanwhile = tmp_path / "a.partial1.mp4"
        assert writer.file is None and not meanwhile.exists()
        for _ in range(6):
            writer.write(frames, np.zeros((7680, 1), np.float32))
        assert writer.file == str(meanwhile)
        for _ in range(200):
            if meanwhile.exists() and meanwhile.stat().st_size > 20000:
                break
            writer.write(frames[:, :1], np.zeros((640, 1), np.float32))
        early = probe(str(meanwhile))
        assert path.read_text() == "made before"
    done = probe(str(path))
    assert early.width == 48 and early.frames > 0 and not meanwhile.exists() and other.read_text() == "of another run"
    assert done.frames == writer.frames and done.fps == 25 and abs(done.audio_duration - writer.frames / 25) < 0.1


@pytest.mark.parametrize("raw", [False, True])
def test_two_streams_of_one_name_are_two_files_meanwhile(raw, tmp_path):
    """That begin at once: each has what it was given, the later to end takes the name."""
    path = str(tmp_path / "a.mp4")
    with out.StreamWriter(path, (32, 48), 25, raw=raw) as one, out.StreamWriter(path, (32, 48), 25, raw=raw) as two:
        for _ in range(3):
            one.write(torch.zeros(3, 12, 32, 48)), two.write(torch.ones(3, 8, 32, 48))
        assert {one.file, two.file} == {str(tmp_path / "a.partial.mp4"), str(tmp_path / "a.partial1.mp4")}
        two.close()
        assert (os.path.getsize(two.file) == 24 * 32 * 48 * 3) if raw else (probe(two.file).frames == 24)
    assert (os.path.getsize(path) == 36 * 32 * 48 * 3) if raw else (probe(path).frames == 36)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_disk_that_is_full_from_the_first(tmp_path, monkeypatch):
    """No empty file is kept, and what would help is said."""
    monkeypatch.setattr(out, "ffmpeg_command", lambda *given: [sys.executable, "-c", "import sys; sys.exit('No space left on device')"])
    with pytest.raises(OSError, match="No space left on device.*: make room or choose another disk"):
        with out.StreamWriter(str(tmp_path / "a.mp4"), (16, 16), 25) as writer:
            writer.write(torch.zeros(3, 1, 16, 16))
    assert not os.listdir(tmp_path) and writer.file is None


def test_a_stream_that_ends_early_is_kept_and_takes_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("made before")
    with pytest.raises(KeyboardInterrupt):
        with out.StreamWriter(str(path), (32, 48), 25) as writer:
            writer.write(torch.zeros(3, 12, 32, 48))
            raise KeyboardInterrupt
    assert path.read_text() == "made before" and probe(writer.file).frames == 12
    later = tmp_path / "new" / "folder" / "a.mp4"                    # made when the first frame comes
    with pytest.raises(OSError, match="cannot write .*: No such file"):
        with out.StreamWriter(str(later), (32, 48), 25) as writer:
            writer.write(torch.zeros(3, 12, 32, 48))
            writer.close()
            os.remove(writer.file)


@pytest.mark.parametrize("raw", [True, False])
def test_a_reader_that_goes_is_named(raw):
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(OSError, match="cannot write to the pipe: the reader has gone"):
        with out.StreamWriter(writer, (16, 16), 25, raw=raw) as stream:
            stream.write(torch.zeros(3, 30, 16, 16))
    os.close(writer)


def test_frames_must_be_numbers(tmp_path):
    with pytest.raises(ValueError, match="frames 0 to 0 hold NaN"):
        out.StreamWriter(str(tmp_path / "a.mp4"), (16, 16), 25).write(torch.full((3, 1, 16, 16), torch.nan))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("begins, name", [(b"RIFF$\0\0\0", "wav"), (b"fLaC\0\0\0\"", "flac"), (b"\0\0\0 ftyp", "m4a"), (b"ID3\4", "mp3"), (b"FORM", "aiff"),
                                          (b"OggS", "ogg"), (b"\x1aE\xdf\xa3", "webm"),
                                          (b"\1\2\3\4", None), (b"\xff\xf3\x64\xc4", None), (b"\xff\xf1\x60\x40\2\x1f", None)])
def test_a_file_in_place_of_samples(begins, name):
    assert out.named_format(out.pcm(io.BytesIO(begins + bytes(40)), 20)) == name


@pytest.mark.parametrize("name, options", [("mp3", ["-write_xing", "0", "-id3v2_version", "0"]), ("mp3", ["-id3v2_version", "0"]),
                                           ("aac", []), ("aiff", [])])
def test_a_file_without_a_header_in_place_of_samples(name, options, tmp_path):
    run("-i", VOICE, *options, tmp_path / f"a.{name}")
    with open(tmp_path / f"a.{name}", "rb") as file:
        assert out.named_format(out.pcm(file, 10_000)) == name
    run("-i", VOICE, "-f", "s16le", "-ar", "16000", tmp_path / "a.raw")
    with open(tmp_path / "a.raw", "rb") as file:
        assert out.named_format(out.pcm(file, 10_000)) is None


def test_raw_frames_into_what_is_no_file(tmp_path, monkeypatch):
    """A named pipe or a device stays what it is, and no ffmpeg is wanted."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(video, "_check_encoder", lambda: 1 / 0)
    for path in (tmp_path / "pipe", "/dev/full", tmp_path / "a.rgb"):
        video.check_output(str(path), raw=True)
    with pytest.raises(ValueError, match="wanted a name that ends in"):
        video.check_output(str(tmp_path / "a.rgb"))
    assert out.meanwhile("/dev/full") == "/dev/full" and os.listdir(tmp_path) == ["pipe"]


def test_pixels_come_back(tmp_path):
    """Black, white and colours: raw exactly, from an mp4 within 5 of 255. Numbers beyond are cut, and every player can show it."""
    colours = torch.tensor([[-1, -1, -1], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0], [0.2, -0.4, 0.7], [1.1, -1.1, 1.1]])
    frames, wanted = colours.T[:, :, None, None].expand(3, 7, 32, 48), (colours.clamp(-1, 1).numpy() + 1) * 127.5
    for name, raw in (("a.mp4", False), ("a.rgb", True)):
        with out.StreamWriter(str(tmp_path / name), (32, 48), 25, raw=raw) as writer:
            writer.write(frames)
    mp4 = np.stack(list(read_frames(str(tmp_path / "a.mp4"))))[:, 16, 24].astype(int)
    raw = np.fromfile(tmp_path / "a.rgb", np.uint8).reshape(7, 32, 48, 3)[:, 5, 5]
    assert np.abs(mp4 - wanted).max() < 5 and np.abs(raw - wanted).max() < 1
    said = subprocess.run(ffmpeg_command("-i", str(tmp_path / "a.mp4")), capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709" in said, said


def test_waiting_adds_up(tmp_path, monkeypatch):
    now = iter([1, 2, 5, 7])
    with out.StreamWriter(str(tmp_path / "a.rgb"), (16, 16), 25, raw=True) as writer:
        monkeypatch.setattr(out.time, "perf_counter", lambda: next(now))
        for _ in range(2):
            writer.write(torch.zeros(3, 1, 16, 16))
        monkeypatch.undo()
    assert writer.waited == 3


def test_bytes_that_are_taken_in_parts():
    taken = []

    class Slow(io.BytesIO):
        def write(self, part):
            taken.append(bytes(part[:3]))
            return len(taken[-1])
    pipe = out.Pipe(Slow())
    pipe.put(memoryview(b"01234567"))
    pipe.close()
    assert taken == [b"012", b"345", b"67"]
