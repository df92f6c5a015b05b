"""The page of the documentation that says what became of each model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torchvision
import transformers

from tests.sweep.models import MODELS

LIBRARIES = (timm, transformers, torchvision, open_clip)
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
PASSED, NOT_OURS = "yes", "–"

COLUMNS = {
    "inject": "bits",
    "acts": "acts",
    "gradients": "gradients",
    "merge": "merge",
    "save": "files",
    "compile": "compiled",
    "copies": "copies",
    "bf16": "bf16",
    "checkpointing": "checkpoints",
}

HEAD = """# Models that were tried

{passed} of {count} models pass all of the following{tried}{refused}{failed}.
They are models of {versions},
made two or three blocks deep from their configs, with random weights, on a CPU. `make sweep` tries them, in {minutes}
minutes of one core, and writes this page.

| column | what is true |
| :-- | :-- |
| bits | injection changes no bit of an output, and no key of the state dict |
| acts | the adapters of every single projection change the output, and none does where they are disabled |
| gradients | for each tier, gradients reach all of its adapters, the head, and nothing else |
| merge | merged outputs are the adapted ones up to rounding; `unmerge` and `unload` bring each bit back |
| files | a file of adapters, and a state dict, give a fresh model the same bits; an unloaded one has the plain keys |
| compiled | `torch.compile(fullgraph=True, backend="aot_eager")` gives the same outputs and gradients |
| copies | `deepcopy` and pickle give the same bits, and share nothing with the original |
| bf16 | outputs and gradients are finite, adapters act, and can be merged |
| checkpoints | gradients under checkpointing are the same: of the whole model, and by the model's own switch |

"–" is what the plain model cannot do, either. PyTorch rounds differently where weights are frozen, and in its
inference kernel for attention: the plain models are frozen, and the kernel is off. Other targets than q and v stand
where a model has none (FocalNet) or does not use what they give, which no error can tell: q in the spatial attention of
CSATv2, the last block of BEiT for segmentation, and the pooling of SigLIP for classification, both of transformers.
"""


class Verdict(NamedTuple):
    """What became of a model.

    Attributes:
        key: of the model.
        checks: by their names: PASSED, NOT_OURS where the plain model cannot do it, either, or what went wrong.
        refused: why it cannot be adapted; empty where it can.
        seconds: of a processor that it took.
    """

    key: str
    checks: dict[str, str]
    refused: str
    seconds: float

    @property
    def wrong(self) -> dict[str, str]:
        """What went wrong, by check."""
        return {name: said for name, said in self.checks.items() if said not in (PASSED, NOT_OURS)}

    @property
    def passed(self) -> bool:
        return not self.refused and not self.wrong


def page(verdicts: Collection[Verdict]) -> str:
    """The page in Markdown."""
    found = {verdict.key: verdict for verdict in verdicts}
    untried = any(not verdict.refused and COLUMNS.keys() - verdict.checks.keys() for verdict in verdicts)
    refused = sum(bool(verdict.refused) for verdict in verdicts)
    failed = sum(bool(verdict.wrong) for verdict in verdicts)
    text = HEAD.format(
        passed=sum(verdict.passed for verdict in verdicts),
        count=len(verdicts),
        refused=f"; {refused} refused, with a reason in the row" if refused else "; none is refused",
        failed=f"; {failed} fail" if failed else "",
        tried=" that was tried (an empty cell was not)" if untried else "",
        minutes=round(sum(verdict.seconds for verdict in verdicts) / 60),
        versions=", ".join(f"{module.__name__} {module.__version__.partition('+')[0]}" for module in LIBRARIES),
    )
    for library in dict.fromkeys(model.library for model in MODELS.values()):
        rows = [_cells(found[key]) for key, model in sorted(MODELS.items()) if model.library == library]
        text += f"\n## {library}\n\n" + "\n".join(_table(["model", "targets", *COLUMNS.values()], rows)) + "\n"
    return text


def _cells(verdict: Verdict) -> list[str]:
    model = MODELS[verdict.key]
    cells = [f"`{model.name}`", ", ".join(model.targets)]
    if verdict.refused:
        return [*cells, f"refused: {verdict.refused}", *[""] * (len(COLUMNS) - 1)]
    return cells + [verdict.checks.get(name, "") for name in COLUMNS]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join([':--'] * len(head))} |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
