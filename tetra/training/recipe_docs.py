"""What recipes set and what data they need, as tables: for the terminal, and for the page ``docs/recipes.md``.

Names and defaults come from the recipe's dataclasses, meanings from the "Attributes" of their docstrings.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from tetra.model import TetraModel
from tetra.training.finetune import PlaceSource
from tetra.training.recipe import _FREE_SETTINGS, Recipe


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe.

    Attributes:
        section: dotted path of the mapping that holds it, "" at the top.
        name: its key.
        value, default: as YAML would have them; a default of None means that the recipe must say.
        meaning: from the docstring, or "".
    """

    section: str
    name: str
    value: str
    default: str | None
    meaning: str

    @property
    def departs(self) -> bool:
        """Whether there is a default and it is another value."""
        return self.default not in (None, self.value)

    @property
    def path(self) -> str:
        """Dotted path of the setting itself."""
        return f"{self.section}.{self.name}".removeprefix(".")


def settings(config: Any, section: str = "") -> Iterator[Setting]:
    """All settings of a recipe (or another dataclass of settings), those of nested sections last."""
    explained, hints = meanings(type(config)), typing.get_type_hints(type(config))
    nested: list[tuple[str, Any]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = f"{section}.{field.name}".removeprefix(".")
        if dataclasses.is_dataclass(value):
            nested.append((path, value))
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            nested += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        else:
            choices = typing.get_args(hints[field.name]) if _is_literal(hints[field.name]) else ()
            one_of = f"One of {', '.join(choices)}." if choices else ""
            meaning = f"{explained.get(field.name, '')} {one_of}".strip()
            yield Setting(section, field.name, _text(value), _default(field), meaning)
    for path, value in nested:
        yield from settings(value, path)


def meanings(config: type) -> dict[str, str]:
    """What the docstring of a dataclass says under "Attributes", by name; entries for several names serve each."""
    _, _, listed = (inspect.getdoc(config) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in listed.splitlines():
        entry = re.fullmatch(r"    (\w+(?:, \w+)*): (.+)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith("        "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return {name: _plain(text) for name, text in found.items()}


def _plain(text: str) -> str:
    """Without the marks of docstrings: references by their names, code in single quotes of Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return text[0].upper() + text[1:]


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a recipe may say 30 where the default is 30.0
    return value if isinstance(value, str) and value else json.dumps(value)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return _text(field.default)
    return None if field.default_factory is dataclasses.MISSING else _text(field.default_factory())


@dataclass(frozen=True)
class Facts:
    """What a recipe makes and from what."""

    model: str
    n_parameters: int
    image_size: tuple[int, int]
    n_bits: int
    teacher: str


def facts(recipe: Recipe) -> Facts:
    """Raises ConfigError if the recipe's model can't be built."""
    with torch.device("meta"):  # shapes without weights
        model = TetraModel(recipe.model())
    teacher = recipe.teacher
    return Facts(
        model=f"{recipe.arch} with {recipe.head}",
        n_parameters=sum(p.numel() for p in model.parameters()),
        image_size=model.image_size,
        n_bits=model.n_bits,
        teacher="none" if teacher is None else teacher.name or teacher.kind,
    )


_UTM = "UTM folders"
_LAYOUTS = {"utm": _UTM, "vpr-bench": "VPR-Bench", "auto": f"{_UTM} or VPR-Bench"}
_KINDS = {"gsv-cities": "GSV-Cities", "video": "video frames in the order of their names", "photos": "photos"}


def data_needed(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(folder, what it is for, what lies in it), in the order of the stages."""
    rows = []
    if recipe.distill is not None:
        rows += [(folder, "stage 1", "images, without labels") for folder in recipe.distill.folders]
    if recipe.finetune is not None:
        rows += [(source.folder, "stage 2", _source_text(source)) for source in recipe.finetune.sources]
    if recipe.probe is not None:
        rows += [(folder, "validation", "video frames, kept out of training") for folder in recipe.probe.folders]
        if recipe.probe.dataset:
            rows.append((recipe.probe.dataset, "validation", _LAYOUTS[recipe.probe.layout]))
    return rows


def _source_text(source: PlaceSource) -> str:
    return f"{_KINDS[source.kind]}{', only ' + ', '.join(source.cities) if source.cities else ''}"


# --- terminal ---------------------------------------------------------------------------------------------------


def list_table(recipes: Sequence[Recipe]) -> Table:
    """One line a recipe."""
    table = Table(title="Recipes", title_justify="left")
    for name in ("recipe", "makes", "bits", "teacher", "description"):
        table.add_column(name, justify="right" if name == "bits" else "left", overflow="fold")
    for recipe in recipes:
        made = facts(recipe)
        table.add_row(*map(Text, (recipe.name, made.model, str(made.n_bits), made.teacher, recipe.description)))
    return table


def settings_table(recipe: Recipe) -> Table:
    """All settings of a recipe; the default is shown where the value is another."""
    table = Table(title=Text(f"{recipe.name}: {recipe.description}"), title_justify="left")
    for name in ("setting", "value", "default", "meaning"):
        table.add_column(name, overflow="fold")
    section = ""
    for setting in settings(recipe):
        if setting.section != section:
            section = setting.section
            table.add_section()
        default = setting.default if setting.departs else None
        table.add_row(*map(Text, (setting.path, setting.value, default or "", setting.meaning)))
    return table


# --- Markdown ---------------------------------------------------------------------------------------------------


def to_markdown(recipes: Sequence[Recipe]) -> str:
    """The page ``docs/recipes.md`` about these recipes."""
    return _PAGE.format(
        recipes="\n".join(_recipe_line(recipe) for recipe in recipes),
        descriptions="\n".join(f"- `{recipe.name}`: {recipe.description}" for recipe in recipes),
        data="\n".join(
            f"| `{recipe.name}` | `{folder}` | {purpose} | {what} |"
            for recipe in recipes
            for folder, purpose, what in data_needed(recipe)
        ),
        free=", ".join(f"`{name}`" for name in _FREE_SETTINGS),
        settings="\n\n".join(_section_tables(recipes)),
    )


def _recipe_line(recipe: Recipe) -> str:
    made = facts(recipe)
    size = f"{made.image_size[0]} x {made.image_size[1]}"
    return f"| `{recipe.name}` | {made.model} | {made.n_parameters:,} | {size} | {made.n_bits} | `{made.teacher}` |"


def _section_tables(recipes: Sequence[Recipe]) -> Iterator[str]:
    """A table for each section, with the values of all recipes side by side."""
    values: dict[tuple[str, str], dict[str, list[Setting]]] = {}
    for recipe in recipes:
        for setting in settings(recipe):
            section = re.sub(r"\[\d+\]", "", setting.section)  # the items of a list share a table
            by_recipe = values.setdefault((section, setting.name), {})
            by_recipe.setdefault(recipe.name, []).append(setting)
    names = [recipe.name for recipe in recipes]
    for section in dict.fromkeys(section for section, _ in values):
        lines = [
            f"### {f'`{section}`' if section else 'Top level'}",
            "",
            f"| setting | meaning | default | {' | '.join(names)} |",
            f"|---|---|---|{'---|' * len(names)}",
        ]
        above = ""
        for (where, name), by_recipe in values.items():
            if where != section:
                continue
            first = next(iter(by_recipe.values()))[0]
            meaning = "as above" if above and first.meaning == above else first.meaning
            default = "required" if first.default is None else f"`{first.default}`"
            cells = [_cell(by_recipe.get(recipe, [])) for recipe in names]
            lines.append(f"| `{name}` | {meaning} | {default} | {' | '.join(cells)} |")
            above = first.meaning
        yield "\n".join(lines)


def _cell(found: list[Setting]) -> str:
    """The values of a setting in one recipe, bold where the default is another."""
    marks = [f"**`{setting.value}`**" if setting.departs else f"`{setting.value}`" for setting in found]
    return marks[0] if len(set(marks)) == 1 else ", ".join(marks)


_PAGE = """\
# Recipes

A recipe is one YAML file that says how a model is made: which architecture and head, which teacher, which images, how
long. `tetra train run RECIPE --data DIR --out RUN` makes it, from images to a packed file. `tetra train recipes` lists
the recipes that ship, `tetra train recipes RECIPE` shows all settings of one, a file of your own too.
`tetra train recipes --markdown FILE` wrote this page from the recipes and the code that reads them.

| recipe | makes | parameters | pixels | bits | teacher |
|---|---|---:|---:|---:|---|
{recipes}

{descriptions}

To change one, copy its file from [tetra/training/recipes](../tetra/training/recipes) and run the copy. What a recipe
does not say keeps its default. A key that is unknown, misspelt or stands twice, and a value that can't be, are refused
before anything runs, in one line that names the key. Numbers need a point before an exponent (`4.0e-4`).

## Data

Folders are relative to `--data DIR`, and may be links. Images are found in their subfolders too.

| recipe | folder | for | holds |
|---|---|---|---|
{data}

**San Francisco XL** (`sf-xl`): the panoramas of the training set, in any subfolders. Labels are not read. Every time
that a panorama's turn comes, a square of `crop` pixels is cut from it at random; panoramas of 512 pixels in height
give squares of their full height. Images that were cut before serve as well: of one that is smaller, the largest square
is taken.

**GSV-Cities** (`gsv-cities`): as downloaded, `Dataframes/CITY.csv` and `Images/CITY/*.jpg`. All cities are used unless
`cities` lists some. Places with fewer than four images are left out.

**MSLS validation** (`msls-val`): *UTM folders*, as
[VPR-datasets-downloader](https://github.com/gmberton/VPR-datasets-downloader) writes them and `tetra evaluate` reads
them: `database/` and `queries/` with files named `@UTM_east@UTM_north@zone number@zone letter@...@.jpg`. References
within `radius_m` of a query are right. Any other set in this layout can take its place, such as the validation part of
Pitts30k, or one in the layout of VPR-Bench; `max_queries` and `max_references` make a large one quick.

**The teacher** `facebook/dinov2-base` is fetched from the Hugging Face hub when it is first used. Without a network, a
folder `facebook/dinov2-base` in DIR that `save_pretrained` wrote takes its place.

**Video frames** (`nano`): a folder for each drive or walk, frames in the order of their names.

## Validation

At the end of every epoch, or every `validate_every` steps, recall is measured on images that take no part in training,
for the float descriptor and for the binary one that the finished model will have: `recall_float` and `recall_binary`
are recall@1 in percent, `recall5_float` and `recall5_binary` (data sets only) recall@5. In stage 1, which trains no
head, the descriptor is the patch tokens averaged on a 4 x 4 grid, less their mean over the set. The figures are in the
logs (CSV and TensorBoard), in `log.json` and in `curves.png`.

## Several GPUs

    torchrun --nproc-per-node 4 -m tetra.cli train run vit-b --data DIR --out runs/vit-b

starts a process for each of four GPUs. `batch_size` and `places_per_batch` are of all processes together and must be
divisible by their number: more GPUs make a step quicker, of the same images. `accumulate` such batches make a step.
`workers` and `threads` are of each process. Validation is shared out as well.

## Going on

    torchrun --nproc-per-node 4 -m tetra.cli train run vit-b --data DIR --out runs/vit-b --resume

goes on from the last checkpoint, which is `checkpoint_every` steps old at most. A stage that is complete is not run
again. As many processes as before give the result of an uninterrupted run. Settings must be those that the run began
with, except
{free}.
With `--resume` from the first, one command serves for both.

## Settings

**Bold** where a recipe departs from the default. Where a recipe lists several items, their values stand side by side.

{settings}
"""
