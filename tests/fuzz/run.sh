#!/usr/bin/env bash
# Fuzzes with every harness beside this script and prints a table: executions, edges of the code that
# were reached and that there are, features (edges by how often they were taken, among others), inputs
# in the corpus, findings, CPU seconds.
#
#   run.sh [SECONDS] [CORES] [TIMEOUT]    seconds for each harness (60), processes at a time (all
#                                         cores), seconds an input may take (10; more where other
#                                         work has the cores)
#
# With more cores than harnesses each harness gets several processes, which share what they find;
# with fewer, harnesses take turns. corpus/ keeps what was learnt, merged at the end, for the next
# run; findings/ keeps each input that broke a promise, logs/ what the harness said of it. Fails if
# there are findings.
set -euo pipefail
cd "$(dirname "$0")"

seconds=${1:-60}
cores=${2:-$(nproc)}
timeout=${3:-10}
mapfile -t harnesses < <(cd bin && ls -- *_fuzz | sed 's/_fuzz$//')
count=${#harnesses[@]}
export seconds timeout OMP_NUM_THREADS=1
# Inputs are written to files: in memory, where it can be.
TMPDIR=$(mktemp -d "$([[ -w /dev/shm ]] && echo /dev/shm || echo /tmp)/commvq_fuzz.XXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
export ASAN_OPTIONS=allocator_may_return_null=0:detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1
rm -rf logs findings
mkdir -p logs findings corpus

# One process of a harness; a finding ends it, and it goes on for what is left of its time.
fuzz() {
  local name=$1 worker=$2 end=$((SECONDS + seconds)) left options=()
  local dictionary=dictionaries/$name.dict
  [[ -e $dictionary ]] || dictionary=dictionaries/json.dict
  case $name in dlpack | c_api | tokenizer_text) ;; *) options=(-dict="$dictionary") ;; esac
  mkdir -p "corpus/$name"
  for _ in {1..200}; do
    left=$((end - SECONDS))
    ((left > 0)) || return 0
    { time "bin/${name}_fuzz" "corpus/$name" "seeds/$name" "${options[@]}" \
      -max_total_time="$left" -timeout="$timeout" -report_slow_units="$timeout" \
      -rss_limit_mb=2048 -malloc_limit_mb=1024 -print_final_stats=1 \
      -artifact_prefix="findings/$name-"; } >>"logs/$name-$worker" 2>&1 &&
      return 0
  done
  return 0
}
export -f fuzz
export TIMEFORMAT='CPU_SECONDS %U %S'

workers=$((cores / count > 0 ? cores / count : 1))
spare=$((cores > count ? cores % count : 0))
for i in "${!harnesses[@]}"; do
  for ((worker = 0; worker < workers + (i < spare ? 1 : 0); ++worker)); do
    printf '%s\0%s\0' "${harnesses[i]}" "$worker"
  done
done | xargs -0 -n 2 -P "$cores" bash -c 'fuzz "$@"' fuzz

# Keeps of a corpus what adds coverage.
merge() {
  mkdir -p "corpus/$1.merged"
  "bin/$1_fuzz" -merge=1 -timeout="$timeout" "corpus/$1.merged" "corpus/$1" >/dev/null 2>&1 || return 0
  rm -rf "corpus/$1"
  mv "corpus/$1.merged" "corpus/$1"
}
export -f merge
((seconds < 60)) || printf '%s\0' "${harnesses[@]}" | xargs -0 -n 1 -P "$cores" bash -c 'merge "$1"' merge

row='%-16s %12s %13s %9s %7s %9s %9s\n'
# shellcheck disable=SC2059
print_row() { printf "$row" "$@"; }
sum() { awk -v key="$1" '$1 == key {for (i = 2; i <= NF; ++i) n += $i} END {printf "%.0f\n", n}'; }
largest() { grep -o "$1: *[0-9]*" | awk '$2 > n {n = $2} END {print n + 0}'; }
failures=0
print_row harness executions edges features corpus findings 'CPU s'
for name in "${harnesses[@]}"; do
  log() { cat logs/"$name"-*; }
  executions=$(log | sum stat::number_of_executed_units:)
  all_edges=$(log | awk '/^INFO: Loaded .* modules/ {n = substr($5, 2)} END {print n + 0}')
  findings=$(find findings -name "$name-*" | wc -l)
  print_row "$name" "$executions" "$(log | largest cov)/$all_edges" "$(log | largest ft)" \
    "$(find "corpus/$name" -type f | wc -l)" "$findings" "$(log | sum CPU_SECONDS)"
  # A harness that did not run is no success.
  ((executions > 0)) || { log | tail -n 20; failures=$((failures + 1)); }
  failures=$((failures + findings))
done
print_row all "$(cat logs/* | sum stat::number_of_executed_units:)" "" "" \
  "$(find corpus -type f | wc -l)" "$(find findings -type f | wc -l)" "$(cat logs/* | sum CPU_SECONDS)"
grep -rh '^FINDING\|SUMMARY' logs | sort | uniq -c || true
((failures == 0))
