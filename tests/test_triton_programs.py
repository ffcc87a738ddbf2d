"""Into how many programs the input stage's launch is cut, and which of its forms have programs that wait: without a GPU."""

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)
from kernel_compiler import compiling_for

from ept_kernels import prompt_embed
from ept_kernels.prompt_embed import triton_by_row, triton_forward
from ept_kernels.prompt_embed.triton_forward import BATCH_TILE, PROGRAMS, SMALLEST_SPAN, span_of

MULTIPROCESSORS = 132  # of an H100 and an H200


def test_a_text_program_takes_the_most_batch_rows_that_leave_four_programs_for_each_multiprocessor():
    assert PROGRAMS == 4 * MULTIPROCESSORS
    for batch, programs in itertools.product((1, 2, 3, 8, 31, 32, 33, 128), (1, 12, 96, 192, 527, 528, 3072)):
        span = span_of(batch, programs)
        of_span = {each: programs * -(-batch // each) for each in (2, 4, 8)}
        assert SMALLEST_SPAN <= span <= BATCH_TILE and span in of_span  # two rows share A·B at least
        assert of_span[span] >= PROGRAMS or span == SMALLEST_SPAN
        assert span == BATCH_TILE or of_span[2 * span] < PROGRAMS


def embed(batch=2, length=6, d=32, *, rank=0, spaces=0, q=0, mask=True):
    """A call without gradients on tensors of any values."""
    lowrank = (torch.empty(length, rank), torch.empty(rank, d)) if rank else (None, None)
    of_spaces = (torch.empty(spaces, 2, d), torch.empty(spaces, 2, d), torch.empty(spaces, d)) if spaces else [None] * 3
    tokens = dict(token_down=torch.empty(q, d), token_up=torch.empty(q, d)) if q else {}
    prompt_embed(
        torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.int64) if mask else None,
        torch.empty(10, d, dtype=torch.bfloat16), torch.empty(4, d), *lowrank, *of_spaces, scale=0.5,
        fusion=False, impl="triton", **tokens,
    )  # fmt: skip


LOWRANK, TOKEN, DEFAULT = dict(rank=30), dict(q=24), dict(q=4)


@pytest.mark.parametrize(
    ("batch", "length", "d", "parts", "programs"),
    [
        (32, 256, 768, LOWRANK, 768),
        (32, 256, 4096, LOWRANK, 4096),
        (16, 128, 768, LOWRANK, 768),
        (32, 256, 768, DEFAULT, 32 * 64),
        (32, 256, 4096, DEFAULT, 32 * 128),
        # The exceptions that ept_kernels/README.md names.
        (8, 128, 768, LOWRANK, 384),
        (32, 256, 768, TOKEN, 256),
        (32, 256, 4096, TOKEN, 256),
        (8, 128, 768, DEFAULT, 8 * 32),
    ],
)
def test_the_text_has_so_many_programs(batch, length, d, parts, programs, monkeypatch):
    launches = []

    def count(kernel, programs, *args, **flags):
        launches.append((programs, dict(zip(kernel.arg_names, args, strict=False))))

    for module in (triton_forward, triton_by_row):
        monkeypatch.setattr(module, "launch", count)
    with compiling_for("sm_90"):
        embed(batch, length, d, **parts)
    ((whole, arguments),) = launches
    text = arguments["text_items"] if "text_items" in arguments else batch * arguments["text_tiles"]
    assert text == programs <= whole


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        (DEFAULT | dict(mask=False), False),
        (DEFAULT, False),
        (dict(), False),
        (TOKEN, False),
        (LOWRANK | dict(mask=False), False),
        (LOWRANK, True),
        (dict(spaces=2, mask=False), True),
    ],
    ids=str,
)
def test_the_compiled_code_counts_nothing_where_no_program_waits(parts, counts):
    """Programs wait for slots, with a mask and a low-rank update, and for the prompt's chain."""
    with compiling_for("sm_90") as kernels:
        embed(**parts)
    (kernel,) = kernels
    assert bool(re.search(r"\b(atom|red)\.", kernel.asm["ptx"])) is counts
