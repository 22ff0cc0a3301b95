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
    tsad_crew *crew;
};

/* A node's work on the first `images` images of the grids, in tasks that need nothing of each
 * other. Node -1 puts images of a call into grid 0. */
int tsad_eye_tasks(const tsad_eye *e, int node, int images);
void tsad_eye_task(const tsad_eye *e, int node, int images, int task, const tsad_images *from);
