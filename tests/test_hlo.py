"""Counting what a compiled program does, against arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf.config import MeshConfig
from jrlhf.hlo import Module, Rates, Walk, read_instruction
from jrlhf.sharding import make_mesh

SLOW = Rates(products=1e9, memory=1e9, links=1e9)


def cost(f, *args, loops=(), **options):
    return Walk(Module(jax.jit(f, **options).lower(*args).compile().as_text()), SLOW, loops).cost()


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    def f(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    one = cost(f, ones(8, 16), ones(1, 16, 16)).flops
    assert one == 2 * 8 * 16 * 16
    assert cost(f, ones(8, 16), ones(7, 16, 16)).flops == 7 * one


def test_a_loop_without_a_known_end_runs_as_often_as_is_said():
    def f(x, w):
        def inner(x):
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 1.0, lambda x: x @ w, x)

        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: inner(x) @ w, x)

    one = 2 * 4 * 8 * 8
    assert cost(f, ones(4, 8), ones(8, 8), loops=(10, 3)).flops == 10 * (3 + 1) * one
    assert cost(f, ones(4, 8), ones(8, 8)).flops == 2 * one


def test_of_branches_the_dearest_counts():
    def f(i, x, w):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ w, lambda x: x @ w @ w], x)

    assert cost(f, jax.ShapeDtypeStruct((), jnp.int32), ones(4, 8), ones(8, 8)).flops == 2 * 2 * 4 * 8 * 8


def test_batches_of_products():
    assert (
        cost(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), ones(3, 4, 5), ones(3, 5, 6)).flops
        == 2 * 3 * 4 * 5 * 6
    )


def test_a_fusion_reads_as_much_of_an_argument_as_it_slices():
    whole, rows = 1000 * 64 * 4, 64 * 4
    read = cost(lambda x, i: jnp.tanh(jax.lax.dynamic_index_in_dim(x, i)), ones(1000, 64), jnp.int32(3)).bytes
    assert rows < read < whole / 10


def test_what_is_updated_in_place_is_written_where_it_changes():
    def f(x, y, i):
        return jax.lax.dynamic_update_slice(x, y * 2, (i, jnp.int32(0)))

    moved = cost(f, ones(1000, 64), ones(1, 64), jnp.int32(3), donate_argnums=0).bytes
    assert moved < 1000 * 64 * 4 / 10


@pytest.mark.parametrize(("spec", "kind"), [(P("fsdp"), "all-gather"), (P(None, "fsdp"), "all-reduce")])
def test_collectives_by_kind_and_size(spec, kind):
    """Weights split by rows are gathered; a contraction over what is split is summed."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
    x = split((8, 16), P("data") if kind == "all-gather" else P("data", "fsdp"))
    w = split((16, 32), P("fsdp"))

    def f(x, w):
        if kind == "all-gather":
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data")))

    found = cost(f, x, w).collectives
    (moved,) = found
    assert (moved.kind, moved.devices, found[moved]) == (kind, 4, 1)
    assert moved.bytes == (16 * 32 if kind == "all-gather" else 4 * 32) * 4


def test_a_product_of_a_tpu_that_is_a_convolution():
    """Batches are a spatial dimension in which all but one product fall on padding."""
    lines = [
        "%a = bf16[8,128,64]{2,1,0} parameter(0)",
        "%b = bf16[8,64,32]{2,1,0} parameter(1)",
        "%c = bf16[8,128,32]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, "
        "dim_labels=0bf_0io->0bf",
    ]
    text = "HloModule m\n\nENTRY %main (a: bf16[8,128,64], b: bf16[8,64,32]) -> bf16[8,128,32] {\n"
    text += "\n".join(f"  {'ROOT ' if line.startswith('%c') else ''}{line}" for line in lines) + "\n}\n"
    assert Walk(Module(text), SLOW).cost().flops == 2 * 8 * 128 * 64 * 32


def test_an_instruction_with_a_tuple_layouts_and_attributes():
    line = (
        "  ROOT %while.5 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.3), condition=%cond, "
        'body=%body.1, backend_config={"known_trip_count":{"n":"32"}}'
    )
    found = read_instruction(line)
    assert found is not None
    assert (found.name, found.opcode, found.operands) == ("while.5", "while", ("tuple.3",))
    assert [(s.dtype, s.dims, s.fast) for s in found.shapes] == [("s32", (), False), ("bf16", (4, 8), True)]
    assert found.called("body") == ["body.1"]
