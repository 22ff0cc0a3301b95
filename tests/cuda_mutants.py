"""Faults planted in the CUDA backend, and whether a short check on the emulated GPU sees them.

python tests/cuda_mutants.py [WORD ...]     all, or those with one of the words in their name
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cuda_library import SANITIZED, SOURCES, builder


class Mutant(NamedTuple):
    """One change of one file."""

    name: str
    file: str
    old: str
    new: str
    nth: int = 0  # of the places where `old` is
    queue: int | None = None  # how much of a stream waits at most, where that matters

    def text(self) -> str:
        """The file with the change."""
        text = (SOURCES / self.file).read_text()
        places = [found.start() for found in re.finditer(re.escape(self.old), text)]
        assert len(places) > self.nth, f"{self.name}: {self.old!r} is not in {self.file}"
        at = places[self.nth]
        return text[:at] + self.new + text[at + len(self.old) :]


def barriers() -> list[Mutant]:
    """Each one of the kernels, removed."""
    count = (SOURCES / "bodies.cuh").read_text().count("team.meet()")
    return [
        Mutant(f"barrier {i} removed", "bodies.cuh", "team.meet()", "", i) for i in range(count)
    ]


K, H, L = "bodies.cuh", "kernels.cu", "list.cu"
R, N, E, G = "run.c", "node.c", "engine.c", "graph.c"
C, D, B, P = "caller.c", "device.cu", "blas.cu", "plugin.c"
ENTRIES = ("pack", "open", "remember_rollouts", "each", "unfit", "follow", "precede")
MUTANTS = [
    Mutant("product: a token too many", K, "token < p.tokens", "token <= p.tokens"),
    Mutant("product: a token too few", K, "token >= 0 &&", "token > 0 &&"),
    Mutant("product: rows beyond the last", K, "row + r < p.rows && column", "column"),
    Mutant(
        "product: columns beyond the last",
        K,
        "row + r < p.rows && column < p.n_out",
        "row + r < p.rows",
    ),
    Mutant("product: the last slice left out", K, "s < SLICES; s++", "s < SLICES - 1; s++"),
    Mutant("product: half of the warps' rows", K, "r += SLICES)", "r += 2 * SLICES)"),
    Mutant(
        "product: the first row's moments for all", K, "m = room.moments[r]", "m = room.moments[0]"
    ),
    Mutant("product: not normalised", K, "if (p.norm.used && (from", "if (false && (from"),
    Mutant("moments: a channel too many", K, "i < n; i += WARP", "i <= n; i += WARP"),
    Mutant("moments: a channel too few", K, "i < n; i += WARP", "i < n - 1; i += WARP"),
    Mutant("product: the inputs before", K, "if (k0 + CHUNK < n_in)", "if (false)"),
    Mutant("product: the weights before", K, "if (k0 + at + CHUNK < n_in)", "if (false)"),
    Mutant("product: the last four left out", K, "if (k0 + at < n_in)", "if (k0 + at + 4 < n_in)"),
    Mutant("product: rows left out", K, "if (first < rows)", "if (first + FEW <= rows)"),
    Mutant("product: no zeros around", K, "to.x[i] = there ? v : 0", "to.x[i] = v"),
    Mutant("product: what is in the place of others", K, "i < n ? i : n - 1", "i"),
    Mutant(
        "tracks: all have the first one's", H, "tracks.track[blockIdx.z / batches]", "*tracks.track"
    ),
    Mutant("tail: nothing is added", K, "p.sum.n ? x + sum_of(p.sum, at, i) : x", "x"),
    Mutant("tail: the next sample is the output", K, "sample[o] = updated(", "updated("),
    Mutant("tail: the first token's table", K, "p.table[(size_t)(t * p.n_next + j)]", "p.table[j]"),
    Mutant(
        "tail: a channel too few",
        K,
        "i < p.channels; i += WARP",
        "i < p.channels - 1; i += WARP",
    ),
    Mutant("groupnorm: the first group for all", K, "first + i % n", "i % n"),
    Mutant("groupnorm: a row too few", K, "all = p.rows * n", "all = (p.rows - 1) * n"),
    Mutant("sum: a warp's half", K, "lanes = WARP / 2", "lanes = WARP / 4"),
    Mutant(
        "sum: the next warp's room", K, "room[team.thread / WARP]", "room[team.thread / WARP + 1]"
    ),
    Mutant(
        "attention: a token ahead", K, "p.causal ? t + 1 : p.tokens", "p.causal ? t + 2 : p.tokens"
    ),
    Mutant(
        "attention: too little shared memory",
        H,
        '(size_t)p.tokens, "attention"',
        '(size_t)p.tokens - 1, "attention"',
    ),
    Mutant("attention: keys for values", K, "*values = keys + width", "*values = keys"),
    Mutant(
        "cross-attention: a token ahead",
        K,
        "t + 2 < p.n_memory ? t + 2",
        "t + 3 < p.n_memory ? t + 3",
    ),
    Mutant("cross-attention: no constant", K, "sum + token[p.shift + (size_t)h]", "sum"),
    Mutant(
        "rotation: the key's position is the query's",
        K,
        "(size_t)u * (size_t)p.head_dim",
        "(size_t)t * (size_t)p.head_dim",
    ),
    Mutant("addition: the last source left out", K, "i < p.n ? sum +", "i < p.n - 1 ? sum +"),
    Mutant("addition: how often is not asked", K, "source[i].count * p.base", "p.base"),
    Mutant("addition: the first of several", K, "i < p.n ? first + i : first", "i < 0 ? 0 : first"),
    Mutant("addition: the first gate for all", K, "source[i].gate + c)", "source[0].gate + c)"),
    Mutant("addition: the sum is not kept", K, "p.kept[at] = sum", "(void)p.kept[at]"),
    Mutant("delivery: the slot is not written", K, "to.slot[at] = v;", ""),
    Mutant("delivery: no gate", K, "v * term(to.gate, o) : v", "v : v"),
    Mutant(
        "update: x0 of two steps before",
        R,
        ".older = c->place->x0 + (odd ? padded : 0)",
        ".older = c->place->x0 + padded",
    ),
    Mutant("update: x0 of the step before", K, "p.older[at] = x0", "(void)x0"),
    Mutant("copy: a row too few", K, "t >= p.rows", "t >= p.rows - 1"),
    Mutant("prune query: the first score for all", K, "score[b * p.heads + h]", "score[h]"),
    Mutant("run: nothing is uploaded of the sources", R, "bring_sources(e, &runs[i], i);", ""),
    Mutant("run: lanes share a place", R, "&e->place[place]", "&e->place[0]"),
    Mutant("run: all tracks go together", R, "(a->node == b->node || folds)", "true"),
    Mutant("run: another program's sources", R, "lane->serial == program->serial &&", ""),
    Mutant("graph: of another plan", G, "key->run[i].serial = runs[i].program->serial;", ""),
    Mutant("graph: the plan that ran before", G, "key->run[i].program = runs[i].program;", ""),
    Mutant("graph: is not launched", G, "tsad_graph_launch(e->stream, graph);", ""),
    Mutant(
        "graph: freed before it was done",
        G,
        "tsad_graph_launch(e->stream, graph);",
        "tsad_graph_launch(e->stream, graph);\n    tsad_cuda_drop_graphs(e);",
    ),
    Mutant("graph: without the runs put off", G, "i < e->n_deferred; i++", "i < 0; i++"),
    Mutant("graph: has the old slots", E, "tsad_cuda_drop_graphs(e); /* which", "/* which"),
    Mutant(
        "run: another step's noise", R, "(size_t)(c->row + 1) * floats", "(size_t)c->row * floats"
    ),
    Mutant("run: the first row reads x0 before", R, ".last = first ? NULL : ", ".last = "),
    Mutant("run: one row for all rollouts", "cuda.h", "c->run->rollout ? slot / B : 0", "0"),
    Mutant("run: the next row's slots", "cuda.h", "c->run->rollout ? slot / B : 0", "slot / B"),
    Mutant("node: the gate of another block", N, "node->term + 2 * channels", "node->term"),
    Mutant("node: odd tokens as even ones", N, "p.first = i - 1", "p.first = i"),
    Mutant(
        "node: every layer's memory is the first's",
        N,
        "folded + layer * (tokens - 1) * p.floats",
        "folded",
    ),
    Mutant(
        "engine: all lanes' input in one place",
        E,
        "e->place[place].registers[part][reg] + (s",
        "e->place[0].registers[part][reg] + (s",
    ),
    Mutant(
        "engine: the last number is not copied",
        E,
        "from + bytes : e->in_to",
        "from + bytes - 4 : e->in_to",
    ),
    Mutant(
        "engine: actions before they are there",
        E,
        "TSAD_TRY(wait(e));\n    }\n    float",
        "}\n    float",
    ),
    Mutant("engine: the lane before's actions", E, "e->staged_out + at", "e->staged_out + 0 * at"),
    Mutant("engine: slots one row too few", E, "i < e->n_lanes ? rows : 1", "1"),
    Mutant("take: a row too few", H, "t >= p.rows", "t >= p.rows - 1"),
    Mutant("take: not normalised", H, "p.scale ? __fadd_rn(", "false ? __fadd_rn("),
    Mutant("take: not shifted", H, "p.shift ? raw - p.shift[c] : raw", "raw"),
    Mutant(
        "take: multiplied and added in one",
        H,
        "__fadd_rn(__fmul_rn(x, p.scale[c]), p.offset[c])",
        "fmaf(x, p.scale[c], p.offset[c])",
    ),
    Mutant("take: what is wrong stays", H, "x = NAN;", ""),
    Mutant("take: what is wrong is not said", H, "atomicMin(p.fault,", "(void)(p.fault,"),
    Mutant("take: counted from the row", H, "(p.index + at)", "(at)"),
    Mutant("take: the last that is wrong", H, "atomicMin(p.fault,", "*p.fault = ("),
    Mutant("hand over: the first actions", H, "p.first * p.channels + i", "i"),
    Mutant("hand over: what is wrong is written", H, "wrong > 0 ? NAN : ", ""),
    Mutant(
        "hand over: each thread for itself",
        H,
        "wrong = team_sum(Alone<THREADS>(), wrong, room)",
        "(void)room",
    ),
    Mutant("hand over: not shifted", H, "p.shift ? x + p.shift[c] : x", "x"),
    Mutant("caller: what was staged comes later", C, "tsad_cuda_upload(e);", ""),
    Mutant(
        "caller: all lanes' actions are the first's", C, ".x = e->place[place]", ".x = e->place[0]"
    ),
    Mutant("caller: a fault is found twice", C, "e->fault[given] = ~0ull;", ""),
    Mutant("caller: of another argument", C, "&e->fault[from->given]", "&e->fault[0]"),
    Mutant(
        "stream: the caller's is not followed",
        D,
        "return order(stream->order, reinterpret_cast<cudaStream_t>(other), stream->cuda);",
        "return (void)stream, (void)other, TSAD_OK;",
    ),
    Mutant(
        "stream: the caller's does not wait",
        D,
        "return order(stream->order, stream->cuda, reinterpret_cast<cudaStream_t>(other));",
        "return (void)stream, (void)other, TSAD_OK;",
    ),
    Mutant(
        "stream: the event of the time before", D, "cudaEventRecord(event, before)", "cudaSuccess"
    ),
    Mutant("graph: with another call's copies", G, "key->in_from = e->in_from;", ""),
    Mutant("take: nothing of the chunk before", H, "x = p.base ? ", "x = false ? "),
    Mutant(
        "take: the chunk before added in one",
        H,
        "__fadd_rn(p.base[i], __fmul_rn(p.share, x))",
        "fmaf(p.share, x, p.base[i])",
    ),
    Mutant("hand over: not corrected", H, "if (!p.move) {", "if (true) {"),
    Mutant("hand over: no gain", H, "__fmul_rn(p.gain ? p.gain[i] : 0, moved)", "0"),
    Mutant("hand over: the first is expected", H, "x - p.expected[i] : 0", "x - p.expected[0] : 0"),
    Mutant("hand over: the first one is moved too", H, "p.smooths && t > 0 &&", "p.smooths &&"),
    Mutant("hand over: the last one is moved too", H, " && t + 1 < p.rows) {", ") {"),
    Mutant("hand over: not weighed", H, "if (p.smooths &&", "if (false &&"),
    Mutant(
        "hand over: neighbours as they came", H, "before = corrected(p,", "before = handed_over(p,"
    ),
    Mutant("hand over: no lead", H, "if (p.lead == 0) {", "if (true) {"),
    Mutant(
        "hand over: beyond the clip",
        H,
        "x = fminf(fmaxf(x, fminf(one, other)), fmaxf(one, other));",
        "",
    ),
    Mutant("caller: all begin with the first's", C, "e->place[place].begins", "e->place[0].begins"),
    Mutant(
        "caller: all are finished as the first", C, "e->place[place].finish", "e->place[0].finish"
    ),
    Mutant("caller: what finishes stays on the host", C, "tsad_cuda_upload(e);", "", 1),
    Mutant("caller: gain and shift in one place", C, "there + 2 * n", "there + n"),
    Mutant(
        "blas: the weights' rows are as long as the inputs'", B, "w, outputs, x", "w, inputs, x"
    ),
    Mutant("blas: the inputs' rows are close together", B, "x, ldx, &zero", "x, inputs, &zero"),
    Mutant("blas: results as far apart as inputs", B, "y, outputs)", "y, inputs)"),
    Mutant("blas: the weights are turned", B, "handle, AS_IT_IS, AS_IT_IS", "handle, 1, AS_IT_IS"),
    Mutant("blas: the inputs are turned", B, "handle, AS_IT_IS, AS_IT_IS", "handle, AS_IT_IS, 1"),
    Mutant("blas: added to what was there", B, "&zero, y", "&one, y"),
    Mutant("blas: a row too few", B, "outputs, rows, inputs,", "outputs, rows - 1, inputs,"),
    Mutant("blas: an input too few", B, "outputs, rows, inputs,", "outputs, rows, inputs - 1,"),
    Mutant("blas: another stream", B, "library.set_stream(*handle, stream->cuda)", "0"),
    Mutant(
        "blas: no workspace",
        B,
        "library.set_workspace(*handle, room.workspace, room.workspace_bytes)",
        "0",
    ),
    Mutant(
        "blas: the workspace before the stream",
        B,
        "int status = library.create(handle);",
        "int status = library.create(handle);\n"
        "    library.set_workspace(*handle, room.workspace, room.workspace_bytes);\n"
        "    room.workspace = nullptr;",
    ),
    Mutant(
        "blas: its workspace is the inputs'",
        E,
        "room->workspace = place(s, room->workspace_bytes);",
        "room->workspace = room->columns, room->workspace_bytes = 4 * room->columns_floats;",
    ),
    Mutant("blas: of the first layer's matrix", H, "fits && tracks.track[i].w == p.w", "fits"),
    Mutant(
        "blas: of 16 bits", H, "(p.precision == TSAD_FLOAT32 || p.precision == TSAD_TF32) &&", ""
    ),
    Mutant("tf32: not by cuBLAS", H, " || p.precision == TSAD_TF32)", ")"),
    Mutant("tf32: of no product", H, "room->sums, p.precision == TSAD_TF32)", "room->sums, false)"),
    Mutant(
        "tf32: the mode is not set",
        B,
        "tf32 ? library.set_math(handle, TF32_TENSOR_OP_MATH)",
        "0 ? 0",
    ),
    Mutant("tf32: the mode stays", B, "tf32 ? library.set_math(handle, DEFAULT_MATH)", "0 ? 0"),
    Mutant("tf32: the mode of all", B, "int status = tf32 ?", "int status = true ?"),
    Mutant("blas: the first batch alone", H, "p.batches == 1 &&", ""),
    Mutant("gather: all tracks' rows in one place", H, "(blockIdx.z * gridDim.x +", "(0 +"),
    Mutant("gather: a token too many", H, "token < p.tokens", "token <= p.tokens"),
    Mutant("gather: not normalised", H, "to[k] = p.norm.used ?", "to[k] = false ?"),
    Mutant("gather: every row's moments are the first's", H, "p.x + (size_t)row * ", "p.x + 0 * "),
    Mutant("gather: left out", H, "if (!plain) {", "if (false) {"),
    Mutant("gather: normalised rows are plain", H, " && !p.norm.used;", ";"),
    Mutant("gather: rows beside others are plain", H, "plain = held.n == 1 && p.t", "plain = p.t"),
    Mutant(
        "finish: all tracks have the first one's", H, "joined.sums[blockIdx.z *", "joined.sums[0 *"
    ),
    Mutant("finish: no bias", H, "p.bias ? p.bias[o] + sum : sum", "sum"),
    Mutant("finish: the next column", H, "finish(p, 0, i / p.n_out, o,", "finish(p, 0, o, o,"),
    Mutant(
        "shuffle: by two threads of a warp",
        K,
        "for (int lanes = WARP / 2;",
        "if (threadIdx.x % WARP < 2) { __shfl_xor_sync(ALL, v, 1); }\n"
        "    for (int lanes = WARP / 2;",
    ),
    Mutant(
        "graph: a failed capture takes what was to be copied", G, "            e->in_to = to;\n", ""
    ),
    Mutant("another GPU: is not left", D, "cudaSetDevice(0);", ""),
    Mutant("another GPU: is not come back to", D, "cudaSetDevice(before);", ""),
    *(Mutant(f"another GPU: {name}", P, f"here.{name} = {name};", "") for name in ENTRIES),
    Mutant(
        "run: sources go before they are made",
        R,
        "    make_sources(&t.c, staged);\n    tsad_upload(e->stream, lane->sources, staged, "
        "sizeof(tsad_reused) * (size_t)program->n_sources);",
        "    tsad_upload(e->stream, lane->sources, staged, "
        "sizeof(tsad_reused) * (size_t)program->n_sources);\n    make_sources(&t.c, staged);",
        queue=1,
    ),
    Mutant(
        "engine: what goes in goes before it is written",
        E,
        "    note_in(e, device, bytes);\n    return e->staged_in",
        "    note_in(e, device, bytes);\n    tsad_cuda_upload(e);\n    return e->staged_in",
        queue=1,
    ),
    Mutant("list: a cluster does not meet", L, "tsad_meet_cluster();", "__syncthreads();"),
    Mutant(
        "list: a block does not meet",
        L,
        "        if (p.blocks == 1) {\n            __syncthreads();",
        "        if (p.blocks == 1) {",
    ),
    Mutant(
        "list: the first item comes too late",
        L,
        "    __syncthreads();\n    for (int turn",
        "    for (int turn",
    ),
    Mutant(
        "list: the next item over this one",
        L,
        "items[(1 - turn) * ITEM_WORDS",
        "items[turn * ITEM_WORDS",
    ),
    Mutant("list: one item again and again", L, "turn = 1 - turn", "turn = turn"),
    Mutant(
        "list: a room used again at once",
        L,
        "team.meet(); /* before the room",
        "/* before the room",
    ),
    Mutant("list: teams share a room", L, "place.shared + team.number *", "place.shared + 0 *"),
    Mutant(
        "list: teams share a barrier", L, "tsad_meet_part(number + 1, N)", "tsad_meet_part(1, N)"
    ),
    Mutant("list: a barrier of all teams", L, "tsad_meet_part(number + 1, N)", "__syncthreads()"),
    Mutant(
        "list: all blocks do all",
        L,
        "place.rank + place.blocks * team.number",
        "place.blocks * team.number",
    ),
    Mutant("list: teams do the same", L, "place.rank + place.blocks * team.number", "place.rank"),
    Mutant("list: blocks in the wrong direction", L, "i / item.x % item.y", "i / item.y % item.y"),
    Mutant("list: the last block left out", L, "i < n; i += step", "i + 1 < n; i += step"),
    Mutant(
        "list: all lanes do the first's", L, "p.first[(int)blockIdx.x / p.blocks]", "p.first[0]"
    ),
    Mutant("list: a lane begins as another", L, "&list->first[list->lane] :", "list->first :"),
    Mutant("list: 16 bits read as others", L, "p.precision == TSAD_BFLOAT16", "false"),
    Mutant("list: not uploaded for a graph", G, "upload_list(e, *memory, at);", ""),
    Mutant(
        "list: not uploaded for a launch",
        G,
        "upload_list(e, e->list_memory + at, at);",
        "",
    ),
    Mutant("list: moved while it is read", G, "TSAD_TRY(tsad_stream_wait(e->stream));", ""),
    Mutant("list: over one that is read", G, "e->list_used += bytes;", ""),
    Mutant(
        "list: without the runs put off",
        G,
        "tsad_cuda_list_rows(e, d->runs, d->n, d->row_begin, d->row_end);",
        "",
    ),
    Mutant("list: nothing goes in", G, "tsad_cuda_upload(e);\n    e->waits", "e->waits"),
    Mutant(
        "list: freed with another graph", G, "e->graph_list[at] = list;", "tsad_device_free(list);"
    ),
    Mutant(
        "run: noise there is the first row's", R, "(size_t)(row_begin + 1) * run->noise_step", "0"
    ),
]


class Workshop:
    """The objects of the sources as they are; a mutant compiles its own file alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, builder()["commands"]
        self.built: dict[str, Path] = {}
        (folder / "objects").mkdir(parents=True)
        jobs, self.link = self.commands(
            folder / "objects", SOURCES, emulate=True, sanitize=SANITIZED
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, jobs))
        self.true = folder / "true.so"
        self._run([*self.link, "-o", str(self.true)])

    @staticmethod
    def _run(command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True)

    def build(self, mutant: Mutant) -> Path:
        """The library with the fault."""
        if mutant.name in self.built:
            return self.built[mutant.name]
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(SOURCES, folder / "cuda")
        (folder / "cuda" / mutant.file).write_text(mutant.text())
        jobs, link = self.commands(folder, folder / "cuda", emulate=True, sanitize=SANITIZED)
        whole = {".h": ".o", ".cuh": ".cu.o"}.get(Path(mutant.file).suffix, f"/{mutant.file}.o")
        own = [job[-1] for job in jobs if job[-1].endswith(whole)]
        for job in jobs:
            if job[-1] in own:
                self._run(job)
        names = {Path(name).name for name in own}
        kept = [part for part in self.link if Path(part).name not in names]
        library = folder / "mutant.so"
        self._run([*kept, *own, "-o", str(library)])
        self.built[mutant.name] = library
        return library


def survives(
    library: Path, check: Callable[[], None] | None = None, most: int | None = None
) -> bool:
    """Whether the checks, or this one, pass with this library; asked of a child: it may crash.
    `most` work of a stream waits."""
    import test_cuda
    import test_cuda_blas
    import test_cuda_memory
    import test_cuda_one_kernel
    import test_cuda_tf32
    import test_device_arrays

    from tsad import _core

    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(120)
            os.close(2)
            faulthandler.disable()  # a planted fault may crash
            _core._load_backend(str(library))
            if most is not None:
                ctypes.CDLL(str(library)).tsad_emulate_queue(ctypes.c_long(most))
            if check:
                check()
            else:
                test_cuda.check_all()
                test_device_arrays.check_there(str(library))
                test_cuda_blas.check_blas(str(library))
                test_cuda_tf32.check_tf32(str(library))
                test_cuda_memory.check_another_gpu(str(library))
                test_cuda_one_kernel.check_one_kernel()
            status = 0
        except BaseException:  # caught: that is what it was planted for
            pass
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def main() -> int:
    """Runs them and prints what came of it; the exit status is how many were not seen."""
    words, missed = sys.argv[1:], 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder) / "shop")
        print(f"{'pass' if survives(workshop.true) else 'FAIL'}  the sources as they are")
        for mutant in [*barriers(), *MUTANTS]:
            if not words or any(word in mutant.name for word in words):
                lives = survives(workshop.build(mutant), most=mutant.queue)
                missed += lives
                print(f"{'MISSED' if lives else 'seen'}  {mutant.name}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
