"""What a stream hears: of a file, of a pipe, at any rate of frames, and what lies under its frames.  pytest tests/test_hearing.py"""
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from test_live import VOICE, encoder  # noqa: F401

from audio import audio_features
from fast import listening as limits
from fast.listening import Listening
from jobs import live as program
from media.sound import load_audio
from media.speech import open_speech

CPU = SimpleNamespace(device=torch.device("cpu"))


def read(samples=-1):
    return torch.from_numpy(soundfile.read(VOICE, dtype="float32", frames=samples)[0])


def piped(encoder, data, fps, frames=math.inf, heard=lambda samples: None):  # noqa: F811
    file = data if isinstance(data, io.BytesIO) else io.BytesIO(data)
    return program.from_pipe(file, SimpleNamespace(load=lambda *_: encoder), CPU, fps, frames, heard)


def test_a_file_is_heard_at_the_rate_of_the_frames(encoder):  # noqa: F811
    """24 frames at 20 a second want a third block, as the first shows 3 less; behind the sound's end there is nothing."""
    speech, checkpoint = open_speech(VOICE, duration=1.2), SimpleNamespace(configs=dict(audio=encoder.config), load=lambda *_: encoder)
    made = torch.cat([features for features, *_ in program.from_file(speech, checkpoint, CPU, 20, 24)], dim=2)
    want = audio_features(encoder, load_audio(VOICE, duration=1.2), 20, 12)[0]
    assert made.shape[2] == 36 and torch.equal(made[..., :24], want) and not made[..., 24:].any()


def test_what_comes_through_a_pipe(encoder):  # noqa: F811
    """A block's features as soon as they can be known; all samples, for the sound under the frames; and how many frames there will be, at the end."""
    wav, samples = soundfile.read(VOICE, dtype="int16")[0].astype("<i2")[:24 * 800], []
    whole, blocks = torch.from_numpy(wav / np.float32(32768)), [*piped(encoder, wav.tobytes(), 20, heard=samples.append)]
    assert torch.equal(torch.cat(samples), whole) and [total for _, total, _ in blocks] == [math.inf, 24, 24]
    listening = Listening(encoder, 20)
    for first, (features, *_) in zip((0, 12, 24), blocks, strict=True):
        listening.hear(whole[listening.heard:listening.wanted(first + 12)], first > 0)
        assert torch.equal(features, listening(first, first + 12)), first
    assert [total for _, total, _ in piped(encoder, wav.tobytes(), 20, frames=20)] == [20, 20]


@pytest.mark.parametrize("data, said", [(b"", "got none"), (b"RIFF" + bytes(9999), "got a wav file")])
def test_a_pipe_without_samples(encoder, data, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        next(piped(encoder, data, 25))


def test_when_the_sound_of_a_block_was_there(encoder, monkeypatch):  # noqa: F811
    """Samples that have waited count as if they came at the speed of speech, those that are waited for from when they come."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(program.time, "perf_counter", lambda: clock.now)

    class Slow(io.BytesIO):
        def read(self, n):
            clock.now += self.takes
            return super().read(n)
    file, there = Slow(bytes(2 * 16000 * 3)), []
    blocks = piped(encoder, file, 25)
    for file.takes, after in ((1.0, 3.0), (0.0, 0.0), (0.25, 0.0)):
        there.append(next(blocks)[2])
        clock.now += after
    assert there == pytest.approx([101, 101.48, 104.25])


def test_a_window_that_has_moved_hears_the_same(encoder):  # noqa: F811
    """State 0 of a window of 1 s, the sound before it forgotten, is that of all the sound but for its normalisation."""
    wav, whole, short = read(), Listening(encoder, 25, behind=60), Listening(encoder, 25, behind=1)
    for first in range(0, 84, 12):
        for listening in (whole, short):
            listening.hear(wav[listening.heard:listening.wanted(first + 12)])
        a, b = (listening(first, first + 12)[0] for listening in (whole, short))
    gap = (a - b).norm() / a.norm()
    print(f"state 0 of 1 s behind: relative L2 {gap:.1e} (tolerance 2e-2)")
    assert short.first > 16000 and gap < 0.02
    assert (limits.BEHIND, limits.AHEAD) == (8, 0.16)


def test_an_offset_of_the_microphone_changes_nothing(encoder):  # noqa: F811
    made = []
    for offset in (0, 0.3):
        listening = Listening(encoder, 25)
        listening.hear(read(16000) + offset)
        made.append(listening(0, 12))
    assert (made[0] - made[1]).norm() < 1e-3 * made[0].norm()


def test_sound_under_the_frames_does_not_drift():
    """44,100 samples a second and 24 frames: 1,837.5 a frame."""
    under = program.Under(44100, 1, 24, 0, [np.zeros((10 ** 5, 1), np.float32)])
    assert sum(len(under.below(1)) for _ in range(48)) == 88200
