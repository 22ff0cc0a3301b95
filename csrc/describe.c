/* describe.c: what a family makes of its settings: the tensors that it wants, its blocks, what they
 * cost. Its own builder says it, run without a tensor.
 */
#include "model.h"

#include <stdlib.h>
#include <string.h>

/* Multiply-accumulates of a branch as executed: after the exact rewrites, and without the taps of a
 * convolution that only meet padding. Terms of the condition are a table and one product per chunk;
 * a residual map runs whatever the source of its branch. */
static int64_t cost_of(const tsad_model *m, const tsad_node *node)
{
    const tsad_net *net = tsad_denoiser(m);
    const tsad_register *in = &net->registers[node->in], *out = &net->registers[node->out];
    int64_t T = in->tokens, D = in->channels, taps = 0;
    switch (node->kind) {
    case TSAD_SELF_ATTENTION:
        return 4 * T * D * D + 2 * T * T * D;
    case TSAD_CROSS_ATTENTION: /* folded: two vectors per memory token and head */
        return 2 * T * m->n_memory * node->n_heads * D;
    default: /* two matrices, with taps or without */
        for (int j = -(node->kernel / 2); j <= node->kernel / 2; j++) {
            taps += T > abs(j) ? T - abs(j) : 0;
        }
        return taps * (D + out->channels) * node->m[0].n_out;
    }
}

static tsad_status list_blocks(const tsad_model *m, tsad_description *out)
{
    const tsad_net *net = tsad_denoiser(m);
    out->blocks = tsad_allocate(sizeof *out->blocks * (size_t)net->n_blocks);
    if (!out->blocks) {
        return tsad_fail(TSAD_MEMORY, "out of memory for %d blocks", net->n_blocks);
    }
    out->n_blocks = net->n_blocks;
    for (int b = 0; b < net->n_blocks; b++) {
        const tsad_node *node = &net->nodes[net->block_node[b]];
        memcpy(out->blocks[b].name, node->label, sizeof node->label);
        memcpy(out->blocks[b].type, node->kin, sizeof node->kin);
        out->blocks[b].cost = cost_of(m, node);
    }
    return TSAD_OK;
}

tsad_status tsad_describe(const tsad_model_spec *spec, tsad_description *out)
{
    enum { WIDEST = 1 << 20 };
    *out = (tsad_description){0};
    TSAD_TRY(tsad_check_interface(spec));
    TSAD_TRY(tsad_check_size("hidden", spec->pruner_hidden, 0, WIDEST));
    TSAD_TRY(tsad_check_size("ff", spec->pruner_ff, 0, WIDEST));
    if (strcmp(spec->family, "nodes") == 0) {
        return tsad_fail(TSAD_ARGUMENT, "family: expected one that knows its own tensors, got "
                                        "'nodes'; name another");
    }
    tsad_model_spec own = *spec;
    own.n_steps = 0;
    own.n_pruner_tensors = spec->pruner_hidden > 0;
    own.wanted = &out->tensors;
    own.pruner_wanted = &out->pruner;
    tsad_model *m = tsad_allocate(sizeof *m);
    if (!m) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a model");
    }
    atomic_store(&m->references, 1);
    tsad_status status = tsad_net_of_family(&own, m);
    if (status == TSAD_OK) {
        status = list_blocks(m, out);
    }
    tsad_model_destroy(m);
    return status;
}

void tsad_description_free(tsad_description *d)
{
    tsad_deallocate(d->tensors.list);
    tsad_deallocate(d->pruner.list);
    tsad_deallocate(d->blocks);
    *d = (tsad_description){0};
}
