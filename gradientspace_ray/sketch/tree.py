"""The fixed tree by which the sketches of shards become one.

It follows from the leaves alone, so the result does not depend on who merges what and when; and since an inner node is
named by the leaves under it, what has been merged is known from what is there.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Method = Literal["merge", "sum", "refine"]
LEAVES, MERGED = "sketch/shards", "sketch/merged"
ROOT = "sketch/rows"
QUARANTINE = "sketch/quarantine"
"""Why shards have failed, a file for each."""
BASIS = "sketch/basis"
"""The sketch of the first pass, while a second one refines it."""


@dataclass(frozen=True)
class Node:
    """One sketch: a leaf, or what its one or two children are merged to."""

    name: str
    folder: str
    """Where it is saved, relative to the run directory."""
    children: tuple["Node", ...] = ()
    method: Method = "merge"
    """How the children become this node, see `merging`."""

    @property
    def leaves(self) -> tuple["Node", ...]:
        """The leaves under this node, in order."""
        return tuple(leaf for child in self.children for leaf in child.leaves) if self.children else (self,)


def merge_tree(leaves: Sequence[str], without: Collection[str] = (), folder: str = ROOT) -> Node:
    """The root of the binary tree over the leaves in the order given, level by level; a lone leaf gets a root, too.

    Args:
        leaves: names of all leaves.
        without: leaves that are left out. The others keep their places, so that only nodes above these change.
        folder: where the root is saved.

    Raises:
        ValueError: there are no leaves.
    """
    root = _binary_tree(leaves, without, "merge")
    return replace(root if root.children else _parent([root], "merge"), folder=folder)


def refinement_tree(leaves: Sequence[str], without: Collection[str] = ()) -> Node:
    """The same tree for the sums of a second pass (see `Refinement`); its root turns them into the sketch.

    Raises:
        ValueError: there are no leaves.
    """
    return replace(_parent([_binary_tree(leaves, without, "sum")], "refine"), folder=ROOT)


def missing(node: Node, has_record: Callable[[Node], bool], has_rows: Callable[[Node], bool]) -> list[Node]:
    """The nodes that must be made to have the root with its rows, and all others without, children first.

    What was merged has lost its rows, and needs them again only where its parent is not there.
    """
    return list(_missing(node, has_record, has_rows, rows_are_read=True))


def _missing(
    node: Node, has_record: Callable[[Node], bool], has_rows: Callable[[Node], bool], rows_are_read: bool
) -> Iterator[Node]:
    is_there = has_record(node) and (has_rows(node) or not rows_are_read)
    for child in node.children:
        yield from _missing(child, has_record, has_rows, rows_are_read=not is_there)
    if not is_there:
        yield node


def to_read(made: Sequence[Node]) -> list[Node]:
    """What stands already and is read to make the nodes that `missing` named."""
    names = {node.name for node in made}
    return [child for node in made for child in node.children if child.name not in names]


def _binary_tree(leaves: Sequence[str], without: Collection[str], method: Method) -> Node:
    level = [None if leaf in without else Node(leaf, f"{LEAVES}/{leaf}") for leaf in leaves]
    while len(level) > 1:
        level = [_joined(level[start : start + 2], method) for start in range(0, len(level), 2)]
    if not level or level[0] is None:
        raise ValueError("there are no sketches to merge")
    return level[0]


def _joined(pair: Sequence[Node | None], method: Method) -> Node | None:
    """The parent of two nodes; where one is left out, or has no partner, the other moves up as it is."""
    nodes = [node for node in pair if node]
    if len(nodes) == 2:
        return _parent(nodes, method)
    return nodes[0] if nodes else None


def _parent(children: Sequence[Node], method: Method) -> Node:
    text = "\n".join([method, *(child.name for child in children)])
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Node(name, f"{MERGED}/{name}", tuple(children), method)
