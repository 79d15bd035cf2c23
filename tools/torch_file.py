"""Reads tensors from files that `torch.save` wrote, without torch.

Such a file is a zip archive of one pickle and the bytes of the tensors. A pickle may call any function
that it names; this reader knows the few that tensors need and refuses every other.
"""
import collections
import pickle
import zipfile

import numpy as np

# Storage classes by name: little-endian element types; bfloat16 is widened after reading.
STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2",
            "BFloat16Storage": "<u2", "LongStorage": "<i8", "IntStorage": "<i4"}


class Error(Exception):
    """A file is not what it should be; the message says what and where."""


class _Storage:
    def __init__(self, name):
        self.name = name


def _strided(storage, offset, shape, strides):
    """The tensor of this shape and these strides, in elements, within a flat storage."""
    if any(size < 0 for size in shape) or any(stride < 0 for stride in strides):
        raise Error(f"a tensor has shape {shape} and strides {strides}")
    if len(shape) != len(strides) or offset < 0:
        raise Error(f"a tensor has shape {shape}, strides {strides} and offset {offset}")
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if last >= storage.size:
        raise Error(f"a tensor of shape {shape} needs {last + 1} elements; its storage has "
                    f"{storage.size}")
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [stride * storage.itemsize for stride in strides])
    return view.copy()


def _rebuild_tensor(storage, offset, shape, strides, *_unused):
    return _strided(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_unused):
    return data


class _Unpickler(pickle.Unpickler):
    KNOWN = {("collections", "OrderedDict"): collections.OrderedDict,
             ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
             ("torch._utils", "_rebuild_parameter"): _rebuild_parameter}

    def __init__(self, file, archive, root):
        super().__init__(file)
        self._archive, self._root, self._storages = archive, root, {}

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return _Storage(name)
        if (module, name) not in self.KNOWN:
            raise Error(f"the pickle names {module}.{name}; only tensors, lists, dictionaries, "
                        "numbers and strings are read")
        return self.KNOWN[module, name]

    def persistent_load(self, reference):
        kind, storage, key = reference[:3]
        if kind != "storage" or not isinstance(storage, _Storage):
            raise Error(f"the pickle refers to {reference!r}, which is no tensor's storage")
        if key not in self._storages:
            values = np.frombuffer(self._archive.read(f"{self._root}data/{key}"),
                                   STORAGES[storage.name])
            if storage.name == "BFloat16Storage":
                values = (values.astype("<u4") << 16).view("<f4")
            self._storages[key] = values
        return self._storages[key]


def load(path):
    """What was saved, with NumPy arrays in place of tensors. Raises `Error` for anything else than a
    zip of one pickle, for pickles that name other functions and for tensors beyond their storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise Error(f"it holds {len(pickles)} files data.pkl; it must hold one")
            root = pickles[0][: -len("data.pkl")]
            byte_order = f"{root}byteorder"
            if byte_order in archive.namelist() and archive.read(byte_order) != b"little":
                raise Error(f"its byte order is {archive.read(byte_order)}; only little is read")
            with archive.open(pickles[0]) as file:
                return _Unpickler(file, archive, root).load()
    except Error as error:
        raise Error(f"{path}: {error}") from None
    except zipfile.BadZipFile:
        raise Error(f"{path} is no zip archive: save it anew with torch 1.6 or later") from None
    except (pickle.UnpicklingError, KeyError, EOFError, TypeError, ValueError, AttributeError,
            IndexError, OSError) as error:
        raise Error(f"{path} cannot be read: {error!r}") from None
