"""What a compiled program does, read from its text: products, memory traffic and collectives of one device.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation is counted as often as it runs: loops
by their trip counts, of branches the dearest one.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They name values or hand them on.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency",
}  # fmt: skip


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    fast: bool  # in the chip's own fast memory (VMEM, "S(1)"), not in HBM

    @property
    def bytes(self) -> float:
        return BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 0) * math.prod(self.dims)

    @property
    def hbm(self) -> float:
        return 0.0 if self.fast else self.bytes


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result: several of a tuple
    operands: tuple[str, ...]
    inside: str  # the brackets' text: operands, or a parameter's number
    attributes: str

    def called(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        found: list[str] = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"[\w.\-]+", match[1]) if match else []
        return found

    @property
    def hbm(self) -> float:
        return sum(shape.hbm for shape in self.shapes)


class Rates(NamedTuple):
    """What a device reaches, in a second."""

    products: float  # FLOPs of matrix products
    memory: float  # bytes of HBM
    links: float  # bytes to and from other devices


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its result or its argument, whichever is more
    devices: int  # that take part
    overlapped: bool  # with what is computed meanwhile

    @property
    def sent(self) -> float:
        """Bytes that a device sends, in a ring."""
        share = (self.devices - 1) / self.devices
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclass
class Cost:
    """Of one device."""

    flops: float = 0.0  # of matrix products and of kernels that tell theirs
    bytes: float = 0.0  # read from and written to HBM
    seconds: float = 0.0
    collectives: dict[Collective, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # Collective -> how often
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # name -> how often

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.seconds += times * other.seconds
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        for kernel, count in other.kernels.items():
            self.kernels[kernel] += times * count


_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Every array that a type names: one, or those of a tuple."""
    return tuple(
        Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), "S(1)" in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _balanced(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i + 1
    raise ValueError(f"no closing bracket: {text[start : start + 80]!r}")


def read_instruction(line: str) -> Instruction | None:
    """An instruction of a computation; None of any other line."""
    head = _HEAD.match(line)
    if head is None:
        return None
    at = head.end()
    end = _balanced(line, at) if line[at] == "(" else line.index(" ", at)
    opened = line.index("(", end)
    closed = _balanced(line, opened)
    inside = line[opened + 1 : closed - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        head[1], line[end:opened].strip(), shapes_of(line[at:end]), operands, inside, line[closed:]
    )


class Module:
    """A program's computations by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
                    current = self.computations[match[2]] = []
                    self.entry = match[2] if match[1] else self.entry
            elif re.fullmatch(r"\}(, execution_thread=.*)?", line):
                current = None
            elif (instruction := read_instruction(line)) is not None:
                current.append(instruction)
            elif current:  # attributes of a kernel may go over several lines
                current[-1] = current[-1]._replace(attributes=current[-1].attributes + line)
        if not self.entry:
            raise ValueError("the text has no ENTRY computation: it is no HLO module")

    def named(self, computation: str) -> Mapping[str, Instruction]:
        return {i.name: i for i in self.computations[computation]}


@dataclass
class Walk:
    """Costs of a module's computations. `loops`: trip counts of the loops of which the compiler knows none, outer ones
    first; 1 where they have run out."""

    module: Module
    rates: Rates
    loops: Sequence[float] = ()

    @cached_property
    def _loops_left(self) -> Iterator[float]:
        return iter(self.loops)

    def cost(self, computation: str = "") -> Cost:
        """Of a computation, or of the whole program. Instructions run one after the other, but for collectives that
        the compiler starts before others and awaits behind them."""
        computation = computation or self.module.entry
        named, total = self.module.named(computation), Cost()
        beside = 0.0
        for instruction in self.module.computations[computation]:
            cost = self._of(instruction, named)
            beside += sum(
                c.sent / self.rates.links for c in cost.collectives if c.overlapped and not cost.seconds
            )
            total.add(cost)
        total.seconds = max(total.seconds, beside)
        return total

    def _of(self, instruction: Instruction, named: Mapping[str, Instruction]) -> Cost:
        opcode, cost = instruction.opcode, Cost()
        if opcode == "while":
            trips = trip_count(instruction, self.module)
            if trips is None:
                trips = next(self._loops_left, 1.0)
            for called in instruction.called("body", "condition"):
                cost.add(self.cost(called), trips)
            return cost
        if opcode == "conditional":
            branches = instruction.called("branch_computations", "true_computation", "false_computation")
            return max((self.cost(b) for b in branches), key=lambda c: (c.seconds, c.flops, c.bytes))
        if opcode in ("call", "async-start"):
            for called in instruction.called("to_apply", "calls"):
                cost.add(self.cost(called))
            return cost
        if (
            opcode in FREE
            or opcode.endswith(("-done", "-update"))
            or '"AllocateBuffer"' in instruction.attributes
        ):
            return cost
        if collective_of(instruction):
            moved = self._collective(instruction, named)
            cost.collectives[moved] = 1
            cost.seconds = 0.0 if moved.overlapped else moved.sent / self.rates.links
            return cost
        if opcode == "fusion":
            (called,) = instruction.called("calls")
            cost.flops = self._products(called)
            cost.bytes = self._fusion_bytes(instruction, called, named)
            for moved in self._fused_collectives(called):
                cost.collectives[moved] += 1
                cost.seconds += 0.0 if moved.overlapped else moved.sent / self.rates.links
        else:
            cost.flops = flops(instruction, named)
            if opcode == "dynamic-update-slice":
                cost.bytes = 2 * named[instruction.operands[1]].hbm
            elif opcode in ("dynamic-slice", "gather", "slice"):
                cost.bytes = 2 * instruction.hbm
            else:
                cost.bytes = instruction.hbm + sum(named[o].hbm for o in instruction.operands if o in named)
            if opcode == "custom-call":
                cost.kernels[kernel_name(instruction)] = 1
        cost.seconds += max(cost.flops / self.rates.products, cost.bytes / self.rates.memory)
        return cost

    def _fused_collectives(self, computation: str) -> Iterator[Collective]:
        """Those in a fusion: a sum of which each device keeps a part, or one that runs beside a product."""
        named = self.module.named(computation)
        alone = not any(flops(i, named) for i in self.module.computations[computation])
        for inner in self.module.computations[computation]:
            if collective_of(inner):
                moved = self._collective(inner, named)
                scattered = computation.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if scattered else moved.kind
                yield moved._replace(kind=kind, overlapped=moved.overlapped or not alone)

    def _collective(self, instruction: Instruction, named: Mapping[str, Instruction]) -> Collective:
        started = instruction.opcode.endswith("-start")
        operands = sum(_bytes(named[o]) for o in instruction.operands if o in named)
        # What a start results in names its operands, too.
        result = instruction.shapes[-1].bytes if started else _bytes(instruction)
        if started and len(instruction.shapes) > 1:
            result = max(_bytes(instruction) - operands, 0.0)
        kind = instruction.opcode.removesuffix("-start")
        return Collective(kind, int(max(result, operands)), group_size(instruction), started)

    def _products(self, computation: str) -> float:
        named, total = self.module.named(computation), 0.0
        for inner in self.module.computations[computation]:
            total += flops(inner, named)
            for called in inner.called("calls") if inner.opcode == "fusion" else ():
                total += self._products(called)
        return total

    def _fusion_bytes(self, fusion: Instruction, called: str, named: Mapping[str, Instruction]) -> float:
        """What a fusion reads and writes. An argument of which it takes slices is read as far as they go, and one that
        it updates in place is written only where it does."""
        total = 0.0
        for inner in self.module.computations[called]:
            if inner.opcode == "parameter":
                argument = named.get(fusion.operands[int(inner.inside)])
                whole = argument.hbm if argument is not None else inner.hbm
                total += min(whole, self._read(called, inner.name, whole)) if whole else 0.0
        return total + (self._results(called) if fusion.hbm else 0.0)

    def _read(self, computation: str, name: str, whole: float) -> float:
        """Bytes of a value, of `whole`, that a fused computation reads."""
        total, instructions = 0.0, self.module.computations[computation]
        if instructions[-1].name == name:
            return whole  # it is handed on
        for use in instructions:
            if name not in use.operands:
                continue
            if use.opcode in ("dynamic-slice", "gather", "slice") and use.operands[0] == name:
                total += _bytes(use)
            elif use.opcode == "bitcast":
                total += self._read(computation, use.name, whole)
            elif use.opcode == "fusion":
                (inside,) = use.called("calls")
                for parameter in self.module.computations[inside]:
                    if parameter.opcode == "parameter" and use.operands[int(parameter.inside)] == name:
                        total += self._read(inside, parameter.name, whole)
            elif not (use.opcode == "dynamic-update-slice" and use.operands[0] == name):
                return whole
        return total

    def _results(self, computation: str, name: str = "") -> float:
        """Bytes that a fused computation writes to HBM, for its last instruction or the one of this name."""
        named = self.module.named(computation)
        made = named[name] if name else self.module.computations[computation][-1]
        if made.opcode == "tuple":
            return sum(self._results(computation, o) for o in made.operands)
        if made.opcode == "bitcast":
            return self._results(computation, made.operands[0])
        if made.opcode == "dynamic-update-slice":
            return min(made.hbm, _bytes(named[made.operands[1]]))
        if made.opcode == "fusion":
            return min(made.hbm, self._results(made.called("calls")[0]))
        return made.hbm


def _bytes(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes)


def trip_count(instruction: Instruction, module: Module) -> float | None:
    """Of a loop that counts from 0 to a constant, as those of `scan` do; None of others."""
    if match := re.search(r'known_trip_count":\{"n":"?(\d+)', instruction.attributes):
        return float(match[1])
    (condition,) = instruction.called("condition")
    named, last = module.named(condition), module.computations[condition][-1]
    if last.opcode != "compare" or "direction=LT" not in last.attributes:
        return None
    counter, end = (named[o] for o in last.operands)
    if counter.opcode != "get-tuple-element" or end.opcode != "constant":
        return None
    return float(end.inside)


def collective_of(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def group_size(instruction: Instruction) -> int:
    """How many devices take part: of the first group, for they are alike."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", instruction.attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes):
        return len(match[1].split(","))
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", instruction.attributes
    ):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2 if instruction.opcode.startswith("collective-permute") else 1


def kernel_name(instruction: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    name = target[1] if target else "custom-call"
    return re.sub(r"[.\d]+$", "", instruction.name) if name == "tpu_custom_call" else name


# Matrix products of queries by keys in JAX's splash attention kernels, which do not tell their FLOPs.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def _splash_product(instruction: Instruction, named: Mapping[str, Instruction]) -> float:
    """FLOPs of one such product, causal: of queries [.., N, T, H] with the half of the S keys [.., K, S, H]."""
    arrays = [named[o].shapes[0] for o in instruction.operands if o in named]
    queries, keys = [s.dims for s in arrays if len(s.dims) > 2 and s.dtype in ("bf16", "f32")][:2]
    t, s = queries[-2], keys[-2]
    return 2.0 * math.prod(queries) * (s - t / 2)


def flops(instruction: Instruction, named: Mapping[str, Instruction]) -> float:
    """Of a product: a multiplication and an addition count as two. 0 of anything else."""
    if instruction.opcode == "dot":
        left = named[instruction.operands[0]].shapes[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        over = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left.dims[d] for d in over)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, named)
    if instruction.opcode == "custom-call":
        for part, products in SPLASH.items():
            if instruction.name.startswith(part):
                return products * _splash_product(instruction, named)
        match = re.search(r'"?cost_estimate"?:\{[^}]*"?flops"?:"?(\d+)', instruction.attributes)
        return float(match[1]) if match else 0.0
    return 0.0


def _convolution_flops(instruction: Instruction, named: Mapping[str, Instruction]) -> float:
    """TPUs have every product as a convolution, batches as spatial dimensions of which all but one product fall on
    padding: those do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.name}")
    (left, right, out) = (labels[i] for i in (1, 2, 3))
    lhs, rhs = (named[o].shapes[0].dims for o in instruction.operands[:2])
    result = instruction.shapes[0].dims
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", found[1] if found else ""))
    spatial = sorted(c for c in out if c.isdigit())

    def each(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    stride, lhs_dilate, rhs_dilate = (
        [int(v) for v in each(k, "1")] for k in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = [int(v.split("_")[0]) for v in each("pad", "0_0")]
    valid = 1
    for i, dim in enumerate(spatial):
        sizes = lhs[left.index(dim)], rhs[right.index(dim)], result[out.index(dim)]
        valid *= _valid(*sizes, stride[i], before[i], lhs_dilate[i], rhs_dilate[i])
    # A kernel's input features are those of one group already.
    return 2.0 * valid * rhs[right.index("i")] * result[out.index("b")] * result[out.index("f")]


def _valid(
    size_in: int, size_kernel: int, size_out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of an output place and a kernel place of one dimension whose input is no padding and no gap."""
    if size_kernel == 1 and pad == 0 and lhs_dilate == 1:
        return size_out
    count = 0
    for k in range(size_kernel):
        for o in range(size_out):
            at = o * stride + k * rhs_dilate - pad
            count += at % lhs_dilate == 0 and 0 <= at // lhs_dilate < size_in
    return count
