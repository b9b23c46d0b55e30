"""Steps that are guessed, not computed. All of it stands around the velocity of a step, `sampling.guided_velocity`; the networks know nothing of it.

    steps=0.3       *fewer steps*: the solver takes 12 in place of 40, at least LEAST, and all of them are computed
    gate=0.5        *gating*: after half of the steps the difference that the prompt makes is reused, one forward a step instead of two
    easy=0.05       *EasyCache*: a step is skipped while the change that is expected of the velocity since the last computed one sums up to less
    list=0.04       *step list*: what MagCache comes to. Velocities shrink along a run by factors that the schedule decides, so one calibration
                    says once and for all which steps are skipped: while the errors |1 - factor| sum up to less
    forecast=0.75   *Spectrum*: steps further and further apart are computed, and a polynomial through them says what lies between
    warm=5          forecast: steps that come first and are all computed
    at=hidden       forecast, list: what comes out of the last block is stored and guessed, not the velocity; the head runs at every step
    at=audio        easy, list: what the blocks add between two audio layers is reused, the audio layers run at every step

Several of them go together: --speed gate=0.5,forecast=0.75. What each costs the lips is in docs/speed.md. The state belongs to one clip, one branch
and one expert and dies with each of them. `Skips` says before a run which steps are computed; `Velocity` carries it out for one clip.

Sources   EasyCache (arXiv 2507.02860), MagCache (2506.09045), Spectrum (2603.01623), adaptive guidance (2312.12487), SyncCache's idea of computing
          the light audio layers anew
"""
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from fast.blocks import FastDenoiser, attention_backend, make_chunks, make_frames
from model import expert_index, unpatchify
from sampling import expert_guidance, make_solver, network_errors

LEAST = 8                    # steps of the solver that steps=0.3 leaves
EASY_WARM_UP = 10            # steps that EasyCache always computes
DEGREE, RIDGE, MIX = 4, 0.1, 0.5     # of the polynomial; its ridge; its share, the rest is the line through the last two
LIST_START, LIST_RUN = 0.2, 2        # of a step list: share of an expert's steps that are computed first, and most steps skipped in a row
AT = ("velocity", "hidden", "audio")
CALIBRATION = "step_magnitudes.json"     # beside a checkpoint


@dataclass(frozen=True)
class Speed:
    """What is skipped; each field at its default skips nothing."""
    steps: float = 1.0           # share of the steps that the solver takes
    gate: float = 1.0            # share of those that compute both guidance branches
    easy: float = 0.0            # allowed sum of relative changes
    list: float = 0.0            # allowed sum of errors
    forecast: float = 0.0        # by how much the distance of computed steps grows
    warm: int = 5                # steps that a forecast begins with
    at: str = "velocity"

    def __post_init__(self):
        limits = dict(steps=(0, 1), gate=(0, 1), easy=(0, 1), list=(0, 1), forecast=(0, 10), warm=(1, 1000))
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
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{name}={value}" if name == "at" else f"{name}={value:g}" for name, value in changed.items()) or "reference"


PRESETS = {"reference": Speed(), "balanced": Speed(forecast=0.75), "draft": Speed(steps=0.2)}


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
            raise ValueError(f"--speed takes {', '.join(PRESETS)}, or tricks such as gate=0.5,forecast=0.75 (of {', '.join(known)}), "
                             f"got {text!r}") from None
    return Speed(**given)


# -------------------------------------------------------------------------------------------- which steps are computed

def forecast_steps(steps, growth, warm=Speed.warm):
    """Numbers of the computed steps of an expert: `warm`, then at distances 2, 2 + growth, 2 + 2 growth, ... rounded down; all without growth."""
    computed, distance, skipped = [], 2.0 if growth else 1.0, 0
    for i in range(steps):
        skipped += 1
        if i < warm or skipped >= math.floor(distance):
            distance += growth if i >= warm else 0
            computed.append(i)
            skipped = 0
    return computed


def listed_steps(factors, allowed):
    """Numbers of the computed steps of an expert by MagCache's rule.

    factors  per step how much larger the velocity is than the step before        allowed  sum of errors
    """
    computed, product, error, run = [], 1.0, 0.0, 0
    for i, factor in enumerate(factors):
        product *= factor
        error, run = error + abs(1 - product), run + 1
        if i < max(1, math.ceil(LIST_START * len(factors))) or not (error < allowed and run <= LIST_RUN):
            computed.append(i)
            product, error, run = 1.0, 0.0, 0
    return computed


@dataclass(frozen=True)
class Skips:
    """What a Speed comes to for the steps of a run."""
    speed: Speed
    begins: tuple[int, ...]              # first step of each expert
    branches: tuple[int, ...]            # of guidance, that a step computes if it is computed
    computed: tuple[int, ...] | None     # numbers of the steps that are; None: EasyCache decides
    full: tuple[int, int]                # steps and forwards of a clip if nothing were skipped

    @property
    def steps(self):
        return len(self.branches)

    @property
    def guesses(self):
        """Whether anything is guessed: fewer steps alone are no guess."""
        return self.speed.gate < 1 or bool(self.speed.easy or self.speed.list or self.speed.forecast)

    @property
    def experts(self):
        """[(first step, end)] of each."""
        return list(zip(self.begins, [*self.begins[1:], self.steps]))

    @property
    def most(self):
        """The steps that are computed, as many as may be where EasyCache decides."""
        return range(self.steps) if self.computed is None else self.computed

    @property
    def forwards(self):
        """Of one clip, at most."""
        return sum(self.branches[i] for i in self.most)

    @property
    def stored(self):
        """How many values are held at most, of all branches."""
        if not self.speed.forecast:
            return max(self.branches) * self.guesses
        return max(sum(self.branches[i] for i in self.computed if begin <= i < end) for begin, end in self.experts)

    def nbytes(self, cfg, tokens):
        """Of what guesses are made from, on a GPU.  tokens of a clip"""
        width = {"velocity": 4 * 4 * cfg.out_dim, "hidden": 2 * cfg.dim, "audio": 2 * cfg.dim * (len(cfg.audio_layers) + 1)}[self.speed.at]
        return self.stored * tokens * width

    @property
    def saved(self):
        """Tensors of the latents' size in what `Velocity.state` gives, at most."""
        return self.stored + 3 if self.guesses and self.speed.at == "velocity" else 0

    def velocity(self):
        """-> Velocity for one clip, None where every step is computed"""
        return Velocity(self) if self.guesses else None

    def __str__(self):
        most = "at most " * (self.computed is None)
        return f"{self.speed}: {most}{len(self.most)} of {self.full[0]} steps are computed, {self.forwards} of {self.full[1]} forwards of a clip"


def resolve(config, checkpoint):
    """RunConfig -> the same with the steps that are left, and a Skips in place of the words of its `speed`; None if nothing is skipped.

    checkpoint  its boundary; its folder has the calibration
    raises      ValueError: no such trick, or no calibration where a step list wants one
    """
    speed = parse(config.speed)
    steps = min(config.steps, max(LEAST, round(speed.steps * config.steps)))
    if speed.at == "audio" and not checkpoint.configs["denoiser"].audio_dim:
        raise ValueError(f"--speed at=audio wants an S2V checkpoint, got {checkpoint.task}, which has no audio layers: leave it out")
    if math.prod(config.split) > 1 and (speed.easy or speed.at != "velocity"):
        raise ValueError(f"--speed {speed} runs on one GPU: on several take gate, list or forecast, at=velocity")
    all_steps, timesteps = (make_solver(config.solver, n, config.shift).timesteps.tolist() for n in (config.steps, steps))
    factors = calibrated(checkpoint.folder, timesteps) if speed.list else None
    skips = make_skips(speed, timesteps, checkpoint.boundary, config.guidance, factors, all_steps)
    return replace(config, steps=steps, speed=skips if skips.guesses or steps < config.steps else None)


def make_skips(speed, timesteps, boundary=None, guidance=(1.0,), factors=None, all_steps=None):
    """-> Skips

    timesteps  [t, ...] of the solver's steps        boundary  of the experts, or None        guidance  as `expert_guidance`
    factors    of these steps, for a step list       all_steps [t, ...] of the reference, None: the same
    """
    steps, experts = len(timesteps), [expert_index(t, boundary) for t in timesteps]
    begins = [i for i in range(steps) if i == 0 or experts[i] != experts[i - 1]]
    guided = [expert_guidance(guidance, index) > 1 for index in experts]
    full = [1 + (expert_guidance(guidance, expert_index(t, boundary)) > 1) for t in all_steps or timesteps]
    branches = [1 + (guided[i] and (i < math.floor(speed.gate * steps) or i in begins)) for i in range(steps)]
    computed = []
    for begin, end in zip(begins, [*begins[1:], steps]):
        if speed.forecast:
            own = forecast_steps(end - begin, speed.forecast, speed.warm)
        elif speed.list:
            own = listed_steps(factors[begin:end], speed.list)
        else:
            own = range(end - begin)
        computed += [begin + i for i in own]
    return Skips(speed, tuple(begins), tuple(branches), None if speed.easy else tuple(computed), (len(full), sum(full)))


class EasyCache:
    """Says which steps may be skipped, from the latents and the velocities with the prompt. `allowed` 0: none."""

    def __init__(self, allowed):
        self.allowed, self.sum, self.k, self.x, self.y, self.after_computed = allowed, 0.0, None, None, None, False

    def skips(self, x):
        if self.k is None:
            return False
        self.sum += self.k * mean(x - self.x) / mean(self.y)
        return self.sum < self.allowed

    def saw(self, x, y, computed):
        """What a step began and ended with."""
        if computed:
            if self.after_computed:
                self.k = mean(y - self.y) / max(mean(x - self.x), 1e-30)
            self.sum = 0.0
        self.x, self.y, self.after_computed = x, y, computed

    def state(self):
        """-> {name: tensor}"""
        numbers = [self.sum, -1.0 if self.k is None else self.k, float(self.after_computed)]
        return {"easy.x": self.x.clone(), "easy.y": self.y.clone(),           # two tensors of a file share no memory
                 "easy.numbers": torch.tensor(numbers, dtype=torch.float64)}

    def restore(self, state):
        self.x, self.y, (self.sum, k, after) = state["easy.x"], state["easy.y"], state["easy.numbers"].tolist()
        self.k, self.after_computed = None if k < 0 else k, bool(after)


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

    def __init__(self, speed, steps):
        self.speed, self.steps, self.numbers, self.values = speed, steps, [], []

    def saw(self, i, value):
        """What step i computed."""
        if not self.speed.forecast:
            self.numbers, self.values = [], []                       # the last one alone
        self.numbers, self.values = [*self.numbers, i], [*self.values, value]

    def guess(self, i, x, t, net, cond):
        """-> velocity"""
        if self.speed.at == "audio":
            return AudioAnew(net).replay(x, t, cond, self.values[-1])
        value = self.values[-1]
        if self.speed.forecast:
            weights = forecast_weights(self.numbers, i, self.steps)
            value = sum(float(w) * y.float() for w, y in zip(weights, self.values))
        if self.speed.at == "hidden":
            return head_of(net, value, t, cond)
        return value + x if self.speed.easy else value


def compute(net, x, t, conds, speed):
    """One or both branches -> [(velocity, what a guess of a later step needs), ...]"""
    if speed.at == "audio":
        return [AudioAnew(net).record(x, t, cond) for cond in conds]
    if speed.at == "hidden":
        return [with_hidden(net, x, t, cond) for cond in conds]
    velocities = net.both(x, t, *conds) if len(conds) == 2 and hasattr(net, "both") else [net(x, t, cond) for cond in conds]
    return [(v, v - x if speed.easy else v) for v in velocities]     # EasyCache reuses what a step adds


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
    """In place of `sampling.guided_velocity` for the steps of one clip.  skips  a Skips        .forwards  computed so far"""

    def __init__(self, skips):
        self.skips, self.speed, self.i, self.forwards = skips, skips.speed, 0, 0
        self.forget()

    def forget(self):
        """What one expert has said is no guess of what another would say."""
        self.difference, self.easy = None, EasyCache(self.speed.easy)
        self.branches = [Branch(self.speed, self.skips.steps) for _ in range(2)]

    def __call__(self, x, t, net, scale, cond, uncond):
        i, self.i, t = self.i, self.i + 1, torch.full(x.shape[:1], t, device=x.device)
        if i in self.skips.begins:
            self.forget()
        conds = [cond, uncond][:self.skips.branches[i]]
        with network_errors():
            if skip := self.may_skip(i, x):
                v, *rest = [branch.guess(i, x, t, net, c) for branch, c in zip(self.branches, conds)]
            else:
                computed = compute(net, x, t, conds, self.speed)
                for branch, (_, value) in zip(self.branches, computed):
                    branch.saw(i, value)
                v, *rest = [v for v, _ in computed]
        self.forwards += 0 if skip else len(conds)
        if self.speed.easy:
            self.easy.saw(x, v, not skip)
        if uncond is None:
            return v
        if not rest:
            return v + (scale - 1) * self.difference
        self.difference = v - rest[0] if self.speed.gate < 1 else None
        return rest[0] + scale * (v - rest[0])

    def may_skip(self, i, x):
        if self.speed.easy:                                          # what is told to EasyCache counts, so it is asked at every step
            return self.easy.skips(x) and EASY_WARM_UP <= i < self.skips.steps - 1
        return i not in self.skips.computed

    # ---- a run that ends in the midst of a clip

    def state(self):
        """{name: tensor} for the steps to come, or None: hidden states are gigabytes, such a clip begins anew"""
        if self.speed.at != "velocity":
            return None
        state = {f"guess.{b}.{n:04d}": value for b, branch in enumerate(self.branches) for n, value in zip(branch.numbers, branch.values)}
        state |= {} if self.difference is None else {"difference": self.difference}
        return state | (self.easy.state() if self.speed.easy else {})

    def restore(self, state, i):
        """Go on before step i with what `state` gave."""
        self.i, self.difference = i, state.get("difference")
        for name in sorted(name for name in state if name.startswith("guess.")):
            _, b, n = name.split(".")
            self.branches[int(b)].saw(int(n), state[name])
        if self.speed.easy:
            self.easy.restore(state)


def calibrated(folder, timesteps):
    """Factors from step to step, from the magnitudes that fast/calibrate.py measured there, interpolated in diffusion time.  raises ValueError"""
    path = Path(folder) / CALIBRATION
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        t, magnitudes = (np.array(found[name], dtype=float) for name in ("t", "magnitudes"))
        good = t.shape == magnitudes.shape and t.ndim == 1 and len(t) and np.isfinite([t, magnitudes]).all()
        if not (good and (np.diff(t) < 0).all() and (magnitudes > 0).all()):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"--speed list wants {path}: make it with python -m fast.calibrate --ckpt {folder}, or take easy or forecast") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} holds no magnitudes: make it again with python -m fast.calibrate --ckpt {folder}") from None
    at = np.interp(timesteps, t[::-1], np.log(magnitudes)[::-1])
    return np.exp(np.diff(at, prepend=at[0])).tolist()
