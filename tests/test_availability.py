"""Which implementation runs, and what is said where Triton cannot."""

import logging
import subprocess
import sys

import pytest
import torch
from test_prompt_embed import make_case

from ept_kernels import availability, prompt_embed

CPU = torch.device("cpu")
ALONE = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import ept_kernels, torch
x = torch.ones(1, 2, 4)
ept_kernels.prompt_embed_inputs(x, None, torch.ones(2, 4), None, None, None, None, None, scale=1.0)
assert not [name for name in sys.modules if name.startswith("ept_kernels") and "triton_" in name]
try:
    ept_kernels.prompt_embed_inputs(x, None, torch.ones(2, 4), None, None, None, None, None, scale=1.0, impl="triton")
except RuntimeError as error:
    print(error)
"""


def test_package_works_without_triton_and_says_what_to_use():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'impl="triton" cannot run: Triton is not installed. Use impl="torch"'


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_triton_on_cpu_tensors_raises_and_names_torch():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match=r'the tensors are on cpu, not on a GPU\. Use impl="torch"'):
        prompt_embed(**make_case(0), impl="triton")


def test_an_old_triton_is_named(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.0")
    assert availability.why_no_triton(CPU) == "Triton 3.5.0 is older than 3.6"


def test_auto_says_once_what_it_took_and_why(caplog, monkeypatch):
    monkeypatch.setattr(availability, "_announced", set())
    with caplog.at_level(logging.INFO, "ept_kernels"):
        for _ in range(2):
            prompt_embed(**make_case(0))
    assert [record.message for record in caplog.records] == [
        'impl="auto" takes impl="torch": the tensors are on cpu, not on a GPU'
    ]
