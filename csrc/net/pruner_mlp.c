/* pruner_mlp.c: a pruner that costs little. The S memory tokens of a step in a row, one hidden
 * layer, four numbers per block:
 *
 *   scores (B, 4) = W2 relu(W0 [time, observations] + b0) + b2
 *
 * Where the encoder works token by token, W0 splits: the time token's part is a table made here,
 * the observations' part is computed once per chunk, and the K steps are the rows of one product.
 */
#include "../model.h"

/* columns `from` on of a torch weight (n_out, n_all), transposed */
static tsad_status columns(tsad_matrix *m, const float *weight, const float *bias, int n_all,
                           int from, int n_out)
{
    if (!weight) {
        return TSAD_OK;
    }
    TSAD_TRY(tsad_matrix_make(m, n_all - from, n_out));
    for (int o = 0; o < n_out; o++) {
        for (int i = from; i < n_all; i++) {
            m->data[(size_t)(i - from) * (size_t)n_out + (size_t)o] =
                weight[(size_t)o * (size_t)n_all + (size_t)i];
        }
        m->bias[o] = bias ? bias[o] : 0;
    }
    return TSAD_OK;
}

/* table (K, hidden) = b0 + W0[:, :D] time */
static tsad_status tabulate(tsad_node *node, const float *weight, const float *bias, int n_all,
                            int hidden, const float *time_memory, int K, int d)
{
    node->table = tsad_allocate(sizeof(float) * (size_t)K * (size_t)hidden);
    if (!node->table) {
        return tsad_fail(TSAD_MEMORY, "out of memory for the pruner's table of %d steps", K);
    }
    for (int k = 0; k < K; k++) {
        for (int o = 0; o < hidden; o++) {
            double sum = bias[o];
            for (int i = 0; i < d; i++) {
                sum += (double)weight[(size_t)o * (size_t)n_all + (size_t)i] *
                       (double)time_memory[(size_t)k * (size_t)d + (size_t)i];
            }
            node->table[(size_t)k * (size_t)hidden + (size_t)o] = (float)sum;
        }
    }
    return TSAD_OK;
}

tsad_status tsad_net_pruner_mlp(const tsad_model_spec *spec, tsad_model *model,
                                const float *time_memory)
{
    tsad_net *net = &model->nets[TSAD_PRUNER_NET];
    int d = spec->n_emb, hidden = spec->pruner_hidden, K = spec->n_steps, B = spec->n_blocks;
    int n_all = model->n_memory * d, from = time_memory ? d : 0, rows = time_memory ? K : 1;
    if (hidden < 1) {
        return tsad_fail(TSAD_ARGUMENT, "pruner: hidden: expected at least 1, got %d", hidden);
    }
    const float *w0, *b0, *w2, *b2;
    tsad_tensors tensors = tsad_pruner_tensors_of(spec);
    TSAD_TRY(tsad_take(tensors, "0.weight", hidden, n_all, &w0));
    TSAD_TRY(tsad_take(tensors, "0.bias", hidden, 0, &b0));
    TSAD_TRY(tsad_take(tensors, "2.weight", 4 * B, hidden, &w2));
    TSAD_TRY(tsad_take(tensors, "2.bias", 4 * B, 0, &b2));
    TSAD_TRY(tsad_net_begin(net, 5, 4));
    int memory = tsad_net_register(net, 1, n_all - from), first = tsad_net_register(net, 1, hidden);
    int middle = time_memory ? tsad_net_register(net, rows, hidden) : first;
    int scores = tsad_net_register(net, rows, 4 * B);
    net->input = memory;
    net->output = scores;
    tsad_net_add(net, TSAD_PRUNE_TOKENS, memory, memory);
    tsad_node *node = tsad_net_add(net, TSAD_LINEAR, memory, first);
    TSAD_TRY(columns(&node->m[0], w0, time_memory ? NULL : b0, n_all, from, hidden));
    if (time_memory) {
        node = tsad_net_add(net, TSAD_PRUNE_SPREAD, first, middle);
        TSAD_TRY(tabulate(node, w0, b0, n_all, hidden, time_memory, K, d));
    } else {
        node->activation = TSAD_RELU;
    }
    node = tsad_net_add(net, TSAD_LINEAR, middle, scores);
    TSAD_TRY(tsad_matrix_linear(&node->m[0], hidden, 4 * B, w2, b2, NULL, NULL));
    tsad_net_add(net, TSAD_STORE, scores, scores)->array = TSAD_ARRAY_SCORES;
    model->pruner.query_tokens = time_memory ? model->n_memory - 1 : model->n_memory;
    model->pruner.at_once = time_memory != NULL;
    TSAD_TRY(tsad_net_finish(net));
    model->has_pruner = true;
    return TSAD_OK;
}
