"""User-defined solvers whose steps are chains of couplings."""

import pathlib
import re

import diffrax as dfx

import diffrax_reversible as dr


README = pathlib.Path(__file__).parent.parent / "README.md"
(LINES,) = re.findall(r"```python\n([^`]*class TwoStreams.*?)```", README.read_text(), re.S)
defined = {}
exec(LINES, defined)
TwoStreams = defined["TwoStreams"]


class Ruth(dr.AbstractCouplingSolver):
    """Ruth's method of order 3 (1983), doi:10.1109/TNS.1983.4332919."""

    term_structure = (dfx.ODETerm, dfx.ODETerm)

    def order(self, terms):
        return 3

    def couplings(self, terms, t0, t1, args):
        (drift, kick), h, chain = terms, t1 - t0, []
        for c, d in zip((2 / 3, -2 / 3, 1), (7 / 24, 3 / 4, -1 / 24), strict=True):
            kicked = lambda q, d=d: d * h * kick.vf(t0, q, args)
            drifted = lambda p, c=c: c * h * drift.vf(t0, p, args)
            chain += [dr.Coupling(1, kicked), dr.Coupling(0, drifted)]
        return chain
