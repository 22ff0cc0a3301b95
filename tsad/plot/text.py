"""Plans as text, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsad.plot import SOURCE_MEANINGS, block_labels, title

if TYPE_CHECKING:
    from tsad.plan import Plan

# By source code, as in tsad.plan.SOURCE_NAMES: sign, and colour for a terminal (256 colours).
SIGNS = "#^.<-"
TERMINAL_COLORS = (15, 166, 38, 220, 240)


def _paint(row: Any, color: bool) -> str:
    """One row of signs; a run of one source is coloured at once."""
    if not color:
        return "".join(SIGNS[source] for source in row)
    text, begin = "", 0
    for end in range(1, len(row) + 1):
        if end == len(row) or row[end] != row[begin]:
            code = TERMINAL_COLORS[row[begin]]
            text += f"\x1b[38;5;{code}m{SIGNS[row[begin]] * (end - begin)}"
            begin = end
    return text + "\x1b[0m"


def _ruler(begin: int, end: int) -> str:
    """Step numbers, a mark at every tenth step."""
    text = ""
    for step in range(begin, end):
        if step % 10 == 0:
            text = text.ljust(step - begin) + str(step)
    return text[: end - begin + 3]


def render(plan: Plan, *, width: int, color: bool) -> str:
    """The plan as text, folded into panels of steps that fit `width` columns."""
    n_steps, n_blocks = plan.sources.shape
    labels = [" ".join(part for part in label if part) for label in block_labels(plan.blocks)]
    margin = max(map(len, labels))
    room = max(20, (width - margin - 4) // 10 * 10)
    lines = [title(plan), ""]
    for begin in range(0, n_steps, room):
        end = min(begin + room, n_steps)
        lines.append(f"{'step':>{margin}}  {_ruler(begin, end)}")
        for b in range(n_blocks):
            cells = plan.sources[begin:end, b]
            lines.append(f"{labels[b]:>{margin}}  {_paint(cells, color)}")
        lines.append("")
    for source, (name, number) in enumerate(plan.counts.items()):
        if number:
            share = number / plan.sources.size
            sign = _paint([source], color)
            lines.append(
                f"  {sign}  {name:<14}{number:>7,}  {share:>6.1%}  {SOURCE_MEANINGS[source]}"
            )
    return "\n".join(lines)
