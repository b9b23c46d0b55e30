"""wav2vec2 with random weights, alignment to video frames, windows.  python -m pytest -s tests/test_audio.py   (seconds, CPU)"""
import math

import pytest
import torch
import torch.nn.functional as F

import audio

TINY = audio.AudioConfig(dim=32, ffn_dim=64, n_head=4, n_layer=3, conv_dim=(16, 16, 16, 24, 24, 24, 24), pos_kernel=16, pos_groups=4)


def speech(seconds=2.0):
    """(samples,): a gliding voiced tone in syllables."""
    t = torch.arange(round(16000 * seconds), dtype=torch.float64) / 16000
    return (0.4 * (2 * math.pi * (180 + 40 * (3 * t).sin()) * t).sin() * (2 * math.pi * 2.5 * t).sin().clamp(0, 1)).float()


def encoder(cfg=TINY, seed=0):
    """Random weights at the scale that keeps every layer's output near 1."""
    g = torch.Generator().manual_seed(seed)
    model = audio.Wav2Vec2(cfg).eval()
    for name, p in model.named_parameters():
        n = torch.randn(p.shape, generator=g)
        p.data = 0.05 * n + float("norm" in name and name.endswith("weight")) if p.ndim == 1 else n / math.prod(p.shape[1:]) ** 0.5
    return model


# ---- alignment -------------------------------------------------------------------------------------------------------

def test_interpolation_is_align_corners():
    for T in (2, 3, 49, 50, 133, 2999):
        x = torch.randn(2, T, 3, generator=torch.Generator().manual_seed(T))
        want = F.interpolate(x.transpose(1, 2), size=int(T / 50 * 30), mode="linear", align_corners=True).transpose(1, 2)
        got = audio.resample_50_to_30(x)
        assert got.shape == want.shape and (got - want).abs().max() < 1e-6  # float32 rounding of values up to 4


def test_indices_follow_time():
    indices, clips = audio.audio_frame_indices(149, 16, 48)
    assert clips == 2 and len(indices) == 96
    assert indices[:10].tolist() == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17]        # 7.5 -> 8: ties go to the even one
    for fps in (12, 16, 24, 25, 30):
        indices, clips = audio.audio_frame_indices(200, fps, 80)
        assert ((indices / 30 - torch.arange(len(indices)) / fps).abs() <= 0.5 / 30 + 1e-6).all()
    seconds = {5.0: 1, 5.005: 2, 10.0: 2, 10.02: 3, 0.05: 1}                   # clips of 80 frames at 16 fps are 5 s
    for s, clips in seconds.items():
        T = TINY.frames(round(s * 16000))
        assert audio.audio_frame_indices(int(T / 50 * 30), 16, 80)[1] == clips, s


def test_frames_after_the_sound_are_zero_and_neighbours_clamp():
    states = torch.arange(1.0, 41.0).reshape(1, 40, 1)                         # audio frame j holds j + 1
    features, clips = audio.align_to_fps(states, 16, 20)
    assert clips == 2 and features.shape == (1, 1, 40)
    indices = audio.audio_frame_indices(40, 16, 20)[0]
    assert torch.equal(features[0, 0], torch.where(indices < 40, indices + 1.0, 0.0))
    wide, _ = audio.align_to_fps(states, 16, 20, neighbours=2)
    assert wide.shape == (1, 5, 40) and wide[0, :, 0].tolist() == [1, 1, 1, 2, 3] and torch.equal(wide[:, 2], features[:, 0])
    assert wide[0, :, 21].tolist() == [38, 39, 40, 40, 40]                     # video frame 21 takes audio frame 39, the last


# ---- network and windows ---------------------------------------------------------------------------------------------

def test_frames_match_the_convolutions():
    assert (TINY.hop, TINY.field) == (320, 400)
    for samples in (720, 721, 1039, 1040, 16000):
        states = audio.hidden_states(encoder(), torch.randn(samples))
        assert states.shape == (4, TINY.frames(samples), 32)


def test_only_the_last_state_is_normalised():
    model = encoder()
    wav = speech()
    before = audio.hidden_states(model, wav)
    model.norm.weight.data.mul_(2), model.norm.bias.data.zero_()
    after = audio.hidden_states(model, wav)
    assert torch.equal(before[:-1], after[:-1]) and not torch.allclose(before[-1], after[-1])
    assert torch.allclose(audio.hidden_states(model, 0.1 * wav + 0.2), after, atol=1e-2)  # loudness and offset do not matter (eps 1e-7)


def test_windows_cover_every_frame_once():
    for T, size in ((100, 100), (101, 100), (1000, 100), (3001, 3000), (5123, 600), (260, 50)):
        spans = audio.windows(T, size)
        assert spans[0][2] == 0 and spans[-1][3] == T and all(a[3] == b[2] for a, b in zip(spans, spans[1:]))
        for first, end, keep_from, keep_to in spans:
            assert 0 <= first <= keep_from < keep_to <= end <= T and end - first <= size
            assert keep_to == T or end > keep_to  # interpolation reads one past what is kept


def test_windowed_against_whole():
    """Everything local agrees; attention sees less far, and with random weights it ranges over the whole sound."""
    model = encoder(TINY)
    g = torch.Generator().manual_seed(1)
    wav = speech(20.0) + 0.02 * torch.randn(320000, generator=g)
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
    assert audio.audio_features(model, torch.zeros(16000))[0].isfinite().all()      # silence
    for wav in (torch.zeros(2, 16000), torch.zeros(719)):
        with pytest.raises(ValueError, match="at least 720 samples, got"):
            audio.audio_features(model, wav)
    with pytest.raises(ValueError, match="window of at least 1 s, got 0.5"):
        audio.audio_features(model, torch.randn(16000), window=0.5)
