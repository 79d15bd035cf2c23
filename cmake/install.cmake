# What `cmake --install` copies: headers, libraries, the CMake package and the pkg-config files.
# Components: runtime (the shared library), development (all else).
include(CMakePackageConfigHelpers)

set(commvq_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/commvq)
install(DIRECTORY include/commvq DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development
  FILES_MATCHING PATTERN "*.hpp" PATTERN "*.h")

# One set of targets for each component of find_package, so that it looks for no more than it needs.
set(commvq_cuda_target)
if(TARGET commvq_cuda)
  set(commvq_cuda_target cuda)
  set_target_properties(commvq_cuda commvq_cuda_learner PROPERTIES POSITION_INDEPENDENT_CODE ON)
  install(TARGETS commvq_cuda commvq_cuda_learner EXPORT commvq_cuda COMPONENT development)
endif()
install(TARGETS commvq_core EXPORT commvq_core)
install(TARGETS commvq EXPORT commvq_commvq
  LIBRARY COMPONENT runtime NAMELINK_COMPONENT development
  ARCHIVE COMPONENT development)
foreach(component IN ITEMS core commvq ${commvq_cuda_target})
  install(EXPORT commvq_${component} NAMESPACE commvq:: FILE commvq-${component}-targets.cmake
    DESTINATION ${commvq_package_dir} COMPONENT development)
endforeach()

configure_package_config_file(cmake/commvqConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/commvqConfig.cmake INSTALL_DESTINATION ${commvq_package_dir}
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/commvqConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/commvqConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/commvqConfigVersion.cmake
  DESTINATION ${commvq_package_dir} COMPONENT development)

# pkg-config files find the tree from where they lie, so that it can be moved.
set(commvq_pc_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH commvq_pc_prefix /${commvq_pc_dir} /)
get_target_property(commvq_type commvq TYPE)
if(commvq_type STREQUAL "STATIC_LIBRARY")
  set(commvq_pc_static_libs "-lstdc++ -lm")
endif()
foreach(name IN ITEMS commvq-core commvq)
  configure_file(cmake/${name}.pc.in ${CMAKE_CURRENT_BINARY_DIR}/${name}.pc @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/${name}.pc DESTINATION ${commvq_pc_dir}
    COMPONENT development)
endforeach()
