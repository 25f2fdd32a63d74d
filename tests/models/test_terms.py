"""What is read of one element of a value."""

import pytest
import torch

from grape_compile.passes.graph import Unreadable
from grape_compile.passes.terms import broadcast


def test_axes_of_one_entry_are_read_at_their_only_place() -> None:
    row, column = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    found = broadcast((row, row, column), (1, 4))
    assert [axis.tolist() for axis in found] == [[0, 0, 0], [2, 0, 1]]


def test_a_value_of_more_axes_than_the_result_is_unreadable() -> None:
    """What is added to scores may have more axes than the scores that were found."""
    with pytest.raises(Unreadable, match="5 axes beside 4"):
        broadcast((torch.arange(3),) * 4, (1, 1, 2, 3, 3))
