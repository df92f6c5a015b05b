"""Try all models and write `docs/reference/models.md`: `python -m tests.sweep.run` (`make sweep`).

It fails where a model neither passes nor is refused.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from types import FrameType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from hilora.errors import HiLoRAError
from tests.sweep.checks import CHECKS, NotOurs
from tests.sweep.models import MODELS
from tests.sweep.page import NOT_OURS, PAGE, PASSED, Verdict, page

SECONDS = 120  # of a processor that a model may take


class Late(BaseException):
    """A model takes longer than any should."""


def _late(number: int, frame: FrameType | None) -> None:
    raise Late


def examine(key: str, names: Sequence[str] = tuple(CHECKS)) -> Verdict:
    """Try one model, in a limit of a processor's time."""
    start, checks, refused = time.process_time(), dict[str, str](), ""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise, and no adapted attention takes it
    signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
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
    except Late:
        checks["time"] = f"more than {SECONDS} s"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Verdict(key, checks, refused, time.process_time() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="parts of their names; all by default")
    parser.add_argument("--checks", nargs="*", choices=CHECKS, default=list(CHECKS), help="all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    keys = [key for key in MODELS if not args.models or any(part in key for part in args.models)]
    verdicts: list[Verdict] = []
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=16) as pool:
        for verdict in pool.imap_unordered(partial(examine, names=args.checks), keys, chunksize=1):
            verdicts.append(verdict)
            print(_line(verdict), flush=True)
    count = sum(verdict.passed for verdict in verdicts)
    print(f"{count} of {len(verdicts)} pass; {sum(bool(v.refused) for v in verdicts)} are refused")
    if len(keys) == len(MODELS) and args.checks == list(CHECKS):
        PAGE.write_text(page(verdicts), encoding="utf-8")
        print(f"{PAGE} is written")
    return int(any(verdict.wrong for verdict in verdicts))


def _line(verdict: Verdict) -> str:
    unable = [name for name, said in verdict.checks.items() if said == NOT_OURS]
    said = "; ".join(f"{name}: {said}" for name, said in verdict.wrong.items())
    if verdict.refused:
        said = f"refused: {verdict.refused}"
    elif not said:
        said = f"passes, but for {', '.join(unable)}, which the plain model cannot do" if unable else "passes"
    return f"{verdict.key:48s} {verdict.seconds:5.1f} s  {said[:600]}"


if __name__ == "__main__":
    sys.exit(main())
