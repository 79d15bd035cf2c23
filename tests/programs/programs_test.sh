#!/usr/bin/env bash
# The programs from end to end on the small model and on tiny checkpoints of every family, briefly
# calibrated, and what they say of bad input.
# programs_test.sh FOLDER_OF_PROGRAMS MODEL FOLDER_OF_CHECKPOINTS
set -euo pipefail
programs=$1 model=$2 checkpoints=$3
source "$(dirname "$0")/checks.sh"

for program in calibrate evaluate generate; do
  prints MODEL "$programs/$program" --help
done
prints "bytes a token" "$programs/quickstart"
prints "1/14.84 of FP16" "$programs/calibrate" "$model" --self --bits 1 --method paper \
  --tokens 512 --em-steps 1 --value-steps 5 --out "$work/paper.safetensors"
prints "1/14.42 of FP16" "$programs/calibrate" "$model" --self --bits 1 --tokens 512 \
  --em-steps 1 --value-steps 5 --stages 10,11,11,11,11,12 --out "$work/1-bit.safetensors"
prints "1/14.84 of FP16" "$programs/calibrate" "$model" --self --bits 1 --norms token --tokens 512 \
  --em-steps 1 --value-steps 5 --stages 0 --out "$work/token.safetensors"
refuses "stages has 2 numbers; give one, or one for each of 6 layers" "$programs/calibrate" "$model" \
  --self --stages 10,11 --out "$work/stages.safetensors"
refuses "give --stages what calibrate --propose-stages prints" "$programs/calibrate" "$model" --self \
  --layers 0:2 --out "$work/stages.safetensors"
prints "1/14.63 of FP16" "$programs/calibrate" "$model" --self --bits 1 --method speed \
  --tokens 512 --em-steps 1 --refine 1 --value-steps 5 --layers 0:1 --out "$work/speed.safetensors"
refuses "num_stages is 58; graded codes need a multiple of 4" "$programs/calibrate" "$model" \
  --self --method speed --stages 60,58,60,60,60,60 --out "$work/stages.safetensors"
refuses "value-blocks is 3; it must divide the 2" "$programs/calibrate" "$model" --self \
  --value-blocks 3 --out "$work/blocks.safetensors"
# A mean over layers of 10, 11 and 12 stages.
prints "of them coded, 71.000 bytes each a layer: 1/14.42" "$programs/generate" "$model" \
  --codebooks "$work/1-bit.safetensors" \
  --prompt "The history" --max-tokens 150 --window 32
prints "^1-bit" "$programs/evaluate" "$model" --self --context 192 --contexts 1 --questions 1 \
  --window 32 --codebooks "$work/1-bit.safetensors" --json "$work/result.json"
grep -q perplexity_increase "$work/result.json" || fail "evaluate --json"
prints "spread over the layers: --stages [0-9,]*$" "$programs/evaluate" "$model" --self --context 64 \
  --contexts 1 --window 32 --codebooks "$work/paper.safetensors" --by-layer
sed 's/[0-9]/& and /g' "$model/config.json" >"$work/text"
for _ in 1 2 3 4 5; do cat "$work/text" "$work/text" >"$work/more"; mv "$work/more" "$work/text"; done
head -c 12000 "$work/text" >"$work/short.txt"
for kept in absent present; do
  prints "^pq_1bit" "$programs/evaluate" "$model" --text "$work/short.txt" --context 128 \
    --contexts 1 --questions 0 --window 32 --peers kivi_2bit pq_1bit --calibration "$work/text" \
    --calibration-tokens 256 --exact "$work/exact.json"
  sed -n '/^exact/,$p' "$work/output" >"$work/$kept"
done
cmp "$work/absent" "$work/present" || fail "evaluate --exact"

# What is spread by default is what --propose-stages prints.
spread() {
  "$programs/calibrate" "$checkpoints/llama3" --self --context 64 --tokens 512 --em-steps 1 \
    --value-steps 5 "$@"
}
spread --out "$work/spread"
spread --stages "$(spread --propose-stages)" --out "$work/given"
cmp "$work/spread" "$work/given" || fail "the default differs from --stages of --propose-stages"
refuses "give --out FILE" spread

for checkpoint in "$checkpoints"/*/; do
  prints "1/[0-9.]* of FP16" "$programs/calibrate" "$checkpoint" --self --context 64 --tokens 512 \
    --em-steps 1 --value-steps 5 --out "$work/tiny.safetensors"
  prints "of them coded" "$programs/generate" "$checkpoint" --codebooks "$work/tiny.safetensors" \
    --prompt "the cache" --max-tokens 40 --window 4
done
for rank in 0 1; do
  prints "1/[0-9.]* of FP16" "$programs/calibrate" "$checkpoints/llama3" --self --context 64 \
    --tokens 512 --em-steps 1 --value-steps 5 --stages 0 --ranks 2 --rank $rank \
    --out "$work/rank.safetensors"
done
refuses "for 1 KV heads; the model has 2" "$programs/generate" "$checkpoints/llama3" \
  --codebooks "$work/rank.safetensors" --prompt a
refuses "must divide the model's 2 KV heads" "$programs/calibrate" "$checkpoints/llama3" --self \
  --ranks 3 --out "$work/x"
refuses "there are 2 ranks" "$programs/calibrate" "$checkpoints/llama3" --self --ranks 2 --rank 2 \
  --out "$work/x"

prints "1/14.73" "$programs/cache_memory"
prints '"bytes_per_token": 131072' "$programs/cache_memory" --json
prints "0 swaps" "$programs/paged_serving" --blocks 64
prints "[1-9][0-9]* swaps to host memory, [1-9][0-9]* blocks evicted" "$programs/paged_serving" --blocks 14
refuses "give --blocks" "$programs/paged_serving" --blocks 12

refuses "cannot open" "$programs/generate" "$work/nowhere" --prompt a --cache exact
refuses "needs --codebooks" "$programs/generate" "$model" --prompt a
refuses "give --text" "$programs/calibrate" "$model" --out "$work/x"
refuses "bits" "$programs/calibrate" "$model" --self --bits 3 --out "$work/x"
refuses "cannot open" "$programs/evaluate" "$model" --text "$work/no.txt"
refuses "no peer kivi_3bit" "$programs/evaluate" "$model" --text "$work/text" --peers kivi_3bit
refuses "give --calibration" "$programs/evaluate" "$model" --text "$work/text" --peers rq_1bit
refuses "must not learn" "$programs/evaluate" "$model" --text "$work/text" --peers rq_1bit \
  --calibration "$work/text"
echo "too short" >"$work/short.txt"
refuses "one context needs 4096" "$programs/evaluate" "$model" --text "$work/short.txt"
refuses "safetensors" "$programs/generate" "$model" --prompt a --codebooks "$model/config.json"
refuses "format" "$programs/generate" "$model" --prompt a --codebooks "$model/model.safetensors"
head -c 100000 "$work/1-bit.safetensors" >"$work/truncated.safetensors"
refuses "truncated.safetensors" "$programs/generate" "$model" --prompt a \
  --codebooks "$work/truncated.safetensors"

mkdir "$work/other"
cp "$model/model.safetensors" "$model/tokenizer.json" "$work/other"
sed 's/"max_position_embeddings": 4096/"max_position_embeddings": 2048/' "$model/config.json" \
  >"$work/other/config.json"
refuses "learnt from model" "$programs/generate" "$work/other" --prompt a \
  --codebooks "$work/1-bit.safetensors"
echo "all programs passed"
