"""The time that a run will take: what is counted. How fast a machine is, is not under test.

    pytest tests/test_estimate.py
"""
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sample
from fast import estimate
from formats.checkpoints import build, open_checkpoint
from media.ffmpeg import run
from tiny import random_weights
from vae import VAE, VAE22, VAEConfig
from wan_s2v import WanS2VPipeline

HERE = Path(__file__).parents[1]
GIVEN = dict(audio=str(HERE / "samples" / "voice.flac"), image=str(HERE / "samples" / "face.png"), size=(64, 64), steps=1, clip_frames=16, guidance=1)


@pytest.mark.parametrize("config", [VAEConfig(), VAE22], ids=["2.1", "2.2"])
def test_operations_of_the_vae(config):
    """Within 0.2% of PyTorch's own counter, for one latent frame more: attention of 6 x 4 latents is what is left out."""
    def third(way, *shapes):
        """Of three pieces that come one after another."""
        with FlopCounterMode(display=False) as counter:
            totals = [counter.get_total_flops() for _ in getattr(net, way)((torch.empty(1, *shape, device="meta") for shape in shapes), chunk=1)]
        assert len(totals) == 3
        return totals[2] - totals[1]
    net, (t, s, _) = build("vae", config), config.stride
    encoding = third("encode_stream", (3, 1, 6 * s, 4 * s), *[(3, t, 6 * s, 4 * s)] * 2)
    decoding = third("decode_stream", *[(config.z_dim, 1, 6, 4)] * 3)
    assert estimate.vae_flops(config, 6, 4) == pytest.approx((encoding, decoding), rel=2e-3)


@pytest.mark.parametrize("name, options", [
    ("tiny-quick", GIVEN | dict(clips=1)), ("tiny-quick", GIVEN | dict(clips=3)), ("tiny-quick", GIVEN | dict(clips=2, start_from_ref=True)),
    ("tiny-quick", GIVEN | dict(clips=2, pose_video="pose.mp4")), ("tiny-t2v", dict(prompt="a")), ("tiny-i2v", dict(image=GIVEN["image"])),
    ("tiny-ti2v", dict(prompt="a")), ("tiny-ti2v", dict(prompt="a", image=GIVEN["image"]))])
def test_latents_that_a_run_encodes_and_decodes(tmp_path, monkeypatch, name, options):
    """All that pass through the VAE in a run are counted before it."""
    if "pose_video" in options:
        run("-f", "lavfi", "-i", "color=white:size=64x64:rate=16", "-frames:v", "40", str(tmp_path / "pose.mp4"))
        options = options | dict(pose_video=str(tmp_path / "pose.mp4"))
    if "audio" not in options:
        options = options | dict(size=(64, 64), frames=9, steps=1, guidance=1)
    seen = {"encode_stream": 0, "decode_stream": 0}

    def counting(way, stream):
        def counted(self, pieces, *chunk):
            pieces = list(pieces)
            frames = sum(piece.shape[2] for piece in pieces)
            seen[way] += frames if way == "decode_stream" else 1 + (frames - 1) // self.stride[0]
            return stream(self, pieces, *chunk)
        return counted
    for way in seen:
        monkeypatch.setattr(VAE, way, counting(way, getattr(VAE, way)))
    pipeline = WanS2VPipeline(open_checkpoint(random_weights.ensure_tiny(HERE / "weights" / name)))
    plan = pipeline.plan(**options)
    monkeypatch.setattr("media.given.warn_unless_known", lambda *_: None)          # looks at the picture through the VAE: not worth counting
    list(pipeline.generate(plan))
    assert estimate.vae_latents(plan) == tuple(seen.values())


def test_all_parts_are_in_the_time_that_is_printed(tmp_path, monkeypatch, capsys):
    """A machine of so many operations a second: the VAE's are added to the denoising, loading to both; three clips take longer than one."""
    monkeypatch.setattr(estimate, "rates", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(estimate, "best_seconds", lambda *_: 0.0)
    monkeypatch.setattr(estimate, "vae_rate", lambda *_: 1e8)
    monkeypatch.setattr(WanS2VPipeline, "generate", lambda *_: iter([torch.zeros(3, 13, 64, 64)]))
    monkeypatch.setattr(sample.Progress, "__str__", lambda self: "")
    pipeline, said = WanS2VPipeline(open_checkpoint(HERE / "weights" / "tiny")), []
    for clips in (1, 3):
        plan, vae = pipeline.plan(**GIVEN | dict(clips=clips)), pipeline.checkpoint.configs["vae"]
        (encoded, decoded), (encoding, decoding) = estimate.vae_latents(plan), estimate.vae_flops(vae, 8, 8)
        other = (encoded * encoding + decoded * decoding) / 1e8 + sum(plan.sizes.values()) / estimate.LOADED
        pixels = plan.frames * plan.height * plan.width
        assert estimate.other_seconds(plan, vae, True) == pytest.approx(other + pixels * estimate.WRITTEN[True])
        other += pixels * estimate.WRITTEN[False]
        assert estimate.other_seconds(plan, vae) == pytest.approx(other) and other > 1
        said.append(round(estimate.estimate_seconds(plan) + other))
        assert sample.cli(["--audio", GIVEN["audio"], "--image", GIVEN["image"], "--size", "64x64", "--steps", "1", "--clip-frames", "16",
                           "--guidance", "1", "--clips", str(clips), "--device", "cpu", "--out", str(tmp_path / f"{clips}.mp4")]) == 0
        minutes, seconds = divmod(said[-1], 60)
        assert f"about {minutes:02}:{seconds:02} in all" in capsys.readouterr().out
    assert said[1] > 2 * said[0] and math.isfinite(said[1])
