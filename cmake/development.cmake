# Options of the library's own builds: sanitizers, fuzzers, coverage, warnings as errors. None of
# them reaches what is installed or linked by others.
set(COMMVQ_SANITIZERS "" CACHE STRING
  "Sanitizers to build everything with, e.g. address,undefined (what -fsanitize= takes)")
option(COMMVQ_BUILD_FUZZERS "Link the harnesses of tests/fuzz with libFuzzer (Clang alone)" OFF)
option(COMMVQ_COVERAGE "Count which lines run" OFF)
option(COMMVQ_WARNINGS_AS_ERRORS "Stop at a warning of the compiler" OFF)
if(COMMVQ_SANITIZERS)
  set(commvq_sanitized ON)
else()
  set(commvq_sanitized OFF)
endif()
option(COMMVQ_PRECOMPILE_HEADERS "Compile headers of others once for a target" ${commvq_sanitized})
mark_as_advanced(COMMVQ_SANITIZERS COMMVQ_BUILD_FUZZERS COMMVQ_COVERAGE COMMVQ_WARNINGS_AS_ERRORS
  COMMVQ_PRECOMPILE_HEADERS)

if(COMMVQ_SANITIZERS)
  # A finding ends the program; without frame pointers and lines it could not be understood.
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${COMMVQ_SANITIZERS}>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fno-sanitize-recover=all>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fno-omit-frame-pointer>
    $<$<COMPILE_LANGUAGE:C,CXX>:-gline-tables-only>)
  add_link_options(-fsanitize=${COMMVQ_SANITIZERS})
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    add_compile_options(
      $<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize-ignorelist=${CMAKE_CURRENT_LIST_DIR}/sanitizer_ignorelist.txt>)
  endif()
endif()
if(COMMVQ_BUILD_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "COMMVQ_BUILD_FUZZERS needs Clang; the compiler is "
      "${CMAKE_CXX_COMPILER_ID}: use the preset fuzz")
  endif()
endif()
if(COMMVQ_COVERAGE)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "COMMVQ_COVERAGE needs Clang; the compiler is ${CMAKE_CXX_COMPILER_ID}")
  endif()
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fprofile-instr-generate>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fcoverage-mapping>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fprofile-list=${CMAKE_CURRENT_LIST_DIR}/coverage_list.txt>)
  add_link_options(-fprofile-instr-generate)
endif()

# What fuzzers feed: tells libFuzzer which branches an input takes.
add_library(commvq_fuzzed INTERFACE)
if(COMMVQ_BUILD_FUZZERS)
  target_compile_options(commvq_fuzzed INTERFACE
    $<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=fuzzer-no-link>)
endif()

# GCC 12 believes that strings overlap or have no end, in what it takes for our code: with little
# optimisation and in precompiled headers.
set(commvq_wrong_string_warnings -Wno-array-bounds -Wno-stringop-overflow -Wno-stringop-overread)

# With a sanitizer, and without optimisation, half of the time that compiling takes is for headers of
# others. Other builds prove that every file of the library includes what it needs.
function(commvq_precompile_headers target)
  if(COMMVQ_PRECOMPILE_HEADERS)
    target_precompile_headers(${target} PRIVATE ${ARGN})
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANG_AND_ID:CXX,Clang>:-fpch-instantiate-templates>
      "$<$<COMPILE_LANG_AND_ID:CXX,GNU>:${commvq_wrong_string_warnings}>")
  endif()
endfunction()

# The warnings of the library's own code. Sizes and positions are signed throughout (Index), so that
# Clang's -Wsign-conversion, which GCC does not count to -Wconversion, is off. Known to be wrong: GCC
# 12's -Wuninitialized and -Wmaybe-uninitialized on Eigen's vectors and -Wrestrict on
# std::string (GCC bug 105651); Clang's -Wpass-failed, which names a loop of #pragma omp simd that
# stays as it is. And -Wpsabi: vectors are passed between functions of the library alone, which share
# one instruction set, so that it does not matter that their calling convention differs by it.
add_library(commvq_warnings INTERFACE)
target_compile_options(commvq_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Wconversion -Wshadow -Wno-uninitialized -Wno-psabi>
  $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized -Wno-restrict>
  $<$<COMPILE_LANG_AND_ID:CXX,Clang>:-Wno-sign-conversion -Wno-pass-failed>
  $<$<AND:$<BOOL:${COMMVQ_WARNINGS_AS_ERRORS}>,$<COMPILE_LANGUAGE:C,CXX>>:-Werror>)
