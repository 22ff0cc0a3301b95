/* eye.h: the CPU's image encoder: packed weights, grids for some images at once, and the threads
 * that share a node's tasks.
 */
#pragma once

#include "../vision.h"
#include "cpu.h"

/* Weights of a convolution in panels of output channels, (panels, kernel, run, panel): a row of the
 * window is `run` inputs that lie beside each other. */
typedef struct tsad_conv {
    const float *w, *bias; /* bias: padded, zeros where there is none */
    int run, panels;
    bool wino; /* winograd.c: w is (panels, 16, c_in, panel) */
} tsad_conv;

/* Where the threads of a call find their next task. */
typedef struct tsad_crew {
    /* phase << 32 | next task; phases number the gangs' nodes from 1, 0 is before, NO_PHASE after
     */
    _Alignas(64) atomic_ullong ticket;
    _Alignas(64) atomic_int done; /* tasks of this phase */
} tsad_crew;

struct tsad_eye {
    const tsad_vision *vision;
    const tsad_kernels *kernels;
    int n_threads, gang; /* images that go through the nodes together */
    tsad_arena weights, memory;
    tsad_conv *convs; /* (n_nodes) */
    float **grids;    /* (n_grids) pixel (0, 0) of image 0 */
    float *bytes;     /* (channels, 256) what the trunk sees of a byte */
    float **scratch;  /* (n_threads) */
    tsad_crew *crew;
};

/* A node's work on the first `images` images of the grids, in tasks that need nothing of each
 * other, on thread `rank`. Node -1 puts images of a call into grid 0. */
int tsad_eye_tasks(const tsad_eye *e, int node, int images);
void tsad_eye_task(const tsad_eye *e, int node, int images, int task, int rank,
                   const tsad_images *from);

static inline int tsad_over(int n, int by) { return (n + by - 1) / by; }

/* pixel (0, 0) of an image in a grid */
static inline float *tsad_eye_image(const tsad_eye *e, int grid, int image)
{
    return e->grids[grid] + (size_t)image * tsad_grid_floats(&e->vision->grids[grid]);
}

/* n pixels in tiles as equal as can be */
void tsad_run_tiles(const tsad_kernels *k, tsad_tile t, int n);
/* what strip i of n has of so many pixels, in whole tiles */
typedef struct tsad_strip {
    int begin, end;
} tsad_strip;
tsad_strip tsad_strip_of(const tsad_kernels *k, int pixels, int i, int n);

/* ---- winograd.c ---------------------------------------------------------------------------- */

bool tsad_wino_fits(const tsad_eye *e, const tsad_grid_node *node);
size_t tsad_wino_scratch(const tsad_eye *e, const tsad_grid_node *node); /* floats of a thread */
void tsad_wino_pack(const tsad_eye *e, const tsad_grid_node *node, float *w);
int tsad_wino_tasks(const tsad_eye *e, const tsad_grid_node *node, int images);
void tsad_wino_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task, int rank);
