"""From the ledger to tables, plots and a page that can be sent; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hilora.experiments import figures, inputs, tables
from hilora.experiments.cells import Cell, collect
from hilora.experiments.experiment import Experiment, Setting, Tuning
from hilora.experiments.ledger import Ledger
from hilora.experiments.records import Line
from hilora.files import write_bytes, write_text
from hilora.reporting.comparison import GLYPHS
from hilora.reporting.document import Block, Code, Heading, Paragraph, Picture, between, markdown, page

LEGEND = (
    "Accuracies in %: the mean over the clients' own test images at the end, then mean ± standard deviation over seeds "
    "(partition and training). tail: mean of the worst tenth of the clients; std over clients: their spread within a "
    "run; unseen: clients that took no part in the training, before they train anything (zero leaf) and after epochs "
    "of their own. No grid was chosen by unseen clients: the learning rates of their own epochs are not tuned where a "
    "method trains one tier only and they take another tier's."
)
PAIRED = (
    "The difference to {label} is paired: the same client of the same seed under both methods. It is the mean over "
    "seeds of the mean over clients; its 95 % interval is Student's over clients within seeds (variances of the seeds' "
    "means added, degrees of freedom after Welch and Satterthwaite). It says how sure the difference is of clients "
    "like these, given these trainings; what another seed would change stands under “by seed”. Intervals take clients "
    "as independent, which those of a group that share a model and draw their test images from one set are not; and "
    "they are not corrected for the number of comparisons."
)
PUBLISHED = (
    "published: the figure of the method's paper, under the conditions of that paper. It stands there for orientation: "
    "backbone, images, clients and rounds are not these."
)
TIERS = (
    "After each tier: accuracy and its standard deviation over clients, training loss, overlap with other tiers "
    "(orthogonality), and the distance between a client's distribution of labels and that of its group. ▲ marks a loss "
    "that rose from one tier to the next, which the theorem asks not to happen. Means over seeds."
)


def write_report(experiment: Experiment, ledger: Ledger, out: Path, into: Path | None = None) -> list[Path]:
    """Writes `report.md`, `report.html` and plots into a folder; and, if asked, a section of another document.

    Args:
        experiment: what was asked for.
        ledger: what there is.
        out: the folder.
        into: a Markdown file; what is between its markers `<!-- begin NAME -->` and `<!-- end NAME -->` is exchanged,
            NAME being the experiment's. Plots go into a folder beside it, of its name without the ending.

    Returns:
        The documents written.

    Raises:
        FileError: `into` has no markers; nothing is written then.
    """
    begin, end = f"<!-- begin {experiment.name} -->", f"<!-- end {experiment.name} -->"
    cells = collect(experiment, ledger)
    if into is not None:
        between(into, begin, end, "")  # fails before anything is written
    blocks = report(experiment, ledger, cells, out)
    written = {out / "report.md": markdown(blocks, "") + "\n", out / "report.html": page(experiment.title, blocks)}
    if into is not None:
        section = markdown(blocks, f"{into.stem}/", level=2)
        written[into] = between(into, begin, end, f"\n{section}\n")
        for block in blocks:
            if isinstance(block, Picture):
                write_bytes(into.with_suffix("") / block.path.name, block.path.read_bytes())
    for path, text in written.items():
        write_text(path, text)
    return list(written)


def report(experiment: Experiment, ledger: Ledger, cells: Sequence[Sequence[Cell]], pictures: Path) -> list[Block]:
    """The blocks of a report, whose plots are drawn into a folder."""
    wanted = sum(cell.wanted for row in cells for cell in row)
    done = sum(len(cell.finals) for row in cells for cell in row)
    blocks: list[Block] = [
        Heading(1, experiment.title),
        Paragraph(f"{done} of {wanted} final runs are done{'.' if done == wanted else '; the rest is missing.'}"),
        Code(_commands(experiment)),
        Paragraph(LEGEND),
        Paragraph(PAIRED.format(label=experiment.methods[experiment.compare].label)),
        *([Paragraph(PUBLISHED)] if any(method.paper for method in experiment.methods.values()) else []),
    ]
    for row in cells:
        blocks += _setting(experiment, row, pictures)
    blocks += [Heading(2, "Rows and conditions"), tables.method_table(experiment)]
    return [*blocks, *(Paragraph(text) for text in _conditions(experiment, ledger, cells))]


def _setting(experiment: Experiment, cells: Sequence[Cell], pictures: Path) -> list[Block]:
    """All of one setting: tables, plots, notes."""
    setting = cells[0].setting
    compare = next(cell for cell in cells if cell.method.name == experiment.compare)
    blocks: list[Block] = [
        Heading(2, setting.name),
        Paragraph(_described(experiment, setting)),
        *([Paragraph(GLYPHS)] if setting.data == inputs.GLYPHS else []),
        tables.accuracy_table(cells, compare),
    ]
    if not all(cell.complete for cell in cells):
        text = "incomplete: not all seeds are done; at a difference, those of {} are not."
        blocks.append(Paragraph(f"{tables.INCOMPLETE} {text.format(compare.method.label)}"))
    if any(cell.diverged for cell in cells):
        text = "A row of which a seed diverged has no figures: a mean over the other seeds would be too good."
        blocks.append(Paragraph(text))
    blocks += [
        Paragraph(f"{cell.method.label} does not apply: {cell.method.why}.") for cell in cells if not cell.applies
    ]
    stem = pictures / f"{experiment.name}-{setting.name}"
    accuracy, differences, traffic = (
        stem.with_name(f"{stem.name}-{kind}.png") for kind in ("accuracy", "differences", "traffic")
    )
    if figures.plot_accuracies(cells, accuracy):
        blocks.append(Picture(accuracy, f"Accuracy of each method, {setting.name}"))
    if figures.plot_differences(cells, compare, differences):
        blocks.append(Picture(differences, f"Differences of clients to {compare.method.label}, {setting.name}"))
    cost = tables.cost_table(cells)
    if len(cost.header) > 1:
        blocks += [
            Heading(3, f"{setting.name}: cost"),
            Paragraph("A client's bytes in a round, mean over the rounds."),
            cost,
        ]
    if figures.plot_traffic(cells, traffic):
        blocks.append(Picture(traffic, f"Accuracy against bytes, {setting.name}"))
    tiers = tables.tier_table(cells)
    if tiers.rows:
        blocks += [Heading(3, f"{setting.name}: tier by tier"), Paragraph(TIERS), tiers]
    tuning = tables.tuning_table(cells)
    if tuning.rows and experiment.tuning is not None:
        blocks += [Heading(3, f"{setting.name}: tuning"), Paragraph(_searched(experiment.tuning, setting)), tuning]
    return blocks


def _searched(tuning: Tuning, setting: Setting) -> str:
    """How the grids were searched, and how that differs from the final runs."""
    text = (
        f"Each point was trained once, with seed {tuning.seed}, and the one with the best mean validation accuracy, in "
        "%, is chosen. All methods have equally many points."
    )
    finals = setting.partition().model_dump()
    changed = {name: value for name, value in tuning.arguments.items() if value != finals.get(name, value)}
    if not changed:
        return text
    size = "a smaller" if changed.get("clients", finals["clients"]) < finals["clients"] else "another"
    return f"{text} They were searched on {size} problem than that of the final runs: {tables.overrides(changed)}."


def _described(experiment: Experiment, setting: Setting) -> str:
    run = {**experiment.run, **setting.run}
    largest = "" if setting.classes is None else f" ({setting.classes} largest classes)"
    said = f"Data {setting.data}{largest}, partition {setting.scheme}: {tables.overrides(setting.arguments)}"
    said += f"; seeds {', '.join(map(str, setting.seeds))}"
    return said + (f". Training: {tables.overrides(run)}." if run else ".")


def _commands(experiment: Experiment) -> str:
    path = experiment.path
    if path.is_absolute():
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    start = "python -m hilora.experiments"
    return f"{start} run {path.as_posix()} --data-dir DIR\n{start} report {path.as_posix()}"


def _conditions(experiment: Experiment, ledger: Ledger, cells: Sequence[Sequence[Cell]]) -> list[str]:
    """What all figures were measured under, as the lines of the ledger say."""
    model = experiment.model
    lines = [line for row in cells for cell in row for line in (*cell.finals.values(), *cell.tuned)]
    weights = "weights of timm's hub" if model.weights is None else f"weights {model.weights}"
    size = "" if model.img_size is None else f" at {model.img_size} px"
    texts = [f"Backbone {model.backbone}{size}, {weights}, {_all(lines, 'dtype') or model.dtype}."]
    if lines:
        dates = sorted(line["date"] for line in lines)
        period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        texts.append(
            f"{period}; hilora {_all(lines, 'revision')}; torch {_all(lines, 'torch')}; {_all(lines, 'device')}."
        )
    others = len(ledger) - len({id(line) for line in lines})
    if others:
        texts.append(
            f"The ledger also keeps {others} run{'' if others == 1 else 's'} that the file no longer asks for."
        )
    return texts


def _all(lines: Sequence[Line], name: str) -> str:
    """The different values of the lines, in order of first appearance."""
    return ", ".join(dict.fromkeys(str(line[name]) for line in lines))
