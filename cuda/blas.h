/* blas.h: NVIDIA's cuBLAS, for products of many rows, where it is here: found at run time and never
 * linked, so that the same library does without it. float32 in, float32 summed; multiplied as such,
 * or rounded to TF32 first.
 */
#pragma once

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Takes the library at this path, for streams made from now on. Why not; NULL: it is there. */
const char *tsad_blas_load(const char *path);
const char *tsad_blas_version(void); /* "" without one */
int tsad_blas_major(void);           /* of CUDA's runtime here, and of cuBLAS that goes with it */

/* TSAD_CUDA_BLAS: from how many rows of a launch on cuBLAS is asked; 0: never */
enum { TSAD_BLAS_ROWS = 64 };
tsad_status tsad_blas_rows(int *rows);

/* What a stream's products of so many rows and more need. Nothing of it is freed here. */
typedef struct tsad_blas_room {
    int rows;
    float *columns, *sums; /* inputs and outputs of a launch, side by side */
    size_t columns_floats, sums_floats;
    void *workspace; /* cuBLAS's own: it allocates nothing in a chunk */
    size_t workspace_bytes;
} tsad_blas_room;
size_t tsad_blas_workspace(void); /* bytes that are worth having on this GPU */
tsad_status tsad_blas_open(tsad_stream *stream, tsad_blas_room room);
void tsad_blas_close(tsad_stream *stream); /* one that was never opened is fine */
const tsad_blas_room *tsad_blas_room_of(const tsad_stream *stream); /* NULL: it has none */

/* y (rows, outputs) = x (rows, inputs), its rows ldx apart, times w (inputs, outputs) */
void tsad_blas_multiply(tsad_stream *stream, const float *x, int ldx, const float *w, int rows,
                        int inputs, int outputs, float *y, bool tf32);

#ifdef __cplusplus
}
#endif
