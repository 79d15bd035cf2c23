#!/usr/bin/env bash
# clang-tidy over the folders named, src and examples by default, and the headers that they include,
# with the checks of .clang-tidy. Prints findings and fails if there are any.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_packages.sh clang clang-tidy libomp-dev
cmake --preset lint >/dev/null
log=build-lint/lint.log
folders=$(IFS="|"; set -- "${@:-src|examples}"; echo "$*")
if ! run-clang-tidy -quiet -p build-lint -j "$(nproc)" "^$PWD/($folders)/" >"$log" 2>&1; then
  grep -v '^clang-tidy' "$log"
  exit 1
fi
echo "clang-tidy: nothing found in $(grep -c '^clang-tidy' "$log") files"
