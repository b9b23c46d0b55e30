"""Noise -> latents: the solver loop with classifier-free guidance, over one or two experts.

Flow matching has x_t = (1 - sigma) x_0 + sigma eps, so the signal-to-noise ratio is ((1 - sigma) / sigma)^2 and grows along the loop.
A checkpoint with two experts gives the steps with t/1000 >= boundary to the high-noise expert and the rest to the low-noise one: the
switch happens at most once, and the first expert leaves the device before the second arrives.
"""
import gc
from dataclasses import replace
from itertools import groupby

import torch

from model import expert_index
from fast.offload import HostLayers


class Experts:
    """The one or two denoisers of a checkpoint, of which the one in use is loaded, and how they are run.

    names     one name, or (high noise, low noise)        boundary  t/1000 from which the high-noise expert serves; None for one expert
    load      function name -> Denoiser on its device     keep      hold both between switches (room enough, or a CPU)
    span      longest run of tokens worked on at once     one_loop  both guidance branches in one pass over the blocks
    host_layers  text keys and values wait in host memory
    """

    def __init__(self, names, boundary, load, keep=False, span=None, one_loop=True, host_layers=False):
        if (len(names) == 2) != (boundary is not None):
            raise ValueError(f"two experts need a boundary and one needs none, got {len(names)} with boundary {boundary}")
        self.names, self.boundary, self.load, self.keep = names, boundary, load, keep
        self.span, self.one_loop, self.host_layers = span, one_loop, host_layers
        self.loaded = {}

    def index(self, t):
        return expert_index(t, self.boundary)

    def net(self, index):
        """Expert 0 (the only or high-noise one) or 1; loads it, after releasing the other."""
        if index not in self.loaded:
            if not self.keep:
                self.release()
            self.loaded[index] = self.load(self.names[index])
        return self.loaded[index]

    def release(self):
        self.loaded.clear()
        gc.collect()                                                 # compiled blocks refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def prepare(self, net, arguments):
        """arguments of Denoiser.prepare -> Cond"""
        cond = net.prepare(**arguments, chunk=self.span)
        return replace(cond, layers=HostLayers(cond.layers)) if self.host_layers else cond

    def velocity(self, net, latents, t, conds, scale):
        """u + scale * (c - u): c under the prompt, u under the negative prompt.  conds [cond] or [cond, negative cond]"""
        t = torch.full(latents.shape[:1], t, device=latents.device)
        v, *u = net.velocities(latents, t, conds) if self.one_loop else [net.velocities(latents, t, [cond])[0] for cond in conds]
        return u[0] + scale * (v - u[0]) if u else v


def expert_guidance(guidance, index):
    """guidance (value,) or (low noise, high noise), the order of the official configs -> the value for expert `index`."""
    return guidance[-1] if index == 0 else guidance[0]


def hold(latents, clean):
    """Put known first frames back in their place.  clean (B, z, n, H, W) or None"""
    return latents if clean is None else torch.cat([clean.to(latents), latents[:, :, clean.shape[2]:]], dim=2)


def denoise(experts, solver, noise, arguments, guidance, clean=None, progress=iter):
    """Integrate the flow from noise to latents.

    experts   Experts                       solver    from solver.make_solver
    noise     (B, z, T, H, W)               arguments function positive -> arguments of Denoiser.prepare, for one guidance branch
    guidance  (value,) or (low, high); a value of 1 or less leaves the negative branch out
    clean     (B, z, n, H, W) latents of known first frames (TI2V), or None
    progress  wraps the list of steps, for a progress bar
    returns   (B, z, T, H, W) float32
    """
    latents = hold(noise.float(), clean)
    steps = progress(list(enumerate(solver.timesteps.tolist())))
    for index, run in groupby(steps, key=lambda step: experts.index(step[1])):
        net, scale = experts.net(index), expert_guidance(guidance, index)
        conds = [experts.prepare(net, arguments(positive)) for positive in ((True, False) if scale > 1 else (True,))]
        for i, t in run:
            velocity = experts.velocity(net, latents, t, conds, scale)
            latents = hold(solver.step(velocity, i, latents), clean)
        del net, conds                                               # before the other expert is loaded
    return latents
