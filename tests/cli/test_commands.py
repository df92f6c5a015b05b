"""The command `hilora`, and what it says of files and runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hilora
from hilora.cli.contents import READERS
from hilora.cli.main import COMMANDS, main
from hilora.cli.train import command as train
from hilora.cli.train import load
from hilora.federated.data.images import prepare
from hilora.models.backbone import load_backbone
from hilora.models.glyph_vit import new_glyph_vit

pytestmark = pytest.mark.slow

SMALL = ["--clients", "6", "--images-per-client", "16", "--rounds", "1,1,1", "--rank", "2", "--dtype", "float32"]


def command(*arguments: object, **how: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "hilora", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **how)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of HiLoRA beside one of FedIT and one of FedALT, on glyphs."""
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", *SMALL, "--strategy", "hilora", "fedit", "fedalt", "--quiet", "--out", str(out)]) == 0
    return out


def test_help_and_version_load_next_to_nothing() -> None:
    loaded = "import sys; from hilora.cli.main import main\ntry: main({0})\nexcept SystemExit: pass\n"
    for words in (["--help"], ["--version"], []):
        code = loaded.format(words) + "assert not {'torch', 'numpy', 'timm', 'pydantic'} & set(sys.modules)"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "hilora" in found.stdout
    assert command("--version").stdout == f"hilora {hilora.__version__}\n"


def test_every_command_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: hilora {name}")


def test_an_unknown_command_or_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["trian"], "'trian' (choose from"), (["train", "--lrr", "1"], "--lrr")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_wrong_settings_are_found_before_any_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hilora.cli.train.read_images", lambda *given: pytest.fail("data were read"))
    wrong = {
        "--classes-per-client 3": "--classes-per-client is for patho",
        "--unseen 3": "--unseen is 3",
        "--lr -1": "--lr.root=-1",
    }
    for words, said in wrong.items():
        assert main(["train", *SMALL, *words.split(), "--out", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


def test_json_is_all_that_is_printed_and_quiet_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--strategy", "fedit", "--json", "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "a" / "summary.json").read_text())
    assert main(["train", *SMALL, "--strategy", "fedit", "--quiet", "--out", str(tmp_path / "b")]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, printed.err, quiet.err) == ("", "", "")
    assert main(["train", "--quiet", "--data-dir", str(tmp_path / "none")]) == 2
    assert "--data-dir" in capsys.readouterr().err


def test_what_a_run_leaves_is_inspected(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "hilora"
    expected = {
        runs: "a comparison of 3 runs",
        run: "a run",
        run / "summary.json": "a run",
        run / "metrics.jsonl": "the rounds of a run",
        run / "adapters.safetensors": "adapters",
        run / "heads.safetensors": "the heads of a run's clients",
        run / "checkpoint.safetensors": "the checkpoint of a run",
    }
    model = hilora.inject(new_glyph_vit(3), hilora.HiLoRAConfig(r=2))
    hilora.export_peft(model, tmp_path / "peft")
    shutil.copy(Path(hilora.__file__).parent / "models/assets/glyph_vit.safetensors", tmp_path)
    expected |= {
        tmp_path / "peft": "an adapter of PEFT",
        tmp_path / "peft" / "adapter_model.safetensors": "adapters of another library",
        tmp_path / "glyph_vit.safetensors": "weights of a model",
    }
    for path, kind in expected.items():
        assert main(["inspect", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["kind"] == kind
        assert main(["inspect", str(path)]) == 0
        assert f"{path}: {kind}" in capsys.readouterr().out
    assert main(["inspect", str(run / "adapters.safetensors"), "--json"]) == 0
    tiers = json.loads(capsys.readouterr().out)["parts"]
    assert [(tier["tier"], tier["r"], tier["slots"]) for tier in tiers][::2] == [("root", 2, 1), ("leaf", 2, 6)]


def test_experiments_and_their_ledgers_are_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(hilora.__file__).resolve().parents[1] / "benchmarks/experiments"
    ledgers = sorted(folder.glob("**/*.ledger.jsonl"))
    assert ledgers
    for ledger in ledgers:
        path = ledger.with_name(ledger.name.replace(".ledger.jsonl", ".toml"))
        assert main(["inspect", str(path), str(ledger)]) == 0
        printed = capsys.readouterr().out
        assert f"{path}: an experiment" in printed
        assert "lines that are no records: –" in printed


@pytest.mark.parametrize("name", [name for name in READERS if name != ".toml"])
def test_damaged_and_foreign_files_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / (f"x{name}" if name.startswith(".") else name)
    for content in (b"", b"\xff\x00{", b"[" * 100_000, b'{"a": 1}\n'):
        path.write_bytes(content)
        code = main(["inspect", str(path)])
        printed = capsys.readouterr()
        assert code in (0, 2), content
        assert (str(path) in printed.err) if code else (str(path) in printed.out)
    for other in (tmp_path / "none", tmp_path.parent / "conftest.py", tmp_path / ".."):
        assert main(["inspect", str(other)]) == 2


def test_runs_are_compared_client_by_client(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(runs / name) for name in ("fedit", "hilora", "fedalt")]
    assert main(["compare", *folders, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "minus fedit" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.md", "comparison.json", "differences.png"}
    assert main(["compare", *folders, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = ({**run["per_client"]} for run in found["runs"][:2])
    mean = sum(b - a for a, b in zip(first["test"], second["test"], strict=True)) / len(first["test"])
    assert found["differences"]["hilora"]["mean"] == pytest.approx(mean)
    assert found["differences"]["hilora"]["low"] <= mean <= found["differences"]["hilora"]["high"]


def test_runs_of_other_clients_are_not_paired_and_settings_that_differ_are_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--strategy", "hilora", "--out", str(tmp_path / "other"), "--quiet"]
    assert main(["train", *SMALL, *other, "--images-per-client", "20"]) == 0
    assert main(["compare", str(runs / "hilora"), str(tmp_path / "other")]) == 0
    printed = capsys.readouterr().out
    assert "minus" not in printed
    assert any(line.split() == ["images_per_client", "16", "20"] for line in printed.splitlines())
    assert main(["compare", str(runs / "hilora"), str(runs / "hilora")]) == 2
    assert "the same run" in capsys.readouterr().err


def test_a_merged_client_predicts_as_in_its_run(runs: Path, tmp_path: Path) -> None:
    summary = json.loads((runs / "hilora" / "summary.json").read_text())
    args = train("hilora train").parse(SMALL)
    _, test, population = load(args, 32)
    backbone = load_backbone("glyph_vit")
    places = {client: place for place, client in enumerate(summary["per_client"]["ids"])}
    for client in list(places)[:2]:
        path = tmp_path / f"{client}.safetensors"
        assert main(["merge", str(runs / "hilora"), "--client", str(client), "--out", str(path)]) == 0
        model = new_glyph_vit(50)
        model.load_state_dict(load_file(path))
        own = population.clients[client].test
        pixels = prepare(test.images[own], 32, backbone.mean, backbone.std, torch.float32)
        with torch.no_grad():
            right = (model.eval()(pixels).argmax(1) == test.labels[own]).float().mean()
        assert float(right) == pytest.approx(summary["per_client"]["test"][places[client]], abs=1.01 / len(own))


def test_what_cannot_be_merged_is_said(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "x.safetensors")]
    for run, client, said in (("hilora", "6", "clients 0 to 5"), ("fedalt", "0", "Gate"), ("none", "0", "none")):
        assert main(["merge", str(runs / run), "--client", client, *out]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_client_goes_to_peft_and_comes_back(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    run, folder, file = runs / "hilora", tmp_path / "client-1", tmp_path / "a.safetensors"
    expected = hilora.load_client(run, 1)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert main(["peft", "export", str(run), "--client", "1", "--out", str(folder)]) == 0
    theirs = peft.PeftModel.from_pretrained(new_glyph_vit(50), folder).eval()
    with torch.no_grad():
        theirs.load_state_dict({f"base_model.model.{n}": v for n, v in frozen().items()}, strict=False)
        torch.testing.assert_close(theirs(x), expected(x), rtol=1e-4, atol=1e-4)
    base = ["--backbone", "glyph_vit"]
    assert main(["peft", "import", str(folder), *base, "--classes", "50", "--tier", "leaf", "--out", str(file)]) == 0
    back = new_glyph_vit(50)
    back.load_state_dict(load_backbone("glyph_vit").model.state_dict(), strict=False)
    hilora.load_adapters(back, file)
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(x), expected(x), rtol=1e-4, atol=1e-4)
    assert main(["peft", "export", str(file), *base, "--rank", "2", "--out", str(tmp_path / "cut")]) == 0
    assert "of the updates" in capsys.readouterr().out
    kept = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert {len(value) for name, value in kept.items() if "lora_A" in name} == {2}


def frozen() -> dict[str, torch.Tensor]:
    """The weights of the glyph ViT by the names that they have under PEFT."""
    state = load_backbone("glyph_vit").model.state_dict()
    return {name.replace(".qkv.", ".qkv.base_layer."): value for name, value in state.items()}


def test_what_cannot_go_to_peft_is_said(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = runs / "hilora", ["--out", str(tmp_path / "x")]
    for words, said in (
        (["export", str(run)], "give --client"),
        (["export", str(run), "--client", "6"], "clients 0 to 5"),
        (["export", str(run / "adapters.safetensors"), "--client", "1"], "give --slot TIER=N"),
        (["export", str(run / "adapters.safetensors")], "give --backbone"),
        (["import", str(run), "--backbone", "glyph_vit"], "no adapter_config.json"),
    ):
        assert main(["peft", *words, *out]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_env_names_versions_devices_and_who_serves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for word in (f"torch {torch.__version__}", "cpu: ", "stacked_lora_linear: ", "gram_penalty: ", "not fused: "):
        assert word in said
    assert main(["env", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["serving"]) >= {"cpu"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_its_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "--rounds", "--clients-per-domain", "--client"):
        assert word.removeprefix("--") in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    words = f"{sys.executable} -m hilora inspect benchmarks/experiments/*/methods*.jsonl benchmarks/experiments/*.jsonl"
    root = Path(hilora.__file__).resolve().parents[1]
    done = subprocess.run(["bash", "-c", f"{words} | head -n 1"], cwd=root, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_what_a_killed_run_of_several_methods_left_half_written_is_taken_away(tmp_path: Path) -> None:
    half = [tmp_path / name for name in (".comparison.md.0123abcd.tmp", "fedit/.summary.json.0123abcd.tmp")]
    for path in half:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert main(["train", *SMALL, "--strategy", "fedit", "local-lora", "--quiet", "--out", str(tmp_path)]) == 0
    assert not any(path.exists() for path in half)


def test_a_client_of_a_run_is_loaded_to_predict_and_to_train_further(runs: Path, tmp_path: Path) -> None:
    run, x = runs / "hilora", torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert main(["merge", str(run), "--client", "1", "--out", str(tmp_path / "1.safetensors")]) == 0
    plain = new_glyph_vit(50).eval()
    plain.load_state_dict(load_file(tmp_path / "1.safetensors"))
    model = hilora.load_client(run, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(hilora.load_client(str(run), 2)(x), plain(x), atol=1e-3)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"leaf", "weight", "bias"}
    model(x).square().sum().backward()
    with pytest.raises(ValueError, match=r"client 6: .* has clients 0 to 5"):
        hilora.load_client(run, 6)
    with pytest.raises(ValueError, match="Gate"):
        hilora.load_client(runs / "fedalt", 0)
    with pytest.raises(FileNotFoundError):
        hilora.load_client(tmp_path, 0)
