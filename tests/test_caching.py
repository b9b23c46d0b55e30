"""Guessed steps: each trick against a direct evaluation of its formula on velocities with a known answer, and all of them on small networks.

    pytest tests/test_caching.py
"""
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import tiny.speed
from fast import caching, calibrate
from fast.blocks import FastDenoiser
from fast.caching import Speed, forecast_steps, forecast_weights, listed_steps, make_skips, parse
from jobs.parts import Parts
from sampling import Experts, denoise, guided_velocity, make_solver
from tests.inputs import TINY, clip, random_net
from tests.kill_runs import quick
from tiny import evaluate
from wan_s2v import WanS2VPipeline, run_sampler

HERE = Path(__file__).parents[1]
GIVEN = dict(audio=str(HERE / "samples" / "voice.flac"), image=str(HERE / "samples" / "face.png"), size=(64, 64), clip_frames=4, clips=1)
STRONG = [Speed(gate=0.5), Speed(easy=0.5), Speed(list=0.5), Speed(forecast=1.0, warm=2), Speed(forecast=1.0, warm=2, at="hidden"),
          Speed(list=0.5, at="hidden"), Speed(easy=0.5, at="audio"), Speed(list=0.5, at="audio"), Speed(gate=0.3, forecast=2.0, warm=1)]


class Synthetic:
    """A network whose velocity at its n-th call of a condition is known."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, x, t, cond):
        self.calls.append((cond, float(t[0])))
        return self.function(x, float(t[0]), cond)


def skips_of(speed, steps, guidance=(3.0,), boundary=None, factors=None):
    """On evenly spaced times; a step list skips as often as it may."""
    return make_skips(speed, [1000 * (1 - i / steps) for i in range(steps)], boundary, guidance, factors or [1.0] * steps)


def run(velocity, net, steps, scale=3.0, uncond="negative", x=None):
    """All steps of a plain Euler trajectory -> latents, velocities"""
    x = torch.ones(1, 2, 3) if x is None else x
    seen = []
    for i in range(steps):
        seen.append(velocity(x, 1000 * (1 - i / steps), net, scale, "positive", uncond))
        x = x - seen[-1] / steps
    return x, seen


# ------------------------------------------------------------------------------------------------------- formulas

def test_gating_reuses_the_difference():
    """Constant difference of the branches: half of the steps cost one forward, the result is exact."""
    net = Synthetic(lambda x, t, cond: x * (0.2 + t / 5000) + (0.7 if cond == "positive" else 0.2))
    exact, plain = Synthetic(net.function), run(guided_velocity, net, 20)[0]
    gated, _ = run(skips_of(Speed(gate=0.5), 20).velocity(), exact, 20)
    assert len(exact.calls) == 30 and torch.allclose(gated, plain, atol=1e-6)
    assert [cond for cond, _ in exact.calls[20:]] == ["positive"] * 10


def test_a_constant_velocity_is_skipped_as_often_as_allowed():
    net = Synthetic(lambda x, t, cond: x)                            # EasyCache reuses velocity - x, which is 0 here
    velocity = skips_of(Speed(easy=0.3), 40, (1.0,)).velocity()
    plain = run(guided_velocity, Synthetic(net.function), 40, uncond=None)[0]
    x, _ = run(velocity, net, 40, uncond=None)
    assert torch.allclose(x, plain, atol=1e-6)
    # a direct evaluation of its rule: k = 1, the relative change of x is 1/40 per step; sums below 0.3 of 11 steps are skipped
    want, total = list(range(10)), 0.0
    for i in range(10, 40):
        total += 1 / 40 / (1 - 1 / 40) * (1 - 1 / 40)
        if i == 39 or not total < 0.3:
            want.append(i)
            total = 0.0
    assert len(net.calls) == velocity.forwards == len(want)


def test_easy_cache_computes_when_the_velocity_turns():
    turn = Synthetic(lambda x, t, cond: x + (0 if t > 500 else 5 * (1 - t / 500)))
    computed = skips_of(Speed(easy=0.05), 40, (1.0,)).velocity()
    run(computed, turn, 40, uncond=None)
    assert computed.forwards > 20


def test_forecast_steps_are_those_of_the_rule():
    """For 40 steps the published rule gives 13 computed ones at 0.75, 16 at 0.25, 9 at 3."""
    assert forecast_steps(40, 0.75) == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38]
    assert [len(forecast_steps(40, growth)) for growth in (0.25, 3.0, 0.0)] == [16, 9, 40]
    assert forecast_steps(40, 1.0, warm=3) == [0, 1, 2, 4, 7, 11, 16, 22, 29, 37] and forecast_steps(40, 1.0, warm=1) == [0, 2, 5, 9, 14, 20, 27, 35]
    assert len(forecast_steps(50, 0.75)) == 14 and len(forecast_steps(50, 3.0)) == 10


@pytest.mark.parametrize("degree", range(5))
def test_a_forecast_of_a_polynomial_is_exact(degree):
    """Without ridge and line; with both it is the mixture that the formula says."""
    def f(n):
        return (np.asarray(n) / 10.0) ** degree - 3.0
    stored = [0, 1, 2, 3, 4, 6, 8]
    exact = forecast_weights(stored, 11, 40, ridge=1e-12, mix=1.0) @ f(stored)
    assert exact == pytest.approx(f(11), rel=1e-4)                    # the normal equations lose some digits
    line = f(8) + (11 - 8) / (8 - 6) * (f(8) - f(6))
    ridge = forecast_weights(stored, 11, 40, mix=1.0) @ f(stored)
    assert forecast_weights(stored, 11, 40) @ f(stored) == pytest.approx(0.5 * ridge + 0.5 * line)
    assert forecast_weights(stored, 11, 40, mix=0.0) @ f(stored) == pytest.approx(line)


def test_listed_steps_are_magcaches():
    """A direct evaluation: factors of 0.99, so errors of 0.01, 0.0199, ...; two in a row at most."""
    assert listed_steps([1.0] + [0.99] * 9, 1.0) == [0, 1, 4, 7]
    assert listed_steps([1.0] + [0.99] * 9, 0.025) == [0, 1, 3, 5, 7, 9]                         # 0.01, then 0.01 + 0.0199 is too much
    assert listed_steps([1.0] + [0.99] * 9, 0.0) == list(range(10))
    assert listed_steps([1.0] * 5 + [0.7] + [1.0] * 4, 0.04) == [0, 1, 4, 5, 8]


def test_a_forecast_follows_a_smooth_velocity():
    """Nearer than the last value is."""
    def velocity(x, t, cond):
        return torch.full_like(x, np.sin(t / 300))
    exact = run(guided_velocity, Synthetic(velocity), 40, uncond=None)[0]
    def off(speed):
        skips = replace(skips_of(Speed(forecast=0.75), 40, (1.0,)), speed=speed)
        return float((run(skips.velocity(), Synthetic(velocity), 40, uncond=None)[0] - exact).abs().max())
    assert off(Speed(forecast=0.75)) < 0.2 * off(Speed(list=1.0))


def test_what_is_planned_is_what_is_computed():
    """Of two experts, each from its own start; guidance of one of them; at the first step of an expert both branches."""
    skips = skips_of(Speed(gate=0.25, forecast=0.75), 40, guidance=(3.0, 1.0), boundary=0.5)         # high noise: none; low noise: 3
    assert skips.begins == (0, 21) and skips.computed == (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 21, 22, 23, 24, 25, 27, 29, 32, 36)
    assert skips.branches == (1,) * 21 + (2,) + (1,) * 18 and skips.forwards == 20 and skips.stored == 10
    said = []
    for first in (1, 3):                                             # what the first expert says leaves no trace in the second
        net, other, velocity = Synthetic(lambda x, t, cond: first * x), Synthetic(lambda x, t, cond: 5 * x), skips.velocity()
        for i in range(40):
            high = 1000 * (1 - i / 40) >= 500
            given = (net, 1.0, "positive", None) if high else (other, 3.0, "positive", "negative")
            said.append(float(velocity(torch.ones(1, 2), 1000 * (1 - i / 40), *given)[0, 0]))
        assert (len(net.calls), len(other.calls), velocity.forwards) == (10, 10, 20)
    assert said[21:40] == said[61:] and max(said[:21]) < 1.1 < 2 < said[40]
    assert str(skips) == "gate=0.25,forecast=0.75: 19 of 40 steps are computed, 20 of 59 forwards of a clip"
    few = skips_of(Speed(gate=0.5, forecast=0.75), 4)
    assert few.computed == (0, 1, 2, 3) and few.forwards == 6                                    # 4 steps: gating alone is left


# ------------------------------------------------------------------------------------------------------- on networks

SMALL = replace(TINY, dim=24, ffn_dim=32, n_head=1, n_layer=3)


def sampler(nets=1, scale=3.0, cfg=SMALL):
    """-> Experts of a small network or two, after `begin`, and latents"""
    made = [random_net(cfg) for _ in range(nets)]
    for p in made[-1].parameters():
        p.data = p.data * 1.01                                       # the other expert
    latents, _, _ = clip(made[0], cfg)
    g = torch.Generator().manual_seed(1)
    given = dict(shape=latents.shape[2:], text=torch.randn(1, 5, cfg.text_dim, generator=g))
    given |= dict(audio=torch.randn(1, cfg.audio_states, cfg.audio_dim, 8, generator=g), ref=torch.randn(1, cfg.out_dim, 1, 8, 8, generator=g))
    names = ["high", "low"][:nets]
    experts = Experts(names, 0.7 if nets == 2 else None, lambda name: made[names.index(name)], keep=True)
    return experts.begin(given, given | dict(audio=0 * given["audio"], text=0 * given["text"]), (scale,)), latents


@cache
def trajectory(velocity=None, nets=1, scale=3.0):
    """-> latents after 8 steps"""
    experts, latents = sampler(nets, scale)
    with torch.no_grad():
        return denoise(experts, make_solver("unipc", 8, 3.0), latents, velocity=velocity)


def strong(speed, steps, nets, scale=3.0):
    return make_skips(speed, make_solver("unipc", steps, 3.0).timesteps.tolist(), 0.7 if nets == 2 else None, (scale,), [1.0] * steps)


@pytest.mark.parametrize("nets", [1, 2], ids=["one expert", "two experts"])
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["guidance 1", "guidance 3"])
def test_nothing_skipped_is_the_reference_bit_for_bit(nets, scale):
    want = trajectory(nets=nets, scale=scale)
    for speed in (Speed(gate=1.0), Speed(easy=1e-30), Speed(forecast=1.0), Speed(list=1.0, at="hidden")):
        skips = strong(speed, 8, nets, scale)
        skips = skips if speed.easy else replace(skips, computed=tuple(range(8)))
        assert torch.equal(trajectory(skips.velocity(), nets, scale), want), speed


@pytest.mark.parametrize("speed", STRONG, ids=str)
@pytest.mark.parametrize("nets", [1, 2], ids=["one expert", "two experts"])
def test_each_trick_skips_and_stays_near(speed, nets, monkeypatch):
    monkeypatch.setattr(caching, "EASY_WARM_UP", 2)
    velocity = strong(speed, 8, nets).velocity()
    want, got = trajectory(nets=nets), trajectory(velocity, nets)
    gap = float((got - want).norm() / want.norm())
    print(f"{speed}, {nets} experts: {velocity.forwards} of 16 forwards, relative L2 {gap:.1e}")
    assert velocity.forwards < 16 and 0 < gap < 0.3


@pytest.mark.parametrize("speed", [Speed(gate=0.3, forecast=1.0, warm=2), Speed(easy=0.5), Speed(list=0.5, at="hidden")], ids=str)
def test_a_clip_that_ends_early_goes_on_with_the_same_guesses(speed, tmp_path, monkeypatch):
    """The same bits as without an end, whichever step comes last; hidden states are not saved: that clip begins anew."""
    monkeypatch.setattr(caching, "EASY_WARM_UP", 2)
    skips, steps, stage = strong(speed, 8, 2), 8, lambda name: sample.suppress()
    config = SimpleNamespace(solver="unipc", steps=steps, shift=3.0, speed=skips)

    def latents(parts, last=steps):
        def progress(numbered):
            for i, t in numbered:
                if i == last:
                    raise KeyboardInterrupt
                yield i, t
        experts, noise = sampler(2)
        with torch.no_grad():
            return run_sampler(experts, config, noise, stage, progress, parts)

    def folder(name):
        return Parts(tmp_path / f"{name}.mp4", made=dict(steps=steps), total=1, every=1).open()
    want = latents(folder("whole"))
    for last in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            latents(parts := folder(last), last)
        parts.close()
        parts = folder(last)
        assert parts.progress() == ("" if speed.at == "hidden" else f"step {last} of 8")
        assert torch.equal(latents(parts), want), last
        parts.close()


def test_replayed_audio_is_exact_at_the_same_step():
    """Blocks' parts of a step with the audio layers of the same step are that step; other sound changes the result as the audio layers do."""
    net = random_net(TINY)
    latents, t, (cond, silent) = clip(net, TINY)
    anew = caching.AudioAnew(FastDenoiser(net))
    with torch.no_grad():
        want = net(latents, t, cond)
        v, added = anew.record(latents, t, cond)
        assert torch.equal(v, FastDenoiser(net)(latents, t, cond)) and len(added) == len(TINY.audio_layers) + 1
        again = anew.replay(latents, t, cond, added)
        other = anew.replay(latents, t, silent, added)
    assert float((again - want).norm() / want.norm()) < 1e-5 and float((other - want).norm() / want.norm()) > 1e-2


def test_hidden_states_give_the_velocity():
    net = random_net(TINY)
    latents, t, (cond, _) = clip(net, TINY)
    with torch.no_grad():
        for one in (net, FastDenoiser(net, chunk=13)):
            v, hidden = caching.with_hidden(one, latents, t, cond)
            again = caching.head_of(one, hidden, t, cond)
            assert float((again - v).norm() / v.norm()) < 1e-6 and torch.equal(v, one(latents, t, cond))


# ------------------------------------------------------------------------------------------------------- options

def test_words():
    assert parse("reference") == Speed() and parse("gate=0.5,forecast=0.75") == Speed(gate=0.5, forecast=0.75)
    assert parse("list=0.04,at=audio").at == "audio" and str(parse("easy=0.1")) == "easy=0.1" and str(Speed()) == "reference"
    for text, part in (("fast", "takes reference, balanced, draft"), ("gate=x", "got 'gate=x'"), ("gate=0.5,gate=0.5", "got"),
                       ("gate=2", "must be 0 to 1"), ("easy=0.1,forecast=1", "one of easy, list and forecast"), ("at=hidden", "goes with list or forecast"),
                       ("easy=0.1,at=hidden", "goes with list or forecast"), ("forecast=1,at=audio", "goes with easy or list"),
                       ("at=x", "must be one of")):
        with pytest.raises(ValueError, match="--speed") as error:
            parse(text)
        assert part in str(error.value) and "\n" not in str(error.value)


def test_plans_say_what_is_skipped_and_what_it_holds():
    """Guesses from hidden states are counted; what cannot be used is refused in a line; the reference does not load fast/caching.py."""
    pipeline = WanS2VPipeline.from_pretrained()
    plain, guessed = (pipeline.plan(**GIVEN, steps=40, speed=speed) for speed in ("gate=1", "forecast=0.75,at=hidden"))
    assert plain.config.speed is None and plain.forwards == 80
    skips, cfg = guessed.config.speed, guessed.denoiser
    assert f"speed    {skips}" in str(guessed) and guessed.forwards == skips.forwards == 36
    assert guessed.memory.denoiser - plain.memory.denoiser == skips.stored * guessed.tokens[-1] * 2 * cfg.dim and skips.stored == 20
    for speed, part in (("fast", "takes reference, balanced, draft"), ("list=0.04", "make it with python -m fast.calibrate")):
        with pytest.raises(ValueError, match="--speed") as error:
            pipeline.plan(**GIVEN, speed=speed)
        assert part in str(error.value) and "\n" not in str(error.value)
    for speed in ("easy=0.1", "forecast=1,at=hidden"):
        with pytest.raises(ValueError, match="runs on one GPU"):
            caching.resolve(SimpleNamespace(speed=speed, steps=4, split=(2, 1)), SimpleNamespace(configs=dict(denoiser=cfg)))
    with pytest.raises(ValueError, match="wants an S2V checkpoint"):
        silent = SimpleNamespace(configs=dict(denoiser=replace(cfg, audio_dim=0)), task="t2v-A14B")
        caching.resolve(SimpleNamespace(speed="easy=0.1,at=audio", steps=4), silent)


def test_fewer_steps_are_those_of_the_solver():
    """No guess and no memory, the same plan as with so many steps; of few steps none is left out."""
    pipeline = WanS2VPipeline.from_pretrained()
    fewer, same = pipeline.plan(**GIVEN, steps=40, speed="steps=0.3"), pipeline.plan(**GIVEN, steps=12)
    assert replace(fewer, config=replace(fewer.config, speed=None)) == replace(same, sound=fewer.sound, free=fewer.free, memory=fewer.memory)
    assert fewer.config.speed.velocity() is None and fewer.config.speed.nbytes(fewer.denoiser, 100) == fewer.config.speed.saved == 0
    assert str(fewer.config.speed) == "steps=0.3: 12 of 40 steps are computed, 24 of 80 forwards of a clip"
    assert pipeline.plan(**GIVEN, steps=8, speed="steps=0.3").config.speed is None
    both = pipeline.plan(**GIVEN, steps=40, speed="steps=0.5,gate=0.5").config
    assert both.steps == 20 and "20 of 40 steps are computed, 31 of 80 forwards" in str(both.speed)      # one more where an expert begins


def test_two_halves_of_ranks_compute_both_branches_at_once():
    """fast/parallel.py's `both` is asked where both are wanted, a single call where gating wants one."""
    asked = []

    def both(x, t, cond, uncond):
        asked.append("both")
        return x, 0 * x
    net = Synthetic(lambda x, t, cond: asked.append(cond) or x)
    net.both = both
    run(skips_of(Speed(gate=0.5), 4).velocity(), net, 4)
    assert asked == ["both", "both", "positive", "positive"]


def test_calibration(tmp_path):
    """Magnitudes of a network with known ones; another number of steps is interpolated; a damaged file is refused."""
    measured, net = calibrate.Measured(), Synthetic(lambda x, t, cond: torch.full_like(x, t * t))
    run(measured, net, 10)
    assert measured.factors == pytest.approx([1.0] + [((10 - i) / (11 - i)) ** 2 for i in range(1, 10)]) and len(net.calls) == 20
    path = tmp_path / caching.CALIBRATION
    path.write_text(json.dumps(dict(t=[1000, 500, 1], magnitudes=[1.0, 0.5, 0.05])))
    assert caching.calibrated(tmp_path, [1000, 750, 500]) == pytest.approx([1.0, 0.5 ** 0.5, 0.5 ** 0.5])
    for damaged in ("{}", "[", '{"t": [1, 2], "magnitudes": [1, 1]}', '{"t": [2, 1], "magnitudes": [1, -1]}', '{"t": "a", "magnitudes": 3}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="holds no magnitudes: make it again"):
            caching.calibrated(tmp_path, [2])


# ------------------------------------------------------------------------------------------------------- the table

def test_ssim():
    """Of a video with itself 1; with constants a and b the first factor alone, by the formula; less with noise."""
    a = torch.rand(3, 2, 16, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert tiny.speed.ssim(a, a) == pytest.approx(1) and tiny.speed.ssim(a, a.flip(3)) < 0.3
    x, y = 0.25, 0.5
    want = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    assert tiny.speed.ssim(torch.full_like(a, 2 * x - 1), torch.full_like(a, 2 * y - 1)) == pytest.approx(want, abs=1e-4)


def test_the_table_of_given_pictures(tmp_path, capsys):
    """One command, any picture: no lips, but PSNR against the reference; a second run makes nothing anew; bad words come before any video."""
    options = ["--image", GIVEN["image"], "--speech", str(HERE / "samples"), "--out", str(tmp_path), "--videos", "1", "--seconds", "1.5",
               "--clip-frames", "4", "--clips", "1", "--steps", "9", "--size", "64x64", "--tempo", "1.5", *quick()]
    assert evaluate.main([*options, "--speed", "gate=2"]) == 2 and not list(tmp_path.glob("*.npy"))
    assert evaluate.main([*options, "--speed", "steps=0", "gate=1"]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert list(rows) == ["reference", "steps=0", "gate=1"] and [r["forwards"] for r in rows.values()] == [18, 16, 18]
    assert 20 < rows["steps=0"]["psnr"] < 80 < rows["gate=1"]["psnr"] and "opening" not in rows["gate=1"]
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert evaluate.main([*options, "--speed", "steps=0"]) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")} and "| steps=0 | 16 | 1.12 |" in capsys.readouterr().out
