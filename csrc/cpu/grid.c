/* grid.c: the nodes of an image encoder, each as tasks that threads take in any order: the order of
 * every sum is that of a window's rows, columns and channels, whoever computes it.
 */
#include "eye.h"

enum { BLOCK = 256 }; /* inputs that go through all tiles before the next, with their weights */
enum { BAND = 16 };   /* rows of an image that a task puts */

/* ---- image --------------------------------------------------------------------------------- */

/* of a row, its first number */
static int16_t *row16(const tsad_eye *e, int image, int row)
{
    const tsad_grid *g = &e->vision->grids[0];
    return e->grids16[0] + (size_t)image * tsad_grid_floats(g) + (size_t)row * tsad_grid_row(g);
}

static void put_bytes(const tsad_eye *e, int image, int row, const uint8_t *from)
{
    const tsad_grid *g = &e->vision->grids[0];
    if (g->rounded) {
        int16_t *to = row16(e, image, row);
        for (int x = 0; x < g->width; x++) {
            for (int c = 0; c < g->channels; c++) {
                *to++ = e->bytes16[c * 256 + *from++];
            }
        }
        return;
    }
    float *to = tsad_eye_image(e, 0, image) + (size_t)row * tsad_grid_row(g);
    for (int x = 0; x < g->width; x++) {
        for (int c = 0; c < g->channels; c++) {
            *to++ = e->bytes[c * 256 + *from++];
        }
    }
}

/* planes: this row of the first channel */
static void put_floats(const tsad_eye *e, int image, int row, const float *planes)
{
    const tsad_grid *g = &e->vision->grids[0];
    size_t plane = (size_t)g->height * (size_t)g->width;
    for (int c = 0; c < g->channels; c++, planes += plane) {
        float scale = e->vision->scale[c], offset = e->vision->offset[c];
        if (g->rounded) {
            int16_t *to = row16(e, image, row) + c;
            for (int x = 0; x < g->width; x++, to += g->channels) {
                *to = tsad_round_pixel(e, planes[x] * scale + offset);
            }
            continue;
        }
        float *to = tsad_eye_image(e, 0, image) + (size_t)row * tsad_grid_row(g) + c;
        for (int x = 0; x < g->width; x++, to += g->channels) {
            *to = planes[x] * scale + offset;
        }
    }
}

static void put_task(const tsad_eye *e, int task, const tsad_images *from)
{
    const tsad_grid *g = &e->vision->grids[0];
    int bands = tsad_over(g->height, BAND), image = task / bands, row = task % bands * BAND;
    size_t channels = (size_t)g->channels, width = (size_t)g->width, height = (size_t)g->height;
    size_t at = (size_t)image * channels * height * width;
    for (int i = 0; g->rounded && row == 0 && i < e->vision->n_nodes; i++) {
        atomic_store_explicit(&e->most[i * e->gang + image], 0, memory_order_relaxed);
    }
    for (int end = row + BAND; row < g->height && row < end; row++) {
        if (from->bytes) {
            put_bytes(e, image, row, from->bytes + at + (size_t)row * width * channels);
        } else {
            put_floats(e, image, row, from->planes + at + (size_t)row * width);
        }
    }
}

/* ---- convolution --------------------------------------------------------------------------- */

int tsad_strips_of(const tsad_kernels *k, const tsad_grid *out, int images)
{
    return tsad_over(tsad_over(images * out->height * out->width, k->tile), TSAD_STRIP / k->tile);
}

void tsad_place_pixels(const tsad_eye *e, const tsad_grid_node *node, int begin, int end,
                       ptrdiff_t *x, ptrdiff_t *y)
{
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    int area = out->height * out->width, image = begin / area;
    int row = begin % area / out->width, column = begin % out->width;
    for (int p = begin; p < end; p++) {
        ptrdiff_t top = (ptrdiff_t)row * node->stride - node->pad;
        ptrdiff_t left = (ptrdiff_t)column * node->stride - node->pad;
        *x++ = (ptrdiff_t)tsad_grid_floats(in) * image + top * (ptrdiff_t)tsad_grid_row(in) +
               left * in->ld;
        *y++ = (ptrdiff_t)tsad_grid_floats(out) * image + row * (ptrdiff_t)tsad_grid_row(out) +
               (ptrdiff_t)column * out->ld;
        if (++column == out->width) {
            column = 0;
            row++;
        }
        if (row == out->height) {
            row = 0;
            image++;
        }
    }
}

/* n pixels in tiles as equal as can be */
void tsad_run_tiles(const tsad_kernels *k, tsad_tile t, int n)
{
    int tiles = tsad_over(n, k->tile);
    for (int i = 0; i < tiles; i++) {
        t.pixels = n / tiles + (i < n % tiles);
        k->conv(&t);
        t.x += t.pixels;
        t.y += t.pixels;
    }
}

tsad_strip tsad_strip_of(const tsad_kernels *k, int pixels, int i, int n)
{
    int tiles = tsad_over(pixels, k->tile);
    int begin = (int)((int64_t)i * tiles / n) * k->tile;
    int end = (int)((int64_t)(i + 1) * tiles / n) * k->tile;
    return (tsad_strip){begin, end < pixels ? end : pixels};
}

void tsad_which_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task,
                     int *strip, int *panel)
{
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    int strips = tsad_strips_of(e->kernels, out, images);
    size_t weights = (size_t)(c->lines * c->run * e->kernels->panel) * (size_t)strips;
    /* which to stay with from task to task: what is read again, weights or pixels, is the less */
    bool stay = weights > tsad_grid_floats(in) * (size_t)images;
    *strip = stay ? task % strips : task / c->panels;
    *panel = stay ? task / strips : task % c->panels;
}

/* bits of those of n places from `first` on that are in an image of this size */
static uint8_t bits_inside(int first, int n, int size)
{
    unsigned bits = 0;
    for (int i = 0; i < n; i++) {
        bits |= (unsigned)(first + i >= 0 && first + i < size) << i;
    }
    return (uint8_t)bits;
}

static void look_inside(const tsad_eye *e, const tsad_grid_node *node, tsad_strip s,
                        tsad_inside *pixel)
{
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    int row = s.begin / out->width % out->height, column = s.begin % out->width;
    for (int p = s.begin; p < s.end; p++) {
        int top = row * node->stride - node->pad, left = column * node->stride - node->pad;
        *pixel++ = (tsad_inside){bits_inside(top, node->kernel, in->height),
                                 bits_inside(left, node->kernel, in->width)};
        if (++column == out->width) {
            column = 0;
            row = row + 1 < out->height ? row + 1 : 0;
        }
    }
}

void tsad_begin_sight(const tsad_eye *e, const tsad_grid_node *node, tsad_strip s, float *const *y,
                      size_t at, tsad_sight *sight)
{
    const float *bias = e->convs[node - e->vision->nodes].bias + at;
    sight->n = s.end - s.begin;
    sight->at = at;
    sight->y = y;
    look_inside(e, node, s, sight->inside);
    for (int i = 0; i < sight->n; i++) {
        for (int o = 0; o < e->kernels->panel; o++) {
            y[i][at + (size_t)o] = bias[o] + (node->residual >= 0 ? y[i][at + (size_t)o] : 0);
        }
    }
}

void tsad_see_line(const tsad_eye *e, const tsad_grid_node *node, int line, tsad_sight *sight)
{
    const tsad_grid *in = &e->vision->grids[node->in];
    int row = line / node->kernel, column = line % node->kernel, found = 0;
    for (int i = 0; i < sight->n; i++) {
        sight->which[found] = i;
        sight->to[found] = sight->y[i];
        found += sight->inside[i].rows >> row & sight->inside[i].columns >> column & 1;
    }
    sight->found = found;
    sight->skip = (size_t)row * tsad_grid_row(in) + (size_t)(column * in->ld);
}

void tsad_end_sight(const tsad_eye *e, const tsad_grid_node *node, const tsad_sight *sight)
{
    size_t end = sight->at + (size_t)e->kernels->panel;
    for (int i = 0; i < sight->n && node->relu; i++) {
        float *y = sight->y[i];
        for (size_t o = sight->at; o < end; o++) {
            y[o] = y[o] < 0 ? 0 : y[o]; /* NaN stays */
        }
    }
}

/* A large window, pixel by pixel of it, for those outputs that have that pixel in the image: of a
 * map of 3 x 3 that is 49 of 81, whose weights are most of a small image's. */
static void conv_by_pixels(const tsad_eye *e, const tsad_grid_node *node, tsad_strip s, tsad_tile t)
{
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    const float *const *x = t.x, *seen[TSAD_MOST];
    tsad_sight sight;
    tsad_begin_sight(e, node, s, t.y, t.at, &sight);
    t.x = seen;
    t.y = sight.to;
    t.rows = 1;
    t.bias = NULL;
    t.residual = t.relu = false;
    for (int line = 0; line < c->lines; line++) {
        tsad_see_line(e, node, line, &sight);
        for (int i = 0; i < sight.found; i++) {
            seen[i] = x[sight.which[i]];
        }
        int parts = sight.found > e->kernels->tile ? tsad_over(c->run, BLOCK) : 1;
        for (int part = 0; part < parts; part++) {
            int first = part * c->run / parts;
            t.n = (part + 1) * c->run / parts - first;
            t.skip = sight.skip + (size_t)first;
            tsad_run_tiles(e->kernels, t, sight.found);
            t.w += t.n * e->kernels->panel;
        }
    }
    tsad_end_sight(e, node, &sight);
}

static void conv_task(const tsad_eye *e, const tsad_grid_node *node, int images, int task)
{
    const tsad_kernels *k = e->kernels;
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    const tsad_conv *c = &e->convs[node - e->vision->nodes];
    int pixels = images * out->height * out->width, strip, panel;
    size_t window = (size_t)c->lines * (size_t)c->run, columns = (size_t)k->panel;
    tsad_which_task(e, node, images, task, &strip, &panel);
    tsad_strip s = tsad_strip_of(k, pixels, strip, tsad_strips_of(k, out, images));
    ptrdiff_t from[TSAD_MOST], to[TSAD_MOST];
    const float *x[TSAD_MOST];
    float *y[TSAD_MOST];
    tsad_place_pixels(e, node, s.begin, s.end, from, to);
    for (int i = 0; i < s.end - s.begin; i++) {
        x[i] = e->grids[node->in] + from[i];
        y[i] = e->grids[node->out] + to[i];
    }
    tsad_tile t = {.x = x, .y = y, .ld = tsad_grid_row(in), .at = (size_t)panel * columns};
    t.w = c->w + (size_t)panel * window * columns;
    if (c->by_pixels) {
        conv_by_pixels(e, node, s, t);
        return;
    }
    t.rows = c->lines;
    t.n = c->run;
    t.bias = c->bias + t.at;
    t.residual = node->residual >= 0;
    t.relu = node->relu;
    tsad_run_tiles(k, t, s.end - s.begin);
}

/* ---- the others ---------------------------------------------------------------------------- */

/* A row of an image; the border counts for nothing. */
static void pool_task(const tsad_eye *e, const tsad_grid_node *node, int task)
{
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    int image = task / out->height, row = task % out->height, ld = in->ld;
    const float *x = tsad_eye_image(e, node->in, image);
    float *y = tsad_eye_image(e, node->out, image) + (size_t)row * tsad_grid_row(out), *made = y;
    int top = row * node->stride - node->pad, bottom = top + node->kernel;
    top = top < 0 ? 0 : top;
    bottom = bottom > in->height ? in->height : bottom;
    for (int column = 0; column < out->width; column++, y += out->ld) {
        int left = column * node->stride - node->pad, right = left + node->kernel;
        left = left < 0 ? 0 : left;
        right = right > in->width ? in->width : right;
        const float *seen[TSAD_POOL * TSAD_POOL];
        int n = 0;
        for (int i = top; i < bottom; i++) {
            for (int j = left; j < right; j++) {
                seen[n++] = x + (size_t)i * tsad_grid_row(in) + (size_t)j * (size_t)ld;
            }
        }
        e->kernels->pool(seen, n, ld, y);
    }
    if (tsad_is_watched(e, node)) {
        tsad_watch(e, node, image, e->kernels->most(&made, 0, 1, out->width * out->ld));
    }
}

/* what a group of channels comes to in a row of pixels */
static double sum_row(const tsad_kernels *k, const float *x, int width, int ld, float mean,
                      bool squares)
{
    float sum[TSAD_NORM_GROUP];
    double total = 0;
    k->group_sums(x, width, (size_t)ld, mean, squares, sum);
    for (int c = 0; c < TSAD_NORM_GROUP; c++) {
        total += (double)sum[c];
    }
    return total;
}

/* A group of an image's channels. */
static void norm_task(const tsad_eye *e, const tsad_grid_node *node, int task)
{
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    int groups = in->channels / TSAD_NORM_GROUP, image = task / groups;
    const tsad_kernels *k = e->kernels;
    size_t first = (size_t)(task % groups) * TSAD_NORM_GROUP;
    const float *x = tsad_eye_image(e, node->in, image) + first;
    double total = 0, count = (double)in->height * in->width * TSAD_NORM_GROUP;
    for (int i = 0; i < in->height; i++) {
        total += sum_row(k, x + (size_t)i * tsad_grid_row(in), in->width, in->ld, 0, false);
    }
    float mean = (float)(total / count);
    total = 0;
    for (int i = 0; i < in->height; i++) {
        total += sum_row(k, x + (size_t)i * tsad_grid_row(in), in->width, in->ld, mean, true);
    }
    float scale = tsad_norm_scale((float)(total / count), 1e-5f), gain[TSAD_NORM_GROUP];
    const float *shift = e->convs[node - e->vision->nodes].bias + first;
    for (int c = 0; c < TSAD_NORM_GROUP; c++) {
        gain[c] = e->convs[node - e->vision->nodes].w[first + (size_t)c] * scale;
    }
    tsad_norm_row r = {.mean = mean, .gain = gain, .shift = shift, .width = in->width};
    r.ldx = (size_t)in->ld;
    r.ldy = (size_t)out->ld;
    r.residual = node->residual >= 0;
    r.relu = node->relu;
    uint32_t most = 0;
    for (int i = 0; i < in->height; i++) {
        r.x = x + (size_t)i * tsad_grid_row(in);
        r.y = tsad_eye_image(e, node->out, image) + (size_t)i * tsad_grid_row(out) + first;
        uint32_t row = k->group_row(&r);
        most = row > most ? row : most;
    }
    if (tsad_is_watched(e, node)) {
        tsad_watch(e, node, image, most);
    }
}

/* position i of n between -1 and 1 */
static double place_between(int i, int n) { return n > 1 ? 2.0 * i / (n - 1) - 1 : -1; }

/* A channel of an image: where its softmax expects the keypoint. */
static void keypoint_task(const tsad_eye *e, const tsad_grid_node *node, int task)
{
    const tsad_grid *in = &e->vision->grids[node->in];
    int image = task / in->channels, channel = task % in->channels;
    const float *x = tsad_eye_image(e, node->in, image) + channel;
    float *point = tsad_eye_image(e, node->out, image) + 2 * channel, most = *x;
    double sum = 0, sum_x = 0, sum_y = 0;
    for (int i = 0; i < in->height; i++) {
        for (int j = 0; j < in->width; j++) {
            float v = x[(size_t)i * tsad_grid_row(in) + (size_t)j * (size_t)in->ld];
            most = v > most ? v : most;
        }
    }
    for (int i = 0; i < in->height; i++) {
        double row = 0;
        for (int j = 0; j < in->width; j++) {
            float v = x[(size_t)i * tsad_grid_row(in) + (size_t)j * (size_t)in->ld];
            double weight = expf((v - most) / node->temperature);
            row += weight;
            sum_x += weight * place_between(j, in->width);
        }
        sum += row;
        sum_y += row * place_between(i, in->height);
    }
    point[0] = (float)(sum_x / sum);
    point[1] = (float)(sum_y / sum);
}

int tsad_eye_tasks(const tsad_eye *e, int index, int images)
{
    if (index < 0) {
        return images * tsad_over(e->vision->grids[0].height, BAND);
    }
    const tsad_grid_node *node = &e->vision->nodes[index];
    const tsad_grid *in = &e->vision->grids[node->in], *out = &e->vision->grids[node->out];
    switch (node->kind) {
    case TSAD_GRID_CONV:
        return e->convs[index].wino
                   ? tsad_wino_tasks(e, node, images)
                   : tsad_strips_of(e->kernels, out, images) * e->convs[index].panels;
    case TSAD_GRID_NORM:
        return images * (in->channels / TSAD_NORM_GROUP);
    case TSAD_GRID_MAXPOOL:
        return images * out->height;
    case TSAD_GRID_ROUND:
        return tsad_round_tasks(e, node, images);
    case TSAD_GRID_KEYPOINTS:
        return images * in->channels;
    }
    return 0;
}

void tsad_eye_task(const tsad_eye *e, int index, int images, int task, int rank,
                   const tsad_images *from)
{
    if (index < 0) {
        put_task(e, task, from);
        return;
    }
    const tsad_grid_node *node = &e->vision->nodes[index];
    switch (node->kind) {
    case TSAD_GRID_CONV:
        if (e->convs[index].wino) {
            tsad_wino_task(e, node, images, task, rank);
        } else if (node->rounded) {
            tsad_conv16_task(e, node, images, task);
        } else {
            conv_task(e, node, images, task);
        }
        break;
    case TSAD_GRID_NORM:
        norm_task(e, node, task);
        break;
    case TSAD_GRID_MAXPOOL:
        pool_task(e, node, task);
        break;
    case TSAD_GRID_ROUND:
        tsad_round_task(e, node, task);
        break;
    case TSAD_GRID_KEYPOINTS:
        keypoint_task(e, node, task);
        break;
    }
}
