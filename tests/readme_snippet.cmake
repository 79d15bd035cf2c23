# Fails unless the C++ block of README.md is examples/quickstart.cpp, byte for byte.
# cmake -D SOURCE_DIR=<root of the project> -P readme_snippet.cmake
file(READ "${SOURCE_DIR}/README.md" readme)
file(READ "${SOURCE_DIR}/examples/quickstart.cpp" example)
string(FIND "${readme}" "```cpp\n${example}```" found)
if(found EQUAL -1)
  message(FATAL_ERROR "README.md does not hold examples/quickstart.cpp as its C++ block")
endif()
