"""The fixed tree by which partial sketches are merged.

It follows from the leaves alone, so the result does not depend on who merges what and when; and since an inner node is
named by the leaves under it, what has been merged is known from what is there.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

LEAVES, MERGED, ROOT = "sketch/shards", "sketch/merged", "sketch/rows"


@dataclass(frozen=True)
class Node:
    """One sketch: a leaf, or the merge of its one or two children."""

    name: str
    folder: str
    """Where it is saved, relative to the run directory."""
    children: tuple["Node", ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the leaves under this node, in order."""
        return tuple(leaf for child in self.children for leaf in child.leaves) if self.children else (self.name,)


def merge_tree(leaves: Sequence[str]) -> Node:
    """The root of the binary tree over the leaves in the order given, level by level; one leaf gets a root of its own.

    Raises:
        ValueError: there are no leaves.
    """
    if not leaves:
        raise ValueError("there are no sketches to merge")
    level = [Node(leaf, f"{LEAVES}/{leaf}") for leaf in leaves]
    while len(level) > 2:
        pairs = [level[start : start + 2] for start in range(0, len(level), 2)]
        level = [_parent(pair, MERGED) if len(pair) == 2 else pair[0] for pair in pairs]
    return replace(_parent(level, MERGED), folder=ROOT)


def to_read(made: Sequence[Node]) -> list[Node]:
    """What stands already and is read to make the nodes that `missing` named."""
    names = {node.name for node in made}
    return [child for node in made for child in node.children if child.name not in names]


def missing(node: Node, is_there: Callable[[Node], bool]) -> Iterator[Node]:
    """The nodes that must be made to have `node`, children first; nothing under a node that is there is asked for."""
    if is_there(node):
        return
    for child in node.children:
        yield from missing(child, is_there)
    yield node


def _parent(children: Sequence[Node], parent_folder: str) -> Node:
    name = hashlib.sha256("\n".join(child.name for child in children).encode()).hexdigest()[:16]
    return Node(name, f"{parent_folder}/{name}", tuple(children))
