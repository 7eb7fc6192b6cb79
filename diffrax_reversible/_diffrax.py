"""The only file that imports private names of Diffrax."""

import diffrax


try:
    # Signatures have to agree with those of Diffrax's abstract classes.
    from diffrax._custom_types import (
        Args as Args,
        BoolScalarLike as BoolScalarLike,
        IntScalarLike as IntScalarLike,
        RealScalarLike as RealScalarLike,
    )

    # Recognises paths that draw a new sample at every evaluation: no backward pass can
    # repeat them.
    from diffrax._heuristics import is_unsafe_sde as is_unsafe_sde

    # The forward pass of every adjoint, and the state that it evolves.
    from diffrax._integrate import loop as loop, SaveState as SaveState, State as State

    # The default of `SaveAt(fn=...)`; recognising it saves a pull-back per saved output.
    from diffrax._saveat import save_y as save_y

    # `diffeqsolve` wraps every term in this to integrate backwards in time.
    from diffrax._term import WrapTerm as WrapTerm
except ImportError as error:
    raise ImportError(
        f"`diffrax_reversible` relies on parts of Diffrax that version "
        f"{diffrax.__version__} does not have ({error}). Install a compatible version: "
        "`pip install 'diffrax>=0.7.2,<0.8'`."
    ) from error
