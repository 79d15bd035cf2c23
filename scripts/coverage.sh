#!/usr/bin/env bash
# Which lines of include/ and src/ the tests run, as counted by the address stage of
# scripts/test_sanitizers.sh, which runs first if it has not: prints by file the share that runs and
# the lines that do not, and fails below 92% of all.
set -euo pipefail
cd "$(dirname "$0")/.."

least=92
[[ -d build-asan/profiles ]] || scripts/test_sanitizers.sh address
llvm-profdata merge -sparse -o build-asan/profile build-asan/profiles/*.profraw
objects=()
for program in build-asan/tests/*_test build-asan/bundle/bin/*_fuzz; do
  objects+=(-object "$program")
done
llvm-cov export -format=lcov -instr-profile build-asan/profile build-asan/tests/fuzz/harness_test \
  "${objects[@]}" >build-asan/coverage.info
awk -F '[:,]' -v root="$PWD/" -v least="$least" '
  function close_range() {
    if (first) missed = missed (missed ? ", " : "") first (last > first ? "-" last : "")
    first = 0
  }
  /^SF:/ {
    file = substr($0, 4)
    gsub("[^/]*/[.][.]/", "", file)
    sub(root, "", file)
    ours = file ~ "^(include|src)/"
    ran = lines = first = 0
    missed = ""
  }
  ours && /^DA:/ {
    ++lines
    if ($3 > 0) { ++ran; close_range() } else { if (!first) first = $2; last = $2 }
  }
  ours && /^end_of_record/ {
    close_range()
    printf "%6.1f%%  %-45s %s\n", 100 * ran / lines, file, missed
    all_ran += ran; all_lines += lines
  }
  END {
    share = 100 * all_ran / all_lines
    printf "%6.1f%%  of %d lines; at least %d%% must run\n", share, all_lines, least
    exit (share < least)
  }' build-asan/coverage.info
