"""Experiments as data: what a TOML file asks for is trained, what came out goes into a ledger, and a report is made.

    hilora experiment run FILE.toml --data-dir ROOT      trains what the ledger does not have
    hilora experiment report FILE.toml                   tables, plots and a page, from the ledger alone
    hilora experiment migrate FILE.toml                  an older ledger, written as it is written now

The ledger is FILE.ledger.jsonl beside FILE.toml, a line for each finished run. A run is found again by what decides its
result, so that a changed FILE.toml trains only what changed, and an interrupted command goes on where it stopped. The
same command in several processes divides the runs among them; --on trains many side by side on a Dask cluster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hilora.errors import InvalidValueError, MissingFileError, needed
from hilora.experiments.crew import Alone, Crew
from hilora.experiments.experiment import Experiment, Setting
from hilora.experiments.inputs import Inputs, check_files
from hilora.experiments.ledger import Ledger, migrate
from hilora.experiments.runner import Pair, Runner, shard
from hilora.experiments.spec import read_experiment
from hilora.experiments.training import Training
from hilora.federated.engine.device import find_device
from hilora.models.backbone import tune_for_cpu
from hilora.reporting.progress import ending, stopped

ON = "many runs side by side: by processes of this machine, or on the Dask cluster with the scheduler tcp://HOST:8786"


def count(text: str) -> int:
    """Reads a number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 1 on")
    return int(text)


def part(text: str) -> tuple[int, int]:
    """Reads `I/N`."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I from 1 to N, such as 1/2")
    return int(number), int(count)


def parser(prog: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog, description=__doc__, formatter_class=raw)
    commands = found.add_subparsers(dest="command", required=True, metavar="{run,report,migrate}")
    run = commands.add_parser("run", help="train what is missing", description="Train what the ledger does not have.")
    run.add_argument("file", type=Path, metavar="FILE.toml", help="the experiment")
    run.add_argument(
        "--data-dir", type=Path, default=Path(), help="the folder of data and weights (the current folder)"
    )
    run.add_argument("--work", type=Path, help="scratch folder of runs in training (runs/experiments/NAME)")
    run.add_argument(
        "--only", action="append", default=[], metavar="SETTING[/METHOD]", help="nothing else; may be repeated"
    )
    run.add_argument("--shard", type=part, default=(1, 1), metavar="I/N", help="this process's part of N side by side")
    run.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU where there is one)")
    run.add_argument("--on", metavar="local|ADDRESS", help=ON)
    run.add_argument("--workers", type=count, metavar="N", help="of --on local (a worker a GPU, or for each 4 cores)")
    report = commands.add_parser("report", help="tables, plots and a page", description="Report what the ledger has.")
    report.add_argument("file", type=Path, metavar="FILE.toml", help="the experiment")
    report.add_argument("--out", type=Path, help="folder of the report (runs/experiments/NAME/report)")
    report.add_argument(
        "--into", type=Path, metavar="FILE.md", help="also between <!-- begin NAME --> and <!-- end NAME --> of it"
    )
    words = "Rewrite the ledger in the newest schema. Older ones are read as well; no result changes."
    rewrite = commands.add_parser("migrate", help="rewrite an older ledger", description=words)
    rewrite.add_argument("file", type=Path, metavar="FILE.toml", help="the experiment")
    return found


def selected(experiment: Experiment, only: list[str]) -> list[Pair]:
    """The pairs that `--only` names, or all.

    Raises:
        InvalidValueError: for a name that the experiment does not have.
    """
    pairs = experiment.pairs
    names = {
        text: [pair for pair in pairs if text in (pair[0].name, f"{pair[0].name}/{pair[1].name}")] for text in only
    }
    for text, found in names.items():
        if not found:
            known = ", ".join(dict.fromkeys(f"{setting.name}/{method.name}" for setting, method in pairs))
            raise InvalidValueError(f"--only {text}: there is no such setting or pair, expected some of {known}")
    return [pair for pair in pairs if not only or any(pair in found for found in names.values())]


def run(args: argparse.Namespace) -> int:
    experiment = read_experiment(args.file)
    pairs = shard(selected(experiment, args.only), *args.shard)
    ledger = open_ledger(experiment)
    say = partial(print, file=sys.stdout, flush=True)  # the terminal, also while a run's own words go to its log
    with crew(args, experiment, [setting for setting, _ in pairs], ledger, say) as those:
        runner = Runner(experiment, ledger, those, say)
        try:
            runner.run(pairs)
        except KeyboardInterrupt as error:
            return stopped(error, "; the same command goes on from here")
    for title in runner.failed:
        print(f"failed: {title}", file=sys.stderr)
    return 1 if runner.failed else 0


@contextmanager
def crew(
    args: argparse.Namespace,
    experiment: Experiment,
    settings: Sequence[Setting],
    ledger: Ledger,
    say: Callable[[str], None],
) -> Iterator[Crew]:
    """Who trains: this process, or the workers that `--on` names."""
    work = args.work or Path("runs/experiments") / experiment.name
    if args.workers and args.on != "local":
        raise InvalidValueError("--workers is for --on local: a scheduler elsewhere has the workers that it has")
    if args.on in (None, "local"):
        check_files(experiment.model, settings, args.data_dir)
    if args.on is None:
        device = find_device(args.device)
        if device.type == "cpu":
            tune_for_cpu()
        yield Alone(Training(Inputs(experiment.model, args.data_dir, device), work, say), ledger)
        return
    with needed("--on", "cluster"):
        from hilora.experiments.cluster import Cluster, connected
        from hilora.experiments.worker import Place
    place = Place(experiment.model, args.data_dir.resolve(), work.resolve(), args.device)
    with connected(args.on, args.workers, args.device) as client:
        yield Cluster(client, place, settings, say)


def report(args: argparse.Namespace) -> int:
    from hilora.experiments.report import write_report  # loads matplotlib

    experiment = read_experiment(args.file)
    out = args.out or Path("runs/experiments") / experiment.name / "report"
    for path in write_report(experiment, open_ledger(experiment), out, args.into):
        print(path)
    return 0


def rewrite(args: argparse.Namespace) -> int:
    path = ledger_path(args.file)
    if not path.is_file():
        raise MissingFileError(f"there is no ledger {path}: give the file of an experiment that was run")
    print(f"{path}: {migrate(path)} lines rewritten")
    return 0


def open_ledger(experiment: Experiment) -> Ledger:
    ledger = Ledger(ledger_path(experiment.path))
    if ledger.torn:
        said = ", ".join(map(str, ledger.torn))
        print(f"{ledger.path}: passed over what is no record, line {said}", file=sys.stderr)
    return ledger


def ledger_path(file: Path) -> Path:
    """Where the ledger of an experiment's file is."""
    return file.with_suffix(".ledger.jsonl")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hilora.experiments") -> int:
    args = parser(prog).parse_args(arguments)
    return ending(lambda: {"run": run, "report": report, "migrate": rewrite}[args.command](args))


if __name__ == "__main__":
    sys.exit(main())
