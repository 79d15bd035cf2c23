#!/usr/bin/env bash
# Runs a Python program with a python3 that has NumPy; exits with 77, which CTest counts as skipped,
# where there is none. run_with_numpy.sh PROGRAM ARGUMENTS...
set -euo pipefail
for python in python3 /usr/bin/python3; do
  if "$python" -c 'import numpy' 2>/dev/null; then exec "$python" -B "$@"; fi
done
echo "skipped: no python3 with numpy (Debian: python3-numpy)"
exit 77
