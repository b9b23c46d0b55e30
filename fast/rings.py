"""Streams on a GPU: a ring whose attention is cuDNN's, blocks launched as CUDA graphs, decoding beside the next block.

`GPURing` has what `live.Ring` has and gives the same numbers but for rounding. The keys that a block sees are seldom a multiple of 128, at which
cuDNN works on Hopper: the others are attended to afterwards, as in blocks.py. The reference's keys are turned in one pass over memory.

`BlockGraphs` launches the forwards of a block as one graph, once rings are full: there is one per place in the ring, as a graph has its addresses
in it. What a block brings, noise, sound and tables, is copied to where the graphs look for it.

`Beside` decodes a block on a CUDA stream of its own while the next one is denoised, and copies its frames to the host.

Axes    n tokens of a latent frame   S condition tokens   K heads   D head width
"""
from dataclasses import replace

import torch

from fast import kernels, rows
from fast.blocks import KEYS, LONG, FlipRotary, attend_rows, compiled, takes_last_keys_apart
from live import AHEAD, BLOCK, Ring

rotate = FlipRotary()


def turn_into(x, rope, out):
    out.copy_(rotate(x, rope))


def turn(x, rope, out):
    """x (1, n, K, D) turned by a table (2, n, 1, D/2) into the place out."""
    if kernels.works(x.device) and x.is_contiguous() and out.dtype == torch.bfloat16:
        return rows.rotate(x, rope, out)
    (compiled(turn_into) if x.is_cuda else turn_into)(x, rope, out)


class GPURing(Ring):
    """As live.Ring; the result of `attend` takes the place of the queries."""

    def at(self, slot, seen, moved):
        """As Ring.at; keys and values can be made where they belong."""
        attend, start = super().at(slot, seen, moved), self.S + slot * self.n
        attend.places = lambda layer: self.layers[layer][:, :, start:start + BLOCK * self.n]
        return attend

    def attend(self, q, k, v, layer, slot, seen, moved):
        memory, start, seen = self.layers[layer], self.S + slot * self.n, self.S + seen * self.n
        turn(self.ref_keys[layer], moved, memory[0, :, :self.n])
        for x, place in zip((k, v), memory[:, :, start:start + k.shape[1]]):
            if x.data_ptr() != place.data_ptr():                     # it was not made there
                place.copy_(x)
        whole = seen // KEYS * KEYS if seen >= LONG and takes_last_keys_apart(q) else seen
        attend_rows(q, *memory[:, :, :seen], whole)
        return q.flatten(2)


def unique(conds):
    return {id(cond): cond for cond in conds}.values()


class BlockGraphs:
    """`Stream.steps` as CUDA graphs. One viewer at a time: the addresses of its rings are in them."""

    def __init__(self, stream):
        self.stream, self.plain, self.graphs, self.pool, self.held = stream, stream.steps, {}, None, []
        stream.steps = self

    def __call__(self, x, conds, moved):
        stream = self.stream
        if stream.frame < stream.window:                             # rings are not full: what a block sees still grows
            return self.plain(x, conds, moved)
        key, given = stream.frame % stream.window, self.changing(x, conds, moved)
        held = [stream.experts, *(ring.ref_keys for ring in stream.rings)]                   # whose addresses are in the graphs too
        if [*map(id, held)] != [*map(id, self.held)]:
            self.graphs, self.pool, self.held = {}, None, held
            self.inputs = [tensor.clone() for tensor in given]
            self.x, self.conds, self.moved = self.with_inputs(conds)
        for mine, tensor in zip(self.inputs, given):
            mine.copy_(tensor)
        if key not in self.graphs:
            self.graphs[key] = self.capture()
        graph, out = self.graphs[key]
        graph.replay()
        return out.clone()

    @torch.no_grad()
    def get_ready(self, latents, audio, capture=True):
        """Compile, and make all graphs, before a stream begins: what this leaves in the rings is written over before it is seen.

        latents  (1, z, 3, H, W), audio (1, audio_states, audio_dim, 12): of the stream's shapes and on its device, of any numbers
        capture  False where the stream will replace its reference: its graphs, which have other addresses, are made when rings are full
        """
        stream = self.stream
        for stream.frame in range(stream.window, 2 * stream.window, BLOCK) if capture else (0,):
            self(latents, stream.conditions(audio), [stream.moved(AHEAD[0]) for _ in stream.experts])
        stream.frame = 0

    def changing(self, x, conds, moved):
        """All tensors that differ from block to block, in a fixed order; of each Cond once. Without pose the video's bias does not."""
        return [x, *moved, *(tensor for cond in unique(conds) for tensor in (cond.rope, *(part for layer in cond.layers if layer.audio is not None
                                                                                         for part in (layer.audio, layer.adain))))]

    def with_inputs(self, conds):
        """The arguments of `Stream.steps` made of self.inputs."""
        inputs, made = iter(self.inputs), {}
        x, moved = next(inputs), [next(inputs) for _ in conds]
        for cond in unique(conds):
            rope = next(inputs)
            layers = tuple(layer._replace(audio=next(inputs), adain=next(inputs)) if layer.audio is not None else layer for layer in cond.layers)
            made[id(cond)] = replace(cond, rope=rope, layers=layers)
        return x, [made[id(cond)] for cond in conds], moved

    def capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                # libraries choose their kernels at the first call
            self.plain(self.x, self.conds, self.moved)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = self.plain(self.x, self.conds, self.moved)
        self.pool = self.pool or graph.pool()
        return graph, out


class Beside:
    """Decodes the blocks of a live.Live while the next is denoised. Call it with latents -> a function that waits for their frames, on the host."""

    def __init__(self, video):
        self.video, self.side = video, torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.side):                           # its memory is then this stream's
            video.cache = type(video.cache)(x if x is None else x.clone() for x in video.cache)

    def __call__(self, latents):
        self.side.wait_stream(torch.cuda.current_stream())
        latents.record_stream(self.side)
        with torch.cuda.stream(self.side):
            frames = self.video.frames(latents)
            host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
            host.copy_(frames, non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def wait():
            done.synchronize()
            return host
        return wait
