"""What is trained, what is not trained again, and what happens when something goes wrong."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hilora.experiments.crew import Alone
from hilora.experiments.experiment import Experiment, Model
from hilora.experiments.inputs import Inputs
from hilora.experiments.ledger import Ledger
from hilora.experiments.plan import FINAL, choose, job, tuning_jobs
from hilora.experiments.records import DIVERGED
from hilora.experiments.results import KEPT
from hilora.experiments.runner import Runner, shard
from hilora.experiments.training import Training
from hilora.federated.archive import packed, unpacked
from hilora.federated.callbacks.checkpoint import CHECKPOINT
from hilora.federated.protocol import Stage
from hilora.federated.simulation import Simulation
from hilora.locks import claimed
from hilora.reporting.progress import Progress
from tests.experiments.conftest import GRID, GRIDS, Write, line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs() -> dict[str, Inputs]:
    """By what their model says of the arithmetic; float32 is quick here, whichever machine this is."""
    found = {
        dtype: Inputs(Model("glyph_vit", dtype=dtype), Path(), torch.device("cpu")) for dtype in ("float32", "auto")
    }
    found["auto"].dtype = torch.float32
    return found


Run = Callable[..., Runner]


@pytest.fixture
def run(tmp_path: Path, inputs: dict[str, Inputs], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an experiment, or its first pairs, into one ledger; without the pictures of runs, which take their time."""
    monkeypatch.setattr("hilora.reporting.plots.draw_run", lambda *given: None)

    def do(experiment: Experiment, said: list[str] | None = None, first: int | None = None) -> Runner:
        ledger = Ledger(tmp_path / "ledger.jsonl")
        say = (said if said is not None else []).append
        training = Training(inputs[experiment.model.dtype], tmp_path / "work", say)
        runner = Runner(experiment, ledger, Alone(training, ledger), say)
        runner.run(experiment.pairs[:first])
        return runner

    return do


def keys(ledger: Ledger) -> list[tuple[Any, ...]]:
    return [tuple(one["key"][name] for name in ("setting", "method", "purpose", "seed")) for one in ledger.lines]


def test_all_is_run_in_order_and_nothing_twice(write: Write, run: Run, tmp_path: Path) -> None:
    said: list[str] = []
    experiment = write()
    runner = run(experiment, said)
    assert runner.failed == []
    assert keys(runner.ledger) == [
        ("groups", "hilora", "final", 0),
        ("groups", "fedit", "final", 0),
        ("groups", "hilora", "final", 1),
        ("groups", "fedit", "final", 1),
        ("mixed", "hilora", "final", 0),
        ("mixed", "fedit", "final", 0),
    ]
    assert said[0] == "Small: 6 runs to do"
    assert "5 runs left, about" in said[1]
    assert said[-1].endswith("0 runs left")
    found = runner.ledger.lines[0]
    per_client = found["results"]["per_client"]
    assert sum(per_client["test"]) / len(per_client["test"]) == pytest.approx(
        found["results"]["final"]["mean"], abs=1e-5
    )
    assert found["decides"]["partition"]["scheme"] == "sc-dir"
    assert found["results"]["rounds"] == 2
    assert str(tmp_path) not in json.dumps(found)
    assert list((tmp_path / "work").rglob("summary.json"))
    assert not list((tmp_path / "work").rglob("*.safetensors"))

    before = (tmp_path / "ledger.jsonl").read_bytes()
    said.clear()
    assert run(experiment, said).failed == []
    assert said == ["Small: 0 runs to do"]
    assert (tmp_path / "ledger.jsonl").read_bytes() == before

    run(write(("[methods.fedit]", "[methods.fedit]\nrun = { lr = 1e-4 }"), ("seeds = [0, 1]", "seeds = [1]")))
    after = keys(Ledger(tmp_path / "ledger.jsonl"))
    assert after[6:] == [("groups", "fedit", "final", 1), ("mixed", "fedit", "final", 0)]


def test_a_method_is_tuned_before_its_first_seed_and_its_choice_is_used(write: Write, run: Run) -> None:
    grid = "grid = [{ lr = 1e30 }, { lr = 1e-3 }]"
    experiment = write(
        ('label = "HiLoRA"', GRID),
        ("[methods.fedit]", f'[methods.fedit]\nsettings = ["groups"]\nwhy = "shorter"\n{grid}'),
        ("seeds = [0, 1]", "seeds = [0]"),
        more=GRIDS,
    )
    runner = run(experiment)
    assert runner.failed == []
    groups = [key[1:] for key in keys(runner.ledger) if key[0] == "groups"]
    assert groups == [
        ("hilora", "tuning", 100),
        ("hilora", "tuning", 100),
        ("hilora", "final", 0),
        ("fedit", "tuning", 100),
        ("fedit", "tuning", 100),
        ("fedit", "final", 0),
    ]
    diverged, fine, final = [one for one in runner.ledger.lines if one["key"]["method"] == "fedit"]
    assert "not finite" in diverged["results"][DIVERGED]
    assert fine["results"]["val"]["mean"] is not None
    assert final["key"]["overrides"] == {"lr": 1e-3}
    assert final["decides"]["settings"]["lr"]["root"] == 1e-3
    chosen = choose(experiment, runner.ledger, *experiment.pairs[0]).place
    assert chosen is not None
    used = next(one for one in runner.ledger.lines if one["key"]["purpose"] == "final")
    assert used["key"]["overrides"] == experiment.methods["hilora"].grid[chosen]


def test_an_interrupted_run_goes_on_where_it_stopped(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = write(("seeds = [0, 1]", "seeds = [0]"), ("rounds = [1, 1, 0]", "rounds = [3, 1, 0]"))
    trained: list[int] = []
    show = Progress.round

    def stop(self: Progress, record: Any) -> None:
        trained.append(record["round"])
        show(self, record)
        if record["round"] == 2:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C while the round is being written

    monkeypatch.setattr(Progress, "round", stop)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, first=1)
    assert trained == [1, 2]
    assert not (tmp_path / "ledger.jsonl").exists()

    def count(self: Progress, record: Any) -> None:
        trained.append(record["round"])
        show(self, record)

    monkeypatch.setattr(Progress, "round", count)
    resumed = run(experiment, first=1).ledger.lines[0]["results"]
    assert trained[2:4] == [3, 4]

    (tmp_path / "ledger.jsonl").unlink()
    whole = run(experiment, first=1).ledger.lines[0]["results"]
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}


def stopped(run: Run, experiment: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only checkpoint of a run that Ctrl-C stopped in its first round."""

    def stop(self: Simulation, stage: Stage) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "_round", stop)
        with pytest.raises(KeyboardInterrupt):
            run(experiment, first=1)
    (found,) = (folder / "work").rglob("checkpoint*")
    assert found.name == CHECKPOINT
    return found


def test_a_checkpoint_that_cannot_be_used_is_told_and_the_run_begins_again(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = write(("seeds = [0, 1]", "seeds = [0]"))

    checkpoint = stopped(run, experiment, tmp_path, monkeypatch)
    checkpoint.write_bytes(b"nothing")
    said: list[str] = []
    runner = run(experiment, said, first=1)
    assert any("begins again" in text for text in said)
    assert runner.failed == []
    assert len(runner.ledger.lines) == 1


def test_a_checkpoint_of_other_settings_is_told_and_the_run_begins_again(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = write(("seeds = [0, 1]", "seeds = [0]"))
    checkpoint = stopped(run, experiment, tmp_path, monkeypatch)
    state = unpacked(checkpoint)
    state["identity"]["batch_size"] = 3
    checkpoint.write_bytes(packed(state))
    said: list[str] = []
    runner = run(experiment, said, first=1)
    assert any("begins again" in text and "batch_size was 3, now 4" in text for text in said)
    assert len(runner.ledger.lines) == 1


def test_where_the_arithmetic_is_to_be_chosen_a_table_and_a_run_keep_theirs(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is bfloat16; float32 is what is quick."""
    experiment = write(('dtype = "float32"', 'dtype = "auto"'), ("seeds = [0, 1]", "seeds = [0]"))
    setting, method = experiment.pairs[0]
    other = line(job(experiment, setting, method, 1, FINAL, {}))
    other["decides"]["model"]["dtype"] = other["dtype"] = "bfloat16"
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(other)
    stopped(run, experiment, tmp_path, monkeypatch)
    path.unlink()
    begun = run(experiment, first=1).ledger.lines[0]
    assert (begun["dtype"], begun["decides"]["model"]["dtype"]) == ("bfloat16", "bfloat16")
    after = run(experiment, first=2).ledger.lines
    assert [one["key"]["method"] for one in after[:2]] == ["hilora", "fedit"]
    assert after[1]["dtype"] == "bfloat16"
    path.unlink()
    assert run(experiment, first=1).ledger.lines[0]["dtype"] == "float32"


def test_a_run_that_fails_is_told_and_the_others_go_on(write: Write, run: Run, tmp_path: Path) -> None:
    said: list[str] = []
    runner = run(write(("seeds = [0, 1]", "seeds = [0]"), ("clients = 5", "clients = 5000")), said)
    assert runner.failed == ["groups/hilora final seed 0", "groups/fedit final seed 0"]
    assert sum(text.startswith("FAILED groups/") and "PartitionError" in text for text in said) == 2
    logs = [path.read_text() for path in (tmp_path / "work").glob("groups.*/log.txt")]
    assert len(logs) == 2
    assert all("Traceback" in text and "PartitionError" in text for text in logs)
    assert [key[0] for key in keys(runner.ledger)] == ["mixed", "mixed"]
    assert said[-1].endswith("2 runs left, about 1 min")


def test_tuning_needs_validation_images(write: Write, run: Run) -> None:
    said: list[str] = []
    experiment = write(
        ('label = "HiLoRA"', "grid = [{}]"),
        ("[methods.fedit]", "[methods.fedit]\ngrid = [{}]"),
        ("seeds = [0, 1]", "seeds = [0]"),
        more=GRIDS + "val_share = 0\n",
    )
    runner = run(experiment, said)
    assert runner.ledger.lines == []
    assert len(runner.failed) == 4  # the tuning runs; nothing is chosen, so that there is no final run
    assert "no validation accuracy" in said[1]


def test_a_final_run_that_diverges_is_recorded_and_not_tried_again(write: Write, run: Run) -> None:
    said: list[str] = []
    experiment = write(("seeds = [0, 1]", "seeds = [0]"), ("[methods.fedit]", "[methods.fedit]\nrun = { lr = 1e30 }"))
    runner = run(experiment, said)
    assert runner.failed == []
    first, second = runner.ledger.lines[:2]
    assert "final" in first["results"]
    assert list(second["results"]) == [DIVERGED]
    assert any("groups/fedit final seed 0: diverged (updates of clients" in text for text in said)
    said.clear()
    run(experiment, said)
    assert said == ["Small: 0 runs to do"]


def test_finals_of_a_method_whose_points_all_diverged_are_not_left(write: Write, run: Run) -> None:
    said: list[str] = []
    experiment = write(
        ('label = "HiLoRA"', "grid = [{}]"),
        ("[methods.fedit]", "[methods.fedit]\ngrid = [{ lr = 1e30 }]"),
        ("seeds = [0, 1]", "seeds = [0]"),
        more=GRIDS,
    )
    runner = run(experiment, said)
    assert [key[1:] for key in keys(runner.ledger)] == 2 * [
        ("hilora", "tuning", 100),
        ("hilora", "final", 0),
        ("fedit", "tuning", 100),
    ]
    assert said[-1].endswith("0 runs left")


def test_a_factorisation_that_fails_is_divergence(write: Write, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Simulation) -> None:
        raise torch.linalg.LinAlgError("no convergence")  # type: ignore[attr-defined]

    monkeypatch.setattr(Simulation, "run", fail)
    runner = run(write(), first=1)
    assert [one["results"] for one in runner.ledger.lines] == 2 * [{DIVERGED: "no convergence"}]


def test_a_run_that_another_process_is_at_is_left_to_it(write: Write, run: Run, tmp_path: Path) -> None:
    experiment = write(("seeds = [0, 1]", "seeds = [0]"))
    setting, method = experiment.pairs[0]
    mine = job(experiment, setting, method, 0, FINAL, {})
    said: list[str] = []
    with claimed(tmp_path / "work" / f"groups.hilora.final0.{mine.fingerprint}") as ours:
        assert ours
        runner = run(experiment, said)
    assert [text for text in said if "another process" in text] == [f"{mine.title}: another process is at it"]
    assert [key[:2] for key in keys(runner.ledger)] == [("groups", "fedit"), ("mixed", "hilora"), ("mixed", "fedit")]
    assert said[-1].endswith("1 run left, about 1 min")
    assert len(run(experiment).ledger.lines) == 4


def test_what_another_process_does_meanwhile_is_not_done_again(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one does the tuning of FedIT while this one is at its first run."""
    experiment = write(
        ('label = "HiLoRA"', "grid = [{}]"),
        ("[methods.fedit]", "[methods.fedit]\ngrid = [{}]"),
        ("seeds = [0, 1]", "seeds = [0]"),
        more=GRIDS,
    )
    other = tuning_jobs(experiment, *experiment.pairs[1])[0]
    train = Simulation.run

    def meanwhile(self: Simulation) -> dict[str, Any]:
        monkeypatch.setattr(Simulation, "run", train)
        Ledger(tmp_path / "ledger.jsonl").append(line(other))
        return train(self)

    monkeypatch.setattr(Simulation, "run", meanwhile)
    assert [key[1:3] for key in keys(run(experiment, first=2).ledger)] == [
        ("fedit", "tuning"),
        ("hilora", "tuning"),
        ("hilora", "final"),
        ("fedit", "final"),
    ]


def test_a_ledger_or_folder_that_cannot_be_written_stops_all(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").write_text("a file")
    with pytest.raises(OSError, match=r"stopped at groups/hilora final seed 0: .*work.*; the same command goes on"):
        run(write())
    (tmp_path / "work").unlink()
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(OSError, match=r"ledger\.jsonl"):
        run(write())
    (tmp_path / "ledger.jsonl").rmdir()

    def full(self: Ledger, line: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Ledger, "append", full)
    monkeypatch.setattr(Simulation, "run", lambda self: dict.fromkeys((*KEPT, "clusters")))
    with pytest.raises(OSError, match="stopped at groups/hilora final seed 0: no space left"):
        run(write())


def test_only_a_checkpoint_that_cannot_be_used_is_thrown_away(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = write(("seeds = [0, 1]", "seeds = [0]"))

    checkpoint = stopped(run, experiment, tmp_path, monkeypatch)
    before = checkpoint.read_bytes()

    def fail(simulation: Simulation) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hilora.federated.simulation.restore", fail)
    said: list[str] = []
    assert run(experiment, said, first=1).failed == ["groups/hilora final seed 0"]
    assert "RuntimeError: out of memory" in said[1]
    assert checkpoint.read_bytes() == before


def test_shards_part_the_pairs_among_them(write: Write) -> None:
    pairs = write().pairs
    parts = [shard(pairs, number, 3) for number in (1, 2, 3)]
    assert sorted(len(part) for part in parts) == [1, 1, 2]
    assert sorted(pairs.index(pair) for part in parts for pair in part) == [0, 1, 2, 3]


def test_what_a_process_left_that_was_killed_after_its_line_is_taken_away(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hilora.experiments.crew.lighten", lambda work, job: None)
    run(write(), first=1)
    assert list((tmp_path / "work").rglob(CHECKPOINT))
    monkeypatch.undo()
    run(write(), first=1)
    assert not list((tmp_path / "work").rglob(CHECKPOINT))
