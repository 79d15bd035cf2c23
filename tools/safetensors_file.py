"""Reads and writes safetensors files with NumPy."""
import json
import os
import struct

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
MOST_HEADER_BYTES = 100_000_000


class Error(Exception):
    """A file is not what it should be; the message says what and where."""


class Reader:
    """The tensors of one file by name."""

    def __init__(self, path):
        self.path = path
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
                raise Error(f"{path} is no safetensors file: its header has {length} bytes of {size}")
            try:
                self.header = json.loads(file.read(length))
            except ValueError as error:
                raise Error(f"{path}: the header is no JSON: {error}") from None
        self.header.pop("__metadata__", None)
        self._data_begin, self._data_size = 8 + length, size - 8 - length

    def __iter__(self):
        return iter(self.header)

    def raw(self, name):
        """The bytes of a tensor."""
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= self._data_size:
            raise Error(f"{self.path}: {name} lies at bytes {begin} to {end} of {self._data_size}")
        with open(self.path, "rb") as file:
            file.seek(self._data_begin + begin)
            return file.read(end - begin)

    def floats(self, name):
        """A tensor as float32."""
        entry = self.header[name]
        if entry["dtype"] not in DTYPES:
            raise Error(f"{self.path}: {name} holds {entry['dtype']}; it must hold one of "
                        f"{', '.join(DTYPES)}")
        values = np.frombuffer(self.raw(name), DTYPES[entry["dtype"]])
        if values.size != np.prod(entry["shape"], dtype=np.int64):
            raise Error(f"{self.path}: {name} has {values.size} elements; its shape is "
                        f"{entry['shape']}")
        if entry["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype("<f4").reshape(entry["shape"])


def write(path, tensors, metadata):
    """Writes float32 tensors by name, and a dictionary of strings."""
    header, offset = {"__metadata__": metadata}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape),
                        "data_offsets": [offset, offset + 4 * values.size]}
        offset += 4 * values.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
    os.replace(partial, path)
