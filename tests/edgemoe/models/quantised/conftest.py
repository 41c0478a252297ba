from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import pytest
import torch

from edgemoe.models import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.quantised.tensors import QuantisedTensor
from edgemoe.models.safety import check_weights
from edgemoe.models.weights.tensor_files import list_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Check: TypeAlias = "Callable[[Path, Path], int]"


@pytest.fixture(scope="session")
def check_same() -> Check:
    """Check that a quantised checkpoint is a plain one bit by bit, whole and streamed.

    Returns the number of its quantised weights.
    """

    def check(quantised: Path, plain: Path) -> int:
        wanted = {n: t.read() for n, t in list_tensors(check_weights(plain)).items()}
        found = list_tensors(check_weights(quantised))
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            read = tensor.read()
            assert read.dtype == wanted[name].dtype
            assert torch.equal(read, wanted[name]), name

        whole, reference = load_model(quantised), load_model(plain)
        tensors = whole.model.state_dict()
        for name, contents in reference.model.state_dict().items():
            assert torch.equal(tensors[name], contents), name
        assert whole.stored_dtype == reference.stored_dtype
        streamed = open_streamed(quantised).skeleton
        for index in range(len(streamed.layers)):
            with streamed.layer(index):
                for name, held in streamed.layer_tensors(index).items():
                    if name in tensors:
                        assert torch.equal(held, tensors[name]), name
        return sum(isinstance(tensor, QuantisedTensor) for tensor in found.values())

    return check
