"""What the host sends when rows start and block tables change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams
from pageflight.runners import device_rows
from pageflight.runners.device_rows import DeviceRows
from pageflight.runners.device_wishes import RowWishes

MAX_LEN, NUM_ROWS, BLOCK_SIZE = 48, 3, 16
NOBODY = StepPlan(
    step=0,
    rows=np.zeros(0, np.int32),
    starts_at=np.zeros(0, np.int32),
    lengths=np.zeros(0, np.int32),
    samples=np.zeros(0, np.bool_),
)


def rows_of() -> DeviceRows:
    return DeviceRows(
        max_num_seqs=NUM_ROWS,
        max_num_tokens=64,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )


def start(row: int, length: int) -> RowStart:
    ids = np.random.default_rng(length).integers(1, 100, length).astype(np.int32)
    return RowStart(row, row, row, ids, length, SamplingParams(temperature=0.5 + row, top_k=7, seed=-9 - row))


def applied(rows: DeviceRows, plan: StepPlan) -> None:
    rows.change(plan, RowWishes(NUM_ROWS, 100, torch.device("cpu")).prepared(plan))
    rows.flush()


@pytest.mark.parametrize("most", [4, 17, 1 << 16])
def test_prompts_and_tables_arrive_whole_however_they_are_cut(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is longer than one launch takes was an assertion, far into serving."""
    monkeypatch.setattr(device_rows, "MAX_CHANGES", most)
    rows = rows_of()
    rows.warm_up()
    starts = tuple(start(row, length) for row, length in ((0, 48), (2, 5)))
    table = np.array([(0, 0, 4), (0, 1, 9), (0, 2, 1), (2, 0, 8), (1, 2, 3), (2, 2, 6)], np.int32).T
    update = {"table_rows": table[0], "table_columns": table[1], "table_blocks": table[2]}
    applied(rows, replace(NOBODY, starts=starts, **update))
    tokens = rows.state[: NUM_ROWS * MAX_LEN].view(NUM_ROWS, MAX_LEN).numpy()
    assert tokens[0].tolist() == starts[0].token_ids.tolist()
    assert tokens[2, :5].tolist() == starts[1].token_ids.tolist() and not tokens[2, 5:].any() and not tokens[1].any()
    assert rows.tables_RB.tolist() == [[4, 9, 1], [0, 0, 3], [8, 0, 6]]
    assert rows.parameters.floats[:, 0].tolist() == [0.5, 0.0, 2.5]
    assert rows.parameters.integers[:, :3].tolist() == [[7, -9, 0], [0, 0, 0], [7, -11, 2]]
    applied(rows, replace(NOBODY, starts=(start(2, 9),)))
    assert tokens[2, :9].tolist() == start(2, 9).token_ids.tolist()
    assert tokens[0].tolist() == starts[0].token_ids.tolist(), "rows that stay are left alone"


def test_a_prompt_travels_as_its_ids_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every id once came with the number of its word: twice as much."""
    rows, sent = rows_of(), []
    send = rows._staging.send
    monkeypatch.setattr(
        rows._staging, "send", lambda parts, places: (sent.append(sum(map(len, parts))), send(parts, places))[1]
    )
    applied(rows, replace(NOBODY, starts=(start(1, 40),)))
    assert sent == [40 + 12 + 10 + 3 + 4], "ids, floats, integers, where three runs begin and lie"
