import json
import math
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastntxent.simclr.checkpoint import FILE_NAME
from fastntxent.simclr.command import main
from fastntxent.simclr.data import load_data
from fastntxent.simclr.study import FULL, QUICK, conduct
from fastntxent.simclr.study.conduct import without
from fastntxent.simclr.study.downstream import auroc, cluster, clustering_scores, novelty, precision
from fastntxent.simclr.study.measure import BINS, effective_negatives, similarities
from fastntxent.simclr.study.plan import TEMPERATURE, objective_run, temperature_run
from fastntxent.simclr.study.tables import TABLES, fill, small, two
from fastntxent.simclr.train import Trainer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "study.md"
FIGURES = {
    "collapse.svg", "similarities.svg", "temperature.svg", "spread.svg", "uses.svg", "neighbours.png", "clusters.png",
}  # fmt: skip


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """The folder of a finished quick study, with the page that was filled from it."""
    out = tmp_path_factory.mktemp("study")
    page = out / "page.md"
    page.write_text("".join(f"<!-- study:{section} -->\n<!-- /study:{section} -->\n" for section in TABLES))
    assert main(["study", "--quick", "--out", str(out), "--page", str(page)]) == 0
    return out


def read(folder):
    return json.loads((folder / "study.json").read_text())


def without_times(record):
    if isinstance(record, dict):
        return {key: without_times(value) for key, value in record.items() if key != "seconds"}
    return [without_times(value) for value in record] if isinstance(record, list) else record


def test_study_writes_figures_numbers_and_the_page(quick):
    assert {path.name for path in quick.iterdir() if path.suffix in (".svg", ".png")} == FIGURES
    assert {path.name for path in (quick / "page").iterdir()} == {*FIGURES, "study.json"}
    record = read(quick)
    assert set(record["runs"]) == set(QUICK.runs(quick, 0))
    for run in record["runs"].values():
        assert run["curves"]["epoch"] == [0, 1, 2]
        assert all(len(values) == 3 and np.isfinite(values).all() for values in run["curves"].values())
    histograms = record["runs"]["tau-0.5"]["end"]["similarities"]
    n = record["data"]["test"]
    assert sum(histograms["positives"]["histogram"]) == n
    assert sum(sum(part["histogram"]) for part in histograms.values()) == n * (2 * n - 1)
    assert {len(part["histogram"]) for part in histograms.values()} == {BINS}
    assert [row["class"] for row in record["anomalies"]] == ["0", "1"]
    report = (quick / "report.html").read_text()
    assert len(re.findall(r'src="data:image/(?:svg\+xml|png);base64,', report)) == len(FIGURES)
    assert not re.search(r"(src|href)=(?!\"data:)", report), "the page must be self-contained"
    assert "<td>0.1</td>" in report
    page = (quick / "page.md").read_text()
    assert page == fill(page, record)
    assert "| 0.1 |" in page


def test_study_shows_collapse_and_its_absence(quick):
    runs = read(quick)["runs"]
    last = {
        objective: {name: values[-1] for name, values in runs[objective_run(objective, "none")]["curves"].items()}
        for objective in ("nt_xent", "alignment", "distribution")
    }
    assert last["alignment"]["effective rank z"] < 1.2
    assert last["alignment"]["uniformity"] > -0.01
    assert last["alignment"]["knn h"] < last["nt_xent"]["knn h"] - 0.2
    assert last["nt_xent"]["effective rank z"] > 4
    assert last["distribution"]["alignment"] > last["nt_xent"]["alignment"]
    assert last["distribution"]["uniformity"] < last["nt_xent"]["uniformity"]


@pytest.mark.slow
def test_killed_study_continues_to_the_same_numbers(quick, cli, tmp_path, monkeypatch):
    process = cli("study", "--quick", "--out", tmp_path, wait=False)
    second = tmp_path / objective_run("alignment", "batch") / "measured.json"
    while not second.exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.kill()
    process.wait()

    trained = []
    step = Trainer._train_step

    def counted(self, views):
        trained.append(self.config.out.name)
        return step(self, views)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    record = conduct(QUICK, tmp_path, say=lambda line: None)
    assert temperature_run(TEMPERATURE) not in trained, "a finished run should not be repeated"
    assert objective_run("distribution", "batch") in trained
    assert without_times(record) == without_times(read(quick))

    trained.clear()
    one, *_ = (path.parent for path in tmp_path.rglob("anomaly.json"))
    scores = (one / "anomaly.json").read_text()
    (one / FILE_NAME).unlink()
    (one / "anomaly.json").write_text(scores.replace('"classes": [', '"classes": [{},'))
    assert without_times(conduct(QUICK, tmp_path, say=lambda line: None)) == without_times(record)
    assert {*trained} == {one.name}, "the scores of a run whose checkpoint is gone should not count"

    trained.clear()
    torch.set_num_threads(2)
    again = conduct(QUICK, tmp_path, say=lambda line: None)
    assert torch.get_num_threads() == 2, "the number of threads should be restored"
    assert without_times(again) == without_times(record)
    assert again["runs"] == record["runs"], "finished runs should keep their seconds"
    assert not trained, "nothing should be left to train"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--page {tmp}/none.md", "--page .*none.md is not a file"),
    ],
)
def test_study_reports_a_mistake_in_one_line(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["study", "--quick", "--out", str(out), *arguments.format(tmp=tmp_path).split()]) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"error: .*{message}.*\n", captured.err)
    assert captured.out == ""
    assert not out.exists()


def test_study_refuses_the_folder_of_a_different_study(quick, capsys):
    assert main(["study", "--quick", "--seed", "7", "--out", str(quick)]) == 2
    assert "--seed (checkpoint 0, now 7)" in capsys.readouterr().err


def test_study_refuses_an_unknown_option_and_has_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["study", "--fast"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["study", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--quick", "--seed", "--page"))


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_plan_measures_to_the_end_and_includes_the_reference_temperature(plan, tmp_path):
    assert plan.measured == tuple(sorted(set(plan.measured)))
    assert (plan.measured[0], plan.measured[-1]) == (0, plan.epochs)
    assert TEMPERATURE in plan.temperatures
    configs = {**plan.runs(tmp_path, 3), **plan.held_out_runs(tmp_path, 3)}
    assert len({config.out for config in configs.values()}) == len(configs)
    for config in configs.values():
        config.check()
        assert config.seed == 3
    held_out = [label for group in FULL.held_out for label in group]
    assert sorted(held_out) == list(range(10))


def blobs(spread, seed=0):
    """Return 40 rows around each of three orthogonal directions in 8 dimensions, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(40)
    return torch.eye(8)[labels] + spread * torch.randn(120, 8, generator=generator), labels


def test_separated_blobs_are_clustered_retrieved_and_detected_as_novel():
    (known, known_labels), (unknown, labels) = blobs(0.02, 0), blobs(0.02, 1)
    clusters = cluster(known, unknown * 7, 3)  # compared by angle, so length does not matter
    assert clustering_scores(clusters, labels) == {"NMI": pytest.approx(1), "ARI": pytest.approx(1)}
    assert precision(unknown, labels, known, known_labels, k=10) == 1
    seen = known_labels != 2
    assert auroc(novelty(known[seen], unknown, k=5), labels == 2) == 1


def test_scores_of_noise_are_at_chance():
    generator = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(2, 600, 8, generator=generator)
    labels = torch.arange(600) % 3
    scores = clustering_scores(cluster(known, unknown, 3), labels)
    assert abs(scores["ARI"]) < 0.05
    assert scores["NMI"] < 0.05
    assert precision(unknown, labels, known, labels, k=10) == pytest.approx(1 / 3, abs=0.03)
    assert auroc(novelty(known, unknown, k=5), labels == 2) == pytest.approx(0.5, abs=0.06)


def test_cluster_puts_collapsed_features_in_one_cluster():
    assert set(cluster(torch.ones(20, 4), torch.ones(6, 4), 3).tolist()) == {0}


def test_precision_and_novelty_match_values_worked_out_by_hand():
    corpus = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    query = torch.tensor([[2.0, 0.0]])
    labels = torch.tensor([5, 5, 6])
    assert precision(query, torch.tensor([5]), corpus, labels, k=2) == 1
    assert precision(query, torch.tensor([6]), corpus, labels, k=3) == pytest.approx(1 / 3)
    assert precision(query, torch.tensor([5]), corpus, labels, k=50) == pytest.approx(2 / 3), "k may exceed len(corpus)"
    assert float(novelty(corpus, query, k=2)) == pytest.approx(1 - (1 + 0.6) / 2)


def test_similarities_take_each_pair_once():
    z_i, z_j = torch.eye(4)[:3], torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0.6, 0.8]])
    found = similarities(z_i, z_j, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found["positives"], torch.tensor([1.0, -1.0, 0.6]))
    # Rows 0, 1, 3 and 4 are of class 0. Of their six pairs, two are positives. There are 15 pairs in all.
    assert (len(found["same class"]), len(found["other classes"])) == (4, 8)


def test_effective_negatives_range_from_all_to_one():
    z = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    assert effective_negatives(*z, temperature=1e3) == pytest.approx(98, rel=1e-3)
    assert effective_negatives(*z, temperature=1e-5) == pytest.approx(1, abs=1e-3)
    assert effective_negatives(torch.ones(5, 3), torch.ones(5, 3), temperature=0.1) == pytest.approx(8)
    # Rows e0, e1, e2, e0 at a temperature of 1 / log 2. The first row and the last are negatives of each
    # other, with a weight of 2/3. The second negative of each is orthogonal to it, with a weight of 1/3.
    uneven = 3 / 2 ** (2 / 3)
    z_i, z_j = torch.eye(3)[[0, 1]], torch.eye(3)[[2, 0]]
    assert effective_negatives(z_i, z_j, 1 / math.log(2)) == pytest.approx((uneven + 2 + 2 + uneven) / 4)


def test_without_leaves_classes_out_of_the_training_part_only():
    data = load_data("digits", None, 32, False)
    known = without(data, (0, 7))
    assert set(known.train_labels.tolist()) == {1, 2, 3, 4, 5, 6, 8, 9}
    assert len(known.train_images) == len(known.train_labels) < len(data.train_images)
    assert known.test_images is data.test_images
    assert replace(known, train_images=data.train_images, train_labels=data.train_labels) == data


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "0.12"), (0.0, "0.00"), (0.01, "0.01"), (0.004, "4e-3"), (1.2e-7, "1e-7")]
)
def test_small_numbers_keep_a_digit(value, text):
    assert small(value) == text


def test_two_decimals_have_no_negative_zero():
    assert [two(value) for value in (-0.001, 0.004, -0.126)] == ["0.00", "0.00", "-0.13"]


def test_fill_names_a_missing_or_repeated_marker(quick):
    page = (quick / "page.md").read_text()
    with pytest.raises(ValueError, match=r"<!-- study:uses --> .* once, but it appears 0 times"):
        fill(page.replace("study:uses", "study:use"), read(quick))
    with pytest.raises(ValueError, match=r"study:cost .* once, but it appears 2 times"):
        fill(page + page[page.index("<!-- study:cost") :], read(quick))


def test_page_matches_its_record():
    text = PAGE.read_text()
    record = json.loads((PAGE.with_suffix("") / "study.json").read_text())
    assert text == fill(text, record)
    assert record["plan"] == json.loads(json.dumps(asdict(FULL)))
    shown = set(re.findall(r"\]\(study/([^)]+)\)", text))
    assert shown >= FIGURES
    for name in shown:
        assert (PAGE.with_suffix("") / name).is_file()
