"""What a compiled program sends between devices, read from its text (`compiled.as_text()`).

Bytes are those that one device sends in a ring of n devices, s being the bytes that it puts in:

    all-gather          s (n - 1)          (its output is n s: a share (n - 1)/n of it comes from others)
    reduce-scatter      s (n - 1)/n
    all-reduce          2 s (n - 1)/n      (a reduce-scatter, then an all-gather)
    all-to-all          s (n - 1)/n
    collective-permute  s

Rabenseifner 2004, "Optimization of collective reduction operations"; they are also the least that any algorithm sends.
What is found: synchronous operations; start/done pairs, once; TPU's asynchronous fusions, which carry a gather through
several fusions, once; `all-reduce-scatter` fusions, whose body is an all-reduce and a slice, as the reduce-scatter that
they run as; transfers between slices, which appear as send and receive to the host (`megascale`). An operation in a
loop counts as often as the loop runs, also nested; of a conditional, the branch that sends most.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_MEGASCALE = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of the program."""

    kind: str  # one of KINDS
    name: str
    bytes: int  # that a device sends each time
    group: int  # devices that take part together, or slices where it goes between slices
    times: int  # that the program runs it
    between_slices: bool  # over the data centre network (DCN), not over the links between chips (ICI)
    asynchronous: bool  # the compiler lets other work run meanwhile
    counted: bool = True  # whether the text tells `times`; else a loop around it has `unknown_trips`

    @property
    def total(self) -> int:
        """Bytes that a device sends in one run of the program."""
        return self.bytes * self.times


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


_Computation = dict[str, _Instruction]


def collectives(hlo: str, slices: Sequence[int] | None = None, *, unknown_trips: int = 1) -> list[Collective]:
    """All collectives that a run of the program executes.

    Args:
        hlo: Text of the compiled module.
        slices: The slice of each device, in the order of the program's device assignment (`mesh.devices.flat`); all one
            by default.
        unknown_trips: How often a loop runs whose count the text does not tell, as one over a number given at run time.

    Raises:
        ValueError: The text holds no compiled module.
    """
    computations, entry = _parse(hlo)
    if entry is None:
        raise ValueError("this is no text of a compiled module: it has no ENTRY computation")
    return list(_walk(computations, entry, 1, slices or (), unknown_trips))


def by_kind(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Bytes that a device sends: {"ici": {kind: bytes}, "dcn": {kind: bytes}}, kinds that do not occur left out."""
    table: dict[str, dict[str, int]] = {"ici": {}, "dcn": {}}
    for one in found:
        if one.total:
            row = table["dcn" if one.between_slices else "ici"]
            row[one.kind] = row.get(one.kind, 0) + one.total
    return table


def sent(kind: str, size: float, group: int) -> float:
    """Bytes that a device sends in a ring of `group`, putting in `size`; the formulas above."""
    share = (group - 1) / group
    return {
        "all-gather": size * (group - 1),
        "reduce-scatter": size * share,
        "all-reduce": 2 * size * share,
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]


def replica_groups(attributes: str) -> list[list[int]] | None:
    """The groups of an operation, in any of the forms that XLA writes; None where it writes none.

    {{0,1},{2,3}}                                          listed
    [2,4]<=[4,2]T(1,0)                                     iota: reshape, transpose, cut into rows
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}      one group for each place on the axes not named
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(found[2], found[3]).reshape(_ints(found[1])).tolist()
    if found := re.search(
        r"replica_groups=@?\w*mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\])(?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}",
        attributes,
    ):
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])]
        sizes = [size for _, size in axes]
        ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes))
        taken = re.findall(r"'([^']+)'", found[4])
        inside = [i for i, (name, _) in enumerate(axes) if name in taken]
        outside = [i for i in range(len(axes)) if i not in inside]
        grid = ids.reshape(sizes).transpose(*outside, *inside)
        return grid.reshape(-1, math.prod(sizes[i] for i in inside)).tolist()
    return None


def _walk(
    computations: dict[str, _Computation], name: str, times: int, slices: Sequence[int], unknown: int
) -> Iterator[Collective]:
    body = computations[name]
    for one in body.values():
        if (found := _collective(one, name, body, times, slices)) is not None:
            yield found
        elif one.opcode == "while":
            trips = trip_count(computations, one, body)
            inner = _named(one.attributes, "body")[0]
            for inside in _walk(computations, inner, times * (unknown if trips is None else trips), slices, unknown):
                yield inside if trips is not None else dataclasses.replace(inside, counted=False)
        elif one.opcode == "conditional":
            branches = [
                list(_walk(computations, branch, times, slices, unknown))
                for branch in _named(one.attributes, "branch_computations", "true_computation", "false_computation")
            ]
            yield from max(branches, key=lambda branch: sum(c.total for c in branch), default=[])
        elif not one.opcode.endswith(("-done", "-update")):
            for called in _named(one.attributes, "calls", "to_apply", "called_computations"):
                for inside in _walk(computations, called, times, slices, unknown):
                    yield dataclasses.replace(inside, asynchronous=True) if one.opcode == "async-start" else inside


def _collective(
    one: _Instruction, computation: str, body: _Computation, times: int, slices: Sequence[int]
) -> Collective | None:
    asynchronous = one.opcode.endswith("-start")
    kind = one.opcode.removesuffix("-start").replace("ragged-", "")
    if one.opcode == "send" and (transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)):
        kind, group = _MEGASCALE.get(transfer[1], "collective-permute"), _megascale_group(one.attributes)
        size = _size(body[one.operands[0]].shape)
        return Collective(kind, one.name, round(sent(kind, size, group)), group, times, True, True)
    if kind not in KINDS:
        return None
    if "chain_id=" in one.attributes:  # one piece of a gather that runs beside other work: its start stands for all
        starts = (user for user in body.values() if 'custom_call_target="AsyncCollectiveStart"' in user.attributes)
        if not any(one.name in start.operands for start in starts):
            return None
        asynchronous = True
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    size = sum(_size(body[operand].shape) for operand in one.operands)
    groups = replica_groups(one.attributes) or [list(range(len(slices)))]
    group = max(len(members) for members in groups)
    # A program compiled for several slices numbers the devices of its own slice only; others are reached by megascale.
    known = max(max(members) for members in groups if members) < len(slices) if any(groups) else False
    between = known and any(len({slices[i] for i in members}) > 1 for members in groups)
    count = 2 if kind == "collective-permute" else group
    return Collective(kind, one.name, round(sent(kind, size, count)), group, times, between, asynchronous)


def _megascale_group(attributes: str) -> int:
    """Slices of `_xla_megascale_target="{1,2}x{0:3}"`: slices, then devices of each."""
    found = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', attributes)
    return len([i for part in found[1].split(",") for i in _span(part)]) if found else 2


def _span(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last or first) + 1)


def trip_count(computations: dict[str, _Computation], loop: _Instruction, body: _Computation) -> int | None:
    """How often a `while` runs: as XLA notes it, or from its counter's start, step and bound; None if neither tells."""
    if found := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    condition = computations[_named(loop.attributes, "condition")[0]]
    test = _root(condition)
    operands, inner = test.operands, test
    if test.opcode == "fusion":
        fused = computations[_named(test.attributes, "calls")[0]]
        inner = _root(fused)
        places = [_parameter(fused, operand) for operand in inner.operands]
        operands = tuple(
            operand if i is None else test.operands[i] for operand, i in zip(inner.operands, places, strict=True)
        )
        condition = {**fused, **condition}
    direction = re.search(r"direction=(\w+)", inner.attributes)
    if inner.opcode != "compare" or direction is None or direction[1] not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    sides = [_constant(condition, operand) for operand in operands]
    counters = [_element(condition, operand) for operand in operands]
    if sides[0] is None and sides[1] is not None:
        bound, index, order = sides[1], counters[0], direction[1]
    elif sides[0] is not None and sides[1] is None:
        bound, index = sides[0], counters[1]
        order = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction[1], direction[1])
    else:
        return None
    if index is None:
        return None
    start, step = _initial(loop, body, index), _step(computations, loop, index)
    if start is None or not step:
        return None
    distance = bound - start + {"LE": 1, "GE": -1}.get(order, 0)
    return max(0, -(-distance // step))


def _initial(loop: _Instruction, body: _Computation, index: int) -> int | None:
    tupled = body.get(loop.operands[0])
    return _constant(body, tupled.operands[index]) if tupled is not None and tupled.opcode == "tuple" else None


def _step(computations: dict[str, _Computation], loop: _Instruction, index: int) -> int | None:
    """What a run of the body adds to its counter."""
    body = computations[_named(loop.attributes, "body")[0]]
    root = _root(body)
    if root.opcode != "tuple":
        return None
    added = _through(body, root.operands[index])
    operands, inner = added.operands, body
    if added.opcode == "fusion":
        inner = computations[_named(added.attributes, "calls")[0]]
        added = _root(inner)
        operands = added.operands
    if added.opcode != "add":
        return None
    steps = [value for operand in operands if (value := _constant(inner, operand)) is not None]
    if not steps and inner is not body:  # a constant that is handed to the fusion
        fusion = _through(body, root.operands[index])
        places = [_parameter(inner, operand) for operand in operands]
        handed = [_constant(body, fusion.operands[i]) for i in places if i is not None]
        steps = [value for value in handed if value is not None]
    return steps[0] if len(steps) == 1 else None


def _root(body: _Computation) -> _Instruction:
    return next(one for one in body.values() if one.root)


def _through(body: _Computation, name: str) -> _Instruction:
    """What a value is, behind copies of it."""
    one = body[name]
    while one.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start") and one.operands[0] in body:
        one = body[one.operands[0]]
    return one


def _constant(body: _Computation, name: str) -> int | None:
    one = _through(body, name) if name in body else None
    if one is None or one.opcode != "constant" or not (found := re.fullmatch(r"-?\d+", one.operands[0])):
        return None
    return int(found[0])


def _element(body: _Computation, name: str) -> int | None:
    """Which element of the loop's state a value is."""
    one = _through(body, name) if name in body else None
    if one is None or one.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", one.attributes)
    return int(found[1]) if found else None


def _parameter(body: _Computation, name: str) -> int | None:
    one = _through(body, name)
    return int(one.operands[0]) if one.opcode == "parameter" else None


def _parse(hlo: str) -> tuple[dict[str, _Computation], str | None]:
    """Computations by name, instructions of each by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, current = None, None
    for line in hlo.splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif line == "}" or line.startswith("}, "):  # attributes of a kernel may span lines, and end on one with "}}"
            current = None
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found[2], line[found.end() :], bool(found[1]))
    return computations, entry


def _instruction(name: str, text: str, root: bool) -> _Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end + 1 :]
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(re.split(r",\s*", inside))
    return _Instruction(name, shape, rest[:opening], operands, rest[closing + 1 :], root)


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"brackets do not match in the text of a compiled module: {text[:80]}")


def _size(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    total = 0
    for kind, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/|\{[^}]*\}", "", shape)):
        found = re.search(r"\d+", kind)
        bits = _BITS[kind] if kind in _BITS else int(found[0]) if found else 0
        total += -(-bits * math.prod(_ints(dims)) // 8)
    return total


def _named(attributes: str, *keys: str) -> list[str]:
    """Computations that an instruction calls."""
    names: list[str] = []
    for key in keys:
        if found := re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes):
            names += re.findall(r"%?([\w.\-]+)", found[1])
    return names


def _iota(dims: str, transposed: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (ids.transpose(_ints(transposed)) if transposed else ids).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",") if i]
