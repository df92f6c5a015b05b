"""The file of an experiment: what it gives, and every mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hilora.experiments.checks import SpecError
from hilora.experiments.spec import read_experiment
from tests.experiments.conftest import GRID, GRIDS, Write


def test_what_a_file_says_is_read(write: Write) -> None:
    experiment = write(
        ("[methods.fedit]", '[methods.plain]\nstrategy = "fedit"\nreference = true\npaper = { mixed = 80 }')
    )
    assert experiment.name == "small"
    assert experiment.model.img_size is None
    assert [(setting.name, method.name) for setting, method in experiment.pairs] == [
        ("groups", "hilora"),
        ("groups", "plain"),
        ("mixed", "hilora"),
        ("mixed", "plain"),
    ]
    groups, mixed = experiment.settings.values()
    assert groups.seeds == (0, 1)
    assert mixed.seeds == (0,)
    assert groups.arguments == {"clients": 5, "images_per_client": 8}
    plain = experiment.methods["plain"]
    assert (plain.strategy, plain.label, plain.reference, plain.paper) == ("fedit", "plain", True, {"mixed": 80})
    assert experiment.compare == "hilora"


def test_what_stands_nearer_to_a_run_overrides(write: Write) -> None:
    experiment = write(
        ('partition = "sc-dir"', 'partition = "sc-dir"\nrun = { batch_size = 5, local_epochs = 5, rank = 5 }'),
        ('label = "HiLoRA"', f"run = {{ local_epochs = 6, rank = 6 }}\n{GRID.replace('lr = 1e-3', 'rank = 7')}"),
        ("[methods.fedit]", f"[methods.fedit]\n{GRID}"),
        more=GRIDS,
    )
    method = experiment.methods["hilora"]
    _, run = experiment.training(experiment.settings["groups"], method, method.grid[1], seed=3)
    assert (run.unseen_epochs, run.batch_size, run.local_epochs, run.rank["leaf"], run.seed) == (1, 5, 6, 7, 3)
    _, elsewhere = experiment.training(experiment.settings["mixed"], experiment.methods["fedit"], {}, seed=0)
    assert (elsewhere.batch_size, elsewhere.local_epochs, elsewhere.rank["leaf"]) == (4, 1, 2)


def test_of_a_methods_own_settings_each_is_overridden_by_itself(write: Write) -> None:
    experiment = write(
        ("[methods.fedit]", "[methods.ifca]\nrun = { k = 4, images = 16 }\ngrid = [{ k = 3 }]"),
        ('label = "HiLoRA"', "grid = [{}]"),
        ('partition = "sc-dir"', 'partition = "sc-dir"\nrun = { images = 8, k_min = 2 }'),
        more=GRIDS,
    )
    setting, method = experiment.settings["groups"], experiment.methods["ifca"]
    strategy, _ = experiment.training(setting, method, method.grid[0], seed=0)
    assert strategy.settings.plain() == {"k": 3, "images": 16}
    hilora, _ = experiment.training(setting, experiment.methods["hilora"], {}, seed=0)
    assert hilora.settings.plain()["k_min"] == 2  # which IFCA, that has none, passed over


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title", "titel", "unknown 'titel'.*title"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds.*different"),
        ("seeds = [0, 1]", "seeds = []", "seeds.*different"),
        ("seeds = [0, 1]", "", "the file lacks seeds"),
        ('dtype = "float32"', 'dtype = "float16"', "dtype.*'float16'.*bfloat16"),
        ('dtype = "float32"', "img_size = 0", "img_size is 0"),
        ("batch_size = 4", "batchsize = 4", "run has unknown 'batchsize'.*batch_size"),
        ("batch_size = 4", "batch_size = 0", "hilora in groups.*batch_size"),
        ("batch_size = 4", 'batch_size = "four"', "hilora in groups"),
        ("batch_size = 4", "seed = 4", "unknown 'seed'"),
        ("clients = 5", "clients = 5\nclass = 5", "settings.groups has unknown 'class'.*classes_per_client"),
        ("clients = 5", "clients = 5\nclasses = 5", "settings.groups.classes is 5, .*only where.*'domains'"),
        (
            'partition = "sc-dir"',
            'partition = "domains"\nclasses = 1',
            "groups.classes is 1, expected two or more",
        ),
        ("clients = 5\n", "", "settings.groups lacks clients"),
        ("[settings.groups]", '[settings."a/b"]', "'a/b' is no name"),
        ('partition = "sc-dir"', 'partition = "sc-dir"\nrun = { lrr = 1 }', "settings.groups.run has unknown 'lrr'"),
        ("[methods.fedit]", "[methods.fedlit]", "methods.fedlit.strategy is 'fedlit'.*fedit"),
        ("[methods.fedit]", "[methods.fedit]\ngird = []", "methods.fedit has unknown 'gird'"),
        ("[methods.fedit]", "[methods.fedit]\nrun = { rate = 1 }", "methods.fedit.run has unknown 'rate'"),
        (
            "[methods.fedit]",
            "[methods.fedit]\nrun = { options = { k = 1 } }",
            "methods.fedit.run has unknown 'options': a method's own settings stand beside the others",
        ),
        ("batch_size = 4", "options = { k = 1 }", "run has unknown 'options': .* beside the others"),
        (
            'partition = "sc-dir"',
            'partition = "sc-dir"\nrun = { options = { k = 1 } }',
            "settings.groups.run has unknown 'options': .* beside the others",
        ),
        (
            "[methods.fedit]",
            "[methods.fedit]\ngrid = [{ options = { k = 1 } }]",
            "methods.fedit.grid, point 1 has unknown 'options': .* beside the others",
        ),
        ("[methods.fedit]", "[methods.fedit]\nrun = { k = 1 }", "methods.fedit.run has unknown 'k'"),  # IFCA has it
        ("[methods.fedit]", '[methods.fedit]\nsettings = ["groups"]', "leaves out mixed: say why"),
        ("[methods.fedit]", '[methods.fedit]\nsettings = ["group"]', "some of groups, mixed"),
        ("[methods.fedit]", '[methods.fedit]\nreference = "yes"', "expected true or false"),
        ("[methods.fedit]", "[methods.fedit]\npaper = { domains = 1 }", "paper has unknown 'domains'"),
        ("[methods.fedit]", "[methods.fedit]\npaper = { mixed = 101 }", "expected an accuracy in %"),
        ('title = "Small"', 'title = "Small"\ncompare = "fedlit"', "compare is 'fedlit'.*hilora, fedit"),
        ('title = "Small"', "title = 3", "title is 3, expected text"),
        ("[model]", "[model", "is not TOML"),
        ("[model]", f"deep = {'[' * 3000}{']' * 3000}\n[model]", "is not TOML"),
        ("seeds = [0, 1]", f"seeds = [{'9' * 400}]", "seeds has 9999.*, expected a number of at most 64 bits"),
        ('title = "Small"', 'title = "Small"\ncompare = ["hilora"]', r"compare is \['hilora'\], expected text"),
        ('title = "Small"', 'title = "Sm\\u001ball"', "title is .*control characters"),
        ('label = "HiLoRA"', 'label = "Hi\\nLoRA"', "methods.hilora.label is .*line breaks"),
        ("[methods.fedit]", '[methods.fedit]\nstrategy = ["fedit"]', r"methods.fedit.strategy is \['fedit'\]"),
        ("[methods.fedit]", '[methods.fedit]\nsettings = [["groups"]]', "some of groups, mixed"),
        ("[methods.fedit]", "[methods.fedit]\nrun = { options = 3 }", "methods.fedit.run has unknown 'options'"),
        ("[methods.fedit]", "[methods.fedit]\nrun = 3", "methods.fedit.run is 3, expected a table"),
        ("[methods.fedit]", '[methods.ifca]\nrun = { k = "y" }', "ifca in groups cannot be trained.*k='y'"),
        ("[methods.fedit]", "[methods.ifca]\nrun = { k = 0 }", "ifca in groups cannot be trained.*k=0.*greater"),
        ("[methods.fedit]", "[methods.ifca]\nrun = { k = true }", "ifca in groups.*k=True: expected a number"),
        ("batch_size = 4", "target_modules = 4", "hilora in groups"),
        ("batch_size = 4", 'rank_budgets = "1/2:2,1/2:1"', "fedit in groups.*fedit has no use for budgets of ranks"),
        ("batch_size = 4", "rank_budgets = 200", "hilora in groups cannot be trained.*adapters of rank 2 at most"),
        ("batch_size = 4", "batch_size = inf", "hilora in groups"),
        ('partition = "sc-dir"', 'partition = "sc-dri"', "settings.groups.partition is 'sc-dri'.*sc-dir"),
        ('partition = "sc-dir"', 'partition = ["sc-dir"]', "settings.groups.partition is .*expected text"),
        ("clients = 5", 'clients = "5"', "settings.groups.clients is '5', expected a whole number"),
        ("clients = 5", "clients = 5.0", "settings.groups.clients is 5.0, expected a whole number"),
        ("clients = 5", "clients = true", "settings.groups.clients is True, expected a whole number"),
        ("clients = 5", 'clients = 5\nalpha = "1"', "settings.groups.alpha is '1', expected a number"),
        ('data = "glyphs"', 'data = "/glyphs"', "settings.groups.data is '/glyphs', expected a path inside"),
        ('data = "glyphs"', 'data = "a/../../b"', r"settings.groups.data is .*'\.\.'"),
        ('dtype = "float32"', 'weights = "../vit.pt"', r"model.weights is .*'\.\.'"),
    ],
)
def test_a_mistake_is_named_with_its_place(write: Write, old: str, new: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        write((old, new))
    assert "small.toml" in str(caught.value)


def test_all_methods_get_the_same_effort(write: Write) -> None:
    one = ("[methods.fedit]", f"[methods.fedit]\n{GRID}")
    with pytest.raises(SpecError, match=r"hilora 0, fedit 2.*equally many"):
        write(one, more=GRIDS)
    with pytest.raises(SpecError, match=r"hilora 1, fedit 2"):
        write(one, ('label = "HiLoRA"', "grid = [{}]"), more=GRIDS)
    for grid in (
        "[{ lr = 1 }, { lr = 1 }]",
        "[{ lr = 1 }, { lr = [1.0, 1, 1] }]",
        "[{}, { k_min = 1 }]",
        "[{}, { clients_at_once = 2 }]",
    ):
        with pytest.raises(SpecError, match=r"hilora\.grid, point 2 is in groups the same run as one before it"):
            write(one, ('label = "HiLoRA"', f"grid = {grid}"), more=GRIDS)
    own = ("[methods.fedit]", "[methods.fedit]\ngrid = [{}, { rank = [2, 2, 7] }]")  # of a tier that it does not have
    with pytest.raises(SpecError, match=r"fedit\.grid, point 2 is in groups the same run"):
        write(own, ('label = "HiLoRA"', GRID), more=GRIDS)
    other = ("[methods.fedit]", "[methods.fedit]\ngrid = [{}, { gamma_root = 7.0 }]")  # of another method
    with pytest.raises(SpecError, match=r"fedit\.grid, point 2 has unknown 'gamma_root'"):
        write(other, ('label = "HiLoRA"', GRID), more=GRIDS)
    with pytest.raises(SpecError, match="point 2 has unknown 'rate'"):
        write(one, ('label = "HiLoRA"', "grid = [{}, { rate = 1 }]"), more=GRIDS)


def test_tuning_has_grids_and_a_seed_of_its_own(write: Write) -> None:
    grids = (('label = "HiLoRA"', GRID), ("[methods.fedit]", f"[methods.fedit]\n{GRID}"))
    with pytest.raises(SpecError, match=r"no \[tuning\]"):
        write(*grids)
    with pytest.raises(SpecError, match="no grid"):
        write(more=GRIDS)
    with pytest.raises(SpecError, match="final runs of groups have"):
        write(*grids, more=GRIDS.replace("100", "1"))
    with pytest.raises(SpecError, match=r"tuning\.clients is 'three', expected a whole number"):
        write(*grids, more=GRIDS.replace("3", '"three"'))
    with pytest.raises(SpecError, match="tuning has unknown 'client'"):
        write(*grids, more=GRIDS.replace("clients", "client"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no experiment"):
        read_experiment(tmp_path / "none.toml")
