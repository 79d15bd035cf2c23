#!/usr/bin/env python3
"""Writes tests/data/checkpoints: a tiny random checkpoint of every model family, with what the
`transformers` and `tokenizers` packages compute from it.

    pip install torch==2.7.1 transformers==4.57.1 tokenizers==0.22.2
    tests/data/make_checkpoints.py

Each folder is laid out like a real one (config, safetensors, tokenizer) and also holds
cases.json            texts, their token ids with and without the template, and their decoded form
expected.safetensors  tokens [T] and the logits [T][vocab_size] of a forward pass in FP32
metaspace_cases.json holds token ids of Mistral's tokenizer with other pre-tokenizers.
"""
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

FOLDER = pathlib.Path(__file__).resolve().parent / "checkpoints"
VOCAB_SIZE = 352
NUM_TOKENS = 40
WORDS = (
    "the cache of a language model holds the keys and the values of every token that came before "
    "and the longer the text the more of the memory it takes so that the model itself is small "
    "beside it when the context is long then the keys are written as a sum of rows of a codebook "
    "and the values as a binary code of which a matrix makes the values again 12 345 6789 it's we'll "
).split(" ")
TEXTS = [
    "",
    " ",
    "a",
    "the cache of the model",
    "The values, the keys; and then?",
    "  two spaces in front, three   inside, trailing  ",
    "\n\n\tTabs\tand\r\nline ends\n",
    "don't we'll I'M they've o'clock '90s",
    "1234567890 3.14159 1,000,000 0x7fff",
    "Gr\u00fc\u00dfe, \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148, na\u00efve fa\u00e7ade",
    "e\u0301 u\u0308 \u1112\u1161\u11ab \u212b \ufb01 combining, \u00a0no-break\u2003em space",
    "\u8272\u306f\u5302\u3078\u3069 \u0645\u0631\u062d\u0628\u0627 \U0001f642\U0001f469\u200d\U0001f469",
    "\u2581already\u2581spaced \u2581 out",
    "one<|end|>two<|end|><|end|> three <|end",
    "<s>the cache</s> of<s> the<unk> model</s>",
    "<0x41> is no byte, \x00\x01\x7f are",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def added(contents, first_id, normalized=False):
    return [{"id": first_id + i, "content": content, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": normalized, "special": True}
            for i, content in enumerate(contents)]


def template(token, token_id):
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def byte_level_tokenizer(split, specials, changes):
    """Byte-level BPE of VOCAB_SIZE tokens, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(specials), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    result = json.loads(tokenizer.to_str())
    result["added_tokens"] = added(specials, VOCAB_SIZE - len(specials))
    result["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                         "use_regex": True}
    result["model"] |= changes.pop("model", {})
    return result | changes


def sentencepiece_tokenizer(normalized, changes):
    """Characters with U+2581 for spaces and a token for every byte, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 259, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    result = json.loads(tokenizer.to_str())
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += sorted(result["model"]["vocab"], key=result["model"]["vocab"].get)
    result["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)},
                        "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    result["added_tokens"] = added(specials, 0, normalized)
    result["post_processor"] = template("<s>", 1)
    result["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    return result | changes


def llama2_tokenizer():
    return sentencepiece_tokenizer(True, {
        "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}})


def mistral_tokenizer():
    return sentencepiece_tokenizer(False, {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581",
                          "prepend_scheme": "first", "split": False}})


def llama3_tokenizer():
    specials = ["<|begin|>", "<|end|>", "<|eot|>"]
    return byte_level_tokenizer(LLAMA3_SPLIT, specials, {
        "model": {"ignore_merges": True},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
             "use_regex": True},
            template("<|begin|>", VOCAB_SIZE - 3)]}})


def qwen_tokenizer():
    return byte_level_tokenizer(QWEN_SPLIT, ["<|end|>", "<|im_start|>", "<|im_end|>"], {
        "normalizer": {"type": "NFC"},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                           "use_regex": False}})


METASPACES = [
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
    {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True},
]

SHAPE = dict(vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
CHECKPOINTS = {
    "llama2": (LlamaForCausalLM, llama2_tokenizer,
               LlamaConfig(**SHAPE | dict(num_key_value_heads=4), bos_token_id=1, eos_token_id=2,
                           rope_scaling={"type": "linear", "factor": 4.0})),
    "llama3": (LlamaForCausalLM, llama3_tokenizer,
               LlamaConfig(**SHAPE, head_dim=16, rope_theta=10000.0, bos_token_id=349,
                           eos_token_id=[350, 351],
                           rope_scaling={"rope_type": "llama3", "factor": 8.0,
                                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                         "original_max_position_embeddings": 32})),
    "mistral": (MistralForCausalLM, mistral_tokenizer,
                MistralConfig(**SHAPE, head_dim=8, sliding_window=12, rms_norm_eps=1e-5)),
    "qwen2": (Qwen2ForCausalLM, qwen_tokenizer,
              Qwen2Config(**SHAPE, tie_word_embeddings=True, use_sliding_window=True,
                          sliding_window=8, max_window_layers=1, bos_token_id=349,
                          eos_token_id=351)),
    "qwen3": (Qwen3ForCausalLM, qwen_tokenizer,
              Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True, rope_theta=1e6,
                          bos_token_id=349, eos_token_id=351)),
}


def randomize(model):
    """Weights of a size at which every part of the model matters, biases and norms included."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * (1.0 if "embed" in name else weight.shape[1] ** -0.5))


def write_cases(tokenizer, folder):
    cases = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({"text": text, "ids": ids,
                      "ids_with_template": tokenizer.encode(text).ids,
                      "decoded": tokenizer.decode(ids, skip_special_tokens=False)})
    lines = ",\n".join(json.dumps(case) for case in cases)
    (folder / "cases.json").write_text("[\n" + lines + "\n]\n")


def write_metaspace_cases():
    variants = []
    for step in METASPACES:
        tokenizer = Tokenizer.from_str(json.dumps(mistral_tokenizer() | {"pre_tokenizer": step}))
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
        variants.append({"pre_tokenizer": step, "ids": ids})
    lines = ",\n".join(json.dumps(variant) for variant in variants)
    (FOLDER / "metaspace_cases.json").write_text("[\n" + lines + "\n]\n")


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, (model_type, make_tokenizer, config) in CHECKPOINTS.items():
        folder = FOLDER / name
        folder.mkdir(parents=True)
        text = json.dumps(make_tokenizer(), ensure_ascii=False, separators=(",", ":"))
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
        write_cases(tokenizer, folder)

        model = model_type(config).to(torch.bfloat16)
        randomize(model)
        # One checkpoint in shards, as the large ones are.
        model.save_pretrained(folder, max_shard_size="20KB" if name == "llama3" else "1MB")
        tokens = tokenizer.encode(" ".join(WORDS)).ids[:NUM_TOKENS]
        assert len(tokens) == NUM_TOKENS
        # Loaded anew: the conversion above also rounded the frequencies of RoPE.
        model = model_type.from_pretrained(folder, dtype=torch.float32,
                                           attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        save_file({"tokens": torch.tensor(tokens), "logits": logits.contiguous()},
                  folder / "expected.safetensors")
    write_metaspace_cases()


if __name__ == "__main__":
    main()
