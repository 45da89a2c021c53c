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


NESTED = """HloModule m, is_scheduled=true

%inner (p.0: bf16[32,64,64], p.1: s32[]) -> bf16[1,64,64] {
  %p.0 = bf16[32,64,64]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,64}
}

%whole (q.0: bf16[64,64]) -> bf16[64,64] {
  %q.0 = bf16[64,64]{1,0} parameter(0)
  ROOT %same = bf16[64,64]{1,0} bitcast(%q.0)
}

%outer (a.0: bf16[32,64,64], a.1: s32[], a.2: bf16[64,64]) -> bf16[64,64] {
  %a.0 = bf16[32,64,64]{2,1,0} parameter(0)
  %a.1 = s32[] parameter(1)
  %a.2 = bf16[64,64]{1,0} parameter(2)
  %layer = bf16[1,64,64]{2,1,0} fusion(%a.0, %a.1), kind=kLoop, calls=%inner
  %flat = bf16[64,64]{1,0} bitcast(%layer)
  %other = bf16[64,64]{1,0} fusion(%a.2), kind=kLoop, calls=%whole
  ROOT %dot = bf16[64,64]{1,0} dot(%flat, %other), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (c: (s32[], bf16[64,64])) -> pred[] {
  %c = (s32[], bf16[64,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(32)
  ROOT %less = pred[] compare(%n, %end), direction=LT
}

%body (b: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %b = (s32[], bf16[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[64,64]{1,0} get-tuple-element(%b), index=1
  %weights = bf16[32,64,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer", frontend_attributes={kernel={
"told": "over several lines"
}}
  %y = bf16[64,64]{1,0} fusion(%weights, %i, %x), kind=kOutput, calls=%outer
  ROOT %next = (s32[], bf16[64,64]{1,0}) tuple(%i, %y)
}, execution_thread="main"

ENTRY %main (x: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %x.1 = (s32[], bf16[64,64]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[64,64]{1,0}) while(%x.1), condition=%condition, body=%body
}
"""


def test_fusions_in_fusions_and_loops_that_only_their_condition_counts():
    """Of the weights of 32 layers each turn reads those of one, and all of what is multiplied."""
    module = Module(NESTED)
    found = Walk(module, SLOW).cost()
    one = 64 * 64 * 2
    assert found.flops == 32 * 2 * 64**3
    numbers = 4 + 9  # the layer's, and what the condition compares
    assert found.bytes == 32 * (3 * one + numbers)  # the layer, the other, the result
    assert not found.kernels


def test_a_sum_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
    text = """HloModule m

%all-reduce-scatter.1 (input: bf16[4096,64]) -> bf16[1024,64] {
  %input = bf16[4096,64]{1,0} parameter(0)
  %sum = bf16[4096,64]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = bf16[1024,64]{1,0} slice(%sum), slice={[0:1024], [0:64]}
}

ENTRY %main (x: bf16[4096,64]) -> bf16[1024,64] {
  %x = bf16[4096,64]{1,0} parameter(0)
  ROOT %kept = bf16[1024,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (moved,) = Walk(Module(text), SLOW).cost().collectives
    assert (moved.kind, moved.devices, moved.bytes) == ("reduce-scatter", 4, 4096 * 64 * 2)
    assert moved.sent == 4096 * 64 * 2 * 3 / 4
