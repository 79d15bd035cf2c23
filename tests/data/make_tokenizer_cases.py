#!/usr/bin/env python3
"""Writes tokenizer_cases.json: token ids by the `tokenizers` package (0.23.3 made the present file).

Each variant is the tokenizer of examples/data/lm-7m with other splitting steps, so that the table
covers the steps of GPT-2 and Llama 3 too. Run it as: make_tokenizer_cases.py > tokenizer_cases.json
"""
import json
import pathlib

from tokenizers import Tokenizer

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "The history of the city begins",
    "  two spaces in front, three   inside, trailing  ",
    "\n\n\tTabs\tand\r\nline ends\n",
    "don't we'll I'M they've o'clock '90s",
    "1234567890 3.14159 1,000,000 0x7fff",
    "The secret code of Alice is 12345.",
    "for (int i = 0; i < n; ++i) { sum += x[i] * y[i]; }  // a loop",
    "std::vector<std::pair<int, float>>::const_iterator",
    "snake_case CamelCase SCREAMING_CASE kebab-case a/b\\c",
    "Grüße, žluťoučký kůň, naïve façade",
    "Съешь же ещё этих мягких французских булок",
    "色は匂へど 散りぬるを",
    "مرحبا بالعالم",
    "🙂👩‍👩‍👧‍👦 flags 🇪🇺",
    "e\u0301 combining, \u00a0no-break\u2003em space\u200bzero width\ufeff",
    "<|endoftext|>",
    "one<|endoftext|>two<|endoftext|><|endoftext|> three",
    "<|endoftext| not quite |endoftext|>",
    "\x00\x01\x7f\u0080\u00ff control characters",
    "\U0010ffff\ue000\ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Antidisestablishmentarianism honorificabilitudinitatibus",
    "!!!???...---***((([[[{{{%%%$$$###@@@",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex, add_prefix_space=False):
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True,
            "use_regex": use_regex}


def llama3():
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


VARIANTS = {
    "as shipped": {},
    "GPT-2": {"pre_tokenizer": byte_level(True)},
    "GPT-2 with a space in front": {"pre_tokenizer": byte_level(True, True)},
    "Llama 3": {"pre_tokenizer": llama3(), "ignore_merges": True},
    "unsplit": {"pre_tokenizer": byte_level(False)},
}


def main():
    root = pathlib.Path(__file__).resolve().parents[2]
    shipped = (root / "examples/data/lm-7m/tokenizer.json").read_text(encoding="utf-8")
    table = []
    for name, changes in VARIANTS.items():
        tokenizer_json = json.loads(shipped)
        if "pre_tokenizer" in changes:
            tokenizer_json["pre_tokenizer"] = changes["pre_tokenizer"]
        tokenizer_json["model"]["ignore_merges"] = changes.get("ignore_merges", False)
        tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json))
        cases = [{"text": text, "ids": tokenizer.encode(text).ids} for text in TEXTS]
        table.append({"name": name, "changes": changes, "cases": cases})
    lines = []
    for variant in table:
        cases = ",\n".join("  " + json.dumps(case) for case in variant.pop("cases"))
        lines.append(json.dumps(variant)[:-1] + ', "cases": [\n' + cases + "\n ]}")
    print("[\n" + ",\n".join(lines) + "\n]")


if __name__ == "__main__":
    main()
