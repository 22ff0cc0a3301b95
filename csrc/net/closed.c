/* closed.c: rows that compute nothing, in closed form.
 *
 * Where all branches add to one register between a linear embedding of the sample and a LayerNorm
 * with a linear head, a row that only reuses is, for each token with action s and sum S of reused
 * branches,
 *   x = E s + c,   c = bias + table + S,   out = (x - mean) / sqrt(var + eps) . H + b
 * With E and c centred over the channels (E', c'), nothing as wide as the network is left:
 *   var = c'.c' / D + 2 s . (E' c' / D) + s (E' E'^T / D) s,   (x - mean) H = s (E' H) + c' H
 * What depends on S is a few numbers per token, made when a sum is first added again.
 */
#include "../model.h"

static bool is_plain_linear(const tsad_node *node)
{
    return node->kind == TSAD_LINEAR && node->activation == TSAD_LINEAR_ONLY;
}

/* embedding, branches on one register cached after their gate, head: nothing else */
static bool has_closed_form(const tsad_net *net)
{
    if (net->n_nodes < 3) {
        return false;
    }
    const tsad_node *embed = &net->nodes[0], *head = &net->nodes[net->n_nodes - 1];
    if (!is_plain_linear(embed) || embed->normalise || embed->in != net->input ||
        !is_plain_linear(head) || !head->normalise || head->table || head->in != embed->out ||
        head->out != net->output) {
        return false;
    }
    for (int i = 1; i < net->n_nodes - 1; i++) {
        const tsad_node *node = &net->nodes[i];
        if (node->block < 0 || node->residual >= 0 || node->out != embed->out ||
            node->cache_point != TSAD_AFTER_GATE) {
            return false;
        }
    }
    return true;
}

/* E' and H^T, and how they meet */
static void fill(const tsad_net *net, tsad_closed *f)
{
    const tsad_node *embed = &net->nodes[0], *head = &net->nodes[net->n_nodes - 1];
    int A = f->actions, D = f->width;
    for (int a = 0; a < A; a++) {
        double mean = 0;
        for (int i = 0; i < D; i++) {
            mean += embed->m[0].data[(size_t)a * (size_t)D + (size_t)i] / (double)D;
        }
        for (int i = 0; i < D; i++) {
            size_t at = (size_t)a * (size_t)D + (size_t)i;
            f->embed[at] = (float)(embed->m[0].data[at] - mean);
            f->head[at] = head->m[0].data[(size_t)i * (size_t)A + (size_t)a];
        }
        f->head_bias[a] = head->m[0].bias[a];
    }
    for (int a = 0; a < A; a++) {
        for (int b = 0; b < A; b++) {
            double square = 0, through = 0;
            for (int i = 0; i < D; i++) {
                double e = f->embed[(size_t)a * (size_t)D + (size_t)i];
                square += e * f->embed[(size_t)b * (size_t)D + (size_t)i];
                through += e * f->head[(size_t)b * (size_t)D + (size_t)i];
            }
            f->square[a * A + b] = (float)(square / D);
            f->through[a * A + b] = (float)through;
        }
    }
    for (int t = 0; t < f->tokens; t++) {
        for (int i = 0; i < D; i++) {
            size_t at = (size_t)t * (size_t)D + (size_t)i;
            f->base[at] = embed->m[0].bias[i] + (embed->table ? embed->table[at] : 0);
        }
    }
}

tsad_status tsad_net_closed(tsad_model *model)
{
    const tsad_net *net = &model->nets[TSAD_DENOISER];
    tsad_closed *f = &model->closed;
    if (!has_closed_form(net)) {
        return TSAD_OK;
    }
    size_t A = (size_t)model->action_dim, T = (size_t)model->horizon;
    size_t D = (size_t)net->registers[net->nodes[0].out].channels;
    size_t floats = T * D + 2 * A * D + A + 2 * A * A;
    float *at = tsad_allocate(sizeof(float) * floats);
    if (!at) {
        return tsad_fail(TSAD_MEMORY, "out of memory for %zu floats", floats);
    }
    *f = (tsad_closed){.tokens = (int)T, .width = (int)D, .actions = (int)A, .base = at};
    f->embed = f->base + T * D;
    f->head = f->embed + A * D;
    f->head_bias = f->head + A * D;
    f->square = f->head_bias + A;
    f->through = f->square + A * A;
    fill(net, f);
    return TSAD_OK;
}
