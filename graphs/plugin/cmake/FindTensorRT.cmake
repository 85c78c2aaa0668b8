# Finds TensorRT: TensorRT_FOUND, TensorRT_VERSION, and the targets TensorRT::nvinfer and, where found,
# TensorRT::nvonnxparser. TENSORRT_ROOT, a CMake or an environment variable, names an unpacked archive.
include(FindPackageHandleStandardArgs)

set(_roots "${TENSORRT_ROOT}" "$ENV{TENSORRT_ROOT}" /usr /usr/local/tensorrt /opt/tensorrt)
set(_triplet "${CMAKE_SYSTEM_PROCESSOR}-linux-gnu")
find_path(TensorRT_INCLUDE_DIR NvInfer.h HINTS ${_roots} PATH_SUFFIXES include "include/${_triplet}")
find_library(TensorRT_LIBRARY nvinfer HINTS ${_roots} PATH_SUFFIXES lib lib64 "lib/${_triplet}" "targets/${_triplet}/lib")
find_library(TensorRT_PARSER_LIBRARY nvonnxparser HINTS ${_roots} PATH_SUFFIXES lib lib64 "lib/${_triplet}")

if(TensorRT_INCLUDE_DIR)
  # 8.6 and 10.0 define NV_TENSORRT_MAJOR as a number, later ones through TRT_MAJOR_ENTERPRISE
  file(STRINGS "${TensorRT_INCLUDE_DIR}/NvInferVersion.h" _lines REGEX "#define (NV_TENSORRT|TRT)_[A-Z_]+ ")
  set(_version "")
  foreach(part IN ITEMS MAJOR MINOR PATCH)
    if(_lines MATCHES "(NV_TENSORRT_${part}|TRT_${part}_ENTERPRISE) ([0-9]+)")
      list(APPEND _version ${CMAKE_MATCH_2})
    endif()
  endforeach()
  list(JOIN _version "." TensorRT_VERSION)
endif()

find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR
                                  VERSION_VAR TensorRT_VERSION)
foreach(name IN ITEMS nvinfer nvonnxparser)
  set(_library "${TensorRT_LIBRARY}")
  if(name STREQUAL nvonnxparser)
    set(_library "${TensorRT_PARSER_LIBRARY}")
  endif()
  if(TensorRT_FOUND AND _library AND NOT TARGET TensorRT::${name})
    add_library(TensorRT::${name} UNKNOWN IMPORTED)
    set_target_properties(TensorRT::${name} PROPERTIES
      IMPORTED_LOCATION "${_library}"
      INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR}")
  endif()
endforeach()
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY TensorRT_PARSER_LIBRARY)
