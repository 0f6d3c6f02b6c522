"""Tensors as bytes in the safetensors format, and back without a copy."""

import json
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch

# PyTorch has no tensor that cannot be written to, and says so. Filters are the process's, and not to be set in threads.
warnings.filterwarnings("ignore", "The given buffer is not writable")
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}


def encode(tensors: dict[str, torch.Tensor]) -> bytes:
    """Tensors as a file in the safetensors format, with one copy of the data where the library makes three."""
    arrays = {name: _bytes_of(tensor) for name, tensor in tensors.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        offsets, end = [end, end + arrays[name].nbytes], end + arrays[name].nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.data for array in arrays.values())])


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    dense = tensor.cpu().contiguous()
    # A dimension of one may have any stride, and as the last one none that can be viewed as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()


def decode(data: bytes | memoryview) -> dict[str, torch.Tensor]:
    """Tensors of a file that `encode` made: views of `data`, not to be written to."""
    start = 8 + int.from_bytes(data[:8], "little")
    types = {name: dtype for dtype, name in NAMES.items()}
    return {
        name: _view(data, types[facts["dtype"]], facts["shape"], start + facts["data_offsets"][0])
        for name, facts in json.loads(bytes(data[8:start])).items()
    }


def _view(data: bytes | memoryview, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
    count = math.prod(shape)
    # PyTorch makes no view of nothing.
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
