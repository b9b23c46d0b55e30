"""Noise -> latents: noise levels, the sampling loop with guidance over one or two experts, and the solvers.

`denoise` is the sampler. A checkpoint with two experts gives the steps with t/1000 >= boundary to the high-noise expert, the rest to the
low-noise one; the signal-to-noise ratio ((1 - sigma) / sigma)^2 grows along the loop, so they change once. `Experts` hides loading.

Solvers: Euler, DPM++ 2M and UniPC, each as one weighted mean.

A latent at noise level sigma is x = (1 - sigma) m + sigma eps: clean picture m, Gaussian noise eps. The network returns the velocity
v = eps - m, so m = x - sigma v is its guess of the finished picture. Sampling walks sigma from (almost) 1 down to 0.

The exact step. Let lambda = log((1 - sigma) / sigma), half the log signal-to-noise ratio. From noise level s to t < s the solution is

    x_t = (t/s) x_s + (1 - t/s) M,      M = mean of m along the step, weighted by exp(lambda)

that is, move from x_s towards M until t/s of the distance is left. The noise is handled exactly; all that differs between solvers is the
guess of M from the few m that are known (one network call each). With h = lambda_t - lambda_s, the width of the step:

    Euler      M = m_s                                   m held constant
    DPM++ 2M   M = m_s + h/(2 h_prev) (m_s - m_prev)     the line through the last two m, read in the middle of the step
    UniPC      the DPM++ 2M step, and when the next m arrives the same step is made again, better (the corrector): M is the exact
               weighted mean of the parabola through m_prev, m_s and m_t

The first step knows one m and is an Euler step; so is the last, which lands on m itself (t = 0, lambda infinite).

Solvers hold the history of one trajectory: step(v, 0, x) starts a new one. All arithmetic on latents is float32, on the coefficients
float64, and no step waits for the device.

Sources   DPM-Solver++ (arXiv 2211.01095) and UniPC (arXiv 2302.04867), both in the form that predicts m; schedules as in
          Wan-Video/Wan2.2@42bf4cf wan/utils/fm_solvers.py L24-28, L251-262 and fm_solvers_unipc.py L109-118, L185-211.
"""
import gc
import math
from contextlib import contextmanager

import numpy as np
import torch

from model import expert_index

# ------------------------------------------------------------------------------------------------------------------ the sampler

def denoise(experts, solver, noise, clean=None, progress=iter, after_step=lambda step, x: None, velocity=None):
    """Integrate the flow from noise to latents.

    experts   Experts, after `begin`        solver    from make_solver        noise  (B, z, T, H, W), or latents before step `solver.begin`
    clean     (B, z, n, H, W) latents of known first frames (TI2V), or None
    progress  wraps the list of steps, for a progress bar        after_step  is told how many steps are done, and the latents
    velocity  function (x, t, *what `experts.at` gives) -> velocity; None: guided_velocity, fast/caching.py has others
    returns   (B, z, T, H, W) float32
    """
    x = keep_clean_frames(noise.float(), clean)
    for i, t in progress(list(enumerate(solver.timesteps.tolist()))[solver.begin:]):
        v = (velocity or guided_velocity)(x, t, *experts.at(t))
        x = keep_clean_frames(solver.step(v, i, x), clean)
        after_step(i + 1, x)
    experts.end()
    return x


def guided_velocity(x, t, net, scale, cond, uncond):
    """Classifier-free guidance: from the velocity without the prompt towards, and past, the one with it. uncond None: no guidance."""
    t = torch.full(x.shape[:1], t, device=x.device)                  # (B,)
    with network_errors():
        if uncond is None:
            return net(x, t, cond)
        v, u = net.both(x, t, cond, uncond) if hasattr(net, "both") else (net(x, t, cond), net(x, t, uncond))      # both: fast/parallel.py
    return u + scale * (v - u)


@contextmanager
def network_errors():
    """A ValueError is what this project says about inputs. One from inside a network is a mistake of its code and shows where it arose."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"in the network: {error}") from error


def keep_clean_frames(latents, clean):
    """Put known first frames back in their place.  clean (B, z, n, H, W) or None"""
    return latents if clean is None else torch.cat([clean.to(latents), latents[:, :, clean.shape[2]:]], dim=2)


def expert_guidance(guidance, index):
    """guidance (value,) or (low noise, high noise), the order of the official configs -> the value for expert `index`."""
    return guidance[-1] if index == 0 else guidance[0]


class Experts:
    """The one or two denoisers of a checkpoint, of which the one in use is loaded.

    names  one name, or (high noise, low noise)        boundary  t/1000 from which the high-noise expert serves; None for one expert
    load   function name -> network on its device, with the `prepare` and the call of model.Denoiser
    keep   hold both at once (room enough, or a CPU)
    """

    def __init__(self, names, boundary, load, keep=False):
        if (len(names) == 2) != (boundary is not None):
            raise ValueError(f"two experts need a boundary and one needs none, got {len(names)} with boundary {boundary}")
        self.names, self.boundary, self.load, self.keep = names, boundary, load, keep
        self.loaded, self.prepared = {}, {}

    def begin(self, positive, negative, guidance):
        """A clip: what `prepare` gets under the prompt and under the negative one, and the guidance of each expert (see expert_guidance)."""
        self.positive, self.negative, self.guidance, self.prepared = positive, negative, guidance, {}
        return self

    def at(self, t):
        """Diffusion time t -> network, guidance scale, its condition, its negative condition (None where the scale is 1 or less)"""
        index = expert_index(t, self.boundary)
        if index not in self.prepared:
            self.end()
            net, scale = self.net(index), expert_guidance(self.guidance, index)
            with network_errors():
                positive, negative = net.prepare(**self.positive), net.prepare(**self.negative) if scale > 1 else None
            self.prepared = {index: (net, scale, positive, negative)}
        return self.prepared[index]

    def net(self, index):
        """Expert 0 (the only or high-noise one) or 1; loaded after the other has left the device."""
        if index not in self.loaded:
            if not self.keep:
                self.release()
            self.loaded[index] = self.load(self.names[index])
        return self.loaded[index]

    def end(self):
        """What was prepared for the clip leaves the device."""
        self.prepared = {}

    def release(self):
        self.loaded, self.prepared = {}, {}
        gc.collect()                                                 # compiled blocks refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------- noise levels and solvers

SIGMA_MAX = float(np.float32(0.999))   # UniPC starts one of 1000 training steps below pure noise; its float32 rounding shows in timesteps


def snr(sigma):
    """Signal-to-noise ratio of x = (1 - sigma) m + sigma eps.  Number or tensor in (0, 1] -> same, infinite at 0 for tensors."""
    return ((1 - sigma) / sigma) ** 2


def schedule(steps, shift, start):
    """Noise levels of a run: evenly spaced from `start` to 0, then shifted towards 1, where large pictures need more steps.

    returns  sigmas (steps + 1,) float32, the last is 0        timesteps (steps,) int64, what the network is told: 1000 sigma, truncated
    raises   ValueError for steps not in 1..1000, shift not a positive number, or levels that float32 cannot tell apart
    """
    if not (1 <= steps <= 1000 and steps == int(steps)):
        raise ValueError(f"steps must be a whole number from 1 to 1000, got {steps}: the released models use 40 or 50")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be a positive number, got {shift}: the released models use 3, 5 or 12")
    u = np.linspace(start, 0, int(steps) + 1)                         # (steps + 1,) float64
    sigmas = shift * u / (1 + (shift - 1) * u)                        # divides the SNR by shift^2; 0 and 1 stay
    timesteps = torch.from_numpy((1000 * sigmas[:-1]).astype(np.int64))
    sigmas = torch.from_numpy(sigmas.astype(np.float32))
    if not (sigmas.diff() < 0).all():
        raise ValueError(f"shift {shift} with {steps} steps wants noise levels closer than float32 can tell apart: lower either")
    return sigmas, timesteps


class Euler:
    """First order: m stays what it was at the start of the step. The classes below refine `predict`.

    steps  number of network calls        shift  see `schedule`        .sigmas (steps + 1,) float32        .timesteps (steps,) int64
    """
    start = 1.0

    def __init__(self, steps, shift):
        self.sigmas, self.timesteps = schedule(steps, shift, self.start)
        self.levels = self.sigmas.tolist()                            # Python numbers, so that no step waits for the device
        self.x0_history = []                                          # the last three clean guesses m; step 0 looks at its own only
        self.x = None                                                 # latents the last step was made from
        self.begin = 0                                                # the first step to make, see `restore`

    def step(self, velocity, i, latents):
        """Latents at noise level i -> at level i + 1.

        velocity  what the network predicted from `latents` at timesteps[i]        latents  same shape, any
        i         0, 1, .. steps - 1 in this order: multistep solvers use what they saw before
        returns   float32, same shape
        """
        self.x = self.observe(velocity, i, latents)
        return self.advance(i, self.predict(i))

    def state(self):
        """{name: tensor} of all that the next step looks back at."""
        return {"x": self.x} | {f"x0_history.{n}": m for n, m in enumerate(self.x0_history[-2:])}

    def restore(self, state, begin):
        """Go on before step `begin` with what `state` gave."""
        self.begin, self.x, self.x0_history = begin, state["x"], [state[name] for name in sorted(state) if name.startswith("x0_history.")]
        return self

    def observe(self, velocity, i, latents):
        """Remember the clean guess; returns the latents in float32."""
        assert i == 0 or self.x0_history, f"step {i} of a trajectory that has not begun"
        x = latents.float()
        self.x0_history = self.x0_history[-2:] + [x - self.levels[i] * velocity.float()]
        return x

    def predict(self, i):
        """M of the step from level i to i + 1, guessed from the m known so far."""
        return self.x0_history[-1]

    def advance(self, i, M):
        """The exact step of self.x from level i to i + 1, given M."""
        return M + (self.levels[i + 1] / self.levels[i]) * (self.x - M)

    def h(self, i):
        """h of the step from level i to i + 1. Infinite if it starts at pure noise or ends without noise."""
        s, t = self.levels[i], self.levels[i + 1]
        return math.inf if s == 1 or t == 0 else math.log(s * (1 - t) / (t * (1 - s)))


class DPMpp(Euler):
    """DPM-Solver++ 2M. It starts at pure noise, lambda = -inf, so the second step has h_prev infinite and is first order as well."""

    def predict(self, i):
        if i == 0 or i == len(self.timesteps) - 1:
            return self.x0_history[-1]
        m_prev, m_s = self.x0_history[-2:]
        return m_s + self.h(i) / (2 * self.h(i - 1)) * (m_s - m_prev)


class UniPC(DPMpp):
    """UniPC-2 with B(h) = e^h - 1: DPM++ 2M predicts, and each network call also corrects the step that led to it."""
    start = SIGMA_MAX

    def step(self, velocity, i, latents):
        """As Euler.step; but the trajectory goes on from the corrected latents, not from those that the network saw."""
        x = self.observe(velocity, i, latents)
        self.x = x if i == 0 else self.advance(i - 1, self.correct(i - 1))
        return self.advance(i, self.predict(i))

    def correct(self, i):
        """M of the step from level i to i + 1, now that m_t at its end is known too.

        With lambda = lambda_s + tau h, 0 <= tau <= 1, the parabola is  m_s + tau D + tau (tau - 1) (D - D_prev) / (1 + q)  where
        q = h_prev / h and the slopes are D = m_t - m_s, D_prev = (m_s - m_prev) / q. Its mean needs those of tau and tau^2 under the
        weight exp(h tau):  E1 = 1/(1 - e^-h) - 1/h  and  E2 = 1/(1 - e^-h) - 2 E1/h.
        """
        m_s, m_t = self.x0_history[-2:]
        if i == 0:                                                    # no m_prev: the plain mean of both ends
            return m_s + 0.5 * (m_t - m_s)
        h, q = self.h(i), self.h(i - 1) / self.h(i)
        full = -1 / math.expm1(-h)                                    # 1/(1 - e^-h)
        E1 = full - 1 / h
        E2 = full - 2 * E1 / h
        D, D_prev = m_t - m_s, (m_s - self.x0_history[-3]) / q
        return m_s + E1 * D + (E2 - E1) / (1 + q) * (D - D_prev)


SOLVERS = {"unipc": UniPC, "dpm++": DPMpp, "dpmpp": DPMpp, "euler": Euler}


def make_solver(name, steps, shift):
    """Solver by name: "unipc" (the official default), "dpm++" (also spelt "dpmpp") or "euler".

    returns  object with .sigmas (steps + 1,) float32, .timesteps (steps,) int64, .step(velocity, i, latents) -> next latents
    raises   ValueError for an unknown name, and as `schedule`
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name](steps, shift)
