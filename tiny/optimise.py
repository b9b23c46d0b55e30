"""What the training loop of train.py stands on: several GPUs, seeded randomness, CUDA graphs, states on disk, loss curves, options.

All that is random comes with the batch, from `generator(device, seed, step)`. So a resumed run gives the bits of an uninterrupted one. And the
loss is the same computation at every step, which can be recorded as a CUDA graph: small networks are limited by the rate at which Python
launches kernels, not by the GPU.
"""
import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn

from fast.probe import pick_device


class Stage(NamedTuple):
    """What is trained, on what, by which loss."""
    nets: nn.ModuleDict              # the parameters that require gradients are trained
    batch: Callable                  # step -> (kind of computation, tensor or None, ...)
    loss: Callable                   # (kind, tensor or None, ...) -> scalar
    record: bool = True              # on a GPU, as one CUDA graph per kind and shapes: for small networks
    options: str = ""                # names of options that a resumed run must not change, beside those of the loop


# ---------------------------------------------------------------------------------------------------------------- several GPUs

def world():
    """(rank, number of processes), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(name):
    """The device of this process; several processes are connected.  name as in fast.plan.pick_device"""
    device = pick_device(name, os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def average_gradients(parameters):
    """The mean over all processes, in one message. A parameter without gradient has none in any process."""
    if world()[1] > 1:
        parameters = [p for p in parameters if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, g in zip(parameters, (flat / world()[1]).split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))


def generator(device, *numbers):
    """A torch.Generator for one purpose: the same numbers give the same randomness."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2 ** 62
    return torch.Generator(device).manual_seed(seed)


def autocast(device):
    """bfloat16 matrix products and convolutions on a GPU. Casts are not cached: a CUDA graph must contain all of them."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


# ------------------------------------------------------------------------------------------------------- batches and gradients

def batches(make, steps, device):
    """make(step) for every step. On a GPU the next batch is made on a second stream while the current step runs."""
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
                x.record_stream(main)                                # its memory is not reused before the main stream is done with it
        yield kind, *batch


class Graph:
    """Loss and gradients for batches of one kind and shape, as a CUDA graph."""

    def __init__(self, loss, kind, batch, weights):
        self.batch, self.graph, side = [x if x is None else x.clone() for x in batch], torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                # libraries choose their kernels at the first calls
            for _ in range(2):
                loss(kind, *self.batch).backward()
                clear_gradients(weights)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):        # NCCL's threads may call CUDA meanwhile
            self.loss = loss(kind, *self.batch)
            self.loss.backward()
        self.gradients = [p.grad for p in weights]

    def replay(self, batch, weights):
        for mine, x in zip(self.batch, batch):
            if x is not None:
                mine.copy_(x)
        self.graph.replay()
        for p, gradient in zip(weights, self.gradients):
            p.grad = gradient
        return self.loss.detach().clone()


def clear_gradients(weights):
    for p in weights:
        p.grad = None


def backward(stage, kind, batch, weights, graphs):
    """The loss of a batch; its gradients are left in the weights.  graphs  {(kind, shapes): Graph or None} of earlier steps, added to"""
    key = kind, *(x if x is None else x.shape for x in batch)
    if key not in graphs:
        graphs[key] = None
        if stage.record and weights[0].is_cuda:
            try:
                graphs[key] = Graph(stage.loss, kind, batch, weights)
            except RuntimeError as error:                            # an operation that synchronises, or too little memory for a copy
                print(f"continues without a CUDA graph: {str(error).splitlines()[0]}", flush=True)
                clear_gradients(weights)
    if graphs[key]:
        return graphs[key].replay(batch, weights)
    loss = stage.loss(kind, *batch)
    loss.backward()
    return loss.detach()


# ------------------------------------------------------------------------------------------------------------- files of a run

def save_state(path, state):
    """Written whole or not at all, by the first process."""
    if world()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)


def load_state(path, command):
    """What `save_state` wrote.  command  that makes it, for the ValueError if it is missing"""
    if not path.is_file():
        raise ValueError(f"{path} is not there: run `{command}` first")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_weights(o, name, nets, **more):
    """OUT/NAME.weights.pt: {kind: state dict of the averaged weights}, and more."""
    save_state(Path(o.out) / f"{name}.weights.pt", {kind: net.state_dict() for kind, net in nets.items()} | more)


def resume(path, options, weights, average, optimiser):
    """Load a saved run into weights, average and optimiser -> step, log, losses since its last line; 0, [], [] without a saved run.

    raises  ValueError if it trained other networks or had other options
    """
    if not path.is_file():
        return 0, [], []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if [p.shape for p in weights] != [p.shape for p in state["weights"]]:
        raise ValueError(f"{path} is the state of a run with other networks: remove it, or give another --out")
    for name, old in state["options"].items():
        if options.get(name, old) != old:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{path} was trained with {flag} {old}, got {flag} {options[name]}: remove it, or give another --out")
    optimiser.load_state_dict(state["optimiser"])
    with torch.no_grad():
        for p, saved in zip([*weights, *average], [*state["weights"], *state["average"]]):
            p.copy_(saved)
    print(f"{path.stem}: goes on from step {state['step']}")
    return state["step"], state["log"], [x.to(weights[0].device) for x in state["losses"]]


def write_curve(stem, log):
    """STEM.txt with step, loss and seconds; STEM.png with the loss over the steps, both axes logarithmic.  log  rows of the three"""
    if not log or world()[0]:
        return
    lines = [f"{step:8d} {loss:10.5f} {seconds:8.1f}" for step, loss, seconds in log]
    Path(f"{stem}.txt").write_text("\n".join(["    step       loss  seconds", *lines, ""]))
    w, h, edge = 640, 360, 40
    picture = Image.new("RGB", (w, h), "white")
    pen, xs, ys = ImageDraw.Draw(picture), [math.log(row[0]) for row in log], [math.log(max(row[1], 1e-9)) for row in log]

    def scaled(values, a, b):
        return [a + (b - a) * (v - min(values)) / max(max(values) - min(values), 1e-9) for v in values]
    pen.rectangle((edge, edge, w - edge, h - edge), outline="#888888")
    pen.line([*zip(scaled(xs, edge, w - edge), scaled(ys, h - edge, edge))], fill="#1f5fbf", width=2)
    for x, y, text in ((edge, h - edge + 6, f"step {log[0][0]}"), (w - 2 * edge, h - edge + 6, f"{log[-1][0]}"),
                       (2, edge, f"{math.exp(max(ys)):.3g}"), (2, h - edge - 10, f"{math.exp(min(ys)):.3g}"),
                       (edge, 12, f"{Path(stem).name}: loss {log[-1][1]:.4f} at step {log[-1][0]}")):
        pen.text((x, y), text, "black")
    picture.save(f"{stem}.png")


# --------------------------------------------------------------------------------------------------------------- command line

LOOP = "seed steps batch lr warmup decay ema clip"                   # options that a resumed run must not change


def between(least, most=math.inf, kind=float):
    """An argparse type: a number from `least` to `most`."""
    def number(text):
        value = kind(text)
        if not least <= value <= most:                               # NaN is neither
            raise argparse.ArgumentTypeError(f"must be {least} {'or more' if most == math.inf else f'to {most}'}, got {text}")
        return value
    return number


def add_loop_options(parser, steps, batch, lr):
    """The options of every training run, with the stage's own defaults."""
    def option(flag, kind, default, help):
        parser.add_argument(flag, type=kind, default=default, help=help)
    positive = between(1, kind=int)
    option("--out", str, "runs/tiny", "folder of states and loss curves")
    option("--steps", positive, steps, "optimiser steps")
    option("--batch", positive, batch, "clips per step and GPU")
    option("--lr", between(0), lr, "highest learning rate")
    option("--warmup", positive, 100, "steps until it is reached; then a cosine to 0")
    option("--decay", between(0), 0.01, "AdamW's weight decay")
    option("--ema", between(0, 1), 0.999, "of the averaged weights, which are the result")
    option("--clip", between(0), 1.0, "largest norm of the gradient")
    option("--seed", between(0, 2 ** 63 - 1, int), 0, "of everything random")
    option("--save", positive, 1000, "steps between saved states; a run resumes from the last one by itself")
    option("--stop", between(0, kind=int), 0, "end this run early, after this many steps; the same command without it goes on (0: at --steps)")
    option("--device", str, "auto", "cpu, cuda, cuda:1 (auto: a GPU if there is one)")


def run(o):
    """o.run(o, device) of a parsed command line -> exit status; ValueError and OSError become one line."""
    try:
        device = start(o.device)
        torch.manual_seed(o.seed)                                    # of the initial weights
        o.run(o, device)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on from the last saved state", file=sys.stderr)
        return 130
