"""Plots of a run, as SVG files; matplotlib (the extra ``bench``) draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from thinpool.units import GIB, KIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from thinpool.bench.results import Report, Series

COLOURS: Final = {
    "thinpool": "#d62728",
    "thinpool, pool 90 % full": "#ff9896",
    "overlay2 on ext4": "#1f77b4",
    "overlay2 on xfs (reflink)": "#2ca02c",
    "btrfs snapshot": "#9467bd",
    "xfs reflink copy": "#8c564b",
    "vfs (whole copy)": "#7f7f7f",
    "fuse-overlayfs": "#bcbd22",
    "unionfs-fuse": "#17becf",
    "null target": "#ff7f0e",
    "loop on a raw file": "#1f77b4",
    "file, no loop": "#7f7f7f",
    "dm-thin of the kernel": "#e377c2",
    "qemu-storage-daemon": "#2ca02c",
    "qemu-storage-daemon, backing file": "#98df8a",
    "loop on a reflink copy": "#8c564b",
    "thin_check 0.9.0": "#1f77b4",
    "thin_delta 0.9.0": "#2ca02c",
}


def draw(report: Report, folder: Path) -> list[str]:
    """Draw what there are figures for.

    Args:
        report: the run.
        folder: takes the files.

    Returns:
        What could not be drawn, and why: nothing where all went well.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - an extra
    except ImportError:
        return ["no plots: matplotlib is missing (pip install 'thinpool[bench]')"]
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "thinpool"  # the same picture is the same file
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    for name, plot in PLOTS.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        if plot(report, figure):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return []


def _edits_by_size(report: Report, figure: Any) -> bool:  # noqa: ANN401 - matplotlib is optional
    """Time until durable over the file's size."""
    lines = _lines(
        [
            series
            for series in report.series("edits", "edit", length=4 * KIB, places=1, state="cold")
            if series.metric == "durable"
        ],
        "size",
    )
    return _draw_lines(
        figure,
        lines,
        title="4 KiB edit with fsync, first touch in a new container, cold",
        x="size of the file",
        x_text=format_size,
        y="seconds until durable",
    )


def _added_by_size(report: Report, figure: Any) -> bool:  # noqa: ANN401 - as above
    """Bytes added over the file's size."""
    lines = _lines(
        [
            series
            for series in report.series("edits", "edit", length=4 * KIB, places=1, state="cold")
            if series.metric == "added_with_container"
        ],
        "size",
    )
    return _draw_lines(
        figure,
        lines,
        title="4 KiB edit: bytes added on the disk, the container's own included",
        x="size of the file",
        x_text=format_size,
        y="bytes",
    )


def _edits_by_places(report: Report, figure: Any) -> bool:  # noqa: ANN401 - as above
    """Time until durable over the number of edited places."""
    found = [
        series
        for series in report.series("edits", "edit", size=GIB, length=4 * KIB, state="cold")
        if series.metric == "durable" and "share" not in series.parameters
    ]
    lines = {name: line for name, line in _lines(found, "places").items() if len(line) > 1}
    return _draw_lines(
        figure,
        lines,
        title="4 KiB edits of many places of 1 GiB, one fsync, cold",
        x="edited places",
        x_text=str,
        y="seconds until durable",
    )


def _lines(found: list[Series], x: str) -> dict[str, list[tuple[float, Series]]]:
    lines: dict[str, list[tuple[float, Series]]] = {}
    for series in found:
        lines.setdefault(series.subject, []).append((float(series.parameters[x]), series))
    return {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items()}


def _draw_lines(
    figure: Any,  # noqa: ANN401 - as above
    lines: dict[str, list[tuple[float, Series]]],
    *,
    title: str,
    x: str,
    x_text: Callable[[int], str],
    y: str,
) -> bool:
    if not any(len(line) > 1 for line in lines.values()):
        return False
    axes = figure.add_subplot()
    ticks = sorted({point for line in lines.values() for point, _ in line})
    for name, line in lines.items():
        middles = [max(series.median, 1e-9) for _, series in line]
        below = [
            middle - max(min(series.values), 1e-9)
            for middle, (_, series) in zip(middles, line, strict=True)
        ]
        above = [
            max(series.values) - middle for middle, (_, series) in zip(middles, line, strict=True)
        ]
        axes.errorbar(
            [point for point, _ in line],
            middles,
            yerr=[[max(0, each) for each in below], [max(0, each) for each in above]],
            marker="o",
            capsize=3,
            label=name,
            color=COLOURS.get(name),
            linewidth=2.5 if name == "thinpool" else 1.2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [x_text(int(tick)) for tick in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _io_rates(report: Report, figure: Any) -> bool:  # noqa: ANN401 - as above
    """Requests a second at depth 32."""
    columns = {}
    for case, op, title in (
        ("mapped", "randread", "read"),
        ("mapped", "randwrite", "write"),
        ("first write", "randwrite", "first write"),
        ("break sharing", "randwrite", "break sharing"),
    ):
        columns[title] = [
            series
            for series in report.series("io", case, op=op, block=4 * KIB, depth=32, jobs=1)
            if series.metric == "iops"
        ]
    return _draw_bars(figure, columns, title="4 KiB random I/O, depth 32", y="requests a second")


def _draw_bars(
    figure: Any,  # noqa: ANN401 - as above
    columns: dict[str, list[Series]],
    *,
    title: str,
    y: str,
    log: bool = False,
) -> bool:
    columns = {name: found for name, found in columns.items() if found}
    if not columns:
        return False
    axes = figure.add_subplot()
    seen: set[str] = set()
    position = 0.0
    ticks = []
    for name, found in columns.items():
        begin = position
        for series in found:
            axes.bar(
                position,
                series.median,
                yerr=[
                    [series.median - min(series.values)],
                    [max(series.values) - series.median],
                ],
                capsize=2,
                color=COLOURS.get(series.subject),
                label=None if series.subject in seen else series.subject,
            )
            seen.add(series.subject)
            position += 1
        ticks.append(((begin + position - 1) / 2, name))
        position += 1
    axes.set_xticks([tick for tick, _ in ticks], [name for _, name in ticks])
    if log:
        axes.set_yscale("log")
    axes.set(title=title, ylabel=y)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _io_latency(report: Report, figure: Any) -> bool:  # noqa: ANN401 - as above
    """p99 at depth 1 and 32."""
    columns = {
        f"{'read' if op == 'randread' else 'write'}, depth {depth}": [
            series
            for series in report.series("io", "mapped", op=op, block=4 * KIB, depth=depth, jobs=1)
            if series.metric == "p99"
        ]
        for depth in (1, 32)
        for op in ("randread", "randwrite")
    }
    return _draw_bars(figure, columns, title="4 KiB random I/O: p99 latency", y="seconds", log=True)


def _small_files(report: Report, figure: Any) -> bool:  # noqa: ANN401 - as above
    """Seconds for each step."""
    columns = {
        step: [
            series for series in report.series("small-files", step) if series.metric == "durable"
        ]
        for step in ("append", "create", "delete")
    }
    return _draw_bars(
        figure, columns, title="10,000 small files, cold", y="seconds until durable", log=True
    )


def _snapshots(report: Report, figure: Any) -> bool:  # noqa: ANN401 - as above
    """Time to create one over the number there are."""
    lines: dict[str, list[tuple[float, Series]]] = {}
    for series in report.series("snapshots", "create"):
        if series.subject == "thinpool":
            lines.setdefault(str(series.parameters["how"]), []).append(
                (float(series.parameters["snapshots"]), series)
            )
    return _draw_lines(
        figure,
        {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items()},
        title="creating a snapshot",
        x="snapshots in the pool",
        x_text=lambda count: f"{count:,}",
        y="seconds",
    )


def _checkers(report: Report, figure: Any) -> bool:  # noqa: ANN401 - as above
    """Seconds of check and delta."""
    columns: dict[str, list[Series]] = {}
    for series in report.series("metadata"):
        if series.metric == "time":
            changed = series.parameters.get("changed")
            title = series.case if changed is None else f"{series.case}, {changed}"
            columns.setdefault(title, []).append(series)
    return _draw_bars(figure, columns, title="check and delta of metadata", y="seconds", log=True)


PLOTS: Final = {
    "edit-by-size": _edits_by_size,
    "edit-added": _added_by_size,
    "edit-by-places": _edits_by_places,
    "io-rates": _io_rates,
    "io-p99": _io_latency,
    "small-files": _small_files,
    "snapshots": _snapshots,
    "metadata": _checkers,
}
