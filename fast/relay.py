"""A stream on many GPUs: blocks go from rank to rank, each makes some of the steps, so that as many blocks are being made as there are ranks.

`torchrun --nproc-per-node 4 sample.py --live ...` starts them. A block takes as long as on one GPU, blocks leave as fast as the slowest rank works.

line      Ranks stand in the order 1, 2, ..., 0, and the first steps are rank 1's. So the last steps, the VAE and the file are rank 0's, which writes
          and speaks for all (jobs/ranks.py), and no frames travel.
rings     There is one per step: a rank has those of its own steps, and the networks of these alone.
draws     Noise and distances come from the seed: every rank draws all of them, in the order of one process, and uses its own.
sound     The first in line hears it. Each block's features go along with its latents; samples from a pipe too, for the file.
sending   Notes go from host to host (gloo), latents from device to device (NCCL). A rank begins its next block while the last one is being taken,
          and waits before it sends another: so no rank is ever more than a block ahead of the next.
reference With `replace_ref` the last in line sends the first latent to the first, and it goes along with the block that needs it.
"""
import pickle
from typing import NamedTuple

import torch
import torch.distributed as dist

import live
from fast.probe import synchronize


class Note(NamedTuple):
    """What goes along with the latents of a block."""
    frame: int                   # the number of its first latent frame
    features: torch.Tensor       # of its sound, on the host
    total: float                 # pixel frames that there will be in all, as far as is known
    samples: list                # of sound from a pipe, heard since the block before
    heard: float                 # when its sound was there: time.perf_counter() of the first in line
    first: torch.Tensor | None = None                                # the latent that becomes the reference, on the host


class Line:
    """The place of a rank among those that make a stream.  rank of size"""

    def __init__(self, rank=0, size=1):
        self.size, self.place, self.sending = size, (rank - 1) % size, []
        self.before, self.after = (rank - 1) % size, (rank + 1) % size
        self.first, self.last = self.place == 0, self.place == size - 1

    def steps(self, count):
        """Those of `count` steps that this rank makes, a range: as many on each as can be; who is last, and decodes, has none more than another."""
        if self.size > count:
            raise ValueError(f"--live gives every process some of the {count} steps of a block, got {self.size} processes: start {count} or fewer")
        return range(*(-(-count * i // self.size) for i in (self.place, self.place + 1)))

    def send(self, note, *tensors):
        """To the next in line, or from the last to the first. Returns at once, unless what was sent before has not been taken."""
        self.settle()
        data = torch.frombuffer(bytearray(pickle.dumps(note)), dtype=torch.uint8)
        self.sending = [(dist.isend(part, self.after), part) for part in (torch.tensor([len(data)]), data, *tensors)]

    def settle(self):
        """Wait until all is taken."""
        for work, _ in self.sending:
            work.wait()
        self.sending = []

    def receive(self):
        """A note of the rank before."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, self.before)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, self.before)
        return pickle.loads(data.numpy().tobytes())

    def take(self, like):
        """A tensor of the rank before, as `like`; on a GPU what follows waits for it, not this process."""
        out = torch.empty_like(like)
        dist.irecv(out, self.before).wait()
        return out

    def once(self, make):
        """The tensors of make(), which the last in line calls, on the host of all."""
        made = [tuple(x.cpu() for x in make()) if self.last else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]


class Relay(live.Live):
    """As live.Live, on every rank of a line. `blocks` stands for the sound; `latents` is called for each block, on all; `frames` on the last.

    picture      of live.prepare: networks of this rank's steps, on the last in line with the VAE
    line, steps  a Line; the steps of a block        others  as live.Live
    """

    def __init__(self, picture, line, steps, *args, **options):
        super().__init__(picture, *args, **options)
        self.line, self.steps, self.own, self.note, self.samples = line, steps, line.steps(steps), None, []
        sigmas, timesteps = live.schedule(steps, self.stream.shift)
        self.stream.sigmas, self.stream.timesteps = sigmas[self.own.start:self.own.stop + 1], timesteps[self.own.start:self.own.stop]

    def greet(self):
        """Hand a block's latents down the line before there are any: the first exchange on GPUs takes seconds. On the last in line it returns when all
        are ready."""
        line, x = self.line, torch.zeros(self.shape, device=self.picture.motion.device)
        if not line.first:
            line.receive()
            line.take(x)
        if not line.last:
            line.send(None, x)
            line.settle()

    def blocks(self, sound, hear):
        """Yield per block its features, how many frames there will be in all, and when it was heard.

        sound  yields them, on the first in line; what it hears on the way is to be put in `samples`        hear  takes these samples, on the last
        """
        line, stream = self.line, self.stream
        for note in self.notes(sound) if line.first else iter(line.receive, None):
            if note.frame != stream.frame:
                raise RuntimeError(f"wanted the block of latent frame {stream.frame}, got that of {note.frame}")
            self.note = note
            for samples in note.samples if line.last else ():
                hear(samples)
            yield note.features, note.total, note.heard
        if not line.last:
            line.send(None)
        if self.replace_ref and line.first and 0 < stream.frame <= stream.window:
            line.receive()                                           # the first latent, which the sound was too short for
        line.settle()
        synchronize(self.picture.motion.device)                      # a process that ends takes nothing down with it

    def notes(self, sound):
        for features, total, heard in sound:
            yield Note(self.stream.frame, features, total, self.samples.copy(), heard)
            self.samples.clear()

    @torch.no_grad()
    def latents(self, audio, pose=None):
        """This rank's steps of the block of `note` -> (1, z, 3, H, W), on the last in line those of live.Live"""
        stream, line, picture = self.stream, self.line, self.picture
        x, distances = self.noise(audio), [self.draw() for _ in range(self.steps)]
        if not line.first:
            x = line.take(x)
        if self.replace_ref and stream.frame == stream.window:
            if line.first:
                self.note = self.note._replace(first=line.receive())
            stream.begin(live.sinks(picture.nets, picture.text, self.note.first.to(x.device), picture.motion))
        begins, x = stream.frame == 0, stream.block(x, audio, iter(distances[self.own.start:self.own.stop]).__next__, pose)
        if not line.last:
            line.send(self.note, x.contiguous())
        elif begins and self.replace_ref:
            line.send(x[:, :, :1].cpu())
        return x
