#!/usr/bin/env python3
"""Draws docs/memory.png: bytes of the cache against context length, from what the example cache_memory
prints (the library's bytes_per_token() and its exact window).

    docs/plot_memory.py build/examples/cache_memory

Needs matplotlib (bench/quality/requirements.txt).
"""
import json
import pathlib
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {"exact": "exact, 16 bits", "commvq_2bit": "commvq_2bit", "commvq_1bit": "commvq_1bit"}
CONTEXTS = [2**power for power in range(10, 21)]
GIB = 2**30


def main():
    rows = json.loads(subprocess.run([sys.argv[1], "--json"], check=True,
                                     stdout=subprocess.PIPE).stdout)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=120)
    for row in rows:
        if row["cache"] not in NAMES:
            continue
        sizes = [(row["bytes_per_token"] * tokens + row["window_bytes"]) / GIB
                 for tokens in CONTEXTS]
        axes.plot(CONTEXTS, sizes, marker="o", markersize=3, label=NAMES[row["cache"]])
        axes.annotate(f"{sizes[-1]:.1f} GiB", (CONTEXTS[-1], sizes[-1]), xytext=(-4, 5),
                      textcoords="offset points", ha="right", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GiB",
             title="Cache of Llama-3.1-8B's shape (32 layers, 8 KV heads of 128)")
    axes.set_xticks(CONTEXTS[::2], [f"{tokens // 1024}Ki" for tokens in CONTEXTS[::2]])
    axes.minorticks_off()
    axes.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(pathlib.Path(__file__).resolve().parent / "memory.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
