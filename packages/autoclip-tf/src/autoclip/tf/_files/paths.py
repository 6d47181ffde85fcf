"""Variables' paths in a saved state, as the model that loads it has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from autoclip.core import State


def paths_in(state: State) -> set[str]:
    """The paths of all variables that have one."""
    return {*_names(state)} - {""}


def with_paths_of(saved: State, current: State) -> State:
    """The saved state, with the clipper's paths for variables that only begin otherwise.

    The name of a Sequential or a subclassed model begins its variables' paths until the model is
    loaded: `block/dense/kernel` is then `dense/kernel`.

    Args:
        saved: the state that is loaded.
        current: the state of the clipper that loads it.
    """
    theirs, mine = _names(saved), _names(current)
    paths = {i: mine[j] for i, j in pairs_of_paths(theirs, mine)}
    return _renamed(saved, paths) if paths else saved


def pairs_of_paths(theirs: Sequence[str], mine: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The index of each path in `theirs` that only begins otherwise in `mine`, and its index there.

    Paths in both have no pair.
    """
    both = {*theirs} & {*mine}
    old = [i for i, name in enumerate(theirs) if name and name not in both]
    new = [i for i, name in enumerate(mine) if name and name not in both]
    old_names, new_names = [theirs[i] for i in old], [mine[i] for i in new]
    yield from ((old[i], new[j]) for i, j in _ends(old_names, new_names))
    yield from ((old[i], new[j]) for j, i in _ends(new_names, old_names))


def with_model_of(saved: State, current: State, others: Collection[str]) -> State:
    """The saved state, with the clipper's model in paths that all begin with the name of another.

    Keras numbers models without a name through a whole process: `sequential/dense/kernel` is
    `sequential_1/dense/kernel` in the same model, made again.

    Args:
        saved: the state that is loaded.
        current: the state of the clipper that loads it.
        others: the paths of the clipper's model that the clipper does not have.
    """
    here = {*paths_in(current), *others}
    (there, old), (ours, new) = _models_in(paths_in(saved)), _models_in(here)
    # A path of two parts may begin with a layer, and layers are told apart by their names.
    if len(there) != 1 or len(ours) != 1 or old.isdisjoint(new):
        return saved
    [model] = ours
    paths = {i: f"{model}/{name.partition('/')[2]}" for i, name in enumerate(_names(saved)) if name}
    return _renamed(saved, paths)


def _models_in(paths: Collection[str]) -> tuple[set[str], set[str]]:
    """The first parts of paths, and the rest of those that have at least three parts."""
    parts = [path.partition("/") for path in paths]
    return {first for first, _, _ in parts}, {rest for _, _, rest in parts if "/" in rest}


def _names(state: State) -> list[str]:
    """All parameters' names in order; "" for none."""
    return [info.name or "" for group in state.groups for info in group.parameters]


def _ends(longer: Sequence[str], shorter: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The indices of a path in `longer` and of the one in `shorter` that it ends with.

    Of several paths with one end, all match in order, or none if there are more on one side.
    """
    wanted: dict[str, list[int]] = {name: [] for name in shorter}
    found: dict[str, list[int]] = {name: [] for name in shorter}
    for j, name in enumerate(shorter):
        wanted[name].append(j)
    for i, name in enumerate(longer):
        end = name
        while end and end not in wanted:
            end = end.partition("/")[2]
        if end:
            found[end].append(i)
    for name, positions in wanted.items():
        if len(found[name]) == len(positions):
            yield from zip(found[name], positions)


def _renamed(state: State, names: dict[int, str]) -> State:
    positions = iter(range(len(_names(state))))
    groups = (
        replace(
            group,
            parameters=tuple(
                replace(info, name=names.get(i, info.name))
                for info, i in zip(group.parameters, positions)
            ),
        )
        for group in state.groups
    )
    return replace(state, groups=tuple(groups))
