"""The private parts of Diffrax that the package uses are as it expects."""

import ast
import importlib
import inspect
import pathlib

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import pytest

import diffrax_reversible as dr
from diffrax_reversible import _diffrax


def test_another_diffrax(monkeypatch):
    monkeypatch.delattr(dfx._integrate, "loop")
    with pytest.raises(ImportError, match=r"pip install 'diffrax>=0.7.2,<0.8'"):
        importlib.reload(_diffrax)
    monkeypatch.undo()
    importlib.reload(_diffrax)


def test_loop():
    # `loop` evolves a `State`, and an adjoint passes all of these arguments.
    assert set(inspect.signature(_diffrax.loop).parameters) == {
        *("solver", "stepsize_controller", "event", "saveat", "t0", "t1", "dt0"),
        *("max_steps", "terms", "args", "init_state", "progress_meter"),
        *("inner_while_loop", "outer_while_loop"),
    }


def test_loop_uses_of_a_solver():
    # The package passes a stand-in that has only these attributes.
    source = ast.parse(inspect.getsource(_diffrax.loop))
    solver = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.Name) and node.id == "solver"
    ]
    attributes = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and node.value in solver
    }
    assert attributes == {"step", "interpolation_cls", "error_order"}


def test_adjoint():
    parameters = set(inspect.signature(dfx.AbstractAdjoint.loop).parameters)
    assert parameters == {
        *("self", "args", "terms", "solver", "stepsize_controller", "event", "saveat"),
        *("t0", "t1", "dt0", "max_steps", "throw", "init_state", "passed_solver_state"),
        *("passed_controller_state", "progress_meter"),
    }


def test_state():
    fields = set(_diffrax.State.__dataclass_fields__)
    assert {
        *("y", "tprev", "tnext", "solver_state", "controller_state", "made_jump"),
        *("num_steps", "num_accepted_steps", "save_state", "dense_infos", "dense_ts"),
        *("event_tprev", "event_tnext", "event_dense_info", "event_values", "result"),
    } <= fields
    fields = set(_diffrax.SaveState.__dataclass_fields__)
    assert fields == {"saveat_ts_index", "ts", "ys", "save_index"}


def test_save_y():
    assert dfx.SubSaveAt(t1=True).fn is _diffrax.save_y
    assert dfx.SaveAt(t1=True).subs.fn is _diffrax.save_y


def test_wrap_term():
    assert set(_diffrax.WrapTerm.__dataclass_fields__) == {"term", "direction"}
    assert issubclass(_diffrax.WrapTerm, eqx.Module)


def test_private_names_in_one_file_only():
    package = pathlib.Path(_diffrax.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                private = node.level == 0 and module.startswith("diffrax._")
                assert not private or file.name == "_diffrax.py", (file, module)


def test_result_is_static(monkeypatch, capfd):
    """Diffrax builds a leaner loop if it sees that no step fails. It prints what it sees,
    for its own tests."""
    monkeypatch.setattr(dfx._integrate, "_PRINT_STATIC", True)
    term = dfx.ODETerm(lambda t, y, args: -y)
    for adjoint in (dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()):
        dfx.diffeqsolve(term, dr.ALF4(), 0.0, 1.0, 0.1, jnp.ones(2), adjoint=adjoint)
    seen, expected = capfd.readouterr().out.splitlines()
    assert seen == expected and "static_result=None" not in seen
