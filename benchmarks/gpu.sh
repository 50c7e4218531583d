#!/usr/bin/env bash
# Builds, tests and measures seqkern on a GPU machine, against the torch that is found there.
#
#   benchmarks/gpu.sh [--dry-run] OUTDIR [PART]
#
# PART is one of build, test, sanitize, bench-attention, bench-additive, bench-recurrent, and
# bench-recurrent=I/N.
# Without it the first six run in turn. Each writes OUTDIR/PART.json (status, seconds, counts) and
# OUTDIR/PART.log; the benchmarks add a line of attention.jsonl, additive.jsonl or recurrent.jsonl
# for each cell as it is done, and bench-recurrent exchange.json where there is nvcc, and
# recurrent_cudnn.json, the table of the layers for which cuDNN was faster (benchmarks.md).
# bench-recurrent takes cells that stand for the others; with I/N it is part I of N of all cells,
# and its files are named by that. A part is interrupted, and reports what it has, after LIMIT
# seconds, nine minutes by default; a single part ends a minute later, also where it builds first.
# Nothing is downloaded and nothing outside OUTDIR and build/ is written. A dry run, which is what a
# machine without a GPU gets, goes the same way on the CPU with small benchmarks. PYTHON names
# another interpreter than python3.
set -u
cd "$(dirname "$0")/.." || exit 1

LIMIT=${LIMIT:-540}
ENVIRONMENT=$PWD/build/gpu-env
PYTHON=${PYTHON:-python3}
DRY=0

usage() { sed -n '4p;6,7p' "$0" | cut -c3- >&2; exit 2; }
if [ "${1:-}" = --dry-run ]; then DRY=1; shift; fi
[ $# -ge 1 ] && [ $# -le 2 ] || usage
PARTS="build test sanitize bench-attention bench-additive bench-recurrent"
[[ ${2:-all} =~ ^(${PARTS// /|}|bench-recurrent=[1-9][0-9]*/[1-9][0-9]*|all)$ ]] || usage
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 1
PART=${2:-all}

"$PYTHON" -c 'import torch' || { echo "gpu.sh: $PYTHON has no torch" >&2; exit 1; }
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  [ "$DRY" = 1 ] || echo "gpu.sh: torch sees no GPU, so this is a dry run on the CPU"
  DRY=1
fi

# The ninja of PYTHON: another version would compile everything anew, here and at the next make.
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
export PATH

# The compiled targets: this GPU's own, unless the caller chose.
if [ "$DRY" = 0 ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major >= 9))')
  export TORCH_CUDA_ARCH_LIST
fi

# A venv that sees the packages of PYTHON, also where that is a venv itself, and the benchmarks of
# this checkout. Its own site-packages come first, so the seqkern that runs is the one just built;
# PYTHONSAFEPATH keeps the folder ./seqkern, which holds no extension, from being found instead.
build() {
  rm -rf "$ENVIRONMENT" build/lib*  # build/lib would bring modules deleted since
  "$PYTHON" -m venv --without-pip "$ENVIRONMENT" || return 1
  local site
  site=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$PYTHON" -c 'import os, site, sysconfig
folders = [os.getcwd(), sysconfig.get_path("purelib"), *site.getsitepackages()]
print(*dict.fromkeys(folders), sep="\n")' >"$site/packages.pth"
  "$ENVIRONMENT/bin/python" -m pip install . --verbose --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check || return 1
  "$ENVIRONMENT/bin/python" -m seqkern.cli.doctor &&
    "$ENVIRONMENT/bin/python" -c 'import seqkern._C, seqkern._stream'
}

pytest() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$ENVIRONMENT/bin/python" -m pytest "$@"; }

# The tests of FILES..., as part PART. Most of their time goes into compiling for the GPU and into
# references, which a core each shortens.
gpu_tests() {
  local part=$1 workers parallel=()
  shift
  if "$ENVIRONMENT/bin/python" -c 'import xdist' 2>/dev/null; then
    workers=$(nproc)
    parallel=(-n $((workers < 12 ? workers : 12)) --dist worksteal)
    # A kernel that hangs then ends its worker, which says where it was, and not the part. By a
    # thread: who waits for a GPU takes no signal.
    [ "$part" != test ] || ! "$ENVIRONMENT/bin/python" -c 'import pytest_timeout' 2>/dev/null ||
      parallel+=(--timeout=120 --timeout-method=thread)
  else
    echo "gpu.sh: no pytest-xdist, so the tests run one after another"
  fi
  pytest -m gpu -v "${parallel[@]}" --junitxml="$OUT/$part.xml" "$@"
}

# Of SUITE, whose records are written one by one; what has not begun in time is left out.
bench() {
  local selection=() status=0
  [ "$DRY" = 0 ] || selection=(--grid tiny)
  : >"$OUT/$1.jsonl"
  pytest --junitxml="$OUT/bench-$1.xml" --records="$OUT/$1.jsonl" --budget=0.5 --within=400 \
    --benchmark-quiet "${selection[@]}" "benchmarks/bench_$1.py" || status=$?
  "$ENVIRONMENT/bin/python" -m "benchmarks.$1_table" "$OUT/$1.jsonl" || return 1
  return "$status"
}

# The exchanges alone, which the limits need. Without nvcc the table goes without.
exchange() {
  local nvcc arch status=0
  nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
  [ -x "$nvcc" ] || { echo "gpu.sh: no nvcc, so the exchanges are not measured"; return 0; }
  arch=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"sm_{major}{minor}" + "a" * (major >= 9))')
  timeout 60 "$nvcc" -O3 -std=c++17 "-arch=$arch" -Icsrc benchmarks/exchange.cu -o build/exchange ||
    return 1
  timeout 30 build/exchange >"$OUT/exchange.tmp" || status=$?  # what was measured until then counts
  mv "$OUT/exchange.tmp" "$OUT/exchange.json"
  return "$status"
}

# As bench; a dry run is also one of the suite for CPUs.
bench_recurrent() {
  local selection=(--grid quick) name=recurrent exchanges=() status=0
  if [ "$DRY" = 1 ]; then
    selection=(--grid tiny)
    echo "gpu.sh: the exchanges are not measured in a dry run"
  else
    exchange || { echo "gpu.sh: exchange.cu failed"; status=1; }
    [ ! -s "$OUT/exchange.json" ] || exchanges=(--exchange "$OUT/exchange.json")
  fi
  if [ -n "$SLICE" ]; then
    name=recurrent-${SLICE/\//-of-}
    selection+=(--slice "$SLICE")
    [ "$DRY" = 1 ] || selection+=(--grid full)
  fi
  rm -f "$OUT/$name.jsonl"
  pytest --junitxml="$OUT/bench-$name.xml" --records="$OUT/$name.jsonl" --budget=0.25 \
    --within=400 --benchmark-quiet -W ignore::pytest_benchmark.logger.PytestBenchmarkWarning \
    "${selection[@]}" benchmarks/bench_recurrent_gpu.py || status=$?
  "$ENVIRONMENT/bin/python" -m benchmarks.recurrent_gpu_table "${exchanges[@]}" \
    "$OUT"/recurrent*.jsonl || return 1
  "$ENVIRONMENT/bin/python" -m benchmarks.recurrent_gpu_choice --out "$OUT/recurrent_cudnn.json" \
    "$OUT"/recurrent*.jsonl || return 1
  [ "$DRY" = 0 ] || [ -n "$SLICE" ] ||
    "$ENVIRONMENT/bin/python" -m benchmarks --grid tiny --row "$ROW" --budget 0.01 --out "$OUT" ||
    return 1
  return "$status"
}

# Status 5 is pytest's word for "nothing was selected".
record() {
  "$PYTHON" - "$@" "$DRY" "$OUT" <<'PY'
import json, pathlib, platform, sys, xml.etree.ElementTree as xml
import torch

part, status, seconds, dry, out = sys.argv[1], *map(int, sys.argv[2:5]), pathlib.Path(sys.argv[5])
words = {0: "passed", 5: "nothing selected", 124: "out of time", 137: "out of time"}
result = {
    "part": part,
    "status": words.get(status, "failed"),
    "seconds": seconds,
    "dry_run": bool(dry),
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "torch": torch.__version__,
    "python": platform.python_version(),
}
report = out / f"{part}.xml"
if report.exists():
    suite = next(xml.parse(report).iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    result["counts"] = {name: int(suite.get(name)) for name in names}
    report.unlink()
(out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"gpu.sh: {part}: {result['status']}, {seconds} s")
PY
}

# Interrupted as by a keyboard, pytest still says what failed and writes its report.
run_part() {
  local start=$SECONDS status limit=$LIMIT left=$((LIMIT + 35 - SECONDS))
  [ "$PART" = all ] || [ "$left" -ge "$limit" ] || limit=$left
  timeout -s INT -k 20 "$limit" bash -c "$2" >"$OUT/$1.log" 2>&1
  status=$?
  [ "$status" = 0 ] || tail -n 25 "$OUT/$1.log"
  record "$1" "$status" $((SECONDS - start)) && { [ "$status" = 0 ] || [ "$status" = 5 ]; }
}

ROW=lstm-f32-inference-step
SLICE=
case "$PART" in bench-recurrent=*) SLICE=${PART#*=} PART=bench-recurrent ;; esac
export PYTHONSAFEPATH=1
export ENVIRONMENT PYTHON OUT DRY ROW SLICE
export -f build pytest gpu_tests bench exchange bench_recurrent

failed=0
parts=$PART
[ "$PART" != all ] || parts=$PARTS
[[ $parts == *build* ]] || [ -x "$ENVIRONMENT/bin/python" ] || parts="build $parts"
for part in $parts; do
  case "$part" in
    build) run_part build build ;;
    test) run_part test 'gpu_tests test tests/test_*_gpu.py' ;;
    sanitize) run_part sanitize 'gpu_tests sanitize tests/test_gpu_sanitizer.py' ;;
    bench-recurrent) run_part "$part${SLICE:+-${SLICE/\//-of-}}" bench_recurrent ;;
    bench-*) run_part "$part" "bench ${part#bench-}" ;;
  esac || failed=1
done
exit "$failed"
