# Finds onnxruntime's headers: OnnxRuntime_FOUND, OnnxRuntime_VERSION, and the target OnnxRuntime::headers. A library of
# custom operators links to no onnxruntime. ONNXRUNTIME_ROOT, a CMake or an environment variable, names an unpacked
# archive.
include(FindPackageHandleStandardArgs)

set(_roots "${ONNXRUNTIME_ROOT}" "$ENV{ONNXRUNTIME_ROOT}" /usr /usr/local /usr/local/onnxruntime /opt/onnxruntime)
find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ${_roots}
          PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session)

if(OnnxRuntime_INCLUDE_DIR)
  file(STRINGS "${OnnxRuntime_INCLUDE_DIR}/onnxruntime_c_api.h" _line REGEX "#define ORT_API_VERSION [0-9]+")
  if(_line MATCHES "ORT_API_VERSION ([0-9]+)")
    set(OnnxRuntime_VERSION "1.${CMAKE_MATCH_1}")
  endif()
endif()

find_package_handle_standard_args(OnnxRuntime REQUIRED_VARS OnnxRuntime_INCLUDE_DIR VERSION_VAR OnnxRuntime_VERSION)
if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::headers)
  add_library(OnnxRuntime::headers INTERFACE IMPORTED)
  set_target_properties(OnnxRuntime::headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${OnnxRuntime_INCLUDE_DIR}")
endif()
mark_as_advanced(OnnxRuntime_INCLUDE_DIR)
