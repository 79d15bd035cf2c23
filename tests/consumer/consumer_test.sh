#!/usr/bin/env bash
# Installs, links and packages the library as its users do.
#
#     consumer_test.sh STEP [ARGUMENT]
#
# Reads SOURCE (root of the project), BUILD (its build folder), WORK (where the steps leave their
# trees), CC, CXX, GENERATOR, FLAGS (of BUILD), LIBDIR and VERSION. TREE below is `installed`, made
# from BUILD, or `shared`, made by the step subdirectory.
set -euo pipefail
here=$SOURCE/tests/consumer

fail() {
  echo "FAILED: $*" >&2
  exit 1
}
# says PATTERN TEXT WHAT: the text matches the extended regular expression.
says() { grep -Eq -- "$1" <<<"$2" || fail "no '$1' in $3: $2"; }
fresh() { rm -rf "$1" && mkdir -p "$1"; }
flags_of() { if [[ $1 == installed ]]; then echo "$FLAGS"; fi; }
configure() { # SOURCE BUILD OPTIONS...
  cmake -S "$1" -B "$2" -G "$GENERATOR" -DCMAKE_C_COMPILER="$CC" -DCMAKE_CXX_COMPILER="$CXX" "${@:3}"
}

# Installs BUILD to a new tree.
install_tree() {
  fresh "$WORK/installed"
  cmake --install "$BUILD" --prefix "$WORK/installed" >/dev/null
}

# A project that holds the sources, as a shared library; without optimisation, to be built soon.
subdirectory() {
  configure "$here/subdirectory" "$WORK/subdirectory" -DCOMMVQ_SOURCE_DIR="$SOURCE" \
    -DCMAKE_INSTALL_LIBDIR="$LIBDIR" \
    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DCOMMVQ_PRECOMPILE_HEADERS=ON \
    -DCOMMVQ_ENABLE_CUDA=OFF
  cmake --build "$WORK/subdirectory" --parallel "$(env -u OMP_NUM_THREADS nproc)" # which heeds it
  "$WORK/subdirectory/calibrate_and_attend" "$WORK/subdirectory/codecs.safetensors"
  fresh "$WORK/shared"
  cmake --install "$WORK/subdirectory" --prefix "$WORK/shared" >/dev/null
}

# The component programs, alone in a tree.
programs() {
  local folder output
  fresh "$WORK/programs"
  cmake --install "$BUILD" --prefix "$WORK/programs" --component programs >/dev/null
  [[ ! -e $WORK/programs/include ]] || fail "the component programs installs headers"
  folder=$WORK/programs/libexec/commvq
  output=$("$folder/cache_memory" --layers 1 --kv-heads 2)
  says '^exact +1024.000 bytes' "$output" cache_memory
  for program in calibrate evaluate generate paged_serving; do
    says "$program|Usage" "$("$folder/$program" --help)" "$program --help"
  done
  output=$("$SOURCE/tests/tools/run_with_numpy.sh" "$folder/import_commvq.py" --help || true)
  says 'usage|skipped' "$output" import_commvq.py
}

core_with_pkg_config() {
  fresh "$WORK/core_with_pkg_config"
  export PKG_CONFIG_PATH=$WORK/installed/$LIBDIR/pkgconfig
  # shellcheck disable=SC2046,SC2086
  "$CXX" -std=c++20 $FLAGS $(pkg-config --cflags commvq-core) "$here/core.cpp" \
    -o "$WORK/core_with_pkg_config/core" $(pkg-config --libs commvq-core)
  "$WORK/core_with_pkg_config/core"
}

build_and_run() { # PROJECT, whose program has its name
  fresh "$WORK/$1"
  configure "$here/$1" "$WORK/$1" -DCMAKE_PREFIX_PATH="$WORK/installed" -DCMAKE_CXX_FLAGS="$FLAGS"
  cmake --build "$WORK/$1"
  "$WORK/$1/$1"
}

find_core() {
  build_and_run find_core
}

find_cuda() {
  build_and_run find_cuda
}

find_commvq() { # TREE
  local build=$WORK/find_commvq_$1 flags
  flags=$(flags_of "$1")
  fresh "$build"
  configure "$here/find_commvq" "$build" -DCMAKE_PREFIX_PATH="$WORK/$1" \
    -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_C_FLAGS="$flags"
  cmake --build "$build"
  "$build/calibrate_and_attend" "$build/codecs.safetensors"
  c_example "$build/c_quickstart" "$build/codecs.safetensors"
}

c_example() { # PROGRAM CODEBOOKS
  local output
  output=$("$1" "$2")
  says 'instead of 256\.0; relative error of attention 0\.[0-2]' "$output" "$1"
  output=$("$1" /nowhere 2>&1) && fail "$1 read /nowhere"
  says '^COMMVQ_BAD_FILE: .*/nowhere' "$output" "$1"
}

# Builds with a compiler and pkg-config alone, from the tree that PKG_CONFIG_PATH names.
with_pkg_config() { # BUILD FLAGS
  fresh "$1"
  says "^$VERSION\$" "$(pkg-config --modversion commvq)" "pkg-config --modversion"
  # shellcheck disable=SC2046,SC2086
  "$CXX" -std=c++20 $2 $(pkg-config --cflags commvq) "$here/calibrate_and_attend.cpp" \
    -o "$1/calibrate_and_attend" $(pkg-config --libs commvq)
  "$1/calibrate_and_attend" "$1/codecs.safetensors"
  # shellcheck disable=SC2046,SC2086
  "$CC" -std=c11 $2 $(pkg-config --cflags commvq) "$SOURCE/examples/c_quickstart.c" \
    -o "$1/c_quickstart" $(pkg-config --libs commvq) -lm
  c_example "$1/c_quickstart" "$1/codecs.safetensors"
}

pkg_config() { # TREE
  export LD_LIBRARY_PATH=$WORK/$1/$LIBDIR PKG_CONFIG_PATH=$WORK/$1/$LIBDIR/pkgconfig
  with_pkg_config "$WORK/pkg_config_$1" "$(flags_of "$1")"
}

# refused PATTERN OPTIONS...: find_package fails and says why.
refused() {
  local output
  fresh "$WORK/missing_component"
  output=$(configure "$here/missing_component" "$WORK/missing_component" \
    -DCMAKE_PREFIX_PATH="$WORK/installed" "${@:2}" 2>&1) && fail "configured with ${*:2}"
  says "$1" "$(tr -s '\n ' ' ' <<<"$output")" "${*:2}"
}

missing_component() {
  if [[ ! -e $WORK/installed/$LIBDIR/cmake/commvq/commvq-cuda-targets.cmake ]]; then
    refused 'was built without its CUDA backend.*-DCOMMVQ_ENABLE_CUDA=ON' \
      -DLANGUAGES=CXX -DVERSION=0.1 -DCOMPONENT=cuda
  fi
  refused 'no component gpu: there are core, commvq and cuda' \
    -DLANGUAGES=CXX -DVERSION=0.1 -DCOMPONENT=gpu
  refused 'compatible with requested version "0.2".*commvqConfig.cmake, version: '"$VERSION" \
    -DLANGUAGES=CXX -DVERSION=0.2 -DCOMPONENT=core
  refused 'LANGUAGES C CXX' -DLANGUAGES=C -DVERSION=0.1 -DCOMPONENT=commvq
}

# The shared library shows its interface and nothing of what it is made of.
symbols() {
  local library shown
  library=$WORK/shared/$LIBDIR/libcommvq.so.$VERSION
  says "SONAME.*libcommvq\.so\.${VERSION%.*}\]" "$(readelf -d "$library")" "$library"
  shown=$(nm --dynamic --defined-only --demangle "$library" | cut -c18-)
  local function functions
  functions=$(grep -Eo '\bcommvq_[a-z_]+\(' "$SOURCE/include/commvq/c_api.h" | tr -d '(' | sort -u)
  says '^commvq_cache_attend$' "$functions" c_api.h
  for function in $functions; do says "^T $function\$" "$shown" "symbols"; done
  says '^T commvq::attend\(' "$shown" "symbols"
  says '^V typeinfo for commvq::Error$' "$shown" "symbols"
  ! grep -E '^[A-Z] .*(nlohmann|commvq::(attention|key_em|value_polish|c_api|detail|simd))' \
    <<<"$shown" || fail "internals are visible"
}

python() {
  local output python library codebooks=$WORK/find_commvq_shared/codecs.safetensors
  for python in python3 /usr/bin/python3 none; do
    ! "$python" -c 'import numpy' 2>/dev/null || break
  done
  if [[ $python == none ]]; then
    echo "skipped: no python3 with numpy (Debian: python3-numpy)"
    exit 77
  fi
  library=$WORK/shared/$LIBDIR/libcommvq.so
  output=$("$python" "$SOURCE/examples/ctypes_quickstart.py" "$library" "$codebooks")
  says 'instead of 256\.0; relative error of attention 0\.[0-2]' "$output" ctypes_quickstart.py
  output=$("$python" "$SOURCE/examples/ctypes_quickstart.py" "$library" /nowhere 2>&1) &&
    fail "ctypes_quickstart.py read /nowhere"
  says 'RuntimeError: .*/nowhere' "$output" ctypes_quickstart.py
}

# Makes the Debian packages, checks what they hold and, as root, installs and uses them.
debian() {
  local debs=$WORK/debian runtime=libcommvq${VERSION%.*} list
  if ! command -v dpkg-shlibdeps >/dev/null || ! command -v file >/dev/null; then
    echo "skipped: needs dpkg-shlibdeps (Debian: dpkg-dev) and file"
    exit 77
  fi
  fresh "$debs"
  cpack -G DEB --config "$WORK/subdirectory/commvq/CPackCommvq.cmake" -B "$debs"
  local arch version=$VERSION
  arch=$(dpkg --print-architecture)
  local lib=$debs/${runtime}_${version}_$arch.deb dev=$debs/libcommvq-dev_${version}_$arch.deb
  list=$(dpkg-deb --contents "$lib")
  says "/usr/lib.*/libcommvq\.so\.$version\$" "$list" "$lib"
  ! grep -E '\.hpp|\.cmake|\.a$|libcommvq\.so$' <<<"$list" || fail "$lib holds development files"
  list=$(dpkg-deb --contents "$dev")
  local path
  for path in include/commvq/commvq.hpp include/commvq/c_api.h include/commvq/core/export.h \
    'lib.*/libcommvq\.so -> ' 'lib.*/cmake/commvq/commvqConfig\.cmake' \
    'lib.*/cmake/commvq/commvqConfigVersion\.cmake' 'lib.*/pkgconfig/commvq\.pc' \
    share/doc/libcommvq-dev/copyright; do
    says "\./usr/$path" "$list" "$dev"
  done
  ! grep -E '/usr/(src|tests|bin)|^-.*libcommvq\.so' <<<"$list" || fail "$dev holds too much"
  says 'libc6 .*libgomp1 .*libstdc\+\+6' "$(dpkg-deb --field "$lib" Depends)" "$lib"
  says "libeigen3-dev.*$runtime \(= $version\)" "$(dpkg-deb --field "$dev" Depends)" "$dev"

  if ((EUID != 0)) || dpkg-query --show "$runtime" libcommvq-dev >/dev/null 2>&1; then
    echo "not installed: needs root, and no commvq package installed before"
    return
  fi
  # shellcheck disable=SC2064
  trap "dpkg --purge libcommvq-dev $runtime >/dev/null" EXIT
  trap 'exit 1' INT TERM
  dpkg --install "$lib" "$dev"
  env -u PKG_CONFIG_PATH -u LD_LIBRARY_PATH "$BASH" "$0" installed_package
}

installed_package() {
  with_pkg_config "$WORK/installed_package" ""
  says "=> (/usr)?/lib/" "$(ldd "$WORK/installed_package/c_quickstart" | grep libcommvq)" ldd
  configure "$here/missing_component" "$WORK/installed_package/cmake" -DLANGUAGES=CXX \
    -DVERSION=0.1 -DCOMPONENT=commvq
}

"$@"
