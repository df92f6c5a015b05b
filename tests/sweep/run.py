"""Try all models: `python -m tests.sweep.run` (`make sweep`)."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from hilora.errors import HiLoRAError
from tests.sweep.checks import CHECKS, NotOurs
from tests.sweep.models import MODELS

SECONDS = 300  # that a model may take
PASSED, NOT_OURS = "yes", "–"


class Verdict(NamedTuple):
    """What became of a model.

    Attributes:
        key: of the model.
        checks: by their names: PASSED, NOT_OURS where the plain model cannot do it, either, or what went wrong.
        refused: why it cannot be adapted; empty where it can.
        seconds: that it took.
    """

    key: str
    checks: dict[str, str]
    refused: str
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.refused and all(said in (PASSED, NOT_OURS) for said in self.checks.values())


class Late(BaseException):
    """A model takes longer than any should."""


def _late(number: int, frame: FrameType | None) -> None:
    raise Late


def examine(key: str, names: Sequence[str] = tuple(CHECKS)) -> Verdict:
    """Try one model, in a limit of time."""
    start, checks, refused = time.perf_counter(), dict[str, str](), ""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise, and no adapted attention takes it
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        for name, check in ((name, CHECKS[name]) for name in names):
            try:
                check(MODELS[key])
                checks[name] = PASSED
            except NotOurs:
                checks[name] = NOT_OURS
            except HiLoRAError as error:
                if name == "inject":
                    refused = str(error)
                    break
                checks[name] = f"{type(error).__name__}: {error}"
            except Exception as error:
                checks[name] = f"{type(error).__name__}: {error}"
                if os.environ.get("TRACE"):
                    traceback.print_exc()
    except Late:
        checks["time"] = f"more than {SECONDS} s"
    finally:
        signal.alarm(0)
    return Verdict(key, checks, refused, time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="parts of their names; all by default")
    parser.add_argument("--checks", nargs="*", choices=CHECKS, default=list(CHECKS), help="all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    keys = [key for key in MODELS if not args.models or any(part in key for part in args.models)]
    verdicts: list[Verdict] = []
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for verdict in pool.imap_unordered(partial(examine, names=args.checks), keys, chunksize=1):
            verdicts.append(verdict)
            print(_line(verdict), flush=True)
    count = sum(verdict.passed for verdict in verdicts)
    print(f"{count} of {len(verdicts)} pass; {sum(bool(v.refused) for v in verdicts)} are refused")
    return 0


def _line(verdict: Verdict) -> str:
    wrong = [f"{name}: {said}" for name, said in verdict.checks.items() if said not in (PASSED, NOT_OURS)]
    other = [name for name, said in verdict.checks.items() if said == NOT_OURS]
    said = f"refused: {verdict.refused}" if verdict.refused else "; ".join(wrong) if wrong else "ok"
    return f"{verdict.key:45s} {verdict.seconds:5.1f} s  {said[:600]!r} {other or ''}"


if __name__ == "__main__":
    sys.exit(main())
