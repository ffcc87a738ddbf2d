"""The plugin's modules by themselves: each token gets its slot's rows and update, eagerly and within one graph."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

from ept.serving.layers import Rows, Update
from ept_kernels.layer_update import reference

SLOTS, RANK, WIDTH, ROWS = 3, 2, 8, 6
OF_TOKENS = [0, 0, -1, 2, 1, 1, -1, 0]  # the slot of each token of a step
POSITIONS = [0, 3, 1, 5, 0, 7, 0, 2]
BEHIND = [7, -9, 2]  # what vLLM's buffer may hold behind them
PROMPTS, ENDS = (2, 1, 3), (4, 1, 6)


@pytest.fixture
def index() -> torch.Tensor:
    """vLLM's buffer: slots of the step's tokens, and what is left behind them."""
    return torch.tensor(OF_TOKENS + BEHIND + [123456789])


@pytest.fixture
def update(index) -> Update:
    module = Update(SLOTS, RANK, WIDTH, "silu", by_token=True)
    module.set_mapping(SimpleNamespace(_token_lora_indices=index))
    torch.manual_seed(0)
    for slot in range(SLOTS):
        module.set_lora(slot, torch.randn(RANK - slot % 2, WIDTH), torch.randn(WIDTH, RANK - slot % 2))
    return module


@pytest.fixture
def rows(index) -> Rows:
    module = Rows(SLOTS, ROWS, WIDTH, by_token=True)
    module.set_mapping(SimpleNamespace(_token_lora_indices=index))
    torch.manual_seed(1)
    for slot in range(SLOTS):
        module.set_lora(slot, torch.randn(ENDS[slot], WIDTH), torch.zeros(1, PROMPTS[slot]))
    return module


def expected_addend(update: Update, x: torch.Tensor) -> torch.Tensor:
    by_row = reference.layer_update_by_row(x[:, None], update.down, update.up, 1.0, "silu", torch.tensor(OF_TOKENS))
    return by_row[:, 0] - x


def test_each_token_is_updated_by_its_slot_whatever_stands_behind_the_step(update):
    x = torch.randn(len(OF_TOKENS), WIDTH)
    padded = torch.cat([x, torch.full((len(BEHIND), WIDTH), torch.inf)])
    addend = update(padded, update.slots(len(padded)))[: len(x)]
    torch.testing.assert_close(addend, expected_addend(update, x))
    assert not addend[[2, 6]].any()  # no bit of a request without an adapter changes


def test_rows_stand_at_their_positions(rows, update):
    hidden = torch.randn(len(OF_TOKENS), WIDTH)
    out = rows(hidden, torch.tensor(POSITIONS), rows.slots(len(hidden)), update)
    updated = hidden + expected_addend(update, hidden)
    for token, (slot, position) in enumerate(zip(OF_TOKENS, POSITIONS, strict=True)):
        want = hidden[token] if slot < 0 else updated[token]
        if slot >= 0 and position < PROMPTS[slot]:
            want = rows.rows[slot, position]
        elif slot >= 0 and position < ENDS[slot]:
            want = want + rows.rows[slot, position]
        torch.testing.assert_close(out[token], want)


def test_a_slot_that_is_reset_adds_nothing(rows, update):
    for slot in range(SLOTS):
        rows.reset_lora(slot)
        update.reset_lora(slot)
    hidden = torch.randn(len(OF_TOKENS), WIDTH)
    assert torch.equal(rows(hidden, torch.tensor(POSITIONS), rows.slots(len(hidden)), update), hidden)


def test_one_graph_serves_all_lengths_and_slots(rows, update):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def step(hidden, positions):
        hidden = rows(hidden, positions, rows.slots(len(hidden)), update)
        return hidden + update(hidden, update.slots(len(hidden)))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for count in (7, 5, 3):  # none is d, whose symbol it would share
        hidden, positions = torch.randn(count, WIDTH), torch.tensor(POSITIONS[:count])
        torch.testing.assert_close(compiled(hidden, positions), step(hidden, positions))
    update.reset_lora(0)
    torch.testing.assert_close(compiled(hidden, positions), step(hidden, positions))
    assert counter.frame_count == 1


def test_one_adapter_for_all_tokens_needs_no_index():
    update, rows = Update(1, RANK, WIDTH, "silu", by_token=False), Rows(1, 3, WIDTH, by_token=False)
    torch.manual_seed(2)
    update.set_lora(0, torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK))
    rows.set_lora(0, torch.randn(3, WIDTH), torch.zeros(1, 2))
    hidden = torch.randn(4, WIDTH)
    updated = reference.layer_update(hidden, update.down[0], update.up[0], 1.0, "silu")
    torch.testing.assert_close(hidden + update(hidden, update.slots(4)), updated)
    out = rows(hidden, torch.arange(4), rows.slots(4), update)
    want = torch.cat([rows.rows[0, :2], updated[2:3] + rows.rows[0, 2:], updated[3:]])
    torch.testing.assert_close(out, want)
