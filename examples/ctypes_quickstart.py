#!/usr/bin/env python3
"""Compresses NumPy arrays with learnt codebooks and attends over the codes, through ctypes.

ctypes_quickstart.py LIBCOMMVQ.SO CODEBOOKS
"""
import ctypes as c
import sys

import numpy as np


class Matrix(c.Structure):  # commvq_matrix and commvq_const_matrix
    _fields_ = [("data", c.c_void_p), ("rows", c.c_int64), ("cols", c.c_int64),
                ("row_stride", c.c_int64)]

    @classmethod
    def of(cls, array):
        """Views a two-dimensional float32 array, which must outlive the view."""
        if array.dtype != np.float32 or array.ndim != 2 or array.strides[1] != 4:
            raise ValueError(f"need rows of contiguous float32, not {array.dtype} of shape "
                             f"{array.shape} and strides {array.strides}")
        return cls(array.ctypes.data, *array.shape, array.strides[0] // 4)


class Model(c.Structure):
    _fields_ = ([("struct_size", c.c_size_t)]
                + [(name, c.c_int32) for name in ("num_layers", "num_kv_heads", "head_dim",
                                                  "rotary_dim", "rope_layout", "rope_scaling")]
                + [(name, c.c_double) for name in ("theta", "factor", "low_freq_factor",
                                                   "high_freq_factor", "original_max_position")]
                + [("digest", c.c_char_p)])


class CacheOptions(c.Structure):
    _fields_ = ([("struct_size", c.c_size_t)]
                + [(name, c.c_int64) for name in ("window", "sinks", "page_size")]
                + [(name, c.c_int32) for name in ("exact_type", "exact_keys", "exact_values",
                                                  "reserved")])


class Library:
    """The functions of c_api.h, whose failures become exceptions."""

    def __init__(self, path):
        self._library = c.CDLL(path)
        self._library.commvq_last_error.restype = c.c_char_p

    def __getattr__(self, name):
        function = getattr(self._library, "commvq_" + name)

        def checked(*arguments):
            if function(*arguments) != 0:
                raise RuntimeError(self._library.commvq_last_error().decode())

        return checked


def waves(rng, count, cols):
    """Stand-ins for what a model computes: random combinations of a few waves."""
    basis = np.sin(np.outer(np.arange(1, 9), np.arange(1, cols + 1)))
    return (rng.uniform(0, 1, (count, 8)) @ basis).astype(np.float32)


def main(library_path, codebooks):
    commvq = Library(library_path)
    codecs = c.c_void_p()
    commvq.codecs_load(codebooks.encode(), c.byref(codecs))
    model = Model(struct_size=c.sizeof(Model))
    commvq.codecs_describe(codecs, c.byref(model))

    rng = np.random.default_rng(1)
    channels = model.num_kv_heads * model.head_dim
    keys, values = waves(rng, 400, channels), waves(rng, 400, channels)
    query = waves(rng, 1, 4 * channels)  # four query heads to a KV head, before RoPE
    outputs, sizes = [], []
    for exact in (0, 1):
        options = CacheOptions()
        commvq.cache_options_init(c.byref(options), c.c_size_t(c.sizeof(options)))
        options.exact_keys = options.exact_values = exact
        cache, size, output = c.c_void_p(), c.c_double(), np.empty_like(query)
        commvq.cache_create(codecs, c.byref(options), c.byref(cache))
        commvq.cache_append(cache, 0, c.byref(Matrix.of(keys)), c.byref(Matrix.of(values)))
        commvq.cache_attend(cache, 0, c.byref(Matrix.of(query)), None, c.byref(Matrix.of(output)),
                            None)
        commvq.cache_bytes_per_token(cache, c.byref(size))
        commvq._library.commvq_cache_destroy(cache)
        outputs.append(output)
        sizes.append(size.value)
    commvq._library.commvq_codecs_destroy(codecs)

    error = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1])
    print(f"{sizes[0]:.1f} bytes a token instead of {sizes[1]:.1f}; "
          f"relative error of attention {error:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
