# The CUDA library, pykernels_cuda.so: CUTLASS kernels behind the LibTorch Stable ABI. It needs nvcc and the CUTLASS headers,
# but neither a GPU nor a CUDA build of torch. PYKERNELS_CUDA=auto builds it only beside a torch that has CUDA, since no other
# loads it and nvcc takes ten minutes.

# pykernels_find_cuda(<reason>): sets <reason> to why the library cannot be built here, or to nothing.
function(pykernels_find_cuda reason)
  if(PYKERNELS_EMULATE OR PYKERNELS_SANITIZE)
    set(${reason} "this build is for tests of the CPU kernels" PARENT_SCOPE)
    return()
  endif()
  find_program(PYKERNELS_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT PYKERNELS_NVCC)
    set(${reason} "nvcc was not found in PATH, CUDA_HOME or /usr/local/cuda" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${PYKERNELS_NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" ignored "${version}")
  if(NOT CMAKE_MATCH_1 OR CMAKE_MATCH_1 VERSION_LESS 12.4)
    set(${reason} "${PYKERNELS_NVCC} is CUDA '${CMAKE_MATCH_1}', and 12.4 or newer is needed" PARENT_SCOPE)
    return()
  endif()
  set(folder "${PYKERNELS_CUTLASS}")
  if(NOT folder)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; s = u.find_spec('cutlass_library'); \
print(s.submodule_search_locations[0] + '/source/include' if s else '')"
      OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(NOT EXISTS "${folder}/cutlass/cutlass.h")
    set(${reason} "the CUTLASS headers were not found: pip install --no-deps nvidia-cutlass==4.2.0.0" PARENT_SCOPE)
    return()
  endif()
  if(NOT EXISTS "${folder}/../tools/util/include/cutlass/util/packed_stride.hpp")
    set(${reason} "${folder} has no ../tools/util/include beside it, as a CUTLASS release has" PARENT_SCOPE)
    return()
  endif()
  set(CUTLASS_INCLUDE "${folder}" "${folder}/../tools/util/include" PARENT_SCOPE)
  include(CheckLanguage)
  set(ENV{CUDACXX} ${PYKERNELS_NVCC})
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(${reason} "${PYKERNELS_NVCC} compiles nothing with ${CMAKE_CXX_COMPILER} as its host compiler" PARENT_SCOPE)
    return()
  endif()
  set(${reason} "" PARENT_SCOPE)
endfunction()

string(TOLOWER "${PYKERNELS_CUDA}" PYKERNELS_CUDA)
if(NOT PYKERNELS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "PYKERNELS_CUDA must be auto, on or off, not '${PYKERNELS_CUDA}'")
elseif(PYKERNELS_CUDA STREQUAL "off")
  message(STATUS "CUDA library: off, as PYKERNELS_CUDA says")
  return()
elseif(PYKERNELS_CUDA STREQUAL "auto")
  file(STRINGS ${TORCH_ROOT}/version.py torch_cuda REGEX "^cuda[^=]*= *'[0-9]")
  if(NOT torch_cuda)
    message(STATUS "CUDA library: off, since torch is built without CUDA; PYKERNELS_CUDA=on builds it nevertheless")
    return()
  endif()
endif()
pykernels_find_cuda(missing)
if(missing AND PYKERNELS_CUDA STREQUAL "on")
  message(FATAL_ERROR "PYKERNELS_CUDA=on, but ${missing}")
elseif(missing)
  message(STATUS "CUDA library: off, since ${missing}")
  return()
endif()

if(CMAKE_CXX_COMPILER_LAUNCHER AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # each target names its own
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
list(GET CUTLASS_INCLUDE 0 cutlass)
message(STATUS "CUDA library: on, nvcc ${CMAKE_CUDA_COMPILER_VERSION}, CUTLASS in ${cutlass}")

# One object takes a minute or more, and 3 GB.
set(PYKERNELS_NVCC_JOBS 2 CACHE STRING "How many CUDA sources Ninja compiles at a time")
set_property(GLOBAL APPEND PROPERTY JOB_POOLS nvcc=${PYKERNELS_NVCC_JOBS})

# pykernels_cuda_kernels(<target> <architectures> <sources>): as csrc/cuda/vec.h asks, no product is contracted. Without
# NDEBUG an assert's call would make ptxas serialise the wgmma instructions.
function(pykernels_cuda_kernels target architectures)
  add_library(${target} OBJECT ${ARGN})
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_STANDARD 17
                                             CUDA_STANDARD_REQUIRED ON JOB_POOL_COMPILE nvcc)
  target_include_directories(${target} PRIVATE csrc ${names_folder})
  target_include_directories(${target} SYSTEM PRIVATE ${CUTLASS_INCLUDE})
  target_compile_definitions(${target} PRIVATE NDEBUG PYKERNELS_ISA_NS=cuda PYKERNELS_ISA_CUDA)
  target_compile_options(${target} PRIVATE -fmad=false --expt-relaxed-constexpr -Xcompiler=-Wno-psabi
                                           -Xcompiler=-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=)
endfunction()

# Machine code of sm_80 runs on 8.6 and 8.9, too, and its PTX is compiled by the driver of anything newer. That of sm_90a
# is of no use on anything newer: only the emulator reads it.
set(sm90a 90a-real)
if(PYKERNELS_CUDA_TESTS)
  set(sm90a 90a)
endif()
pykernels_cuda_kernels(kernels_sm80 80
  csrc/cuda/gemm/sm80_128x256x64.cu
  csrc/cuda/gemm/sm80_128x128x64.cu
  csrc/cuda/gemm/sm80_64x64x128.cu
  csrc/cuda/gemm/sm80_16x64x128.cu)
# These use nothing that 9.0 alone has, but are fastest by machine code of its own.
pykernels_cuda_kernels(kernels_few_channels "80;90-real"
  csrc/cuda/conv/few_channels_3x3.cu
  csrc/cuda/conv/few_channels_5x5.cu
  csrc/cuda/conv/few_channels_7x7.cu)
pykernels_cuda_kernels(kernels_sm90 ${sm90a}
  csrc/cuda/gemm/sm90_128x256x128.cu
  csrc/cuda/gemm/sm90_128x128x128.cu
  csrc/cuda/gemm/sm90_64x128x128.cu
  csrc/cuda/gemm/sm90_64x64x256.cu
  csrc/cuda/gemm/sm90_16x64x256.cu
  csrc/cuda/conv/sm90_128x256x128.cu
  csrc/cuda/conv/sm90_128x128x128.cu
  csrc/cuda/conv/sm90_128x64x64.cu
  csrc/cuda/conv/sm90_64x128x128.cu)

add_library(pykernels_cuda MODULE
  csrc/cuda/stream.cpp
  csrc/cuda/epilogue/arguments.cpp
  csrc/cuda/conv/config.cpp
  csrc/cuda/conv/few_channels.cpp
  csrc/cuda/conv/op.cpp
  csrc/cuda/gemm/config.cpp
  csrc/cuda/gemm/op.cpp
  $<TARGET_OBJECTS:kernels_sm80>
  $<TARGET_OBJECTS:kernels_few_channels>
  $<TARGET_OBJECTS:kernels_sm90>)
target_compile_definitions(pykernels_cuda PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_include_directories(pykernels_cuda SYSTEM PRIVATE ${TORCH_ROOT}/include)
# The CUDA runtime stands inside: torch's own may be of another version. Both use the device's one primary context.
target_link_libraries(pykernels_cuda PRIVATE pykernels_flags CUDA::cudart_static ${TORCH_ROOT}/lib/libtorch_cpu.so)
target_link_options(pykernels_cuda PRIVATE -Wl,--gc-sections -Wl,--as-needed
                    -Wl,--version-script=${CMAKE_SOURCE_DIR}/csrc/exports.map)
set_target_properties(pykernels_cuda PROPERTIES
  PREFIX "" SUFFIX ".so" BUILD_RPATH "" SKIP_BUILD_RPATH ON LINKER_LANGUAGE CXX
  LINK_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/exports.map)

# The same objects on the emulator instead of the CUDA runtime, for the tests to load: not installed, but left where they look.
if(PYKERNELS_CUDA_TESTS)
  add_library(pykernels_cuda_emulated MODULE
    csrc/cuda/conv/config.cpp
    csrc/cuda/conv/few_channels.cpp
    csrc/cuda/gemm/config.cpp
    tests/emulator/assemble.cpp
    tests/emulator/convert.cpp
    tests/emulator/copy.cpp
    tests/emulator/entry.cpp
    tests/emulator/machine.cpp
    tests/emulator/memory.cpp
    tests/emulator/ptx.cpp
    tests/emulator/runtime.cpp
    tests/emulator/scalar.cpp
    tests/emulator/synchronize.cpp
    tests/emulator/tensor_core.cpp
    tests/emulator/tensor_map.cpp
    $<TARGET_OBJECTS:kernels_sm80>
    $<TARGET_OBJECTS:kernels_few_channels>
    $<TARGET_OBJECTS:kernels_sm90>)
  target_include_directories(pykernels_cuda_emulated PRIVATE tests)
  target_include_directories(pykernels_cuda_emulated SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  find_package(Threads REQUIRED)
  target_link_libraries(pykernels_cuda_emulated PRIVATE pykernels_flags Threads::Threads)
  # integers wrap as the device's do, and registers hold what was last put there
  target_compile_options(pykernels_cuda_emulated PRIVATE -fwrapv -fno-strict-aliasing)
  target_link_options(pykernels_cuda_emulated PRIVATE -Wl,--no-undefined)
  set_target_properties(pykernels_cuda_emulated PROPERTIES
    PREFIX "" SUFFIX ".so" LINKER_LANGUAGE CXX LIBRARY_OUTPUT_DIRECTORY ${CMAKE_SOURCE_DIR}/tests/emulator)
endif()
