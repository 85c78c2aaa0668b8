# onnxruntime's C headers and library: OnnxRuntime_INCLUDE_DIR and OnnxRuntime_LIBRARY. ONNXRUNTIME_ROOT, a CMake or an
# environment variable, names an unpacked archive; OnnxRuntime_LIBRARY may be given, such as the one in Python's package.
include(FindPackageHandleStandardArgs)
set(_roots "${ONNXRUNTIME_ROOT}" "$ENV{ONNXRUNTIME_ROOT}" /usr /usr/local /usr/local/onnxruntime /opt/onnxruntime)
find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_c_api.h HINTS ${_roots}
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session)
find_library(OnnxRuntime_LIBRARY onnxruntime HINTS ${_roots} PATH_SUFFIXES lib lib64)
find_package_handle_standard_args(OnnxRuntime REQUIRED_VARS OnnxRuntime_LIBRARY OnnxRuntime_INCLUDE_DIR)
mark_as_advanced(OnnxRuntime_INCLUDE_DIR OnnxRuntime_LIBRARY)
