"""The shipped recipes: read strictly, explained on a page, and run from end to end, scaled down."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib.resources
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tetra
from tetra import cli
from tetra.config import model_config
from tetra.errors import ConfigError
from tetra.files import load
from tetra.training.recipe import Recipe, load_recipe, run_recipe, shipped_recipes
from tetra.training.recipe_docs import data_needed, facts, meanings, settings, to_markdown

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = importlib.resources.files(tetra) / "training" / "recipes"
Section = tuple[str | int, ...]


def written(name: str) -> dict[str, Any]:
    """A shipped recipe as its file has it."""
    data: dict[str, Any] = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
    return data


def within(data: Any, path: Section) -> Any:
    for key in path:
        data = data[key]
    return data


def sections(data: Any, path: Section = ()) -> Iterator[Section]:
    """Paths of all mappings in a recipe, the whole first."""
    if isinstance(data, dict):
        yield path
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield from sections(value, (*path, key))


EVERY_SECTION = [(name, path) for name in shipped_recipes() for path in sections(written(name))]


# --- reading ---


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe == load_recipe(written(name))
    assert recipe.model().backbone == model_config(recipe.arch, recipe.head).backbone
    assert recipe.description
    made = facts(recipe)
    assert made.n_bits % 8 == 0
    folders = {folder for folder, _, _ in data_needed(recipe)}
    assert not any(Path(folder).is_absolute() for folder in folders)


def test_recipes_of_the_paper() -> None:
    """What the paper fixes."""
    for name, head, n_bits in (("vit-s", "salad", 8448), ("vit-b", "boq", 12288)):
        recipe = load_recipe(name)
        assert (recipe.arch, recipe.head, facts(recipe).n_bits) == (name, head, n_bits)
        assert recipe.backbone is None
        assert recipe.head_options is None
        stage1, stage2, probe = recipe.distill, recipe.finetune, recipe.probe
        assert stage1 is not None
        assert stage2 is not None
        assert probe is not None
        assert (stage1.lr, stage1.weight_decay, stage1.warmup_fraction) == (4e-4, 0.01, 0.05)
        assert (stage1.epochs, stage1.max_steps, stage1.crop) == (30, 0, 512)
        assert (stage1.batch_size, stage1.loop.accumulate) == (4 * 128, 2)
        assert (stage1.cls_weight, stage1.patch_weight, stage1.attention_weight) == (1.0, 0.3, 0.05)
        assert (stage1.attention_layers, stage1.attention_reduction) == (4, "elements")
        assert stage1.lambda_schedule == stage2.lambda_schedule == "sigmoid"
        assert stage1.loop.precision == stage2.loop.precision == "bf16-mixed"
        assert (stage2.lr, stage2.weight_decay, stage2.warmup_epochs) == (1e-4, 1e-3, 3)
        assert (stage2.epochs, stage2.max_steps, stage2.milestones, stage2.gamma) == (40, 0, (10, 20, 30), 0.3)
        assert (stage2.images_per_place, stage2.trainable_blocks) == (4, 1)
        assert stage2.places_per_batch % 4 == 0  # shared out to four processes
        assert stage1.loop.validate_every == stage2.loop.validate_every == 0
        assert (probe.dataset, probe.layout, probe.radius_m) == ("msls-val", "utm", 25)


@pytest.mark.parametrize(("name", "path"), EVERY_SECTION)
def test_unknown_keys_are_refused_at_every_level(name: str, path: Section, tmp_path: Path) -> None:
    data = written(name)
    section = within(data, path)
    key = max(section, key=len)
    section[key[:-1] + "q"] = section.pop(key)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=rf"unknown key '{key[:-1]}q'; did you mean '{key}'\?") as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    for part in path:
        assert (f"[{part}]" if isinstance(part, int) else part) in str(caught.value)


@pytest.mark.parametrize(("name", "path"), EVERY_SECTION)
def test_values_of_the_wrong_type_are_refused_at_every_level(name: str, path: Section) -> None:
    for key in within(written(name), path):
        for wrong in ({"a": 1}, [{"a": 1}], object()):
            data = written(name)
            within(data, path)[key] = wrong
            with pytest.raises(ConfigError) as caught:
                load_recipe(data)
            assert key in str(caught.value) or "unknown key 'a'" in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\narch: nano\nname: b\n", "key 'name' of line 1 stands again in line 3; remove one of them"),
        ("distill:\n  lr: 0.1\n  loop: {}\n  'lr': 0.2\n", "key 'lr' of line 2 stands again in line 4"),
        ("distill:\n  lr: 0.1\nfinetune:\n  loop: {seed: 1, workers: 2, seed: 3}\n", "'seed' of line 4 .* in line 4"),
        ("finetune:\n  sources:\n    - {kind: photos}\n    - kind: a\n      kind: b\n", "'kind' of line 4 .* line 5"),
        ("head_options:\n  grid: [1, 1]\n  grid: [2, 2]\n", "key 'grid' of line 2 stands again in line 3"),
    ],
)
def test_keys_that_stand_twice(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}: key ")
    assert "\n" not in str(caught.value)


def test_one_key_in_two_mappings_and_yaml_s_own_merging(tmp_path: Path) -> None:
    data = written("nano")
    del data["distill"]["loop"], data["finetune"]["loop"]
    text = yaml.safe_dump(data)
    loops = "  loop: &loop {log_every: 3, clip: 2.0}\n", "  loop: {<<: *loop, clip: 3.0}\n"
    for stage, loop in zip(("distill:\n", "finetune:\n"), loops, strict=True):
        text = text.replace(stage, stage + loop)
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.distill is not None
    assert recipe.finetune is not None
    assert (recipe.distill.loop.clip, recipe.finetune.loop.clip) == (2.0, 3.0)
    assert recipe.distill.loop.log_every == recipe.finetune.loop.log_every == 3


# --- what is said about them ---


def test_the_page_is_up_to_date() -> None:
    page = to_markdown([load_recipe(name) for name in shipped_recipes()])
    assert (ROOT / "docs/recipes.md").read_text() == page, "run: tetra train recipes --markdown docs/recipes.md"


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_setting_is_on_the_page(name: str) -> None:
    """Also what the file does not say."""
    recipe = load_recipe(name)
    found = {setting.path: setting for setting in settings(recipe)}

    def check(value: Any, path: str) -> int:
        if dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            return sum(check(getattr(value, f.name), f"{path}.{f.name}".removeprefix(".")) for f in fields)
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            return sum(check(item, f"{path}[{i}]") for i, item in enumerate(value))
        shown = found[path].value
        assert (shown if isinstance(value, str) and value else json.loads(shown)) == json.loads(json.dumps(value))
        return 1

    assert check(recipe, "") == len(found)
    assert len(found) > 60
    page = to_markdown([recipe])
    for setting in found.values():
        section = re.sub(r"\[\d\]", "", setting.section)
        assert re.search(rf"^\| `{setting.name}` \|.*`{re.escape(setting.value)}`", page, re.MULTILINE), setting
        assert not section or f"### `{section}`" in page
    for folder, purpose, _ in data_needed(recipe):
        assert f"| `{name}` | `{folder}` | {purpose} |" in page


def test_meanings_come_from_docstrings() -> None:
    class Documented:
        """Something.

        Attributes:
            first: says ``this``,
                and :func:`that`.
            second, third: both.

        Raises:
            fourth: not one.
        """

    assert meanings(Documented) == {"first": "Says `this`, and `that`.", "second": "Both.", "third": "Both."}
    assert meanings(type("Silent", (), {"__doc__": None})) == {}
    recipe = load_recipe("vit-b")
    probe = {s.name: s for s in settings(recipe) if s.section == "probe"}
    assert all(setting.meaning for setting in probe.values())
    assert probe["layout"].meaning.endswith("One of auto, utm, vpr-bench.")
    assert (probe["dataset"].value, probe["dataset"].default, probe["dataset"].departs) == ("msls-val", '""', True)
    assert (probe["radius_m"].value, probe["radius_m"].default, probe["radius_m"].departs) == ("25", "25", False)
    name = next(s for s in settings(recipe) if s.path == "name")
    assert (name.default, name.departs) == (None, False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tetra", "train", "recipes", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_the_command(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, _ = command()
    assert status == 0
    for name in shipped_recipes():
        assert re.search(rf"^│ {name} .*{load_recipe(name).teacher.name}.*│$", out, re.MULTILINE)  # type: ignore[union-attr]
    status, out, _ = command("vit-b", "--markdown", tmp_path / "page.md")
    assert status == 0
    assert re.search(r"^│ distill\.loop\.accumulate +│ 2 +│ 1 +│ Batches per optimiser step", out, re.MULTILINE)
    assert (tmp_path / "page.md").read_text() == to_markdown([load_recipe("vit-b")])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**written("nano"), "name": "mine", "description": "[a/b]"}))
    status, out, _ = command(tmp_path / "mine.yaml")
    assert status == 0
    assert "mine: [a/b]" in out
    assert "probe.folders" in out
    assert '["ie_tower/basement4", ' in out
    status, _, err = command("vit-x")
    assert status == 2
    assert "shipped: nano, vit-b, vit-s" in err


# --- running ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, draw_pictures: Callable[..., list[Path]]) -> Path:
    """Small data sets in the layouts of the real ones, and a small DINOv2 under the hub's name."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    root = tmp_path_factory.mktemp("world")
    draw_pictures(root / "sf-xl/2017", 5, height=56, width=300)
    draw_pictures(root / "sf-xl/2018", 5, height=56, width=300, start=5)
    rows = []
    for i, path in enumerate(draw_pictures(root / "gsv-cities/Images/Oslo", 24)):
        row = {"place_id": i // 4, "year": 2020, "month": 1 + i % 4, "northdeg": 90, "city_id": "Oslo"}
        rows.append({**row, "lat": 59.9, "lon": 10.7, "panoid": i})
        path.rename(path.with_name(f"Oslo_{i // 4:07d}_2020_{1 + i % 4:02d}_090_59.9_10.7_{i}.jpg"))
    (root / "gsv-cities/Dataframes").mkdir()
    with (root / "gsv-cities/Dataframes/Oslo.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for folder, offset_m in (("database", 0), ("queries", 7)):
        for i, path in enumerate(draw_pictures(root / "msls-val" / folder, 9, start=offset_m)):
            path.rename(path.with_name(f"@{346000 + 50 * i + offset_m}@6172000@33@U@@@@.png"))
    torch.manual_seed(1)
    shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.Dinov2Config(**shape, image_size=56, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(root / "facebook/dinov2-base")
    return root


SMALL_HEADS: dict[str, dict[str, Any]] = {
    "boq": {"channels": 16, "n_queries": 4, "n_heads": 2, "out_rows": 4},
    "salad": {"n_clusters": 4, "cluster_dim": 8, "token_dim": 32, "hidden_dim": 16},
}


@pytest.mark.parametrize("name", ["vit-s", "vit-b"])
def test_it_runs_scaled_down(name: str, world: Path, tmp_path: Path) -> None:
    """All of the recipe but its size: network, steps, batches, and processes that load data."""
    recipe = copy.deepcopy(written(name))
    recipe["backbone"] = {"width": 32, "depth": 4, "n_heads": 2, "head_dim": 16, "mlp_dim": 48, "image_size": [56, 56]}
    recipe["head_options"] = SMALL_HEADS[recipe["head"]]
    recipe["distill"] |= {"max_steps": 4, "batch_size": 3}
    recipe["finetune"] |= {"max_steps": 4, "places_per_batch": 3}
    for stage in ("distill", "finetune"):
        recipe[stage]["loop"] |= {"workers": 0, "threads": 1, "log_every": 1}
    path = run_recipe(recipe, tmp_path, data_dir=world, progress=False)
    model = load(path)
    assert model.is_packed
    assert model.n_bits == 64
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["teacher"]["kind"] == "TransformersTeacher"
    for stage, n_per_epoch in (("distill", 10 / 6), ("finetune", 2)):
        assert set(log[stage]) == {"recall_float", "recall_binary", "recall5_float", "recall5_binary"}
        assert all(0.0 <= value <= 100.0 for value in log[stage].values())
        rows = log["curves"][stage]
        assert len([row for row in rows if "loss" in row]) == 4
        validated = [row["step"] for row in rows if "recall_binary" in row]
        assert validated[-1] == 4
        assert len(validated) >= 4 // n_per_epoch  # once an epoch and at the end
    assert all("attention" in row for row in log["curves"]["distill"] if "loss" in row)


def test_a_shipped_recipe_is_a_recipe() -> None:
    assert {field.name for field in dataclasses.fields(Recipe)} >= set(written("vit-b"))
