"""Which known states are held, and that they come back."""

import jax
import jax.numpy as jnp
import numpy as np

from diffrax_reversible._adjoint.known import Checkpoints, Known


CAPACITY = 4


def state(step):
    """A known state from which its step can be told."""
    step = jnp.asarray(step)
    t = step / 2.0
    return Known(jnp.stack([t, -t]), t + 1, None, t, t + 0.5, t, step < 0, step)


@jax.jit
def hold(checkpoints, step, *args):
    return checkpoints.hold(state(step), *args)


@jax.jit
def before(checkpoints, step):
    return checkpoints.before(step, state(0))


class Expected:
    """As `Checkpoints`, with `held`: for each step, whether the solve restarted there."""

    def __init__(self):
        self.held: dict[int, bool] = {}

    def hold(self, step, restarts, wanted, end, prefer_restarts, needed):
        live = {s: r for s, r in self.held.items() if s < end} | {step: restarts}
        if not wanted or step in self.held:
            return
        if len(live) > CAPACITY:
            costs = self.costs(live, end, prefer_restarts)
            if needed:
                costs[step] = np.inf
            cheapest = min(costs, key=costs.__getitem__)
            if cheapest == step:
                return
            del self.held[cheapest]
        elif len(self.held) == CAPACITY:
            # In place of a state that the walk has passed.
            del self.held[min(s for s in self.held if s >= end)]
        self.held[step] = restarts

    def costs(self, live, end, prefer_restarts):
        steps, costs = sorted(live), {}
        for i, step in enumerate(steps):
            gap = (*steps, end)[i + 1] - (0, *steps)[i]
            cost = np.float32((len(steps) - i) * gap) / np.float32(max(end - step, 1))
            evenly = np.float32(gap) * np.float32(1e-9)
            costs[step] = evenly if prefer_restarts and not live[step] else cost
        return costs


def test_random_solves_and_replays():
    """A solve, and replays of ever earlier steps, hold what the rule says."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        ours, expected = Checkpoints.allocate(CAPACITY, state(0)), Expected()
        steps, begin, target = 40, 0, None
        while steps > 0:
            for step in range(begin + 1, steps + 1):
                restarts = bool(rng.random() < 0.2)
                wanted, needed = restarts or bool(rng.random() < 0.4), False
                if target is not None and wanted:
                    restarts, needed = False, step + 3 >= target
                end = step + 1 if target is None else target
                args = step, restarts, wanted, end, target is None, needed
                ours = hold(ours, *args)
                expected.hold(*args)
                held = {int(s) for s in ours.steps if s < 1000}
                assert held == set(expected.held)
                assert list(ours.steps) == sorted(ours.steps)
            for step in {1, steps + 1, *rng.integers(1, steps + 1, 4)}:
                known = before(ours, step)
                last = max((s for s in expected.held if s < step), default=0)
                for x, y in zip(*map(jax.tree.leaves, (known, state(last))), strict=True):
                    np.testing.assert_array_equal(x, y)
            steps = target = int(rng.integers(0, steps))
            begin = max((s for s in expected.held if s < steps), default=0)
