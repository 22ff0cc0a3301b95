/* pack.c: plain matrices to a device's memory, in one allocation and one copy: (inputs, outputs),
 * row after row. The layout runs twice, first to count and then to fill. */
#include "cuda.h"
#include "half.h"

#include <string.h>

typedef struct packer {
    float *host;         /* NULL: counting */
    const float *device; /* where host[0] will be */
    size_t used;         /* floats */
} packer;

/* room for n floats: where to fill it, or NULL; *at is where they will be on the device */
static float *place(packer *p, size_t n, const float **at)
{
    enum { UNIT = TSAD_ALIGN / (int)sizeof(float) };
    size_t from = p->used;
    p->used += (n + UNIT - 1) / UNIT * UNIT;
    *at = p->host ? p->device + from : NULL;
    return p->host ? p->host + from : NULL;
}

static void pack_copy(packer *p, const float *source, size_t n, const float **at)
{
    float *to = source ? place(p, n, at) : NULL;
    if (to) {
        memcpy(to, source, sizeof(float) * n);
    }
}

static bool is_half(tsad_precision precision)
{
    return precision == TSAD_FLOAT16 || precision == TSAD_BFLOAT16;
}

/* The large matrices are those that a CPU keeps in fewer bits, too: csrc/cpu/pack.c. */
static tsad_precision precision_of(const tsad_model *m, const tsad_net *net, const tsad_node *node)
{
    switch (node->kind) {
    case TSAD_SELF_ATTENTION:
    case TSAD_FEED_FORWARD:
    case TSAD_CONV_BRANCH:
    case TSAD_FILM_BRANCH:
    case TSAD_CONV_NORM:
    case TSAD_CONV_TRANSPOSED:
    case TSAD_FOLD:
        return m->precision;
    case TSAD_CONV:
        return net->wide ? m->precision : TSAD_FLOAT32;
    default:
        return TSAD_FLOAT32;
    }
}

static void put(float *host, tsad_precision precision, size_t i, float v)
{
    if (is_half(precision)) {
        uint16_t *to = (uint16_t *)(void *)host + i;
        *to = precision == TSAD_FLOAT16 ? tsad_to_float16(v) : tsad_to_bfloat16(v);
    } else {
        host[i] = v;
    }
}

/* without the columns that only pad a register's rows */
static void pack_matrix(packer *p, const tsad_matrix *m, tsad_precision precision, const void **w,
                        const float **bias)
{
    const float *at;
    if (!m->data && !m->source) {
        return;
    }
    int width = m->data ? m->n_in : m->width, channels = m->data ? m->n_in : m->channels;
    int taps = m->n_in / width;
    size_t n = (size_t)(taps * channels) * (size_t)m->n_out;
    float *to = place(p, is_half(precision) ? (n + 1) / 2 : n, &at);
    for (int i = 0; to && i < taps * channels; i++) {
        for (int o = 0; o < m->n_out; o++) {
            put(to, precision, (size_t)i * (size_t)m->n_out + (size_t)o,
                tsad_matrix_at(m, i / channels * width + i % channels, o));
        }
    }
    *w = at;
    to = place(p, (size_t)m->n_out, bias);
    for (int o = 0; to && o < m->n_out; o++) {
        to[o] = tsad_matrix_bias(m, o);
    }
}

static size_t table_floats(const tsad_model *m, const tsad_net *net, const tsad_node *node)
{
    const tsad_register *in = &net->registers[node->in], *out = &net->registers[node->out];
    switch (node->kind) {
    case TSAD_FOLD:
        return (size_t)m->width;
    case TSAD_SELF_ATTENTION: /* turns, unless it is a gate */
        if (node->modulated || node->cache_point == TSAD_AFTER_GATE) {
            return (size_t)in->tokens * (size_t)(in->channels / node->n_heads);
        }
        break;
    case TSAD_TOKENS:
        return (size_t)m->n_steps * (size_t)in->channels;
    default:
        break;
    }
    bool gate = node->cache_point == TSAD_BEFORE_GATE && node->block >= 0;
    return (size_t)(gate ? m->n_steps : out->tokens) * (size_t)out->channels;
}

static void pack_pruner(packer *p, const tsad_model *m, tsad_cuda_model *to)
{
    const tsad_pruner *from = &m->pruner;
    size_t n = (size_t)from->hidden, B = (size_t)from->n_blocks, H = (size_t)from->n_heads;
    size_t K = (size_t)m->n_steps;
    const float *unused = NULL;
    pack_matrix(p, &from->keys, TSAD_FLOAT32, &to->keys, &to->keys_bias);
    pack_matrix(p, &from->values, TSAD_FLOAT32, &to->values, &to->values_bias);
    pack_matrix(p, &from->out, TSAD_FLOAT32, &to->out, &unused);
    float *query = place(p, n * B, &to->query);
    for (size_t i = 0; query && i < n * B; i++) {
        query[i] = from->query[i % B * n + i / B];
    }
    pack_copy(p, from->token, B * n, &to->token);
    pack_copy(p, from->time_score, K * B * H, &to->time_score);
    pack_copy(p, from->time_value, K * H * n, &to->time_value);
}

static void layout(packer *p, tsad_model *m, tsad_cuda_model *to)
{
    tsad_cuda_node *node = to->nodes;
    p->used = 0;
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        const tsad_net *net = &m->nets[i];
        for (int n = 0; n < net->n_nodes; n++, node++) {
            tsad_node *from = &net->nodes[n];
            from->packed = node;
            node->precision = precision_of(m, net, from);
            for (int j = 0; j < 4; j++) {
                pack_matrix(p, &from->m[j], node->precision, &node->w[j], &node->bias[j]);
            }
            pack_copy(p, from->table, table_floats(m, net, from), &node->table);
            size_t channels = (size_t)net->registers[from->out].channels;
            size_t norms = from->groups[1] ? 4 : 2; /* scale and shift each */
            pack_copy(p, from->norm, norms * channels, &node->norm);
        }
    }
    const float *obs[] = {m->obs_scale, m->obs_offset, m->obs_shift};
    const float *action[] = {m->action_scale, m->action_offset, m->action_shift};
    for (int i = 0; i < 3; i++) {
        pack_copy(p, obs[i], (size_t)m->obs_dim, &to->obs[i]);
        pack_copy(p, action[i], (size_t)m->action_dim, &to->action[i]);
    }
    size_t tokens = (size_t)m->n_layers * m->fold.floats;
    pack_copy(p, m->time_fold, (size_t)m->n_steps * tokens, &to->time_fold);
    pack_copy(p, m->time_terms, (size_t)m->n_steps * (size_t)m->n_terms, &to->time_terms);
    if (m->pruner.n_heads) {
        pack_pruner(p, m, to);
    }
}

static tsad_status upload(void *to, const void *from, size_t bytes)
{
    tsad_stream *stream = NULL;
    tsad_status status = tsad_stream_make(&stream);
    if (status == TSAD_OK) {
        tsad_upload(stream, to, from, bytes);
        status = tsad_stream_wait(stream);
    }
    tsad_stream_free(stream);
    return status;
}

/* what a kernel's shared memory has no room for */
static tsad_status check(const tsad_model *m)
{
    int most = 0;
    if (m->precision == TSAD_INT16 || m->precision == TSAD_INT8) {
        return tsad_fail(TSAD_ARGUMENT,
                         "precision: expected 'float32', 'tf32', 'float16' or 'bfloat16' on device "
                         "'cuda', got a CPU's integers; choose one of these");
    }
    int heads[] = {m->fold.n_heads, m->pruner.n_heads};
    for (int i = 0; i < 2; i++) {
        most = heads[i] > most ? heads[i] : most;
    }
    if (most * m->n_memory > TSAD_SHARED_FLOATS) {
        return tsad_fail(TSAD_ARGUMENT,
                         "device: 'cuda' has room for %d weights of heads times memory tokens, "
                         "this network has %d times %d; use device 'cpu'",
                         TSAD_SHARED_FLOATS, most, m->n_memory);
    }
    return TSAD_OK;
}

tsad_status tsad_cuda_pack(tsad_model *m)
{
    TSAD_TRY(check(m));
    packer p = {0};
    size_t nodes = 0;
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        nodes += (size_t)m->nets[i].n_nodes;
    }
    tsad_cuda_model *to = tsad_allocate(sizeof *to + nodes * sizeof *to->nodes);
    if (!to) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a list of %zu nodes", nodes);
    }
    m->packed.base = (char *)(void *)to; /* unpack frees it, also after a failure */
    layout(&p, m, to);
    size_t bytes = sizeof(float) * p.used;
    TSAD_TRY(tsad_device_allocate(bytes, &to->memory));
    p.host = tsad_allocate(bytes);
    p.device = to->memory;
    if (!p.host) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a copy of %zu bytes of weights", bytes);
    }
    layout(&p, m, to);
    tsad_status status = upload(to->memory, p.host, bytes);
    tsad_deallocate(p.host);
    m->weight_bytes = bytes;
    return status;
}

void tsad_cuda_unpack(tsad_model *m)
{
    if (m->packed.base) {
        tsad_device_free(tsad_cuda_of(m)->memory);
    }
    tsad_deallocate(m->packed.base);
    m->packed = (tsad_arena){0};
}
