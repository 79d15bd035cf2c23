#!/usr/bin/env bash
# Which lines of include/ and src/ the tests run: prints those that they do not, by file, and the
# share of those that they do. Fails below 92%. HTML and all else: gcovr's arguments after --.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_packages.sh gcovr libdlpack-dev
cmake --preset coverage >/dev/null
cmake --build --preset coverage --parallel "$(nproc)"
find build-coverage -name '*.gcda' -delete
export OMP_WAIT_POLICY=passive
ctest --preset coverage --parallel "$(nproc)" --output-on-failure
# Throw branches of require() are no lines of their own; only lines count.
gcovr --root . --filter include/ --filter src/ --object-directory build-coverage \
  --exclude-unreachable-branches --exclude-throw-branches --fail-under-line 92 "$@" build-coverage
