/* shared.cuh: what is written differently under nvcc and in the stand-in: a block's shared memory,
 * and what a kernel is given, of which a GPU has one copy for all threads. */
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifdef TSAD_EMULATE
template <typename Arguments> using tsad_given = const Arguments &;
#else
#define TSAD_SHARED(type, name, count) __shared__ type name[count]
#define TSAD_DYNAMIC(name) extern __shared__ float name[]
template <typename Arguments> using tsad_given = Arguments;
#endif
