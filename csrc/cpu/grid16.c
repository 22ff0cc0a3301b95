/* grid16.c: the nodes of an image encoder in 16 bits. tsad/reference/conv16.py says what they
 * compute, and this the same bits, on every path.
 *
 * Nothing can overflow: inputs are at most INPUT in magnitude, weights of a channel come to at most
 * COLUMN in each part of a window that is summed in integers, and INPUT * COLUMN < 2^31. Behind a
 * ReLU inputs have one sign, so that weights of either sign may come to that much. Winograd's
 * inputs are sums of four at most, which are INPUT, or twice or four times that, place by place.
 */
#include "eye.h"

enum { INPUT = 8191, COLUMN = INT32_MAX / INPUT };
enum { ROUND_FLOATS = 1 << 13 }; /* of a rounding's task, about */

/* ---- weights ------------------------------------------------------------------------------- */

/* weight i of an output channel's window, of torch's (c_in, kernel, kernel) */
static double weight_at(const float *w, int c_in, int kernel, int i)
{
    return (double)w[(size_t)(i % c_in) * (size_t)(kernel * kernel) + (size_t)(i / c_in)];
}

/* Weights as they are packed: of one of the two. */
typedef struct packing {
    int16_t *q;
    int8_t *q8;
    int largest;
} packing;

static void put_weight(const packing *p, size_t at, double v, float unit)
{
    long q = unit > 0 ? lrint(v / (double)unit) : 0;
    if (p->q8) {
        p->q8[at] = (int8_t)q;
    } else {
        p->q[at] = (int16_t)q;
    }
}

/* What 1 stands for: no part's weights, a window's or one of its pixel's, come to more than COLUMN.
 */
static float unit_of(const tsad_conv *conv, const float *weight, int c_in, int kernel,
                     bool is_signed, int most_of_one)
{
    double largest = 0, unit = 0;
    int window = conv->lines * conv->run, size = conv->by_pixels ? conv->run : window;
    for (int first = 0; first < window; first += size) {
        double above = 0, below = 0;
        for (int i = first; i < first + size; i++) {
            double v = weight_at(weight, c_in, kernel, i);
            above += v > 0 ? v : 0;
            below -= v < 0 ? v : 0;
            largest = fabs(v) > largest ? fabs(v) : largest;
        }
        double most = above > below ? above : below;
        most = is_signed ? above + below : most;
        most /= COLUMN - size / 2.0; /* rounding adds 1/2 to each */
        unit = most > unit ? most : unit;
    }
    unit = largest / most_of_one > unit ? largest / most_of_one : unit;
    return (float)(unit * (1 + 1e-6)); /* float32's rounding included */
}

/* (panels, lines, pairs, panel, 2) */
static void pack16(const tsad_eye *e, const tsad_grid_node *node, const tsad_conv *c,
                   const packing *to, float *unit)
{
    int panel = e->kernels->panel, c_out = e->vision->grids[node->out].channels;
    int c_in = e->vision->grids[node->in].channels, window = c->lines * c->run;
    size_t pairs = (size_t)tsad_over(c->run, 2);
    for (int o = 0; o < c_out; o++) {
        const float *weight = node->weight + (size_t)o * (size_t)window;
        unit[o] = unit_of(c, weight, c_in, node->kernel, node->in == 0, to->largest);
        size_t first = (size_t)(o / panel * c->lines) * pairs;
        for (int i = 0; i < window; i++) {
            size_t pair = first + (size_t)(i / c->run) * pairs + (size_t)(i % c->run) / 2;
            size_t at = (pair * (size_t)panel + (size_t)(o % panel)) * 2 + (size_t)(i % c->run) % 2;
            put_weight(to, at, weight_at(weight, c_in, node->kernel, i), unit[o]);
        }
    }
}

/* What 1 stands for in place k of an output channel: as unit_of. */
static float wino_unit_of(const float *weight, int c_in, size_t k, int most_of_one)
{
    static const int times[4] = {1, 2, 1, 1};
    int column = INT32_MAX / (INPUT * times[k / 4] * times[k % 4]);
    int parts = tsad_over(c_in, TSAD_WINO_PART);
    double largest = 0, unit = 0;
    for (int part = 0; part < parts; part++) {
        int first = part * c_in / parts, last = (part + 1) * c_in / parts;
        double most = 0;
        for (int c = first; c < last; c++) {
            double v = fabs(tsad_wino_weight(weight + c * 9, k));
            most += v;
            largest = v > largest ? v : largest;
        }
        most /= column - (last - first) / 2.0;
        unit = most > unit ? most : unit;
    }
    unit = largest / most_of_one > unit ? largest / most_of_one : unit;
    return (float)(unit * (1 + 1e-6));
}

/* (panels, 16, pairs, panel, 2); units (panels, 16, panel) */
static void pack_wino16(const tsad_eye *e, const tsad_grid_node *node, const packing *to,
                        float *unit)
{
    size_t panel = (size_t)e->kernels->panel;
    size_t c_in = (size_t)e->vision->grids[node->in].channels;
    size_t c_out = (size_t)e->vision->grids[node->out].channels;
    for (size_t o = 0; o < c_out; o++) {
        const float *weight = node->weight + o * c_in * 9;
        for (size_t k = 0; k < 16; k++) {
            size_t place = o / panel * 16 + k;
            float u = wino_unit_of(weight, (int)c_in, k, to->largest);
            unit[place * panel + o % panel] = u;
            for (size_t c = 0; c < c_in; c++) {
                size_t at = (place * c_in / 2 + c / 2) * panel * 2 + o % panel * 2 + c % 2;
                put_weight(to, at, tsad_wino_weight(weight + c * 9, k), u);
            }
        }
    }
}

void tsad_conv16_carve(const tsad_eye *e, const tsad_grid_node *node, tsad_arena *arena,
                       tsad_conv *c)
{
    size_t columns = (size_t)c->panels * (size_t)e->kernels->panel;
    size_t rows = (size_t)c->lines * (size_t)tsad_over(c->run, 2) * 2;
    if (c->wino) {
        rows = 16 * (size_t)e->vision->grids[node->in].channels;
    }
    packing to = {.largest = node->bytes ? TSAD_LARGEST_8 : TSAD_LARGEST};
    if (node->bytes) {
        to.q8 = TSAD_CARVE(arena, int8_t, rows *columns);
    } else {
        to.q = TSAD_CARVE(arena, int16_t, rows *columns);
    }
    float *unit = TSAD_CARVE(arena, float, columns *(c->wino ? 16 : 1));
    if (unit) {
        if (c->wino) {
            pack_wino16(e, node, &to, unit);
        } else {
            pack16(e, node, c, &to, unit);
        }
        c->q = (tsad_weights16){.q = to.q, .q8 = to.q8};
        c->unit = unit;
    }
}

/* ---- rounding ------------------------------------------------------------------------------ */

/* An image of zeros, or nearly, has scale and unit 0; one that is not finite has the unit NaN, so
 * that it is seen. */
float tsad_image_scale(uint32_t most, float *unit)
{
    float largest;
    memcpy(&largest, &most, sizeof largest);
    if (!(largest <= FLT_MAX)) {
        *unit = NAN;
        return 0;
    }
    bool none = largest < 0x1p-100f; /* whose inverse would be infinite */
    *unit = none ? 0 : largest / INPUT;
    return none ? 0 : INPUT / largest;
}

bool tsad_is_watched(const tsad_eye *e, const tsad_grid_node *node)
{
    const tsad_vision *v = e->vision;
    return node + 1 < v->nodes + v->n_nodes && node[1].kind == TSAD_GRID_ROUND;
}

void tsad_watch(const tsad_eye *e, const tsad_grid_node *node, int image, uint32_t most)
{
    atomic_uint *at = &e->most[(node - e->vision->nodes) * e->gang + image];
    unsigned before = atomic_load_explicit(at, memory_order_relaxed);
    while (before < most && !atomic_compare_exchange_weak_explicit(
                                at, &before, most, memory_order_relaxed, memory_order_relaxed)) {
    }
}

static int round_rows(const tsad_grid *g)
{
    int rows = ROUND_FLOATS / (g->width * g->ld);
    return rows < 1 ? 1 : rows;
}

int tsad_round_tasks(const tsad_eye *e, const tsad_grid_node *node, int images)
{
    const tsad_grid *g = &e->vision->grids[node->in];
    return images * tsad_over(g->height, round_rows(g));
}

void tsad_round_task(const tsad_eye *e, const tsad_grid_node *node, int task)
{
    const tsad_grid *g = &e->vision->grids[node->in];
    int rows = round_rows(g), bands = tsad_over(g->height, rows), image = task / bands;
    int row = task % bands * rows, end = row + rows < g->height ? row + rows : g->height;
    ptrdiff_t maker = node - 1 - e->vision->nodes;
    float unit;
    float scale = tsad_image_scale(
        atomic_load_explicit(&e->most[maker * e->gang + image], memory_order_relaxed), &unit);
    if (row == 0) {
        e->units[node->in * e->gang + image] = unit;
    }
    size_t at = (size_t)image * tsad_grid_floats(g) + (size_t)row * tsad_grid_row(g);
    for (; row < end; row++, at += tsad_grid_row(g)) {
        e->kernels->to16(e->grids[node->in] + at, (size_t)g->width * (size_t)g->ld, scale,
                         e->grids16[node->in] + at);
    }
}

/* ---- convolution --------------------------------------------------------------------------- */

void tsad_run_tiles16(const tsad_kernels *k, tsad_tile16 t, int n)
{
    int tiles = tsad_over(n, k->tile);
    for (int i = 0; i < tiles; i++) {
        t.pixels = n / tiles + (i < n % tiles);
        k->conv16(&t);
        t.x += t.pixels;
        t.y += t.pixels;
        t.units += t.pixels;
    }
}

void tsad_watch_panel(const tsad_eye *e, const tsad_grid_node *node, float *const *y,
                      const int *image, int n, size_t at)
{
    for (int first = 0, i = 1; i <= n; i++) {
        if (i == n || image[i] != image[first]) {
            tsad_watch(e, node, image[first],
                       e->kernels->most(y + first, at, i - first, e->kernels->panel));
            first = i;
        }
    }
}

/* as grid.c's, of which each part is a sum */
static void conv16_by_pixels(const tsad_eye *e, const tsad_grid_node *node, tsad_strip s,
                             tsad_tile16 t)
{
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    const int16_t *const *x = t.x, *seen[TSAD_MOST];
    const float *unit = t.units;
    float units[TSAD_MOST];
    tsad_sight sight;
    tsad_begin_sight(e, node, s, t.y, t.at, &sight);
    t.x = seen;
    t.y = sight.to;
    t.units = units;
    t.rows = 1;
    t.bias = NULL;
    t.residual = t.relu = false;
    for (int line = 0; line < c->lines; line++) {
        tsad_see_line(e, node, line, &sight);
        for (int i = 0; i < sight.found; i++) {
            seen[i] = x[sight.which[i]];
            units[i] = unit[sight.which[i]];
        }
        t.skip = sight.skip;
        tsad_run_tiles16(e->kernels, t, sight.found);
        t.w = tsad_weights_from(t.w, (size_t)(t.pairs * e->kernels->panel * 2));
    }
    tsad_end_sight(e, node, &sight);
}

void tsad_conv16_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task)
{
    const tsad_kernels *k = e->kernels;
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    int pixels = images * out->height * out->width, strip, panel;
    tsad_which_task(e, node, images, task, &strip, &panel);
    tsad_strip s = tsad_strip_of(k, pixels, strip, tsad_strips_of(k, out, images));
    ptrdiff_t from[TSAD_MOST], to[TSAD_MOST];
    const int16_t *x[TSAD_MOST];
    float *y[TSAD_MOST], units[TSAD_MOST];
    int image[TSAD_MOST], n = s.end - s.begin;
    tsad_place_pixels(e, node, s.begin, s.end, from, to);
    for (int i = 0; i < n; i++) {
        x[i] = e->grids16[node->in] + from[i];
        y[i] = e->grids[node->out] + to[i];
        image[i] = (int)((size_t)to[i] / tsad_grid_floats(out));
        units[i] = e->units[node->in * e->gang + image[i]];
    }

    size_t columns = (size_t)k->panel, pairs = (size_t)tsad_over(c->run, 2);
    tsad_tile16 t = {.x = x, .y = y, .units = units, .ld = tsad_grid_row(in)};
    t.at = (size_t)panel * columns;
    t.bias = c->bias + t.at;
    t.unit = c->unit + t.at;
    t.residual = node->residual >= 0;
    t.relu = node->relu;
    t.rows = c->lines;
    t.pairs = (int)pairs;
    t.w = tsad_weights_from(c->q, (size_t)(panel * c->lines) * pairs * columns * 2);
    if (c->by_pixels) {
        conv16_by_pixels(e, node, s, t);
    } else {
        tsad_run_tiles16(k, t, n);
    }
    if (tsad_is_watched(e, node)) {
        tsad_watch_panel(e, node, y, image, n, t.at);
    }
}
