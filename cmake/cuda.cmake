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

# A target of the backend from its kernel folders. CMake 3.25 knows no C++20 flag for newer nvcc;
# without an explicit standard it adds none.
function(commvq_add_cuda_library name)
  set(sources)
  foreach(folder IN LISTS ARGN)
    file(GLOB_RECURSE of_folder CONFIGURE_DEPENDS
      ${PROJECT_SOURCE_DIR}/kernels/${folder}/*.cu ${PROJECT_SOURCE_DIR}/kernels/${folder}/*.cpp)
    list(APPEND sources ${of_folder})
  endforeach()
  add_library(commvq_${name} STATIC ${sources})
  add_library(commvq::${name} ALIAS commvq_${name})
  target_include_directories(commvq_${name} PRIVATE ${PROJECT_SOURCE_DIR}/kernels)
  target_link_libraries(commvq_${name} PUBLIC commvq
    PRIVATE CUDA::cudart_static $<BUILD_INTERFACE:commvq_warnings>)
  set_target_properties(commvq_${name} PROPERTIES EXPORT_NAME ${name} CUDA_STANDARD_REQUIRED OFF)
  target_compile_options(commvq_${name} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -Xcompiler=-Wall,-Wextra>)
endfunction()

# What an inference engine links, and the learners apart: they need cuBLAS.
commvq_add_cuda_library(cuda append decode_attention prepare)
commvq_add_cuda_library(cuda_learner key_learner value_trainer)
target_include_directories(commvq_cuda_learner PRIVATE ${PROJECT_SOURCE_DIR}/src)
target_link_libraries(commvq_cuda_learner PRIVATE CUDA::cublas)
