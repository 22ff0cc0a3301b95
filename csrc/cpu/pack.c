/* pack.c: plain matrices to panels in execution order, in one allocation. The layout runs twice,
 * like every arena: first to count, then to place and fill. */
#include "cpu.h"
#include "../half.h"

#include <math.h>
#include <string.h>

typedef struct packer {
    tsad_arena *arena;
    int panel;
    tsad_precision precision; /* of the large matrices */
    float *column;            /* of a matrix; NULL: counting */
} packer;

/* columns [c0, c1) and rows [r0, r1) of m, or of its three equal column groups (q, k, v) when
 * groups is 3; the bias only where with_bias */
typedef struct slice {
    int r0, r1, c0, c1, groups;
    bool with_bias;
    tsad_precision precision;
} slice;

static int source_column(const tsad_matrix *m, slice s, int o)
{
    int width = s.c1 - s.c0;
    return o / width * (m->n_out / s.groups) + s.c0 + o % width;
}

/* rows [r0, r1) of a column of m */
static void take_column(const packer *p, const tsad_matrix *m, slice s, int o)
{
    for (int i = s.r0; i < s.r1; i++) {
        p->column[i - s.r0] = tsad_through_half(tsad_matrix_at(m, i, o), s.precision);
    }
}

/* One column to integers up to `largest`, `step` apart, pairs of inputs together, in 16 bits or,
 * where `bytes` is given, there in 8; returns its unit. */
static float round_column(const float *from, int n, int largest, int16_t *to, int8_t *bytes,
                          size_t step)
{
    double square = 0, top = 0;
    for (int i = 0; i < n; i++) {
        double v = from[i];
        square += v * v;
        top = fmax(top, fabs(v));
    }
    if (top == 0) {
        return 0; /* to is zero */
    }
    double scale = fmin(largest / top, TSAD_COLUMN_LENGTH / sqrt(square));
    for (int i = 0; i < n; i++) {
        size_t at = (size_t)(i / 2) * step + (size_t)(i % 2);
        long rounded = lrint((double)from[i] * scale);
        if (bytes) {
            bytes[at] = (int8_t)rounded;
        } else {
            to[at] = (int16_t)rounded;
        }
    }
    return (float)(1 / scale);
}

static void pack_rounded(const packer *p, const tsad_matrix *m, slice s, float *bias,
                         tsad_packed *out)
{
    int n_in = s.r1 - s.r0, n_out = (s.c1 - s.c0) * s.groups, panel = p->panel;
    size_t padded = (size_t)((n_out + panel - 1) / panel * panel), pairs = (size_t)(n_in + 1) / 2;
    bool small = s.precision == TSAD_INT8 && (size_t)n_in * (size_t)n_out >= TSAD_LARGE;
    int16_t *q = small ? NULL : TSAD_CARVE(p->arena, int16_t, padded * pairs * 2);
    int8_t *q8 = small ? TSAD_CARVE(p->arena, int8_t, padded * pairs * 2) : NULL;
    float *unit = TSAD_CARVE(p->arena, float, padded);
    if (!unit) {
        return; /* counting */
    }
    for (int o = 0; o < n_out; o++) {
        int column = source_column(m, s, o);
        size_t at = 2 * ((size_t)(o / panel) * pairs * (size_t)panel + (size_t)(o % panel));
        take_column(p, m, s, column);
        unit[o] = round_column(p->column, n_in, small ? TSAD_LARGEST_8 : TSAD_LARGEST,
                               small ? NULL : q + at, small ? q8 + at : NULL, 2 * (size_t)panel);
        bias[o] = s.with_bias ? tsad_matrix_bias(m, column) : 0;
    }
    *out =
        (tsad_packed){.n_in = n_in, .n_out = n_out, .bias = bias, .q = q, .q8 = q8, .unit = unit};
}

static void pack(const packer *p, const tsad_matrix *m, slice s, tsad_packed *out)
{
    int n_in = s.r1 - s.r0, width = s.c1 - s.c0, n_out = width * s.groups;
    bool integers = s.precision == TSAD_INT16 || s.precision == TSAD_INT8;
    bool thin = n_out <= TSAD_THIN && !integers;
    int panel = thin ? 1 : p->panel, rows = thin ? tsad_pad(n_in) : n_in;
    int padded = (n_out + panel - 1) / panel * panel;
    float *bias = TSAD_CARVE(p->arena, float, padded);
    if (integers) {
        pack_rounded(p, m, s, bias, out);
        return;
    }
    float *w = TSAD_CARVE(p->arena, float, (size_t)padded *(size_t)rows);
    if (!w) {
        return; /* counting */
    }
    memset(w, 0, sizeof(float) * (size_t)padded * (size_t)rows);
    for (int o = 0; o < n_out; o++) {
        int column = source_column(m, s, o);
        float *to = w + (size_t)(o / panel) * (size_t)panel * (size_t)rows + o % panel;
        take_column(p, m, s, column);
        for (int i = 0; i < n_in; i++) {
            to[(size_t)i * (size_t)panel] = p->column[i];
        }
        bias[o] = s.with_bias ? tsad_matrix_bias(m, column) : 0;
    }
    *out = (tsad_packed){.n_in = n_in, .n_out = n_out, .thin = thin, .w = w, .bias = bias};
}

static slice whole(const tsad_matrix *m)
{
    return (slice){.r1 = m->n_in, .c1 = m->n_out, .groups = 1, .with_bias = true};
}

/* in how many parts a block's sums are split: a property of the model, not of the threads */
static int count_parts(const tsad_node *node, int panel)
{
    for (int parts = TSAD_PARTS; parts > 1; parts--) {
        if (node->kind == TSAD_SELF_ATTENTION ? node->n_heads % parts == 0
                                              : node->m[0].n_out % (parts * panel) == 0) {
            return parts;
        }
    }
    return 1;
}

static void pack_split(const packer *p, const tsad_node *node, tsad_cpu_node *c)
{
    bool attention = node->kind == TSAD_SELF_ATTENTION;
    int groups = attention ? 3 : 1, width = node->m[0].n_out / groups;
    int parts = attention || node->kind == TSAD_FEED_FORWARD ? count_parts(node, p->panel) : 1;
    tsad_packed *list = TSAD_CARVE(p->arena, tsad_packed, 2 * parts);
    tsad_packed none;
    int taps = node->kind == TSAD_CONV_BRANCH ? node->kernel : 1;
    for (int i = 0; i < parts; i++) {
        int c0 = width * i / parts, c1 = width * (i + 1) / parts;
        slice first = {0, node->m[0].n_in, c0, c1, groups, true, p->precision};
        slice second = {c0 * taps, c1 * taps, 0, node->m[1].n_out, 1, i == 0, p->precision};
        pack(p, &node->m[0], first, list ? &list[2 * i] : &none);
        pack(p, &node->m[1], second, list ? &list[2 * i + 1] : &none);
    }
    if (c) {
        *c = (tsad_cpu_node){.n_parts = parts, .list = list};
    }
}

/* keys and values, then per head what they add to the score and value vectors */
static void pack_fold(const packer *p, const tsad_node *node, tsad_cpu_node *c)
{
    int heads = node->n_heads, d = node->m[1].n_in, dh = d / heads;
    tsad_packed *list = TSAD_CARVE(p->arena, tsad_packed, 1 + 2 * heads);
    tsad_packed none;
    slice kv = whole(&node->m[0]);
    kv.precision = p->precision;
    pack(p, &node->m[0], kv, list ? &list[0] : &none);
    for (int j = 1; j <= 2; j++) {
        for (int h = 0; h < heads; h++) {
            slice s = {h * dh, (h + 1) * dh, 0, d, 1, false, p->precision};
            pack(p, &node->m[j], s, list ? &list[1 + (j - 1) * heads + h] : &none);
        }
    }
    if (c) {
        *c = (tsad_cpu_node){.n_parts = 1, .list = list};
    }
}

static int common_multiple(int a, int b)
{
    int m = a;
    while (m % b) {
        m += a;
    }
    return m;
}

/* n matrices whole, to be shared by output channels: in units of whole panels and groups, or, where
 * they do not fit, in one */
static void pack_wide(const packer *p, const tsad_net *net, const tsad_node *node, int n,
                      tsad_cpu_node *c)
{
    tsad_packed *list = TSAD_CARVE(p->arena, tsad_packed, n), none;
    int channels = net->registers[node->out].channels, unit = p->panel;
    for (int i = 0; i < n; i++) {
        slice all = whole(&node->m[i]);
        all.precision = p->precision;
        pack(p, &node->m[i], all, list ? &list[i] : &none);
        if (node->groups[i]) {
            unit = common_multiple(unit, channels / node->groups[i]);
        }
    }
    if (c) {
        unit = channels % unit ? channels : unit;
        *c = (tsad_cpu_node){.n_parts = channels / unit, .unit = unit, .list = list};
    }
}

static void pack_node(const packer *p, const tsad_net *net, tsad_node *node)
{
    tsad_cpu_node *c = TSAD_CARVE(p->arena, tsad_cpu_node, 1);
    tsad_packed none;
    node->packed = c;
    switch (node->kind) {
    case TSAD_SELF_ATTENTION:
    case TSAD_FEED_FORWARD:
    case TSAD_CONV_BRANCH:
        pack_split(p, node, c);
        break;
    case TSAD_FOLD:
        pack_fold(p, node, c);
        break;
    case TSAD_FILM_BRANCH:
    case TSAD_CONV_TRANSPOSED:
        pack_wide(p, net, node, 2, c);
        break;
    case TSAD_CONV_NORM:
        pack_wide(p, net, node, 1, c);
        break;
    case TSAD_CONV:
        if (net->wide) {
            pack_wide(p, net, node, 1, c);
            break;
        }
        /* fall through */
    case TSAD_LINEAR:
    case TSAD_CROSS_ATTENTION: { /* its bias alone */
        tsad_packed *list = TSAD_CARVE(p->arena, tsad_packed, 1);
        pack(p, &node->m[0], whole(&node->m[0]), list ? list : &none);
        if (c) {
            *c = (tsad_cpu_node){.n_parts = 1, .list = list};
        }
        break;
    }
    default:
        break;
    }
}

static void pack_pruner(const packer *p, tsad_pruner *pruner)
{
    tsad_cpu_pruner *c = TSAD_CARVE(p->arena, tsad_cpu_pruner, 1);
    int heads = pruner->n_heads, dh = pruner->hidden / heads;
    tsad_packed *out = TSAD_CARVE(p->arena, tsad_packed, heads);
    tsad_packed none;
    pack(p, &pruner->keys, whole(&pruner->keys), c ? &c->keys : &none);
    pack(p, &pruner->values, whole(&pruner->values), c ? &c->values : &none);
    for (int h = 0; h < heads; h++) {
        slice s = {h * dh, (h + 1) * dh, 0, pruner->hidden, 1, false, TSAD_FLOAT32};
        pack(p, &pruner->out, s, out ? &out[h] : &none);
    }
    if (c) {
        c->out = out;
    }
    pruner->packed = c;
}

static void layout(tsad_model *m, const packer *p)
{
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        for (int n = 0; n < m->nets[i].n_nodes; n++) {
            pack_node(p, &m->nets[i], &m->nets[i].nodes[n]);
        }
    }
    if (m->pruner.n_heads) {
        pack_pruner(p, &m->pruner);
    }
}

tsad_status tsad_cpu_pack(tsad_model *m)
{
    packer p = {
        .arena = &m->packed, .panel = tsad_cpu_kernels(m)->panel, .precision = m->precision};
    size_t longest = 1;
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        for (int n = 0; n < m->nets[i].n_nodes; n++) {
            for (int j = 0; j < 4; j++) {
                size_t rows = (size_t)m->nets[i].nodes[n].m[j].n_in;
                longest = rows > longest ? rows : longest;
            }
        }
    }
    longest = (size_t)m->pruner.hidden > longest ? (size_t)m->pruner.hidden : longest;
    longest = (size_t)m->width > longest ? (size_t)m->width : longest;
    layout(m, &p);
    TSAD_TRY(tsad_arena_allocate(&m->packed));
    p.column = tsad_allocate(sizeof(float) * longest);
    if (!p.column) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a column of %zu weights", longest);
    }
    layout(m, &p);
    tsad_deallocate(p.column);
    m->weight_bytes = m->packed.size;
    return TSAD_OK;
}

void tsad_cpu_unpack(tsad_model *m) { tsad_arena_free(&m->packed); }

/* floats of one lane that a node needs for a time, at most: its inputs normalised or gathered, its
 * middle results, the parts of its sum */
static size_t node_scratch(const tsad_model *m, const tsad_net *net, const tsad_node *node)
{
    const tsad_register *in = &net->registers[node->in], *out = &net->registers[node->out];
    int rows = in->tokens > out->tokens ? in->tokens : out->tokens;
    int columns = tsad_pad(in->channels) + tsad_pad(in->channels * node->kernel);
    if (net->wide) { /* a product before its GroupNorm, and then what comes in, rounded, or terms */
        size_t room = 2 * (size_t)tsad_pad(out->channels);
        for (int j = 0; j < 4; j++) {
            size_t rounded = tsad_rounded_floats(rows, node->m[j].n_in);
            room = rounded > room ? rounded : room;
        }
        return (size_t)rows * (size_t)tsad_pad(out->channels) + room;
    }
    if (!tsad_node_is_prunable(node->kind) && node->kind != TSAD_FOLD) {
        return (size_t)rows * (size_t)columns; /* normalised, or as taps */
    }
    for (int j = 0; j < 4; j++) {
        columns += 2 * tsad_pad(node->m[j].n_in) + 2 * tsad_pad(node->m[j].n_out);
    }
    columns += (TSAD_PARTS + 1) * tsad_pad(out->channels);
    columns += tsad_pad(node->n_heads) * tsad_pad(m->n_memory); /* cross-attention */
    columns += tsad_pad(in->channels) + 2 * TSAD_LANE;          /* the rows' units in 16 bits */
    return (size_t)rows * (size_t)columns;
}

size_t tsad_cpu_scratch(const tsad_model *m)
{
    size_t most = 0;
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        const tsad_net *net = &m->nets[i];
        for (int n = 0; n < net->n_nodes; n++) {
            size_t floats = node_scratch(m, net, &net->nodes[n]);
            most = floats > most ? floats : most;
        }
    }
    size_t pruner = (2 * (size_t)m->pruner.query_tokens + 1) * (size_t)tsad_pad(m->pruner.hidden);
    return (pruner > most ? pruner : most) + TSAD_LANE;
}
