"""The simulated schedule of the CPU kernels, compared with hand counts, the kernels' order and measured times."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import schedule, tables
from fastntxent import backends

BUILT = backends()["cpu"]
pytestmark = pytest.mark.skipif(not BUILT.available, reason=f"needs the CPU kernels built: {BUILT.reason}")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
needs_results = pytest.mark.skipif(not RESULTS.exists(), reason="needs committed results: make bench")
INSTANT = schedule.Costs(line=0, hand_over=0)
A, B, C = ((0, "rows", first) for first in range(3))


def test_a_task_waits_for_the_turns_of_its_blocks():
    team = schedule.SimulatedTeam(2, INSTANT)
    team.tasks([5, 3, 2], [((A, 0),), ((B, 0),), ((A, 1), (B, 1))])
    # The second thread takes the last task at 3, and starts it when the first task ends, at 5.
    assert (team.now, team.waiting_ns, team.busy_ns) == (7, 2, 10)
    assert team.busy_in_tiles == [5, 5]


def test_a_waiting_thread_sees_the_end_of_a_turn_after_the_hand_over_time():
    team = schedule.SimulatedTeam(2, INSTANT._replace(hand_over=0.5))
    team.tasks([5, 3, 2], [((A, 0),), ((B, 0),), ((A, 1), (C, 0))])
    assert (team.now, team.waiting_ns) == (7.5, 2)  # the other thread starts at 0.5 and waits from 3.5 to 5.5


def test_threads_change_a_shared_line_one_after_the_other():
    team = schedule.SimulatedTeam(2, INSTANT._replace(line=1))
    team.rows(4, 1, 10)
    # Each write to a shared cache line takes 1. The leader takes a row at 1 and another at 12. The other thread first
    # registers with the team, at 1. It takes a row at 2 and another at 13. At 23 the leader finds no row left, and at
    # 24 it closes the phase. At 24 the other thread finds no row left, and at 25 it signs off.
    assert team.now == 25


def test_an_order_that_would_wait_forever_raises():
    team = schedule.SimulatedTeam(2, INSTANT)
    with pytest.raises(AssertionError, match="wait forever"):
        team.tasks([1, 1], [((A, 1),), ((A, 0),)])


def test_a_single_thread_pays_no_hand_over_and_no_waiting():
    team = schedule.SimulatedTeam(1, schedule.COSTS)
    team.serial(7)
    team.rows(100, 48, 2)
    team.tasks([5, 6], [((A, 0),), ((A, 1),)])
    assert (team.now, team.serial_ns, team.busy_ns, team.waiting_ns) == (7 + 200 + 11, 7, 211, 0)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "problem",
    [
        schedule.Problem("symmetric", 1001, 0, 128),
        schedule.Problem("square", 400, 401, 128),
        schedule.Problem("few rows", 5, 9001, 128),
        schedule.Problem("few columns", 9001, 70, 128),
    ],
    ids=lambda problem: problem.name,
)
def test_the_kernels_tasks_cover_the_matrix_once_and_every_block_has_its_turns(problem, threads):
    of = schedule.cut(problem, threads)
    covered = torch.zeros(problem.rows, problem.cols or problem.rows, dtype=torch.int8)
    turns: dict = {}
    for task in of.tasks:
        n = of.block_tiles * of.edge
        block = covered[task.first_row : task.first_row + n, task.first_col : task.first_col + n]
        block += 1
        owners = schedule.turns_of(problem, task)
        area = sum(tile.rows * tile.cols for tile in schedule.tiles(problem, of, task))
        assert area == block.numel() if len(owners) == 2 or of.block_tiles == 1 else area < block.numel()
        for owner, turn in owners:
            turns.setdefault(owner, []).append(turn)
    if problem.symmetric:
        covered += covered.T.clone()
        for first in range(0, problem.rows, of.block_tiles * of.edge):
            last = first + of.block_tiles * of.edge
            covered[first:last, first:last] //= 2
    assert (covered == 1).all()
    assert all(order == list(range(len(order))) for order in turns.values())
    places = [task.place for task in of.tasks]
    assert places == sorted(set(places))


@pytest.mark.parametrize("sizes", [(0, 0, 8, 1), (8, -1, 8, 1), (8, 8, 0, 1), (8, 8, 8, 0), (2**31, 8, 8, 1)])
def test_the_kernels_reject_invalid_sizes(sizes):
    with pytest.raises(ValueError, match="rows, D and threads must be at least 1, cols at least 0"):
        schedule.cut(schedule.Problem("none", *sizes[:3]), sizes[3])


def test_one_thread_never_waits():
    prediction = schedule.simulate(schedule.two_views(256, 128), 1)
    assert prediction.waiting == 0
    assert prediction.computing + prediction.serial == pytest.approx(1)


def test_more_threads_than_blocks_wait_for_turns():
    prediction = schedule.simulate(schedule.two_views(1024, 128), 64)
    assert prediction.waiting > 0.3
    assert prediction.computing + prediction.waiting + prediction.serial < 1


@needs_results
def test_predicted_time_of_one_thread_matches_the_measured_time():
    for result in json.loads((RESULTS / "schedule-fit.json").read_text())["results"]:
        measured = result["threads"]["1"]["both"]["p50"]
        predicted = schedule.simulate(schedule.two_views(result["n"], result["d"]), 1).ms
        assert predicted == pytest.approx(measured, rel=0.06), (result["n"], result["d"])


@needs_results
def test_predicted_speed_up_of_two_threads_matches_the_measured_one():
    for result in json.loads((RESULTS / "schedule-fit.json").read_text())["results"]:
        if result["n"] < 256:
            continue  # one thread is used, whatever the setting
        problem = schedule.two_views(result["n"], result["d"])
        predicted = schedule.simulate(problem, 1).ms / schedule.simulate(problem, 2).ms
        assert predicted == pytest.approx(result["threads"]["2"]["speed_up"], rel=0.05), (result["n"], result["d"])


@needs_results
def test_the_committed_prediction_matches_these_kernels():
    """If this fails: python -m benchmarks schedule --out benchmarks/results/schedule.json, then python -m benchmarks
    report."""
    known = json.loads((RESULTS / "schedule.json").read_text())["results"]
    problems = {problem.name: problem for problem in schedule.problems(None, 128)}
    assert {row["problem"] for row in known} == set(problems)
    compared = 0
    for row in known:
        if row["tasks"] < 3000:  # the others take a second each
            assert schedule.predict(problems[row["problem"]], [row["threads"]]) == [pytest.approx(row)]
            compared += 1
    assert compared > len(known) / 2


def test_schedule_writes_speed_ups_and_shares(tmp_path, capsys):
    out = tmp_path / "schedule.json"
    cli.main(["schedule", "--n", "300", "--threads", "1", "4", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [(row["problem"], row["threads"]) for row in record["results"]] == [
        (f"two {kind}, N = 300", threads) for kind in ("views", "towers") for threads in (1, 4)
    ]
    assert [row["speed_up"] for row in record["results"]][::2] == [1, 1]
    shown = capsys.readouterr().out
    assert tables.schedule_table(record) in shown
    assert "|  | D | 1 thread | 4 threads |" in shown
