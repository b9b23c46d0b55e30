"""Guessed steps: each trick against a direct evaluation of its formula on velocities with a known answer, and all of them on small networks.

    pytest tests/test_caching.py
"""
import numpy as np
import pytest
import torch

from fast import caching
from fast.blocks import FastDenoiser
from fast.caching import Speed, Velocity, forecast_steps, forecast_weights, listed_steps, parse
from sampling import Experts, denoise, guided_velocity, make_solver
from tests.inputs import TINY, clip, random_net

STRONG = [Speed(gate=0.5), Speed(easy=0.5), Speed(list=0.5), Speed(forecast=1.0), Speed(forecast=1.0, at="hidden"), Speed(list=0.5, at="hidden"),
          Speed(easy=0.5, at="audio"), Speed(list=0.5, at="audio"), Speed(gate=0.3, forecast=2.0)]


class Synthetic:
    """A network whose velocity at its n-th call of a condition is known."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, x, t, cond):
        self.calls.append((cond, float(t[0])))
        return self.function(x, float(t[0]), cond)


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
    gated, _ = run(Velocity(Speed(gate=0.5), 20), exact, 20)
    assert len(exact.calls) == 30 and torch.allclose(gated, plain, atol=1e-6)
    assert [cond for cond, _ in exact.calls[20:]] == ["positive"] * 10


def test_a_constant_velocity_is_skipped_as_often_as_allowed():
    net = Synthetic(lambda x, t, cond: x)                            # EasyCache reuses velocity - x, which is 0 here
    velocity = Velocity(Speed(easy=0.3), 40)
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
    computed = Velocity(Speed(easy=0.05), 40)
    run(computed, turn, 40, uncond=None)
    assert computed.forwards > 20


def test_forecast_steps_are_those_of_the_rule():
    """For 40 steps the published rule gives 13 computed ones at 0.75, 16 at 0.25, 9 at 3."""
    assert forecast_steps(40, 0.75) == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38]
    assert [len(forecast_steps(40, growth)) for growth in (0.25, 3.0, 0.0)] == [16, 9, 40]
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
    assert listed_steps([1.0] + [0.99] * 9, 1.0, [(0, 10)]) == [0, 1, 4, 7]
    assert listed_steps([1.0] + [0.99] * 9, 0.025, [(0, 10)]) == [0, 1, 3, 5, 7, 9]              # 0.01, then 0.01 + 0.0199 is too much
    assert listed_steps([1.0] + [0.99] * 9, 0.0, [(0, 10)]) == list(range(10))
    assert listed_steps([1.0] + [0.99] * 9, 1.0, [(0, 5), (5, 5)]) == [0, 3, 5, 8]             # each expert begins with one that is computed
    assert listed_steps([1.0] * 5 + [0.7] + [1.0] * 4, 0.04, [(0, 10)]) == [0, 1, 4, 5, 8]


def test_a_forecast_follows_a_smooth_velocity():
    """Nearer than the last value is."""
    def velocity(x, t, cond):
        return torch.full_like(x, np.sin(t / 300))
    exact = run(guided_velocity, Synthetic(velocity), 40, uncond=None)[0]
    def off(speed):
        computed = forecast_steps(40, 0.75)
        return float((run(Velocity(speed, 40, computed), Synthetic(velocity), 40, uncond=None)[0] - exact).abs().max())
    assert off(Speed(forecast=0.75)) < 0.2 * off(Speed(list=1.0))


# ------------------------------------------------------------------------------------------------------- on networks

def trajectory(velocity, cfg=TINY, steps=8, nets=1, scale=3.0):
    """-> latents; of one or two experts"""
    made = [random_net(cfg) for _ in range(nets)]
    for p in made[-1].parameters():
        p.data = p.data * 1.01                                       # the other expert
    latents, _, _ = clip(made[0], cfg)
    g = torch.Generator().manual_seed(1)
    given = dict(shape=latents.shape[2:], text=torch.randn(1, 5, cfg.text_dim, generator=g))
    if cfg.audio_dim:
        given |= dict(audio=torch.randn(1, cfg.audio_states, cfg.audio_dim, 8, generator=g), ref=torch.randn(1, cfg.out_dim, 1, 8, 8, generator=g))
    names = ["high", "low"][:nets]
    experts = Experts(names, 0.7 if nets == 2 else None, lambda name: made[names.index(name)], keep=True)
    negative = given | (dict(audio=0 * given["audio"]) if cfg.audio_dim else {}) | dict(text=0 * given["text"])
    with torch.no_grad():
        return denoise(experts.begin(given, negative, (scale,)), make_solver("unipc", steps, 3.0), latents, velocity=velocity)


@pytest.mark.parametrize("nets", [1, 2], ids=["one expert", "two experts"])
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["guidance 1", "guidance 3"])
def test_nothing_skipped_is_the_reference_bit_for_bit(nets, scale):
    want = trajectory(None, nets=nets, scale=scale)
    for speed in (Speed(gate=1.0), Speed(easy=1e-30), Speed(forecast=1.0)):
        assert torch.equal(trajectory(Velocity(speed, 8, range(8)), nets=nets, scale=scale), want), speed
    assert torch.equal(trajectory(Velocity(Speed(list=1.0, at="hidden"), 8, range(8)), nets=nets, scale=scale), want)


@pytest.mark.parametrize("speed", STRONG, ids=str)
@pytest.mark.parametrize("nets", [1, 2], ids=["one expert", "two experts"])
def test_each_trick_skips_and_stays_near(speed, nets, monkeypatch):
    monkeypatch.setattr(caching, "EASY_WARM_UP", 2)
    want = trajectory(None, nets=nets, steps=12)
    velocity = Velocity(speed, 12, [i for i in range(12) if i % 3 == 0 or i < 5])
    got = trajectory(velocity, nets=nets, steps=12)
    gap = float((got - want).norm() / want.norm())
    print(f"{speed}, {nets} experts: {velocity.forwards} of 24 forwards, relative L2 {gap:.1e}")
    assert velocity.forwards < 24 and 0 < gap < 0.3


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
    for text, part in (("fast", "takes reference, balanced, draft"), ("gate=x", "got 'gate=x'"), ("gate=0.5,gate=0.5", "got"), ("gate=2", "must be 0 to 1"),
                       ("easy=0.1,forecast=1", "one of easy, list and forecast"), ("at=hidden", "goes with list or forecast"),
                       ("easy=0.1,at=hidden", "goes with list or forecast"), ("forecast=1,at=audio", "goes with easy or list"), ("at=x", "must be one of")):
        with pytest.raises(ValueError, match="--speed") as error:
            parse(text)
        assert part in str(error.value) and "\n" not in str(error.value)


def test_audio_anew_wants_sound():
    from dataclasses import replace
    with pytest.raises(ValueError, match="wants an S2V checkpoint"):
        caching.AudioAnew(random_net(replace(TINY, audio_dim=0)))
