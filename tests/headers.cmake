# Every public header compiles alone, with the host's compiler and no warning: one test each.
get_target_property(eigen_directories Eigen3::Eigen INTERFACE_INCLUDE_DIRECTORIES)
set(header_flags -fsyntax-only -Wall -Wextra -Wconversion -Wno-sign-conversion -Wshadow -Werror
  -I${PROJECT_SOURCE_DIR}/include)
foreach(directory IN LISTS eigen_directories)
  list(APPEND header_flags -isystem ${directory})
endforeach()

file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/include
  ${PROJECT_SOURCE_DIR}/include/*.hpp ${PROJECT_SOURCE_DIR}/include/*.h)
foreach(header IN LISTS headers)
  if(header MATCHES "dlpack" AND NOT DLPACK_INCLUDE_DIR)
    continue()
  endif()
  add_test(NAME header.${header} COMMAND ${CMAKE_CXX_COMPILER} -x c++ -std=c++20 ${header_flags}
    ${OpenMP_CXX_FLAGS} -include ${header} /dev/null)
  if(header MATCHES "c_api\\.h$")
    add_test(NAME header.${header}.c11 COMMAND ${CMAKE_CXX_COMPILER} -x c -std=c11
      -pedantic-errors -Wconversion ${header_flags} -include ${header} /dev/null)
  endif()
endforeach()
