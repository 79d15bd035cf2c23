#!/usr/bin/env python3
"""Times PyTorch's bf16 decode attention and commvq's in one go, on the same card.

Usage: bench/compare_attention.py BENCH_BINARY [--preset NAME ...]

Both sides replay a CUDA graph of several calls over rotated caches and report the median. Prints a
table, then one line of JSON with every time and ratio (PyTorch's faster backend over commvq).
"""
import argparse
import json
import pathlib
import statistics
import subprocess

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [(1, 8192), (1, 32768), (1, 131072), (16, 32768)]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CALLS, REPLAYS = 10, 25


def time_torch(backend, batch, tokens):
    """Median microseconds of one call."""
    cache_bytes = batch * tokens * KV_HEADS * HEAD_DIM * 4
    caches = max(2, -(-256 * 2**20 // cache_bytes))
    q = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    kv = [
        [torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
         for _ in range(2)]
        for _ in range(caches)
    ]

    def call(i):
        k, v = kv[i % caches]
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with sdpa_kernel(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(3):
                call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(CALLS):
                call(i)
    times = []
    for i in range(REPLAYS + 3):
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(stop) * 1000 / CALLS)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", help="decode_attention_cuda_bench")
    parser.add_argument("--preset", nargs="*",
                        default=["speed_1bit", "speed_2bit", "paper_1bit", "paper_2bit",
                                 "commvq_1bit", "commvq_2bit"])
    parser.add_argument("--json", help="also write the result to this file, for plot_attention.py")
    arguments = parser.parse_args()
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": []}
    for batch, tokens in CASES:
        case = {"batch": batch, "tokens": tokens}
        for name, backend in BACKENDS.items():
            try:
                case[name] = time_torch(backend, batch, tokens)
            except RuntimeError as error:
                print(f"{name}, batch {batch} x {tokens}: {error}")
            torch.cuda.empty_cache()
        best = min(case[name] for name in BACKENDS if name in case)
        for preset in arguments.preset:
            run = subprocess.run([arguments.binary, preset, str(batch), str(tokens)], check=True,
                                 capture_output=True, text=True)
            time = json.loads(run.stdout)["microseconds"]
            case[preset] = time
            case[preset + "_ratio"] = best / time
        result["cases"].append(case)
        print(f"{batch:3d} x {tokens:7d}  "
              + "  ".join(f"{key} {value:.1f}" if not key.endswith("ratio") else f"({value:.2f}x)"
                          for key, value in case.items() if key not in ("batch", "tokens")))
    print(json.dumps(result))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
