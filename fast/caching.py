"""Steps that are guessed, not computed. All of it stands around "the velocity of this step" (sampling.guided_velocity); the model knows nothing of it.

    gate=0.5        *gating*: after half of the steps the difference that the prompt makes is reused, one forward a step instead of two
    easy=0.05       *EasyCache*: a step is skipped while the change that is expected of the velocity since the last computed one sums up to less
    list=0.04       *step list*: what MagCache comes to. Velocities shrink along a run by factors that the schedule decides, so one calibration
                    says once and for all which steps are skipped: while the errors |1 - factor| sum up to less
    forecast=0.75   *Spectrum*: steps further and further apart are computed, and a polynomial through them says what lies between
    at=hidden       forecast, list: what comes out of the last block is stored and guessed, not the velocity; the head runs at every step
    at=audio        easy, list: what the blocks add between two audio layers is reused, the audio layers run at every step

Several of them go together: --speed gate=0.5,forecast=0.75. The state belongs to one clip, one branch and one expert and dies with each of them.

Sources   EasyCache (arXiv 2507.02860), MagCache (2506.09045), Spectrum (2603.01623), adaptive guidance (2312.12487), SyncCache's idea of computing
          the light audio layers anew
"""
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from fast.blocks import FastDenoiser, attention_backend, make_chunks, make_frames
from model import unpatchify
from sampling import guided_velocity, network_errors

EASY_WARM_UP = 10            # steps that EasyCache always computes
FORECAST_WARM_UP = 5         # steps that a forecast always begins with
DEGREE, RIDGE, MIX = 4, 0.1, 0.5     # of the polynomial; its ridge; its share, the rest is the line through the last two
LIST_START, LIST_RUN = 0.2, 2        # of a step list: share of an expert's steps that are computed first, and most steps skipped in a row
AT = ("velocity", "hidden", "audio")
CALIBRATION = "step_magnitudes.json"     # beside a checkpoint


@dataclass(frozen=True)
class Speed:
    """What is skipped; each field at its default skips nothing."""
    gate: float = 1.0            # share of the steps that compute both guidance branches
    easy: float = 0.0            # allowed sum of relative changes
    list: float = 0.0            # allowed sum of errors
    forecast: float = 0.0        # by how much the distance of computed steps grows
    at: str = "velocity"

    def __post_init__(self):
        limits = dict(gate=(0, 1), easy=(0, 1), list=(0, 1), forecast=(0, 10))
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"--speed {name} must be {least} to {most}, got {getattr(self, name):g}")
        given = [name for name in ("easy", "list", "forecast") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"--speed takes one of easy, list and forecast, got {' and '.join(given)}: gate goes with each")
        if self.at not in AT:
            raise ValueError(f"--speed at must be one of {', '.join(AT)}, got {self.at}")
        wrong = {"hidden": ("easy",), "audio": ("forecast",)}.get(self.at, ())
        if self.at != "velocity" and (not given or given[0] in wrong):
            wanted = {"hidden": "list or forecast", "audio": "easy or list"}[self.at]
            raise ValueError(f"--speed at={self.at} goes with {wanted}, got {given[0] if given else 'neither'}")

    def __str__(self):
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed) or "reference"


PRESETS = {"reference": Speed(), "balanced": Speed(gate=0.5, forecast=0.75), "draft": Speed(gate=0.3, forecast=3.0)}


def parse(text):
    """A preset's name or "gate=0.5,forecast=0.75" -> Speed.  raises ValueError"""
    if text in PRESETS:
        return PRESETS[text]
    known, given = {f.name: type(f.default) for f in fields(Speed)}, {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            if not equals or name in given:
                raise KeyError
            given[name] = known[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"--speed takes {', '.join(PRESETS)}, or tricks such as gate=0.5,forecast=0.75 (of {', '.join(known)}), got {text!r}") from None
    return Speed(**given)


# -------------------------------------------------------------------------------------------- which steps are computed

def forecast_steps(steps, growth):
    """Numbers of the computed steps: five, then at distances 2, 2 + growth, 2 + 2 growth, ... rounded down; all of them without growth."""
    computed, distance, skipped = [], 2.0 if growth else 1.0, 0
    for i in range(steps):
        skipped += 1
        if i < FORECAST_WARM_UP or skipped >= math.floor(distance):
            distance += growth if i >= FORECAST_WARM_UP else 0
            computed.append(i)
            skipped = 0
    return computed


def listed_steps(factors, allowed, first):
    """Numbers of the computed steps by MagCache's rule.

    factors  per step how much larger the velocity is than the step before       allowed  sum of errors        first  of each expert's steps are computed:
             [begin, number of steps of the expert] pairs
    """
    computed, product, error, run = [], 1.0, 0.0, 0
    starts = {begin + k for begin, n in first for k in range(max(1, math.ceil(LIST_START * n)))}
    for i, factor in enumerate(factors):
        product *= factor
        error, run = error + abs(1 - product), run + 1
        if i in starts or not (error < allowed and run <= LIST_RUN):
            computed.append(i)
            product, error, run = 1.0, 0.0, 0
    return computed


class EasyCache:
    """Says which steps may be skipped, from the latents and the velocities with the prompt. `allowed` 0: none."""

    def __init__(self, allowed):
        self.allowed, self.sum, self.k, self.x, self.y = allowed, 0.0, None, None, None

    def skips(self, x):
        if self.k is None:
            return False
        self.sum += self.k * mean(x - self.x) / mean(self.y)
        return self.sum < self.allowed

    def saw(self, x, y, computed):
        """What a step began and ended with."""
        if computed:
            if self.x is not None and self.last_computed:
                self.k = mean(y - self.y) / max(mean(x - self.x), 1e-30)
            self.sum = 0.0
        self.x, self.y, self.last_computed = x, y, computed


def mean(x):
    return x.abs().mean().item()


# --------------------------------------------------------------------------------------------------- what stands in for a step

def forecast_weights(stored, i, steps, ridge=RIDGE, mix=MIX):
    """Of what was stored at the steps `stored`, so that their weighted sum is the value guessed for step i -> (len(stored),) float64

    A ridge fit by Chebyshev polynomials up to DEGREE, mixed with the line through the last two.
    """
    def basis(n):
        return np.cos(np.outer(np.arccos(np.clip((np.asarray(n, float) - steps / 2) / (steps / 2), -1, 1)), np.arange(DEGREE + 1)))
    phi = basis(stored)                                              # (stored, DEGREE + 1)
    weights = mix * (basis([i]) @ np.linalg.solve(phi.T @ phi + ridge * np.eye(DEGREE + 1), phi.T))[0]
    if len(stored) > 1:
        slope = (i - stored[-1]) / (stored[-1] - stored[-2])
        weights[-1] += (1 - mix) * (1 + slope)
        weights[-2] -= (1 - mix) * slope
    else:
        weights = np.ones(1)
    return weights


class Branch:
    """What one guidance branch of one expert has computed, and a guess from it."""

    def __init__(self, net, cond, speed, steps):
        self.net, self.cond, self.speed, self.steps, self.numbers, self.values = net, cond, speed, steps, [], []

    def compute(self, i, x, t):
        """-> velocity; what a guess needs is stored"""
        at = self.speed.at
        if at == "audio":
            v, value = self.net.record(x, t, self.cond)
        elif at == "hidden":
            v, value = with_hidden(self.net, x, t, self.cond)
        else:
            v = self.net(x, t, self.cond)
            value = v - x if self.speed.easy else v                  # EasyCache reuses what a step adds
        if not self.speed.forecast:
            self.numbers, self.values = [], []                       # the last one alone
        self.numbers, self.values = [*self.numbers, i], [*self.values, value]
        return v

    def guess(self, i, x, t):
        if self.speed.at == "audio":
            return self.net.replay(x, t, self.cond, self.values[-1])
        value = self.values[-1]
        if self.speed.forecast:
            weights = forecast_weights(self.numbers, i, self.steps)
            value = sum(float(w) * y.float() for w, y in zip(weights, self.values))
        if self.speed.at == "hidden":
            return head_of(self.net, value, t, self.cond)
        return value + x if self.speed.easy else value


def plain(net):
    """The Denoiser of a FastDenoiser, or itself."""
    return getattr(net, "net", net)


def with_hidden(net, x, t, cond):
    """-> velocity, and what the head is given: the video's tokens behind the last block (B, L, C) in bfloat16, float32 on a CPU"""
    parts, small = [], torch.bfloat16 if x.is_cuda else torch.float32
    hook = plain(net).head.register_forward_pre_hook(lambda _, given: parts.append(given[0].to(small, copy=True)))
    try:
        v = net(x, t, cond)
    finally:
        hook.remove()
    return v, torch.cat(parts, dim=1)


@torch.no_grad()
def head_of(net, hidden, t, cond):
    """The velocity that belongs to tokens behind the last block (B, L, C) at another diffusion time."""
    e, _ = plain(net).modulations(t)
    return Laid(FastDenoiser(plain(net)), cond).velocity(hidden.float(), e)


class Laid:
    """How the tokens of a clip are worked on: chunks, and chunks of whole latent frames."""

    def __init__(self, fast, cond):
        (T, h, w), self.fast, self.cond = cond.grid, fast, cond
        self.video, self.chunks = T * h * w, make_chunks(cond.segments, fast.chunk)
        self.frames = make_frames(self.video, h * w, self.chunks[0].stop, 0)

    def velocity(self, x, e):
        return unpatchify(self.fast.head(x, e, self.chunks, self.video), self.cond.grid)


class AudioAnew:
    """A FastDenoiser whose audio layers can run on what its blocks added at an earlier step."""

    def __init__(self, fast):
        self.fast = fast if isinstance(fast, FastDenoiser) else FastDenoiser(fast)
        if not plain(fast).cfg.audio_dim:
            raise ValueError("--speed at=audio wants an S2V checkpoint: others have no audio layers")

    @torch.no_grad()
    def record(self, x, t, cond):
        """-> velocity, [what the blocks added up to each audio layer and the last block (B, N, C)]"""
        fast, added, small = self.fast, [], torch.bfloat16 if x.is_cuda else torch.float32
        (x, e, mod), laid = self.begin(x, t, cond), Laid(fast, cond)
        before = x.clone()

        def noted(block, part, *given):
            """Around the audio layers, which follow their block's other parts."""
            added.append((x - before).to(small))
            audio_layer(block, part, *given)
            before.copy_(x)
        audio_layer = fast.audio_layer
        fast.audio_layer = noted
        try:
            fast.run_blocks(x, mod, cond, laid.chunks, laid.frames)
        finally:
            del fast.audio_layer
        added.append((x - before).to(small))
        return laid.velocity(x, e), added

    @torch.no_grad()
    def replay(self, x, t, cond, added):
        """-> velocity from the blocks' parts of an earlier step and audio layers of this one"""
        fast, added, laid = self.fast, iter(added), Laid(self.fast, cond)
        x, e, _ = self.begin(x, t, cond)
        with attention_backend(x.device):
            for layer, block in enumerate(fast.net.blocks):
                if block.inject is not None:
                    x += next(added)
                    _, audio, adain = cond.layers[layer]
                    fast.audio_layer(block, x, audio, adain, laid.frames)
        x += next(added)
        return laid.velocity(x, e)

    def begin(self, x, t, cond):
        e, mod = self.fast.net.modulations(t)
        return self.fast.net.embed(x, cond), e, mod


# -------------------------------------------------------------------------------------------------------------------- together

class Velocity:
    """In place of `sampling.guided_velocity` for one clip of so many steps.

    computed  numbers of the steps that are computed; None: all, or as EasyCache decides
    """

    def __init__(self, speed, steps, computed=None):
        self.speed, self.steps, self.i, self.net, self.forwards = speed, steps, 0, None, 0
        self.computed = range(steps) if computed is None else computed

    def begin(self, net, cond, uncond):
        """Another expert: it knows nothing of what the first one would say."""
        self.net, self.difference, self.easy = net, None, EasyCache(self.speed.easy)
        runs = AudioAnew(net) if self.speed.at == "audio" else net
        self.branches = [Branch(runs, c, self.speed, self.steps) for c in (cond, uncond) if c is not None]

    def __call__(self, x, t, net, scale, cond, uncond):
        if net is not self.net:
            self.begin(net, cond, uncond)
        i, self.i, t = self.i, self.i + 1, torch.full(x.shape[:1], t, device=x.device)
        gated = uncond is not None and self.difference is not None and i >= math.floor(self.speed.gate * self.steps)
        branches = self.branches[:1] if gated else self.branches
        skip = all(branch.values for branch in branches) and i < self.steps - 1 and self.may_skip(i, x)
        with network_errors():
            v, *rest = [(branch.guess if skip else branch.compute)(i, x, t) for branch in branches]
        self.forwards += 0 if skip else len(branches)
        if self.speed.easy:
            self.easy.saw(x, v, not skip)
        if uncond is None:
            return v
        if gated:
            return v + (scale - 1) * self.difference
        self.difference = v - rest[0]
        return rest[0] + scale * (v - rest[0])

    def may_skip(self, i, x):
        if self.speed.easy:
            return i >= EASY_WARM_UP and self.easy.skips(x)
        if self.speed.forecast and len(self.branches[0].values) < min(FORECAST_WARM_UP, self.steps):
            return False                                             # behind a switch of experts the polynomial begins anew
        return i not in self.computed


def make_velocity(speed, solver, boundary, folder):
    """`guided_velocity`, or a Velocity for one clip.

    speed   Speed        solver  its timesteps say which steps each expert has        boundary  of the experts        folder  of the checkpoint
    raises  ValueError without the calibration that a step list wants
    """
    if speed == Speed():
        return guided_velocity
    steps = len(solver.timesteps)
    if speed.forecast:
        return Velocity(speed, steps, forecast_steps(steps, speed.forecast))
    if speed.list:
        factors, first = calibrated(folder, steps), expert_steps(solver.timesteps.tolist(), boundary)
        return Velocity(speed, steps, listed_steps(factors, speed.list, first))
    return Velocity(speed, steps)


def expert_steps(timesteps, boundary):
    """[(first step, number of steps)] of each expert that has any."""
    high = 0 if boundary is None else sum(t / 1000 >= boundary for t in timesteps)
    return [(begin, n) for begin, n in ((0, high), (high, len(timesteps) - high)) if n]


def calibrated(folder, steps):
    """The factors that fast/calibrate.py measured, for another number of steps by the nearest one.  raises ValueError"""
    path = Path(folder) / CALIBRATION
    try:
        factors = json.loads(path.read_text(encoding="utf8"))["factors"]
        factors = [float(factor) for factor in factors]
        if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"--speed list wants {path}: make it with python -m fast.calibrate --ckpt {folder}, or take easy or forecast") from None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} holds no factors: make it again with python -m fast.calibrate --ckpt {folder}") from None
    return [factors[round(i * (len(factors) - 1) / max(1, steps - 1))] for i in range(steps)]
