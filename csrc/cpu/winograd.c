/* winograd.c: 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): 4x4 inputs and the weights
 * are transformed (additions alone, and halves), multiplied number by number over the channels, and
 * transformed to 2x2 outputs. 4 products an output and channel for 9; the weights are 16 for 9, so
 * that only grids of many pixels gain.
 */
#include "eye.h"

#include <string.h>

enum { LEAST_AREA = 100 };          /* pixels of an image from where on it gains */
enum { STRIP = 48, FLOATS = 3072 }; /* outputs, four at a time, of a task; and times channels */
enum { TASKS = 16 };                /* for these, panels of a strip are tasks of their own */

bool tsad_wino_fits(const tsad_eye *e, const tsad_grid_node *node)
{
    const tsad_grid *out = &e->vision->grids[node->out];
    return e->kernels->wino_in && node->kind == TSAD_GRID_CONV && node->kernel == 3 &&
           node->stride == 1 && out->height * out->width >= LEAST_AREA;
}

/* of a strip, at most */
static int strip_size(const tsad_eye *e, int channels)
{
    int tile = e->kernels->tile, most = FLOATS / channels < STRIP ? FLOATS / channels : STRIP;
    return most > tile ? most / tile * tile : tile;
}

size_t tsad_wino_scratch(const tsad_eye *e, const tsad_grid_node *node)
{
    if (!tsad_wino_fits(e, node)) {
        return 0;
    }
    int c_in = e->vision->grids[node->in].channels;
    return (size_t)16 * (size_t)strip_size(e, c_in) * (size_t)(c_in + e->kernels->panel);
}

/* to (panels, 16, c_in, panel) */
void tsad_wino_pack(const tsad_eye *e, const tsad_grid_node *node, float *w)
{
    static const double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    size_t panel = (size_t)e->kernels->panel;
    size_t c_in = (size_t)e->vision->grids[node->in].channels;
    size_t c_out = (size_t)e->vision->grids[node->out].channels;
    for (size_t o = 0; o < c_out; o++) {
        float *to = w + o / panel * 16 * c_in * panel + o % panel;
        for (size_t c = 0; c < c_in; c++) {
            const float *g = node->weight + (o * c_in + c) * 9;
            for (size_t k = 0; k < 16; k++) {
                double sum = 0;
                for (size_t i = 0; i < 9; i++) {
                    sum += G[k / 4][i / 3] * G[k % 4][i % 3] * (double)g[i];
                }
                to[(k * c_in + c) * panel] = (float)sum;
            }
        }
    }
}

/* How a node's outputs, four at a time, and its panels come to tasks. */
typedef struct share {
    int down, across; /* fours of an image */
    int fours, strips, groups;
} share;

static share share_of(const tsad_eye *e, const tsad_grid_node *node, int images)
{
    const tsad_grid *out = &e->vision->grids[node->out];
    int panels = e->convs[node - e->vision->nodes].panels;
    share s = {.down = tsad_over(out->height, 2), .across = tsad_over(out->width, 2)};
    s.fours = images * s.down * s.across;
    s.strips = tsad_over(s.fours, strip_size(e, e->vision->grids[node->in].channels));
    s.groups = tsad_over(TASKS, s.strips);
    s.groups = s.groups < panels ? s.groups : panels;
    return s;
}

int tsad_wino_tasks(const tsad_eye *e, const tsad_grid_node *node, int images)
{
    share s = share_of(e, node, images);
    return s.strips * s.groups;
}

/* A panel's sums of a strip to its outputs. */
static void put_out(const tsad_eye *e, const tsad_grid_node *node, const share *s, tsad_strip strip,
                    tsad_wino_out t, int panel)
{
    const tsad_grid *out = &e->vision->grids[node->out];
    size_t columns = (size_t)e->kernels->panel;
    t.row = tsad_grid_row(out);
    t.ld = (size_t)out->ld;
    t.bias = e->convs[node - e->vision->nodes].bias + (size_t)panel * columns;
    t.residual = node->residual >= 0;
    t.relu = node->relu;
    for (int i = strip.begin; i < strip.end; i++, t.m += columns) {
        int image = i / (s->down * s->across), at = i % (s->down * s->across);
        int y = 2 * (at / s->across), x = 2 * (at % s->across);
        t.rows = y + 1 < out->height ? 2 : 1;
        t.columns = x + 1 < out->width ? 2 : 1;
        t.y = tsad_eye_image(e, node->out, image) + (size_t)y * t.row + (size_t)x * t.ld +
              (size_t)panel * columns;
        e->kernels->wino_out(&t);
    }
}

void tsad_wino_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task, int rank)
{
    static const float zeros[TSAD_LANE];
    const tsad_kernels *k = e->kernels;
    const tsad_grid *in = &e->vision->grids[node->in];
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    share s = share_of(e, node, images);
    tsad_strip strip = tsad_strip_of(k, s.fours, task / s.groups, s.strips);
    size_t n = (size_t)(strip.end - strip.begin), channels = (size_t)in->channels;
    size_t columns = (size_t)k->panel;
    float *v = e->scratch[rank], *m = v + 16 * n * channels;
    const float *x[STRIP + TSAD_MAX_TILE];
    float *y[STRIP + TSAD_MAX_TILE];
    for (size_t i = 0; i < n; i++) {
        int four = strip.begin + (int)i, at = four % (s.down * s.across);
        ptrdiff_t top = 2 * (at / s.across) - 1, left = 2 * (at % s.across) - 1;
        const float *from = tsad_eye_image(e, node->in, four / (s.down * s.across)) +
                            top * (ptrdiff_t)tsad_grid_row(in) + left * in->ld;
        x[i] = v + i * channels;
        y[i] = m + i * columns;
        k->wino_in(from, tsad_grid_row(in), (size_t)in->ld, in->channels, v + i * channels,
                   n * channels);
    }
    int group = task % s.groups;
    int end = (int)((int64_t)(group + 1) * c->panels / s.groups);
    for (int panel = (int)((int64_t)group * c->panels / s.groups); panel < end; panel++) {
        tsad_tile t = {.x = x, .y = y, .rows = 1, .n = in->channels, .bias = zeros};
        for (size_t i = 0; i < 16; i++) {
            t.w = c->w + ((size_t)panel * 16 + i) * channels * columns;
            t.skip = i * n * channels;
            t.at = i * n * columns;
            tsad_run_tiles(k, t, (int)n);
        }
        put_out(e, node, &s, strip, (tsad_wino_out){.m = m, .plane = n * columns}, panel);
    }
}
