"""The training loop: AdamW on whatever a stage trains, averaged weights, exact resume, several GPUs, the loss as text and picture.

A stage is a dict of networks, a function step -> batch and one batch -> loss. All that is random comes with the batch, from
`generator(device, seed, step)`: a run which was stopped and resumed gives the bits of one that was not, and the loss, which is then always the
same computation, can be recorded as a CUDA graph. Small networks are limited by the rate at which Python starts kernels, not by the GPU.
"""
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn

from fast.probe import pick_device


class Stage(NamedTuple):
    """What is trained, and how well it does."""
    nets: nn.ModuleDict                                              # the parameters that change
    batch: Callable                                                  # step -> (kind of computation, tensor or None, ...)
    loss: Callable                                                   # (kind, tensor or None, ...) -> scalar
    finish: Callable | None = lambda nets: {}                        # averaged nets -> what else NAME.weights.pt holds; None: no such file
    record: bool = True                                              # on a GPU, as a graph per kind and shapes: for networks that are small
    options: str = ""                                                # which, beside those of `train`, a resumed run must not change


# ---------------------------------------------------------------------------------------------------------------- several GPUs

def world():
    """(rank, number of processes) as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(name):
    """The device of this process, of several the one that torchrun means for it; processes find each other.  Arguments as machine.pick_device"""
    device = pick_device(name, os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def average_gradients(parameters):
    """The mean over all processes, in one message. What took no part in this step has no gradient, in any process."""
    if world()[1] > 1:
        parameters = [p for p in parameters if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, g in zip(parameters, (flat / world()[1]).split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))


def generator(device, *numbers):
    """For one purpose: the same numbers give the same randomness."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2 ** 62
    return torch.Generator(device).manual_seed(seed)


# -------------------------------------------------------------------------------------------------------------------- the loop

class Recording:
    """Loss and gradients of batches of one kind and shape, as a CUDA graph."""

    def __init__(self, loss, kind, batch, parameters):
        self.batch, self.graph, side = [x if x is None else x.clone() for x in batch], torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                # libraries choose their kernels at the first calls
            for _ in range(2):
                loss(kind, *self.batch).backward()
                forget_gradients(parameters)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):        # of several GPUs, other threads wait for messages
            self.loss = loss(kind, *self.batch)
            self.loss.backward()
        self.gradients = [p.grad for p in parameters]

    def play(self, batch, parameters):
        for mine, x in zip(self.batch, batch):
            if x is not None:
                mine.copy_(x)
        self.graph.replay()
        for p, gradient in zip(parameters, self.gradients):
            p.grad = gradient
        return self.loss.detach().clone()


def forget_gradients(parameters):
    for p in parameters:
        p.grad = None


def gradients(stage, kind, batch, parameters, recordings):
    """The loss of a batch, its gradients left in the parameters.  recordings  {(kind, shapes): Recording} of the steps before"""
    key = kind, *(x if x is None else x.shape for x in batch)
    if key not in recordings:
        recordings[key] = None
        if stage.record and parameters[0].is_cuda:
            try:
                recordings[key] = Recording(stage.loss, kind, batch, parameters)
            except RuntimeError as error:                            # an operation that waits for the GPU, or no memory for a copy of all
                print(f"goes on without a CUDA graph: {str(error).splitlines()[0]}", flush=True)
                forget_gradients(parameters)
    if recordings[key]:
        return recordings[key].play(batch, parameters)
    loss = stage.loss(kind, *batch)
    loss.backward()
    return loss.detach()


def batches(make, steps, device):
    """make(step) for every step. On a GPU it works on a stream of its own, beside what is queued for the step before."""
    if device.type != "cuda":
        yield from map(make, steps)
        return
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    for step in steps:
        with torch.cuda.stream(side):
            kind, *batch = make(step)
        main.wait_stream(side)
        for x in batch:
            if x is not None:
                x.record_stream(main)                                # not used again by the other stream before this one is done
        yield kind, *batch


def learning_rate(step, o):
    return o.lr * min(1, (step + 1) / o.warmup) * 0.5 * (1 + math.cos(math.pi * min(1, step / o.steps)))


def train(name, stage, o, device):
    """Optimise until o.steps, from the saved state if there is one; leaves the averaged weights in stage.nets.

    Writes out/NAME.pt (the state) and out/NAME.txt, NAME.png (the loss) every o.save steps.
    raises ValueError if the state is of other networks or options, or the loss is not finite
    """
    rank, _ = world()
    path = Path(o.out) / f"{name}.pt"
    trained = [p for p in stage.nets.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW(trained, lr=o.lr, betas=(0.9, 0.99), weight_decay=o.decay, fused=device.type == "cuda")
    options = {key: getattr(o, key) for key in f"seed steps batch lr warmup decay ema clip {stage.options}".split()}
    first, log, losses, recordings = 0, [], [], {}
    if path.is_file():
        state = load_state(path)
        if [p.shape for p in trained] != [p.shape for p in state["weights"]]:
            raise ValueError(f"{path} is the state of a run with other networks: remove it, or give another --out")
        for key, old in state.get("options", {}).items():
            if options.get(key, old) != old:
                flag = f"--{key.replace('_', '-')}"
                raise ValueError(f"{path} was trained with {flag} {old}, got {flag} {options[key]}: remove it, or give another --out")
        first, log, losses = state["step"], state["log"], [x.to(device) for x in state["losses"]]
        optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for p, e, saved, saved_e in zip(trained, average, state["weights"], state["average"]):
                p.copy_(saved), e.copy_(saved_e)
        print(f"{name}: goes on from step {first}")
    last, start = min(o.stop or o.steps, o.steps), time.perf_counter() - (log[-1][2] if log else 0)
    for step, (kind, *batch) in enumerate(batches(stage.batch, range(first, last), device), first):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, o)
        losses.append(gradients(stage, kind, batch, trained, recordings))
        average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, o.clip)
        optimiser.step()
        forget_gradients(trained)
        with torch.no_grad():                                        # the first steps are soon forgotten
            torch._foreach_lerp_(average, trained, 1 - min(o.ema, (step + 1) / (step + 10)))
        if (step + 1) % max(1, o.steps // 200) == 0 or step + 1 == o.steps:
            log.append([step + 1, torch.stack(losses).mean().item(), time.perf_counter() - start])
            losses = []
            if not math.isfinite(log[-1][1]):
                raise ValueError(f"the loss is {log[-1][1]} at step {step + 1}: choose a smaller --lr and start again")
            if rank == 0:
                print(f"{name} step {log[-1][0]:6d} of {o.steps}   loss {log[-1][1]:.4f}   {log[-1][2]:.0f} s", flush=True)
        if rank == 0 and ((step + 1) % o.save == 0 or step + 1 == last):
            save_state(path, dict(step=step + 1, log=log, losses=losses, weights=trained, average=average,
                                  optimiser=optimiser.state_dict(), options=options))
            if log:
                write_curve(path.with_suffix(""), log)
    with torch.no_grad():
        for p, e in zip(trained, average):
            p.copy_(e)
    if rank == 0 and stage.finish:
        nets = {key: net.state_dict() for key, net in stage.nets.items()}
        save_state(Path(o.out) / f"{name}.weights.pt", nets | stage.finish(stage.nets))


def save_state(path, state):
    """Complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_state(path, wanted=None):
    if not path.is_file():
        raise ValueError(f"{path} is not there: run `python train.py {wanted}` first")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_curve(stem, log):
    """NAME.txt with step, loss and seconds; NAME.png with the loss over the steps, both axes logarithmic."""
    lines = [f"{step:8d} {loss:10.5f} {seconds:8.1f}" for step, loss, seconds in log]
    Path(f"{stem}.txt").write_text("\n".join(["    step       loss  seconds", *lines, ""]))
    w, h, edge = 640, 360, 40
    picture = Image.new("RGB", (w, h), "white")
    pen, xs, ys = ImageDraw.Draw(picture), [math.log(r[0]) for r in log], [math.log(max(r[1], 1e-9)) for r in log]
    spread = lambda v, vs, a, b: a + (b - a) * (v - min(vs)) / max(max(vs) - min(vs), 1e-9)
    pen.rectangle((edge, edge, w - edge, h - edge), outline="#888888")
    pen.line([(spread(x, xs, edge, w - edge), spread(y, ys, h - edge, edge)) for x, y in zip(xs, ys)], fill="#1f5fbf", width=2)
    pen.text((edge, h - edge + 6), f"step {log[0][0]}", "black"), pen.text((w - 2 * edge, h - edge + 6), f"{log[-1][0]}", "black")
    pen.text((2, edge), f"{math.exp(max(ys)):.3g}", "black"), pen.text((2, h - edge - 10), f"{math.exp(min(ys)):.3g}", "black")
    pen.text((edge, 12), f"{Path(stem).name}: loss {log[-1][1]:.4f} at step {log[-1][0]}", "black")
    picture.save(f"{stem}.png")
