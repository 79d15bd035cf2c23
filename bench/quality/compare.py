#!/usr/bin/env python3
"""Compares the quality of compressed caches and writes README.md's table and quality.png.

Calibrates a model with this library's method and with the paper's, at 1 and 2 bits, unless the
codebook files are there already, and evaluates all of them in one run against the exact cache.
Plotting needs matplotlib (requirements.txt); everything else the standard library.
"""

import argparse
import json
import pathlib
import struct
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
BEGIN, END = "<!-- table begins: written by compare.py -->", "<!-- table ends -->"


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="folder of a Hugging Face Llama model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--validation", required=True, help="other text, to evaluate on")
    parser.add_argument("--programs", type=pathlib.Path, default=HERE / "../../build/examples")
    parser.add_argument("--codebooks", type=pathlib.Path, required=True,
                        help="folder of codebook files, made where they are missing")
    parser.add_argument("--only", nargs="*", default=["commvq_1bit", "paper_1bit",
                                                      "commvq_2bit", "paper_2bit"])
    parser.add_argument("--tokens", type=int, default=65536, help="to calibrate on")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--contexts", type=int, default=0, help="0: the whole text")
    parser.add_argument("--questions", type=int, default=60, help="retrieval questions")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def calibrate(args, name):
    """The codebook file of a method and width such as paper_2bit."""
    path = args.codebooks / f"{name}.safetensors"
    if not path.exists():
        method, width = name.split("_")
        subprocess.run([args.programs / "calibrate", args.model, "--text", args.calibration,
                        "--method", method, "--bits", width.removesuffix("bit"),
                        "--tokens", str(args.tokens), "--seed", str(args.seed), "--out", path],
                       check=True)
    return path


def provenance_of(path):
    """How a codebook file says that it was made."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(size))["__metadata__"]
    return json.loads(metadata["config"])["provenance"]


def evaluate(args, paths):
    result = args.codebooks / "quality.json"
    subprocess.run([args.programs / "evaluate", args.model, "--text", args.validation,
                    "--context", str(args.context), "--contexts", str(args.contexts),
                    "--questions", str(args.questions), "--json", result,
                    "--codebooks", *paths], check=True)
    return json.loads(result.read_text())


def table(args, report, paths):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, check=True,
                            capture_output=True, text=True).stdout.strip()
    lines = [f"Model {args.model.name}, commit {commit}, seed {args.seed}, "
             f"{report['contexts']} contexts of {report['context']} tokens of unseen text, the "
             f"newest {report['window']} exact.", "",
             "| cache | bits a number | perplexity | increase | top-1 | logit error | retrieved |",
             "|---|---|---|---|---|---|---|"]
    for row in report["caches"]:
        questions = f"{row['retrieved']}/{args.questions}" if args.questions else "not run"
        lines.append(f"| {row['cache']} | {bits(row):.3f} | {row['perplexity']:.3f} "
                     f"| {100 * row['perplexity_increase']:+.2f}% "
                     f"| {100 * row['top1_agreement']:.1f}% "
                     f"| {100 * row['logit_relative_error']:.1f}% | {questions} |")
    lines.append("")
    lines += [f"- {path.stem}: {provenance_of(path)}" for path in paths]
    return "\n".join(lines)


def bits(row):
    """True bits a number: codes, norms and scales."""
    return 16 / row["ratio_to_fp16"]


def plot(args, report):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for row in report["caches"][1:]:
        method = row["cache"].split("_")[0]
        color = {"commvq": "tab:blue", "paper": "tab:orange"}.get(method, "tab:gray")
        axes.scatter(bits(row), 100 * row["perplexity_increase"], color=color)
        axes.annotate(row["cache"], (bits(row), 100 * row["perplexity_increase"]),
                      textcoords="offset points", xytext=(6, 4))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="bits a number, norms and scales included",
             ylabel="perplexity over the exact cache [%]", title=args.model.name)
    axes.margins(x=0.25, y=0.2)
    figure.savefig(HERE / "quality.png", dpi=120)


def main():
    args = options()
    args.codebooks.mkdir(parents=True, exist_ok=True)
    paths = [calibrate(args, name) for name in args.only]
    report = evaluate(args, paths)
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(args, report, paths)}\n{END}{after}")
    plot(args, report)


if __name__ == "__main__":
    main()
