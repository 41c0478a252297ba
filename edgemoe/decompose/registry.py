"""The decompositions by name, and one of them with its options, ready to factor layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.decompose.shared_basis import shared_basis
from edgemoe.decompose.svd import svd
from edgemoe.decompose.svd_whitened import svd_whitened
from edgemoe.errors import PlanError
from edgemoe.models.layers.factored import factor_layer, factored
from edgemoe.models.layers.shared_basis import based, to_shared_basis
from edgemoe.plans.factors import SHARED_BASIS
from edgemoe.plans.options import options_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from typing import TypeAlias

    import torch

    from edgemoe.calibrate.sample import Window
    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.plans.factors import Factors

    Inside: TypeAlias = Callable[
        [MoeLayer, Mapping[str, torch.Tensor]], AbstractContextManager[None]
    ]


@dataclass(frozen=True)
class DecompositionMethod:
    """A decomposition.

    Attributes:
        factor: From a layer, or from a view of it on tokens, and its experts' ranks to factors.
            Options are keyword arguments.
        reads_tokens: Whether it looks at tokens.
        shares_bases: Whether the experts of a layer share bases
            (`edgemoe.models.shared_basis_experts`) instead of having factors each.
    """

    factor: Callable[..., LayerFactors]
    reads_tokens: bool = False
    shares_bases: bool = False

    @property
    def inside(self) -> Inside:
        """Puts what `factor` gives into a layer for a while."""
        return based if self.shares_bases else factored

    @property
    def put(self) -> Callable[[MoeLayer, Mapping[str, torch.Tensor]], None]:
        """Puts what `factor` gives into a layer."""
        return to_shared_basis if self.shares_bases else factor_layer

    @property
    def options(self) -> dict[str, Any]:
        """Options by name, with their defaults."""
        return options_of(self.factor)


METHODS: dict[str, DecompositionMethod] = {
    SHARED_BASIS: DecompositionMethod(shared_basis, reads_tokens=True, shares_bases=True),
    "svd": DecompositionMethod(svd),
    "svd-whitened": DecompositionMethod(svd_whitened, reads_tokens=True),
}


def find_method(name: str) -> DecompositionMethod:
    """Find a decomposition by name.

    Args:
        name: Its name.

    Returns:
        The decomposition.

    Raises:
        PlanError: There is no such decomposition.
    """
    if name not in METHODS:
        raise PlanError(f"the decomposition must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]


@dataclass(frozen=True)
class Decomposition:
    """A decomposition as a plan asks for it.

    Attributes:
        method: The decomposition.
        options: Its options.
        windows: The tokens that it looks at; none where it looks at none.
    """

    method: DecompositionMethod
    options: dict[str, Any]
    windows: tuple[Window, ...]

    @classmethod
    def of(cls, factors: Factors) -> Decomposition:
        """Read what a plan says.

        Args:
            factors: What it says of factors.

        Returns:
            The decomposition.

        Raises:
            PlanError: There is no such method, an option is of another type, or tokens are
                missing.
        """
        method = find_method(factors.method)
        options: dict[str, Any] = {}
        for name, default in method.options.items():
            value = options[name] = factors.options.get(name, default)
            if type(value) is not type(default) or (type(value) is int and value < 0):
                rule = "an integer in [0, inf)" if type(default) is int else "a string"
                raise PlanError(
                    f"option {name} of {factors.method} must be {rule}, got {value!r}. Correct "
                    "the plan."
                )
        if not method.reads_tokens:
            return cls(method, options, ())
        if factors.sample is None:
            raise PlanError(
                f"a plan of {factors.method} must hold the tokens that it looks at, got none. "
                "Make the plan again with `edgemoe decompose`."
            )
        return cls(method, options, tuple(factors.sample.to_windows()))

    def check_vocabulary(self, model: MoeModel) -> None:
        """Refuse tokens that a model does not know.

        Args:
            model: The model that will see them.

        Raises:
            PlanError: There is one.
        """
        size = int(model.config.vocab_size)
        largest = max((max(window.ids) for window in self.windows), default=0)
        if largest >= size:
            raise PlanError(
                f"the plan's tokens must be in [0, {size}), the model's vocabulary, got "
                f"{largest}. Make the plan again with `edgemoe decompose`."
            )
