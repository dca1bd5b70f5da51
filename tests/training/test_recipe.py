"""Recipes: read strictly, and run from images to a packed file."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tetra.config import model_config
from tetra.errors import ConfigError, DatasetError, ImageError, TetraError, TrainingError
from tetra.files import load, load_trainable, save
from tetra.images import load_image
from tetra.training.loop import read_log
from tetra.training.recipe import Recipe, _sole_use, load_recipe, run_recipe


@pytest.fixture
def recipe(make_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_recipe(
        {"accumulate": 1, "checkpoint_every": 3, "precision": "32-true"},
        backbone={"dropout": 0.0},
        distill={
            "max_steps": 4,
            "batch_size": 4,
            "loop": {"validate_every": 2},
        },
        finetune={"places_per_batch": 3, "max_steps": 4, "initialize_head": 8, "augment": {"shift": 0.02}},
        description="for a test",
        export={"rest_dtype": "float16"},
    )


def test_a_recipe_makes_a_packed_model(recipe: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    path = run_recipe(recipe, tmp_path, progress=False)
    assert path == tmp_path / "model.safetensors"
    packed, trained = load(path), load_trainable(tmp_path / "trained.safetensors")
    assert packed.is_packed
    assert packed.config.arch == "tiny"
    assert packed.n_bits == 64
    assert packed.info["recipe"] == "tiny"
    assert packed.info["description"] == "for a test"
    # The trained weights were rounded before packing, so that both give the same codes.
    images = torch.stack([load_image(p, (32, 32)) for p in sorted((pictures / "one").iterdir())])
    assert torch.equal(packed.describe(images), trained.describe(images))
    assert all(p.dtype == torch.float16 for p in packed.parameters())
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, parameter.half().float()), name

    log = json.loads((tmp_path / "log.json").read_text())
    assert log["recipe"] == "tiny"
    assert log["content_hash"] == packed.content_hash
    assert log["teacher"]["kind"] == "TetraTeacher"
    for stage in ("distill", "finetune"):
        assert set(log[stage]) == {"recall_float", "recall_binary"}
        assert all(0.0 <= v <= 100.0 for v in log[stage].values())
        assert len([row for row in log["curves"][stage] if "loss" in row]) == 4
    validated = [row["step"] for row in log["curves"]["distill"] if "recall_float" in row]
    assert validated == [2, 4]
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.format == "PNG"
    again = json.loads((tmp_path / "recipe.json").read_text())
    assert again["distill"]["max_steps"] == 4
    assert load_recipe(again) == load_recipe(recipe)
    with (tmp_path / "distill" / "csv" / "part0" / "metrics.csv").open(newline="") as stream:
        assert {"step", "loss", "cls", "patch", "attention", "lambda"} <= set(next(csv.reader(stream)))


def test_a_finished_run_repeats_nothing_and_gives_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path, progress=False)
    first = (tmp_path / "model.safetensors").read_bytes()
    run_recipe(recipe, tmp_path, resume=True, progress=False)
    assert (tmp_path / "model.safetensors").read_bytes() == first
    assert len([row for row in read_log(tmp_path / "distill") if "loss" in row]) == 4


def test_a_finished_run_is_not_touched_without_resume(recipe: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match="a training lies here already"):
        run_recipe({**recipe, "description": "another"}, tmp_path, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        ("distill", {"lr": 0.5}, r"'distill\.lr' was 0\.0004 when the run began and is 0\.5 now"),
        ("finetune", {"max_steps": 9}, r"'finetune\.max_steps' was 4 when the run began and is 9 now"),
        ("teacher", {"kind": "transformers"}, r"'teacher\.kind' was 'tetra' when"),
    ],
)
def test_resuming_with_other_settings(
    recipe: dict[str, Any], tmp_path: Path, stage: str, change: dict[str, Any], said: str
) -> None:
    run_recipe(recipe, tmp_path, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match=rf"recipe\.json: {said}.*another folder"):
        run_recipe({**recipe, stage: {**recipe[stage], **change}}, tmp_path, resume=True, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_may_change_when_resuming(recipe: dict[str, Any], tmp_path: Path) -> None:
    """How often to write things down, and the settings of a stage that has not begun."""
    run_recipe({k: v for k, v in recipe.items() if k != "finetune"}, tmp_path, progress=False)
    recipe["distill"]["loop"]["checkpoint_every"] = 1
    recipe["finetune"]["lr"] = 2e-4
    assert run_recipe(recipe, tmp_path, resume=True, progress=False).is_file()


@pytest.mark.parametrize("text", ["[]", "{", "3", ""])
def test_resuming_with_a_damaged_record(recipe: dict[str, Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(TrainingError, match=r"recipe\.json: can't be read .*another folder") as caught:
        run_recipe(recipe, tmp_path, resume=True, progress=False)
    assert "\n" not in str(caught.value)


def test_errors_of_a_recipe_name_its_file(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["distill"]["attention_layers"] = 9
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="'attention_layers' is 9") as caught:
        run_recipe(path, tmp_path / "run", progress=False)
    assert str(caught.value).startswith(f"{path}: distill: ")


def test_a_teacher_that_rests_in_half_precision(
    recipe: dict[str, Any], tetra_teacher_file: Path, tmp_path: Path
) -> None:
    half = load(tetra_teacher_file).rest_to(torch.float16)
    save(half, tmp_path / "half.safetensors")
    recipe["teacher"]["name"] = str(tmp_path / "half.safetensors")
    recipe["backbone"]["image_size"] = [64, 64]  # not the teacher's, whose positions are interpolated
    for stage in ("distill", "finetune"):
        recipe[stage]["loop"]["precision"] = "bf16-mixed"
    assert run_recipe(recipe, tmp_path / "run", progress=False).is_file()


def test_one_run_at_a_time_in_a_folder(recipe: dict[str, Any], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    descriptor = os.open(tmp_path / "run", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match=r"run: another run is at work in this folder; wait"):
            run_recipe(recipe, tmp_path / "run", progress=False)
        assert os.listdir(tmp_path / "run") == []
    finally:
        os.close(descriptor)
    for resume in (False, True):  # a run that has ended holds nothing
        run_recipe(recipe, tmp_path / "run", resume=resume, progress=False)


def test_processes_that_load_data_do_not_hold_the_folder(tmp_path: Path) -> None:
    """They notice only after some seconds that their run was killed."""
    pytest.importorskip("fcntl")
    context = multiprocessing.get_context("fork")
    at_work, done = context.Event(), context.Event()
    child = context.Process(target=lambda: (at_work.set(), done.wait(60)))
    with _sole_use(tmp_path):
        child.start()
        assert at_work.wait(60)
    try:
        with _sole_use(tmp_path):
            assert child.is_alive()
    finally:
        done.set()
        child.join()


def test_resuming_with_another_model(recipe: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path, progress=False)
    (tmp_path / "recipe.json").unlink()
    other = {**recipe, "backbone": {**recipe["backbone"], "mlp_dim": 2 * recipe["backbone"]["mlp_dim"]}}
    with pytest.raises(TrainingError, match=r"last\.ckpt\.safetensors: of another model: 'model\.backbone") as caught:
        run_recipe(other, tmp_path, resume=True, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_training_image_is_one_line(recipe: dict[str, Any], pictures: Path, tmp_path: Path, workers: int) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    bad = data / "one" / "frame_0005.png"
    bad.write_text("junk")
    recipe["distill"]["folders"] = ["one"]
    recipe["distill"]["loop"]["workers"] = workers
    with pytest.raises(ImageError, match="is not an image") as caught:
        run_recipe(recipe, tmp_path / "run", data_dir=data, progress=False)
    assert str(caught.value).startswith(f"{bad}: ")
    assert "\n" not in str(caught.value)


def test_one_stage_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    only_distill = {k: v for k, v in recipe.items() if k not in ("finetune", "probe")}
    run_recipe(only_distill, tmp_path / "a", progress=False)
    assert not (tmp_path / "a" / "finetune").exists()
    only_finetune = {k: v for k, v in recipe.items() if k not in ("distill", "teacher", "probe")}
    run_recipe(only_finetune, tmp_path / "b", progress=False)
    assert not (tmp_path / "b" / "distill").exists()
    assert load(tmp_path / "b" / "model.safetensors").is_packed


def test_the_data_folder_can_be_given(recipe: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    recipe["data_dir"] = "/nowhere"
    with pytest.raises(DatasetError, match="/nowhere"):
        run_recipe(recipe, tmp_path / "a", progress=False)
    run_recipe({k: v for k, v in recipe.items() if k != "finetune"}, tmp_path / "b", data_dir=pictures, progress=False)


@pytest.mark.parametrize(
    ("where", "key", "value", "words"),
    [
        ((), "distil", {}, r"unknown key 'distil'; did you mean 'distill'\?"),
        (("distill",), "batchsize", 3, r"distill: unknown key 'batchsize'; did you mean 'batch_size'\?"),
        (("distill", "loop"), "acumulate", 2, r"distill: loop: unknown key 'acumulate'; did you mean 'accumulate'\?"),
        (("distill",), "lr", "fast", r"distill: 'lr' is 'fast', expected float"),
        (("distill",), "lambda_schedule", "steps", "'lambda_schedule' is 'steps'"),
        (("distill",), "lr", -1.0, r"recipe: distill: 'lr' is -1\.0, expected at least 0"),
        (("distill",), "batch_size", 0, r"distill: 'batch_size' is 0, expected at least 1"),
        (("distill",), "max_steps", -1, r"distill: 'max_steps' is -1, expected at least 0"),
        (("distill", "loop"), "accumulate", 0, r"distill: loop: 'accumulate' is 0, expected at least 1"),
        (("distill",), "attention_layers", 9, r"'attention_layers' is 9, but the student has only \d+ blocks"),
        (("finetune",), "epochs", -1, r"finetune: 'epochs' is -1, expected at least 0"),
        (("teacher",), "image_size", 0, r"teacher: 'image_size' is 0, expected at least 1"),
        (("teacher",), "name", "", r"teacher: kind '\w+' needs a 'name'"),
        (("distill",), "views", 0, r"distill: 'views' is 0, expected at least 1"),
        (("finetune", "augment"), "blurr", 1, r"finetune: augment: unknown key 'blurr'; did you mean 'blur'\?"),
        (("teacher",), "kind", "resnet", "teacher: 'kind' is 'resnet'"),
        (("export",), "rest_dtype", "int8", "'rest_dtype' is 'int8'"),
        (("finetune",), "sources", "one", "'sources' is 'one', expected a list"),
        (("finetune",), "sources", [{"kind": "video", "foldr": "x"}], r"sources\[0\]: unknown key 'foldr'.*'folder'"),
        (("finetune",), "sources", [{"kind": "video"}], r"sources\[0\]: missing key 'folder'"),
        (("distill",), "folders", [], r"recipe: distill: 'folders' is empty"),
        (
            ("finetune",),
            "sources",
            [{"kind": "gsv-cities", "folder": "x", "exclude": ["y"]}],
            r"'exclude' means nothing for kind 'gsv-cities'; name the wanted ones in 'cities'",
        ),
        (
            ("finetune",),
            "sources",
            [{"kind": "photos", "folder": "x", "cities": ["Rome"]}],
            r"'cities' means nothing for kind 'photos'",
        ),
        (("backbone",), "wdth", 3, r"unknown key 'wdth'; did you mean 'width'\?"),
        (("head_options",), "grids", [4, 4], "unknown option 'grids'"),
        ((), "arch", "nanno", "unknown architecture 'nanno'"),
        ((), "head", "boc", "unknown head 'boc'"),
        ((), "teacher", None, "'distill' needs a 'teacher'"),
    ],
)
def test_mistakes_are_one_clear_line(
    where: tuple[str, ...], key: str, value: object, words: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    section = recipe
    for name in where:
        section = section[name]
    section[key] = value
    with pytest.raises(ConfigError, match=words) as caught:
        run_recipe(recipe, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("run/**/*.safetensors"))


def test_a_recipe_with_nothing_to_train(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither 'distill' nor 'finetune'"):
        run_recipe({"name": "x", "arch": "nano", "head": "gem"}, tmp_path)


def test_recipes_from_files(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe(recipe)
    path.write_text("name: [")
    with pytest.raises(ConfigError, match=r"tiny\.yaml: not valid YAML") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_recipe(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match=r"tiny\.yaml"):
        load_recipe(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml: recipe can't be read"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"tiny: recipe can't be read|tiny.*no such file"):
        load_recipe(tmp_path / "tiny")
    with pytest.raises(ConfigError, match=r"recipe 'mega': no such file and not a shipped recipe; shipped: .*nano"):
        load_recipe("mega")


def test_an_output_folder_that_can_not_be_made(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TetraError, match="file"):
        run_recipe(recipe, tmp_path / "file" / "run", progress=False)


def test_the_shipped_recipe_is_valid_and_makes_nano() -> None:
    nano = load_recipe("nano")
    assert isinstance(nano, Recipe)
    assert nano.model().backbone == model_config("nano", nano.head).backbone
    assert nano.distill is not None
    assert nano.finetune is not None
    assert nano.probe is not None
    # What the probe measures on takes no part in the training of either stage.
    assert set(nano.probe.folders) == set(nano.distill.exclude)
    left_out = {f"{s.folder}/{name}" for s in nano.finetune.sources for name in s.exclude}
    assert left_out == set(nano.probe.folders)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{"kind": "video", "folder": "nowhere"}]}, "nowhere: no such folder"),
        ({"trainable_blocks": 99}, "'trainable_blocks' is 99"),
        ({"initialize_head": 8}, "is for the MixVPR head"),
    ],
)
def test_mistakes_of_stage_2_are_found_before_stage_1(
    recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    recipe["finetune"] = {**recipe["finetune"], **change}
    if "initialize_head" in change:
        recipe["head"], recipe["head_options"] = "gem", {"out_dim": 16}
    with pytest.raises(TetraError, match=message):
        run_recipe(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "distill").exists()
