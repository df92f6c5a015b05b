"""Write the ViT of one client of a run as plain weights: its adapters merged into the backbone, its head in place.

    hilora merge runs/demo/hilora --client 3 --out client-3.safetensors

The file is what timm loads: timm.create_model(NAME, num_classes=N, checkpoint_path="client-3.safetensors").
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hilora.adapters.io.files import serialised, write_files
from hilora.adapters.merging import merge
from hilora.federated.finished import with_path
from hilora.reporting.progress import ending, say


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    found.add_argument("--client", type=int, required=True, help="its id, from 0 on; unseen clients have one, too")
    found.add_argument("--out", type=Path, required=True, help="the file to write, such as client-3.safetensors")
    found.add_argument("--backbone", help="where the run's summary does not say it, or it has another name here")
    found.add_argument("--weights", type=Path, help="of the backbone, where they lie elsewhere than at the run's time")
    return found


def main(arguments: Sequence[str] | None = None, prog: str = "hilora merge") -> int:
    args = parser(prog).parse_args(arguments)

    def work() -> int:
        model, slots = with_path(args.run, args.client, args.backbone, args.weights)
        merge(model, **slots)
        weights = model.state_dict()
        write_files({args.out: serialised(weights, {"format": "pt"})})
        say(f"{args.out}: {len(weights)} tensors, {sum(map(Tensor.numel, weights.values())):,} numbers")
        return 0

    return ending(work)
