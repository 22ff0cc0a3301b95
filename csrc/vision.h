/* vision.h: an image encoder as a list of nodes over grids: what net/resnet.c describes, and what a
 * backend packs and runs. No hardware.
 */
#pragma once

#include "base.h"

#include <stdatomic.h>

enum { TSAD_MAX_GRIDS = 24, TSAD_MAX_GRID_NODES = 128 };
enum { TSAD_NORM_GROUP = 16 }; /* channels of a GroupNorm's group */
enum { TSAD_POOL = 3 };        /* side of the max pooling's window */

/* Numbers over rows and columns of pixels, a pixel's channels beside each other; around them a
 * border of zeros. */
typedef struct tsad_grid {
    int height, width, channels;
    int halo; /* pixels of border at each side */
    int ld;   /* floats of a pixel: its channels, padded where several panels of them are written */
    bool rounded; /* in 16 bits, too: a number of an image is an integer times the image's unit */
} tsad_grid;

typedef enum tsad_grid_kind {
    TSAD_GRID_CONV, /* sums start from the bias, and from what is in `out` where residual == out */
    TSAD_GRID_NORM, /* GroupNorm, then the residual is added */
    TSAD_GRID_MAXPOOL,
    TSAD_GRID_ROUND,    /* in == out, what the node before made, to 16 bits */
    TSAD_GRID_KEYPOINTS /* out (1, 1, 2 * channels of in): x, y of each channel's softmax */
} tsad_grid_kind;

typedef struct tsad_grid_node {
    tsad_grid_kind kind;
    int in, out;
    int residual; /* grid, -1: none */
    int kernel, stride, pad;
    bool relu;
    bool rounded, bytes; /* a CONV of `in` and weights in 16 bits; of weights in 8 */
    /* CONV: torch's (c_out, c_in, kernel, kernel) and (c_out) or NULL; NORM: gain and shift (c).
     * Borrowed from the specification: NULL once they are packed. */
    const float *weight, *bias;
    float temperature; /* of KEYPOINTS */
} tsad_grid_node;

struct tsad_backend;
struct tsad_eye;

struct tsad_vision {
    atomic_int busy;
    const struct tsad_backend *backend;
    struct tsad_eye *eye; /* the backend's memory and threads */
    int n_threads, n_keypoints, n_features;
    /* grid 0 is the image, the last one the features */
    tsad_grid grids[TSAD_MAX_GRIDS];
    tsad_grid_node nodes[TSAD_MAX_GRID_NODES];
    int n_grids, n_nodes;
    float scale[TSAD_MAX_CHANNELS], offset[TSAD_MAX_CHANNELS];
};

/* floats from one row of a grid to the next, and of a whole one with its border */
static inline size_t tsad_grid_row(const tsad_grid *g)
{
    return (size_t)(g->width + 2 * g->halo) * (size_t)g->ld;
}

static inline size_t tsad_grid_floats(const tsad_grid *g)
{
    return (size_t)(g->height + 2 * g->halo) * tsad_grid_row(g);
}

tsad_status tsad_net_resnet(const tsad_vision_spec *spec, tsad_vision *vision);
