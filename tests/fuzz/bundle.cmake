# bundle/ in the build folder: everything that fuzzing needs on another x86-64 machine. The
# libraries that the packages of Clang, PCRE2 and utf8proc bring lie beside the harnesses.
set(bundle ${CMAKE_BINARY_DIR}/bundle)
set_target_properties(${fuzzers} PROPERTIES
  RUNTIME_OUTPUT_DIRECTORY ${bundle}/bin
  BUILD_RPATH "$ORIGIN/../lib"
  BUILD_WITH_INSTALL_RPATH OFF)

find_library(fuzz_openmp NAMES libomp.so.5 PATHS /usr/lib/llvm-14/lib REQUIRED)
find_library(fuzz_pcre2 NAMES libpcre2-8.so.0 REQUIRED)
find_library(fuzz_utf8proc NAMES libutf8proc.so.2 REQUIRED)
add_custom_target(fuzz_bundle ALL DEPENDS ${fuzzers}
  COMMAND ${CMAKE_COMMAND} -E make_directory ${bundle}/lib
  COMMAND cp --dereference ${fuzz_openmp} ${fuzz_pcre2} ${fuzz_utf8proc} ${bundle}/lib
  COMMAND ${CMAKE_COMMAND} -E copy_directory ${CMAKE_CURRENT_SOURCE_DIR}/corpus ${bundle}/seeds
  COMMAND ${CMAKE_COMMAND} -E copy_directory
    ${CMAKE_CURRENT_SOURCE_DIR}/dictionaries ${bundle}/dictionaries
  COMMAND cp ${CMAKE_CURRENT_SOURCE_DIR}/run.sh ${bundle})
