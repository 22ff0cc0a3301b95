/* nodes.c: a network given as an explicit list, for shapes that no family here describes yet.
 *
 * nodes (n, 10) int32: kind, in, in2, out, residual, type, cache_point, activation, stride, kernel
 * (kind and the enums as in net.h; -1 where there is nothing). registers (m, 2): tokens,
 * channels. The first register is the noisy sample, the last the network's output. Weights are
 * tensors named "nodes.{i}.{0,1}.weight" in torch layout, (n_out, kernel * n_in) for convolutions
 * (tap-major), with ".bias"; "nodes.{i}.norm.weight/.bias" puts a LayerNorm before matrix 0;
 * "nodes.{i}.table" (tokens, channels) is added; "nodes.{i}.gate" (K, channels) is the gate of a
 * branch cached before it. There is no encoder: the observation does not reach such a network.
 */
#include "../model.h"

#include <stdio.h>

enum { KIND, IN, IN2, OUT, RESIDUAL, TYPE, CACHE_POINT, ACTIVATION, STRIDE, KERNEL, COLUMNS };

static const float *optional(const tsad_model_spec *spec, int i, const char *suffix, int rows,
                             int cols, tsad_status *status)
{
    char name[64];
    const float *data = NULL;
    snprintf(name, sizeof name, "nodes.%d.%s", i, suffix);
    if (*status == TSAD_OK && tsad_find(spec->tensors, spec->n_tensors, name)) {
        *status = tsad_take(tsad_tensors_of(spec), name, rows, cols, &data);
    }
    return data;
}

static tsad_status take_matrix(const tsad_model_spec *spec, int i, int j, int n_in, int n_out,
                               const float *gain, const float *shift, tsad_matrix *m)
{
    char name[64];
    const float *weight, *bias;
    snprintf(name, sizeof name, "nodes.%d.%d.weight", i, j);
    TSAD_TRY(tsad_take(tsad_tensors_of(spec), name, n_out, n_in, &weight));
    snprintf(name, sizeof name, "nodes.%d.%d.bias", i, j);
    TSAD_TRY(tsad_take(tsad_tensors_of(spec), name, n_out, 0, &bias));
    return tsad_matrix_linear(m, n_in, n_out, weight, bias, gain, shift);
}

static tsad_status check(const tsad_model_spec *spec, int i, const int32_t *row)
{
    const int reg[3] = {row[IN], row[IN2], row[OUT]};
    for (int r = 0; r < 3; r++) {
        bool needed = r != 1 || row[KIND] == TSAD_CONCAT;
        if (reg[r] >= spec->n_registers || (reg[r] < 0 && needed)) {
            return tsad_fail(TSAD_ARGUMENT, "node %d: register %d, expected 0 to %d", i, reg[r],
                             spec->n_registers - 1);
        }
    }
    switch (row[KIND]) {
    case TSAD_FEED_FORWARD:
    case TSAD_CONV_BRANCH:
    case TSAD_LINEAR:
    case TSAD_CONV:
    case TSAD_UPSAMPLE:
    case TSAD_CONCAT:
    case TSAD_COPY:
        break;
    default:
        return tsad_fail(TSAD_ARGUMENT, "node %d: kind %d is not allowed in an explicit list", i,
                         row[KIND]);
    }
    if (row[STRIDE] < 1 || row[KERNEL] < 1 || row[RESIDUAL] >= i || row[ACTIVATION] < 0 ||
        row[ACTIVATION] > TSAD_SILU) {
        return tsad_fail(TSAD_ARGUMENT, "node %d: bad stride, kernel, residual or activation", i);
    }
    return TSAD_OK;
}

static tsad_status add_node(const tsad_model_spec *spec, tsad_net *net, int i)
{
    const int32_t *row = spec->nodes + (size_t)i * COLUMNS;
    TSAD_TRY(check(spec, i, row));
    tsad_node *node = tsad_net_add(net, (tsad_node_kind)row[KIND], row[IN], row[OUT]);
    snprintf(node->label, sizeof node->label, "node %d", i);
    node->in2 = row[IN2];
    node->residual = row[RESIDUAL];
    node->type = row[TYPE];
    node->cache_point = row[CACHE_POINT] ? TSAD_BEFORE_GATE : TSAD_AFTER_GATE;
    node->activation = (tsad_activation)row[ACTIVATION];
    node->stride = row[STRIDE];
    node->kernel = row[KERNEL];
    const tsad_register *in = &net->registers[node->in], *out = &net->registers[node->out];
    int c = in->channels * node->kernel;
    tsad_status status = TSAD_OK;
    const float *gain = optional(spec, i, "norm.weight", in->channels, 0, &status);
    const float *shift = optional(spec, i, "norm.bias", in->channels, 0, &status);
    const float *table = optional(spec, i, "table", out->tokens, out->channels, &status);
    const float *gate = optional(spec, i, "gate", spec->n_steps, out->channels, &status);
    TSAD_TRY(status);
    node->normalise = gain && shift;
    if (node->normalise && (node->kernel != 1 || node->stride != 1)) {
        return tsad_fail(TSAD_ARGUMENT, "node %d: LayerNorm before a convolution can't be folded",
                         i);
    }
    if (node->cache_point == TSAD_BEFORE_GATE && !gate) {
        return tsad_fail(TSAD_ARGUMENT, "node %d: tensor 'nodes.%d.gate' is missing", i, i);
    }
    if (node->kind == TSAD_FEED_FORWARD || node->kind == TSAD_CONV_BRANCH) {
        char name[64];
        snprintf(name, sizeof name, "nodes.%d.0.bias", i);
        const tsad_tensor *bias = tsad_find(spec->tensors, spec->n_tensors, name);
        if (!bias || bias->n_dims != 1 || bias->shape[0] < 1) {
            return tsad_fail(TSAD_ARGUMENT, "tensor '%s' is missing", name);
        }
        int hidden = (int)bias->shape[0];
        TSAD_TRY(take_matrix(spec, i, 0, c, hidden, gain, shift, &node->m[0]));
        TSAD_TRY(
            take_matrix(spec, i, 1, hidden * node->kernel, out->channels, NULL, NULL, &node->m[1]));
    } else if (node->kind == TSAD_LINEAR || node->kind == TSAD_CONV) {
        TSAD_TRY(take_matrix(spec, i, 0, c, out->channels, gain, shift, &node->m[0]));
    }
    if (gate) {
        return tsad_copy_floats(&node->table, gate, (size_t)spec->n_steps * (size_t)out->channels);
    }
    return table
               ? tsad_copy_floats(&node->table, table, (size_t)out->tokens * (size_t)out->channels)
               : TSAD_OK;
}

tsad_status tsad_net_nodes(const tsad_model_spec *spec, tsad_model *model)
{
    tsad_net *net = &model->nets[TSAD_DENOISER];
    if (spec->n_nodes < 1 || spec->n_registers < 2) {
        return tsad_fail(TSAD_ARGUMENT, "nodes: expected at least one node and two registers");
    }
    TSAD_TRY(tsad_net_begin(net, spec->n_nodes, spec->n_registers));
    for (int r = 0; r < spec->n_registers; r++) {
        if (spec->registers[2 * r] < 1 || spec->registers[2 * r + 1] < 1) {
            return tsad_fail(TSAD_SHAPE, "register %d: sizes must be positive", r);
        }
        tsad_net_register(net, spec->registers[2 * r], spec->registers[2 * r + 1]);
    }
    net->input = 0;
    net->output = spec->n_registers - 1;
    for (int i = 0; i < spec->n_nodes; i++) {
        TSAD_TRY(add_node(spec, net, i));
    }
    const tsad_register *in = &net->registers[net->input], *out = &net->registers[net->output];
    if (in->tokens != spec->horizon || in->channels != spec->action_dim ||
        out->tokens != in->tokens || out->channels != in->channels) {
        return tsad_fail(TSAD_SHAPE,
                         "registers: the first and the last must be (%d, %d), got (%d, %d) and "
                         "(%d, %d)",
                         spec->horizon, spec->action_dim, in->tokens, in->channels, out->tokens,
                         out->channels);
    }
    return tsad_net_finish(net);
}
