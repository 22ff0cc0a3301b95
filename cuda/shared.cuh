/* shared.cuh: what is written differently under nvcc and in the stand-in: a block's shared memory,
 * what a kernel is given, of which a GPU has one copy for all threads, and what launches it. */
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifdef TSAD_EMULATE
template <typename Arguments> using tsad_given = const Arguments &;
template <typename Arguments> auto tsad_launched(const void *kernel)
{
    return reinterpret_cast<void (*)(const Arguments &)>(const_cast<void *>(kernel));
}
#else
#define TSAD_SHARED(type, name, count) __shared__ type name[count]
#define TSAD_DYNAMIC(name) extern __shared__ float name[]
template <typename Arguments> using tsad_given = Arguments;
/* CUDA 12 takes no pointer to a function here */
template <typename> const void *tsad_launched(const void *kernel) { return kernel; }
#endif
