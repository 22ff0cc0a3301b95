/* eye.h: the CPU's image encoder: packed weights, grids for some images at once, and the threads
 * that share a node's tasks.
 */
#pragma once

#include "../vision.h"
#include "cpu.h"

/* Weights of a convolution in panels of output channels, (panels, lines, run, panel). A line is
 * `run` inputs that lie beside each other: a row of the window, or, of a large one, a pixel. */
typedef struct tsad_conv {
    const float *w, *bias; /* bias: padded, zeros where there is none */
    int lines, run, panels;
    bool by_pixels;
    bool wino; /* winograd.c: w is (panels, 16, c_in, panel) */
    /* in 16 bits or 8, in the place of w: (panels, lines, pairs of a run, panel, 2), and the units
     * of the channels, padded; Winograd's (panels, 16, pairs of c_in, panel, 2), (panels, 16,
     * panel)
     */
    tsad_weights16 q;
    const float *unit;
} tsad_conv;

enum { TSAD_WINDOW = 576 };    /* numbers of a window from which on it is large */
enum { TSAD_WINO_PART = 256 }; /* input channels that are summed in integers */

/* Where the threads of a call find their next task. */
typedef struct tsad_crew {
    /* phase << 32 | next task; phases number the gangs' nodes from 1, 0 is before, NO_PHASE after
     */
    _Alignas(64) atomic_ullong ticket;
    _Alignas(64) atomic_int done; /* tasks of this phase */
    unsigned turn;                /* this phase, of all calls */
} tsad_crew;

/* A thread's own: what it made of its last task's strip serves for the strip's other panels. */
typedef struct tsad_scratch {
    _Alignas(64) float *data;
    unsigned turn; /* in which it was made, */
    int strip;     /* and of which */
} tsad_scratch;

struct tsad_eye {
    const tsad_vision *vision;
    const tsad_kernels *kernels;
    int n_threads, gang; /* images that go through the nodes together */
    tsad_arena weights, memory;
    tsad_conv *convs; /* (n_nodes) */
    float **grids;    /* (n_grids) pixel (0, 0) of image 0 */
    float *bytes;     /* (channels, 256) what the trunk sees of a byte */
    /* in 16 bits: */
    int16_t **grids16;     /* (n_grids) as grids; NULL: it has none */
    float *units;          /* (n_grids, gang) what 1 stands for in an image */
    atomic_uint *most;     /* (n_nodes, gang) the bits of the largest magnitude made, of an image */
    float pixel_scale;     /* what the trunk sees of a pixel times this is an integer */
    int16_t *bytes16;      /* (channels, 256) */
    tsad_scratch *scratch; /* (n_threads) */
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

/* Pixels [begin, end) of all images in a row: where their windows and their outputs begin, counted
 * from pixel (0, 0) of image 0. */
void tsad_place_pixels(const tsad_eye *e, const tsad_grid_node *node, int begin, int end,
                       ptrdiff_t *x, ptrdiff_t *y);
/* n pixels in tiles as equal as can be */
void tsad_run_tiles(const tsad_kernels *k, tsad_tile t, int n);
/* what strip i of n has of so many pixels, in whole tiles */
typedef struct tsad_strip {
    int begin, end;
} tsad_strip;
tsad_strip tsad_strip_of(const tsad_kernels *k, int pixels, int i, int n);

/* pixels of a convolution's task: their windows stay in the L2 cache; and with a last tile */
enum { TSAD_STRIP = 96, TSAD_MOST = TSAD_STRIP + TSAD_MAX_TILE };

/* Which rows and columns of a pixel's window lie in the image: bits. */
typedef struct tsad_inside {
    uint8_t rows, columns;
} tsad_inside;

/* A strip's outputs of a panel while a large window is gone through, pixel by pixel of it. */
typedef struct tsad_sight {
    int n;
    size_t at;       /* the panel */
    float *const *y; /* (n) */
    tsad_inside inside[TSAD_MOST];
    /* the outputs that have the window's present pixel in the image, and where that pixel lies,
     * from a window's first number */
    int found, which[TSAD_MOST];
    float *to[TSAD_MOST];
    size_t skip;
} tsad_sight;

/* Begins a panel's sums; goes to pixel `line` of the window; ends the sums. */
void tsad_begin_sight(const tsad_eye *e, const tsad_grid_node *node, tsad_strip s, float *const *y,
                      size_t at, tsad_sight *sight);
void tsad_see_line(const tsad_eye *e, const tsad_grid_node *node, int line, tsad_sight *sight);
void tsad_end_sight(const tsad_eye *e, const tsad_grid_node *node, const tsad_sight *sight);
/* A convolution's tasks: `strips` strips of pixels by the panels. */
int tsad_strips_of(const tsad_kernels *k, const tsad_grid *out, int images);
void tsad_which_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task,
                     int *strip, int *panel);

/* ---- grid16.c ------------------------------------------------------------------------------ */

void tsad_conv16_carve(const tsad_eye *e, const tsad_grid_node *node, tsad_arena *arena,
                       tsad_conv *c);
void tsad_conv16_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task);
/* n pixels in tiles as equal as can be */
void tsad_run_tiles16(const tsad_kernels *k, tsad_tile16 t, int n);
/* the largest of each image in a panel of n outputs, image[i] the i-th one's */
void tsad_watch_panel(const tsad_eye *e, const tsad_grid_node *node, float *const *y,
                      const int *image, int n, size_t at);
int tsad_round_tasks(const tsad_eye *e, const tsad_grid_node *node, int images);
void tsad_round_task(const tsad_eye *e, const tsad_grid_node *node, int task);
/* a normalised pixel, which the largest bounds where it is one */
static inline int16_t tsad_round_pixel(const tsad_eye *e, float x)
{
    float v = x * e->pixel_scale;
    return (int16_t)lrintf(fminf(fmaxf(v, -INT16_MAX), INT16_MAX));
}

/* The scale and the unit of an image, by the bits of its largest magnitude. */
float tsad_image_scale(uint32_t most, float *unit);
/* For the ROUND node that follows this one, if one does: of an image, rows of what it made. */
bool tsad_is_watched(const tsad_eye *e, const tsad_grid_node *node);
void tsad_watch(const tsad_eye *e, const tsad_grid_node *node, int image, uint32_t most);

/* ---- winograd.c ---------------------------------------------------------------------------- */

bool tsad_wino_fits(const tsad_eye *e, const tsad_grid_node *node);
size_t tsad_wino_scratch(const tsad_eye *e, const tsad_grid_node *node); /* floats of a thread */
void tsad_wino_pack(const tsad_eye *e, const tsad_grid_node *node, float *w);
/* weight k of the 16 of an input channel, of the kernel's 9 */
double tsad_wino_weight(const float *g, size_t k);
int tsad_wino_tasks(const tsad_eye *e, const tsad_grid_node *node, int images);
void tsad_wino_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task, int rank);
