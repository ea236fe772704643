"""The table, the marks and the plots of a device's stored results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import judging, results
from bench.results import OWN

TITLE = "README.md"
BUSY = 0.25  # load average a thread
MOST_PANELS = 48  # in one picture


def draw(folder: Path, plots: bool = True) -> str:
    """Write the table and the plots beside the results in ``folder``; returns the table's text, in Markdown."""
    found = results.read_all(folder)
    text = "\n".join([*_heading(folder, found), *_figures(found), *_marks(found)])
    (folder / TITLE).write_text(text + "\n")
    if plots:
        for op, content in found.items():
            plot(op, content, folder / f"{op}.png")
    return text


def _heading(folder: Path, found: Mapping[str, Any]) -> Iterable[str]:
    yield f"# {folder.name}"
    yield ""
    runs = {key: run for content in found.values() for key, run in content["runs"].items()}
    for key, run in sorted(runs.items()):
        ceilings = run["ceilings"]
        yield (
            f"- Run {key}: {run['device']}, {_platform(run)}; "
            f"torch {run['versions']['torch']}, bitsandbytes {run['versions']['bitsandbytes']}, "
            f"peft {run['versions']['peft']}; copy {ceilings['copy_gb_s']:g} GB/s, "
            f"{ceilings['matmul_dtype']} product {ceilings['matmul_tflop_s']:g} TFLOP/s"
            + _busy(run)
            + ("; **quick: says nothing about speed**" if run["quick"] else "")
        )
    yield ""
    yield "Medians in ms; in brackets how many times peftrt's time that is (median of the ratios of the rounds)."
    if any("added_ms" in entry for cell in _cells(found) for entry in cell.get("contenders", {}).values()):
        yield '"Adds": ms beyond its own base, which is a contender of its own (median of the differences).'
    if any(run["timer"] != "perf_counter" for run in runs.values()):
        yield 'GPU: replays of a captured graph; "launched": it could not be captured, so its launches are timed too.'


def _cells(found: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (cell for content in found.values() for cell in content["cells"].values())


def _platform(run: Mapping[str, Any]) -> str:
    if run["timer"] == "perf_counter":
        return f"{run['threads']} threads"
    return f"driver {run['driver']}, CUDA {run['cuda']}, triton {run['versions']['triton']}"


def _busy(run: Mapping[str, Any]) -> str:
    """Other work on the machine makes every figure doubtful and is said beside them."""
    load = run.get("load_at_start", 0.0)
    return f"; **the machine was busy: load {load:g} before the run**" if load > BUSY * run["threads"] else ""


def _figures(found: Mapping[str, Any]) -> Iterable[str]:
    for op, content in found.items():
        cells = content["cells"]
        names = _contenders(cells.values())
        rows = [[cell_id, *_row(cell, names)] for cell_id, cell in cells.items()]
        yield from ("", f"## {op}", "", *table(["cell", *names, "share of the floor"], rows))


def _contenders(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """All names that occur, peftrt first."""
    names = dict.fromkeys(name for cell in cells for name in cell.get("contenders", {}))
    return sorted(names, key=lambda name: name != OWN)


def _row(cell: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    if "failed" in cell:
        return [cell["failed"], *[""] * len(names)]
    contenders = cell["contenders"]
    share = f"{contenders[OWN]['share_of_floor']:.0%}"
    return [*(_figure(contenders.get(name), cell.get("M", 0)) for name in names), share]


def _figure(entry: Mapping[str, Any] | None, tokens: int) -> str:
    if entry is None:
        return ""
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    ratio = f" ({entry['ratio']:.3g}x)" if "ratio" in entry else ""
    slow = " by the reference" if entry.get("backend") == "reference" else ""
    launched = " launched" if "note" in entry else ""
    step = f"; adds {entry['added_ms']:.4g}" if "added_ms" in entry else ""
    if "peak_mb" in entry:
        speed = f"{1e3 * tokens / entry['ms']['p50']:,.0f} tokens/s, " if tokens else ""
        step += f"; {speed}{entry['peak_mb']:,.0f} MB"
    return f"{entry['ms']['p50']:.4g}{ratio}{slow}{launched}{step}"


def _marks(found: Mapping[str, Any]) -> Iterable[str]:
    verdicts = list(judging.judge(found))
    if not verdicts:
        return
    reached = sum(verdict.reached for verdict in verdicts)
    yield from ("", f"## Marks: {reached} of {len(verdicts)} reached", "")
    rows = [[verdict.op, verdict.cell_id, str(verdict.mark), verdict.got, str(verdict)] for verdict in verdicts]
    rows += [[mark.op, mark.where, str(mark), "", "not measured"] for mark in judging.unmeasured(found)]
    yield from table(["operation", "cell", "mark", "measured", ""], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"


def plot(op: str, content: Mapping[str, Any], path: Path) -> bool:
    """Times over M, one panel for each part, dtype and site, as many as can be seen. Returns whether there was
    something to draw.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for cell in content["cells"].values():
        if "contenders" in cell and "M" in cell:
            panels.setdefault(f"{cell['part']} {cell['dtype']} {cell['N']}x{cell['K']}", []).append(cell)
    if not panels:
        return False
    # the figure classes alone: pyplot would look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = dict(list(panels.items())[:MOST_PANELS])
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, cells) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(lines, columns, place)
        for name in _contenders(cells):
            timed = [cell for cell in cells if "ms" in cell["contenders"].get(name, {})]
            rows = [cell["M"] for cell in timed]
            milliseconds = [cell["contenders"][name]["ms"]["p50"] for cell in timed]
            axes.loglog(rows, milliseconds, marker=".", label=name, linewidth=2 if name == OWN else 1)
        axes.loglog([c["M"] for c in cells], [c["floor_ms"] for c in cells], ":", color="gray", label="floor")
        axes.set(title=title, xlabel="M", ylabel="ms")
        axes.legend(fontsize="small")
    figure.suptitle(op if len(shown) == len(panels) else f"{op}: {len(shown)} of {len(panels)}")
    figure.savefig(path, dpi=110)
    return True
