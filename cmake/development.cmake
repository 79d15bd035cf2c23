# Options of the library's own builds: sanitizers, fuzzers, coverage, warnings as errors. None of
# them reaches what is installed or linked by others.
set(COMMVQ_SANITIZERS "" CACHE STRING
  "Sanitizers to build everything with, e.g. address,undefined (what -fsanitize= takes)")
option(COMMVQ_BUILD_FUZZERS "Link the harnesses of tests/fuzz with libFuzzer (Clang alone)" OFF)
option(COMMVQ_COVERAGE "Count which lines run" OFF)
option(COMMVQ_WARNINGS_AS_ERRORS "Stop at a warning of the compiler" OFF)
mark_as_advanced(COMMVQ_SANITIZERS COMMVQ_BUILD_FUZZERS COMMVQ_COVERAGE COMMVQ_WARNINGS_AS_ERRORS)

if(COMMVQ_SANITIZERS)
  # A finding ends the program; without frame pointers and lines it could not be understood.
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${COMMVQ_SANITIZERS}>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fno-sanitize-recover=all>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fno-omit-frame-pointer>
    $<$<COMPILE_LANGUAGE:C,CXX>:-gline-tables-only>)
  add_link_options(-fsanitize=${COMMVQ_SANITIZERS})
endif()
if(COMMVQ_BUILD_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "COMMVQ_BUILD_FUZZERS needs Clang; the compiler is "
      "${CMAKE_CXX_COMPILER_ID}: use the preset fuzz")
  endif()
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=fuzzer-no-link>)
endif()
if(COMMVQ_COVERAGE)
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:--coverage>)
  add_link_options(--coverage)
endif()
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  # It says so where it leaves a loop of #pragma omp simd as it is, which is no defect.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wno-pass-failed>)
endif()
