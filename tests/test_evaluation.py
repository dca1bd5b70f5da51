"""Recall, precision-recall and search against brute force; whole runs on real image files."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import tetra
from tetra.datasets import PlaceDataset, load_dataset
from tetra.errors import ConfigError, DatasetError, ImageError, TetraError
from tetra.evaluation import (
    CosineSearch,
    describe_batches,
    describe_folder,
    evaluate,
    format_recalls,
    match_folders,
    precision_recall,
    recall_at_k,
    source_commit,
)
from tetra.files import write_json
from tetra.model import TetraModel

SIZE = (32, 32)  # of tiny_model


# --- measures -----------------------------------------------------------------------------------------------


def rows(*lists: list[int]) -> list[np.ndarray]:
    return [np.array(values, dtype=np.int64) for values in lists]


def test_recall_by_hand() -> None:
    predictions = np.array([[3, 1, 2], [0, 2, 1], [1, 0, 3], [2, 3, 0]])
    # right at rank 1; at rank 3; never; no right reference at all
    recalls = recall_at_k(predictions, rows([3, 2], [1], [9], []), [1, 2, 3])
    assert recalls == pytest.approx({1: 100 / 3, 2: 100 / 3, 3: 200 / 3})


def test_recall_keeps_the_order_of_ks() -> None:
    assert list(recall_at_k(np.array([[0, 1, 2]]), rows([0]), [3, 1])) == [3, 1]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_recall_equals_counting(n_queries: int, n_references: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predictions = np.stack([rng.permutation(n_references) for _ in range(n_queries)])
    truth = [np.flatnonzero(rng.random(n_references) < 0.3) for _ in range(n_queries)]
    truth[0] = np.array([n_references - 1])
    ks = range(1, n_references + 1)
    for k, percent in recall_at_k(predictions, truth, ks).items():
        asked = [(set(p[:k].tolist()), set(t.tolist())) for p, t in zip(predictions, truth, strict=True) if len(t)]
        assert percent == pytest.approx(100 * sum(bool(p & t) for p, t in asked) / len(asked))


@pytest.mark.parametrize("ks", [[0], [4], [1, 4], [-1]])
def test_recall_refuses_k_beyond_the_predictions(ks: list[int]) -> None:
    with pytest.raises(ValueError, match="3 predictions"):
        recall_at_k(np.array([[0, 1, 2]]), rows([0]), ks)


def test_recall_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="ground truth of 2 queries"):
        recall_at_k(np.array([[0, 1, 2]]), rows([0], [1]), [1])
    with pytest.raises(DatasetError, match="no query has a right reference"):
        recall_at_k(np.array([[0, 1, 2]]), rows([]), [1])


def test_recall_line() -> None:
    recalls = {1: 90.09, 5: 95.0, 10: 96.24, 20: 97}
    assert format_recalls(recalls) == "R@1: 90.1, R@5: 95.0, R@10: 96.2, R@20: 97.0"


def test_precision_recall_by_hand() -> None:
    # By distance: 2 right, 3 right, 5 wrong and right, 8 wrong; one of the four known places is missed.
    curve = precision_recall([5, 2, 8, 5, 3], [False, True, False, True, True], n_with_positive=4)
    assert curve.threshold == [2, 3, 5, 8]
    assert curve.precision == pytest.approx([1, 1, 3 / 4, 3 / 5])
    assert curve.recall == pytest.approx([1 / 4, 2 / 4, 3 / 4, 3 / 4])
    assert curve.recall_at_full_precision == pytest.approx(0.5)
    assert curve.auc == pytest.approx(0.25 * 1 + 0.25 * 1 + 0.25 * 0.75 + 0)


@pytest.mark.parametrize(
    ("is_right", "auc", "full"),
    [([True] * 3, 1.0, 1.0), ([False] * 3, 0.0, 0.0), ([False, True, True], 7 / 18, 0.0)],
)
def test_precision_recall_at_its_ends(is_right: list[bool], auc: float, full: float) -> None:
    curve = precision_recall([1, 2, 3], is_right, n_with_positive=3)
    assert curve.auc == pytest.approx(auc)
    assert curve.recall_at_full_precision == pytest.approx(full)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25), st.integers(0, 5))
def test_precision_recall_equals_counting(queries: list[tuple[int, bool]], n_missed: int) -> None:
    n_with_positive = max(1, sum(right for _, right in queries) + n_missed)
    curve = precision_recall([d for d, _ in queries], [right for _, right in queries], n_with_positive)
    assert curve.threshold == sorted({d for d, _ in queries})
    for threshold, precision, recall in zip(curve.threshold, curve.precision, curve.recall, strict=True):
        answers = [right for d, right in queries if d <= threshold]
        assert precision == pytest.approx(sum(answers) / len(answers))
        assert recall == pytest.approx(sum(answers) / n_with_positive)
    assert 0 <= curve.auc <= 1 + 1e-12


# --- search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 23, 40])
@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_cosine_search_equals_the_full_table(k: int, batch_size: int) -> None:
    rng = np.random.default_rng(3)
    queries, references = rng.normal(size=(7, 11)), rng.normal(size=(23, 11))
    search = CosineSearch(torch.from_numpy(queries).float(), k)
    for batch in torch.from_numpy(references).float().split(batch_size):
        search.add(batch)
    table = (queries @ references.T) / np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(references, axis=1))
    expected = np.argsort(-table, axis=1)[:, :k]
    assert search.rows.numpy().tolist() == expected.tolist()
    np.testing.assert_allclose(search.similarities, np.take_along_axis(table, expected, 1), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 30])
def test_equal_similarities_are_ordered_by_row(batch_size: int) -> None:
    # Four ones of eight: norms of exactly 2, so similarities are exact multiples of 1/4 and ties are many.
    rng = np.random.default_rng(5)
    patterns = np.stack([rng.permutation([1, 1, 1, 1, 0, 0, 0, 0]) for _ in range(34)]).astype(np.float32)
    queries, references = patterns[:4], patterns[4:]
    search = CosineSearch(torch.from_numpy(queries), 12)
    for batch in torch.from_numpy(references).split(batch_size):
        search.add(batch)
    for query, found in zip(queries, search.rows.tolist(), strict=True):
        scores = references @ query
        assert found == sorted(range(30), key=lambda row: (-scores[row], row))[:12]


# --- image files --------------------------------------------------------------------------------------------


def make_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Blurry colour patterns, all different: rough enough to tell apart, alike enough to be confused."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.png")
        coarse.resize((48, 40), Image.Resampling.BILINEAR).save(paths[-1])
    return paths


def read_with_pillow(paths: list[Path]) -> torch.Tensor:
    images = [Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC) for path in paths]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def brute_force(model: TetraModel, dataset: PlaceDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All references of each query in order: by cosine, by Hamming distance, and those distances."""
    model = model.eval()
    with torch.inference_mode():
        q = model(read_with_pillow(dataset.query_paths)).double().numpy()
        r = model(read_with_pillow(dataset.database_paths)).double().numpy()
    cosine = (q @ r.T) / np.outer(np.linalg.norm(q, axis=1), np.linalg.norm(r, axis=1))
    hamming = ((q > 0)[:, None] != (r > 0)[None]).sum(-1)
    order = np.argsort(hamming, axis=1, kind="stable")
    return np.argsort(-cosine, axis=1, kind="stable"), order, np.take_along_axis(hamming, order, 1)


def make_dataset(folder: Path, n_queries: int = 9, n_references: int = 13) -> PlaceDataset:
    """Every third query has no right reference."""
    rng = np.random.default_rng(1)
    truth = [
        np.sort(rng.choice(n_references, 2, replace=False)) if i % 3 else np.array([], int) for i in range(n_queries)
    ]
    references = make_images(folder / "database", n_references, seed=2)
    queries = make_images(folder / "queries", n_queries, seed=3)
    return PlaceDataset("made", "utm", references, queries, truth)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_described_files_are_what_the_model_says(tmp_path: Path, tiny_model: TetraModel, batch_size: int) -> None:
    paths = make_images(tmp_path, 6)
    tiny_model.eval()
    described = describe_folder(tiny_model, tmp_path, batch_size=batch_size, progress=False)
    images = read_with_pillow(paths)
    with torch.inference_mode():
        torch.testing.assert_close(described.floats, tiny_model(images), atol=1e-5, rtol=1e-4)
    assert torch.equal(described.codes, tiny_model.describe(images))
    assert described.floats.dtype == torch.float32
    assert (described.kept, described.skipped) == (list(range(6)), [])


def test_describing_works_in_evaluation_mode_and_gives_the_mode_back(tmp_path: Path, tiny_model: TetraModel) -> None:
    make_images(tmp_path, 3)
    tiny_model.train()
    tiny_model.backbone.eval()  # as a frozen backbone in fine-tuning
    modes = {name: module.training for name, module in tiny_model.named_modules()}
    assert set(modes.values()) == {True, False}
    seen = []
    tiny_model.register_forward_hook(lambda module, *_: seen.append(module.training))
    describe_folder(tiny_model, tmp_path, progress=False)
    assert seen == [False]
    assert {name: module.training for name, module in tiny_model.named_modules()} == modes


def test_mode_comes_back_when_an_image_is_bad(tmp_path: Path, tiny_model: TetraModel) -> None:
    make_images(tmp_path, 3)[1].write_text("no image")
    tiny_model.train()
    with pytest.raises(ImageError, match=r"1\.png"):
        describe_folder(tiny_model, tmp_path, progress=False)
    assert all(module.training for module in tiny_model.modules())


def test_skipped_images_leave_gaps_in_kept(tmp_path: Path, tiny_model: TetraModel) -> None:
    paths = make_images(tmp_path, 5)
    paths[0].write_text("no image")
    paths[3].write_text("no image")
    described = describe_folder(tiny_model, paths, skip_bad_images=True, progress=False)
    assert described.kept == [1, 2, 4]
    assert [skip.path for skip in described.skipped] == [paths[0], paths[3]]
    assert len(described.floats) == len(described.codes) == 3


def test_not_one_readable_image(tmp_path: Path, tiny_model: TetraModel) -> None:
    for path in make_images(tmp_path, 2):
        path.write_text("no image")
    with pytest.raises(DatasetError, match=r"not one of the 2 images could be read.*0\.png"):
        describe_folder(tiny_model, tmp_path, skip_bad_images=True, progress=False)


def test_descriptors_with_nan_are_refused(tmp_path: Path, tiny_model: TetraModel) -> None:
    make_images(tmp_path, 2)
    with torch.no_grad():
        tiny_model.head.project.bias[3] = float("nan")
    with pytest.raises(TetraError, match=r"0\.png.*NaN"):
        describe_folder(tiny_model, tmp_path, progress=False)


def test_wrong_image_and_batch_sizes(tmp_path: Path, tiny_model: TetraModel) -> None:
    make_images(tmp_path, 2)
    with pytest.raises(ImageError, match="33"):
        describe_folder(tiny_model, tmp_path, image_size=(33, 32), progress=False)
    with pytest.raises(ConfigError, match="batch size 0"):
        list(describe_batches(tiny_model, list(tmp_path.iterdir()), batch_size=0, progress=False))


def test_progress_goes_to_stderr(tmp_path: Path, tiny_model: TetraModel, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path, 2)
    describe_folder(tiny_model, tmp_path, label="references")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "references" in captured.err
    assert "2/2" in captured.err


# --- evaluate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluate_equals_brute_force(tmp_path: Path, tiny_model: TetraModel, batch_size: int) -> None:
    dataset = make_dataset(tmp_path)
    report = evaluate(tiny_model, dataset, ks=(1, 2, 5, 13), batch_size=batch_size, progress=False)
    by_cosine, by_hamming, distances = brute_force(tiny_model, dataset)
    for recalls, order in ((report.recall_float, by_cosine), (report.recall_binary, by_hamming)):
        for k in (1, 2, 5, 13):
            hits = [bool({*p[:k]} & {*t}) for p, t in zip(order, dataset.ground_truth, strict=True) if len(t)]
            assert recalls[k] == pytest.approx(100 * sum(hits) / len(hits))
    assert report.recall_binary[13] == 100.0
    best = [(d[0], p[0] in t) for d, p, t in zip(distances, by_hamming, dataset.ground_truth, strict=True)]
    for threshold, precision in zip(report.precision_recall.threshold, report.precision_recall.precision, strict=True):
        answers = [right for distance, right in best if distance <= threshold]
        assert precision == pytest.approx(sum(answers) / len(answers))
    assert (report.n_queries, report.n_references, report.n_queries_without_positive) == (9, 13, 3)
    assert report.notices == ["3 of 9 queries have no right reference and are not counted in R@k"]


def test_report_as_json(tmp_path: Path, tiny_model: TetraModel) -> None:
    report = evaluate(tiny_model, make_dataset(tmp_path, n_references=25), progress=False)
    write_json(tmp_path / "report.json", report.to_json_dict())
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["recall_float"] == {str(k): report.recall_float[k] for k in (1, 5, 10, 20)}
    assert read["recall_binary"] == {str(k): report.recall_binary[k] for k in (1, 5, 10, 20)}
    expected = {
        "dataset": "made",
        "layout": "utm",
        "n_queries": 9,
        "n_references": 25,
        "n_queries_without_positive": 3,
        "n_bits": 64,
        "bytes_per_image": 8,
        "image_size": [32, 32],
        "device": "cpu",
        "model": "tiny",
        "model_hash": None,
        "tetra_version": tetra.__version__,
        "skipped": [],
    }
    assert {key: read[key] for key in expected} == expected
    assert read["commit"] == source_commit()
    curve = read["precision_recall_binary"]
    assert len(curve["threshold"]) == len(curve["precision"]) == len(curve["recall"]) > 0
    assert curve["recall"][-1] == pytest.approx(read["recall_binary"]["1"] / 100)
    assert report.recall_lines() == [
        f"float   {format_recalls(report.recall_float)}",
        f"binary  {format_recalls(report.recall_binary)}",
    ]


def test_saved_and_loaded_model_is_named_by_its_hash(tmp_path: Path, tiny_model: TetraModel) -> None:
    packed = tiny_model.pack()
    tetra.files.save(packed, tmp_path / "model.safetensors")
    loaded = tetra.files.load(tmp_path / "model.safetensors")
    report = evaluate(loaded, make_dataset(tmp_path), progress=False)
    assert report.facts.model_hash == packed.content_hash
    assert report.facts.model_hash


def test_default_ks_beyond_a_small_map_look_at_all_of_it(tmp_path: Path, tiny_model: TetraModel) -> None:
    report = evaluate(tiny_model, make_dataset(tmp_path, n_references=7), progress=False)
    assert list(report.recall_binary) == list(report.recall_float) == [1, 5, 10, 20]
    assert report.recall_binary[10] == report.recall_float[20] == 100.0
    assert report.notices[:2] == [f"the map holds 7 references, so R@{k} looks at all of them" for k in (10, 20)]


@pytest.mark.parametrize(
    ("ks", "words"), [([14], "k = 14.*13 references"), ([1, 0], "k = 0"), ([-3], "k = -3"), ([], "no k")]
)
def test_ks_that_were_asked_for_are_checked_before_any_work(
    tmp_path: Path, tiny_model: TetraModel, ks: list[int], words: str
) -> None:
    dataset = make_dataset(tmp_path)
    calls: list[int] = []
    tiny_model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ConfigError, match=words):
        evaluate(tiny_model, dataset, ks=ks, progress=False)
    assert not calls


def test_a_bad_image_ends_the_run_unless_skipping_was_asked_for(tmp_path: Path, tiny_model: TetraModel) -> None:
    dataset = make_dataset(tmp_path)
    bad_reference = dataset.ground_truth[1][0]
    dataset.database_paths[bad_reference].write_text("no image")
    dataset.query_paths[4].write_bytes(dataset.query_paths[4].read_bytes()[:60])
    with pytest.raises(ImageError, match=r"4\.png"):
        evaluate(tiny_model, dataset, progress=False)

    report = evaluate(tiny_model, dataset, ks=(1, 3), skip_bad_images=True, progress=False)
    assert (report.n_queries, report.n_references) == (8, 12)
    assert {skip.path for skip in report.skipped} == {
        dataset.query_paths[4],
        dataset.database_paths[bad_reference],
    }
    assert report.notices[-1] == "images that could not be read and were skipped: 2"
    assert len(report.to_json_dict()["skipped"]) == 2
    # The same numbers as of a set that never had the two.
    queries = [i for i in range(9) if i != 4]
    references = [i for i in range(13) if i != bad_reference]
    clean = evaluate(tiny_model, dataset.subset(queries, references), ks=(1, 3), progress=False)
    assert (report.recall_float, report.recall_binary) == (clean.recall_float, clean.recall_binary)
    assert report.precision_recall == clean.precision_recall


def test_a_right_reference_that_was_skipped_no_longer_counts(tmp_path: Path, tiny_model: TetraModel) -> None:
    references, queries = make_images(tmp_path / "r", 4), make_images(tmp_path / "q", 2)
    dataset = PlaceDataset("x", "utm", references, queries, rows([2], [0]))
    references[2].write_text("no image")
    report = evaluate(tiny_model, dataset, ks=(3,), skip_bad_images=True, progress=False)
    assert report.n_queries_without_positive == 1
    assert report.recall_binary == {3: 100.0}


@pytest.mark.parametrize("device", ["nonsense", "cuda:77"])
def test_a_device_that_is_not_there(tmp_path: Path, tiny_model: TetraModel, device: str) -> None:
    with pytest.raises(ConfigError, match=device) as caught:
        evaluate(tiny_model, make_dataset(tmp_path), device=device, progress=False)
    assert "\n" not in str(caught.value)


def test_pictures_of_an_evaluation(tmp_path: Path, tiny_model: TetraModel) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "pictures"
    report = evaluate(tiny_model, make_dataset(tmp_path), pictures_dir=folder, n_pictures=3, progress=False)
    names = ["match_00000.png", "match_00004.png", "match_00008.png", "precision_recall.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in report.pictures) == names
    for path in report.pictures:
        with Image.open(path) as image:
            image.load()


def test_pictures_folder_that_cannot_be_made(tmp_path: Path, tiny_model: TetraModel) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    with pytest.raises(TetraError, match="cannot make the folder"):
        evaluate(tiny_model, make_dataset(tmp_path), pictures_dir=tmp_path / "file" / "x", progress=False)


def test_commit_is_that_of_the_checkout() -> None:
    root = Path(tetra.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        pytest.skip("tetra is not imported from a git checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    expected = head.stdout.strip() if head.returncode == 0 else None
    commit = source_commit()
    assert (commit.removesuffix("-dirty") if commit else None) == expected


@pytest.mark.parametrize("name", ["corridor", "gardens_point"])
def test_real_set_equals_brute_force(shared_data: Path, tiny_model: TetraModel, name: str) -> None:
    dataset = load_dataset(shared_data / "eval" / name)
    report = evaluate(tiny_model, dataset, progress=False)
    by_cosine, by_hamming, _ = brute_force(tiny_model, dataset)
    for recalls, order in ((report.recall_float, by_cosine), (report.recall_binary, by_hamming)):
        for k in (1, 5, 10, 20):
            hits = [bool({*p[:k]} & {*t}) for p, t in zip(order, dataset.ground_truth, strict=True)]
            # Rounding differs between batches and may swap two references that are as good as equal.
            assert recalls[k] == pytest.approx(100 * np.mean(hits), abs=1.01 * 100 / len(hits))


# --- match --------------------------------------------------------------------------------------------------


def test_match_finds_copies(tmp_path: Path, tiny_model: TetraModel) -> None:
    references = make_images(tmp_path / "map" / "deep", 8)
    (tmp_path / "queries").mkdir()
    for name, source in (("a", 6), ("b", 2)):
        Image.open(references[source]).save(tmp_path / "queries" / f"{name}.png")
    report = match_folders(tiny_model, tmp_path / "queries", tmp_path / "map", k=3, progress=False)
    assert [report.reference_paths[row].name for row in report.rows[:, 0]] == ["6.png", "2.png"]
    assert report.rows.shape == report.distances.shape == (2, 3)
    assert (report.distances[:, 0] == 0).all()
    assert (np.diff(report.distances, axis=1) >= 0).all()

    write_json(tmp_path / "matches.json", report.to_json_dict())
    read = json.loads((tmp_path / "matches.json").read_text())
    assert (read["n_queries"], read["n_references"], read["k"], read["n_bits"]) == (2, 8, 3, 64)
    first = read["matches"][0]
    assert first["query"] == str(tmp_path / "queries" / "a.png")
    assert first["references"][0] == {"path": str(references[6]), "distance": 0}

    console = Console(file=io.StringIO(), width=120)
    console.print(report.table())
    console.print(report.table(max_queries=1))
    full, short = console.file.getvalue().split("Matches")[1:]
    assert all(text in full for text in ("a.png", "6.png", "b.png", "2.png", "of 64"))
    assert "b.png" not in short
    assert "first 1 of 2" in short


def test_match_table_shows_names_as_they_are(tmp_path: Path, tiny_model: TetraModel) -> None:
    (image,) = make_images(tmp_path / "one", 1)
    names = ["[old] 1.png", "[bold]2[", "3[@click=x].png", "[link=x]4]"]
    for name in names:
        for folder in ("queries", "map"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.png").write_bytes(image.read_bytes())
    report = match_folders(tiny_model, tmp_path / "queries", tmp_path / "map", progress=False)
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table())
    for name in names:  # as a query and among the matches of each
        assert console.file.getvalue().count(f"{name}.png") == 1 + len(names)


def test_match_order_equals_brute_force(tmp_path: Path, tiny_model: TetraModel) -> None:
    dataset = make_dataset(tmp_path)
    report = match_folders(tiny_model, tmp_path / "queries", tmp_path / "database", k=13, progress=False)
    _, order, distances = brute_force(tiny_model, dataset)
    assert report.rows.tolist() == order.tolist()
    assert report.distances.tolist() == distances.tolist()


def test_match_k(tmp_path: Path, tiny_model: TetraModel) -> None:
    make_images(tmp_path / "map", 3)
    make_images(tmp_path / "queries", 2)
    assert match_folders(tiny_model, tmp_path / "queries", tmp_path / "map", progress=False).rows.shape == (
        2,
        3,
    )
    for k in (4, 0):
        with pytest.raises(ConfigError, match=f"k = {k}"):
            match_folders(tiny_model, tmp_path / "queries", tmp_path / "map", k=k, progress=False)


def test_match_skips_only_when_asked(tmp_path: Path, tiny_model: TetraModel) -> None:
    make_images(tmp_path / "map", 4)[1].write_text("no image")
    make_images(tmp_path / "queries", 3)[0].write_text("no image")
    with pytest.raises(ImageError, match=r"queries/0\.png"):
        match_folders(tiny_model, tmp_path / "queries", tmp_path / "map", progress=False)
    report = match_folders(tiny_model, tmp_path / "queries", tmp_path / "map", skip_bad_images=True, progress=False)
    assert [path.name for path in report.query_paths] == ["1.png", "2.png"]
    assert [path.name for path in report.reference_paths] == ["0.png", "2.png", "3.png"]
    assert report.rows.max() <= 2
    assert len(report.to_json_dict()["skipped"]) == 2


def test_match_pictures_need_no_labels(tmp_path: Path, tiny_model: TetraModel) -> None:
    make_images(tmp_path / "map", 4)
    make_images(tmp_path / "queries", 3)
    folder = tmp_path / "pictures"
    report = match_folders(
        tiny_model, tmp_path / "queries", tmp_path / "map", pictures_dir=folder, n_pictures=9, progress=False
    )
    assert [path.name for path in report.pictures] == [f"match_{i:05d}.png" for i in range(3)]
    assert sorted(folder.iterdir()) == report.pictures
