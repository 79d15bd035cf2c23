# The CUDA backend, commvq::cuda: on where a toolkit is found (AUTO), always (ON) or never (OFF).
if(COMMVQ_ENABLE_CUDA STREQUAL "OFF")
  return()
endif()

# An architecture must be set before the language is enabled; "native" fails where there is no
# device. The last one is PTX for later devices.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;86-real;89-real;90a-real;90-virtual" CACHE STRING "CUDA architectures")
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(COMMVQ_ENABLE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "COMMVQ_ENABLE_CUDA is ON, but no CUDA compiler was found: set CUDACXX to "
      "nvcc, or COMMVQ_ENABLE_CUDA to OFF")
  endif()
  message(STATUS "No CUDA compiler: the CUDA backend is not built")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12.0 REQUIRED)

file(GLOB_RECURSE commvq_cuda_sources CONFIGURE_DEPENDS
  ${CMAKE_CURRENT_SOURCE_DIR}/kernels/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/kernels/*.cpp)
add_library(commvq_cuda STATIC ${commvq_cuda_sources})
add_library(commvq::cuda ALIAS commvq_cuda)
target_include_directories(commvq_cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/kernels)
target_link_libraries(commvq_cuda PUBLIC commvq
  PRIVATE CUDA::cudart_static $<BUILD_INTERFACE:commvq_warnings>)
# CMake 3.25 knows no C++20 flag for newer nvcc; without an explicit standard it adds none.
set_target_properties(commvq_cuda PROPERTIES CUDA_STANDARD_REQUIRED OFF)
target_compile_options(commvq_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -Xcompiler=-Wall,-Wextra>)
