#!/usr/bin/env bash
# A calibration by two processes, and one that is killed and goes on: both write the bytes that one
# undisturbed process writes. calibrate_parts_test.sh FOLDER_OF_PROGRAMS MODEL
set -euo pipefail
programs=$1 model=$2
source "$(dirname "$0")/checks.sh"
text=$work/text
export OMP_WAIT_POLICY=passive  # two processes share the cores

calibrate() {
  "$programs/calibrate" "$model" --text "$text" --tokens 256 --context 128 --method paper \
    --em-steps 1 --value-steps 4 "$@"
}
merge() { "$programs/merge_codebooks" "$@"; }

for i in {1..400}; do echo "Sentence $i of the text: $((i * i)) is the square of $i."; done >"$text"
calibrate --out "$work/whole"
[[ ! -e $work/whole.parts ]] || fail "whole.parts is left"

# Two processes.
calibrate --layers 0:2 --out "$work/part-0" &
first=$!
calibrate --layers 2:6 --out "$work/part-1"
wait "$first"
merge "$work/part-1" "$work/part-0" --out "$work/merged"
cmp "$work/whole" "$work/merged" || fail "merged parts differ from one process's file"

refuses "layer 0 of 6 is in none of the 1 parts" merge "$work/part-1" --out "$work/x"
refuses "layer 0 is in .*part-0 and in .*whole" \
  merge "$work/part-0" "$work/whole" --out "$work/x"
refuses "0 <= A < B <= 6" calibrate --layers 5:7 --out "$work/x"
refuses "0 <= A < B <= 6" calibrate --layers 3 --out "$work/x"
calibrate --layers 2:3 --seed 2 --out "$work/other-seed"
refuses "different calibrations: seed=1 and seed=2$" \
  merge "$work/part-0" "$work/other-seed" --out "$work/x"
head -c 8000 "$text" >"$work/half"
text=$work/half
calibrate --layers 2:3 --out "$work/other-text"
text=$work/text
refuses "different calibrations: text=[0-9a-f]* and text=[0-9a-f]*$" \
  merge "$work/part-0" "$work/other-text" --out "$work/x"
mkdir "$work/other"
cp "$model/model.safetensors" "$model/tokenizer.json" "$work/other"
sed 's/"max_position_embeddings": 4096/"max_position_embeddings": 2048/' "$model/config.json" \
  >"$work/other/config.json"
this_model=$model model=$work/other
calibrate --layers 2:3 --out "$work/other-model"
model=$this_model
refuses "belong to different models" merge "$work/part-0" "$work/other-model" --out "$work/x"
[[ ! -e $work/x ]] || fail "a refused merge has written a file"

# One that is killed once a layer is there.
"$programs/calibrate" "$model" --text "$text" --tokens 256 --context 128 --method paper \
  --em-steps 1 --value-steps 4 --out "$work/killed" &
run=$!
while [[ ! -e $work/killed.parts/layer-0.safetensors ]] && kill -0 "$run"; do sleep 0.02; done
kill -KILL "$run" || fail "the run ended before it could be killed"
wait "$run" || true
[[ ! -e $work/killed && -e $work/killed.parts/layer-0.safetensors ]] || fail "nothing to go on from"
refuses "seed=1 and seed=2; go on with the same options or remove .*killed.parts" \
  calibrate --seed 2 --out "$work/killed"
calibrate --out "$work/killed" >"$work/output" || fail "a run does not go on"
grep -q "kept from an earlier run" "$work/output" || fail "it began anew ($(cat "$work/output"))"
cmp "$work/whole" "$work/killed" || fail "a run that went on differs from an undisturbed one"
[[ ! -e $work/killed.parts ]] || fail "killed.parts is left"
echo "parts passed"
