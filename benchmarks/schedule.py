"""Suite `schedule`: predicted speed-ups of the CPU kernels on more threads, from a simulation of their schedule.

The compiled kernels report how they cut a call into tasks, and the order of the tasks (`_cpu.schedule`,
csrc/cpu/schedule.h). A task is a block of rows against a block of columns. Tasks that share a block add to the same
sums, so each task waits for its turn at both of its blocks.

The threads are simulated event by event, following csrc/cpu/team.h. In each phase of a call, a thread enters and takes
the index of the next task. It waits for the task's turns, computes the task, and takes another index. When there are no
more, it leaves. (In some phases, the index is that of a few rows instead of a task.) `Costs` has the duration of each
event.

The prediction is optimistic. In the simulation, cores do not compete for memory bandwidth, cache or power, and newly
allocated pages cost nothing. If a real machine is slower than predicted, look for one of these causes. If the predicted
speed-up itself is below the number of threads, the schedule is at fault.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable
from typing import NamedTuple

# A block of rows or columns: slab, side, first row or column. If one side is much longer, it is divided into slabs, and
# each slab has its own sums for the blocks of the shorter side.
Block = tuple[int, str, int]
Turns = tuple[tuple[Block, int], ...]  # the blocks of a task, each with the task's turn at that block

THREADS = (1, 2, 4, 8, 16, 32, 64)
GRID = (256, 1024, 4096, 16384)
QUEUE = 65536  # columns that queries are compared with
QUERIES = (64, 256)
ALIGNED_ROWS = 48  # csrc/cpu/kernels.h


class Costs(NamedTuple):
    """Nanoseconds on one core, for float32 and AVX-512.

    The first group is a least-squares fit to the one-thread times in benchmarks/results/schedule-fit.json, a record of
    suite cpu. The model reproduces these times within 6 %, from N = 16 to 4,096 and D = 128 to 2,048. The second group
    follows from a count of operations: 15 to 20 ns for exp or log in double precision, and 1 to 2 ns for a number read
    or written. The third group has the magnitude of published latencies: 50 to 150 ns between two cores of one
    processor, and a few microseconds for a parallel region of OpenMP.
    """

    call: float = 130_000  # Python, autograd and memory, independent of the size
    multiply_add: float = 0.02
    exponential: float = 0.17  # per element of a tile: to form it or read it back, and to sum or weight it
    touch: float = 0.18  # per feature of a tile's row or column: a load, or a load and an addition
    feature: float = 0.9  # per feature of a row: to load and normalise it, or to write its gradient

    # These are per row.
    logarithm: float = 20
    loss: float = 30
    largest_weight: float = 5
    weight_in_range: float = 20
    weight: float = 20
    join_sums: float = 5  # per row of the shorter side, for every slab but the first

    team: float = 5_000  # start and end of a parallel region
    hand_over: float = 100  # until a waiting thread sees the write of another thread
    line: float = 100  # until a contended cache line reaches the next thread


COSTS = Costs()


class Problem(NamedTuple):
    """The sizes of a call that computes a loss and its gradients. `cols` is 0 if the columns are the rows.
    `gathers_cols` is whether the columns get a gradient."""

    name: str
    rows: int
    cols: int
    d: int
    gathers_cols: bool = True

    @property
    def symmetric(self) -> bool:
        return not self.cols

    @property
    def rows_alone(self) -> bool:
        """Whether one pass over the tiles computes both the sums and the gradients."""
        return not self.symmetric and not self.gathers_cols


def two_views(n: int, d: int) -> Problem:
    """Return the sizes of NT-Xent on n samples."""
    return Problem(f"two views, N = {n:,}", 2 * n, 0, d)


def two_towers(n: int, d: int) -> Problem:
    """Return the sizes of CLIP on n samples."""
    return Problem(f"two towers, N = {n:,}", n, n, d)


def queries(n: int, d: int) -> Problem:
    """Return the sizes of InfoNCE on n queries against a queue, which gets no gradient."""
    return Problem(f"{n} queries, queue of {QUEUE:,}", n, QUEUE, d, gathers_cols=False)


class Task(NamedTuple):
    """A block of rows against a block of columns, as in `_cpu.schedule`."""

    slab: int
    first_row: int
    first_col: int
    row_turn: int
    col_turn: int
    place: int  # position of its first tile in the workspace


class Cut(NamedTuple):
    """How the kernels split a call."""

    threads: int
    edge: int  # rows and columns of a tile
    block_tiles: int  # tiles of a block in each direction
    rows_per_take: int  # rows that a thread takes at a time, in a phase over rows
    cols_per_take: int  # the same, in a phase over the columns
    slabs: int
    tasks: list[Task]


def cut(problem: Problem, threads: int) -> Cut:
    """Return how the kernels split this call."""
    from fastntxent import _cpu

    found = Cut(*_cpu.schedule(problem.rows, problem.cols, problem.d, threads))
    return found._replace(tasks=[Task(*task) for task in found.tasks])


def turns_of(problem: Problem, task: Task) -> Turns:
    """Return the blocks that a task adds to, and its turn at each. A task on the diagonal has only one block."""
    rows = ((task.slab, "rows", task.first_row), task.row_turn)
    cols = ((task.slab, "rows" if problem.symmetric else "cols", task.first_col), task.col_turn)
    return (rows,) if rows[0] == cols[0] else (rows, cols)


class TileSize(NamedTuple):
    """A tile, and its position in the workspace."""

    rows: int
    cols: int
    diagonal: bool
    place: int


def tiles(problem: Problem, of: Cut, task: Task) -> list[TileSize]:
    """Return the tiles of a task. If rows and columns are the same block, only the tiles on and above the diagonal."""
    on_diagonal = problem.symmetric and task.first_row == task.first_col
    found, place = [], task.place
    for i in range(of.block_tiles):
        for j in range(i if on_diagonal else 0, of.block_tiles):
            n_rows = min(of.edge, problem.rows - task.first_row - i * of.edge)
            n_cols = min(of.edge, (problem.cols or problem.rows) - task.first_col - j * of.edge)
            if n_rows > 0 and n_cols > 0:
                found.append(TileSize(n_rows, n_cols, on_diagonal and i == j, place))
            place += 1
    return found


class SimulatedTeam:
    """Threads that go through the phases of a call. Times are nanoseconds since the start of the call."""

    def __init__(self, threads: int, costs: Costs):
        self.threads, self.costs = threads, costs
        self.now = 0.0
        self.serial_ns = self.busy_ns = self.waiting_ns = 0.0
        self.busy_in_tiles = [0.0] * threads

    def serial(self, ns: float) -> None:
        """Advance time by work that only the calling thread does."""
        self.now += ns
        self.serial_ns += ns

    def rows(self, rows: int, per_take: int, ns_of_row: float) -> None:
        """Run a phase over rows, `per_take` rows at a time."""
        self._phase(-(-rows // per_take), lambda i: (min(per_take, rows - i * per_take) * ns_of_row, ()))

    def tasks(self, durations: list[float], turns: list[Turns]) -> None:
        """Run a phase over tasks."""
        self._phase(len(durations), lambda i: (durations[i], turns[i]), self.busy_in_tiles)

    def _phase(
        self, count: int, work: Callable[[int], tuple[float, Turns]], busy_of: list[float] | None = None
    ) -> None:
        """Simulate Team::each: every free thread takes the next index in order, and thread 0 is the leader.

        All threads write to two cache lines, and only one thread at a time can write to a line. One line has the next
        index. The other is the team's line, in which helpers count themselves in and out, and the leader closes the
        phase.
        """
        alone = self.threads == 1 or count <= 1
        line, hand_over = (0.0, 0.0) if alone else (self.costs.line, self.costs.hand_over)
        helpers = () if alone else range(1, self.threads)
        next_free = team_free = end = self.now  # when each line is free again, and when the last thread leaves
        index, closed = 0, False
        turns: dict[Block, int] = {}
        ended: dict[Block, float] = {}  # when the last turn of each block ended
        events = [(self.now, 0, "take"), *((self.now + hand_over, helper, "enter") for helper in helpers)]
        while events:
            time, thread, what = heapq.heappop(events)
            if what == "take":
                time = next_free = max(time, next_free) + line
                if index == count:
                    heapq.heappush(events, (time, thread, "leave" if thread else "close"))
                    continue
                duration, blocks = work(index)
                index += 1
                start = max([time, *(ended.get(block, 0.0) for block, _ in blocks)])
                if start > time:
                    start += hand_over
                for block, turn in blocks:
                    # All smaller indices have been taken, so a block's turns must come in order here.
                    assert turns.get(block, 0) == turn, "the schedule would wait forever"
                    turns[block] = turn + 1
                    ended[block] = start + duration
                self.waiting_ns += start - time
                self.busy_ns += duration
                if busy_of is not None:
                    busy_of[thread] += duration
                heapq.heappush(events, (start + duration, thread, "take"))
            elif what == "enter" and not closed:
                team_free = max(time, team_free) + line
                heapq.heappush(events, (team_free, thread, "take"))
            elif what == "leave":
                team_free = end = max(time, team_free) + line
            elif what == "close":
                team_free = end = max(time, team_free) + line
                closed = True
        self.now = end


class Prediction(NamedTuple):
    """A call's predicted time, and how its threads spend it. `computing` and `waiting` are shares of the time of all
    threads together."""

    ms: float
    edge: int  # of a tile
    tasks: int
    computing: float
    waiting: float  # for turns
    serial: float  # share of the call's time in which one thread works alone, outside the phases
    balance: float  # a thread's time on tiles: mean over the threads / maximum


def simulate(problem: Problem, threads: int, costs: Costs = COSTS) -> Prediction:
    """Return the prediction for a call that computes a loss and its gradients. The phases are those of
    csrc/cpu/loss.cpp, in the same order."""
    of = cut(problem, threads)
    team = SimulatedTeam(of.threads, costs)
    d = problem.d
    sides = [(problem.rows, of.rows_per_take)]
    if not problem.symmetric:
        sides.append((problem.cols, of.cols_per_take))
    with_gradient = sides if problem.gathers_cols else sides[:1]
    forward, backward = _durations(problem, of, costs)
    turns = [turns_of(problem, task) for task in of.tasks]
    few = min(sides)[0]

    def each_row(ns: float, of_sides: list[tuple[int, int]] = sides) -> None:
        for rows, per_take in of_sides:
            team.rows(rows, per_take, ns)

    def each_row_of_slabs(ns_of_copy: float) -> None:
        if of.slabs > 1:
            team.rows(few, max(ALIGNED_ROWS // of.slabs, 1), (of.slabs - 1) * ns_of_copy)

    team.serial(costs.call + (costs.team if of.threads > 1 else 0))
    each_row(d * costs.feature)
    team.rows(of.slabs - 1, 1, few * d * costs.touch)  # clears the slabs' sums, one slab at a time
    team.tasks([a + b for a, b in zip(forward, backward, strict=True)] if problem.rows_alone else forward, turns)
    each_row_of_slabs(costs.join_sums)
    each_row(costs.logarithm)
    each_row(costs.loss, with_gradient)
    each_row(costs.largest_weight)
    each_row(costs.weight_in_range, with_gradient)
    each_row(costs.weight)
    if not problem.rows_alone:
        team.tasks(backward, turns)
    each_row_of_slabs(d * costs.touch)
    if problem.rows_alone:
        each_row(d * costs.touch, with_gradient)  # multiplies the gathered rows by their weights
    each_row(d * costs.feature, with_gradient)
    of_all = of.threads * team.now
    most = max(team.busy_in_tiles)
    return Prediction(
        ms=team.now / 1e6,
        edge=of.edge,
        tasks=len(of.tasks),
        computing=team.busy_ns / of_all,
        waiting=team.waiting_ns / of_all,
        serial=team.serial_ns / team.now,
        balance=sum(team.busy_in_tiles) / of.threads / most,
    )


def _durations(problem: Problem, of: Cut, costs: Costs) -> tuple[list[float], list[float]]:
    """Return the nanoseconds of every task in the forward and in the backward.

    If one pass does both, a task takes the sum.
    """
    kept = _workspace(problem) // 4 // of.edge**2  # tiles whose exponentials the forward stores for the backward
    forward, backward = [], []
    for task in of.tasks:
        first = second = 0.0
        for tile in tiles(problem, of, task):
            pairs, rows = tile.rows * tile.cols, tile.rows + tile.cols
            formed = pairs * (problem.d * costs.multiply_add + costs.exponential) + rows * problem.d * costs.touch
            products = 2 if problem.gathers_cols and not tile.diagonal else 1  # G U and, for the columns, G^T U
            gathered = pairs * problem.d * costs.multiply_add * products
            found = pairs * costs.exponential + rows * problem.d * costs.touch
            if problem.rows_alone:  # the exponentials are used as soon as they are formed
                first, second = first + formed, second + gathered
                continue
            first += formed
            second += gathered + (found if tile.place < kept else formed)
        forward.append(first)
        backward.append(second)
    return forward, backward


def _workspace(problem: Problem) -> int:
    """Return the largest number of bytes of exponentials that a call may store between forward and backward."""
    from fastntxent.backends import cpu

    if problem.symmetric:
        return cpu.WORKSPACE
    return max(cpu.WORKSPACE_AND_ROWS - 3 * 4 * (problem.rows + problem.cols) * problem.d, 0)


def problems(sizes: list[int] | None, d: int) -> list[Problem]:
    """Return the problems: two views and two towers at each size, and queries against a queue if no sizes are given."""
    return [
        *(of(n, d) for of in (two_views, two_towers) for n in sizes or GRID),
        *(queries(n, d) for n in QUERIES if not sizes),
    ]


def predict(problem: Problem, threads: tuple[int, ...] | list[int], costs: Costs = COSTS) -> list[dict[str, object]]:
    """Return one row per number of threads, with speed-ups relative to one thread."""
    one = simulate(problem, 1, costs).ms
    rows = []
    for count in threads:
        prediction = simulate(problem, count, costs)
        shares = prediction._asdict()
        rows.append(
            {"problem": problem.name, "d": problem.d, "threads": count, **shares, "speed_up": one / prediction.ms}
        )
    return rows


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return predictions for every problem."""
    wanted = [problem for d in arguments.d or [128] for problem in problems(arguments.n, d)]
    return [row for problem in wanted for row in predict(problem, arguments.threads or THREADS)], {}
