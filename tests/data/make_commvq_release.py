#!/usr/bin/env python3
"""Writes tests/data/commvq_release: random codebooks in the layout that the authors of CommVQ
released, for the tiny checkpoint llama3 of tests/data/checkpoints, with torch itself.

    pip install torch==2.7.1 safetensors
    tests/data/make_commvq_release.py

keys/LLL_G.pt        key codebooks of layer LLL and head G
values.safetensors   value_vq_model of every layer, BF16
expected.safetensors what the formulas of the paper make of random keys and values, per layer N:
                     keys.N, values.N [T][C] in FP32; key_codes.N [T][heads][R][2] I64,
                     decoded_keys.N [T][C]; value_bits.N [T][C] I64, decoded_values.N [T][C]
"""
import pathlib
import shutil

import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).resolve().parent / "commvq_release"
LAYERS, HEADS, HEAD_DIM, STAGES, SIZE, TOKENS, HIDDEN = 2, 2, 16, 3, 8, 24, 24
CHANNELS = HEADS * HEAD_DIM


def bf16(x):
    return x.bfloat16().float()


def key_books():
    """[heads][stages][SIZE] rows of HEAD_DIM / 2 complex numbers; stages shrink."""
    sizes = 0.4 * 0.6 ** torch.arange(STAGES) / CHANNELS ** 0.5
    shape = (HEADS, STAGES, SIZE, HEAD_DIM // 2)
    return torch.complex(torch.randn(shape), torch.randn(shape)) * sizes[:, None, None]


def centres_of(book):
    """z_A + j z_B for all A and B: [SIZE][SIZE][pairs]."""
    return book[:, None] + 1j * book[None, :]


def save_keys(books, layer):
    for head in range(HEADS):
        steps = []
        for book in books[head]:
            theta = torch.stack([book.real, book.imag], dim=1).flatten(0, 1)
            centres = torch.view_as_real(centres_of(book)).flatten(2).flatten(0, 1)
            steps.append({"mse_loss": torch.tensor(0.5), "theta": theta.contiguous(),
                          "clustering_centers": centres.contiguous()})
        torch.save({"final_error": 0.25, "steps": steps}, FOLDER / f"keys/{layer:03d}_{head}.pt")


def code_keys(books, keys):
    """Greedy codes [T][heads][stages][2] and decoded keys [T][C]."""
    norms = bf16(keys.norm(dim=1, keepdim=True))
    heads = (keys / norms).reshape(TOKENS, HEADS, 2, HEAD_DIM // 2)
    residual = torch.complex(heads[:, :, 0], heads[:, :, 1])
    codes, decoded = [], torch.zeros_like(residual)
    for stage in range(STAGES):
        chosen = []
        for head in range(HEADS):
            centres = centres_of(books[head, stage]).flatten(0, 1)
            best = (residual[:, head, None] - centres).abs().square().sum(-1).argmin(1)
            residual[:, head] -= centres[best]
            decoded[:, head] += centres[best]
            chosen.append(torch.stack([best // SIZE, best % SIZE], dim=1))
        codes.append(torch.stack(chosen, dim=1))
    planar = torch.stack([decoded.real, decoded.imag], dim=2).reshape(TOKENS, CHANNELS)
    return torch.stack(codes, dim=2), planar * norms


def value_model():
    """Named like the released weights."""
    model = torch.nn.ModuleDict({"norm1": torch.nn.LayerNorm(CHANNELS),
                                 "enc1": torch.nn.Linear(CHANNELS, HIDDEN),
                                 "out": torch.nn.Linear(HIDDEN, 2 * CHANNELS)})
    torch.nn.init.normal_(model["norm1"].weight, 1, 0.2)
    torch.nn.init.normal_(model["norm1"].bias, 0, 0.2)
    for name in ("enc1", "out"):
        torch.nn.init.normal_(model[name].weight, 0, model[name].in_features ** -0.5)
    weights = dict(model.state_dict()) | {
        "embedding": torch.randn(CHANNELS, CHANNELS),
        "learnable_scale": 0.1 + torch.rand(CHANNELS)}
    return {name: weight.bfloat16() for name, weight in weights.items()}


def code_values(weights, values):
    """Bits [T][C] and decoded values [T][C]."""
    w = {name: weight.float() for name, weight in weights.items()}
    scale = w["learnable_scale"] + 1e-6
    scaled = values / scale
    unit = scaled / scaled.norm(dim=1, keepdim=True)
    normed = torch.nn.functional.layer_norm(unit, (CHANNELS,), w["norm1.weight"], w["norm1.bias"])
    hidden = torch.nn.functional.gelu(normed @ w["enc1.weight"].T + w["enc1.bias"])
    logits = (hidden @ w["out.weight"].T + w["out.bias"]).reshape(TOKENS, -1, 4)
    patterns = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    bits = patterns[logits.argmax(-1)].reshape(TOKENS, CHANNELS)
    sums = bits.float() @ w["embedding"]
    return bits, bf16(scaled.norm(dim=1, keepdim=True) / sums.norm(dim=1, keepdim=True)) * sums * scale


def main():
    torch.manual_seed(7)
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "keys").mkdir(parents=True)
    values_file, expected = {"model.norm.weight": torch.ones(16).bfloat16()}, {}
    for layer in range(LAYERS):
        books, weights = key_books(), value_model()
        keys, values = 3 * torch.randn(TOKENS, CHANNELS), 2 * torch.randn(TOKENS, CHANNELS)
        if layer == 1:  # equal scales cancel
            weights["learnable_scale"] = torch.full((CHANNELS,), 0.5).bfloat16()
        save_keys(books, layer)
        prefix = f"model.layers.{layer}.self_attn.value_vq_model."
        values_file |= {prefix + name: weight for name, weight in weights.items()}
        codes, decoded_keys = code_keys(books, keys)
        bits, decoded_values = code_values(weights, values)
        for name, tensor in {"keys": keys, "values": values, "key_codes": codes,
                             "decoded_keys": decoded_keys, "value_bits": bits,
                             "decoded_values": decoded_values}.items():
            expected[f"{name}.{layer}"] = tensor.contiguous()
    save_file(values_file, FOLDER / "values.safetensors")
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
