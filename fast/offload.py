"""Networks larger than the GPU's memory: blocks wait in host memory and pass through two slots on the GPU, one in use, one being filled.

    copy stream      block 1 -> slot B    | block 2 -> slot A    | block 3 -> slot B    | ...
    compute stream   block 0 from slot A  | block 1 from slot B  | block 2 from slot A  | ...

A copy waits for the event that the slot's last block is done with, a block for the event that it has arrived; the host waits for neither,
and nothing is copied back. Behind the last block comes the first again, in place for the next pass. Parameters are views of the slots:
addresses never change, only bytes do. Blocks that stay on the GPU stand evenly between those that come and go: all copies get equal time.
"""
import copy
import math
import threading
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import torch

PIECE = 2 ** 26      # bytes of one allocation of host memory
ALIGN = 256          # parameters begin at multiples of so many bytes


class Buffer(NamedTuple):
    """Where one tensor lies in a run of bytes."""
    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, data):
        return data[self.start:self.stop].view(self.dtype).view(self.shape)


def layout(tensors):
    """Lay tensors one behind another.  [(name, shape, dtype), ...] -> (Buffer, ...), bytes in all"""
    buffers, end = [], 0
    for name, shape, dtype in tensors:
        buffers.append(Buffer(name, end, end + math.prod(shape) * dtype.itemsize, tuple(shape), dtype))
        end = math.ceil(buffers[-1].stop / ALIGN) * ALIGN
    return tuple(buffers), end


class HostRows:
    """Rows of bytes in host memory, page-locked (pin) for a GPU: copies from any other memory would hold up the host.
    PyTorch rounds page-locked allocations up to powers of two; pieces of such a size lose nothing, and one network's serve the next."""

    def __init__(self, sizes, pin):
        self.starts = [0, *accumulate(sizes)]
        self.pieces = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=pin) for _ in range(math.ceil(self.starts[-1] / PIECE))]

    def parts(self, start, data):
        """Pairs of bytes on the host, from `start` on, and bytes of data."""
        while len(data):
            i, at = divmod(start, PIECE)
            n = min(len(data), PIECE - at)
            yield self.pieces[i][at:at + n], data[:n]
            start, data = start + n, data[n:]

    def write(self, row, buffer, x):
        for host, part in self.parts(self.starts[row] + buffer.start, x.to(buffer.dtype).contiguous().view(-1).view(torch.uint8)):
            host.copy_(part)

    def read(self, row, data):
        """Fill data, of the row's length and on the device: queued on the current stream."""
        for host, part in self.parts(self.starts[row], data):
            part.copy_(host, non_blocking=True)


def resident_blocks(n, resident):
    """Which of n blocks stay on the device, evenly spread."""
    return {i for i in range(n) if (i + 1) * resident // n > i * resident // n}


def footprint(layouts, resident):
    """Bytes of device and of page-locked host memory that blocks take.  layouts: (buffers, bytes) of each, from `split`"""
    stay = resident_blocks(len(layouts), resident)
    streamed = [nbytes for i, (_, nbytes) in enumerate(layouts) if i not in stay]
    return max(streamed, default=0) * len(streamed[:2]) + sum(layouts[i][1] for i in stay), math.ceil(sum(streamed) / PIECE) * PIECE


def split(tensors, dtype_of):
    """Tell the blocks' tensors from the others, by headers alone.

    tensors  {name: Entry}, from checkpoints.py        dtype_of  function (name, Entry) -> dtype in which the parameter is kept
    returns  (buffers, bytes) of each block, {name inside the block: Entry} of each block, {name: Entry} of the rest
    """
    rest = {name: entry for name, entry in tensors.items() if not name.startswith("blocks.")}
    blocks = {}
    for name in sorted(tensors.keys() - rest.keys()):
        _, i, inner = name.split(".", 2)
        blocks.setdefault(int(i), {})[inner] = tensors[name]
    blocks = [blocks[i] for i in sorted(blocks)]
    layouts = [layout([(name, entry.shape, dtype_of(f"blocks.{i}.{name}", entry)) for name, entry in block.items()])
               for i, block in enumerate(blocks)]
    return layouts, blocks, rest


def bind(block, data, buffers):
    """Make the parameters of a meta-built block views of `data`."""
    block.load_state_dict({buffer.name: buffer.view(data) for buffer in buffers}, strict=True, assign=True)
    return block.eval().requires_grad_(False)


class Slot:
    """Device memory for one block at a time, with a module for every layout that blocks have.  forms {buffers: meta-built block}"""

    def __init__(self, nbytes, device, forms, backend):
        self.data = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.modules = {buffers: bind(copy.deepcopy(block), self.data, buffers) for buffers, block in forms.items()}
        self.copied, self.consumed = backend.Event(), backend.Event()
        self.holds = None                                            # the block that is here or on its way


class Streamed:
    """A network's blocks, iterated over like the ModuleList they replace. A block is gone once the next is asked for: make no lists.
    One loop at a time; it may end early or fail, the next one starts afresh. `modules` are all that it may yield: what to compile.

    blocks   meta-built modules in order        layouts, entries  of each, from `split`        resident  how many stay on the device
    backend  torch.cuda, or torch.cpu, whose streams and events do nothing: there a copy happens at once
    """

    def __init__(self, blocks, layouts, entries, device, resident, backend=None):
        self.device, self.backend, self.layouts, self.resident = device, backend or torch.get_device_module(device), layouts, {}
        stay = resident_blocks(len(blocks), resident)
        self.order = [i for i in range(len(blocks)) if i not in stay]
        self.host = HostRows([0 if i in stay else nbytes for i, (_, nbytes) in enumerate(layouts)], pin=device.type == "cuda")
        for i, (buffers, nbytes) in enumerate(layouts):
            data = torch.empty(nbytes if i in stay else 0, dtype=torch.uint8, device=device)
            for buffer in buffers:
                x = entries[i][buffer.name].read()
                buffer.view(data).copy_(x) if i in stay else self.host.write(i, buffer, x)
            if i in stay:
                self.resident[i] = bind(blocks[i], data, buffers)
        self.side = self.backend.Stream(device)
        forms, size = {layouts[i][0]: blocks[i] for i in self.order}, max((layouts[i][1] for i in self.order), default=0)
        self.slots = [Slot(size, device, forms, self.backend) for _ in self.order[:2]]
        for slot in self.slots if device.type == "cuda" else ():
            slot.data.record_stream(self.side)                       # once freed, not used by others before the last copy has ended
        self.modules = [*self.resident.values(), *(module for slot in self.slots for module in slot.modules.values())]

    def fetch(self, numbers):
        """Queue the copies of those of the next two streamed blocks that no slot holds, behind whatever still uses the slot."""
        free = [slot for slot in self.slots if slot.holds not in numbers]
        for i in sorted(set(numbers) - {slot.holds for slot in self.slots}):
            slot = free.pop()
            slot.holds = None                                        # if this is interrupted
            with self.backend.stream(self.side):
                self.side.wait_event(slot.consumed)
                self.host.read(i, slot.data[:self.layouts[i][1]])
                slot.copied.record(self.side)
            slot.holds = i

    def __iter__(self):
        compute, coming = self.backend.current_stream(self.device), self.order * 2
        for slot in self.slots:
            slot.consumed.record(compute)                            # behind all that a loop that broke off has queued
        self.fetch(self.order[:2])
        for i, (buffers, _) in enumerate(self.layouts):
            if i in self.resident:
                yield self.resident[i]
                continue
            slot = next(slot for slot in self.slots if slot.holds == i)
            compute.wait_event(slot.copied)
            yield slot.modules[buffers]
            slot.consumed.record(compute)
            self.fetch(coming[coming.index(i) + 1:][:2])


def stream(module, tensors, device, dtype_of, resident=None):
    """Give a meta-built network with `blocks` (Denoiser, TextEncoder) its weights, tensor by tensor; it is changed in place and returned.

    tensors, dtype_of  as in `split`        resident  blocks that stay on the device; None, or a CPU: all, in a plain ModuleList
    """
    device = torch.device(device)
    if device.type != "cpu" and resident is not None and resident < len(module.blocks):
        layouts, entries, tensors = split(tensors, dtype_of)
        blocks = Streamed(list(module.blocks), layouts, entries, device, resident)
        del module.blocks                                            # a registered name takes modules only
        module.blocks = blocks
    state = {name: entry.read().to(device, dtype_of(name, entry)) for name, entry in tensors.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def read_ahead(tensors):
    """Read the files of these tensors once, in a thread beside the work, so that the system has them in memory when they are loaded.

    tensors  {name: Entry}        returns  the thread. posix_fadvise(WILLNEED) does not do this: Linux reads some hundred KB of a file for it
    """
    def read(room=bytearray(2 ** 24)):
        for path in sorted({entry.file for entry in tensors.values()}):
            with suppress(OSError), open(path, "rb", buffering=0) as file:       # who loads it will say what is wrong
                while file.readinto(room):
                    pass
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def all_blocks(net):
    """Every module that computes a block, in a ModuleList or in a stream."""
    return net.blocks.modules if isinstance(net.blocks, Streamed) else net.blocks


class HostLayers:
    """`Cond.layers` in host memory: item i comes to the device when it is asked for, in less than 1% of its block's time."""

    def __init__(self, layers):
        self.kind, self.device = type(layers[0]), layers[0][0].device
        self.layouts = [layout([(name, x.shape, x.dtype) for name, x in layer._asdict().items() if x is not None]) for layer in layers]
        self.host = HostRows([nbytes for _, nbytes in self.layouts], pin=self.device.type == "cuda")
        for i, (buffers, _) in enumerate(self.layouts):
            for buffer in buffers:
                self.host.write(i, buffer, getattr(layers[i], buffer.name))

    def __getitem__(self, i):
        buffers, nbytes = self.layouts[i]
        data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.host.read(i, data)
        return self.kind(**{buffer.name: buffer.view(data) for buffer in buffers})
