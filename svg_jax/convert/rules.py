"""Conversion as a table of rules, read in both directions.

    Rule("{stack:layers|noise_refiner}.{i}.{path:.+}.weight", "{stack}.{path}.kernel", LINEAR)

says that `layers.7.attention.qkv.weight` of the release, transposed, is entry 7 of our `layers.attention.qkv.kernel`,
for every layer, and back. `{i}` is the index of a layer; ours are stacked on a leading axis. Any other `{word}` stands
for one word, or for what matches the regular expression after its colon, and is the same on both sides. Of several
rules that fit a name the first holds. Numbers are moved, never computed: what comes back is equal bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from svg_jax.convert.transforms import Transform

Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Names in the release (several where they are fused into one array of ours), our name, and what lies between."""

    release: str | tuple[str, ...]
    ours: str
    transform: Transform | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The patterns of the release's names."""
        return (self.release,) if isinstance(self.release, str) else self.release

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading axis of layers."""
        return "{i}" in self.parts[0]

    def forward(self, *arrays: np.ndarray) -> np.ndarray:
        """One layer, release -> ours."""
        return self.transform.to_ours(*arrays) if self.transform else arrays[0]

    def backward(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """One layer, ours -> release."""
        return self.transform.to_release(array) if self.transform else (array,)


@dataclasses.dataclass(frozen=True)
class Carried:
    """A key of the release that no parameter of ours is made of; it travels under its own name, for the way back."""

    release: str
    reason: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The pattern of the release's name."""
        return (self.release,)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A key of the release that has no use here and is left behind, as it would weigh much for nothing."""

    release: str
    reason: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The pattern of the release's name."""
        return (self.release,)


@dataclasses.dataclass(frozen=True)
class Filled:
    """A parameter of ours that the release does not store: a function of its shape, still true when exported."""

    ours: str
    value: Callable[[tuple[int, ...]], np.ndarray]
    reason: str


Row = Rule | Carried | Dropped | Filled
Table = tuple[Row, ...]


def to_jax(state_dict: Mapping[str, np.ndarray], rules: Table, shapes: Shapes | None = None) -> dict[str, np.ndarray]:
    """Our parameters from a state dict of the release.

    Args:
        state_dict: Arrays by release name; they may be memory maps, each is read once.
        rules: The network's table.
        shapes: Our parameters as they must come out, `Network.shapes`. Without them the names alone decide: a missing
            parameter is only noticed where a stack has a gap, and what the release does not store is left out.

    Returns:
        Arrays by our name, views of the given ones where possible, dtypes unchanged.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape, or layers of one stack differ in dtype.
    """
    return dict(Converted(state_dict, state_dict, rules, shapes))


class Converted(Mapping[str, np.ndarray]):
    """`to_jax`, one parameter at a time: each is put together when it is asked for, and not kept."""

    def __init__(
        self,
        state_dict: Mapping[str, np.ndarray],
        structs: Mapping[str, Any],
        rules: Table,
        shapes: Shapes | None = None,
    ) -> None:
        """Checks every key; nothing is read.

        Args:
            state_dict: As for `to_jax`.
            structs: What has the shapes of `state_dict`, and can be asked for them without reading anything.
            rules: As for `to_jax`.
            shapes: As for `to_jax`.

        Raises:
            ValueError: Keys are missing, unexpected or of another shape, or layers of one stack differ in dtype.
        """
        entries = _entries_of_names(structs, rules) if shapes is None else _entries_of_shapes(shapes, rules)
        keys = [key for entry in entries for layer in entry.keys for key in layer]
        if len(keys) != len(set(keys)):
            raise ValueError(f"the table uses a key twice: {sorted(k for k in set(keys) if keys.count(k) > 1)}")
        if problem := report(differences(structs, rules, shapes)):
            raise ValueError(f"the weights do not fit: {problem}")
        for entry in entries:
            _check_dtypes(entry, structs)
        self._state_dict = state_dict
        self._entries = {entry.name: entry for entry in entries}
        self._filled: dict[str, Callable[[], np.ndarray]] = {}
        for name, struct in (shapes or {}).items():
            rule, _ = _rule_for(name, rules)
            if isinstance(rule, Filled):
                self._filled[name] = functools.partial(rule.value, struct.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._filled[name]() if name in self._filled else _assemble(self._entries[name], self._state_dict)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._entries, *self._filled])

    def __len__(self) -> int:
        return len(self._entries) + len(self._filled)


def differences(structs: Mapping[str, Any], rules: Table, shapes: Shapes | None = None) -> dict[str, list[str]]:
    """Keys of a state dict that are missing, unexpected or of another shape; arguments as for `Converted`."""
    entries = _entries_of_names(structs, rules) if shapes is None else _entries_of_shapes(shapes, rules)
    keys = [key for entry in entries for layer in entry.keys for key in layer]
    used = {*keys, *carried(structs, rules), *dropped(structs, rules)}
    differing = []
    if shapes is not None:
        expected = release_shapes(shapes, rules)
        differing = [
            f"{key} {tuple(structs[key].shape)} instead of {expected[key].shape}"
            for key in expected
            if key in structs and tuple(structs[key].shape) != expected[key].shape
        ]
    missing, unexpected = [k for k in keys if k not in structs], [k for k in structs if k not in used]
    return {"missing": missing, "unexpected": unexpected, "of another shape": differing}


def carried(names: Iterable[str], rules: Table) -> dict[str, str]:
    """The names that no parameter of ours is made of and that travel along, each with its reason."""
    return {name: rule.reason for name in names if isinstance(rule := _first(name, rules), Carried)}


def dropped(names: Iterable[str], rules: Table) -> dict[str, str]:
    """The names that are left behind, each with its reason."""
    return {name: rule.reason for name in names if isinstance(rule := _first(name, rules), Dropped)}


def below(prefix: str, rules: Table, ours: str | None = None) -> Table:
    """A network's table where the network is a part of another.

    Args:
        prefix: What every name of the release begins with.
        rules: The network's table.
        ours: What every name of ours begins with; the same by default.
    """

    def moved(rule: Row) -> Row:
        if isinstance(rule, Filled):
            return dataclasses.replace(rule, ours=start + rule.ours)
        if isinstance(rule, Rule):
            return dataclasses.replace(
                rule, release=tuple(prefix + part for part in rule.parts), ours=start + rule.ours
            )
        return dataclasses.replace(rule, release=prefix + rule.release)

    start = prefix if ours is None else ours
    return tuple(moved(rule) for rule in rules)


def to_release(params: Mapping[str, Any], rules: Table) -> dict[str, np.ndarray]:
    """A state dict of the release from our parameters: the inverse of `to_jax`.

    Args:
        params: Our arrays, by name.
        rules: The network's table.

    Returns:
        Arrays by release name; views, not always contiguous.

    Raises:
        ValueError: A parameter has no rule, or the release's format cannot express its value.
    """
    return dict(iterate_release(params, rules))


def iterate_release(params: Mapping[str, Any], rules: Table) -> Iterator[tuple[str, np.ndarray]]:
    """`to_release`, one tensor at a time, so that a writer never holds more than one parameter twice."""
    for name, value in params.items():
        array = np.asarray(value)
        rule, _ = _rule_for(name, rules)
        if isinstance(rule, Filled):
            if not np.allclose(array.astype(np.float32), rule.value(array.shape), rtol=1e-5, atol=0):
                raise ValueError(f"'{name}' cannot be exported: {rule.reason}, and its value is another")
            continue
        for entry in _entries_of_shapes({name: jax.ShapeDtypeStruct(array.shape, array.dtype)}, rules):
            for layer, layer_keys in zip(array if rule.stacked else [array], entry.keys, strict=True):
                yield from zip(layer_keys, rule.backward(layer), strict=True)


def release_shapes(shapes: Shapes, rules: Table) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of the release's tensors for a network of ours; nothing is allocated but a few bytes."""
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for entry in _entries_of_shapes(shapes, rules):
        struct = shapes[entry.name]
        shape = struct.shape[1:] if entry.rule.stacked else struct.shape
        pieces = [piece.shape for piece in entry.rule.backward(np.broadcast_to(np.int8(0), shape))]
        for layer in entry.keys:
            found |= {k: jax.ShapeDtypeStruct(s, struct.dtype) for k, s in zip(layer, pieces, strict=True)}
    return found


class _Entry(NamedTuple):
    """One parameter of ours: its rule and, layer by layer, the release's keys it is made of."""

    name: str
    rule: Rule
    keys: list[tuple[str, ...]]


def _entry(rule: Rule, words: dict[str, str], depth: int) -> _Entry:
    layers = range(depth) if rule.stacked else [0]
    keys = [tuple(_fill(part, words | {"i": str(i)}) for part in rule.parts) for i in layers]
    return _Entry(_fill(rule.ours, words), rule, keys)


def _entries_of_shapes(shapes: Shapes, rules: Table) -> list[_Entry]:
    matched = [(struct, *_rule_for(name, rules)) for name, struct in shapes.items()]
    return [
        _entry(rule, words, struct.shape[0] if rule.stacked else 1)
        for struct, rule, words in matched
        if isinstance(rule, Rule)
    ]


def _entries_of_names(names: Iterable[str], rules: Table) -> list[_Entry]:
    """What the release's names alone say; the depth of a stack is its largest index plus one."""
    found: dict[str, tuple[Rule, dict[str, str], int]] = {}
    for name in names:
        if isinstance(rule := _first(name, rules), Rule):
            words = next(match.groupdict() for p in _compiled(rule.parts) if (match := p.fullmatch(name)))
            ours, depth = _fill(rule.ours, words), int(words.get("i", 0)) + 1
            found[ours] = rule, words, max(depth, found[ours][2] if ours in found else 0)
    return [_entry(*value) for value in found.values()]


def _first(name: str, rules: Table) -> Row | None:
    """The first entry of a table that a name of the release fits."""
    named = (rule for rule in rules if not isinstance(rule, Filled))
    return next((rule for rule in named if any(p.fullmatch(name) for p in _compiled(rule.parts))), None)


def _rule_for(name: str, rules: Table) -> tuple[Rule | Filled, dict[str, str]]:
    """The first rule whose right side is `name`, and what its words stand for."""
    for rule in rules:
        if isinstance(rule, Filled) and rule.ours == name:
            return rule, {}
        if isinstance(rule, Rule) and (match := _compiled((rule.ours, *rule.parts))[0].fullmatch(name)):
            return rule, match.groupdict()
    raise ValueError(f"no conversion rule leads to the parameter '{name}': add one to the network's table")


_WORD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


@functools.cache
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Regular expressions of patterns that share their words: what one says of a word holds in all."""
    meaning = {"i": "0|[1-9][0-9]*"}
    for pattern in patterns:
        meaning |= {name: regex for name, regex in _WORD.findall(pattern) if regex}

    def expression(pattern: str) -> str:
        pieces = _WORD.split(pattern)  # literal, name, regex, literal, name, regex, ..., literal
        words = [f"(?P<{name}>{meaning.get(name, '[^.]+')})" for name in pieces[1::3]] + [""]
        return "".join(re.escape(literal) + word for literal, word in zip(pieces[::3], words, strict=True))

    return tuple(re.compile(expression(pattern)) for pattern in patterns)


def _fill(pattern: str, words: dict[str, str]) -> str:
    return _WORD.sub(lambda match: words[match[1]], pattern)


def _check_dtypes(entry: _Entry, structs: Mapping[str, Any]) -> None:
    first = str(structs[entry.keys[0][0]].dtype)
    for keys in entry.keys:
        dtypes = sorted({str(structs[key].dtype) for key in keys})
        if len(dtypes) > 1:
            raise ValueError(f"{', '.join(keys)} are one parameter here and differ in dtype: {', '.join(dtypes)}")
        if dtypes != [first]:
            raise ValueError(
                f"{keys[0]} is {dtypes[0]} and {entry.keys[0][0]} {first}: layers of one stack must be alike"
            )


def _assemble(entry: _Entry, state_dict: Mapping[str, np.ndarray]) -> np.ndarray:
    layers = (entry.rule.forward(*(state_dict[key] for key in keys)) for keys in entry.keys)
    if not entry.rule.stacked:
        return next(layers)
    stack: np.ndarray | None = None
    for i, layer in enumerate(layers):  # filled in place: the peak is one copy of the stack
        if stack is None:
            stack = np.empty((len(entry.keys), *layer.shape), layer.dtype)
        if layer.shape != stack.shape[1:]:
            raise ValueError(
                f"{entry.keys[i][0]} is {list(layer.shape)} and {entry.keys[0][0]} {list(stack.shape[1:])} "
                "in our layout: layers of one stack must be alike"
            )
        stack[i] = layer
    assert stack is not None
    return stack


def report(lists: Mapping[str, list[str]], limit: int = 20) -> str:
    """The lists that are not empty, sorted by layer number and cut at `limit`."""

    def some(items: list[str]) -> str:
        items = sorted(items, key=lambda item: [(len(w), w) if w.isdigit() else (0, w) for w in item.split(".")])
        return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")

    return "; ".join(f"{len(items)} {kind}: {some(items)}" for kind, items in lists.items() if items)
