/* build.c: putting a node list together. The families (dpt.c, nodes.c) describe, this file checks
 * and places: numbers the prunable blocks, gives every one its slot, and refuses lists that do
 * not fit together, naming the node. */
#include "net.h"
#include "../plan/plan_core.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

bool tsad_node_is_prunable(tsad_node_kind kind)
{
    return kind == TSAD_SELF_ATTENTION || kind == TSAD_CROSS_ATTENTION ||
           kind == TSAD_FEED_FORWARD || kind == TSAD_CONV_BRANCH || kind == TSAD_FILM_BRANCH;
}

tsad_status tsad_net_begin(tsad_net *net, int max_nodes, int max_registers)
{
    if (max_nodes > TSAD_MAX_NODES) {
        return tsad_fail(TSAD_ARGUMENT, "nodes: expected at most %d, got %d", TSAD_MAX_NODES,
                         max_nodes);
    }
    *net = (tsad_net){.max_nodes = max_nodes, .max_registers = max_registers};
    net->nodes = tsad_allocate(sizeof(tsad_node) * (size_t)max_nodes);
    net->registers = tsad_allocate(sizeof(tsad_register) * (size_t)max_registers);
    if (!net->nodes || !net->registers) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a list of %d nodes", max_nodes);
    }
    return TSAD_OK;
}

int tsad_net_register(tsad_net *net, int tokens, int channels)
{
    net->registers[net->n_registers] = (tsad_register){.tokens = tokens, .channels = channels};
    return net->n_registers++;
}

tsad_node *tsad_net_add(tsad_net *net, tsad_node_kind kind, int in, int out)
{
    tsad_node *node = &net->nodes[net->n_nodes++];
    *node = (tsad_node){.kind = kind, .in = in, .in2 = -1, .out = out, .residual = -1, .block = -1};
    node->n_heads = node->kernel = node->stride = 1;
    node->eps = 1e-5f;
    return node;
}

static tsad_status check_node(const tsad_net *net, int i)
{
    const tsad_node *node = &net->nodes[i];
    const tsad_register *in = &net->registers[node->in], *out = &net->registers[node->out];
    bool prunable = tsad_node_is_prunable(node->kind);
    if (prunable && node->residual < 0 && node->in != node->out) {
        return tsad_fail(TSAD_SHAPE,
                         "node %d: a branch without a residual map works in place; got register "
                         "%d into %d",
                         i, node->in, node->out);
    }
    if (prunable && node->residual >= 0) {
        const tsad_node *map = &net->nodes[node->residual];
        if (node->residual >= i || tsad_node_is_prunable(map->kind) || map->out != node->out ||
            map->in != node->in) {
            return tsad_fail(TSAD_SHAPE,
                             "node %d: its residual must be an earlier fixed node from register "
                             "%d to register %d",
                             i, node->in, node->out);
        }
    }
    if (node->kind == TSAD_CONCAT) {
        const tsad_register *in2 = &net->registers[node->in2];
        if (in->tokens != in2->tokens || out->tokens != in->tokens ||
            out->channels != in->channels + in2->channels) {
            return tsad_fail(TSAD_SHAPE, "node %d: concat of (%d, %d) and (%d, %d) into (%d, %d)",
                             i, in->tokens, in->channels, in2->tokens, in2->channels, out->tokens,
                             out->channels);
        }
    }
    return TSAD_OK;
}

/* The nodes, of a row, between which a register holds something; first > last: never. */
typedef struct lifetime {
    int first, last;
} lifetime;

static void live(lifetime *of, int reg, int node)
{
    if (reg >= 0) {
        of[reg].first = node < of[reg].first ? node : of[reg].first;
        of[reg].last = node > of[reg].last ? node : of[reg].last;
    }
}

/* the number, among the first n that stay, of one that `reg` can be; n: none */
static int room_for(const tsad_net *net, const lifetime *of, const int *stays, int n, int reg)
{
    const tsad_register *own = &net->registers[reg];
    for (int s = 0; s < n; s++) {
        const tsad_register *other = &net->registers[s]; /* moved there: those that stay */
        bool fits = own->tokens == other->tokens && own->channels == other->channels &&
                    own->halo == other->halo;
        for (int r = 0; r < reg && fits; r++) {
            fits = stays[r] != s || of[r].last < of[reg].first || of[reg].last < of[r].first;
        }
        if (fits) {
            return s;
        }
    }
    return n;
}

/* Registers of one shape whose lifetimes do not overlap become one. Of one shape alone: so what
 * stays zero beside and around a register's numbers, and is read as such, stays zero. Of wide nets,
 * whose nodes write all of what they put out; sample and output last from row to row. */
static tsad_status share_registers(tsad_net *net)
{
    int n = 0, total = net->n_registers;
    lifetime *of = tsad_allocate(sizeof *of * (size_t)total);
    int *stays = tsad_allocate(sizeof *stays * (size_t)total); /* what became of each */
    if (!of || !stays) {
        tsad_deallocate(of);
        tsad_deallocate(stays);
        return tsad_fail(TSAD_MEMORY, "out of memory for %d registers", total);
    }
    for (int r = 0; r < total; r++) {
        bool lasts = r == net->input || r == net->output;
        of[r] = lasts ? (lifetime){-1, net->n_nodes} : (lifetime){net->n_nodes, -1};
    }
    for (int i = 0; i < net->n_nodes; i++) {
        live(of, net->nodes[i].in, i);
        live(of, net->nodes[i].in2, i);
        live(of, net->nodes[i].out, i);
    }
    for (int r = 0; r < total; r++) {
        stays[r] = room_for(net, of, stays, n, r);
        net->registers[stays[r]] = net->registers[r];
        n += stays[r] == n;
    }
    for (int i = 0; i < net->n_nodes; i++) {
        tsad_node *node = &net->nodes[i];
        node->in = stays[node->in];
        node->in2 = node->in2 < 0 ? -1 : stays[node->in2];
        node->out = stays[node->out];
    }
    net->input = stays[net->input];
    net->output = stays[net->output];
    net->n_registers = n;
    tsad_deallocate(of);
    tsad_deallocate(stays);
    return TSAD_OK;
}

tsad_status tsad_net_finish(tsad_net *net)
{
    for (int i = 0; i < net->n_nodes; i++) {
        TSAD_TRY(check_node(net, i));
        if (net->nodes[i].residual >= 0) {
            net->nodes[net->nodes[i].residual].is_residual = true;
        }
        net->n_blocks += tsad_node_is_prunable(net->nodes[i].kind);
    }
    size_t n = net->n_blocks ? (size_t)net->n_blocks : 1;
    net->block_node = tsad_allocate(sizeof(int) * n);
    net->block_type = tsad_allocate(n);
    net->slot_offset = tsad_allocate(sizeof(size_t) * n);
    if (!net->block_node || !net->block_type || !net->slot_offset) {
        return tsad_fail(TSAD_MEMORY, "out of memory for %d blocks", net->n_blocks);
    }
    size_t shape_of_type[TSAD_MAX_TYPES] = {0};
    int b = 0;
    for (int i = 0; i < net->n_nodes; i++) {
        tsad_node *node = &net->nodes[i];
        if (!tsad_node_is_prunable(node->kind)) {
            continue;
        }
        const tsad_register *out = &net->registers[node->out];
        size_t shape = (size_t)out->tokens << 32 | (size_t)out->channels;
        if (node->type < 0 || node->type >= TSAD_MAX_TYPES) {
            return tsad_fail(TSAD_ARGUMENT, "node %d: reuse type %d, expected 0 to %d", i,
                             node->type, TSAD_MAX_TYPES - 1);
        }
        if (shape_of_type[node->type] && shape_of_type[node->type] != shape) {
            return tsad_fail(TSAD_SHAPE,
                             "node %d: reuse type %d has branches of different shapes; give each "
                             "shape a type of its own",
                             i, node->type);
        }
        shape_of_type[node->type] = shape;
        node->block = b;
        net->block_node[b] = i;
        net->block_type[b] = (uint8_t)node->type;
        net->slot_offset[b] = net->row_floats;
        net->row_floats += tsad_register_floats(out);
        b++;
    }
    return net->wide ? share_registers(net) : TSAD_OK;
}

void tsad_net_free(tsad_net *net)
{
    for (int i = 0; i < net->n_nodes; i++) {
        for (int j = 0; j < 4; j++) {
            tsad_matrix_free(&net->nodes[i].m[j]);
        }
        tsad_deallocate(net->nodes[i].table);
        tsad_deallocate(net->nodes[i].norm);
    }
    tsad_deallocate(net->nodes);
    tsad_deallocate(net->registers);
    tsad_deallocate(net->block_node);
    tsad_deallocate(net->block_type);
    tsad_deallocate(net->slot_offset);
    *net = (tsad_net){0};
}

/* ---- matrices and tensors ---------------------------------------------------------------- */

tsad_status tsad_matrix_make(tsad_matrix *m, int n_in, int n_out)
{
    *m = (tsad_matrix){.n_in = n_in, .n_out = n_out};
    m->data = tsad_allocate(sizeof(float) * (size_t)n_in * (size_t)n_out);
    m->bias = tsad_allocate(sizeof(float) * (size_t)n_out);
    if (!m->data || !m->bias) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a matrix of (%d, %d)", n_in, n_out);
    }
    return TSAD_OK;
}

void tsad_matrix_free(tsad_matrix *m)
{
    tsad_deallocate(m->data);
    tsad_deallocate(m->bias);
    m->data = m->bias = NULL; /* the sizes stay: they describe what was packed */
}

tsad_matrix tsad_matrix_taps(const float *weight, const float *bias, int channels, int n_out,
                             int kernel, int n, int tap, int step, bool transposed)
{
    int width = tsad_pad(channels);
    return (tsad_matrix){
        .n_in = n * width,
        .n_out = n_out,
        .source = weight,
        .source_bias = bias,
        .width = width,
        .channels = channels,
        .tap = tap,
        .step = step,
        .channel_stride = (size_t)kernel * (size_t)(transposed ? n_out : 1),
        .out_stride = (size_t)kernel * (size_t)(transposed ? 1 : channels),
    };
}

const tsad_tensor *tsad_find(const tsad_tensor *tensors, int n, const char *name)
{
    for (int i = 0; i < n; i++) {
        if (strcmp(tensors[i].name, name) == 0) {
            return &tensors[i];
        }
    }
    return NULL;
}

static void describe(char *text, size_t size, int n_dims, const int64_t *shape)
{
    size_t used = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < n_dims && used + 24 < size; i++) {
        used +=
            (size_t)snprintf(text + used, size - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    }
    snprintf(text + used, size - used, n_dims == 1 ? ",)" : ")");
}

static tsad_status misshapen(const tsad_tensor *t, int n_dims, const int64_t *shape)
{
    char expected[128], got[128];
    describe(expected, sizeof expected, n_dims, shape);
    describe(got, sizeof got, t->n_dims, t->shape);
    return tsad_fail(TSAD_SHAPE, "tensor '%s': expected shape %s, got %s", t->name, expected, got);
}

/* once, even if it is asked for again */
static tsad_status write_down(tsad_wanted_list *wanted, const char *name, int n_dims,
                              const int64_t *shape)
{
    for (int i = 0; i < wanted->n; i++) {
        if (strcmp(wanted->list[i].name, name) == 0) {
            return TSAD_OK;
        }
    }
    if (wanted->n == wanted->capacity) {
        int capacity = wanted->capacity ? 2 * wanted->capacity : 64;
        tsad_wanted *list = tsad_allocate(sizeof *list * (size_t)capacity);
        if (!list) {
            return tsad_fail(TSAD_MEMORY, "out of memory for the names of %d tensors", capacity);
        }
        if (wanted->n) {
            memcpy(list, wanted->list, sizeof *list * (size_t)wanted->n);
        }
        tsad_deallocate(wanted->list);
        wanted->list = list;
        wanted->capacity = capacity;
    }
    tsad_wanted *own = &wanted->list[wanted->n++];
    snprintf(own->name, sizeof own->name, "%s", name);
    own->n_dims = n_dims;
    memcpy(own->shape, shape, sizeof *shape * (size_t)n_dims);
    return TSAD_OK;
}

tsad_status tsad_take_shape(tsad_tensors tensors, const char *name, int n_dims,
                            const int64_t *shape, const float **out)
{
    *out = NULL;
    if (tensors.wanted) {
        return write_down(tensors.wanted, name, n_dims, shape);
    }
    const tsad_tensor *t = tsad_find(tensors.list, tensors.n, name);
    if (!t) {
        return tsad_fail(TSAD_ARGUMENT, "tensor '%s' is missing", name);
    }
    if (t->n_dims != n_dims || memcmp(t->shape, shape, sizeof(int64_t) * (size_t)n_dims) != 0) {
        return misshapen(t, n_dims, shape);
    }
    *out = t->data;
    return TSAD_OK;
}

tsad_status tsad_take(tsad_tensors tensors, const char *name, int64_t rows, int64_t cols,
                      const float **out)
{
    int64_t count = 1, shape[2] = {rows, cols};
    *out = NULL;
    if (tensors.wanted) {
        return write_down(tensors.wanted, name, cols ? 2 : 1, shape);
    }
    const tsad_tensor *t = tsad_find(tensors.list, tensors.n, name);
    if (!t) {
        return tsad_fail(TSAD_ARGUMENT, "tensor '%s' is missing", name);
    }
    for (int i = 0; i < t->n_dims; i++) {
        count *= t->shape[i];
    }
    bool shaped =
        cols ? t->n_dims >= 2 && t->shape[t->n_dims - 1] == cols && t->shape[t->n_dims - 2] == rows
             : t->n_dims == 1 && t->shape[0] == rows;
    if (!shaped || count != rows * (cols ? cols : 1)) {
        return misshapen(t, cols ? 2 : 1, shape);
    }
    *out = t->data;
    return TSAD_OK;
}

tsad_status tsad_matrix_linear(tsad_matrix *m, int n_in, int n_out, const float *weight,
                               const float *bias, const float *gain, const float *shift)
{
    *m = (tsad_matrix){.n_in = n_in, .n_out = n_out};
    if (!weight) {
        return TSAD_OK;
    }
    TSAD_TRY(tsad_matrix_make(m, n_in, n_out));
    for (int o = 0; o < n_out; o++) {
        const float *row = weight + (size_t)o * (size_t)n_in;
        double b = bias ? bias[o] : 0;
        for (int i = 0; i < n_in; i++) {
            double w = row[i];
            if (shift) {
                b += w * shift[i];
            }
            m->data[(size_t)i * (size_t)n_out + (size_t)o] = (float)(gain ? w * gain[i] : w);
        }
        m->bias[o] = (float)b;
    }
    return TSAD_OK;
}

tsad_status tsad_copy_floats(float **out, const float *source, size_t n)
{
    if (!source) {
        return TSAD_OK;
    }
    *out = tsad_allocate(sizeof(float) * n);
    if (!*out) {
        return tsad_fail(TSAD_MEMORY, "out of memory for %zu floats", n);
    }
    memcpy(*out, source, sizeof(float) * n);
    return TSAD_OK;
}

void tsad_scale_queries(tsad_matrix *qkv, int head_dim)
{
    float scale = (float)(1.0 / sqrt(head_dim));
    int d = qkv->data ? qkv->n_in : 0;
    for (int i = 0; i < d; i++) {
        for (int o = 0; o < d; o++) {
            qkv->data[(size_t)i * (size_t)qkv->n_out + (size_t)o] *= scale;
        }
    }
    for (int o = 0; o < d; o++) {
        qkv->bias[o] *= scale;
    }
}
