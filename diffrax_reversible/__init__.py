"""High-order reversible solvers for Diffrax, and gradients that store no trajectory."""

import importlib.metadata as _metadata

from ._adjoint.reversible import ReversibleAdjoint as ReversibleAdjoint
from ._coefficients.alf_tableau import ALFTableau as ALFTableau
from ._controller.base import (
    AbstractReversibleStepSizeController as AbstractReversibleStepSizeController,
)
from ._controller.step_density import StepDensityController as StepDensityController
from ._explain.attempts import Attempts as Attempts
from ._explain.explain import explain as explain
from ._explain.explanation import Explanation as Explanation
from ._explain.rivals import Rival as Rival
from ._solver import diffrax_own as _diffrax_own  # noqa: F401
from ._solver.abstract_alf import AbstractALF as AbstractALF
from ._solver.adapter import (
    AbstractReversibleAdapter as AbstractReversibleAdapter,
    as_reversible as as_reversible,
)
from ._solver.alf import ALF as ALF, ALF2 as ALF2, ALF4 as ALF4, ALF6 as ALF6, ALF8 as ALF8
from ._solver.base import AbstractReversibleSolver as AbstractReversibleSolver
from ._solver.collocation import CollocationInterpolation as CollocationInterpolation
from ._solver.coupling_solver import AbstractCouplingSolver as AbstractCouplingSolver
from ._solver.couplings import Coupling as Coupling
from ._solver.gauss import (
    Gauss4 as Gauss4,
    Gauss6 as Gauss6,
    ImplicitMidpoint as ImplicitMidpoint,
)
from ._solver.hamiltonian import (
    BlanesMoan4 as BlanesMoan4,
    BlanesMoan6 as BlanesMoan6,
    KahanLi8 as KahanLi8,
    StormerVerlet as StormerVerlet,
)
from ._solver.interpolation import HermiteInterpolation as HermiteInterpolation
from ._solver.mccallum_foster import McCallumFoster as McCallumFoster
from ._solver.osculating import OsculatingInterpolation as OsculatingInterpolation


__version__ = _metadata.version("diffrax_reversible")
