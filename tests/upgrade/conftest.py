from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    """Models of one architecture share their code, and torch compiles a piece of code a few times at most."""
    yield
    torch.compiler.reset()
