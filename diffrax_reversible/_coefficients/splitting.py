"""The built-in compositions of kicks and drifts."""

import numpy as np

from .alf import gamma_17, mirror, s10_drifts, s10_kicks
from .splitting_tableau import SplittingTableau


# Störmer (1907), Verlet (1967), doi:10.1103/PhysRev.159.98.
stormer_verlet = SplittingTableau((0.5, 0.5), (1.0,), order=2, embedded_order=1)


def _symmetric(half: list[float], count: int) -> tuple[float, ...]:
    """All `count` lengths from the first half without the middle one or two."""
    if count % 2 == 1:
        return mirror(half, 1 - 2 * sum(half))
    return mirror([*half, 1 / 2 - sum(half)])


# Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7: tables 2 and 3, methods S6 and
# S10 for two parts of any kind, and SRKN6b and SRKN11b for affine drifts.
# `examples/benchmarks/error_weights.py` computes the error weights here and below.
blanes_moan4 = SplittingTableau(
    _symmetric([0.0792036964311957, 0.353172906049774, -0.0420650803577195], 7),
    _symmetric([0.209515106613362, -0.143851773179818], 6),
    order=4,
    embedded_order=3,
    error_scale=3e-3,
)
blanes_moan4_nystrom = SplittingTableau(
    _symmetric([0.0829844064174052, 0.396309801498368, -0.0390563049223486], 7),
    _symmetric([0.245298957184271, 0.60487266571108], 6),
    order=4,
    embedded_order=3,
    error_scale=3e-3,
    nystrom=True,
    error_weights=(
        (
            0.0020968800119918127,
            -0.031716149842605436,
            -0.5623420205365436,
            0.8184806281851013,
            -0.2756045483811671,
            -0.05322628951462067,
            0.1023115000778437,
        ),
        (
            0.0011951345880733657,
            -0.28357123664260725,
            0.1369708322192589,
            0.28228876471719094,
            0.14414431504442576,
            -0.29106333558872766,
            0.010035525662385757,
        ),
    ),
)
blanes_moan6 = SplittingTableau(
    _symmetric(s10_kicks, 11),
    _symmetric(s10_drifts, 10),
    order=6,
    embedded_order=4,
    error_scale=1e-3,
)
blanes_moan6_nystrom = SplittingTableau(
    _symmetric(
        [
            0.0414649985182624,
            0.198128671918067,
            -0.0400061921041533,
            0.0752539843015807,
            -0.0115113874206879,
        ],
        12,
    ),
    _symmetric(
        [
            0.123229775946271,
            0.290553797799558,
            -0.127049212625417,
            -0.246331761062075,
            0.357208872795928,
        ],
        11,
    ),
    order=6,
    embedded_order=4,
    error_scale=1e-3,
    nystrom=True,
    error_weights=(
        (
            -0.0103635061726241,
            0.016545733920682548,
            -0.04421730263841966,
            0.05645214187250835,
            -0.00793099390413154,
            -0.03329014292589842,
            0.012625601682911998,
            0.07334946441383385,
            -0.0515238113425022,
            -0.10420885815390281,
            0.09443713483276259,
            -0.0018754615852206217,
        ),
        (
            -0.018908524414859584,
            0.12866954726479402,
            0.11082196414625164,
            -0.07776756685032551,
            -0.036730573926225016,
            -0.151735687011466,
            0.15514363753811605,
            0.03335993363344048,
            0.0742313395473435,
            -0.10645747722889586,
            -0.1381197371142948,
            0.02749314441612095,
        ),
    ),
)

# Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9: 17 steps of Störmer–Verlet.
_halves = np.array(gamma_17) / 2
kahan_li8 = SplittingTableau(
    tuple(map(float, np.append(_halves, 0) + np.append(0, _halves))),
    gamma_17,
    order=8,
    embedded_order=5,
    error_scale=3e-3,
    error_weights=(
        (
            -0.02614485985510131,
            0.020362048587674948,
            -0.6715621579564239,
            0.22116377828039127,
            -0.036430552995936574,
            0.2479495947038952,
            0.0005798269592946145,
            -0.07988954802462668,
            -0.0896892469962422,
            0.8207728249735131,
            -0.13712588215116753,
            -0.009463554998170164,
            -0.08830052999470232,
            0.21193673860772502,
            0.003158555308832224,
            0.2230758391702337,
            -0.6356280118065704,
            0.025235138187380976,
        ),
        (
            0.14323681178048517,
            -2.5138055063628366,
            0.715264878042336,
            -0.17724187396143176,
            -0.6009071495185397,
            0.6638618477624425,
            1.6662348421890556,
            -0.46105175300168805,
            -0.0036399473386704573,
            0.8838439879790095,
            -0.4082367911765775,
            1.7811720954260017,
            0.232169774795212,
            -0.17132353835329756,
            -0.5204543528041191,
            0.16665181064054216,
            -1.645113774465797,
            0.2493386383678716,
        ),
    ),
)
