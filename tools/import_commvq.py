#!/usr/bin/env python3
"""Turns the codebooks that the authors of CommVQ released into a codebook file of this library.

    tools/import_commvq.py --model MODEL --keys KEYS --values VALUES --out FILE

MODEL   folder of the model that they belong to: config.json and safetensors weights
KEYS    folder of the key codebooks, LLL_G.pt for layer LLL and group G of RoPE pairs
VALUES  folder of safetensors files (or one file) with the tensors *.value_vq_model.*

Without --keys or --values that side of the cache stays exact. Needs NumPy; torch is not needed.
docs/import.md says how the two formats correspond.
"""
import argparse
import json
import pathlib
import re
import sys

import numpy as np

import safetensors_file
import torch_file

# What the authors add to a value's channel scales before dividing by them.
SCALE_EPSILON = 1e-6
VALUE_TENSORS = ("embedding", "norm1.weight", "norm1.bias", "enc1.weight", "enc1.bias",
                 "out.weight", "out.bias", "learnable_scale")


class Error(Exception):
    """Something does not fit; the message says what, where and what was expected."""


def require(condition, message):
    if not condition:
        raise Error(message)


def safetensors_in(path):
    """The safetensors files of a folder, or the file itself."""
    path = pathlib.Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    require(files, f"there is no safetensors file in {path}")
    return [safetensors_file.Reader(file) for file in files]


# The model -----------------------------------------------------------------------------------------


def rope_of(config):
    """The field `rope` of the codebook file, from a Hugging Face configuration."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    require(kind in ("default", "linear", "llama3"),
            f"RoPE type {kind!r} is not supported; known are default, linear and llama3")
    partial = config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))
    rope = {"head_dim": head_dim, "rotary_dim": int(head_dim * partial), "layout": "half_split",
            "theta": float(config.get("rope_theta", scaling.get("rope_theta", 10000.0))),
            "scaling": {"default": "none"}.get(kind, kind), "factor": 1.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position": 8192.0}
    if kind != "default":
        rope["factor"] = float(scaling["factor"])
    if kind == "llama3":
        rope["low_freq_factor"] = float(scaling["low_freq_factor"])
        rope["high_freq_factor"] = float(scaling["high_freq_factor"])
        rope["original_max_position"] = float(scaling["original_max_position_embeddings"])
    return rope


def fnv1a(hash_, data):
    for byte in data:
        hash_ = ((hash_ ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return hash_


def digest_of(text, num_layers, files):
    """The digest by which the example engine names a model: FNV-1a of its configuration and of its
    key and value projections."""
    location = {name: file for file in files for name in file}
    names = ["self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    names += ["self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.k_norm.weight"]
    hash_ = fnv1a(0xCBF29CE484222325, text)
    for layer in range(num_layers):
        for name in (f"model.layers.{layer}.{name}" for name in names):
            require(name in location or not name.endswith("proj.weight"),
                    f"the model has no tensor {name}")
            if name in location:
                hash_ = fnv1a(hash_, location[name].raw(name))
    return f"{hash_:016x}"


# Keys ----------------------------------------------------------------------------------------------


def stage_of(step, where):
    """One stage's book `[Nc][2 g]`, real parts before imaginary ones. Its row z_i is x_i + j y_i with
    x_i in row 2 i and y_i in row 2 i + 1 of `theta` `[2 Nc][g]`; the centre of codes (A, B) is
    z_A + j z_B, stored interleaved in row A Nc + B of `clustering_centers` `[Nc^2][2 g]`."""
    require(isinstance(step, dict) and "theta" in step, f"{where} has no theta")
    theta = np.asarray(step["theta"], "<f4")
    require(theta.ndim == 2 and theta.shape[0] % 2 == 0 and theta.shape[0] >= 4 and theta.shape[1],
            f"{where}: theta has shape {theta.shape}; it must be [2 Nc][g]")
    require(np.isfinite(theta).all(), f"{where}: theta holds NaN or infinity")
    size, pairs = theta.shape[0] // 2, theta.shape[1]
    book = theta.reshape(size, 2 * pairs)
    if "clustering_centers" in step:
        centres = np.asarray(step["clustering_centers"], "<f4")
        require(centres.shape == (size * size, 2 * pairs),
                f"{where}: clustering_centers has shape {centres.shape}; theta asks for "
                f"{(size * size, 2 * pairs)}")
        rows = theta[0::2] + 1j * theta[1::2]
        expected = (rows[:, None] + 1j * rows[None, :]).reshape(size * size, pairs)
        stored = centres[:, 0::2] + 1j * centres[:, 1::2]
        error = np.abs(stored - expected).max()
        require(error <= 1e-3 * np.abs(expected).max(),
                f"{where}: clustering_centers differ from theta's by up to {error}")
    return book


def load_key_layer(folder, layer, num_groups):
    """The books of one layer, `[num_groups][R][Nc][2 g]`."""
    groups = []
    for group in range(num_groups):
        path = pathlib.Path(folder) / f"{layer:03d}_{group}.pt"
        require(path.is_file(), f"there is no {path}; the model needs groups 0 to {num_groups - 1} "
                f"of layer {layer}")
        data = torch_file.load(path)
        require(isinstance(data, dict) and isinstance(data.get("steps"), list) and data["steps"],
                f"{path} has no list of steps")
        stages = [stage_of(step, f"{path}, step {i}") for i, step in enumerate(data["steps"])]
        groups.append(np.stack(stages))
        require(groups[-1].shape == groups[0].shape,
                f"{path} has books of shape {groups[-1].shape}; the group before has "
                f"{groups[0].shape}")
    return np.stack(groups)


def import_keys(folder, layer, num_kv_heads, head_dim):
    """Configuration and tensor of a layer's keys."""
    first = torch_file.load(pathlib.Path(folder) / f"{layer:03d}_0.pt")
    require(isinstance(first, dict) and first.get("steps"), f"{folder}: no steps in layer {layer}")
    pairs = np.asarray(first["steps"][0]["theta"]).shape[-1]
    require(pairs and head_dim // 2 % pairs == 0,
            f"the codebooks group {pairs} pairs; that must divide head_dim / 2 = {head_dim // 2}")
    per_head = head_dim // 2 // pairs
    books = load_key_layer(folder, layer, num_kv_heads * per_head)
    stages, size = books.shape[1:3]
    config = {"group_pairs": pairs, "codebook_size": size, "num_stages": stages, "tied": True,
              "beam_width": 1, "norm_per_head": False}
    return config, books.reshape(num_kv_heads, per_head, stages, 1, size, 2 * pairs)


# Values --------------------------------------------------------------------------------------------


def value_locations(files):
    """Where the tensors of every layer's value codec lie: layer -> tensor -> (file, name)."""
    pattern = re.compile(r"(?:^|\.)layers\.(\d+)\..*value_vq_model\.(.+)$")
    layers = {}
    for file in files:
        for name in file:
            match = pattern.search(name)
            if match:
                layers.setdefault(int(match[1]), {})[match[2]] = (file, name)
    return layers


def import_values(tensors, layer, num_channels):
    """Configuration and tensors of a layer's values."""
    where = f"value_vq_model of layer {layer}"
    missing = [name for name in VALUE_TENSORS if name not in tensors]
    require(not missing, f"{where} has no {', '.join(missing)}")
    loaded = {name: tensors[name][0].floats(tensors[name][1]) for name in VALUE_TENSORS}
    for name, values in loaded.items():
        require(np.isfinite(values).all(), f"{where}: {name} holds NaN or infinity")
    code_bits, hidden = loaded["embedding"].shape[0], loaded["enc1.weight"].shape[0]
    require(code_bits in (num_channels, 2 * num_channels),
            f"{where}: embedding has {code_bits} rows; the model's {num_channels} channels ask for "
            f"{num_channels} at 1 bit or {2 * num_channels} at 2 bits")
    shapes = {"embedding": (code_bits, num_channels), "norm1.weight": (num_channels,),
              "norm1.bias": (num_channels,), "enc1.weight": (hidden, num_channels),
              "enc1.bias": (hidden,), "out.weight": (2 * code_bits, hidden),
              "out.bias": (2 * code_bits,), "learnable_scale": (num_channels,)}
    for name, shape in shapes.items():
        require(loaded[name].shape == shape,
                f"{where}: {name} has shape {loaded[name].shape}; it must be {shape}")
    names = {"norm1.weight": "norm_gain", "norm1.bias": "norm_bias", "enc1.weight": "hidden_weight",
             "enc1.bias": "hidden_bias", "out.weight": "output_weight", "out.bias": "output_bias",
             "embedding": "decoder"}
    result = {ours: loaded[theirs] for theirs, ours in names.items()}
    scales = loaded["learnable_scale"] + np.float32(SCALE_EPSILON)
    require((scales > 0).all(), f"{where}: learnable_scale of channel {scales.argmin()} is "
            f"{scales.min()}; it must be positive")
    if scales.max() > scales.min():  # equal scales cancel
        result["channel_scales"] = scales
        result["decoder"] = result["decoder"] * scales
    config = {"num_channels": num_channels, "bits": code_bits // num_channels,
              "hidden_size": hidden, "polish_sweeps": 0}
    return config, result


# The file ------------------------------------------------------------------------------------------


def import_codecs(model, keys, values, out):
    text = (pathlib.Path(model) / "config.json").read_bytes()
    config = json.loads(text)
    rope, num_layers = rope_of(config), config["num_hidden_layers"]
    num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    locations = value_locations(safetensors_in(values)) if values else {}
    layers, tensors = [], {}
    for layer in range(num_layers):
        entry, prefix = {"keys": None, "values": None}, f"layers.{layer}."
        if keys:
            entry["keys"], tensors[prefix + "keys.codebooks"] = import_keys(
                keys, layer, num_kv_heads, rope["head_dim"])
        if values:
            require(layer in locations, f"{values} has no value_vq_model of layer {layer}; the model "
                    f"has {num_layers} layers")
            entry["values"], weights = import_values(locations[layer], layer,
                                                     num_kv_heads * rope["head_dim"])
            tensors |= {f"{prefix}values.{name}": weight for name, weight in weights.items()}
        layers.append(entry)
    description = {"rope": rope, "num_kv_heads": num_kv_heads, "layers": layers,
                   "model_digest": digest_of(text, num_layers, safetensors_in(model)),
                   "provenance": "import_commvq, codebooks released by the authors of CommVQ"}
    safetensors_file.write(out, tensors, {"format": "commvq.codecs", "version": "1",
                                          "config": json.dumps(description)})
    print(f"{out}: {num_layers} layers")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder of the model they belong to")
    parser.add_argument("--keys", help="folder of key codebooks, LLL_G.pt")
    parser.add_argument("--values", help="safetensors file or folder with *.value_vq_model.*")
    parser.add_argument("--out", required=True, help="codebook file to write")
    options = parser.parse_args()
    try:
        require(options.keys or options.values, "give --keys, --values or both")
        import_codecs(options.model, options.keys, options.values, options.out)
    except (Error, torch_file.Error, safetensors_file.Error, OSError) as error:
        sys.exit(f"error: {error}")
    except (KeyError, ValueError) as error:
        sys.exit(f"error: config.json of {options.model} cannot be read: {error!r}")


if __name__ == "__main__":
    main()
