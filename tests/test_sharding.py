"""Data parallelism: a batch stays sharded in the forward and the backward pass.

Each test runs in its own process, with eight simulated CPU devices.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import diffrax_reversible as dr

from .conftest import quick_flags
from .problems import cases


DEVICES = 8
SAVEAT = dfx.SaveAt(t1=True, ts=jnp.linspace(0, 1, 5))
PID = dfx.PIDController(rtol=1e-5, atol=1e-5)


def inputs(size, width=8):
    w = jnp.linspace(-8 / width, 8 / width, width**2).reshape(width, width)
    params = {"w": w, "b": jnp.linspace(0, 1, width)}
    return params, jnp.sin(jnp.arange(1.0 * width * size)).reshape(size, width)


def field(t, y, params):
    return jnp.tanh(y @ params["w"] + jnp.broadcast_to(params["b"] * t, y.shape))


def solve(params, y0, controller=PID, throw=False, **kwargs):
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        dr.ALF4(),
        0.0,
        1.0,
        0.1,
        y0,
        params,
        saveat=SAVEAT,
        stepsize_controller=controller,
        adjoint=dr.ReversibleAdjoint(),
        max_steps=64,
        throw=throw,
        **kwargs,
    )


def batch_loss(params, batch):
    """Every element takes its own steps."""
    ys = jax.vmap(lambda y0: solve(params, y0).ys)(batch)
    return jnp.mean(ys**2)


def state_loss(params, batch):
    """The whole batch is one state, with the same steps for all."""
    return jnp.mean(solve(params, batch).ys ** 2)


def assert_close(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def in_loops(program):
    """The computations that the bodies of loops call."""
    parts = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", program)
    parts = {match[1]: part for part in parts if (match := re.search(r"%(\S+) \(", part))}
    names, found = re.findall(r"body=%([\w.-]+)", program), set()
    while names:
        if (name := names.pop()) not in found:
            found.add(name)
            called = re.findall(
                r"(?:calls|to_apply|_computations?)=({[^}]*}|\S+)", parts[name]
            )
            names += re.findall(r"%([\w.-]+)", " ".join(called))
    return "\n".join(parts[name] for name in sorted(found))


def exchanged(program):
    """The sizes of the arrays that devices exchange."""
    exchange = "all-reduce|all-gather|all-to-all|collective-permute"
    moved = re.findall(rf"= (.*?) (?:{exchange})(?:-start)?\(", program)
    shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(moved))
    return [np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes]


def check_sharding(loss, size=4096, width=8):
    """With sharded and donated inputs of `jit`, devices exchange only scalars and gradients
    of the parameters. In the loops over the steps of a batch they exchange only scalars."""
    params, batch = inputs(size, width)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    gradient = jax.grad(loss, argnums=(0, 1))
    alone = jax.jit(gradient)(params, batch)
    sharded = jax.jit(
        gradient,
        in_shardings=(everywhere, split),
        out_shardings=(everywhere, split),
        donate_argnums=1,
    )
    params, batch = jax.device_put(params, everywhere), jax.device_put(batch, split)
    compiled = sharded.lower(params, batch).compile()
    program = compiled.as_text()
    assert max(exchanged(program)) == params["w"].size
    if loss is batch_loss:
        assert max(exchanged(in_loops(program))) == 1
    out = compiled(params, batch)
    assert batch.is_deleted()
    assert_close(out, alone)
    assert out[1].sharding.is_equivalent_to(split, 2)


def check_shard_map():
    """Every device runs its own loop. JAX's check for values that vary between devices is
    off, as Diffrax's own loop fails it."""
    if hasattr(jax, "shard_map"):
        shard_map = functools.partial(jax.shard_map, check_vma=False)
    else:
        from jax.experimental.shard_map import shard_map as old_shard_map

        shard_map = functools.partial(old_shard_map, check_rep=False)
    params, batch = inputs(16)
    mesh = Mesh(np.array(jax.devices()), ("batch",))

    def shard_gradient(params, batch):
        by_params, by_batch = jax.grad(batch_loss, argnums=(0, 1))(params, batch)
        return jax.lax.pmean(by_params, "batch"), by_batch / DEVICES

    kwargs = dict(mesh=mesh, in_specs=(P(), P("batch")), out_specs=(P(), P("batch")))
    parallel = jax.jit(shard_map(shard_gradient, **kwargs))
    alone = jax.jit(jax.grad(batch_loss, argnums=(0, 1)))(params, batch)
    assert_close(parallel(params, batch), alone)


CHECKS = {
    "batch": lambda: check_sharding(batch_loss),
    "batch with many parameters": lambda: check_sharding(batch_loss, 256, 36),
    "state": lambda: check_sharding(state_loss),
    "shard_map": check_shard_map,
}


@pytest.mark.parametrize(
    "name",
    cases((), long=("shard_map",), more=[name for name in CHECKS if name != "shard_map"]),
)
def test_eight_devices(name):
    flags = f"--xla_force_host_platform_device_count={DEVICES} {quick_flags()}"
    root = pathlib.Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "tests.test_sharding", name],
        cwd=root,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


if __name__ == "__main__":
    assert len(jax.devices()) == DEVICES
    CHECKS[sys.argv[1]]()
