#!/usr/bin/env bash
# Compiles the kernels' device code with what CUDA 12.2 has, that of JetPack 6.0: its headers, libdevice and ptxas, of
# NVIDIA's packages on PyPI, which hold no nvcc; clang (16 or later) takes its place.
#
#   graphs/plugin/tests/cuda_12_2.sh FOLDER [ARCHITECTURE ...]     FOLDER: for the packages and what is compiled
#   CLANG                                                          default: clang++-16
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
architectures=("${@:2}")
[ ${#architectures[@]} -gt 0 ] || architectures=(80 86 87 90)
kernels=$(cd "$(dirname "$0")/../kernels" && pwd)
cuda=$folder/cuda

if [ ! -x "$cuda/bin/ptxas" ]; then
  # The header nv/target, macros alone, is in no package of 12.2.
  python3 -m pip download --quiet --no-deps --dest "$folder" \
    "nvidia-cuda-runtime-cu12==12.2.*" "nvidia-cuda-nvcc-cu12==12.2.*" "nvidia-cuda-cccl-cu12==12.9.*"
  for package in "$folder"/*.whl; do python3 -m zipfile -e "$package" "$folder"; done
  mkdir -p "$cuda/bin" "$cuda/include"
  cp -r "$folder/nvidia/cuda_runtime/include/." "$folder/nvidia/cuda_nvcc/include/." "$cuda/include"
  cp -r "$folder/nvidia/cuda_cccl/include/nv" "$cuda/include"
  cp -r "$folder/nvidia/cuda_nvcc/nvvm" "$cuda"
  touch "$cuda/include/curand_mtgp32_kernel.h" # clang includes it; no kernel needs it
  install "$folder/nvidia/cuda_nvcc/bin/ptxas" "$cuda/bin"
fi

for architecture in "${architectures[@]}"; do
  for source in "$kernels"/*.cu; do
    name=$folder/$(basename "$source" .cu).$architecture
    "${CLANG:-clang++-16}" -x cuda "--cuda-path=$cuda" --cuda-device-only "--cuda-gpu-arch=sm_$architecture" -std=c++17 -O3 \
      -Wall -Wextra -Werror -Wno-unknown-cuda-version -Wno-unknown-attributes -Wno-pass-failed -S "$source" -o "$name.ptx"
    "$cuda/bin/ptxas" "-arch=sm_$architecture" "$name.ptx" -o "$name.cubin"
    echo "$(basename "$source"), SM $architecture: compiled"
  done
done
