#!/usr/bin/env bash
# clang-tidy over src/, examples/ and the headers that they include, with the checks of .clang-tidy.
# Prints findings and fails if there are any.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_packages.sh clang clang-tidy libclang-rt-14-dev libomp-dev libdlpack-dev
[[ -e build-asan/compile_commands.json ]] || cmake --preset asan >/dev/null
log=build-asan/lint.log
if ! run-clang-tidy -quiet -p build-asan -j "$(nproc)" "^$PWD/(src|examples)/" >"$log" 2>&1; then
  grep -v '^clang-tidy' "$log"
  exit 1
fi
echo "clang-tidy: nothing found in $(grep -c '^clang-tidy' "$log") files"
