/* shared.cuh: names of a block's shared memory, under nvcc and in the stand-in alike. */
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifndef TSAD_EMULATE
#define TSAD_SHARED(type, name, count) __shared__ type name[count]
#define TSAD_DYNAMIC(name) extern __shared__ float name[]
#endif
