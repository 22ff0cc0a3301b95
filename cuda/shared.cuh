/* shared.cuh: what is written differently under nvcc and in the stand-in: a block's shared memory,
 * what a kernel is given, of which a GPU has one copy for all threads, and what launches it. */
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define TSAD_PRAGMA(words) _Pragma(#words)

#ifdef TSAD_EMULATE
#define TSAD_UNROLL(n) /* of the loop that follows: its reads need nothing of each other */
template <typename Arguments> using tsad_given = const Arguments &;
template <typename Arguments> auto tsad_launched(const void *kernel)
{
    return reinterpret_cast<void (*)(const Arguments &)>(const_cast<void *>(kernel));
}
#define TSAD_GLOBAL(at) ((void)0) /* it is in the memory of the device, not of a block */
/* so many threads of a block meet at its barrier of this number; all of a cluster's blocks meet */
static inline void tsad_meet_part(int number, int threads) { emulate::sync_part(number, threads); }
static inline void tsad_meet_cluster() { emulate::sync_cluster(); }
#else
#define TSAD_UNROLL(n) TSAD_PRAGMA(unroll n)
#define TSAD_GLOBAL(at) __builtin_assume(__isGlobal(at))
#define TSAD_SHARED(type, name, count) __shared__ type name[count]
#define TSAD_DYNAMIC(name) extern __shared__ __align__(16) float name[]
__device__ static inline void tsad_meet_part(int number, int threads)
{
    asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
/* What was written before is seen after by all of them. */
__device__ static inline void tsad_meet_cluster()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __trap(); /* no cluster is ever launched there */
#endif
}
template <typename Arguments> using tsad_given = Arguments;
/* CUDA 12 takes no pointer to a function here */
template <typename> const void *tsad_launched(const void *kernel) { return kernel; }
#endif
