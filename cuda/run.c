/* run.c: rows of a program, op by op, as launches on the engine's stream. */
#include "cuda.h"

#include <string.h>

static float *reg(const tsad_cuda_context *c, int i) { return c->registers[i]; }

static void add(const tsad_cuda_context *c, const tsad_op *op)
{
    const tsad_node *node = &c->net->nodes[op->node];
    const tsad_register *out = &c->net->registers[node->out];
    tsad_addition p = {
        .base = c->lane->slots,
        .offset = c->e->offsets + op->src,
        .count = c->e->counts + op->src,
        .n = op->n_src,
        .rows = out->tokens,
        .channels = out->channels,
        .to = {.y = reg(c, node->out), .ld = tsad_pad(out->channels), .adds = true},
    };
    if (op->kind == TSAD_OP_GATED) {
        p.to.gate = tsad_cuda_gate(c, node);
    } else if (op->repeat) {
        p.base = c->e->sums[op->repeat - 1];
        p.offset = NULL;
        p.n = 1;
    } else if (op->remember) {
        p.kept = c->e->sums[op->remember - 1];
    }
    tsad_launch_addition(c->e->stream, p);
}

static void update_sample(const tsad_cuda_context *c, bool first)
{
    const tsad_run *run = c->run;
    size_t floats = (size_t)c->m->horizon * (size_t)c->m->action_dim;
    tsad_update p = {
        .x = reg(c, c->net->input),
        .e = reg(c, c->net->output),
        .previous = c->e->previous_x0,
        .first = first,
        .ld = tsad_pad(c->m->action_dim),
        .rows = c->m->horizon,
        .channels = c->m->action_dim,
    };
    memcpy(p.coefficient, run->sampler + (size_t)c->row * TSAD_SAMPLER_COLUMNS,
           sizeof p.coefficient);
    p.z = p.coefficient[TSAD_SAMPLER_COLUMNS - 1] != 0 ? c->e->noise + (size_t)(c->row + 1) * floats
                                                       : NULL;
    tsad_launch_update(c->e->stream, p);
}

static void run_op(const tsad_cuda_context *c, const tsad_op *op, bool first)
{
    switch (op->kind) {
    case TSAD_OP_NODE:
        tsad_cuda_fixed(c, &c->net->nodes[op->node]);
        break;
    case TSAD_OP_COMPUTE:
        tsad_cuda_compute(c, op);
        break;
    case TSAD_OP_ADD:
    case TSAD_OP_GATED:
        add(c, op);
        break;
    default:
        if (c->run->sampler) {
            update_sample(c, first);
        }
    }
}

/* where the program's sources are in the lane's slots */
static tsad_status upload_sources(const tsad_cuda_context *c)
{
    const tsad_program *program = c->run->program;
    size_t n = (size_t)program->n_sources;
    void *offsets, *counts;
    if (n == 0) {
        return TSAD_OK;
    }
    TSAD_TRY(tsad_cuda_stage(c->e, n * sizeof(int64_t), &offsets));
    for (size_t i = 0; i < n; i++) {
        ((int64_t *)offsets)[i] = tsad_cuda_slot(c, program->sources[i]) - c->lane->slots;
    }
    tsad_upload(c->e->stream, c->e->offsets, offsets, n * sizeof(int64_t));
    TSAD_TRY(tsad_cuda_stage(c->e, n * sizeof(float), &counts));
    memcpy(counts, program->counts, n * sizeof(float));
    tsad_upload(c->e->stream, c->e->counts, counts, n * sizeof(float));
    return TSAD_OK;
}

/* what the sampler adds after these rows */
static tsad_status upload_noise(const tsad_cuda_context *c, int row_begin, int row_end)
{
    const tsad_run *run = c->run;
    size_t floats = (size_t)c->m->horizon * (size_t)c->m->action_dim,
           bytes = sizeof(float) * floats;
    int rows = 0; /* the last one that any of them reads, and one */
    void *staged;
    for (int k = row_begin; k < row_end && run->sampler; k++) {
        bool adds = run->sampler[(size_t)(k + 1) * TSAD_SAMPLER_COLUMNS - 1] != 0;
        rows = adds ? k + 2 - row_begin : rows;
    }
    if (rows == 0) {
        return TSAD_OK;
    }
    TSAD_TRY(tsad_cuda_stage(c->e, bytes * (size_t)(rows - 1), &staged));
    for (int k = 1; k < rows; k++) {
        memcpy((char *)staged + bytes * (size_t)(k - 1),
               run->noise + (size_t)(row_begin + k) * run->noise_step, bytes);
    }
    tsad_upload(c->e->stream, c->e->noise + floats * (size_t)(row_begin + 1), staged,
                bytes * (size_t)(rows - 1));
    return TSAD_OK;
}

tsad_status tsad_cuda_run(tsad_queue *queue, const tsad_run *runs, int n, int row_begin,
                          int row_end)
{
    tsad_engine *e = queue->engine;
    const tsad_program *program = runs->program;
    tsad_cuda_context c = {.e = e,
                           .run = runs,
                           .m = e->model,
                           .cuda = tsad_cuda_of(e->model),
                           .net = &e->model->nets[runs->part],
                           .lane = &e->lanes[runs->lane],
                           .registers = e->registers[runs->part]};
    (void)n; /* one: see each */
    TSAD_TRY(upload_sources(&c));
    TSAD_TRY(upload_noise(&c, row_begin, row_end));
    for (c.row = row_begin; c.row < row_end; c.row++) {
        c.step = c.row + runs->first_step;
        if (runs->sampler && tsad_cuda_stops(e)) {
            return TSAD_INTERRUPTED;
        }
        for (int i = program->row_start[c.row]; i < program->row_start[c.row + 1]; i++) {
            run_op(&c, &program->ops[i], c.row == row_begin);
        }
    }
    return TSAD_OK;
}
