#!/usr/bin/env bash
# The main job on the small model that comes with the project: calibrate from text the model writes
# itself, then compare exact, 2-bit and 1-bit caches. Needs no data and no network beyond packages.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_packages.sh
# A build of its own: it leaves out what the demo does not need, kernels above all.
build=build-demo
cmake --preset release -B "$build" -DCOMMVQ_ENABLE_CUDA=OFF -DCOMMVQ_BUILD_TESTS=OFF \
  -DCOMMVQ_BUILD_BENCH=OFF -DCOMMVQ_PRECOMPILE_HEADERS=ON >/dev/null
cmake --build "$build" --parallel "$(nproc)" --target calibrate evaluate generate

model=examples/data/lm-7m
out=$build/codebooks
mkdir -p "$out"
# With two KV heads a layer, a norm a head instead of a token would make the 1-bit cache 3% larger.
# More bits need less text.
calibrate() {
  "$build"/examples/calibrate "$model" --self --norms token --bits "$1" --tokens "$2" \
    --out "$out/$1-bit.safetensors"
}
calibrate 2 8192
calibrate 1 12288

echo
"$build"/examples/evaluate "$model" --self --context 1024 --contexts 5 --questions 20 \
  --codebooks "$out/2-bit.safetensors" "$out/1-bit.safetensors" --json "$out/quality.json"

prompt="The history of the city begins"
generate() {
  echo
  echo "--- $1"
  "$build"/examples/generate "$model" --prompt "$prompt" --max-tokens 200 --temperature 0.8 "${@:2}"
}
generate "exact cache" --cache exact
generate "2-bit cache" --codebooks "$out/2-bit.safetensors"
generate "1-bit cache" --codebooks "$out/1-bit.safetensors"
