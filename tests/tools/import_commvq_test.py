#!/usr/bin/env python3
"""Tests tools/import_commvq.py on a small release that torch wrote (tests/data/make_commvq_release.py)
and on files that it must refuse. That the result decodes as the formulas say is engine_imported_codecs_test.

import_commvq_test.py [FILE]: also leaves the imported codebook file there.
"""
import collections
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import types
import unittest
import zipfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "tools"))
import safetensors_file  # noqa: E402
import torch_file  # noqa: E402

TOOL = ROOT / "tools/import_commvq.py"
MODEL = ROOT / "tests/data/checkpoints/llama3"
RELEASE = ROOT / "tests/data/commvq_release"


def run(*arguments):
    """Exit status and what the tool says."""
    result = subprocess.run([sys.executable, "-B", TOOL, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, result.stdout


# Writing .pt files as torch does, for contents that torch would not write. ---------------------------

FAKE_TORCH, FAKE_UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")


def _rebuild_tensor_v2(*_unused):
    """What a pickled tensor calls."""


_rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
FAKE_UTILS._rebuild_tensor_v2 = _rebuild_tensor_v2
for storage_name in torch_file.STORAGES:
    setattr(FAKE_TORCH, storage_name, type(storage_name, (), {"__module__": "torch"}))


class Storage:
    def __init__(self, kind, array):
        self.kind, self.array = kind, array


class Tensor:
    """A tensor of a storage: shape, strides and offset in elements."""

    def __init__(self, storage, shape, strides, offset=0):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


def floats(array):
    array = np.ascontiguousarray(array, "<f4")
    strides = tuple(stride // 4 for stride in array.strides)
    return Tensor(Storage("FloatStorage", array.reshape(-1)), array.shape, strides)


def write_pt(path, contents):
    storages = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, Storage):
                return None
            if thing not in storages:
                storages.append(thing)
            return ("storage", getattr(FAKE_TORCH, thing.kind), str(storages.index(thing)), "cuda:0",
                    thing.array.size)

    buffer = io.BytesIO()
    sys.modules["torch"], sys.modules["torch._utils"] = FAKE_TORCH, FAKE_UTILS
    try:
        Pickler(buffer, 2).dump(contents)
    finally:
        del sys.modules["torch"], sys.modules["torch._utils"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for i, storage in enumerate(storages):
            archive.writestr(f"archive/data/{i}", storage.array.tobytes())


class Malicious:
    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


class TorchFileTest(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = self.folder / "file.pt"

    def load(self, contents):
        write_pt(self.path, contents)
        return torch_file.load(self.path)

    def refused(self, contents, words):
        with self.assertRaises(torch_file.Error) as caught:
            self.load(contents)
        self.assertIn(words, str(caught.exception))
        self.assertIn("file.pt", str(caught.exception))

    def test_types_shapes_and_strides(self):
        base = np.arange(12, dtype="<f4")
        storage = Storage("FloatStorage", base)
        halves = np.array([1.5, -2.0], "<f2")
        brains = (np.array([1.5, -2.0], "<f4").view("<u4") >> 16).astype("<u2")
        loaded = self.load({"whole": Tensor(storage, (3, 4), (4, 1)),
                            "turned": Tensor(storage, (4, 3), (1, 4)),
                            "part": Tensor(storage, (2,), (3,), 5),
                            "number": Tensor(storage, (), (), 7),
                            "none": Tensor(storage, (0, 4), (4, 1)),
                            "half": Tensor(Storage("HalfStorage", halves), (2,), (1,)),
                            "brain": Tensor(Storage("BFloat16Storage", brains), (2,), (1,)),
                            "list": [1, 2.5, "text", None]})
        np.testing.assert_array_equal(loaded["whole"], base.reshape(3, 4))
        np.testing.assert_array_equal(loaded["turned"], base.reshape(3, 4).T)
        np.testing.assert_array_equal(loaded["part"], [5, 8])
        self.assertEqual(float(loaded["number"]), 7)
        self.assertEqual(loaded["none"].shape, (0, 4))
        np.testing.assert_array_equal(loaded["half"], halves)
        np.testing.assert_array_equal(loaded["brain"], [1.5, -2.0])
        self.assertEqual(loaded["list"], [1, 2.5, "text", None])

    def test_other_functions_are_refused_and_not_called(self):
        witness = self.folder / "called"
        for function, argument in ((os.mkdir, str(witness)), (exec, f"open({str(witness)!r}, 'w')")):
            self.refused({"theta": Malicious(function, argument)}, "the pickle names")
        self.assertFalse(witness.exists())
        self.refused({"module": unittest.TestCase}, "unittest.case.TestCase")

    def test_tensors_beyond_their_storage_are_refused(self):
        storage = Storage("FloatStorage", np.zeros(12, "<f4"))
        self.refused(Tensor(storage, (3, 4), (4, 2)), "needs 15 elements")
        self.refused(Tensor(storage, (3, 4), (4, 1), 1), "needs 13 elements")
        self.refused(Tensor(storage, (3, 4), (4, -1)), "strides (4, -1)")
        self.refused(Tensor(storage, (3,), (4, 1)), "strides (4, 1)")

    def test_other_files_are_refused(self):
        whole = (RELEASE / "keys/000_0.pt").read_bytes()
        self.assertIn("steps", torch_file.load(RELEASE / "keys/000_0.pt"))
        for contents, words in ((b"", "no zip"), (b"\x80\x02}q\x00.", "no zip"),
                                (whole[: len(whole) // 2], "no zip")):
            self.path.write_bytes(contents)
            with self.assertRaisesRegex(torch_file.Error, words):
                torch_file.load(self.path)
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.writestr("archive/other", b"")
        with self.assertRaisesRegex(torch_file.Error, "0 files data.pkl"):
            torch_file.load(self.path)
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02\x8a\xff")
        with self.assertRaisesRegex(torch_file.Error, "cannot be read"):
            torch_file.load(self.path)


class ImportTest(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.out = self.folder / "out.safetensors"
        shutil.copytree(RELEASE, self.folder / "release")
        shutil.copytree(MODEL, self.folder / "model")

    def import_all(self, *arguments):
        return run("--model", self.folder / "model", "--keys", self.folder / "release/keys",
                   "--values", self.folder / "release/values.safetensors", "--out", self.out,
                   *arguments)

    def refused(self, words):
        status, text = self.import_all()
        self.assertEqual(status, 1, text)
        self.assertIn(words, text)
        self.assertNotIn("Traceback", text)
        self.assertFalse(self.out.exists())

    def config_of(self, path):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        return json.loads(json.loads(path.read_bytes()[8:8 + length])["__metadata__"]["config"])

    def change_values(self, change):
        """Rewrites the value weights after a change to their dictionary."""
        path = self.folder / "release/values.safetensors"
        reader = safetensors_file.Reader(path)
        tensors = {name: reader.floats(name) for name in reader}
        change(tensors)
        safetensors_file.write(path, tensors, {})

    def test_imports_both_sides(self):
        status, text = self.import_all()
        self.assertEqual(status, 0, text)
        config = self.config_of(self.out)
        self.assertEqual(config["num_kv_heads"], 2)
        self.assertEqual(config["rope"]["scaling"], "llama3")
        self.assertEqual(config["layers"][0]["keys"],
                         {"group_pairs": 8, "codebook_size": 8, "num_stages": 3, "tied": True,
                          "beam_width": 1, "norm_per_head": False})
        self.assertEqual(config["layers"][1]["values"],
                         {"num_channels": 32, "bits": 1, "hidden_size": 24, "polish_sweeps": 0})
        tensors = safetensors_file.Reader(self.out)
        self.assertEqual(tensors.header["layers.1.keys.codebooks"]["shape"], [2, 1, 3, 1, 8, 16])
        self.assertIn("layers.0.values.channel_scales", tensors.header)
        self.assertNotIn("layers.1.values.channel_scales", tensors.header)
        if len(FILES) > 0:
            shutil.copy(self.out, FILES[0])

    def test_either_side_may_be_left_out(self):
        model, keys = self.folder / "model", self.folder / "release/keys"
        self.assertEqual(run("--model", model, "--keys", keys, "--out", self.out)[0], 0)
        self.assertIsNone(self.config_of(self.out)["layers"][0]["values"])
        values = self.folder / "release"  # a folder of safetensors files
        (values / "expected.safetensors").unlink()
        self.assertEqual(run("--model", model, "--values", values, "--out", self.out)[0], 0)
        self.assertIsNone(self.config_of(self.out)["layers"][0]["keys"])
        status, text = run("--model", model, "--out", self.out)
        self.assertEqual((status, text), (1, "error: give --keys, --values or both\n"))

    def test_keys_are_checked(self):
        path = self.folder / "release/keys/001_1.pt"
        steps = torch_file.load(path)["steps"]

        def rewrite(change):
            edited = [{name: np.array(value) for name, value in step.items()} for step in steps]
            change(edited)
            write_pt(path, {"steps": [{name: floats(value) for name, value in step.items()}
                                      for step in edited]})

        rewrite(lambda s: None)
        self.assertEqual(self.import_all()[0], 0)
        self.out.unlink()
        rewrite(lambda s: s[2]["clustering_centers"].__iadd__(0.1))
        self.refused("clustering_centers differ from theta's")
        rewrite(lambda s: s[0]["theta"].__setitem__((0, 0), np.nan))
        self.refused("theta holds NaN")
        rewrite(lambda s: s[0].update(theta=s[0]["theta"][:5]))
        self.refused("theta has shape (5, 8)")
        rewrite(lambda s: s.pop())
        self.refused("001_1.pt has books of shape (2, 8, 16)")
        rewrite(lambda s: s[1].pop("theta"))
        self.refused("step 1 has no theta")
        write_pt(path, {"steps": Malicious(os.system, "true")})
        self.refused("001_1.pt: the pickle names posix.system")
        path.unlink()
        self.refused("001_1.pt; the model needs groups 0 to 1 of layer 1")

    def test_values_are_checked(self):
        prefix = "model.layers.1.self_attn.value_vq_model."
        self.change_values(lambda t: t.pop(prefix + "enc1.bias"))
        self.refused("layer 1 has no enc1.bias")
        self.change_values(lambda t: t.update({prefix + "enc1.bias": np.zeros(23, "<f4")}))
        self.refused("enc1.bias has shape (23,)")
        self.change_values(lambda t: t.update({prefix + "enc1.bias": np.full(24, np.inf, "<f4")}))
        self.refused("enc1.bias holds NaN or infinity")
        self.change_values(lambda t: t.update({prefix + "enc1.bias": np.zeros(24, "<f4"),
                                               prefix + "embedding": np.zeros((48, 32), "<f4")}))
        self.refused("embedding has 48 rows")
        self.change_values(lambda t: t.update({
            prefix + "embedding": np.ones((32, 32), "<f4"),
            prefix + "learnable_scale": np.linspace(-1, 1, 32, dtype="<f4")}))
        self.refused("learnable_scale of channel 0 is -0.9")
        self.change_values(lambda t: [t.pop(name) for name in list(t) if "layers.1." in name])
        self.refused("no value_vq_model of layer 1")
        (self.folder / "release/values.safetensors").write_bytes(b"short")
        self.refused("no safetensors file")

    def test_the_model_is_checked(self):
        path = self.folder / "model/config.json"
        config = json.loads(path.read_text())
        config["rope_scaling"]["rope_type"] = "yarn"
        path.write_text(json.dumps(config))
        self.refused("'yarn' is not supported")
        config["rope_scaling"] = None
        config["head_dim"] = 24
        path.write_text(json.dumps(config))
        self.refused("that must divide head_dim / 2 = 12")
        config.pop("num_hidden_layers")
        path.write_text(json.dumps(config))
        self.refused("config.json of")


if __name__ == "__main__":
    FILES = sys.argv[1:]
    unittest.main(argv=sys.argv[:1])
