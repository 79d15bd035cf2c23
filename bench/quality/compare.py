#!/usr/bin/env python3
"""Compares the quality of compressed caches: README.md's table of a model, and its plot.

Calibrates a model with this library's method and with the paper's, once a seed, and evaluates these
and other methods' caches (evaluate --peers) on the same contexts and questions. Whatever is done is
kept in a folder and not done again: a call that was cut short, by --minutes or otherwise, goes on
where it ended. Plotting needs matplotlib (requirements.txt); everything else the standard library.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex
import statistics
import struct
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent

# Every cache that can be compared, in the order of the table. Codebooks come from `calibrate`
# (METHOD_Bbit), all others are peers that `evaluate` makes itself. Without a seed: the same anyway.
CALIBRATED = ["commvq_1bit", "commvq_2bit", "speed_1bit", "speed_2bit", "paper_1bit", "paper_2bit"]
SEEDED_PEERS = ["rotation_1bit", "rotation_2bit", "pq_1bit", "pq_1bit_roped", "pq_2bit",
                "pq_2bit_roped", "rq_1bit", "rq_2bit"]
PLAIN_PEERS = ["kivi_1bit_roped", "kivi_2bit", "kivi_2bit_roped", "kivi_4bit_roped"]
CACHES = CALIBRATED + PLAIN_PEERS + SEEDED_PEERS


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="folder of a Hugging Face Llama model")
    parser.add_argument("--calibration", type=pathlib.Path, required=True,
                        help="text to calibrate on")
    parser.add_argument("--validation", type=pathlib.Path, required=True,
                        help="other text, to evaluate on")
    parser.add_argument("--out", type=pathlib.Path, required=True,
                        help="folder of codebooks and results, kept from call to call")
    parser.add_argument("--programs", type=pathlib.Path, default=HERE / "../../build/examples")
    parser.add_argument("--only", nargs="+", default=CACHES, choices=CACHES, metavar="CACHE",
                        help="of " + " ".join(CACHES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=65536, help="to calibrate on")
    parser.add_argument("--peer-tokens", type=int, default=16384, help="that pq and rq learn from")
    parser.add_argument("--commvq", default="", metavar="OPTIONS",
                        help="more options of calibrate for this library's method")
    parser.add_argument("--speed", default="", metavar="OPTIONS", help="the same for speed's")
    parser.add_argument("--paper", default="", metavar="OPTIONS",
                        help="the same for the paper's, such as '--em-steps 30'")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--contexts", type=int, default=12, help="0: the whole text")
    parser.add_argument("--questions", type=int, default=60, help="retrieval questions")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--threads", type=int, help="of each process; default: cores / jobs")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="stop what is not done by then; a later call goes on")
    parser.add_argument("--partial", action="store_true",
                        help="write table and plot even if some caches or seeds are missing")
    args = parser.parse_args()
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    args.deadline = time.monotonic() + 60 * args.minutes
    return args


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def commit():
    """The commit that was run, with a + where the sources had changed since."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=HERE / "../..", check=True,
                              capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "include", "src", "examples")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


class Unfinished(Exception):
    """Something was not done by the deadline, or failed."""


def run(args, name, program, *arguments, threads=None):
    """Runs a program of the examples; what it says goes to NAME.log."""
    left = args.deadline - time.monotonic()
    if left <= 0:
        raise Unfinished(f"{name}: no time left")
    begun = time.monotonic()
    command = [str(args.programs / program), str(args.model), *map(str, arguments)]
    with open(args.out / f"{name}.log", "w") as log:
        try:
            status = subprocess.run(command, stdout=log, stderr=log,
                                    timeout=left if left < float("inf") else None,
                                    env={**os.environ, "OMP_NUM_THREADS": str(threads or args.threads)})
        except subprocess.TimeoutExpired:
            raise Unfinished(f"{name}: stopped after {time.monotonic() - begun:.0f} s") from None
    if status.returncode != 0:
        raise Unfinished(f"{name}: failed, see {log.name}")
    print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


class Comparison:
    """What belongs to one model, pair of texts and set of options; all else is made anew."""

    def __init__(self, args):
        self.args = args
        self.evaluated_on = {"model": args.model.name, "config": digest(args.model / "config.json"),
                             "text": digest(args.validation), "context": args.context,
                             "contexts": args.contexts, "questions": args.questions}
        self.learnt_from = digest(args.calibration)

    def runs(self):
        """Every cache with every seed it has; what one seed needs before the next."""
        return [(cache, seed) for seed in [0, *self.args.seeds] for cache in self.args.only
                if (cache in PLAIN_PEERS) == (seed == 0)]

    def recipe(self, cache, seed):
        """How a cache is made: a result with another recipe is not used."""
        recipe = {"seed": seed} if seed else {}
        if cache in CALIBRATED:
            recipe |= {"text": self.learnt_from, "tokens": self.args.tokens,
                       "options": getattr(self.args, cache.split("_")[0])}
        elif cache.startswith(("pq", "rq")):
            recipe |= {"text": self.learnt_from, "tokens": self.args.peer_tokens}
        return recipe

    def result(self, cache, seed):
        """The result of an earlier evaluation, or None."""
        path = self.path(cache, seed, "json")
        if not path.exists():
            return None
        kept = json.loads(path.read_text())
        same = (kept["evaluated_on"] == self.evaluated_on
                and kept["recipe"] == self.recipe(cache, seed))
        return kept if same else None

    def path(self, cache, seed, suffix):
        return self.args.out / (f"{cache}-{seed}.{suffix}" if seed else f"{cache}.{suffix}")

    def produce(self, cache, seed, exact):
        """Calibrates and, once the exact cache is done, evaluates, as far as that was not done."""
        if self.result(cache, seed) is not None:
            return
        source = self.calibrated(cache, seed) if cache in CALIBRATED else self.peer(cache, seed)
        exact.result()
        report = self.args.out / f"{cache}-{seed}.report.json"
        run(self.args, f"evaluate-{cache}-{seed}", "evaluate", "--text", self.args.validation,
            "--context", self.args.context, "--contexts", self.args.contexts,
            "--questions", self.args.questions, "--exact", self.args.out / "exact.json",
            "--json", report, *source)
        report_of = json.loads(report.read_text())
        report.unlink()
        kept = {"evaluated_on": self.evaluated_on, "recipe": self.recipe(cache, seed),
                "commit": commit(), "report": report_of}
        if cache in CALIBRATED:
            kept["made"] = provenance_of(source[-1])
        self.path(cache, seed, "json").write_text(json.dumps(kept, indent=1))

    def calibrated(self, cache, seed):
        """Calibrates; the options of evaluate that name the codebooks."""
        path = self.path(cache, seed, "safetensors")
        recipe = path.with_suffix(".recipe")
        wanted = json.dumps(self.recipe(cache, seed))
        if not (path.exists() and recipe.exists() and recipe.read_text() == wanted):
            method, width = cache.split("_")
            run(self.args, f"calibrate-{cache}-{seed}", "calibrate",
                "--text", self.args.calibration, "--method", method,
                "--bits", width.removesuffix("bit"), "--tokens", self.args.tokens,
                "--seed", seed, *shlex.split(getattr(self.args, method)), "--out", path)
            recipe.write_text(wanted)
        return ["--codebooks", path]

    def peer(self, cache, seed):
        return ["--peers", cache, "--peer-seed", seed, "--calibration", self.args.calibration,
                "--calibration-tokens", self.args.peer_tokens]

    def produce_all(self):
        """Returns what could not be done."""
        missing = [run_ for run_ in self.runs() if self.result(*run_) is None]
        if not missing:
            return []
        problems = []
        with concurrent.futures.ThreadPoolExecutor(self.args.jobs + 1) as pool:
            exact = pool.submit(self.exact)
            for done in [pool.submit(self.produce, *run_, exact) for run_ in missing]:
                try:
                    done.result()
                except Unfinished as problem:
                    problems.append(problem)
        return problems

    def exact(self):
        """The exact cache, with which all others are compared, a thread a context."""
        cores = self.args.threads * self.args.jobs
        run(self.args, "exact", "evaluate", "--text", self.args.validation,
            "--context", self.args.context, "--contexts", self.args.contexts,
            "--questions", self.args.questions, "--exact", self.args.out / "exact.json",
            threads=min(cores, self.args.contexts or cores))

    def rows(self):
        """The caches that are there, each with the results of its seeds."""
        rows = {cache: [] for cache in self.args.only}
        for cache, seed in self.runs():
            kept = self.result(cache, seed)
            if kept is not None:
                rows[cache].append(kept)
        return {cache: results for cache, results in rows.items() if results}


class Figures:
    """One figure of a cache over its seeds."""

    def __init__(self, results, key, factor=1.0):
        self.all = [factor * result["report"]["caches"][1][key] for result in results]
        self.mean = statistics.fmean(self.all)
        self.spread = statistics.stdev(self.all) if len(self.all) > 1 else None

    def text(self, form):
        spread = "" if self.spread is None else f" ± {self.spread:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{spread}"


def provenance_of(path):
    """How a codebook file says that it was made."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(size))["__metadata__"]
    return json.loads(metadata["config"])["provenance"]


def table(comparison, rows):
    args = comparison.args
    some = next(iter(rows.values()))[0]["report"]
    commits = sorted({result["commit"] for results in rows.values() for result in results})
    lines = [f"Model {args.model.name}, commit {', '.join(commits)}: mean ± standard deviation over "
             f"seeds. {some['contexts']} contexts of {some['context']} tokens and "
             f"{some['questions']} questions of unseen text, the newest {some['window']} tokens "
             "exact.", "",
             "| cache | seeds | bits a number | perplexity | increase [%] | top-1 [%] | logit error [%] "
             f"| retrieved of {some['questions']} |", "|---|---|---|---|---|---|---|---|"]
    exact = some["caches"][0]
    lines.append(f"| exact fp16 | | 16.000 | {exact['perplexity']:.3f} | | 100.0 | 0.0 "
                 f"| {exact['retrieved']} |")
    for cache, results in rows.items():
        increase = Figures(results, "perplexity_increase", 100)
        lines.append(
            f"| {cache} | {'any' if cache in PLAIN_PEERS else len(results)} "
            f"| {Figures(results, 'bits_per_number').mean:.3f} "
            f"| {Figures(results, 'perplexity').mean:.3f} | {increase.text('+.2f')} "
            f"| {Figures(results, 'top1_agreement', 100).text('.1f')} "
            f"| {Figures(results, 'logit_relative_error', 100).text('.1f')} "
            f"| {Figures(results, 'retrieved').text('.1f')} |")
    lines.append("")
    for cache, results in rows.items():
        if cache in CALIBRATED:
            lines.append(f"- {cache}: {results[0]['made']}")
    if any(cache.startswith(("pq", "rq")) for cache in rows):
        lines.append(f"- pq, rq: k-means on {args.peer_tokens} tokens of the same text")
    return "\n".join(lines)


def plot(comparison, rows):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    methods = {}
    for cache, results in rows.items():
        method = "_".join(part for part in cache.split("_") if not part.endswith("bit"))
        increase = Figures(results, "perplexity_increase", 100)
        methods.setdefault(method, []).append(
            (Figures(results, "bits_per_number").mean, increase.mean, increase.spread or 0))
    for method, points in methods.items():
        bits, increase, spread = zip(*sorted(points))
        axes.errorbar(bits, increase, yerr=spread, marker="o", markersize=4, capsize=2,
                      linewidth=2 if method == "commvq" else 1, label=method)
    axes.set(xlabel="bits a number: codes, norms, scales and zeros",
             ylabel="perplexity over the exact cache [%]", title=comparison.args.model.name)
    axes.set_yscale("symlog", linthresh=0.1)  # logarithmic, but noise may fall below zero
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(HERE / f"{comparison.args.model.name}.png", dpi=120)


def write_readme(name, text):
    """Puts `text` between the lines of README.md that name the model."""
    readme = HERE / "README.md"
    begin, end = f"<!-- {name} begins: written by compare.py -->", f"<!-- {name} ends -->"
    whole = readme.read_text()
    if begin not in whole or end not in whole:
        sys.exit(f"{readme} has no place for {name}: add the lines {begin} and {end}")
    before, rest = whole.split(begin)
    readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main():
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    problems = comparison.produce_all()
    for problem in problems:
        print(problem, file=sys.stderr)
    rows = comparison.rows()
    if rows and (args.partial or not problems):
        text = table(comparison, rows)
        print(text)
        write_readme(args.model.name, text)
        plot(comparison, rows)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
