/* winograd.c: 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): 4x4 inputs and the weights
 * are transformed (additions alone, and halves), multiplied number by number over the channels, and
 * transformed to 2x2 outputs. 4 products an output and channel for 9; the weights are 16 for 9, so
 * that the smallest grids don't gain.
 */
#include "eye.h"

enum { LEAST_AREA = 30 };           /* pixels of an image from where on it gains */
enum { STRIP = 48, FLOATS = 3072 }; /* outputs, four at a time, of a task; and times channels */
enum { TASKS = 16 };                /* for these, panels of a strip are tasks of their own */

bool tsad_wino_fits(const tsad_eye *e, const tsad_grid_node *node)
{
    const tsad_grid *out = &e->vision->grids[node->out];
    return (e->kernels->wino_in || node->rounded) && node->kind == TSAD_GRID_CONV &&
           node->kernel == 3 && node->stride == 1 && out->height * out->width >= LEAST_AREA;
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

double tsad_wino_weight(const float *g, size_t k)
{
    static const double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    double sum = 0;
    for (size_t i = 0; i < 9; i++) {
        sum += G[k / 4][i / 3] * G[k % 4][i % 3] * (double)g[i];
    }
    return sum;
}

/* to (panels, 16, c_in, panel) */
void tsad_wino_pack(const tsad_eye *e, const tsad_grid_node *node, float *w)
{
    size_t panel = (size_t)e->kernels->panel;
    size_t c_in = (size_t)e->vision->grids[node->in].channels;
    size_t c_out = (size_t)e->vision->grids[node->out].channels;
    for (size_t o = 0; o < c_out; o++) {
        float *to = w + o / panel * 16 * c_in * panel + o % panel;
        for (size_t c = 0; c < c_in; c++) {
            const float *g = node->weight + (o * c_in + c) * 9;
            for (size_t k = 0; k < 16; k++) {
                to[(k * c_in + c) * panel] = (float)tsad_wino_weight(g, k);
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

/* Where the n fours of a strip begin in a grid, from pixel (0, 0) of image 0: their inputs, with
 * `before` a pixel before, or their outputs; and of which image they are. */
static void place_fours(const share *s, const tsad_grid *g, tsad_strip strip, bool before,
                        ptrdiff_t *place, int *image)
{
    for (int four = strip.begin; four < strip.end; four++) {
        int at = four % (s->down * s->across);
        ptrdiff_t top = 2 * (at / s->across) - before, left = 2 * (at % s->across) - before;
        *image = four / (s->down * s->across);
        *place++ = (ptrdiff_t)tsad_grid_floats(g) * *image + top * (ptrdiff_t)tsad_grid_row(g) +
                   left * g->ld;
        image++;
    }
}

/* A panel's outputs of a strip, for whoever rounds them next. */
static void watch(const tsad_eye *e, const tsad_grid_node *node, const share *s, tsad_strip strip,
                  const ptrdiff_t *place, const int *image, size_t at)
{
    const tsad_grid *out = &e->vision->grids[node->out];
    float *y[4 * (STRIP + TSAD_MAX_TILE)];
    int of[4 * (STRIP + TSAD_MAX_TILE)], n = 0;
    for (int i = 0; i < strip.end - strip.begin; i++) {
        int four = (strip.begin + i) % (s->down * s->across);
        int row = 2 * (four / s->across), column = 2 * (four % s->across);
        for (int j = 0; j < 4; j++) {
            if (row + j / 2 < out->height && column + j % 2 < out->width) {
                y[n] = e->grids[node->out] + place[i] + (size_t)(j / 2) * tsad_grid_row(out) +
                       (size_t)(j % 2 * out->ld);
                of[n++] = image[i];
            }
        }
    }
    tsad_watch_panel(e, node, y, of, n, at);
}

/* whether this thread has yet to transform the inputs of a strip; its scratch is that strip's now
 */
static bool is_new(const tsad_eye *e, int rank, int strip)
{
    tsad_scratch *own = &e->scratch[rank];
    bool has = own->turn == e->crew->turn && own->strip == strip;
    own->turn = e->crew->turn;
    own->strip = strip;
    return !has;
}

static void wino16_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task,
                        int rank)
{
    enum { MOST = STRIP + TSAD_MAX_TILE };
    const tsad_kernels *k = e->kernels;
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    share s = share_of(e, node, images);
    tsad_strip strip = tsad_strip_of(k, s.fours, task / s.groups, s.strips);
    size_t n = (size_t)(strip.end - strip.begin), channels = (size_t)in->channels;
    size_t columns = (size_t)k->panel;
    bool fresh = is_new(e, rank, task / s.groups);
    float *m = e->scratch[rank].data;
    int16_t *v = (int16_t *)(m + 16 * n * columns);
    const int16_t *x[MOST];
    float *y[MOST], units[MOST];
    ptrdiff_t place[MOST];
    int image[MOST], parts = tsad_over(in->channels, TSAD_WINO_PART);
    place_fours(&s, in, strip, true, place, image);
    for (size_t i = 0; i < n; i++) {
        x[i] = v + i * channels;
        y[i] = m + i * columns;
        units[i] = e->units[node->in * e->gang + image[i]];
        if (fresh) {
            k->wino_in16(e->grids16[node->in] + place[i], tsad_grid_row(in), (size_t)in->ld,
                         in->channels, v + i * channels, n * channels);
        }
    }
    place_fours(&s, out, strip, false, place, image);
    int group = task % s.groups;
    int end = (int)((int64_t)(group + 1) * c->panels / s.groups);
    for (int panel = (int)((int64_t)group * c->panels / s.groups); panel < end; panel++) {
        tsad_tile16 t = {.x = x, .y = y, .units = units, .rows = 1};
        t.w = tsad_weights_from(c->q, (size_t)panel * 16 * channels * columns);
        for (size_t i = 0; i < 16; i++) {
            t.unit = c->unit + ((size_t)panel * 16 + i) * columns;
            t.at = i * n * columns;
            t.fresh = true;
            for (int part = 0; part < parts; part++) {
                int first = part * in->channels / parts;
                t.pairs = ((part + 1) * in->channels / parts - first) / 2;
                t.skip = i * n * channels + (size_t)first;
                tsad_run_tiles16(k, t, (int)n);
                t.fresh = false;
                t.w = tsad_weights_from(t.w, (size_t)t.pairs * 2 * columns);
            }
        }
        put_out(e, node, &s, strip, (tsad_wino_out){.m = m, .plane = n * columns}, panel);
        if (tsad_is_watched(e, node)) {
            watch(e, node, &s, strip, place, image, (size_t)panel * columns);
        }
    }
}

void tsad_wino_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task, int rank)
{
    if (node->rounded) {
        wino16_task(e, node, images, task, rank);
        return;
    }
    static const float zeros[TSAD_LANE];
    const tsad_kernels *k = e->kernels;
    const tsad_grid *in = &e->vision->grids[node->in];
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    share s = share_of(e, node, images);
    tsad_strip strip = tsad_strip_of(k, s.fours, task / s.groups, s.strips);
    size_t n = (size_t)(strip.end - strip.begin), channels = (size_t)in->channels;
    size_t columns = (size_t)k->panel;
    bool fresh = is_new(e, rank, task / s.groups);
    float *v = e->scratch[rank].data, *m = v + 16 * n * channels;
    const float *x[STRIP + TSAD_MAX_TILE];
    float *y[STRIP + TSAD_MAX_TILE];
    for (size_t i = 0; i < n; i++) {
        int four = strip.begin + (int)i, at = four % (s.down * s.across);
        ptrdiff_t top = 2 * (at / s.across) - 1, left = 2 * (at % s.across) - 1;
        const float *from = tsad_eye_image(e, node->in, four / (s.down * s.across)) +
                            top * (ptrdiff_t)tsad_grid_row(in) + left * in->ld;
        x[i] = v + i * channels;
        y[i] = m + i * columns;
        if (fresh) {
            k->wino_in(from, tsad_grid_row(in), (size_t)in->ld, in->channels, v + i * channels,
                       n * channels);
        }
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
