# What the tests of the programs check with. Sourced; makes `work`, a folder that goes when the test ends.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "FAILED: $*" >&2
  exit 1
}
# prints PATTERN COMMAND...: the command succeeds and says something that matches the pattern.
prints() {
  local pattern=$1
  shift
  "$@" >"$work/output" 2>&1 || fail "$* ($(cat "$work/output"))"
  grep -q -- "$pattern" "$work/output" || fail "no '$pattern' from: $* ($(cat "$work/output"))"
}
# refuses PATTERN COMMAND...: the command ends with an error that matches the pattern, not a crash.
refuses() {
  local pattern=$1 status=0
  shift
  "$@" >"$work/output" 2>&1 || status=$?
  ((status > 0 && status < 126)) || fail "status $status of: $*"
  grep -q -- "$pattern" "$work/output" || fail "no '$pattern' from: $* ($(cat "$work/output"))"
}
