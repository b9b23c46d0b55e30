"""GGUF files -> tensors. A quantised tensor is multiplied out to bfloat16 when it is read; float tensors stay as they are.

The denoiser has its official names in them, perhaps behind model.diffusion_model., umT5 has llama.cpp's (names.py). The optional package
`gguf` reads the file and knows the quantisations: Q2_K to Q8_0, IQ4 and more.

Source  the GGUF specification; ComfyUI's comfy.gguf.orig_shape.X, the shape of a tensor that was stored in rows of 256
"""
import math
from functools import partial

import numpy as np
import torch

from formats.checkpoints import Entry

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_gguf(path):
    return path.is_file() and path.open("rb").read(4) == b"GGUF"


def open_gguf(path):
    """{name: Entry} of one GGUF file, mapped into memory.

    raises  ValueError if the package gguf is missing, for a damaged file, or for a quantisation that gguf cannot multiply out
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError(f"{path} is a GGUF file, which the package gguf reads: pip install gguf, or take the safetensors file") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:                                  # behind the end: a list of 2^60 nothings would be read
                raise ValueError("it ends early")
            return values
    try:
        reader = Reader(path)
        tensors = {tensor.name: (tensor, stored_shape(reader, tensor)) for tensor in reader.tensors}
    except (ValueError, LookupError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}): copy or download it again") from None
    if not tensors:
        raise ValueError(f"{path} is a GGUF file without tensors: download it again")
    kinds = {tensor.tensor_type: tensor for tensor, _ in tensors.values()}
    for kind, tensor in kinds.items():
        try:
            gguf.quants.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise ValueError(f"{path}: {tensor.name} is stored as {kind.name}, which gguf cannot multiply out: take Q8_0 or Q4_K_M") from None
    return {name: Entry(path, shape, FLOATS.get(tensor.tensor_type.name, torch.bfloat16), partial(read, gguf.quants.dequantize, tensor, shape))
            for name, (tensor, shape) in tensors.items()}


def stored_shape(reader, tensor):
    """The shape of a tensor, which GGUF counts from the innermost axis and ComfyUI keeps apart where it had to store another."""
    field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    shape = tuple(int(n) for n in (tensor.shape[::-1] if field is None else field.contents()))
    if math.prod(shape) != math.prod(int(n) for n in tensor.shape):
        raise ValueError(f"{tensor.name} has shape {shape} of another size than it")
    return shape


def read(dequantize, tensor, shape, rows=4096):
    """One tensor in the dtype of its Entry, some rows at a time: in float32 umT5's embedding would take 4 GB."""
    dtype = FLOATS.get(tensor.tensor_type.name, torch.bfloat16)
    pieces = np.array_split(tensor.data, max(1, len(tensor.data) // rows))
    return torch.cat([torch.from_numpy(np.array(dequantize(piece, tensor.tensor_type))).to(dtype) for piece in pieces]).reshape(shape)
