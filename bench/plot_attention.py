#!/usr/bin/env python3
"""Draws bench/attention.png: time of a decoding step of one layer against context length, from what
compare_attention.py wrote.

    bench/plot_attention.py bench/attention.json

Needs matplotlib (bench/quality/requirements.txt).
"""
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {"cudnn": "PyTorch cuDNN, bf16", "flash": "PyTorch flash, bf16"}


def main():
    result = json.loads(pathlib.Path(sys.argv[1]).read_text())
    cases = [case for case in result["cases"] if case["batch"] == 1]
    tokens = [case["tokens"] for case in cases]
    names = [name for name in cases[0]
             if name not in ("batch", "tokens") and not name.endswith("_ratio")]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=120)
    for name in names:
        axes.plot(tokens, [case[name] for case in cases], marker="o", markersize=3,
                  linestyle="--" if name in LABELS else "-", label=LABELS.get(name, name))
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="microseconds",
             title=f"Decode attention of one layer, {result['device']}")
    axes.set_xticks(tokens, [f"{count // 1024}Ki" for count in tokens])
    axes.set_yticks([20, 50, 100, 200, 300], ["20", "50", "100", "200", "300"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(pathlib.Path(__file__).resolve().parent / "attention.png",
                   metadata={"Software": None})


if __name__ == "__main__":
    main()
