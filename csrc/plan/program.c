/* program.c: sources -> slots -> program. Pure functions of integers (plan_core.h), so the same
 * rules can run on a GPU.
 */
#include "program.h"
#include "plan_core.h"

#include <string.h>

void tsad_program_carve(tsad_program *program, tsad_arena *arena, int n_rows, int max_ops,
                        int max_sources)
{
    program->n_rows = n_rows;
    program->max_ops = max_ops;
    program->max_sources = max_sources;
    program->row_start = TSAD_CARVE(arena, int32_t, n_rows + 1);
    program->closed = TSAD_CARVE(arena, uint8_t, n_rows);
    program->ops = TSAD_CARVE(arena, tsad_op, max_ops);
    program->sources = TSAD_CARVE(arena, int32_t, max_sources);
    program->counts = TSAD_CARVE(arena, float, max_sources);
}

static tsad_op *emit(tsad_program *program, tsad_op_kind kind, int node)
{
    tsad_op *op = &program->ops[program->n_ops++];
    *op = (tsad_op){.kind = (uint8_t)kind, .node = (int16_t)node, .dst = -1, .src = -1, .kept = -1};
    return op;
}

/* What the compiler of a program carries from row to row. */
typedef struct compiler {
    tsad_program *program;
    const tsad_net *net;
    bool keep;
    int32_t recent[TSAD_REMEMBERED]; /* additions whose sums a later row may add again, -1: none */
    int oldest;                      /* of them */
    int32_t again[TSAD_REMEMBERED];  /* the last row that does nothing but add this sum, -1: none */
    bool computed[TSAD_MAX_BLOCKS];  /* by a row before, or this one */
} compiler;

/* One more slot for an addition: rollout slots first, each kind in the order of the blocks, and a
 * slot that several branches reuse once. Such a slot is no rollout's: those are one cell's own. */
static void add_source(tsad_program *program, tsad_op *op, int32_t slot, bool rollout)
{
    int32_t *list = program->sources + op->src;
    float *count = program->counts + op->src;
    for (int i = op->n_rollout; i < op->n_src; i++) {
        if (list[i] == slot) {
            count[i]++;
            return;
        }
    }
    int at = op->n_src++;
    program->n_sources++;
    if (rollout) {
        for (; at > op->n_rollout; at--) {
            list[at] = list[at - 1];
            count[at] = count[at - 1];
        }
        op->n_rollout++;
    }
    list[at] = slot;
    count[at] = 1;
}

/* An addition is complete: does it repeat a recent one, and what of it is worth keeping? The same
 * slots hold the same values until one of them is computed again, and then their numbers differ. */
static void close_addition(compiler *c, tsad_op *op)
{
    enum { WORTH = 3 };
    tsad_program *program = c->program;
    if (!op || op->n_src < WORTH) {
        return;
    }
    size_t floats = tsad_register_floats(&c->net->registers[c->net->nodes[op->node].out]);
    for (int i = 0; i < TSAD_REMEMBERED; i++) {
        tsad_op *other = c->recent[i] >= 0 ? &program->ops[c->recent[i]] : NULL;
        if (other && other->n_src == op->n_src &&
            c->net->nodes[other->node].out == c->net->nodes[op->node].out &&
            memcmp(program->sources + other->src, program->sources + op->src,
                   sizeof(int32_t) * (size_t)op->n_src) == 0 &&
            memcmp(program->counts + other->src, program->counts + op->src,
                   sizeof(float) * (size_t)op->n_src) == 0) {
            other->remember = op->repeat = (uint8_t)(i + 1);
            return;
        }
    }
    c->recent[c->oldest] = (int32_t)(op - program->ops);
    c->again[c->oldest] = -1;
    c->oldest = (c->oldest + 1) % TSAD_REMEMBERED;
    if (c->keep && op->n_rollout > 1 && program->kept_floats + floats <= INT32_MAX) {
        op->kept = (int32_t)program->kept_floats;
        program->kept_floats += floats;
    }
}

/* one row of a plan; `slot` is what the resolver said of each block */
static void compile_row(compiler *c, const int32_t *slot, const uint8_t *sources)
{
    tsad_program *program = c->program;
    const tsad_net *net = c->net;
    tsad_op *run = NULL; /* the addition that the next reused branch may join */
    for (int i = 0; i < net->n_nodes; i++) {
        const tsad_node *node = &net->nodes[i];
        int source = node->block < 0 ? TSAD_SKIP : sources[node->block];
        bool fixed = node->block < 0, gated = node->cache_point == TSAD_BEFORE_GATE;
        if (fixed && node->is_residual) {
            continue;
        }
        bool joins = !fixed && node->residual < 0 &&
                     (source == TSAD_SKIP || (source != TSAD_COMPUTE && !gated && run &&
                                              net->nodes[run->node].out == node->out));
        if (!joins) {
            close_addition(c, run);
            run = NULL;
        }
        if (fixed) {
            emit(program, TSAD_OP_NODE, i);
            continue;
        }
        if (node->residual >= 0) {
            emit(program, TSAD_OP_NODE, node->residual);
        }
        if (source == TSAD_COMPUTE) {
            tsad_op *op = emit(program, TSAD_OP_COMPUTE, i);
            op->dst = slot[node->block];
            op->again = c->computed[node->block];
            c->computed[node->block] = true;
        } else if (source != TSAD_SKIP) {
            if (!run) {
                run = emit(program, gated ? TSAD_OP_GATED : TSAD_OP_ADD, i);
                run->src = program->n_sources;
            }
            add_source(program, run, slot[node->block], source == TSAD_REUSE_ROLLOUT);
            run = gated ? NULL : run;
        }
    }
    close_addition(c, run);
    emit(program, TSAD_OP_UPDATE, -1);
}

/* A row that only adds a remembered sum has a closed form, which is worth its tables from the
 * second such row on. */
static void close_row(compiler *c, int k)
{
    tsad_program *program = c->program;
    const tsad_op *op = &program->ops[program->row_start[k]]; /* embedding, addition, head */
    int n = program->n_ops - program->row_start[k];
    program->closed[k] = 0;
    if (n != 4 || op[1].kind != TSAD_OP_ADD || !op[1].repeat) {
        return;
    }
    int sum = op[1].repeat - 1;
    if (c->again[sum] >= 0) {
        program->closed[c->again[sum]] = program->closed[k] = op[1].repeat;
    }
    c->again[sum] = k;
}

void tsad_program_compile(tsad_program *program, const tsad_model *model, const uint8_t *sources,
                          bool keep, int32_t *last_of_block)
{
    const tsad_net *net = tsad_denoiser(model);
    int B = net->n_blocks;
    int32_t slot[TSAD_MAX_BLOCKS];
    compiler c = {.program = program, .net = net, .keep = keep};
    memset(c.recent, -1, sizeof c.recent);
    memset(c.again, -1, sizeof c.again);
    tsad_resolver resolver;
    tsad_resolver_begin(&resolver, B, last_of_block);
    program->serial++;
    program->kept_floats = 0;
    program->n_ops = program->n_sources = 0;
    program->cost = 0;
    program->reads_rollout = false;
    memset(program->cells, 0, sizeof program->cells);
    for (int k = 0; k < program->n_rows; k++) {
        const uint8_t *row = sources + (size_t)k * (size_t)B;
        for (int b = 0; b < B; b++) {
            tsad_plan_reason reason;
            program->cells[row[b]]++;
            if (row[b] == TSAD_REUSE_ROLLOUT) {
                slot[b] = k * B + b; /* validated by whoever made the plan */
                program->reads_rollout = true;
            } else {
                slot[b] =
                    tsad_resolver_next(&resolver, row[b], k, b, net->block_type[b], NULL, &reason);
            }
            if (row[b] == TSAD_COMPUTE) {
                program->cost += model->block_cost[b];
            }
        }
        program->row_start[k] = program->n_ops;
        compile_row(&c, slot, row);
        if (model->closed.base) {
            close_row(&c, k);
        }
    }
    program->row_start[program->n_rows] = program->n_ops;
}

void tsad_program_part_rows(tsad_program *program)
{
    for (int i = 0; i < program->n_ops; i++) {
        program->ops[i].remember = program->ops[i].repeat = 0;
    }
    memset(program->closed, 0, (size_t)program->n_rows);
}

void tsad_program_straight(tsad_program *program, const tsad_net *net, int n_rows)
{
    program->n_ops = program->n_sources = 0;
    for (int k = 0; k < n_rows; k++) {
        program->row_start[k] = program->n_ops;
        for (int i = 0; i < net->n_nodes; i++) {
            emit(program, net->nodes[i].block < 0 ? TSAD_OP_NODE : TSAD_OP_COMPUTE, i);
        }
    }
    program->row_start[n_rows] = program->n_ops;
}

int tsad_program_encoder_rows(const tsad_net *net)
{
    int n = 1;
    for (int i = 0; i < net->n_nodes; i++) {
        n += net->nodes[i].kind == TSAD_FOLD;
    }
    return n;
}

void tsad_program_encoder(tsad_program *program, const tsad_net *net)
{
    int row = 0;
    program->n_ops = program->n_sources = 0;
    program->row_start[row] = 0;
    for (int i = 0; i < net->n_nodes; i++) {
        if (net->nodes[i].kind == TSAD_FOLD) {
            program->row_start[++row] = program->n_ops;
        }
        emit(program, TSAD_OP_NODE, i);
    }
    program->row_start[row + 1] = program->n_ops;
}
